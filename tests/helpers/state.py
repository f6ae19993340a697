"""Checks on what a module keeps between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What users may see for invalid input. Never AssertionError, AttributeError or KeyError.
USER_ERRORS = (ValueError, TypeError, RuntimeError, IndexError)


def state_of(module: nn.Module) -> dict[str, Any]:
    """A copy of the state_dict."""
    return copy.deepcopy(module.state_dict())


def same_state(a: Any, b: Any) -> bool:
    """Whether two state_dicts, or two of their values, are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    return a == b


def state_is_finite(state: Any) -> bool:
    """Whether all tensors in a state_dict are finite."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    return not isinstance(state, dict) or all(state_is_finite(value) for value in state.values())


def assert_refused_without_change(
    module: nn.Module, call: Callable[[], object], description: str
) -> None:
    """``call`` must raise an error with a message, and leave the module's state as it was."""
    before, message = state_of(module), "not refused"
    try:
        call()
    except USER_ERRORS as error:
        message = str(error).strip()
    assert message, description
    assert message != "not refused", description
    assert "NoneType" not in message, f"{description}: the message does not name the problem"
    assert same_state(state_of(module), before), f"{description}: refused, but the state changed"
