"""Teachers for self-distillation: earlier selves of the network in training."""

from __future__ import annotations

import copy
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._component import require

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MOST_PASSES = 8  # what is remembered of them where no loss ever asks


class Teacher:
    """Embeds, with an earlier self of the network, whatever the network has just embedded.

    Losses receive embeddings, and a teacher needs the inputs. So it watches the trunk: the inputs
    of forward passes with gradients enabled are remembered until the loss asks for the teacher's
    embeddings of them. Passes without gradients (testers, batch miners) go unnoticed.

    A teacher is deliberately not a module: trainers would set it to train mode, and it would join
    the parameters and the checkpoint. It belongs to the one trunk it watches, so copies of a loss
    share it, and a copy of the trunk is not watched.

    Args:
        trunk: the network in training, on its device already.
        embedder: what comes after the trunk, if it is separate.

    Attributes:
        network: the earlier self, in eval mode, without gradients.
    """

    def __init__(self, trunk: torch.nn.Module, embedder: torch.nn.Module | None = None) -> None:
        self._trunk = trunk
        self._student = torch.nn.Sequential(trunk, embedder or torch.nn.Identity())
        self.network: torch.nn.Module = copy.deepcopy(self._student).eval().requires_grad_(False)
        # The passes since a loss last asked: their inputs, or what the teacher made of them.
        self._passes: deque[Inputs | Tensor] = deque(maxlen=MOST_PASSES)
        self._asked = False
        # Only now: a copy made with the hook in place would have a teacher of its own.
        self._hook = trunk.register_forward_pre_hook(self._before_trunk, with_kwargs=True)

    def _before_trunk(
        self, trunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if trunk is self._trunk and torch.is_grad_enabled():
            self.before_training_pass()
            if self._asked:
                self.forget()
            self._passes.append((args, kwargs))

    def before_training_pass(self) -> None:
        """Called before each pass of the network that is trained on."""

    def end_epoch(self) -> None:
        """Called at the end of each epoch."""

    @torch.no_grad()
    def embed(self, num_samples: int) -> Tensor:
        """The teacher's embeddings, (N, D), of what the network embedded last.

        N samples may have come in several passes, as two views of a batch do. Several losses may
        ask for the same.

        Raises:
            RuntimeError: if there was no pass, or the latest do not add up to N samples.
        """
        if not self._passes:
            raise RuntimeError(
                "the teacher has seen no batch: the embeddings must come from a forward pass, with"
                " gradients enabled, of the trunk it was made with"
            )
        self._asked = True
        trunk, embedder = self.network.children()
        found: list[Tensor] = []
        for i in reversed(range(len(self._passes))):
            made = self._passes[i]
            if not isinstance(made, Tensor):
                args, kwargs = made
                made = self._passes[i] = embedder(trunk(*args, **kwargs))
            found.insert(0, made)
            if sum(map(len, found)) >= num_samples:
                break
        embeddings = torch.cat(found)
        if len(embeddings) != num_samples:
            raise RuntimeError(
                f"the trunk's latest passes were of {[len(e) for e in found]} samples, but the loss"
                f" has {num_samples} embeddings"
            )
        return embeddings

    def forget(self) -> None:
        """Let go of the inputs remembered."""
        self._passes.clear()
        self._asked = False

    def remove(self) -> None:
        """Stop watching the trunk."""
        self._hook.remove()
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        return {"network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with the trunk, whose hook it is, or with a loss: without the inputs remembered.
        return self.__dict__ | {"_passes": deque(maxlen=MOST_PASSES), "_asked": False}


class SnapshotTeacher(Teacher):
    """The network as it stood at the end of the last epoch: the teacher of arXiv 2206.08880.

    At the end of an epoch, where PML saves, teacher and network are equal; so there its state_dict
    holds no weights, and after loading it the teacher is taken from the network again.

    Example:
        >>> import torch
        >>> trunk = torch.nn.Linear(4, 2)
        >>> teacher = SnapshotTeacher(trunk)
        >>> embeddings = trunk(torch.randn(8, 4))
        >>> bool((teacher.embed(8) == embeddings).all())
        True
    """

    _equal = True  # whether the network still is as the teacher
    _to_take = False  # whether the snapshot is to be taken before the next training pass

    def before_training_pass(self) -> None:
        if self._to_take:
            self.end_epoch()
        self._equal = False

    def end_epoch(self) -> None:
        self.network.load_state_dict(self._student.state_dict())
        self._equal, self._to_take = True, False

    def state_dict(self) -> dict[str, Any]:
        return {} if self._equal else super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Not at once: the network's own weights may be loaded after ours.
        self._to_take = self._equal = not state
        if state:
            super().load_state_dict(state)


class EMATeacher(Teacher):
    """The exponential moving average of the network's weights, taken at each training pass. Ours.

    Args:
        trunk: the network in training, on its device already.
        embedder: what comes after the trunk, if it is separate.
        decay: in [0, 1), how much of the average is kept at each step.

    Buffers, such as batch normalisation's statistics, are the network's latest.

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
        require(0 <= decay < 1, "decay", "lie in [0, 1)", decay)
        super().__init__(trunk, embedder)
        self._average = AveragedModel(self.network, multi_avg_fn=partial(_move, decay))
        self.network = self._average.module

    def before_training_pass(self) -> None:
        self._average.update_parameters(self._student)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state["average"])


def _move(decay: float, average: list[Tensor], now: list[Tensor], number: Tensor | int) -> None:
    """torch's own, which is a closure, and so could not be pickled."""
    get_ema_multi_avg_fn(decay)(average, now, number)  # type: ignore[no-untyped-call]
