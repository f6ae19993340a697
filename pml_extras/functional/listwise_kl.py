"""The distance between two networks' opinions on who resembles whom (arXiv 2206.08880)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._precision import full_precision
from .cosine import through_gram, through_unit, unit_and_norms


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


def _softmax_of_gram(vectors: Tensor, include_self: bool) -> tuple[Tensor, Tensor]:
    """Logarithm and value of the softmax over each row of the dot products. With one exponential
    for both, and in place, because at these sizes new memory costs more than the arithmetic."""
    logits = vectors @ vectors.mT
    if not include_self:
        logits.fill_diagonal_(torch.finfo(logits.dtype).min)
    shares = logits.sub_(logits.amax(1, keepdim=True)).exp()
    totals = shares.sum(1, keepdim=True)
    return logits.sub_(totals.log()), shares.div_(totals)


class _ListwiseKL(torch.autograd.Function):
    """The divergences, and what their derivatives are made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, temperature: float, include_self: bool
    ) -> tuple[Tensor, ...]:
        scale = math.sqrt(temperature)
        teacher_unit, _ = unit_and_norms(teacher)
        unit, norms = unit_and_norms(student)
        log_p, p = _softmax_of_gram(teacher_unit / scale, include_self)
        log_q, q = _softmax_of_gram(unit / scale, include_self)
        log_ratio = log_q.sub_(log_p)
        del log_p  # the next line takes its memory
        # Q - P, without cancellation where they are near, and without overflow where they are not.
        difference = q.add_(p).mul_((log_ratio / 2).tanh_())
        # Q - P sums to nothing, so its presence changes no divergence; but with it each term is
        # non-negative, and rounding cannot make the divergence of near-equal lists negative.
        return log_ratio.mul_(p).sub_(difference).sum(1).neg_(), difference, p, unit, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, difference, p, unit, norms = output
        ctx.temperature = inputs[2]
        ctx.mark_non_differentiable(p)
        ctx.save_for_backward(difference, p, unit, norms)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        by_divergences: Tensor | None,
        by_difference: Tensor | None,
        _: None,
        by_unit: Tensor | None,
        by_norms: Tensor | None,
    ) -> tuple[Tensor | None, None, None, None]:
        difference, p, unit, norms = ctx.saved_tensors
        by_logits = None
        if by_divergences is not None:
            by_logits = by_divergences[:, None] * difference
        if by_difference is not None:  # from the line above, differentiated in its turn
            q = difference + p
            by_q = by_difference - (q * by_difference).sum(1, keepdim=True)
            by_logits = q * by_q if by_logits is None else by_logits + q * by_q
        if by_logits is not None:
            through_logits = through_gram(by_logits, unit) / ctx.temperature
            by_unit = through_logits if by_unit is None else by_unit + through_logits
        return through_unit(by_unit, by_norms, unit, norms), None, None, None
