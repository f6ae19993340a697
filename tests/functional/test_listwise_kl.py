from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, normalize

from helpers.golden import relative_error
from pml_extras.functional import listwise_kl


def test_equals_the_golden_values(listwise_case):
    case = listwise_case
    student = case["student"].requires_grad_()
    kl = listwise_kl(student, case["teacher"], temperature=float(case["temperature"])).mean()
    assert relative_error(kl, case["kl"]) < 1e-4
    (grad,) = torch.autograd.grad(kl, student)
    assert relative_error(grad, case["kl_grad"]) < 1e-4


@pytest.mark.parametrize("temperature", [0.05, 1.0, 7.0])
def test_equals_a_loop_over_samples(temperature):
    student = torch.randn(9, 4, dtype=torch.float64)
    teacher = torch.randn(9, 6, dtype=torch.float64)
    actual = listwise_kl(student, teacher, temperature=temperature)
    f, g = normalize(student), normalize(teacher)
    for i in range(9):
        q = (f @ f[i] / temperature).log_softmax(0)
        p = (g @ g[i] / temperature).softmax(0)
        assert float(actual[i]) == pytest.approx(float(kl_div(q, p, reduction="sum")), rel=1e-9)


def test_gradient_equals_the_closed_form():
    # d(mean KL)/dS = (Q - P) / (tau N): gradient descent moves the student toward the teacher.
    tau = 0.3
    student = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(8, 4, dtype=torch.float64)
    (actual,) = torch.autograd.grad(listwise_kl(student, teacher, temperature=tau).mean(), student)
    f, g = normalize(student), normalize(teacher)
    s, u = f @ f.T, g @ g.T
    grad_similarity = ((s / tau).softmax(1) - (u / tau).softmax(1)) / (tau * 8)
    (expected,) = torch.autograd.grad((s * grad_similarity.detach()).sum(), student)
    assert torch.allclose(actual, expected, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 3), (8, 2), (33, 2)])
@pytest.mark.parametrize("include_self", [True, False])
def test_gradcheck(shape, include_self):
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)

    def kl(x):
        return listwise_kl(x, teacher, temperature=0.5, include_self=include_self)

    assert torch.autograd.gradcheck(kl, student)
    assert torch.autograd.gradgradcheck(kl, student)


def test_is_zero_when_student_and_teacher_coincide():
    x = torch.randn(10, 4, requires_grad=True)
    for include_self in (True, False):
        kl = listwise_kl(x, 3 * x.detach(), temperature=0.1, include_self=include_self)
        assert kl.abs().max() < 1e-12
        kl = listwise_kl(x, x, temperature=0.1, include_self=include_self)
        assert torch.equal(kl, torch.zeros(10))
        assert torch.autograd.grad(kl.sum(), x)[0].abs().max() < 1e-6


def test_is_not_negative_when_nearly_zero():
    x = torch.randn(64, 8)
    kl = listwise_kl(x + 1e-4 * torch.randn_like(x), x, temperature=0.1)
    assert kl.min() >= 0
    exact = listwise_kl((x + 1e-4).double(), x.double(), temperature=0.1)
    assert (listwise_kl(x + 1e-4, x, temperature=0.1).double() - exact).abs().max() < 1e-7


def test_without_self_the_list_holds_the_other_samples():
    student = torch.randn(5, 3, dtype=torch.float64)
    teacher = torch.randn(5, 3, dtype=torch.float64)
    actual = listwise_kl(student, teacher, include_self=False)
    f, g = normalize(student), normalize(teacher)
    for i in range(5):
        others = torch.arange(5) != i
        q = (f[others] @ f[i]).log_softmax(0)
        p = (g[others] @ g[i]).softmax(0)
        assert float(actual[i]) == pytest.approx(float(kl_div(q, p, reduction="sum")), rel=1e-9)
    assert torch.equal(
        listwise_kl(student[:1], teacher[:1], include_self=False), torch.zeros(1).double()
    )


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    listwise_kl(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.02, 0.01, 0.001])
def test_low_temperatures_do_not_overflow(temperature):
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.1]])
    kl = listwise_kl(student, teacher, temperature=temperature)
    f, g = normalize(student.detach().double()), normalize(teacher.double())
    log_q, log_p = ((x @ x.T / temperature).log_softmax(1) for x in (f, g))
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    assert torch.allclose(kl.double(), expected, rtol=1e-3)
    assert torch.autograd.grad(kl.sum(), student)[0].isfinite().all()
