"""The distance between two networks' opinions on who resembles whom (arXiv 2206.08880)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import full_precision
from .cosine import pairwise_cosine


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

    def log_softmax(embeddings: Tensor) -> Tensor:
        similarities = pairwise_cosine(embeddings) / temperature
        if not include_self:
            diagonal = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
            similarities = similarities.masked_fill(diagonal, torch.finfo(similarities.dtype).min)
        return similarities.log_softmax(1)

    log_p = log_softmax(teacher.detach())
    log_q = log_softmax(student)
    difference = log_q - log_p
    # P (e^d - 1 - d) sums to the same as -P d, because P and Q sum to one; but each term is
    # non-negative, so rounding cannot make the divergence of near-equal lists negative.
    # Where e^d could overflow, P e^d is Q, and far larger than the rest: nothing cancels.
    p, q = log_p.exp(), log_q.exp()
    small = difference.clamp_max(1)
    near = p * (small.expm1() - small)
    return torch.where(difference > 1, q - p - p * difference, near).sum(1)
