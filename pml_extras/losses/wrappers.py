"""PML's loss wrappers that accept losses by name, with ours on their lists."""

from typing import Any

from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor


class CrossBatchMemory(losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory`` with support for :class:`ContextualLoss`.

    Neighbors are then found among the embeddings in the memory. The position in the queue is part
    of the state_dict, so a resumed run continues exactly. A checkpoint of PML's own class has no
    position: load it with ``strict=False``.

    Source: PML's class, arXiv 1912.06798; saving the position is ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ContextualLoss, CrossBatchMemory
        >>> loss_func = CrossBatchMemory(ContextualLoss(), embedding_size=8, memory_size=64)
        >>> loss = loss_func(torch.randn(32, 8), torch.arange(32) // 4)
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), "ContextualLoss"]

    def forward(self, embeddings: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        c_f.labels_required(labels)
        return super().forward(embeddings, labels, *args, **kwargs)  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, Any]:
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]


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
