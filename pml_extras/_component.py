"""What all components have in common: settings that show in the repr and the logs, and checks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class ShowsSettings:
    """Mix-in for PML components: ``settings`` names the attributes that are settings."""

    settings: ClassVar[tuple[str, ...]]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)


def require(condition: bool, name: str, wanted: str, value: Any) -> None:
    """Raise a ValueError that says what was wanted and what came."""
    if not condition:
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def check_class_labels(labels: torch.Tensor | None, num_classes: int) -> torch.Tensor:
    """Check that labels are class numbers, and return them.

    Call it before labels go to a GPU. Those that lie on one already are left to its own bounds
    check, because looking at them would make the host wait at each step.
    """
    if labels is None:
        raise ValueError("labels are required")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
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


def check_embedding_size(embeddings: torch.Tensor, embedding_size: int) -> None:
    if embeddings.ndim != 2 or embeddings.shape[1] != embedding_size:
        raise ValueError(
            f"embeddings must have shape (batch_size, {embedding_size}),"
            f" got {tuple(embeddings.shape)}"
        )
