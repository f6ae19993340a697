"""What a teacher has to know about the many forms of networks in training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside DataParallel, DistributedDataParallel, Fabric and ``torch.compile``."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif type(module).__name__ == "_FabricModule":
            module = module._forward_module  # type: ignore[assignment]
        elif hasattr(module, "_orig_mod"):  # of torch.compile
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def check_is_whole(network: torch.nn.Module) -> None:
    """Raise a ValueError if parameters are sharded over processes or not initialized, or are not
    those of an ordinary module."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ValueError(
            "the network is a ScriptModule, which cannot be observed: do not script it"
        )
    for name, parameter in named_tensors(network):
        if isinstance(parameter, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(f"{name} is not initialized: make the teacher after a forward pass")
        if hasattr(parameter, "placements"):  # a DTensor, of fully_shard or tensor parallelism
            _raise_sharded(name)
    if dist.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in network.modules()):
            _raise_sharded("_flat_param")


def _raise_sharded(name: str) -> None:
    raise ValueError(
        f"the parameter {name} is sharded over processes, and a teacher needs whole parameters: use"
        " DistributedDataParallel, or ListwiseDistillationLoss with a teacher of your own"
    )


def check_same_names(copy: torch.nn.Module, network: torch.nn.Module) -> None:
    """Raise a ValueError if the two have other parameters or buffers, or of other shapes."""
    mine, theirs = ({(name, t.shape) for name, t in named_tensors(m)} for m in (copy, network))
    if mine != theirs:
        only_here, only_there = (
            sorted(name for name, _ in names) for names in (theirs - mine, mine - theirs)
        )
        raise ValueError(
            "the network has other parameters or buffers than the teacher: in the network"
            f" {only_here[:3] or 'none more'}, in the teacher {only_there[:3] or 'none more'}. Make"
            " the teacher after the last change of the network"
        )


@torch.no_grad()
def copy_weights(copy: torch.nn.Module, network: torch.nn.Module) -> None:
    copy.load_state_dict(network.state_dict())
    copy_buffers(copy, network)


@torch.no_grad()
def copy_buffers(copy: torch.nn.Module, network: torch.nn.Module) -> None:
    """Copy all buffers. Those that are not persistent are not in the state_dict."""
    for mine, theirs in zip(copy.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
