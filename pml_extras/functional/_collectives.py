"""Tensors that are spread over the ranks of a torch.distributed group, with their gradients.

In the backward passes it is taken that every rank computes the same loss from what these functions
return. A tensor that is equal on all ranks then has a gradient that is, too, wherever it enters
computations that are equal on all ranks; where it enters those of one rank's classes, the gradient
is spread over the ranks like these, and :func:`copy_to_ranks` sums it up.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all processes


def gather_rows(x: Tensor, sizes: list[int], group: Group = None) -> Tensor:
    """The rows of all ranks, in the order of the ranks.

    The gradient of one's own rows comes out multiplied by the number of ranks. It is what goes into
    this rank's copy of the network, and DistributedDataParallel averages the copies' gradients,
    where it is their sum that is the gradient of the one loss.

    Args:
        x: (N_r, ...), this rank's rows; the other dimensions are alike on all ranks.
        sizes: N_r of each rank.
        group: the ranks. Default: all.

    Returns:
        (sum of sizes, ...).
    """
    rows: Tensor = _GatherRows.apply(x, sizes, group)  # type: ignore[no-untyped-call]
    return rows


def copy_to_ranks(x: Tensor, group: Group = None) -> Tensor:
    """``x``, which is equal on all ranks, for computations of which each rank does a part."""
    copy: Tensor = _CopyToRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return copy


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The sum of all ranks' ``x``."""
    total: Tensor = _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def logsumexp_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The logarithm of the sum of the exponentials of all ranks' ``x``, which are finite."""
    total: Tensor = _LogSumExpOverRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def all_reduced(x: Tensor, op: Literal["sum", "max", "min"], group: Group = None) -> Tensor:
    """The sum, largest or least of all ranks' ``x``, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), group=group)
    return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        most = max(sizes)
        # Collectives want equal shapes.
        own = pad(x.detach(), (0, 0) * (x.ndim - 1) + (0, most - len(x))).contiguous()
        gathered = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(gathered, own, group=group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank(ctx.group)
        return by_rows.split_with_sizes(ctx.sizes)[rank] * len(ctx.sizes), None, None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_copy: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduced(by_copy, "sum", ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduced(x, "sum", group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: Tensor) -> tuple[Tensor | None, ...]:
        return by_sum, None


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        largest = all_reduced(x, "max", group)
        total = all_reduced((x - largest).exp(), "sum", group).log() + largest
        ctx.save_for_backward(x, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor | None, ...]:
        x, total = ctx.saved_tensors
        return by_total * (x - total).exp(), None
