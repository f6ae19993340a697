"""Center Contrastive Loss (arXiv 2308.00458)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction, WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from .._component import (
    HyperparametersMixin,
    OptimizerReminder,
    check_class_labels,
    check_count,
    check_embeddings,
    require,
)
from .._distributed import joined_batch
from ..functional import center_contrastive_loss, moving_class_means, pairwise_cosine


class CenterContrastiveLoss(HyperparametersMixin, WeightRegularizerMixin, BaseMetricLossFunction):
    r"""Contrasts each embedding with one center a class, and pulls it to its own.

    .. math:: \ell_i = -\log\frac{e^{s(\cos_{iy_i} - m)}}
        {e^{s(\cos_{iy_i} - m)} + \sum_{j \ne y_i} e^{s\cos_{ij}}} + \lambda\,|x_i - c_{y_i}|^2

    The bank of centers moves in one of two ways:

    - ``center_update="gradient"``: ``centers`` is a Parameter. **Give it to an optimizer**, or it
      never moves; in PML's trainers the optimizer's key is ``metric_loss_optimizer``. (A warning
      comes after 100 steps of gradients without a move.) Its learning rate decides a lot: after
      three epochs on Omniglot, precision@1 on unseen classes was .409 at 0.01, and .457 at 0.1 and
      at 1 (Adam, one seed). Use no weight decay: the loss does not see the centers' lengths, so
      decay only shrinks them and speeds their turning up. Under PML's DistributedLossWrapper their
      gradient comes out multiplied by the number of processes, as that of all PML's proxies: divide
      the learning rate of an optimizer that is not scale-free.
    - ``center_update="ema"``: ``centers`` is a buffer, and before each comparison a class's
      center becomes the normalised moving average of its embeddings. No optimizer is needed. A
      class takes part once it has been seen. In eval mode the bank stands still. Under
      torch.distributed the averages are over the batches of all processes, any of which may be
      empty, and the banks are equal to the last bit; all processes must call the loss, in training,
      as often. The averages are taken in float64, which some devices (MPS) have not.

    Args:
        num_classes: C >= 1; labels lie in [0, C).
        embedding_size: D >= 1.
        scale: s > 0, the inverse temperature.
        margin: m >= 0, in units of cosine similarity.
        center_weight: :math:`\lambda` >= 0.
        center_update: "gradient" or "ema".
        momentum: in [0, 1], how much of a center "ema" mode keeps at each batch of its class.
        label_smoothing: in [0, 1), the share of the target that goes to all classes alike.
        **kwargs: PML's ``reducer``, ``embedding_regularizer``, ``weight_regularizer`` (on the
            centers, "gradient" mode only), ``weight_init_func``, ``collect_stats``. For class
            weights use PML's ``ClassWeightedReducer``.

    Attributes:
        centers: (C, D), of any length; only their directions count.
        class_counts: (C,) int64, in "ema" mode: how many embeddings each class has had.

    Default distance: ``CosineSimilarity()``, the only one. Default reducer: ``MeanReducer``.
    Reducer input: **loss**, an element a sample. Tuples from a miner weight the samples. Statistics
    for the log: ``avg_center_similarity`` (to the own center) and ``center_accuracy`` (share of
    samples nearest to their own center).

    Raises:
        ValueError: for a label outside [0, C) (labels on a GPU are left to its own check),
            embeddings of another size, ``ref_emb``, or a setting out of range.

    Source: arXiv 2308.00458, whose body was not available to us. The equation is its Equation (5)
    as three independent re-implementations state it, plus a constant; the defaults of s, m and
    :math:`\lambda` are inferred from those too. Of the two readings of "updated in real time",
    "gradient" is theirs. Label smoothing is ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import CenterContrastiveLoss
        >>> loss_func = CenterContrastiveLoss(num_classes=10, embedding_size=8)
        >>> optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
        >>> loss = loss_func(torch.randn(32, 8), torch.randint(10, (32,)))
        >>> loss.backward()
        >>> optimizer.step()
    """

    hyperparameters = (
        "num_classes",
        "embedding_size",
        "scale",
        "margin",
        "center_weight",
        "center_update",
        "momentum",
        "label_smoothing",
    )

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
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_count("num_classes", num_classes)
        check_count("embedding_size", embedding_size)
        require(0 < scale < math.inf, "scale", "be positive and finite", scale)
        require(0 <= margin < math.inf, "margin", "lie in [0, inf)", margin)
        require(0 <= center_weight < math.inf, "center_weight", "lie in [0, inf)", center_weight)
        require(0 <= momentum <= 1, "momentum", "lie in [0, 1]", momentum)
        require(0 <= label_smoothing < 1, "label_smoothing", "lie in [0, 1)", label_smoothing)
        require(
            center_update in ("gradient", "ema"),
            "center_update",
            'be "gradient" or "ema"',
            center_update,
        )
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity, p=2, power=1)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.scale = scale
        self.margin = margin
        self.center_weight = center_weight
        self.center_update = center_update
        self.momentum = momentum
        self.label_smoothing = label_smoothing
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters))
        self.add_to_recordable_attributes(
            list_of_names=["avg_center_similarity", "center_accuracy"], is_stat=True
        )
        if center_update == "ema" and self.weight_regularizer is not None:
            raise ValueError('weight_regularizer needs center_update="gradient"')
        self.make_bank()

    def make_bank(self) -> None:
        """Set ``centers`` and, in "ema" mode, ``class_counts``."""
        centers = torch.zeros(self.num_classes, self.embedding_size)
        if self.center_update == "gradient":
            self.centers = torch.nn.Parameter(centers)
            self.weight_init_func(self.centers)
            self._optimizer_reminder = OptimizerReminder("the centers", type(self).__name__)
        else:
            self.register_buffer("centers", centers)
            self.register_buffer("class_counts", torch.zeros(self.num_classes, dtype=torch.long))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        check_class_labels(labels, self.num_classes)
        if self.training and self.center_update == "gradient":
            self._optimizer_reminder.check(self.centers)
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, dict[str, Any]]:
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        check_embeddings(embeddings, self.embedding_size)
        labels = labels.long()
        uses_ema = self.training and self.center_update == "ema"
        if len(embeddings) == 0:
            if uses_ema:  # the other processes wait for this one's share
                self.update_centers(embeddings, labels)
            return self.zero_losses()
        # Before any state moves, because a wrong tuple raises here.
        dtype = torch.promote_types(embeddings.dtype, self.centers.dtype)
        weights = self.sample_weights(indices_tuple, labels, dtype)
        if uses_ema:
            self.update_centers(embeddings, labels)
        losses = self.sample_losses(embeddings, labels)
        if self.collect_stats:
            self.set_stats(embeddings, labels)
        loss_dict = {
            "loss": {
                "losses": losses * weights,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(loss_dict, self.centers)
        return loss_dict

    def sample_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(N,), before weights."""
        return center_contrastive_loss(
            embeddings,
            self.centers,
            labels,
            self.scale,
            self.margin,
            self.center_weight,
            self.label_smoothing,
            seen=self.seen_classes(),
        )

    def sample_weights(
        self, indices_tuple: tuple[Tensor, ...] | None, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """(N,), in [0, 1]: how often a miner's tuple has each sample."""
        return lmu.convert_to_weights(indices_tuple, labels, dtype=dtype)

    @torch.no_grad()
    def update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        """Move the centers of the batch's classes, as "ema" mode does at each forward."""
        embeddings, labels = joined_batch(embeddings.to(self.centers.dtype), labels)
        unit = torch.nn.functional.normalize(embeddings)
        self.centers[labels], self.class_counts[labels] = moving_class_means(
            self.centers, self.class_counts, unit, labels, self.momentum, normalize=True
        )

    def seen_classes(self) -> Tensor | None:
        """(C,) bool, which classes have a center yet; None if all have."""
        return self.class_counts > 0 if self.center_update == "ema" else None

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) logits without margin: the scaled cosine similarities; -inf for unseen classes."""
        logits = self.scale * pairwise_cosine(embeddings, self.centers)
        seen = self.seen_classes()
        return logits if seen is None else logits.masked_fill(~seen, float("-inf"))

    @torch.no_grad()
    def set_stats(self, embeddings: Tensor, labels: Tensor) -> None:
        logits = self.get_logits(embeddings)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        self.avg_center_similarity = own.clamp_min(-self.scale).mean().item() / self.scale
        self.center_accuracy = (logits.argmax(1) == labels).float().mean().item()

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
