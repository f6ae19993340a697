"""Center Contrastive Loss (arXiv 2308.00458)."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import _checks
from .._component import OptimizerReminder, accumulator_dtype, is_training_step
from ..functional import center_contrastive_loss, moving_class_means, pairwise_cosine
from ..functional._distributed import gather_batch
from ._base_center_contrastive_loss import BaseCenterContrastiveLoss


class CenterContrastiveLoss(BaseCenterContrastiveLoss):
    r"""Learns one center per class. Contrasts embeddings with centers, and pulls each to its own.

    .. math:: \ell_i = -\log\frac{e^{s(\cos_{iy_i} - m)}}
        {e^{s(\cos_{iy_i} - m)} + \sum_{j \ne y_i} e^{s\cos_{ij}}} + \lambda\,|x_i - c_{y_i}|^2

    The centers move in one of two ways:

    - ``center_update="gradient"``: ``centers`` is a Parameter. **Give it to an optimizer**, or the
      centers never move; in PML's trainers the optimizer's key is ``metric_loss_optimizer``. (A
      warning comes after 100 training steps without a move.) The learning rate matters:
      after three epochs on Omniglot, precision@1 on unseen classes was 0.409 at 0.01, and 0.457 at
      0.1 and at 1 (Adam, one seed, ``negative_classes="all"``). Use no weight decay: only the
      directions of the centers count, so decay shrinks them and makes them turn faster. Under PML's
      DistributedLossWrapper the centers' gradient is multiplied by the number of processes, like
      that of all PML's proxies: divide the learning rate, unless the optimizer is scale-free.
    - ``center_update="ema"``: ``centers`` is a buffer. Before each comparison the centers of the
      batch's classes become the normalized exponential moving average of their embeddings. No
      optimizer is needed. A class takes part in the softmax once it has been seen. In eval mode and
      under ``torch.no_grad()`` the centers do not move; :meth:`update_centers` moves them in any
      case. Under torch.distributed the averages are over the batches of all processes, which may be
      empty, and the centers stay equal bit by bit; all processes must call the loss in training,
      equally often. The averages are computed in float64, which some devices (MPS) do not support.
      They are kept in float32 or wider, also if the module is cast to half precision.

    Args:
        num_classes: C >= 1; labels lie in [0, C).
        embedding_size: D >= 1.
        scale: s > 0, the inverse temperature.
        margin: m >= 0, in units of cosine similarity.
        center_weight: :math:`\lambda` >= 0.
        center_update: "gradient" or "ema".
        momentum: in [0, 1], how much of an EMA center is kept at each batch of its class.
        negative_classes: the classes j of the sum: "all", or "batch" for those of the batch, as in
            pair losses. With "batch" there are N x N logits instead of N x C. Under PML's
            DistributedLossWrapper the batch is that of all processes.
        label_smoothing: in [0, 1), the fraction of the target that is spread over these classes.
        **kwargs: PML's ``reducer``, ``embedding_regularizer``, ``weight_regularizer`` (on the
            centers, "gradient" mode only), ``weight_init_func``, ``collect_stats``. For class
            weights use PML's ``ClassWeightedReducer``.

    Attributes:
        centers: (C, D), of any length; only their directions count.
        class_counts: (C,) int64, in "ema" mode: how many embeddings are in each center.

    Default distance: ``CosineSimilarity()``, the only one. Default reducer: ``MeanReducer``.
    Reducer input: **loss**, one element per sample. Tuples from a miner weight the samples.
    Statistics for the log: ``avg_center_similarity`` (to the sample's own center, -1 if it has
    none) and ``center_accuracy`` (fraction of samples that are nearest to their own center). They
    need all (N, C) logits, whatever ``negative_classes`` is.

    Raises:
        ValueError: for a label outside [0, C) (labels on a GPU are left to the GPU's own check),
            embeddings of another size, ``ref_emb``, or a hyperparameter out of range.

    Source: arXiv 2308.00458, whose body was not available to us. The equation is its Equation (5)
    as three independent re-implementations state it, plus a constant; the defaults of s, m and
    :math:`\lambda` are inferred from those too. The abstract's "updated in real time" has two
    readings; "gradient" is that of the re-implementations. Label smoothing and
    ``negative_classes="batch"`` are ours.

    Example:
        >>> import torch
        >>> from pml_extras.losses import CenterContrastiveLoss
        >>> loss_func = CenterContrastiveLoss(num_classes=10, embedding_size=8)
        >>> optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
        >>> loss = loss_func(torch.randn(32, 8), torch.randint(10, (32,)))
        >>> loss.backward()
        >>> optimizer.step()
    """

    def _make_centers(self) -> None:
        shape = self.num_classes, self.embedding_size
        if self.uses_ema:
            centers = torch.zeros(*shape, dtype=accumulator_dtype())
            self.register_buffer("centers", centers)
            self.register_buffer("class_counts", torch.zeros(self.num_classes, dtype=torch.long))
        else:
            self.centers = torch.nn.Parameter(torch.zeros(*shape))
            self.weight_init_func(self.centers)
            self._optimizer_reminder = OptimizerReminder()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        _checks.class_labels(labels, self.num_classes)
        needs_optimizer = not self.uses_ema and is_training_step(self)
        if needs_optimizer and self._optimizer_reminder.is_due(self.centers):
            warnings.warn(
                f"the centers of {type(self).__name__} have not moved in 100 training steps:"
                " give loss.parameters() to an optimizer, whose key in PML's trainers is"
                ' "metric_loss_optimizer"',
                stacklevel=4,
            )
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def _sample_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        centers, class_mask = self.centers, self.class_counts > 0 if self.uses_ema else None
        if self.negative_classes == "batch":
            # One row per sample, of which the first of each class counts. A list of the classes
            # would be shorter, but its length would make the host wait for a GPU.
            centers = centers.index_select(0, labels)
            first = (labels[:, None] == labels).to(torch.uint8).argmax(1)  # of the sample's class
            is_first = first == torch.arange(len(labels), device=labels.device)
            class_mask = is_first if class_mask is None else is_first & class_mask[labels]
            labels = first
        return center_contrastive_loss(
            embeddings,
            centers,
            labels,
            scale=self.scale,
            margin=self.margin,
            center_weight=self.center_weight,
            label_smoothing=self.label_smoothing,
            class_mask=class_mask,
        )

    @torch.no_grad()
    def _update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        embeddings, labels = gather_batch(embeddings.to(self.centers.dtype), labels)
        self.centers[labels], self.class_counts[labels] = moving_class_means(
            self.centers,
            self.class_counts,
            normalize(embeddings),
            labels,
            momentum=self.momentum,
            normalize=True,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_classes(self, number: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add classes after the existing ones, which keep their centers and counts.

        New centers are drawn by ``weight_init_func``. New EMA centers are set by the first batch of
        their class.

        Args:
            number: how many, >= 1.
            optimizer: the optimizer of the centers, if they have one. ``centers`` is a new
                Parameter, which takes the place of the old one in the optimizer. Its state of the
                existing centers stays, and that of the new ones is 0. Without this argument, make a
                new optimizer; in any case, wrap the loss in DistributedDataParallel again.

        Raises:
            ValueError: for an optimizer that does not have the centers, or has a state of them that
                is not one number per number of the centers. Nothing changes then.
        """
        number = _checks.count("number", number)
        if self.uses_ema:
            self.class_counts = _with_zero_rows(self.class_counts, number)
            self.centers = _with_zero_rows(self.centers, number)
        else:
            new_centers = self.centers.new_empty(number, self.embedding_size)
            self.weight_init_func(new_centers)
            centers = torch.nn.Parameter(
                torch.cat([self.centers, new_centers]), self.centers.requires_grad
            )
            if optimizer is not None:
                _replace_in_optimizer(optimizer, self.centers, centers)
            self.centers = centers
            self._optimizer_reminder = OptimizerReminder()
        self.num_classes += number

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) logits without margin: the scaled cosine similarities; -inf for unseen classes."""
        logits = self.scale * pairwise_cosine(embeddings, self.centers)
        return logits.masked_fill(self.class_counts == 0, -torch.inf) if self.uses_ema else logits

    @torch.no_grad()
    def _set_stats(self, embeddings: Tensor, labels: Tensor) -> None:
        cosines = self.get_logits(embeddings) / self.scale
        target = cosines.gather(1, labels[:, None]).squeeze(1)
        self.avg_center_similarity = target.clamp_min(-1).mean().item()
        self.center_accuracy = (cosines.argmax(1) == labels).float().mean().item()


def _replace_in_optimizer(
    optimizer: torch.optim.Optimizer, old: Tensor, new: torch.nn.Parameter
) -> None:
    """Replace a parameter by one with more rows. The optimizer's state of these is 0."""
    groups = optimizer.param_groups
    if not any(parameter is old for group in groups for parameter in group["params"]):
        raise ValueError("the optimizer does not have the centers of this loss")
    state = dict(optimizer.state.get(old, {}))
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            if value.shape != old.shape:
                raise ValueError(
                    f"the optimizer's state {name} has shape {tuple(value.shape)}, and not"
                    f" that of the centers, {tuple(old.shape)}"
                )
            state[name] = _with_zero_rows(value, len(new) - len(old))
    for group in groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if optimizer.state.pop(old, None) is not None:
        optimizer.state[new] = state


def _with_zero_rows(tensor: Tensor, number: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(number, *tensor.shape[1:])])
