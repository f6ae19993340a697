"""Collectives with gradients, and gathering a batch from all ranks of torch.distributed.

Backward assumes that every rank computes the same loss from the outputs of these functions. If all
ranks compute the same from an equal tensor, each rank has its whole gradient. If each computes
something different, each has a part of it, and :func:`copy_to_parallel` sums the parts.
"""

from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ._kernels.self_matches import row_hashes

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all processes


def gather_rows(x: Tensor, sizes: list[int], group: Group = None) -> Tensor:
    """The rows of all ranks, in the order of the ranks.

    The gradient of this rank's rows is multiplied by the number of ranks, because
    DistributedDataParallel divides by it: it averages the gradients of the network's copies, but
    one loss over all rows needs their sum.

    Args:
        x: (N_r, ...), this rank's rows; the other dimensions are equal on all ranks.
        sizes: N_r of each rank.
        group: the process group. Default: all processes.

    Returns:
        (sum of sizes, ...).
    """
    return _GatherRows.apply(x, sizes, group)  # type: ignore[no-any-return, no-untyped-call]


def copy_to_parallel(x: Tensor, group: Group = None) -> Tensor:
    """``x``, equal on all ranks, for computations that are split over the ranks.

    Backward sums the gradients of all ranks.
    """
    return _CopyToParallel.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """The sum of all ranks' ``x``, with gradient."""
    return _AllReduceSum.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def all_reduce_logsumexp(x: Tensor, group: Group = None) -> Tensor:
    """The log of the sum of the exponentials of all ranks' finite ``x``, with gradient."""
    maximum = all_reduce(x, "max", group)
    return all_reduce_sum((x - maximum).exp(), group).log() + maximum


def all_reduce(x: Tensor, op: Literal["sum", "max", "min"], group: Group = None) -> Tensor:
    """The sum, maximum or minimum of all ranks' ``x``, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), group=group)
    return x


def gather_batch(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings, (N, D), and labels, (N,), of all ranks, without gradient.

    State that is computed from them is then equal on all ranks. Under PML's DistributedLossWrapper
    every rank already has the whole batch, each in a different order. It is returned unchanged.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return embeddings, labels
    # 1. Gather the sizes, and hashes that detect the same batch in a different order.
    summary = torch.stack([labels.new_tensor(len(labels)), batch_hash(embeddings, labels)])
    summaries = gather_rows(summary[None], [1] * dist.get_world_size())
    if (summaries == summary).all():
        return embeddings, labels
    # 2. Gather the rows.
    sizes = summaries[:, 0].tolist()
    return gather_rows(embeddings.detach(), sizes), gather_rows(labels, sizes)


def batch_hash(embeddings: Tensor, labels: Tensor) -> Tensor:
    """() int64: a hash of a batch that does not depend on the order of its rows."""
    rows = torch.cat([embeddings.detach(), labels[:, None].to(embeddings.dtype)], 1)
    return row_hashes(rows).sum()  # modulo 2^64


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives need equal shapes.
        padded = pad(x.detach(), (0, 0) * (x.ndim - 1) + (0, max(sizes) - len(x))).contiguous()
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank(ctx.group)
        return grad_rows.split_with_sizes(ctx.sizes)[rank] * len(ctx.sizes), None, None


class _CopyToParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_copy: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grad_copy, "sum", ctx.group), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, "sum", group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        return grad_sum, None
