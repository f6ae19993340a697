"""Batches that are spread over processes, for state that must be the same in all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .functional._collectives import gather_rows
from .functional.copies import row_fingerprints


def joined_batch(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings, (N, D), and labels, (N,), of all processes; one's own where there is one.

    Under PML's DistributedLossWrapper every process has the joined batch already, each in another
    order, and keeps it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return embeddings, labels
    # What tells the same batch in another order from another batch.
    summary = torch.stack([labels.new_tensor(len(labels)), batch_fingerprint(embeddings, labels)])
    summaries = gather_rows(summary[None], [1] * dist.get_world_size())
    if (summaries == summary).all():
        return embeddings, labels
    sizes = summaries[:, 0].tolist()
    return gather_rows(embeddings.detach(), sizes), gather_rows(labels, sizes)


def batch_fingerprint(embeddings: Tensor, labels: Tensor) -> Tensor:
    """(), int64: a hash of the bits of a batch, whatever the order of its rows."""
    rows = torch.cat([embeddings.detach(), labels[:, None].to(embeddings.dtype)], 1)
    return row_fingerprints(rows).sum()  # modulo 2^64
