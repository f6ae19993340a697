"""What components share: when and how they keep state, what PML logs, and the losses' format."""

import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks


def is_training_step(module: torch.nn.Module) -> bool:
    """Whether a call of the module may change its state, or perturb what it is given.

    PML's users compute a validation loss under ``torch.no_grad()``, and few put the loss into eval
    mode. So a call without gradients is not a training step either, and neither is a call that
    activation checkpointing repeats in backward.
    """
    return module.training and torch.is_grad_enabled() and not is_in_backward()


def is_in_backward() -> bool:
    """Whether a backward pass calls this, as activation checkpointing does to recompute."""
    # A private function of torch, which its own checkpointing uses for the same question.
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


class AccumulatorsMixin(torch.nn.Module):
    """Keeps the buffers in float32 or wider, whatever dtype the module is cast to.

    In bfloat16, a moving average that changes by less than 0.4% in a step does not change at all.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What nn.Module calls in .to(), .half() and the like.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and is_narrow(new.dtype):
                self._buffers[name] = old.to(new.device)
        return self


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether it is a floating dtype narrower than float32."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def accumulator_dtype() -> torch.dtype:
    """The dtype for moving averages: torch's default, but at least float32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class ExtraStateMixin(torch.nn.Module):
    """Saves state that is neither a parameter nor a buffer in the state_dict, as tensors.

    ``get_extra_state`` of torch may return any object, but safetensors saves tensors only. The
    names are those of attributes, because torch.distributed.checkpoint looks them up.
    """

    def extra_state(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        raise NotImplementedError

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`extra_state` returned, or the part of it that is there."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.extra_state().items():
            is_tensor = isinstance(tensor, Tensor)  # a network in it may save other objects
            destination[prefix + name] = tensor.detach() if is_tensor and not keep_vars else tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lists = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        names = {prefix + name: name for name in self.extra_state()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in names]
        missing_keys += [key for key in names if key not in state_dict]
        # The present ones, as torch does with parameters: a checkpoint may be in several files.
        present = {name: state_dict[key] for key, name in names.items() if key in state_dict}
        try:
            self.load_extra_state(present)
        except RuntimeError as error:
            error_msgs.append(str(error))


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


class TensorLabelsMixin(torch.nn.Module):
    """Refuses labels in a list or an array, whose shape or device PML would look for in vain."""

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        _checks.tensors_or_none(labels=labels, ref_labels=kwargs.get("ref_labels"))
        return super().forward(embeddings, labels, *args, **kwargs)


def element_losses(losses: Tensor) -> dict[str, Any]:
    """The entry of PML's loss dict for one loss per sample, (N,)."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"losses": losses, "indices": indices, "reduction_type": "element"}


class OptimizerReminder:
    """Detects a parameter that has not moved in 100 training steps and has no optimizer.

    PML's users give a loss's parameters to an optimizer of their own. Forgetting it has no other
    sign than low accuracy.
    """

    patience = 100
    num_steps = 0

    def is_due(self, parameter: Tensor) -> bool:
        """Call this in each training step, before the forward pass. True at most once."""
        # Its gradient says nothing: model.zero_grad() removes it before the forward pass.
        if not parameter.requires_grad or self.num_steps == self.patience:
            return False
        if self.num_steps == 0:
            self.first_version = parameter._version  # counts changes in place
        self.num_steps += 1
        moved = parameter._version != self.first_version
        return self.num_steps == self.patience and not moved and not _has_optimizer(parameter)


def _has_optimizer(parameter: Tensor) -> bool:
    """Whether an optimizer has the parameter, which it may not have stepped yet."""
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return any(p is parameter for group in groups for p in group["params"])
