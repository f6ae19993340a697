"""The base of functions that bring their own derivative."""

from __future__ import annotations

import inspect

import torch


class Function(torch.autograd.Function):
    """With a rule for vmap; ``forward`` has no context, ``setup_context`` saves what is needed."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # torch asks for it in each call, which otherwise costs as much as two small operations.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
