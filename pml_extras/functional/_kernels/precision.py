"""Half-precision inputs and autocast, handled once for all functions."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def disable_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` with autocast disabled on the device of its tensors."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and _has_autocast(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def _has_autocast(device: str) -> bool:
    # torch 2.5 cannot compile is_autocast_available.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)


def kernel_backward(function: Callable[P, T]) -> Callable[P, T]:
    """For hand-written backwards: no autocast, and no second derivative."""

    @functools.wraps(function)
    @disable_autocast
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this gradient cannot be differentiated twice: call the function in"
                ' pml_extras.functional and use implementation="reference"'
            )
        return function(*args, **kwargs)

    return wrapper


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` without autocast, with its floating tensor arguments in their widest dtype.

    The dtype is at least float32: counts and thresholds are wrong in bfloat16, and exponentials
    overflow in float16. Tensors inside tuples are left as they are.
    """

    @functools.wraps(function)
    @disable_autocast
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)

        def widen(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return function(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()})

    return wrapper


def pairwise_dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot product of each row of ``x``, (N, D), with each row of ``y``, (R, D): (N, R).

    Unlike ``x @ y.T``, its backward ignores autocast.
    """
    if y is x:
        y = x.view_as(x)  # torch.compile does not support one tensor as two inputs
    return _PairwiseDot.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]


class _PairwiseDot(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @disable_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        grad_x = grad_output @ y if ctx.needs_input_grad[0] else None
        return grad_x, grad_output.mT @ x if ctx.needs_input_grad[1] else None
