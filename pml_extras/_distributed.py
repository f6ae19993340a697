"""Batches that are spread over processes, for state that must be the same in all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import row_fingerprints


def joined_batch(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings, (N, D), and labels, (N,), of all processes; one's own where there is one.

    Under PML's DistributedLossWrapper every process has the joined batch already, each in another
    order, and keeps it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return embeddings, labels
    # What tells the same batch in another order from another batch: sums modulo 2^64.
    rows = row_fingerprints(torch.cat([embeddings, labels[:, None].to(embeddings.dtype)], 1))
    summary = torch.stack([labels.new_tensor(len(labels)), rows.sum()])
    summaries = _all_gather(summary)
    if all(torch.equal(other, summary) for other in summaries):
        return embeddings, labels
    sizes = [int(size) for size, _ in summaries]
    padding = max(sizes) - len(labels)
    all_embeddings = _all_gather(torch.nn.functional.pad(embeddings, (0, 0, 0, padding)))
    all_labels = _all_gather(torch.nn.functional.pad(labels, (0, padding)))
    return (
        torch.cat([x[:size] for x, size in zip(all_embeddings, sizes, strict=True)]),
        torch.cat([y[:size] for y, size in zip(all_labels, sizes, strict=True)]),
    )


def _all_gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered
