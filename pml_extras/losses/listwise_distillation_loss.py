"""The distillation term of Listwise Self-Distillation (arXiv 2206.08880)."""

from typing import Any

from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from .. import _checks
from .._component import HyperparametersMixin, TensorLabelsMixin, element_losses
from ..functional import listwise_kl


class ListwiseDistillationLoss(HyperparametersMixin, TensorLabelsMixin, BaseMetricLossFunction):
    r"""Trains the similarity distribution of each sample to match a teacher's.

    .. math:: \ell_i = \tau^2\,\mathrm{KL}\big(\mathrm{softmax}(g_i \cdot g_j / \tau)\;\|\;
        \mathrm{softmax}(f_i \cdot f_j / \tau)\big)

    with the student's and the teacher's normalized embeddings f and g. Call it as
    ``loss(embeddings, ref_emb=teacher_embeddings)``, both of the same inputs in the same order.
    Labels are not used. :class:`pml_extras.distillation.SelfDistillation` keeps a teacher and calls
    it for you.

    Args:
        temperature: :math:`\tau` > 0, in units of cosine similarity.
        include_self: whether each sample is in its own list. False is ours.
        **kwargs: PML's ``reducer``, ``embedding_regularizer``, ``collect_stats``.

    Default distance: ``CosineSimilarity()``, the only one. Default reducer: ``MeanReducer``.
    Reducer input: **loss**, one element per sample. The teacher's embeddings may have another size.
    They get no gradient.

    Raises:
        ValueError: without ``ref_emb``, with another number of rows in it, with an
            ``indices_tuple``, or for a temperature that is not positive.

    Source: arXiv 2206.08880 and its authors' code, including the factor :math:`\tau^2`.

    Example:
        >>> import torch
        >>> from pml_extras.losses import ListwiseDistillationLoss
        >>> loss_func = ListwiseDistillationLoss(temperature=0.5)
        >>> student, teacher = torch.randn(32, 8, requires_grad=True), torch.randn(32, 16)
        >>> loss_func(student, ref_emb=teacher).backward()
    """

    def __init__(
        self, *, temperature: float = 1.0, include_self: bool = True, **kwargs: Any
    ) -> None:
        _checks.positive(temperature=temperature)
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity, p=2, power=1)
        self.temperature = temperature
        self.include_self = include_self
        self.record()

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        c_f.indices_tuple_not_supported(indices_tuple)
        if ref_emb is embeddings:
            raise ValueError("ref_emb, the teacher's embeddings of the same samples, is required")
        _checks.embeddings(embeddings)
        _checks.embeddings(ref_emb, name="ref_emb")
        if len(ref_emb) != len(embeddings):
            raise ValueError(
                "ref_emb must hold the teacher's embeddings of the same samples:"
                f" got {len(ref_emb)} rows for {len(embeddings)} embeddings"
            )
        if len(embeddings) == 0:
            return self.zero_losses()
        divergences = listwise_kl(
            embeddings, ref_emb, temperature=self.temperature, include_self=self.include_self
        )
        return {"loss": element_losses(self.temperature**2 * divergences)}

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
