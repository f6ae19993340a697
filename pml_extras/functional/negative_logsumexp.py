"""The log-sum-exp over all classes but one's own, a chunk of classes at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._function import Function
from ._parts import parts
from .cosine import SMALLEST_NORM, through_norm, through_unit, total_of, unit_and_norms

# Up to this many logits, the fewer steps are the faster ones.
FEW = 1 << 16
# How many logits to work on at a time: enough for a fast matrix product, few enough for the caches.
CHUNK = 1 << 21
# How many exponentials forward leaves to backward, which has to work out the others again.
KEPT = 1 << 24


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
        (N,) and (N,). Without another class, the first is lower than any logit can be.

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


class _NegativeLogSumExp(Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, scale: float,
        seen: Tensor | None, held: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        unit, norms = unit_and_norms(embeddings)
        largest = unit.new_full((len(unit), 1), torch.finfo(unit.dtype).min)
        sums = own = torch.zeros_like(largest)
        mean_center = torch.zeros_like(unit) if ctx.needs_input_grad[0] else None
        own_center = None
        kept, room = [], KEPT if ctx.needs_input_grad[1] else 0
        for classes in parts(len(centers), len(unit), CHUNK):
            chunk, chunk_norms = unit_and_norms(centers[classes])
            logits = (scale * unit) @ chunk.T
            own_logits, inside = _leave_out_(logits, labels, seen, held, classes)
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
            own_center = normalize(centers.index_select(0, labels), eps=SMALLEST_NORM)
        total = largest + sums.log()
        # A bank that no gradient moves may be moved otherwise before backward, which then needs
        # nothing of it but the own centers: saved, it would have to stay as it is.
        if ctx.needs_input_grad[1]:
            bank = centers
        else:
            bank, ctx.bank, ctx.bank_version = None, centers, centers._version
        ctx.save_for_backward(
            embeddings, bank, labels, seen, held, unit, norms, total, mean_center, own_center, *kept
        )
        ctx.scale = scale
        return total.squeeze(1), own.squeeze(1) / scale

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, by_own: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        embeddings, centers, labels, seen, held, unit, norms, total = saved[:8]
        mean_center, own_center, *kept = saved[8:]
        if torch.is_grad_enabled():  # for the second derivative
            if centers is None:
                centers = ctx.bank
                if centers._version != ctx.bank_version:
                    raise RuntimeError(
                        "the centers have moved since forward, and the second derivative needs them"
                    )
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
            by_unit = (own_center * by_own).addcmul_(by_total, mean_center)
            by_embeddings = through_norm(by_unit, unit, norms, out=by_unit)
        if ctx.needs_input_grad[1]:
            by_centers = torch.zeros_like(centers).index_add_(0, labels, by_own * unit)
            for classes in parts(len(centers), len(unit), CHUNK):
                if kept:
                    softmax, shift, chunk, chunk_norms, *kept = kept
                    weight = by_total * (shift - total).exp_()
                else:
                    chunk, chunk_norms = unit_and_norms(centers[classes])
                    logits = (ctx.scale * unit) @ chunk.T
                    _leave_out_(logits, labels, seen, held, classes)
                    softmax, weight = logits.sub_(total).exp_(), by_total
                by_chunk = by_centers[classes].addmm_(softmax.T, weight * unit)
                through_norm(by_chunk, chunk, chunk_norms, out=by_chunk)
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
    total, own, *_ = _AllClasses.apply(  # type: ignore[no-untyped-call]
        embeddings, centers, labels, scale, seen, held
    )
    return total, own


class _AllClasses(Function):
    """The two that are asked for, and what their derivatives are made of: the softmax over all
    classes but one's own, which is the first one's with respect to the logits, and the vectors."""

    @staticmethod
    def forward(
        embeddings: Tensor, centers: Tensor, labels: Tensor, scale: float,
        seen: Tensor | None, held: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        unit, norms = unit_and_norms(embeddings)
        center_unit, center_norms = unit_and_norms(centers)
        cosines = unit @ center_unit.mT
        column = labels.unsqueeze(1)
        own = cosines.gather(1, column)
        # Low enough to be nothing beside any logit, and finite: where there is no other class, -inf
        # would give NaN.
        lowest = torch.finfo(cosines.dtype).min / (2 * max(scale, 1.0))
        others = cosines.scatter(1, column, lowest)
        if held is not None:
            others = others.where(held.unsqueeze(1), cosines)
            own = own * held.unsqueeze(1)
        if seen is not None:
            others.masked_fill_(~seen, lowest)
        softmax = others.mul_(scale).softmax(1)
        total = others.amax(1) - softmax.amax(1).log_()
        return total, own.squeeze(1), softmax, unit, norms, center_unit, center_norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *_, labels, ctx.scale, _, held = inputs
        ctx.save_for_backward(labels, held, *outputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, by_total: Tensor | None, by_own: Tensor | None, by_softmax: Tensor | None,
        *by_vectors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        labels, held, softmax, unit, norms, center_unit, center_norms = ctx.saved_tensors
        by_unit, by_norms, by_center_unit, by_center_norms = by_vectors
        if by_total is None:
            by_cosines = torch.zeros_like(softmax)
        else:
            by_cosines = (ctx.scale * by_total).unsqueeze(1) * softmax
        if by_softmax is not None:  # from the line above, differentiated in its turn
            mean = (softmax * by_softmax).sum(1, keepdim=True)
            by_cosines = by_cosines + ctx.scale * softmax * (by_softmax - mean)
        if by_own is not None:
            by_own = by_own if held is None else by_own * held
            by_cosines.scatter_add_(1, labels.unsqueeze(1), by_own.unsqueeze(1))
        by_embeddings = by_centers = None
        if ctx.needs_input_grad[0]:
            by_unit = total_of(by_cosines @ center_unit, by_unit)
            by_embeddings = through_unit(by_unit, by_norms, unit, norms)
        if ctx.needs_input_grad[1]:
            by_center_unit = total_of(by_cosines.mT @ unit, by_center_unit)
            by_centers = through_unit(by_center_unit, by_center_norms, center_unit, center_norms)
        return by_embeddings, by_centers, None, None, None, None


def _leave_out_(
    logits: Tensor, labels: Tensor, seen: Tensor | None, held: Tensor | None, classes: slice
) -> tuple[Tensor, Tensor]:
    """Put the lowest number in the place of the own class and of classes not seen. Returns, (N, 1),
    what the own class had there, and whether it is one of these classes."""
    # The lowest number rather than -inf, of which NaN would come where there is no other class.
    lowest = torch.finfo(logits.dtype).min
    column = (labels - classes.start)[:, None]
    inside = (column >= 0) & (column < logits.shape[1])
    if held is not None:
        inside = inside & held[:, None]
    column = column.clamp(0, logits.shape[1] - 1)
    own = logits.gather(1, column)
    logits.scatter_(1, column, torch.where(inside, lowest, own))
    if seen is not None:
        logits.masked_fill_(~seen[classes], lowest)
    return own, inside
