"""PML's loss wrappers that accept losses by name, with ours on their lists."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning import losses
from torch import Tensor

from .. import _checks
from .._component import ExtraStateMixin, is_training_step


class CrossBatchMemory(ExtraStateMixin, losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory`` with support for :class:`ContextualLoss`.

    Neighbors are then found among the embeddings in the memory. It differs from PML's class in what
    enters the memory, and in what is checked and saved:

    - In eval mode and under ``torch.no_grad()``, the batch is compared with the memory as in
      training, but does not enter it. PML's class enqueues validation batches too.
    - Embeddings that are not finite do not enter the memory. In PML's class, one of them makes all
      losses NaN until it has left the queue.
    - The position in the queue is part of the state_dict, so a resumed run continues exactly. A
      checkpoint of PML's own class has no position: load it with ``strict=False``.

    Raises:
        ValueError: before anything changes, for embeddings that are not (N, ``embedding_size``)
            floating-point numbers, for labels that are not (N,) integers, for an empty batch, and
            for more embeddings than fit into the memory.

    Source: PML's class, arXiv 1912.06798. What differs is ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ContextualLoss, CrossBatchMemory
        >>> loss_func = CrossBatchMemory(ContextualLoss(), embedding_size=8, memory_size=64)
        >>> loss = loss_func(torch.randn(32, 8), torch.arange(32) // 4)
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), "ContextualLoss"]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        self._check_batch(embeddings, labels, enqueue_mask)
        entering = torch.ones_like(labels, dtype=torch.bool)
        if enqueue_mask is not None:
            entering = enqueue_mask.to(labels.device)
        is_finite = embeddings.detach().isfinite().all(1).to(labels.device)
        if is_training_step(self) and (is_finite | ~entering).all():
            return super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        with self._restored_memory():
            loss: Tensor = super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        if is_training_step(self):
            rows = entering & is_finite
            self.embedding_memory = self.embedding_memory.to(embeddings)
            self.label_memory = self.label_memory.to(embeddings.device, labels.dtype)
            labels = labels[rows].to(embeddings.device)
            self.add_to_memory(embeddings[rows.to(embeddings.device)], labels, len(labels))
        return loss

    @contextmanager
    def _restored_memory(self) -> Iterator[None]:
        """Restores the memory afterwards: PML compares a batch with it by enqueuing it first."""
        memory = self.embedding_memory, self.label_memory
        position = self.queue_idx, self.has_been_filled
        self.embedding_memory, self.label_memory = (buffer.clone() for buffer in memory)
        try:
            yield
        finally:
            self.embedding_memory, self.label_memory = memory
            self.queue_idx, self.has_been_filled = position

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        if batch_size > 0:  # PML would take the memory for full
            super().add_to_memory(embeddings, labels, batch_size)

    def _check_batch(
        self, embeddings: Tensor, labels: Tensor | None, enqueue_mask: Tensor | None
    ) -> None:
        _checks.embeddings(embeddings, self.embedding_size)
        _checks.integer_labels(labels, len(embeddings))
        _checks.require(len(embeddings) > 0, "embeddings", "have at least one row", 0)
        if enqueue_mask is not None and enqueue_mask.shape != embeddings.shape[:1]:
            shape = tuple(enqueue_mask.shape)
            raise ValueError(f"enqueue_mask must have shape ({len(embeddings)},), got {shape}")
        count = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if count > self.memory_size:
            raise ValueError(f"a batch of {count} does not fit into memory_size={self.memory_size}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "embedding_memory")
        if isinstance(saved, Tensor):  # the memory has the dtype of the embeddings in it
            self.embedding_memory = self.embedding_memory.to(saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_state(self) -> dict[str, Tensor]:
        state = {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}
        return {name: torch.tensor(value) for name, value in state.items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.queue_idx = int(state.get("queue_idx", self.queue_idx))
        self.has_been_filled = bool(state.get("has_been_filled", self.has_been_filled))


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """PML's ``SelfSupervisedLoss`` with support for :class:`ContextualLoss`.

    Every sample and its augmentation form a class of two: use ``num_neighbors=2``, or 1 with
    ``symmetric=False``, where the references contain only one of the two.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ContextualLoss, SelfSupervisedLoss
        >>> loss_func = SelfSupervisedLoss(ContextualLoss(num_neighbors=2))
        >>> loss = loss_func(torch.randn(32, 8), torch.randn(32, 8))
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.SelfSupervisedLoss.supported_losses(), "ContextualLoss"]
