"""Checks of arguments. Each raises a ValueError that says what is wanted and what was given."""

import math
from typing import Any

import torch


def require(condition: bool, name: str, wanted: str, value: Any) -> None:
    """Raise a ValueError that says what is wanted and what was given."""
    if not condition:
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def count(name: str, value: int, least: int = 1) -> int:
    """Check a number, which may be NumPy's, and return it as an int."""
    is_count = not isinstance(value, bool) and value >= least and value % 1 == 0
    require(is_count, name, f"be a whole number from {least} up", value)
    return int(value)


def non_negative(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value < math.inf, name, "be non-negative and finite", value)


def positive(**values: float) -> None:
    for name, value in values.items():
        require(0 < value < math.inf, name, "be positive and finite", value)


def in_range(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        require(low <= value <= high, name, f"lie in [{low}, {high}]", value)


def in_half_open_range(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        require(low <= value < high, name, f"lie in [{low}, {high})", value)


def one_of(choices: tuple[str, ...], **values: str) -> None:
    for name, value in values.items():
        require(value in choices, name, f"be one of {choices}", value)


def class_batch(
    x: torch.Tensor, labels: torch.Tensor | None, embedding_size: int, num_classes: int
) -> torch.Tensor:
    """Check embeddings and their class indices. Return these as int64 on the embeddings' device."""
    embeddings(x, embedding_size)
    labels = class_labels(labels, num_classes, len(x))
    return labels.to(x.device, torch.long)


def tensors_or_none(**values: Any) -> None:
    for name, value in values.items():
        if not (value is None or isinstance(value, torch.Tensor)):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def integer_labels(labels: torch.Tensor | None, num_samples: int | None = None) -> torch.Tensor:
    """Check that labels are a tensor of integers, (num_samples,) if given, and return them."""
    if labels is None:
        raise ValueError("labels are required")
    tensors_or_none(labels=labels)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim == 0:
        raise ValueError("labels must have shape (batch_size,), got ()")
    if num_samples is not None and labels.shape != (num_samples,):
        raise ValueError(f"labels must have shape ({num_samples},), got {tuple(labels.shape)}")
    return labels


def class_labels(
    labels: torch.Tensor | None, num_classes: int, num_samples: int | None = None
) -> torch.Tensor:
    """Check that labels are class indices, and return them.

    Call it before labels go to a GPU. Labels on a GPU are left to its own bounds check, because
    reading them would make the host wait in every step.
    """
    labels = integer_labels(labels, num_samples)
    if labels.device.type != "cpu":
        return labels
    wide = labels.long()
    wrong = ((wide < 0) | (wide >= num_classes)).flatten().nonzero()
    if len(wrong) > 0:
        index = int(wrong[0])
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {int(wide.flatten()[index])}"
            f" at index {index}"
        )
    return labels


def embeddings(
    x: torch.Tensor,
    size: int | None = None,
    name: str = "embeddings",
    *,
    finite: bool = False,
) -> None:
    """Check that embeddings are rows of floating-point numbers, of this size if it is given.

    ``finite`` reads the values, which makes the host wait for a GPU.
    """
    if x.ndim != 2 or size not in (None, x.shape[1]):
        wanted = f"(batch_size, {size or 'embedding_size'})"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {x.dtype}")
    wrong = (~x.isfinite().all(1)).nonzero().tolist() if finite else []
    if wrong:
        raise ValueError(f"{name} must be finite, and row {wrong[0][0]} is not")
