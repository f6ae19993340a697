"""Teachers for self-distillation: earlier versions of the network in training."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves, tree_map

from .. import _checks
from .._component import is_in_backward, is_narrow
from ._networks import (
    check_is_whole,
    check_same_names,
    copy_buffers,
    copy_weights,
    named_tensors,
    unwrap,
)

MAX_PENDING_BATCHES = 8  # kept while no loss asks for them
NO_BATCH = (
    "the teacher has seen no batch: the embeddings must come from a forward pass, with gradients"
    " enabled, of the trunk it was made with (activation checkpointing with use_reentrant=True"
    " disables gradients)"
)


class _Pass(NamedTuple):
    """The arguments of a pass of the trunk, and how often each tensor had been changed then."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return [t._version for t in tensors if not t.is_inference()]


class Teacher:
    """Embeds the batch that the network has just embedded, with an earlier version of the network.

    A loss receives embeddings, but the teacher needs the inputs. So a forward pre-hook on the trunk
    keeps the inputs of passes with gradients enabled, until the loss asks for the teacher's
    embeddings of them. Passes without gradients (testers, batch miners) are ignored, and so are
    those with which activation checkpointing recomputes the trunk in backward.

    A teacher is deliberately not a module: trainers would set it to train mode, and its weights
    would join the loss's parameters. It belongs to one trunk: copies of a loss share the teacher,
    and a copy or a saved file of the trunk has none. It follows the network to another device or
    dtype. The first batch is embedded twice more, to check that the copy is independent of the
    network.

    Args:
        trunk: the network in training. DistributedDataParallel and compiled modules are unwrapped.
        embedder: the network after the trunk, if it is separate.
        copy_module: makes a new module from the trunk, and one from the embedder. It may ignore
            their weights, which are copied afterwards. Default: ``copy.deepcopy``.
        get_embeddings: takes what the trunk returns, if that is not a tensor, and returns a tensor:
            ``lambda output: output.pooler_output``.

    Attributes:
        network: the earlier version, in eval mode, without gradients.

    Raises:
        ValueError: if the network cannot be copied, or its parameters are sharded or not
            initialized; at the first batch, if the copy shares weights with the network or does not
            return (N, D) embeddings.
    """

    def __init__(
        self,
        trunk: torch.nn.Module,
        embedder: torch.nn.Module | None = None,
        *,
        copy_module: Callable[[torch.nn.Module], torch.nn.Module] = copy.deepcopy,
        get_embeddings: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._trunk = unwrap(trunk)
        self._student = torch.nn.Sequential(self._trunk)
        if embedder is not None:
            self._student.append(unwrap(embedder))
        check_is_whole(self._student)
        self._get_embeddings = get_embeddings
        self.network: torch.nn.Module = self._copy(copy_module).eval().requires_grad_(False)
        self._is_checked = False
        # Per pass of the trunk: its arguments, or the teacher's embeddings once computed.
        self._pending_batches: deque[_Pass | Tensor] = deque(maxlen=MAX_PENDING_BATCHES)
        self._is_open = False  # whether the next pass is of the same batch as the latest
        self._observe_trunk()

    def _copy(self, copy_module: Callable[[torch.nn.Module], torch.nn.Module]) -> torch.nn.Module:
        try:
            if copy_module is copy.deepcopy:  # together: the two may share weights
                network = copy.deepcopy(self._student)
            else:
                network = torch.nn.Sequential(*map(copy_module, self._student))
        except RuntimeError as error:
            raise ValueError(
                f"the network cannot be copied ({error}): pass copy_module, which makes a new one"
            ) from error
        check_same_names(network, self._student)
        copy_weights(network, self._student)
        return network

    # ---- Observing the trunk.

    def _observe_trunk(self) -> None:
        # After the copy, so that the copy does not have the hook.
        # First of all hooks: the others may change the arguments, and the copy has them too.
        self._hook = self._trunk.register_forward_pre_hook(
            _TrunkHook(self), with_kwargs=True, prepend=True
        )

    def before_trunk(
        self, trunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep the arguments of a training pass of the trunk."""
        if trunk is not self._trunk or not torch.is_grad_enabled() or is_in_backward():
            return
        self._follow_network()
        if not self._is_checked:
            self._check_independence(args, kwargs)
            self._is_checked = True
        if not self._is_open:
            self._is_open = True
            self._pending_batches.clear()
        self._pending_batches.append(_Pass(args, kwargs, _versions(args, kwargs)))

    def _follow_network(self) -> None:
        """Move the copy to the device and the dtype of the network."""
        check_is_whole(self._student)
        check_same_names(self.network, self._student)
        for (name, mine), (_, theirs) in zip(
            named_tensors(self.network), named_tensors(self._student), strict=True
        ):
            if mine.device != theirs.device or mine.dtype != theirs.dtype:
                self._convert(name, mine, theirs)

    def _convert(self, name: str, mine: Tensor, theirs: Tensor) -> None:
        mine.data = mine.data.to(theirs.device, theirs.dtype)

    @torch.no_grad()
    def _check_independence(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare embeddings of the copy with those it gives while the network's weights are 0.

        A copy of a network whose ``forward`` was replaced on the instance still calls the network.
        The distillation loss would always be 0.
        """
        if any(getattr(module, "teacher", None) is self for module in self._student.modules()):
            raise ValueError(
                "the trunk contains the loss: give the teacher the network without the loss"
            )
        tensors = [*self._student.parameters(), *self._student.buffers()]
        values = [t.data for t in tensors]
        try:
            # The network, if it is called, may change its buffers too.
            for t in tensors:
                t.data = t.data.clone()
            embeddings = self._embed_reproducibly(args, kwargs)
            for p in self._student.parameters():
                p.data = torch.zeros_like(p.data)
            without_network = self._embed_reproducibly(args, kwargs)
        finally:
            for t, value in zip(tensors, values, strict=True):
                t.data = value
        if not torch.allclose(embeddings, without_network, rtol=0.01, atol=1e-6, equal_nan=True):
            raise ValueError(
                "the teacher shares weights with the network: a forward method, or a function that"
                " it calls, was replaced on the instance and still refers to it. Pass copy_module,"
                " which builds a new network"
            )

    def _embed_reproducibly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # The network may change its input in place, or draw random numbers.
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        devices = {p.device for p in self.network.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(devices, key=str)):
            torch.manual_seed(0)
            return self._embed(args, kwargs)

    def _embed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        trunk, *embedder = self.network.children()
        output = trunk(*args, **kwargs)
        if self._get_embeddings is not None:
            output = self._get_embeddings(output)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the network returned a {type(output).__name__}: pass get_embeddings, which takes"
                " it and returns a tensor"
            )
        embeddings = embedder[0](output) if embedder else output
        _checks.embeddings(embeddings, name="the teacher's embeddings")
        return embeddings

    # ---- What a loss calls.

    def end_batch(self) -> None:
        """Call this after the loss of each batch in training. Several losses may."""
        if self._is_open:
            self._is_open = False
            self._learn()

    def _learn(self) -> None:
        """Called once per batch."""

    def end_epoch(self) -> None:
        """Call this at the end of each epoch."""

    @torch.no_grad()
    def embed(self, num_samples: int) -> Tensor:
        """The teacher's embeddings, (N, D), of the latest N samples that the network embedded.

        The samples may have come in several passes, for example two views of a batch. Several
        losses may ask for the same samples.

        Raises:
            RuntimeError: if there was no pass, or the latest passes do not add up to N samples.
        """
        if not self._pending_batches:
            raise RuntimeError(NO_BATCH)
        found: list[Tensor] = []
        for i in reversed(range(len(self._pending_batches))):
            batch = self._pending_batches[i]
            if isinstance(batch, _Pass):
                if _versions(batch.args, batch.kwargs) != batch.versions:
                    raise RuntimeError(
                        "the trunk's input was changed in place, by the network or after it, before"
                        " the loss was called: give the trunk a copy"
                    )
                batch = self._pending_batches[i] = self._embed(batch.args, batch.kwargs)
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

    def skip_batch(self) -> None:
        """Call this instead of :meth:`embed` if the embeddings are not needed. Drops the inputs.

        Raises:
            RuntimeError: if there was no pass at all.
        """
        if not self._is_checked:
            raise RuntimeError(NO_BATCH)
        self._pending_batches.clear()

    def remove(self) -> None:
        """Stop observing the trunk."""
        self._hook.remove()
        self._pending_batches.clear()

    # ---- Saving and copying.

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs to continue exactly."""
        state = self.network.state_dict(keep_vars=True)  # in which tied weights are one object
        unique = {id(t): name for name, t in reversed(state.items())}
        return {f"network.{name}": state[name] for name in reversed(unique.values())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what is there: all of the state, or a part of a checkpoint in several files."""
        self._follow_network()  # or else values would be rounded to the dtype of an earlier time
        prefix = "network."
        names = [name for name in state if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): state[name] for name in names}
        self.network.load_state_dict(weights, strict=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with a loss, but without the inputs.
        pending_batches: deque[Any] = deque(maxlen=MAX_PENDING_BATCHES)
        state = self.__dict__ | {"_pending_batches": pending_batches}
        return {name: value for name, value in state.items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._observe_trunk()


class _TrunkHook:
    """The forward pre-hook. Copying or pickling a trunk does not take the teacher along."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, trunk: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.teacher.before_trunk(trunk, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    """What remains of the hook in a copy or a file of the trunk."""

    def __call__(self, trunk: torch.nn.Module, args: Any, kwargs: Any) -> None:
        pass


class SnapshotTeacher(Teacher):
    """The network at the end of the previous epoch: the teacher of arXiv 2206.08880.

    The arguments are those of :class:`Teacher`.

    Example:
        >>> import torch
        >>> trunk = torch.nn.Linear(4, 2)
        >>> teacher = SnapshotTeacher(trunk)
        >>> embeddings = trunk(torch.randn(8, 4))
        >>> bool((teacher.embed(8) == embeddings).all())
        True
    """

    def end_epoch(self) -> None:
        copy_weights(self.network, self._student)


class EMATeacher(Teacher):
    """The exponential moving average (EMA) of the network's weights. Ours.

    The average is updated at the end of each batch, and kept in float32 or wider. When gradients
    are accumulated over n batches, it is updated n times per step of the optimizer: take the n-th
    root of the decay. Buffers, such as the statistics of batch normalization, are copied from the
    network.

    Args:
        trunk: the network in training.
        embedder: the network after the trunk, if it is separate.
        decay: in [0, 1), how much of the average is kept at each update.
        **kwargs: ``copy_module`` and ``get_embeddings`` of :class:`Teacher`.

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
        **kwargs: Any,
    ) -> None:
        _checks.in_half_open_range(0, 1, decay=decay)
        super().__init__(trunk, embedder, **kwargs)
        self.decay = decay
        self.num_updates = 0
        # The averages of parameters that are narrower than float32. The others are in the network.
        self._wide_averages: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            self._convert(name, parameter, parameter)

    def _convert(self, name: str, mine: Tensor, theirs: Tensor) -> None:
        average = self._wide_averages.pop(name, mine.data)
        super()._convert(name, mine, theirs)
        if not isinstance(mine, torch.nn.Parameter):
            return
        if is_narrow(theirs.dtype):
            average = average.to(theirs.device, torch.promote_types(average.dtype, torch.float32))
            self._wide_averages[name] = average
        else:
            mine.data = average.to(theirs.device, theirs.dtype)

    @torch.no_grad()
    def _learn(self) -> None:
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for (name, mine), theirs in zip(
            self.network.named_parameters(), self._student.parameters(), strict=True
        ):
            if not theirs.is_floating_point():
                mine.copy_(theirs)
                continue
            averages.append(self._wide_averages.get(name, mine.data))
            current.append(theirs.data.to(averages[-1].dtype))
        if self.num_updates == 0:  # the weights may have been loaded since the copy was made
            torch._foreach_copy_(averages, current)
        else:
            get_ema_multi_avg_fn(self.decay)(averages, current, 0)  # type: ignore[no-untyped-call]
        self.num_updates += 1
        for name, average in self._wide_averages.items():
            self.network.get_parameter(name).copy_(average)
        copy_buffers(self.network, self._student)

    def state_dict(self) -> dict[str, Tensor]:
        averages = {f"network.{name}": t for name, t in self._wide_averages.items()}
        return super().state_dict() | averages | {"num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        if "num_updates" in state:
            self.num_updates = int(state["num_updates"])
        for name, average in self._wide_averages.items():
            if f"network.{name}" in state:
                average.copy_(state[f"network.{name}"])
