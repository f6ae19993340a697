from typing import Any

from torch import Tensor, nn

from .distances import BaseDistance
from .utils.module_with_records import ModuleWithRecords

class BaseMetricLossFunction(ModuleWithRecords):
    distance: BaseDistance
    def __init__(self, **kwargs: Any) -> None: ...
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor: ...
    def zero_losses(self) -> dict[str, dict[str, Any]]: ...

class WeightRegularizerMixin:
    weight_regularizer: nn.Module | None
    def weight_init_func(self, weights: Tensor) -> None: ...
    def add_weight_regularization_to_loss_dict(
        self, loss_dict: dict[str, dict[str, Any]], weights: Tensor
    ) -> None: ...

class BaseLossWrapper(nn.Module):
    def __init__(self, loss: nn.Module, **kwargs: Any) -> None: ...
    @classmethod
    def check_loss_support(cls, loss_name: str) -> None: ...

class CrossBatchMemory(BaseLossWrapper):
    embedding_size: int
    memory_size: int
    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: int
    has_been_filled: bool
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor: ...
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None: ...
    @staticmethod
    def supported_losses() -> list[str]: ...

class SelfSupervisedLoss(BaseLossWrapper):
    @staticmethod
    def supported_losses() -> list[str]: ...
