"""Properties of SelfDistillation and its teachers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.losses import ContrastiveLoss

from helpers.state import assert_refused_without_change, same_state, state_is_finite
from helpers.strategies import class_labels, embeddings, log_uniform, seeds
from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.losses import CenterContrastiveLoss, ListwiseDistillationLoss

TEACHER_TYPES = pytest.mark.parametrize("teacher_type", [SnapshotTeacher, EMATeacher])
BASES = {
    "contrastive": lambda d: ContrastiveLoss(),
    "centers": lambda d: CenterContrastiveLoss(5, d, center_update="ema"),
}


def draw_loss(data, teacher_type, d):
    torch.manual_seed(data.draw(seeds))
    trunk = torch.nn.Linear(3, 4)
    embedder = torch.nn.Linear(4, d) if data.draw(st.booleans()) or d != 4 else None
    teacher = teacher_type(trunk, embedder)
    student = torch.nn.Sequential(trunk, embedder or torch.nn.Identity())
    loss_func = SelfDistillation(
        BASES[data.draw(st.sampled_from(list(BASES)))](d),
        teacher,
        num_epochs=data.draw(st.integers(1, 4)),
        alpha=data.draw(st.sampled_from([0.0, 1.0, 50.0])),
        temperature=data.draw(log_uniform(-1, 2)),
    )
    return student, teacher, loss_func


def step(student, generator):
    """Change the weights, as an optimizer does."""
    with torch.no_grad():
        for weight in student.parameters():
            weight += torch.empty_like(weight).normal_(0, 0.3, generator=generator)


def weights(module):
    return [weight.detach().clone() for weight in module.parameters()]


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


@TEACHER_TYPES
@given(data=st.data(), d=st.integers(1, 6))
def test_loss_schedule_and_teacher_weights(data, d, teacher_type):
    student, teacher, loss_func = draw_loss(data, teacher_type, d)
    generator = torch.Generator().manual_seed(data.draw(seeds))
    listwise = ListwiseDistillationLoss(temperature=loss_func.temperature)
    expected_teacher = weights(student)
    first = True
    for epoch in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 3))):
            n = data.draw(st.integers(0, 12))
            inputs, y = torch.randn(n, 3), torch.randint(5, (n,))
            x = student(inputs)
            base = copy.deepcopy(loss_func.loss)(x, y)
            with torch.no_grad():
                distillation = listwise(x, ref_emb=teacher.network(inputs))
            loss = loss_func(x, y)
            weight = loss_func.alpha * min(epoch / loss_func.num_epochs, 1)
            if teacher_type is EMATeacher:
                decay = 0.0 if first else 0.999
                expected_teacher = [
                    decay * old + (1 - decay) * new
                    for old, new in zip(expected_teacher, weights(student), strict=True)
                ]
            first = False
            assert torch.allclose(loss, base + weight * distillation, rtol=1e-4, atol=1e-5)
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
            assert all(p.grad is None for p in teacher.network.parameters())
            assert close(weights(teacher.network), expected_teacher)
            assert not teacher.network.training
            step(student, generator)
        loss_func.end_epoch()
        if teacher_type is SnapshotTeacher:
            expected_teacher = weights(student)
        assert close(weights(teacher.network), expected_teacher)
    assert not list(loss_func.loss.parameters())
    assert len(list(loss_func.parameters())) == 0


@TEACHER_TYPES
@given(data=st.data(), d=st.integers(1, 6))
def test_non_finite_batches_do_not_change_the_teacher(data, d, teacher_type):
    student, teacher, loss_func = draw_loss(data, teacher_type, d)
    loss_func.epoch = 1
    n = data.draw(st.integers(1, 12))
    before = weights(teacher.network)
    inputs = data.draw(embeddings(n, 3, dtype=torch.float32, non_finite=True))
    y = data.draw(class_labels(n, 5))
    x = student(inputs)
    loss = loss_func(x, y)
    if x.isfinite().all() and inputs.isfinite().all():
        assert loss.isfinite()
    assert close(before, weights(teacher.network))
    assert state_is_finite(loss_func.state_dict())
    loss_func.end_epoch()
    assert state_is_finite(loss_func.state_dict())


@TEACHER_TYPES
@given(data=st.data(), d=st.integers(1, 6))
def test_a_resumed_run_continues_exactly(data, d, teacher_type):
    student, _, loss_func = draw_loss(data, teacher_type, d)
    generator = torch.Generator().manual_seed(data.draw(seeds))

    def train(student, loss_func, plan, generator):
        values = []
        for ends_epoch in plan:
            inputs = torch.randn(6, 3, generator=generator)
            values.append(loss_func(student(inputs), torch.arange(6) % 3).item())
            step(student, generator)
            if ends_epoch:
                loss_func.end_epoch()
        return values

    plans = [data.draw(st.lists(st.booleans(), max_size=5)) for _ in range(2)]
    train(student, loss_func, plans[0], generator)
    saved = copy.deepcopy((student.state_dict(), loss_func.state_dict(), generator.get_state()))
    expected = train(student, loss_func, plans[1], generator)

    embedder = student[1]
    resumed_trunk = torch.nn.Linear(3, 4)
    resumed_embedder = torch.nn.Linear(4, d) if list(embedder.parameters()) else None
    resumed_student = torch.nn.Sequential(resumed_trunk, resumed_embedder or torch.nn.Identity())
    resumed = SelfDistillation(
        copy.deepcopy(loss_func.loss),
        teacher_type(resumed_trunk, resumed_embedder),
        num_epochs=loss_func.num_epochs,
        alpha=loss_func.alpha,
        temperature=loss_func.temperature,
    )
    parts = [
        lambda: resumed_student.load_state_dict(saved[0]),
        lambda: resumed.load_state_dict(saved[1]),
    ]
    for load in parts[:: data.draw(st.sampled_from([1, -1]))]:
        load()
    resumed_again = copy.deepcopy((resumed_student.state_dict(), resumed.state_dict()))
    assert same_state(resumed_again[0], saved[0])
    resumed_generator = torch.Generator()
    resumed_generator.set_state(saved[2])
    assert train(resumed_student, resumed, plans[1], resumed_generator) == expected


@TEACHER_TYPES
@given(data=st.data(), d=st.integers(1, 6))
def test_refused_input_does_not_change_the_state(data, d, teacher_type):
    student, teacher, loss_func = draw_loss(data, teacher_type, d)
    loss_func.epoch, loss_func.alpha = 1, 1.0
    n = data.draw(st.integers(2, 12))
    inputs, y = torch.randn(n, 3), torch.randint(5, (n,))
    x = student(inputs)
    invalid_calls = {
        "fewer labels": lambda: loss_func(x, y[1:]),
        "other rows": lambda: loss_func(x[1:], y[1:]),
        "no teacher embeddings": lambda: loss_func(x, y),
    }
    name = data.draw(st.sampled_from(list(invalid_calls)))
    if name == "no teacher embeddings":
        teacher.skip_batch()
    assert_refused_without_change(loss_func, invalid_calls[name], name)
    # The next batch works as usual.
    assert loss_func(student(inputs), y).isfinite()


@TEACHER_TYPES
@given(data=st.data(), d=st.integers(1, 6))
def test_evaluation_does_not_change_the_teacher(data, d, teacher_type):
    student, teacher, loss_func = draw_loss(data, teacher_type, d)
    loss_func.epoch, loss_func.alpha = 1, 1.0
    n = data.draw(st.integers(1, 12))
    inputs, y = torch.randn(n, 3), torch.randint(5, (n,))
    x = student(inputs)
    before = weights(teacher.network)
    with torch.no_grad():
        student(torch.randn(n + 1, 3))
    assert close(before, weights(teacher.network))
    assert loss_func(x, y).isfinite()
    base = copy.deepcopy(loss_func.loss).eval()
    loss_func.eval()
    assert torch.equal(loss_func(x, y), base(x, y))
    loss_func.train()
    with torch.no_grad():
        base = copy.deepcopy(loss_func.loss)
        assert torch.equal(loss_func(x, y), base(x, y))
