"""Unit vectors and cosine similarities, accurate whatever the precision of the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import Function
from ._precision import full_precision

SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


@full_precision
def pairwise_cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine similarity of each row of ``x`` with each row of ``y``.

    Args:
        x: (N, D), any floating dtype.
        y: (R, D); ``x`` itself if not given.

    Returns:
        (N, R) in [-1, 1], float32 or wider. A zero row has similarity 0 with everything.

    Example:
        >>> import torch
        >>> pairwise_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return gram(unit_rows(x)) if y is None else dots(unit_rows(x), unit_rows(y))


def unit_rows(vectors: Tensor) -> Tensor:
    """torch.nn.functional.normalize, with a backward that makes less memory."""
    unit, _ = _Unit.apply(vectors)  # type: ignore[no-untyped-call]
    return unit  # type: ignore[no-any-return]


def dots(x: Tensor, y: Tensor) -> Tensor:
    """The dot products of each row of ``x`` with each row of ``y``, exact in backward too."""
    return _Dots.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]


def gram(vectors: Tensor) -> Tensor:
    """Those of ``vectors`` with themselves, whose backward, :func:`through_gram`, is cheaper."""
    return _Gram.apply(vectors)  # type: ignore[no-any-return, no-untyped-call]


def unit_and_norms(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.norm(dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)
    return vectors / norms, norms


def through_norm(
    gradient: Tensor, unit: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """From the gradient with respect to the rows' directions, that with respect to the rows."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, along, unit, value=-1, out=out).div_(norms)


def through_unit(
    by_unit: Tensor | None, by_norms: Tensor | None, unit: Tensor, norms: Tensor
) -> Tensor | None:
    """The same where the norms have a gradient too, as in a second backward."""
    return total_of(
        None if by_unit is None else through_norm(by_unit, unit, norms),
        None if by_norms is None else by_norms * unit,
    )


def total_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which there may be one or none."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def through_gram(gradient: Tensor, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """From the gradient with respect to all dot products, its rows times ``weights`` (N, 1), that
    with respect to the vectors."""
    if len(vectors) > 8 * vectors.shape[1]:
        # Two such thin products cost less than to make the sum below.
        if weights is None:
            return torch.addmm(gradient @ vectors, gradient.mT, vectors)
        return torch.addmm(weights * (gradient @ vectors), gradient.mT, weights * vectors)
    if weights is None:
        return (gradient + gradient.mT) @ vectors
    return torch.addcmul(weights * gradient, gradient.mT, weights.mT) @ vectors


class _Unit(Function):
    @staticmethod
    def forward(vectors: Tensor) -> tuple[Tensor, Tensor]:
        return unit_and_norms(vectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*outputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_unit: Tensor | None, by_norms: Tensor | None) -> Tensor | None:
        return through_unit(by_unit, by_norms, *ctx.saved_tensors)


class _Dots(Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_dots: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        by_x = by_dots @ y if ctx.needs_input_grad[0] else None
        return by_x, by_dots.mT @ x if ctx.needs_input_grad[1] else None


class _Gram(Function):
    @staticmethod
    def forward(vectors: Tensor) -> Tensor:
        return vectors @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_products: Tensor) -> Tensor:
        vectors: Tensor
        (vectors,) = ctx.saved_tensors
        return through_gram(by_products, vectors)
