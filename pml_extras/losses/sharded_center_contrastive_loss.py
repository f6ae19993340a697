"""Center Contrastive Loss with its centers spread over the ranks of torch.distributed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from .._component import check_class_labels, check_embeddings
from .._distributed import batch_fingerprint
from ..functional import (
    moving_class_means,
    pairwise_cosine,
    sharded_center_contrastive_loss,
)
from ..functional._collectives import all_reduced, gather_rows
from ..functional._parts import parts
from .center_contrastive_loss import CenterContrastiveLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How many cosines to hold at a time, for the statistics.
CHUNK = 1 << 21


class ShardedCenterContrastiveLoss(CenterContrastiveLoss):
    r""":class:`CenterContrastiveLoss` for more classes than one device holds.

    Each rank of a ``torch.distributed`` process group holds the centers of C / world classes, and
    their optimizer state. The softmax is over all classes, exactly: loss, gradients and centers are
    those of one process that has all centers and the batches of all ranks.

    - **Start one process a device** (``torchrun``), call ``init_process_group``, then make this
      loss, in all of them.
    - **Give it this rank's share of the batch**, as a ``DistributedSampler`` draws it; the shares
      may differ in size, and some may be empty. It gathers them itself: inside PML's
      ``DistributedLossWrapper``, efficient or not, it raises.
    - It returns the loss of the joined batch, **the same on all ranks**. All ranks call it, and
      call ``backward``, together.
    - **Wrap the network in DistributedDataParallel, not this loss.** The gradient of the embeddings
      is that of the joined batch's loss, times the number of ranks, for DistributedDataParallel to
      divide by. The gradient of the centers is no multiple: a learning rate is worth here what it
      is in one process.
    - Give ``loss.parameters()`` to an optimizer of their own, as in one process, or to a parameter
      group of their own. No reminder comes here if it is forgotten.

    ``centers`` and ``class_counts`` are of type ``DTensor``, in shards over the classes. Save them
    and their optimizer with ``torch.distributed.checkpoint`` (``get_state_dict``, ``save``,
    ``load``, ``set_state_dict``), and load them with any number of ranks, or into a
    :class:`CenterContrastiveLoss`; ``examples/sharded_centers.py`` shows how. To exchange whole
    state dicts with a :class:`CenterContrastiveLoss`, use ``get_model_state_dict`` and
    ``set_model_state_dict`` with ``StateDictOptions(full_state_dict=True)``.

    Args:
        num_classes: C >= 1, of all ranks together. Each rank has :math:`\lceil C / world\rceil`
            classes, the last ones fewer or none.
        device_mesh: a ``DeviceMesh`` of one dimension, whose ranks share the classes; to make one
            from a process group, ``DeviceMesh.from_group(group, "cuda")``. Its device is that of
            the centers and the embeddings. Default: all ranks, on the GPU if the backend is NCCL.
        **kwargs: all else as :class:`CenterContrastiveLoss` has it, in its order too, except that
            ``weight_regularizer`` is refused, since none is exact on a part of the centers.
            ``weight_init_func`` is given each rank's centers apart, with random numbers that differ
            between the ranks and follow from the seed of the first.

    Attributes:
        centers: (C, D) DTensor; ``centers.to_local()`` is this rank's part.
        class_counts: (C,) int64 DTensor, in "ema" mode.
        first_class: the number of this rank's first class.

    Default distance, default reducer, reducer input and statistics: as
    :class:`CenterContrastiveLoss`, of the joined batch. A tuple from a miner numbers the samples as
    ``DistributedMinerWrapper`` does, one's own first, and the tuples of all ranks count together;
    so one from a miner that saw its own rank's share alone will do as well.

    Raises:
        RuntimeError: if no process group is initialised.
        ValueError: as :class:`CenterContrastiveLoss`, for ``weight_regularizer``, for a batch that
            is the same on all ranks, and for modes in which ranks differ. An input that is wrong on
            one rank raises on all, before any state moves, so that none waits for the others.
            (To look at labels and shapes of all ranks, a GPU has to be waited for at each step.)

    Source: that of :class:`CenterContrastiveLoss`; the division of the classes among ranks is ours.

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

    def __init__(self, *args: Any, device_mesh: DeviceMesh | None = None, **kwargs: Any) -> None:
        # A plain attribute, which make_bank needs while the parent is being initialised.
        self.device_mesh = _all_ranks() if device_mesh is None else device_mesh
        if self.device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh must have one dimension, got shape {tuple(self.device_mesh.shape)}"
            )
        super().__init__(*args, **kwargs)

    def make_bank(self) -> None:
        if self.weight_regularizer is not None:
            raise ValueError("weight_regularizer is not supported with sharded centers")
        from torch.distributed.tensor import Shard, zeros  # which some builds of torch lack

        def bank(*size: int, dtype: torch.dtype | None = None) -> Tensor:
            return zeros(*size, dtype=dtype, device_mesh=self.device_mesh, placements=[Shard(0)])

        centers = bank(self.num_classes, self.embedding_size)
        if self.center_update == "gradient":
            self.centers = torch.nn.Parameter(centers)
            self.init_centers()
        else:
            self.register_buffer("centers", centers)
            self.register_buffer("class_counts", bank(self.num_classes, dtype=torch.long))

    @torch.no_grad()
    def init_centers(self) -> None:
        """Draw the centers: on each rank others, even where all ranks have the same seed."""
        local = _local(self.centers)
        seed = torch.randint(1 << 62, (1,)).to(local.device)
        dist.broadcast(seed, dist.get_global_rank(self.group, 0), group=self.group)
        with torch.random.fork_rng([local.device] if local.is_cuda else []):
            torch.manual_seed(int(seed) + self.rank)
            if len(local) > 0:
                self.weight_init_func(local)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group()

    @property
    def rank(self) -> int:
        return self.device_mesh.get_local_rank()

    @property
    def first_class(self) -> int:
        return sum(self.shard_sizes()[: self.rank])

    def shard_sizes(self) -> list[int]:
        """How many classes each rank has: what ``DTensor`` and ``torch.chunk`` make of C."""
        world, most = self.device_mesh.size(), -(-self.num_classes // self.device_mesh.size())
        return [min(most, max(0, self.num_classes - rank * most)) for rank in range(world)]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        shares = self._exchange(
            lambda: self._batch_share(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        )
        assert labels is not None  # or this rank would have refused it
        sizes = [share.rows for share in shares]
        batches = {(share.rows, share.fingerprint) for share in shares}
        if len(shares) > 1 and len(batches) == 1 and sizes[0] > 0:
            raise ValueError(
                "all ranks have the same batch: give each its own share, and no"
                " DistributedLossWrapper, since this loss gathers the shares itself"
            )
        for rank, share in enumerate(shares):
            if share.largest_index >= sum(sizes):
                raise ValueError(
                    f"indices_tuple must lie in [0, {sum(sizes)}), the samples of all ranks,"
                    f" got {share.largest_index} on rank {rank}"
                )
        # The whole batch in the order of the ranks; what PML's classes do with it is the same
        # everywhere.
        embeddings = self._gather(embeddings, shares)
        labels = gather_rows(labels.to(embeddings.device).long(), sizes, self.group)
        if indices_tuple is not None:
            order = list(torch.arange(sum(sizes), device=embeddings.device).split_with_sizes(sizes))
            own_first = torch.cat([order.pop(self.rank), *order])
            indices_tuple = tuple(own_first[i.to(own_first.device)] for i in indices_tuple)
        return super(CenterContrastiveLoss, self).forward(embeddings, labels, indices_tuple)

    def _exchange(self, make_share: Callable[[], Share]) -> list[Share]:
        """What all ranks' ``make_share`` return; if one raises, all do."""
        refusal, share = None, Share(refused=1)
        try:
            share = make_share()
        except Exception as error:  # whatever it is, the other ranks are waiting
            refusal = error
        world = self.device_mesh.size()
        numbers = torch.tensor([share], device=_local(self.centers).device)
        gathered = gather_rows(numbers, [1] * world, self.group)
        shares = [Share(*numbers) for numbers in gathered.tolist()]
        if any(share.refused for share in shares):
            messages: list[str | None] = [None] * world
            dist.all_gather_object(messages, refusal and str(refusal), group=self.group)
            if refusal is not None:
                raise refusal
            reports = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text]
            raise ValueError("; ".join(reports))
        for mode in MODES:
            values = [getattr(share, mode) for share in shares]
            if len(set(values)) > 1:
                raise ValueError(
                    f"{MODES[mode]} must be the same on all ranks, got {[bool(v) for v in values]}"
                )
        return shares

    def _batch_share(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> Share:
        # Unlike one process, which leaves labels on a GPU to its own check: a label that is too
        # large would be taken for one of another rank's.
        labels = check_class_labels(None if labels is None else labels.cpu(), self.num_classes)
        c_f.check_shapes(embeddings, labels)
        if ref_emb is not None or ref_labels is not None:
            raise ValueError("ref_emb is not supported for this loss function")
        share = self._rows_share(embeddings)
        share = share._replace(
            fingerprint=int(batch_fingerprint(embeddings, labels.to(embeddings.device))),
            collects_stats=self.collect_stats,
            mined=indices_tuple is not None,
        )
        if indices_tuple is not None:
            indices = torch.cat(list(indices_tuple))
            if len(indices) > 0:
                smallest, largest = (int(i) for i in indices.aminmax())
                if smallest < 0:
                    raise ValueError(f"indices_tuple must not be negative, got {smallest}")
                share = share._replace(largest_index=largest)
        return share

    def _rows_share(self, embeddings: Tensor) -> Share:
        check_embeddings(embeddings, self.embedding_size)
        if embeddings.device.type != self.device_mesh.device_type:
            raise ValueError(
                f"embeddings must lie on {self.device_mesh.device_type}, as the centers do,"
                f" got {embeddings.device.type}"
            )
        return Share(
            rows=len(embeddings),
            dtype=DTYPES.index(embeddings.dtype),
            requires_grad=embeddings.requires_grad,
            gradients=torch.is_grad_enabled(),
            training=self.training,
        )

    def _gather(self, embeddings: Tensor, shares: list[Share]) -> Tensor:
        """All ranks' rows, of the widest type, and with a gradient if any rank's have one."""
        embeddings = embeddings.to(
            functools.reduce(torch.promote_types, (DTYPES[share.dtype] for share in shares))
        )
        wanted = torch.is_grad_enabled() and any(share.requires_grad for share in shares)
        if wanted and not embeddings.requires_grad:
            # In the backward pass, too, all ranks have to take part.
            embeddings = embeddings.detach().requires_grad_()
        return gather_rows(embeddings, [share.rows for share in shares], self.group)

    def sample_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return sharded_center_contrastive_loss(
            embeddings,
            _local(self.centers),
            labels,
            self.first_class,
            self.scale,
            self.margin,
            self.center_weight,
            self.label_smoothing,
            self.seen_classes(),
            self.group,
        )

    def sample_weights(
        self, indices_tuple: tuple[Tensor, ...] | None, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if indices_tuple is None:
            return super().sample_weights(None, labels, dtype)
        counts = torch.bincount(torch.cat(indices_tuple), minlength=len(labels))
        counts = all_reduced(counts, "sum", self.group)
        # Where no miner found anything, PML takes all samples.
        counts = counts.where(counts.any(), 1)
        return counts.to(dtype) / counts.max()

    @torch.no_grad()
    def update_centers(self, embeddings: Tensor, labels: Tensor) -> None:
        centers, counts = _local(self.centers), _local(self.class_counts)
        own_class = labels - self.first_class
        here = (own_class >= 0) & (own_class < len(centers))
        unit = torch.nn.functional.normalize(embeddings[here].to(centers.dtype))
        own_class = own_class[here]
        centers[own_class], counts[own_class] = moving_class_means(
            centers, counts, unit, own_class, self.momentum, normalize=True
        )

    def seen_classes(self) -> Tensor | None:
        """(C_r,) bool, which of this rank's classes have a center yet; None if all have."""
        return _local(self.class_counts) > 0 if self.center_update == "ema" else None

    @torch.no_grad()
    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N_r, C) logits without margin of this rank's rows; -inf for unseen classes.

        All ranks call it together. No gradient flows through it, and on each rank it takes the
        memory of all ranks' logits with all classes.
        """
        shares = self._exchange(lambda: self._rows_share(embeddings))
        sizes = [share.rows for share in shares]
        rows = self._gather(embeddings, shares)
        logits = self.scale * self._cosines(rows, slice(None))
        all_logits = gather_rows(logits.T, self.shard_sizes(), self.group).T
        return all_logits.split_with_sizes(sizes)[self.rank]

    def _cosines(self, embeddings: Tensor, classes: slice) -> Tensor:
        cosines = pairwise_cosine(embeddings, _local(self.centers)[classes])
        seen = self.seen_classes()
        return cosines if seen is None else cosines.masked_fill(~seen[classes], float("-inf"))

    @torch.no_grad()
    def set_stats(self, embeddings: Tensor, labels: Tensor) -> None:
        dtype = torch.promote_types(embeddings.dtype, self.centers.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        largest = embeddings.new_full((len(labels),), float("-inf"), dtype=dtype)
        own, nearest = largest.clone(), torch.full_like(labels, self.num_classes)
        for classes in parts(self.shard_sizes()[self.rank], len(labels), CHUNK):
            cosines = self._cosines(embeddings, classes)
            first = self.first_class + classes.start
            column = (labels - first).clamp(0, cosines.shape[1] - 1)[:, None]
            here = labels == column.squeeze(1) + first
            own = own.where(~here, cosines.gather(1, column).squeeze(1))
            chunk_largest, chunk_nearest = cosines.max(1)
            nearest = nearest.where(chunk_largest <= largest, chunk_nearest + first)
            largest = largest.maximum(chunk_largest)
        nearest = nearest.where(
            largest == all_reduced(largest, "max", self.group), self.num_classes
        )
        nearest = all_reduced(nearest, "min", self.group)
        own = all_reduced(own, "max", self.group).clamp_min(-1)
        self.avg_center_similarity = own.mean().item()
        self.center_accuracy = (nearest == labels).float().mean().item()


class Share(NamedTuple):
    """What a rank tells the others of its share of a batch before anything else: whole numbers."""

    refused: int = 0
    rows: int = 0
    dtype: int = 0  # its place in DTYPES
    requires_grad: int = 0
    fingerprint: int = 0
    largest_index: int = -1
    # These decide which collectives follow.
    gradients: int = 0
    training: int = 0
    collects_stats: int = 0
    mined: int = 0


MODES = {
    "gradients": "torch.is_grad_enabled()",
    "training": "training mode",
    "collects_stats": "collect_stats",
    "mined": "whether there is an indices_tuple",
}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``."""
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def _all_ranks() -> DeviceMesh:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sharded centers need a process group: start with torchrun and call"
            " torch.distributed.init_process_group() first; in one process, use"
            " CenterContrastiveLoss"
        )
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return init_device_mesh(device, (dist.get_world_size(),))
