"""The log-sum-exp over all classes but one's own, a chunk of classes at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Up to this many logits, the fewer steps are the faster ones.
FEW = 1 << 16
# How many logits to work on at a time: enough for a fast matrix product, few enough for the caches.
CHUNK = 1 << 21
# How many exponentials forward leaves to backward, which has to work out the others again.
KEPT = 1 << 24
SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def negative_logsumexp(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float,
    seen: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r""":math:`\log\sum_{j \ne y_i} e^{s\cos(x_i, c_j)}`, and the cosine with each own center.

    Neither the (N, C) logits nor the (C, D) normalised centers exist at any time beyond a first
    ``KEPT`` numbers: the rest is worked out again in backward, a chunk of classes at a time, and
    that only where the centers want a gradient, which is then the one large thing that is made.
    The gradient of the embeddings needs each class's softmax once, and forward has that at hand.

    Args:
        embeddings: (N, D), any length; a zero row has cosine 0 with everything.
        centers: (C, D), any length.
        labels: (N,) int64 in [0, C).
        scale: s > 0.
        seen: (C,) bool; classes marked False take no part.
        held: (N,) bool; samples marked False are of a class that is not among these, whatever their
            labels: none is left out for them, and their own cosine is 0.

    Returns:
        (N,) and (N,). Without another class, the first is the type's lowest number.

    Example:
        >>> import torch
        >>> own = torch.tensor([0])
        >>> negative_logsumexp(torch.eye(2)[:1], torch.eye(2), own, scale=16.0)
        (tensor([0.]), tensor([1.]))
    """
    if len(embeddings) * len(centers) <= FEW:
        return _plainly(embeddings, centers, labels, scale, seen, held)
    found: tuple[Tensor, Tensor] = _NegativeLogSumExp.apply(  # type: ignore[no-untyped-call]
        embeddings, centers, labels, scale, seen, held
    )
    return found


class _NegativeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, scale: float,
        seen: Tensor | None, held: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        unit, norms = _normalized(embeddings)
        largest = unit.new_full((len(unit), 1), torch.finfo(unit.dtype).min)
        sums = own = torch.zeros_like(largest)
        mean_center = torch.zeros_like(unit) if ctx.needs_input_grad[0] else None
        kept, room = [], KEPT if ctx.needs_input_grad[1] else 0
        for classes in _chunks(unit, centers):
            chunk, chunk_norms = _normalized(centers[classes])
            logits, own_logits, inside = _negative_logits(
                unit, chunk, labels, scale, seen, held, classes
            )
            own = torch.where(inside, own_logits, own)
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            shrink = (before - largest).exp_()
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(1, keepdim=True).addcmul_(sums, shrink)
            if mean_center is not None:
                mean_center.mul_(shrink).addmm_(exponentials, chunk)
            room -= exponentials.numel()
            if room >= 0:
                kept += [exponentials, largest, chunk, chunk_norms]
        if mean_center is not None:
            mean_center /= sums
        total = largest + sums.log()
        ctx.save_for_backward(
            embeddings, centers, labels, seen, held, unit, norms, total, mean_center, *kept
        )
        ctx.scale = scale
        return total.squeeze(1), own.squeeze(1) / scale

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, by_own: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, centers, labels, seen, held, unit, norms, total, mean_center, *kept = (
            ctx.saved_tensors
        )
        if torch.is_grad_enabled():  # for the second derivative
            outputs = _plainly(embeddings, centers, labels, ctx.scale, seen, held)
            needed = ctx.needs_input_grad[:2]
            wanted = [x for x, n in zip((embeddings, centers), needed, strict=True) if n]
            grads = torch.autograd.grad(outputs, wanted, (by_total, by_own), create_graph=True)
            found = iter(grads)
            return *(next(found) if n else None for n in needed), None, None, None, None
        by_embeddings = by_centers = None
        by_total, by_own = ctx.scale * by_total[:, None], by_own[:, None]
        if held is not None:
            by_own = by_own * held[:, None]
        if mean_center is not None:
            own, _ = _normalized(centers.index_select(0, labels))
            by_unit = own.mul_(by_own).addcmul_(by_total, mean_center)
            by_embeddings = _through_norm_(by_unit, unit, norms)
        if ctx.needs_input_grad[1]:
            by_centers = torch.zeros_like(centers).index_add_(0, labels, by_own * unit)
            for classes in _chunks(unit, centers):
                if kept:
                    softmax, shift, chunk, chunk_norms, *kept = kept
                    weight = by_total * (shift - total).exp_()
                else:
                    chunk, chunk_norms = _normalized(centers[classes])
                    logits, _, _ = _negative_logits(
                        unit, chunk, labels, ctx.scale, seen, held, classes
                    )
                    softmax, weight = logits.sub_(total).exp_(), by_total
                by_chunk = by_centers[classes].addmm_(softmax.T, weight * unit)
                _through_norm_(by_chunk, chunk, chunk_norms)
        return by_embeddings, by_centers, None, None, None, None


def _plainly(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float,
    seen: Tensor | None,
    held: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All logits at once, in operations that torch can differentiate twice and vectorise."""
    cosines = normalize(embeddings) @ normalize(centers).T
    own = cosines.gather(1, labels[:, None])
    lowest = torch.finfo(cosines.dtype).min
    logits = (scale * cosines).scatter(1, labels[:, None], lowest)
    if held is not None:
        logits = logits.where(held[:, None], scale * cosines)
        own = own * held[:, None]
    if seen is not None:
        logits = logits.masked_fill(~seen, lowest)
    return logits.logsumexp(1), own.squeeze(1)


def _chunks(unit: Tensor, centers: Tensor) -> list[slice]:
    size = max(1, CHUNK // max(1, len(unit)))
    return [slice(start, start + size) for start in range(0, len(centers), size)]


def _normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    return vectors / norms, norms


def _through_norm_(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient with respect to vectors, in the place of that to their directions."""
    along = (gradient * unit).sum(1, keepdim=True)
    return gradient.addcmul_(along, unit, value=-1).div_(norms)


def _negative_logits(
    unit: Tensor,
    chunk: Tensor,
    labels: Tensor,
    scale: float,
    seen: Tensor | None,
    held: Tensor | None,
    classes: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, chunk) logits, with the lowest number for the own class and for classes not seen; (N, 1)
    those of the own class, and whether it is in the chunk."""
    # The lowest number rather than -inf, of which NaN would come where there is no other class.
    lowest = torch.finfo(unit.dtype).min
    logits = (scale * unit) @ chunk.T
    column = (labels - classes.start)[:, None]
    inside = (column >= 0) & (column < len(chunk))
    if held is not None:
        inside = inside & held[:, None]
    column = column.clamp(0, len(chunk) - 1)
    own_logits = logits.gather(1, column)
    logits.scatter_(1, column, torch.where(inside, lowest, own_logits))
    if seen is not None:
        logits.masked_fill_(~seen[classes], lowest)
    return logits, own_logits, inside
