"""What all components have in common: settings that show in the repr and the logs, and checks."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch


class HyperparametersMixin:
    """Mix-in for PML components: ``hyperparameters`` names the attributes to show."""

    hyperparameters: ClassVar[tuple[str, ...]]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.hyperparameters)


def require(condition: bool, name: str, wanted: str, value: Any) -> None:
    """Raise a ValueError that says what was wanted and what came."""
    if not condition:
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    require(value >= least and value % 1 == 0, name, f"be a whole number from {least} up", value)


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


def check_embeddings(
    embeddings: torch.Tensor, size: int | str = "embedding_size", name: str = "embeddings"
) -> None:
    """Check that embeddings are rows of floating-point numbers, of this size if it is known."""
    if embeddings.ndim != 2 or size not in ("embedding_size", embeddings.shape[1]):
        raise ValueError(
            f"{name} must have shape (batch_size, {size}), got {tuple(embeddings.shape)}"
        )
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {embeddings.dtype}")


def check_finite(**rows: torch.Tensor | None) -> None:
    """Check that these are rows of finite numbers, at least one of references."""
    for name, x in rows.items():
        if x is None:
            continue
        if len(x) == 0 and name != "query":
            raise ValueError(f"{name} must have a row at least, got {tuple(x.shape)}")
        wrong = (~x.isfinite().all(1)).nonzero()
        if len(wrong) > 0:
            raise ValueError(f"{name} must be finite, and row {int(wrong[0])} is not")


class OptimizerReminder:
    """Warns, once, of a parameter that gets gradients and is never moved.

    PML's users pass a loss's parameters to an optimizer of their own, and forgetting to do so has
    no other sign than poor accuracy.
    """

    patience = 100  # calls; more than anybody accumulates gradients over

    def __init__(self, what: str, of: str) -> None:
        self.what, self.of = what, of
        self.still: int | None = 0  # calls with a gradient so far; None: it moves, or was told of
        self.version: int | None = None
        self.row: tuple[torch.Tensor, torch.Tensor] | None = None  # its number, and what it was

    def check(self, parameter: torch.Tensor) -> None:
        """Call this at each forward pass in training."""
        if self.still is None or parameter.grad is None or not parameter.requires_grad:
            return
        # Counts the changes in place, which is how optimizers make them, save for fused ones;
        # reading it costs nothing.
        version = parameter._version
        if self.version not in (None, version):
            self.still = self.row = None
            return
        self.version = version
        if self.row is None:
            number = parameter.grad.abs().amax(1).argmax()[None]
            self.row = number, parameter.detach()[number]
        self.still += 1
        if self.still == self.patience:
            self.still = None
            (number, before), self.row = self.row, None
            moved_away = before.device != parameter.device or before.dtype != parameter.dtype
            if moved_away or not torch.equal(parameter.detach()[number], before):
                return
            warnings.warn(
                f"{self.what} of {self.of} have had gradients in {self.patience} steps and have not"
                " moved: give loss.parameters() to an optimizer, whose key in PML's trainers is"
                ' "metric_loss_optimizer"',
                stacklevel=4,
            )
