"""The log-sum-exp over all negative classes, one chunk of classes at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .chunks import row_chunks
from .precision import kernel_backward

CHUNK_NUMEL = 1 << 21  # logits computed at a time: enough for a fast product, few enough for caches
MAX_SAVED_NUMEL = 1 << 24  # numbers saved for backward; the rest are recomputed
MIN_NORM = 1e-12  # as in torch.nn.functional.normalize


def chunked_logsumexp_of_negatives(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    scale: float,
    class_mask: Tensor | None,
    is_local: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`pml_extras.functional._center_contrastive.logsumexp_of_negatives`.

    Of the (N, C) logits and the (C, D) normalized centers, forward saves at most
    ``MAX_SAVED_NUMEL`` numbers together. Backward recomputes the rest, and only if the centers need
    a gradient. The gradient of the embeddings needs only the mean of the centers weighted by the
    softmax, which forward computes.
    """
    return _ChunkedLogSumExpOfNegatives.apply(  # type: ignore[no-any-return, no-untyped-call]
        embeddings, centers, labels, scale, class_mask, is_local
    )


class _ChunkedLogSumExpOfNegatives(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, scale: float,
        class_mask: Tensor | None, is_local: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_x, needs_centers = ctx.needs_input_grad[:2]
        x, x_norms = _normalize(embeddings)
        # Online softmax: the maximum and the sums of exponentials so far, (N, 1), and the centers
        # weighted by them, (N, D)
        maximum = x.new_full((len(x), 1), torch.finfo(x.dtype).min)
        exp_sums = target_logit = torch.zeros_like(maximum)
        mean_center = torch.zeros_like(x) if needs_x else None
        saved: list[Tensor] = []
        num_savable = MAX_SAVED_NUMEL if needs_centers else 0
        for classes in row_chunks(len(centers), len(x), CHUNK_NUMEL):
            chunk, chunk_norms = _normalize(centers[classes])
            logits = (scale * x) @ chunk.T  # (N, B)
            chunk_target, inside = _mask_target_(logits, labels, class_mask, is_local, classes)
            target_logit = torch.where(inside, chunk_target, target_logit)
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(1, keepdim=True))
            rescale = (previous - maximum).exp_()
            exponentials = logits.sub_(maximum).exp_()
            exp_sums = exponentials.sum(1, keepdim=True).addcmul_(exp_sums, rescale)
            if mean_center is not None:
                mean_center.mul_(rescale).addmm_(exponentials, chunk)
            num_savable -= exponentials.numel() + chunk.numel()
            if num_savable >= 0:
                saved += [exponentials, maximum, chunk, chunk_norms]
        target_center = None
        if mean_center is not None:
            mean_center /= exp_sums
            target_center = normalize(centers.index_select(0, labels), eps=MIN_NORM)
        lse_of_negatives = maximum + exp_sums.log()
        # Centers without a gradient are not saved, so that EMA centers may change before backward.
        ctx.save_for_backward(
            centers if needs_centers else None, labels, class_mask, is_local,
            x, x_norms, lse_of_negatives, mean_center, target_center, *saved,
        )  # fmt: skip
        ctx.scale = scale
        return lse_of_negatives.squeeze(1), target_logit.squeeze(1) / scale

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, grad_lse: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
        centers, labels, class_mask, is_local, *saved = ctx.saved_tensors
        x, x_norms, lse_of_negatives, mean_center, target_center, *saved = saved
        # (N, 1); the scale turns gradients of logits into gradients of cosines
        grad_lse, grad_target = ctx.scale * grad_lse[:, None], grad_target[:, None]
        if is_local is not None:
            grad_target = grad_target * is_local[:, None]
        grad_embeddings = grad_centers = None
        if mean_center is not None:
            # dx = dtarget c_y + s dlse sum_j softmax_j c_j
            grad_x = (target_center * grad_target).addcmul_(grad_lse, mean_center)
            grad_embeddings = _normalize_backward_(grad_x, x, x_norms)
        if ctx.needs_input_grad[1]:
            # dc_j = [j = y] dtarget x + s dlse softmax_j x, summed over the samples
            grad_centers = torch.zeros_like(centers).index_add_(0, labels, grad_target * x)
            for classes in row_chunks(len(centers), len(x), CHUNK_NUMEL):
                if saved:
                    exponentials, maximum, chunk, chunk_norms, *saved = saved
                    weights = grad_lse * (maximum - lse_of_negatives).exp_()
                else:
                    chunk, chunk_norms = _normalize(centers[classes])
                    logits = (ctx.scale * x) @ chunk.T
                    _mask_target_(logits, labels, class_mask, is_local, classes)
                    exponentials, weights = logits.sub_(lse_of_negatives).exp_(), grad_lse
                grad_chunk = grad_centers[classes].addmm_(exponentials.T, weights * x)
                _normalize_backward_(grad_chunk, chunk, chunk_norms)
        return grad_embeddings, grad_centers, None, None, None, None


def _mask_target_(
    logits: Tensor,
    labels: Tensor,
    class_mask: Tensor | None,
    is_local: Tensor | None,
    classes: slice,
) -> tuple[Tensor, Tensor]:
    """Overwrite the target's and the masked classes' logits with the lowest finite number.

    Returns, (N, 1) each, the target's logit and whether the target is one of these classes.
    """
    # -inf would give NaN without a negative class.
    lowest = torch.finfo(logits.dtype).min
    column = (labels - classes.start)[:, None]
    inside = (column >= 0) & (column < logits.shape[1])
    if is_local is not None:
        inside = inside & is_local[:, None]
    column = column.clamp(0, logits.shape[1] - 1)
    target = logits.gather(1, column)
    logits.scatter_(1, column, torch.where(inside, lowest, target))
    if class_mask is not None:
        logits.masked_fill_(~class_mask[classes], lowest)
    return target, inside


def _normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.norm(dim=1, keepdim=True).clamp_min_(MIN_NORM)
    return vectors / norms, norms


def _normalize_backward_(grad: Tensor, normalized: Tensor, norms: Tensor) -> Tensor:
    """d v = (d u - (d u . u) u) / |v| for u = v / |v|, in place."""
    along = (grad * normalized).sum(1, keepdim=True)
    return grad.addcmul_(along, normalized, value=-1).div_(norms)
