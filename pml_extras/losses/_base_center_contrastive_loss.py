"""What CenterContrastiveLoss and its sharded sibling share."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction, WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from .. import _checks
from .._component import (
    AccumulatorsMixin,
    HyperparametersMixin,
    element_losses,
    is_training_step,
)


class BaseCenterContrastiveLoss(
    HyperparametersMixin, AccumulatorsMixin, WeightRegularizerMixin, BaseMetricLossFunction, ABC
):
    """Hyperparameters and the steps of a forward pass. A subclass makes and moves the centers."""

    centers: Tensor
    class_counts: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 16.0,
        margin: float = 0.2,
        center_weight: float = 1.5,
        center_update: str = "gradient",
        momentum: float = 0.5,
        negative_classes: str = "batch",
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        num_classes = _checks.count("num_classes", num_classes)
        embedding_size = _checks.count("embedding_size", embedding_size)
        _checks.positive(scale=scale)
        _checks.non_negative(margin=margin, center_weight=center_weight)
        _checks.in_range(0, 1, momentum=momentum)
        _checks.in_half_open_range(0, 1, label_smoothing=label_smoothing)
        _checks.one_of(("gradient", "ema"), center_update=center_update)
        _checks.one_of(("all", "batch"), negative_classes=negative_classes)
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity, p=2, power=1)
        if center_update == "ema" and self.weight_regularizer is not None:
            raise ValueError('weight_regularizer needs center_update="gradient"')
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.scale = scale
        self.margin = margin
        self.center_weight = center_weight
        self.center_update = center_update
        self.momentum = momentum
        self.negative_classes = negative_classes
        self.label_smoothing = label_smoothing
        self.record("avg_center_similarity", "center_accuracy")
        self._make_centers()

    @property
    def uses_ema(self) -> bool:
        return self.center_update == "ema"

    @abstractmethod
    def _make_centers(self) -> None:
        """Set ``centers`` and, with EMA centers, ``class_counts``."""

    def update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        """Move the EMA centers of a batch's classes, as a training step does, in any mode.

        Args:
            embeddings: (N, D), any floating dtype and scale.
            labels: (N,) integers in [0, C).

        Raises:
            ValueError: for other arguments, or with ``center_update="gradient"``.
        """
        _checks.require(self.uses_ema, "center_update", 'be "ema" to update', self.center_update)
        sizes = self.embedding_size, self.num_classes
        self._update_centers(embeddings, _checks.class_batch(embeddings, labels, *sizes))

    @abstractmethod
    def _update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        """Update the EMA centers of the classes of a checked batch, (N, D) and (N,)."""

    @abstractmethod
    def _sample_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(N,), before sample weights."""

    @abstractmethod
    def _set_stats(self, embeddings: Tensor, labels: Tensor) -> None:
        """Set the statistics for the log."""

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, dict[str, Any]]:
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        _checks.embeddings(embeddings, self.embedding_size)
        labels = labels.long()
        updates_centers = self.uses_ema and is_training_step(self)
        if len(embeddings) == 0:
            if updates_centers:  # other processes wait for this one
                self._update_centers(embeddings, labels)
            return self.zero_losses()
        # Before any state changes, because a wrong tuple raises here.
        dtype = torch.promote_types(embeddings.dtype, self.centers.dtype)
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=dtype)
        if updates_centers:
            self._update_centers(embeddings, labels)
        losses = self._sample_losses(embeddings, labels) * weights
        if self.collect_stats:
            self._set_stats(embeddings, labels)
        loss_dict = {"loss": element_losses(losses)}
        self.add_weight_regularization_to_loss_dict(loss_dict, self.centers)
        return loss_dict

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
