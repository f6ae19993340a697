"""What all components share: hyperparameters in the repr and the log, and the losses' format."""

import inspect
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

    def record(self: Any, *stats: str) -> None:
        """Let PML's loggers record the hyperparameters, and these statistics if they are on."""
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters()))
        self.add_to_recordable_attributes(list_of_names=list(stats), is_stat=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())


def element_losses(losses: torch.Tensor) -> dict[str, Any]:
    """The entry of PML's loss dict for one loss per sample, (N,)."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"losses": losses, "indices": indices, "reduction_type": "element"}


class OptimizerReminder:
    """Detects a parameter that gets gradients in 100 steps and does not move.

    PML's users give a loss's parameters to an optimizer of their own. Forgetting it has no other
    sign than low accuracy.
    """

    patience = 100  # longer than usual gradient accumulation
    num_steps = 0

    def is_due(self, parameter: torch.Tensor) -> bool:
        """Call this in each training step, before the forward pass. True at most once."""
        # zero_grad of an optimizer that has the parameter usually sets .grad to None.
        if parameter.grad is None or self.num_steps == self.patience:
            return False
        if self.num_steps == 0:
            row = parameter.grad.abs().amax(1).argmax()[None]
            self.before = parameter._version, row, parameter.detach()[row]
        self.num_steps += 1
        version, row, probe_row = self.before
        # Fused optimizers do not count their changes in _version, so compare values too.
        if self.num_steps < self.patience or parameter._version != version:
            return False
        return torch.equal(parameter.detach()[row].to(probe_row), probe_row)
