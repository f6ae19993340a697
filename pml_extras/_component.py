"""What all components share: hyperparameters in the repr and the log, and argument checks."""

import inspect
import math
import warnings
from typing import Any

import torch


class HyperparametersMixin:
    """Shows the hyperparameters of a component: its constructor's arguments of plain types."""

    def hyperparameters(self) -> dict[str, Any]:
        """Values by name. Every such argument is an attribute of the same name."""
        classes = [cls for cls in reversed(type(self).__mro__) if "__init__" in vars(cls)]
        names = {name: None for cls in classes for name in inspect.signature(cls).parameters}
        values = {name: vars(self).get(name) for name in names}
        return {n: v for n, v in values.items() if isinstance(v, (bool, int, float, str))}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())


def require(condition: bool, name: str, wanted: str, value: Any) -> None:
    """Raise a ValueError that says what is wanted and what was given."""
    if not condition:
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    require(value >= least and value % 1 == 0, name, f"be a whole number from {least} up", value)


def check_non_negative(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value < math.inf, name, "be non-negative and finite", value)


def check_range(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        require(low <= value <= high, name, f"lie in [{low}, {high}]", value)


def check_class_labels(labels: torch.Tensor | None, num_classes: int) -> torch.Tensor:
    """Check that labels are class indices, and return them.

    Call it before labels go to a GPU. Labels on a GPU are left to its own bounds check, because
    reading them would make the host wait in every step.
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
    embeddings: torch.Tensor,
    size: int | None = None,
    name: str = "embeddings",
    *,
    finite: bool = False,
) -> None:
    """Check that embeddings are rows of floating-point numbers, of this size if it is given.

    ``finite`` reads the values, which makes the host wait for a GPU.
    """
    if embeddings.ndim != 2 or size not in (None, embeddings.shape[1]):
        wanted = f"(batch_size, {size or 'embedding_size'})"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {embeddings.dtype}")
    if finite:
        for row in (~embeddings.isfinite().all(1)).nonzero()[:1]:
            raise ValueError(f"{name} must be finite, and row {int(row)} is not")


def element_losses(losses: torch.Tensor) -> dict[str, Any]:
    """The entry of PML's loss dict for one loss per sample, (N,)."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"losses": losses, "indices": indices, "reduction_type": "element"}


class OptimizerReminder:
    """Warns once if a parameter gets gradients in 100 steps and does not move.

    PML's users give a loss's parameters to an optimizer of their own. Forgetting it has no other
    sign than low accuracy.
    """

    patience = 100  # more steps than gradients are accumulated over
    num_unmoved_steps = 0

    def check(self, parameter: torch.Tensor, description: str) -> None:
        """Call this in each training step, before the forward pass."""
        if parameter.grad is None or self.num_unmoved_steps == self.patience:
            return
        if self.num_unmoved_steps == 0:
            row = parameter.grad.abs().amax(1).argmax()[None]
            self.before = parameter._version, row, parameter.detach()[row]
        self.num_unmoved_steps += 1
        if self.num_unmoved_steps == self.patience:
            version, row, probe_row = self.before
            # Fused optimizers do not count their changes in _version, so compare values too.
            unmoved = parameter._version == version
            if unmoved and torch.equal(parameter.detach()[row].to(probe_row), probe_row):
                warnings.warn(
                    f"{description} have had gradients in {self.patience} steps and have not moved:"
                    " give loss.parameters() to an optimizer, whose key in PML's trainers is"
                    ' "metric_loss_optimizer"',
                    stacklevel=4,
                )
