"""What a teacher has to know about the many forms of networks in training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parameter import UninitializedParameter


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):  # of torch.compile
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def check_is_whole(network: torch.nn.Module) -> None:
    """Raise a ValueError if parameters are sharded over processes or not initialized."""
    for name, parameter in network.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"the parameter {name} is not initialized: make the teacher after a forward pass"
            )
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


def is_in_backward() -> bool:
    """Whether a backward pass calls this, as activation checkpointing does to recompute."""
    # A private function of torch, which its own checkpointing uses for the same question.
    return bool(torch._C._current_graph_task_id() != -1)
