"""The base of functions that bring their own derivative."""

from __future__ import annotations

import inspect

import torch

from ._precision import outside_autocast


class Function(torch.autograd.Function):
    """Runs backward as exactly as :func:`full_precision` runs forward, whatever autocast it is
    called under, and has a rule for vmap where ``setup_context`` does without it."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = staticmethod(outside_autocast(cls.backward))  # type: ignore[method-assign]
        # torch asks for it in each call, which otherwise costs as much as two small operations.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
