"""Properties of ListwiseDistillationLoss and listwise_kl."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning.reducers import DoNothingReducer
from torch.nn.functional import kl_div

from helpers.formulas import gradients_fit_dtype, normalized, norms_fit_float32
from helpers.state import assert_refused_without_change
from helpers.strategies import embeddings, log_uniform, seeds, shapes, small_shapes
from pml_extras.functional import listwise_kl
from pml_extras.losses import ListwiseDistillationLoss


def kl_formula(student, teacher, temperature, include_self):
    log_q, log_p = (
        torch.where(
            torch.eye(len(x), dtype=torch.bool) & (not include_self),
            -1e30,
            normalized(x) @ normalized(x).T / temperature,
        ).log_softmax(1)
        for x in (student, teacher)
    )
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


@given(data=st.data(), include_self=st.booleans())
def test_values_match_the_formula_and_gradients_are_finite(data, include_self):
    n, d = data.draw(shapes)
    student = data.draw(embeddings(n, d)).requires_grad_()
    teacher = data.draw(embeddings(n, data.draw(st.integers(1, 16))))
    temperature = data.draw(log_uniform(-3, 3))
    loss_func = ListwiseDistillationLoss(temperature=temperature, include_self=include_self)
    loss = loss_func(student, ref_emb=teacher)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    if gradients_fit_dtype(student, max(1.0, 4 * temperature)):
        assert student.grad.isfinite().all()
    kl = listwise_kl(student.detach(), teacher, temperature=temperature, include_self=include_self)
    assert kl.shape == (n,)
    assert (kl >= 0).all()
    if n and norms_fit_float32(student, teacher):
        expected = kl_formula(student.detach(), teacher, temperature, include_self)
        # Rounding changes each similarity by a few eps / temperature. Where the lists agree, the
        # divergence is of the order of its square.
        eps = 2e-6 if kl.dtype == torch.float32 else 1e-14
        tolerance = 4 * eps / temperature * (1 + expected) + (4 * eps / temperature) ** 2 + 1e-12
        assert ((kl - expected).abs() <= tolerance).all()


@given(data=st.data(), include_self=st.booleans())
def test_gradients_match_the_formula(data, include_self):
    n, d = data.draw(small_shapes)
    student, teacher = (
        data.draw(embeddings(n, d, dtype=torch.float64, extreme=False)) for _ in range(2)
    )
    temperature = data.draw(log_uniform(-2, 3))
    assume((student.norm(dim=1) > 0).all())
    gradients = []
    for function in (listwise_kl, kl_formula):
        x = student.clone().requires_grad_()
        options = {"temperature": temperature, "include_self": include_self}
        function(x, teacher, **options).sum().backward()
        gradients.append(x.grad * student.norm(dim=1, keepdim=True))
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12 / temperature**2)


@given(data=st.data())
def test_sample_order_and_embedding_norms_do_not_matter(data):
    n, d = data.draw(shapes)
    student, teacher = (data.draw(embeddings(n, d, extreme=False)) for _ in range(2))
    temperature = data.draw(log_uniform(-1, 3))
    kl = listwise_kl(student, teacher, temperature=temperature)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(seeds)))
    permuted = listwise_kl(student[order], teacher[order], temperature=temperature)
    assert torch.allclose(permuted, kl[order], rtol=1e-4, atol=1e-4 / temperature)
    factor = 2.0 ** data.draw(st.integers(-6, 6))
    scaled = student * factor
    assume(scaled.isfinite().all() and torch.equal(scaled / factor, student))
    assume(norms_fit_float32(student * 1e-3))
    assert torch.equal(listwise_kl(scaled, teacher, temperature=temperature), kl)


@given(data=st.data())
def test_divergence_from_itself_is_zero(data):
    n, d = data.draw(shapes)
    x = data.draw(embeddings(n, d))
    temperature = data.draw(log_uniform(-3, 3))
    assert (listwise_kl(x, x.clone(), temperature=temperature) == 0).all()


@given(data=st.data())
def test_finite_input_gives_finite_losses(data):
    n, d = data.draw(shapes)
    student, teacher = (data.draw(embeddings(n, d, non_finite=True)) for _ in range(2))
    loss_func = ListwiseDistillationLoss(reducer=DoNothingReducer())
    losses = loss_func(student, ref_emb=teacher)["loss"]["losses"]
    if student.isfinite().all() and teacher.isfinite().all() and n:
        assert losses.isfinite().all()


@given(data=st.data())
def test_invalid_input_is_refused(data):
    n, d = data.draw(small_shapes)
    torch.manual_seed(data.draw(seeds))
    x = torch.randn(n, d)
    loss_func = ListwiseDistillationLoss()
    invalid_calls = {
        "no teacher": lambda: loss_func(x),
        "teacher of other rows": lambda: loss_func(x, ref_emb=torch.randn(n + 1, d)),
        "tuple": lambda: loss_func(x, None, (torch.zeros(1).long(),) * 3, ref_emb=x.clone()),
        "integers": lambda: loss_func(x.long(), ref_emb=x),
        "integer teacher": lambda: loss_func(x, ref_emb=x.long()),
        "vectors": lambda: loss_func(x[:, 0], ref_emb=x[:, 0].clone()),
        "one vector": lambda: loss_func(x, ref_emb=x[:, 0]),
        "images": lambda: loss_func(x[:, :, None, None], ref_emb=x[:, :, None, None].clone()),
        "labels of other rows": lambda: loss_func(x, torch.zeros(n + 1), ref_emb=x.clone()),
    }
    for name, invalid_call in invalid_calls.items():
        assert_refused_without_change(loss_func, invalid_call, name)
