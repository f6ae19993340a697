"""The listwise divergence of Listwise Self-Distillation (arXiv 2206.08880)."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from ._kernels.precision import full_precision, pairwise_dot

MAX_LOG_RATIO = 40.0  # of Q / P, which would overflow otherwise


@full_precision
def listwise_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, include_self: bool = True
) -> Tensor:
    r"""KL divergence between the similarity distributions of teacher and student, one per sample.

    .. math:: \mathrm{KL}_i = \sum_j P_{ij} \log \frac{P_{ij}}{Q_{ij}}, \quad
        P_{ij} \propto e^{g_i \cdot g_j / \tau}, \quad Q_{ij} \propto e^{f_i \cdot f_j / \tau}

    with f and g the student's and the teacher's normalized embeddings of the same N inputs.

    Args:
        student: (N, D) embeddings, which get the gradient.
        teacher: (N, D') embeddings without gradient; D' may differ from D.
        temperature: tau > 0, in units of cosine similarity.
        include_self: whether each sample is in its own list. False is ours.

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
    log_q = _log_probabilities(student, temperature, include_self)
    log_p = _log_probabilities(teacher.detach(), temperature, include_self)
    # This adds at most e^-40 to each P, which is negligible: they sum to 1.
    log_p = torch.maximum(log_p, log_q.detach() - MAX_LOG_RATIO)
    log_ratio = log_q - log_p
    # KL = sum P (-log_ratio). Adding sum(Q - P) = 0 makes every term non-negative, so rounding
    # cannot give a negative divergence.
    return (log_p.exp() * (log_ratio.expm1() - log_ratio)).sum(1)


def _log_probabilities(embeddings: Tensor, temperature: float, include_self: bool) -> Tensor:
    x = normalize(embeddings)
    logits = pairwise_dot(x / temperature, x)  # (N, N)
    if not include_self:
        diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
        logits = logits.masked_fill(diagonal, torch.finfo(logits.dtype).min)
    return log_softmax(logits, 1)
