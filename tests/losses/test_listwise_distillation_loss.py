from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer

from helpers.golden import relative_error
from pml_extras.functional import listwise_kl
from pml_extras.losses import ListwiseDistillationLoss


def test_equals_the_golden_values(listwise_case):
    case = listwise_case
    student = case["student"].requires_grad_()
    tau = float(case["temperature"])
    loss = ListwiseDistillationLoss(temperature=tau)(
        student, case["labels"], ref_emb=case["teacher"]
    )
    loss.backward()
    assert relative_error(loss, tau**2 * case["kl"]) < 1e-4
    assert relative_error(student.grad, tau**2 * case["kl_grad"]) < 1e-4


def test_returns_one_loss_per_sample():
    student, teacher = torch.randn(8, 4), torch.randn(8, 6)
    loss_func = ListwiseDistillationLoss(
        temperature=0.5, include_self=False, reducer=DoNothingReducer()
    )
    losses = loss_func(student, ref_emb=teacher)["loss"]["losses"]
    assert torch.equal(
        losses, 0.25 * listwise_kl(student, teacher, temperature=0.5, include_self=False)
    )


def test_is_zero_when_student_and_teacher_coincide():
    x = torch.randn(8, 4, requires_grad=True)
    loss = ListwiseDistillationLoss(temperature=0.1)(x, ref_emb=x.detach().clone())
    loss.backward()
    assert loss == 0
    assert x.grad.abs().max() < 1e-6


def test_invalid_input_is_rejected():
    x = torch.randn(8, 4)
    loss_func = ListwiseDistillationLoss()
    with pytest.raises(ValueError, match="teacher's embeddings of the same samples, is required"):
        loss_func(x)
    with pytest.raises(ValueError, match="got 7 rows for 8 embeddings"):
        loss_func(x, ref_emb=x[:7])
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        loss_func(x, indices_tuple=(torch.tensor([0]),) * 3, ref_emb=x.clone())
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        ListwiseDistillationLoss(temperature=0)
    with pytest.raises(AssertionError, match="CosineSimilarity"):
        ListwiseDistillationLoss(distance=LpDistance())


def test_an_empty_batch_has_zero_loss():
    x = torch.empty(0, 4, requires_grad=True)
    loss = ListwiseDistillationLoss()(x, ref_emb=torch.empty(0, 4))
    loss.backward()
    assert loss == 0
