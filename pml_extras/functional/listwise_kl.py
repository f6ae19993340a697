"""The distance between two networks' opinions on who resembles whom (arXiv 2206.08880)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._precision import full_precision
from .cosine import gram, unit_rows


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

    def logits(embeddings: Tensor) -> Tensor:
        scaled = gram(unit_rows(embeddings) / temperature**0.5)
        if not include_self:
            scaled.fill_diagonal_(torch.finfo(scaled.dtype).min)
        return scaled

    log_p = logits(teacher.detach()).log_softmax(1)
    divergences, _ = _KLDivergence.apply(logits(student), log_p)  # type: ignore[no-untyped-call]
    return divergences  # type: ignore[no-any-return]


class _KLDivergence(torch.autograd.Function):
    """From the student's logits and the teacher's log P, the divergences and Q - P, which is their
    derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(1)
        p, log_ratio = log_p.exp(), log_q - log_p
        # Q - P, without cancellation where they are near, and without overflow where they are not.
        # In place, because at these sizes new memory costs more than the arithmetic.
        difference = log_q.exp_().add_(p).mul_((log_ratio / 2).tanh_())
        # Q - P sums to nothing, so its presence changes no divergence; but with it each term is
        # non-negative, and rounding cannot make the divergence of near-equal lists negative.
        return log_ratio.mul_(p).sub_(difference).sum(1).neg_(), difference

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[1], inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, by_divergences: Tensor | None, by_difference: Tensor | None
    ) -> tuple[Tensor | None, None]:
        difference, log_p = ctx.saved_tensors
        by_logits = None
        if by_divergences is not None:
            by_logits = by_divergences[:, None] * difference
        if by_difference is not None:  # from the line above, differentiated in its turn
            q = difference + log_p.exp()
            by_q = by_difference - (q * by_difference).sum(1, keepdim=True)
            by_logits = q * by_q if by_logits is None else by_logits + q * by_q
        return by_logits, None
