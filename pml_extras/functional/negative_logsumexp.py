"""The log-sum-exp over all classes but one's own, a chunk of classes at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How many logits to hold at a time: enough for a fast matrix product, few enough for the caches.
CHUNK = 1 << 21
SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def negative_logsumexp(
    unit: Tensor, centers: Tensor, labels: Tensor, scale: float, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r""":math:`\log\sum_{j \ne y_i} e^{s\,x_i \cdot c_j}`, and each sample's own center.

    Neither the (N, C) logits nor the (C, D) normalised centers exist at any time, forward or
    backward: both are worked out again for each chunk of classes. The one large thing that backward
    makes is the gradient of the centers, if that is wanted.

    Args:
        unit: (N, D) embeddings of length 1.
        centers: (C, D), any length; they are normalised here.
        labels: (N,) int64 in [0, C), or -1 for a sample whose class is not among these.
        scale: s > 0.
        seen: (C,) bool; classes marked False take no part.

    Returns:
        (N,), and (N, D) normalised. Without another class, the first is the type's lowest number;
        at a label of -1 the first is over all classes, and the second is zero.

    Example:
        >>> import torch
        >>> own = torch.tensor([0])
        >>> negative_logsumexp(torch.eye(2)[:1], torch.eye(2), own, scale=16.0)
        (tensor([0.]), tensor([[1., 0.]]))
    """
    found: tuple[Tensor, Tensor] = _NegativeLogSumExp.apply(unit, centers, labels, scale, seen)  # type: ignore[no-untyped-call]
    return found


class _NegativeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, centers: Tensor, labels: Tensor, scale: float, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = unit.new_full((len(unit),), torch.finfo(unit.dtype).min)
        for classes in _chunks(unit, centers):
            chunk, _ = _normalized(centers[classes])
            logits = _negative_logits(unit, chunk, labels, scale, seen, classes)
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.save_for_backward(unit, centers, labels, total, seen)
        ctx.scale = scale
        return total, _own(centers, labels)[0]

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, by_own: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negative_logsumexp cannot be differentiated twice")
        unit, centers, labels, total, seen = ctx.saved_tensors
        by_unit = torch.zeros_like(unit)
        by_centers = torch.empty_like(centers) if ctx.needs_input_grad[1] else None
        weight = (ctx.scale * by_total)[:, None]
        for classes in _chunks(unit, centers):
            chunk, norms = _normalized(centers[classes])
            logits = _negative_logits(unit, chunk, labels, ctx.scale, seen, classes)
            by_cosine = logits.sub_(total[:, None]).exp_().mul_(weight)
            by_unit.addmm_(by_cosine, chunk)
            if by_centers is not None:
                by_centers[classes] = _through_norm(by_cosine.T @ unit, chunk, norms)
        if by_centers is not None:
            own, norms = _own(centers, labels)
            by_own = by_own * (labels >= 0)[:, None]
            by_centers.index_add_(0, labels.clamp_min(0), _through_norm(by_own, own, norms))
        return by_unit, by_centers, None, None, None


def _chunks(unit: Tensor, centers: Tensor) -> list[slice]:
    size = max(1, CHUNK // max(1, len(unit)))
    return [slice(start, start + size) for start in range(0, len(centers), size)]


def _normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    return vectors / norms, norms


def _own(centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    own, norms = _normalized(centers[labels.clamp_min(0)])
    return own * (labels >= 0)[:, None], norms


def _through_norm(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient with respect to vectors, from that with respect to their directions."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / norms


def _negative_logits(
    unit: Tensor,
    chunk: Tensor,
    labels: Tensor,
    scale: float,
    seen: Tensor | None,
    classes: slice,
) -> Tensor:
    """(N, chunk) logits, with the lowest number for the own class and for classes not seen."""
    lowest = torch.finfo(unit.dtype).min
    logits = (scale * unit) @ chunk.T
    own = labels - classes.start
    inside = (own >= 0) & (own < len(chunk))
    column = own.clamp(0, len(chunk) - 1)[:, None]
    logits.scatter_(1, column, torch.where(inside[:, None], lowest, logits.gather(1, column)))
    return logits if seen is None else logits.masked_fill_(~seen[classes], lowest)
