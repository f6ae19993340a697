"""The distance between two networks' opinions on who resembles whom (arXiv 2206.08880)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import Function
from ._parts import parts
from ._precision import full_precision
from .cosine import through_gram, through_unit, total_of, unit_and_norms

# How many numbers a CPU works on at a time: what its caches hold.
BLOCK = 1 << 18


@full_precision
def listwise_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, include_self: bool = True
) -> Tensor:
    r"""KL divergence between the similarity distributions of teacher and student, a row a sample.

    .. math:: \mathrm{KL}_i = \sum_j P_{ij} \log \frac{P_{ij}}{Q_{ij}}, \quad
        P_{ij} \propto e^{g_i \cdot g_j / \tau}, \quad Q_{ij} \propto e^{f_i \cdot f_j / \tau}

    with f and g the student's and the teacher's normalised embeddings of the same N inputs.

    Args:
        student: (N, D) embeddings; the gradient flows to these alone.
        teacher: (N, D') embeddings, D' may differ from D.
        temperature: tau > 0, in units of cosine similarity.
        include_self: whether each sample is in its own list. Leaving it out is ours.

    Returns:
        (N,) divergences >= 0, float32 or wider.

    Source: arXiv 2206.08880.

    Example:
        >>> import torch
        >>> listwise_kl(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0.1201, 0.1201])
    """
    if len(student) == 0:
        return student.sum(1)

    divergences: Tensor
    divergences, *_ = _ListwiseKL.apply(  # type: ignore[no-untyped-call]
        student, teacher.detach(), temperature, include_self
    )
    return divergences


def _logits(vectors: Tensor, rows: slice, temperature: float, include_self: bool) -> Tensor:
    logits = (vectors[rows] / temperature) @ vectors.mT
    if not include_self:
        logits.diagonal(rows.start).fill_(torch.finfo(logits.dtype).min)
    return logits


class _ListwiseKL(Function):
    """The divergences, and what their derivatives are made of: first of all Q - P, their derivative
    with respect to the logits of Q."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, temperature: float, include_self: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        unit, norms = unit_and_norms(student)
        teacher_unit, _ = unit_and_norms(teacher)
        n = len(unit)
        # Its rows lie an odd multiple of 16 numbers apart. Backward reads down its columns too, and
        # at a power of two, as batches have it, a column shares few places of the caches.
        difference = unit.new_empty_strided((n, n), (n // 32 * 32 + 48, 1))
        divergences = []
        for rows in parts(n, n, BLOCK if unit.device.type == "cpu" else n * n):
            log_p = _logits(teacher_unit, rows, temperature, include_self).log_softmax(1)
            log_q = _logits(unit, rows, temperature, include_self).log_softmax(1)
            # Lest Q / P overflow. What P gains, e^-40 at most, is nothing beside its sum of 1.
            log_p = torch.maximum(log_p, log_q - 40)
            log_ratio = log_q.sub_(log_p)
            p = log_p.softmax(1)  # in two thirds of the time that torch takes for exp
            del log_p  # whose memory the next line takes
            growth = log_ratio.expm1()
            difference[rows] = growth * p
            # The sum of Q - P is nothing, so its presence changes no divergence; but with it each
            # term is non-negative, and rounding cannot make that of near-equal lists negative.
            divergences.append(growth.sub_(log_ratio).mul_(p).sum(1))
        return torch.cat(divergences), difference, unit, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.temperature, ctx.include_self = inputs[2:]
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        by_divergences: Tensor | None,
        by_difference: Tensor | None,
        by_unit: Tensor | None,
        by_norms: Tensor | None,
    ) -> tuple[Tensor | None, None, None, None]:
        difference, unit, norms = ctx.saved_tensors
        if by_divergences is not None:
            weights = by_divergences[:, None] / ctx.temperature
            by_unit = total_of(by_unit, through_gram(difference, unit, weights))
        if by_difference is not None:  # from the lines above, differentiated in their turn
            q = _logits(unit, slice(0, len(unit)), ctx.temperature, ctx.include_self).softmax(1)
            by_q = by_difference - (q * by_difference).sum(1, keepdim=True)
            by_unit = total_of(by_unit, through_gram(q * by_q, unit) / ctx.temperature)
        return through_unit(by_unit, by_norms, unit, norms), None, None, None
