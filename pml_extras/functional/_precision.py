"""Half-precision inputs and autocast, dealt with once for all functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` with floating tensors in their widest type, at least float32, and no
    autocast.

    Counts, thresholds and exponentials are wrong in bfloat16 and overflow in float16, and autocast
    would quietly bring them back inside the function.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        device = tensors[0].device.type
        # Only where there is something to leave, because it takes as long as a small operation.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return wrapper(*args, **kwargs)
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
