"""Half-precision inputs and autocast, dealt with once for all functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` without the autocast of the device that its tensors are on."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and _has_autocast(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def _has_autocast(device: str) -> bool:
    # To leave autocast takes as long as a small operation, so that is done only where it is on; and
    # in the compiler, which sees another in a backward pass than that will be run under.
    return torch.compiler.is_compiling() or (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` with floating tensors in their widest type, at least float32, and no
    autocast.

    Counts, thresholds and exponentials are wrong in bfloat16 and overflow in float16, and autocast
    would quietly bring them back inside the function.
    """

    @functools.wraps(function)
    @outside_autocast
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        if dtypes <= {dtype}:
            return function(*args, **kwargs)
        cast: dict[int, torch.Tensor] = {}  # one tensor given twice stays one tensor

        def widen(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                return cast.setdefault(id(x), x.to(dtype))
            return x

        return function(
            *(widen(x) for x in args),
            **{name: widen(x) for name, x in kwargs.items()},
        )

    return wrapper
