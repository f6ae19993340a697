"""Teachers for self-distillation: earlier versions of the network in training."""

from __future__ import annotations

import copy
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import _checks

MAX_PENDING_BATCHES = 8  # kept while no loss asks for them


class Teacher:
    """Embeds the batch that the network has just embedded, with an earlier version of the network.

    A loss receives embeddings, but the teacher needs the inputs. So a forward pre-hook on the trunk
    keeps the inputs of passes with gradients enabled, until the loss asks for the teacher's
    embeddings of them. Passes without gradients (testers, batch miners) are ignored.

    A teacher is deliberately not a module: trainers would set it to train mode, and its weights
    would join the loss's parameters. It belongs to one trunk: copies of a loss share the teacher,
    and a copy of the trunk is not observed.

    Args:
        trunk: the network in training, already on its device.
        embedder: the network after the trunk, if it is separate.

    Attributes:
        network: the earlier version, in eval mode, without gradients.
    """

    def __init__(self, trunk: torch.nn.Module, embedder: torch.nn.Module | None = None) -> None:
        self._trunk = trunk
        self._student = torch.nn.Sequential(trunk, embedder or torch.nn.Identity())
        self.network: torch.nn.Module = copy.deepcopy(self._student).eval().requires_grad_(False)
        # Per pass of the trunk: its arguments, or the teacher's embeddings once computed.
        self._pending_batches: deque[tuple[Any, Any] | Tensor] = deque(maxlen=MAX_PENDING_BATCHES)
        self._consumed = False  # whether a loss has asked; then the next pass clears them
        # After the copy, so that the copy does not have the hook.
        self._hook = trunk.register_forward_pre_hook(self._before_trunk, with_kwargs=True)

    def _before_trunk(
        self, trunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if trunk is self._trunk and torch.is_grad_enabled():
            self.before_training_pass()
            if self._consumed:
                self.clear()
            self._pending_batches.append((args, kwargs))

    def before_training_pass(self) -> None:
        """Called before each forward pass of the network in training."""

    def end_epoch(self) -> None:
        """Called at the end of each epoch."""

    @torch.no_grad()
    def embed(self, num_samples: int) -> Tensor:
        """The teacher's embeddings, (N, D), of the latest N samples that the network embedded.

        The samples may have come in several passes, for example two views of a batch. Several
        losses may ask for the same samples.

        Raises:
            RuntimeError: if there was no pass, or the latest passes do not add up to N samples.
        """
        if not self._pending_batches:
            raise RuntimeError(
                "the teacher has seen no batch: the embeddings must come from a forward pass, with"
                " gradients enabled, of the trunk it was made with"
            )
        self._consumed = True
        trunk, embedder = self.network.children()
        found: list[Tensor] = []
        for i in reversed(range(len(self._pending_batches))):
            batch = self._pending_batches[i]
            if not isinstance(batch, Tensor):
                args, kwargs = batch
                batch = self._pending_batches[i] = embedder(trunk(*args, **kwargs))
            found.insert(0, batch)
            if sum(map(len, found)) >= num_samples:
                break
        embeddings = torch.cat(found)
        if len(embeddings) != num_samples:
            raise RuntimeError(
                f"the trunk's latest passes were of {[len(e) for e in found]} samples, but the loss"
                f" has {num_samples} embeddings"
            )
        return embeddings

    def clear(self) -> None:
        """Drop the inputs that were kept."""
        self._pending_batches.clear()
        self._consumed = False

    def remove(self) -> None:
        """Stop observing the trunk."""
        self._hook.remove()
        self.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        return {"network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with the trunk, whose hook it is, or with a loss, but without the inputs.
        pending_batches: deque[Any] = deque(maxlen=MAX_PENDING_BATCHES)
        return self.__dict__ | {"_pending_batches": pending_batches, "_consumed": False}


class SnapshotTeacher(Teacher):
    """The network at the end of the previous epoch: the teacher of arXiv 2206.08880.

    Example:
        >>> import torch
        >>> trunk = torch.nn.Linear(4, 2)
        >>> teacher = SnapshotTeacher(trunk)
        >>> embeddings = trunk(torch.randn(8, 4))
        >>> bool((teacher.embed(8) == embeddings).all())
        True
    """

    def end_epoch(self) -> None:
        self.network.load_state_dict(self._student.state_dict())


class EMATeacher(Teacher):
    """The exponential moving average (EMA) of the network's weights. Ours.

    The average is updated before each forward pass with gradients enabled. Buffers, such as the
    statistics of batch normalization, are copied from the network.

    Args:
        trunk: the network in training, already on its device.
        embedder: the network after the trunk, if it is separate.
        decay: in [0, 1), how much of the average is kept at each update.

    Example:
        >>> import torch
        >>> trunk = torch.nn.Linear(4, 2)
        >>> teacher = EMATeacher(trunk, decay=0.99)
        >>> trunk(torch.randn(8, 4)).shape == teacher.embed(8).shape
        True
    """

    def __init__(
        self,
        trunk: torch.nn.Module,
        embedder: torch.nn.Module | None = None,
        *,
        decay: float = 0.999,
    ) -> None:
        _checks.in_half_open_range(0, 1, decay=decay)
        super().__init__(trunk, embedder)
        self._average = AveragedModel(self.network, multi_avg_fn=partial(_update_ema, decay))
        self.network = self._average.module

    def before_training_pass(self) -> None:
        self._average.update_parameters(self._student)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state["average"])


def _update_ema(
    decay: float, average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int
) -> None:
    """torch's function as a top-level one, because a closure cannot be pickled."""
    get_ema_multi_avg_fn(decay)(average, current, num_averaged)  # type: ignore[no-untyped-call]
