"""Center Contrastive Loss with its centers sharded over the ranks of torch.distributed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor
from torch.nn.functional import normalize

from .. import _checks
from .._component import accumulator_dtype
from ..functional import (
    moving_class_means,
    pairwise_cosine,
    sharded_center_contrastive_loss,
)
from ..functional._distributed import all_reduce, batch_hash, gather_rows
from ..functional._sharded_center_contrastive import find_local_classes
from ._base_center_contrastive_loss import BaseCenterContrastiveLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedCenterContrastiveLoss(BaseCenterContrastiveLoss):
    r""":class:`CenterContrastiveLoss` for more classes than one device can hold.

    Each rank of a ``torch.distributed`` process group holds the centers of C / world classes and
    their optimizer state. The softmax is exact, over the classes of the whole batch or over all
    classes: loss, gradients and centers equal those of one process that has all centers and the
    batches of all ranks.

    - **Start one process per device** (``torchrun``), call ``init_process_group``, then create this
      loss in every process.
    - **Give it this rank's part of the batch**, as a ``DistributedSampler`` draws it. The parts may
      differ in size, and some may be empty. The loss gathers them itself: inside PML's
      ``DistributedLossWrapper``, efficient or not, it raises.
    - It returns the loss of the whole batch, **the same on all ranks**. All ranks call it, and call
      ``backward``, together.
    - **Wrap the network in DistributedDataParallel, not this loss.** The gradient of the embeddings
      is that of the whole batch's loss times the number of ranks, because DistributedDataParallel
      divides by it. The gradient of the centers is not multiplied: a learning rate means the same
      as in one process.
    - Give ``loss.parameters()`` to an optimizer or a parameter group of their own, as in one
      process. Unlike CenterContrastiveLoss, this loss does not warn if you forget.

    ``centers`` and ``class_counts`` are of type ``DTensor``, sharded over the classes. Save them
    and their optimizer with ``torch.distributed.checkpoint`` (``get_state_dict``, ``save``,
    ``load``, ``set_state_dict``), and load them with any number of ranks, or into a
    :class:`CenterContrastiveLoss`; ``examples/sharded_centers.py`` shows how. To exchange whole
    state dicts with a :class:`CenterContrastiveLoss`, use ``get_model_state_dict`` and
    ``set_model_state_dict`` with ``StateDictOptions(full_state_dict=True)``.

    Args:
        num_classes: C >= 1, of all ranks together. Each rank has :math:`\lceil C / world\rceil`
            classes, the last ones fewer or none.
        embedding_size: D >= 1.
        device_mesh: a ``DeviceMesh`` of one dimension, whose ranks share the classes. To make one
            from a process group: ``DeviceMesh.from_group(group, "cuda")``. The centers and the
            embeddings are on its device. Default: all ranks, on the GPU if the backend is NCCL.
        **kwargs: the other arguments of :class:`CenterContrastiveLoss`, except
            ``weight_regularizer``, which cannot be computed on a part of the centers.
            ``weight_init_func`` is called with each rank's centers. Its random numbers differ
            between the ranks and follow from the seed of the first rank.

    Attributes:
        centers: (C, D) DTensor; ``centers.to_local()`` is this rank's part.
        class_counts: (C,) int64 DTensor, in "ema" mode.
        first_class: the index of this rank's first class.

    Default distance, default reducer, reducer input and statistics: as
    :class:`CenterContrastiveLoss`, of the whole batch. The statistics need its logits with all of
    this rank's classes. A tuple from a miner numbers the samples as ``DistributedMinerWrapper``
    does, this rank's first, and the tuples of all ranks are summed; so a tuple from a miner that
    saw only its own rank's part works too.

    Raises:
        RuntimeError: if no process group is initialized.
        ValueError: as :class:`CenterContrastiveLoss`, for ``weight_regularizer``, for a batch that
            is the same on all ranks, and for modes that differ between ranks. An input that is
            wrong on one rank raises on all ranks, before any state changes, so that none waits for
            the others. (The checks make the host wait for a GPU in each step.)

    Source: that of :class:`CenterContrastiveLoss`; sharding the classes is ours.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from pml_extras.losses import ShardedCenterContrastiveLoss
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> loss_func = ShardedCenterContrastiveLoss(num_classes=10, embedding_size=8)
        >>> optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
        >>> loss = loss_func(torch.randn(32, 8), torch.randint(10, (32,)))
        >>> loss.backward()
        >>> optimizer.step()
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        device_mesh: DeviceMesh | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **kwargs)
        if self.weight_regularizer is not None:
            raise ValueError("weight_regularizer is not supported with sharded centers")
        self.device_mesh = _default_mesh() if device_mesh is None else device_mesh
        if self.device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh must have one dimension, got shape {tuple(self.device_mesh.shape)}"
            )
        self._shard_centers()

    def _make_centers(self) -> None:
        """Nothing yet: ``_shard_centers`` makes them once the device mesh is known."""

    def _shard_centers(self) -> None:
        from torch.distributed.tensor import Shard, zeros  # some builds of torch lack it

        sharded: Any = {"device_mesh": self.device_mesh, "placements": [Shard(0)]}
        shape = self.num_classes, self.embedding_size
        if self.uses_ema:
            centers = zeros(*shape, dtype=accumulator_dtype(), **sharded)
            counts = zeros(self.num_classes, dtype=torch.long, **sharded)
            self.register_buffer("centers", centers)
            self.register_buffer("class_counts", counts)
        else:
            self.centers = torch.nn.Parameter(zeros(*shape, **sharded))
            self._init_centers()

    @torch.no_grad()
    def _init_centers(self) -> None:
        """Draw this rank's centers, different on each rank even if all ranks have one seed."""
        centers = _local(self.centers)
        seed = torch.randint(1 << 62, (1,)).to(centers.device)
        dist.broadcast(seed, dist.get_global_rank(self.group, 0), group=self.group)
        with torch.random.fork_rng([centers.device] if centers.is_cuda else []):
            torch.manual_seed(int(seed) + self.rank)
            if len(centers) > 0:
                self.weight_init_func(centers)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group()

    @property
    def rank(self) -> int:
        return self.device_mesh.get_local_rank()

    @property
    def shard_sizes(self) -> list[int]:
        """How many classes each rank has: as ``DTensor`` and ``torch.chunk`` divide C."""
        world = self.device_mesh.size()
        largest = -(-self.num_classes // world)
        return [min(largest, max(0, self.num_classes - rank * largest)) for rank in range(world)]

    @property
    def first_class(self) -> int:
        return sum(self.shard_sizes[: self.rank])

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        headers = self._gather_headers(
            lambda: self._batch_header(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        )
        assert labels is not None  # or this rank would have raised
        sizes = [header.num_rows for header in headers]
        same_batch = len({(header.num_rows, header.batch_hash) for header in headers}) == 1
        if len(headers) > 1 and same_batch and sizes[0] > 0:
            raise ValueError(
                "all ranks have the same batch: give each rank its own part, and use no"
                " DistributedLossWrapper, because this loss gathers the parts itself"
            )
        # From here on, every rank computes the same on the whole batch, in the order of the ranks.
        embeddings = self._gather(embeddings, headers)
        labels = gather_rows(labels.to(embeddings.device).long(), sizes, self.group)
        if indices_tuple is not None:
            indices_tuple = _whole_batch_tuple(headers, embeddings.device)
        return super().forward(embeddings, labels, indices_tuple)

    def _sample_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        centers, first_class = _local(self.centers), self.first_class
        class_mask = _local(self.class_counts) > 0 if self.uses_ema else None
        if self.negative_classes == "batch":
            # The classes of the batch, numbered from 0. Those of a rank still follow each other.
            classes, labels = torch.unique(labels, return_inverse=True)
            is_local, local_classes = find_local_classes(classes, first_class, len(centers))
            first_class = int((classes < first_class).sum())
            centers = centers.index_select(0, local_classes[is_local])
            class_mask = None if class_mask is None else class_mask[local_classes[is_local]]
        return sharded_center_contrastive_loss(
            embeddings,
            centers,
            labels,
            first_class,
            scale=self.scale,
            margin=self.margin,
            center_weight=self.center_weight,
            label_smoothing=self.label_smoothing,
            class_mask=class_mask,
            group=self.group,
        )

    def update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        """As in :class:`CenterContrastiveLoss`, with each rank's part of the batch."""
        _checks.require(self.uses_ema, "center_update", 'be "ema" to update', self.center_update)
        headers = self._gather_headers(lambda: self._batch_header(embeddings, labels))
        sizes = [header.num_rows for header in headers]
        labels = gather_rows(labels.to(embeddings.device).long(), sizes, self.group)
        self._update_centers(self._gather(embeddings, headers), labels)

    @torch.no_grad()
    def _update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        centers, counts = _local(self.centers), _local(self.class_counts)
        is_local, local_labels = find_local_classes(labels, self.first_class, len(centers))
        local_labels = local_labels[is_local]
        centers[local_labels], counts[local_labels] = moving_class_means(
            centers,
            counts,
            normalize(embeddings[is_local].to(centers.dtype)),
            local_labels,
            momentum=self.momentum,
            normalize=True,
        )

    @torch.no_grad()
    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N_r, C) logits without margin of this rank's rows; -inf for unseen classes.

        All ranks call it together. It has no gradient, and on each rank it takes the memory of the
        logits of all ranks' rows with all classes.
        """
        headers = self._gather_headers(lambda: self._rows_header(embeddings))
        logits = self.scale * self._cosines(self._gather(embeddings, headers))
        all_logits = gather_rows(logits.T, self.shard_sizes, self.group).T
        return all_logits.split_with_sizes([header.num_rows for header in headers])[self.rank]

    def _cosines(self, embeddings: Tensor) -> Tensor:
        """(N, C_r), with this rank's centers; -inf for unseen classes."""
        cosines = pairwise_cosine(embeddings, _local(self.centers))
        if not self.uses_ema:
            return cosines
        return cosines.masked_fill(_local(self.class_counts) == 0, -torch.inf)

    @torch.no_grad()
    def _set_stats(self, embeddings: Tensor, labels: Tensor) -> None:
        cosines = self._cosines(embeddings)
        is_local, local_labels = find_local_classes(labels, self.first_class, cosines.shape[1])
        if cosines.shape[1] == 0:  # a class that is nobody's nearest
            cosines = cosines.new_full((len(labels), 1), -torch.inf)
        target = cosines.gather(1, local_labels[:, None]).squeeze(1)
        target = torch.where(is_local, target, -torch.inf)
        largest, nearest = cosines.max(1)
        # The nearest center of all ranks; of equally near ones, the lowest class.
        is_nearest = largest == all_reduce(largest, "max", self.group)
        nearest = torch.where(is_nearest, nearest + self.first_class, self.num_classes)
        nearest = all_reduce(nearest, "min", self.group)
        target = all_reduce(target, "max", self.group).clamp_min(-1)
        self.avg_center_similarity = target.mean().item()
        self.center_accuracy = (nearest == labels).float().mean().item()

    # ---- Before its collectives, a forward pass compares the ranks' inputs.

    def _gather_headers(self, make_header: Callable[[], RankHeader]) -> list[RankHeader]:
        """The results of ``make_header`` on all ranks. If one rank raises, all ranks raise."""
        error, header = None, None
        try:
            header = make_header()
        except Exception as e:  # of any kind, because the other ranks are waiting
            error = e
        headers: list[Any] = [None] * self.device_mesh.size()
        dist.all_gather_object(headers, header or str(error), group=self.group)
        if error is not None:
            raise error
        messages = [f"rank {rank}: {h}" for rank, h in enumerate(headers) if isinstance(h, str)]
        if messages:
            raise ValueError("; ".join(messages))
        for mode in headers[0].modes:
            values = [header.modes.get(mode) for header in headers]
            if len(set(values)) > 1:
                raise ValueError(f"{mode} must be the same on all ranks, got {values}")
        return headers

    def _batch_header(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> RankHeader:
        # Check labels on a GPU too: one that is too large would count as another rank's.
        labels = _checks.class_labels(None if labels is None else labels.cpu(), self.num_classes)
        c_f.check_shapes(embeddings, labels)
        if ref_emb is not None or ref_labels is not None:
            raise ValueError("ref_emb is not supported for this loss function")
        header = self._rows_header(embeddings, has_indices_tuple=indices_tuple is not None)
        return header._replace(
            batch_hash=int(batch_hash(embeddings, labels.to(embeddings.device))),
            indices=tuple(i.cpu() for i in indices_tuple or ()),
        )

    def _rows_header(self, embeddings: Tensor, has_indices_tuple: bool = False) -> RankHeader:
        _checks.embeddings(embeddings, self.embedding_size)
        if embeddings.device.type != self.device_mesh.device_type:
            raise ValueError(
                f"embeddings must be on {self.device_mesh.device_type}, as the centers are,"
                f" got {embeddings.device.type}"
            )
        modes = {
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "training mode": self.training,
            "collect_stats": self.collect_stats,
            "whether there is an indices_tuple": has_indices_tuple,
        }
        return RankHeader(len(embeddings), embeddings.dtype, embeddings.requires_grad, modes)

    def _gather(self, embeddings: Tensor, headers: list[RankHeader]) -> Tensor:
        """The rows of all ranks, in their widest dtype, with gradient if any rank's have one."""
        embeddings = embeddings.to(
            functools.reduce(torch.promote_types, (header.dtype for header in headers))
        )
        needs_grad = torch.is_grad_enabled() and any(header.requires_grad for header in headers)
        if needs_grad and not embeddings.requires_grad:
            # All ranks have to take part in backward, too.
            embeddings = embeddings.detach().requires_grad_()
        return gather_rows(embeddings, [header.num_rows for header in headers], self.group)


class RankHeader(NamedTuple):
    """What a rank tells the others about its part of a batch."""

    num_rows: int
    dtype: torch.dtype
    requires_grad: bool
    modes: dict[str, bool]  # which decide what collectives follow
    batch_hash: int = 0
    indices: tuple[Tensor, ...] = ()  # of a miner, this rank's samples first


def _whole_batch_tuple(headers: list[RankHeader], device: torch.device) -> tuple[Tensor, ...]:
    """All indices of all ranks' tuples, with the samples numbered in the order of the ranks.

    Only how often each index occurs has a meaning.
    """
    sizes = [header.num_rows for header in headers]
    ranges = torch.arange(sum(sizes)).split_with_sizes(sizes)
    whole: list[Tensor] = []
    for rank, header in enumerate(headers):
        numbers = torch.cat([ranges[rank], *ranges[:rank], *ranges[rank + 1 :]])
        for indices in header.indices:
            wrong = indices[(indices < 0) | (indices >= len(numbers))]
            if len(wrong) > 0:
                raise ValueError(
                    f"indices_tuple must lie in [0, {len(numbers)}), the samples of all ranks,"
                    f" got {int(wrong[0])} on rank {rank}"
                )
            whole.append(numbers[indices].to(device))
    return tuple(whole)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``."""
    return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def _default_mesh() -> DeviceMesh:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sharded centers need a process group: start with torchrun and call"
            " torch.distributed.init_process_group() first; in one process, use"
            " CenterContrastiveLoss"
        )
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return init_device_mesh(device, (dist.get_world_size(),))
