"""ShardedCenterContrastiveLoss in 1, 2 and 4 processes equals CenterContrastiveLoss in one."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pytorch_metric_learning.losses import MultipleLosses
from pytorch_metric_learning.miners import BatchEasyHardMiner, MultiSimilarityMiner
from pytorch_metric_learning.reducers import ClassWeightedReducer, DoNothingReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.golden import relative_error
from helpers.processes import run_processes
from pml_extras.functional import _center_contrastive
from pml_extras.functional._kernels import logsumexp_of_negatives
from pml_extras.losses import CenterContrastiveLoss, ShardedCenterContrastiveLoss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

# Four ranks hold 2, 2, 1 and 0 of the five classes.
N, C, D = 16, 5, 6
# Samples per rank, by world size.
EVEN = {1: [16], 2: [8, 8], 4: [4, 4, 4, 4]}
UNEVEN = {1: [16], 2: [11, 5], 4: [7, 0, 6, 3]}
WORLDS = pytest.mark.parametrize("world", EVEN)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, D)


def batch(step: int = 0, classes: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 5, generator=generator)
    return x, torch.randint(classes, (N,), generator=generator)


def local_rows(rank: int, tensor: torch.Tensor, sizes: dict[int, list[int]] = EVEN) -> torch.Tensor:
    return tensor.split(sizes[dist.get_world_size()])[rank]


def initial_centers(classes: int = C) -> torch.Tensor:
    return torch.randn(classes, D, generator=torch.Generator().manual_seed(9))


def make_loss(loss_class=ShardedCenterContrastiveLoss, classes: int = C, **kwargs):
    loss_func = loss_class(classes, D, **kwargs)
    if loss_func.center_update == "gradient":
        load_full_state(loss_func, {"centers": initial_centers(classes)})
    return loss_func


FULL_STATE = StateDictOptions(full_state_dict=True)


def load_full_state(loss_func, state: dict[str, torch.Tensor]) -> None:
    set_model_state_dict(loss_func, state, options=FULL_STATE)


def full_state(loss_func) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(loss_func, options=FULL_STATE)
    return {name: value.detach().clone() for name, value in state.items()}


# ---- Training: equals one process with the whole batch.

RUNS = {
    "adam": {},
    "sgd": {"optimizer": "sgd"},
    # Few steps, because training amplifies rounding errors.
    "float32": {"dtype": torch.float32, "steps": 2},
    "uneven": {"sizes": UNEVEN},
    "more classes than samples": {"classes": 41, "negative_classes": "all"},
    "one class": {"classes": 1},
    "smoothing": {"label_smoothing": 0.2},
    "hyperparameters": {"scale": 64.0, "margin": 0.0, "center_weight": 0.0},
    "reducer and regularizer": {
        "reducer": lambda: ClassWeightedReducer(torch.arange(1.0, C + 1)),
        "embedding_regularizer": LpRegularizer,
        "sizes": UNEVEN,
    },
    "ema": {"center_update": "ema"},
    "ema uneven": {"center_update": "ema", "sizes": UNEVEN, "momentum": 0.5},
    "classes of the batch": {"classes": 41, "label_smoothing": 0.2},
    "classes of an uneven batch": {"classes": 41, "sizes": UNEVEN},
    "ema, classes of the batch": {"center_update": "ema", "classes": 41},
    "ema smoothing": {
        "center_update": "ema",
        "label_smoothing": 0.2,
        "classes": 41,
        "negative_classes": "all",
    },
}


def train(loss_class, name: str, rank: int | None = None) -> dict:
    """Train for some steps. Without a rank, one process has the whole batch."""
    kwargs = dict(RUNS[name])
    dtype, sizes = kwargs.pop("dtype", torch.float64), kwargs.pop("sizes", EVEN)
    optimizer, classes = kwargs.pop("optimizer", "adam"), kwargs.pop("classes", C)
    num_steps = kwargs.pop("steps", 5)
    kwargs = {k: v() if callable(v) else v for k, v in kwargs.items()}
    model, loss_func = encoder().to(dtype), make_loss(loss_class, classes, **kwargs).to(dtype)
    network = model if rank is None else DistributedDataParallel(model)
    make_optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }[optimizer]
    trainable = [module for module in (model, loss_func) if list(module.parameters())]
    optimizers = [make_optimizer(module.parameters()) for module in trainable]
    losses = []
    for step in range(num_steps):
        x, labels = batch(step, classes)
        if rank is not None:
            x, labels = local_rows(rank, x, sizes), local_rows(rank, labels, sizes)
        for o in optimizers:
            o.zero_grad()
        loss = loss_func(network(x.to(dtype)), labels)
        loss.backward()
        losses.append(loss.detach())
        if step < num_steps - 1:  # the gradients of the last step are returned
            for o in optimizers:
                o.step()
    return {
        "losses": torch.stack(losses),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]),
        **{f"gradient of {k}": p.grad.clone() for k, p in loss_func.named_parameters()},
        **full_state(loss_func),
    }


def train_all(rank: int) -> dict[str, dict]:
    results = {}
    for name in RUNS:
        results[name] = train(ShardedCenterContrastiveLoss, name, rank)
        for key, value in results[name].items():
            if key.startswith("gradient of"):
                results[name][key] = value.full_tensor()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from the world size to the results of all runs on each rank."""
    results = {}

    def results_of(world):
        if world not in results:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                # 41 classes are processed in chunks, 5 at once.
                patch.setattr(_center_contrastive, "MAX_REFERENCE_LOGITS", N * C)
                patch.setattr(logsumexp_of_negatives, "CHUNK_NUMEL", N * 3)
                results[world] = run_processes(train_all, folder, world_size=world)
        return results[world]

    return results_of


@WORLDS
@pytest.mark.parametrize("name", RUNS)
def test_training_equals_one_process(trained, world, name):
    expected = train(CenterContrastiveLoss, name)
    tolerance = 1e-6 if RUNS[name].get("dtype") is torch.float32 else 1e-12
    for rank in trained(world):
        assert rank[name].keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(rank[name][key], value) < tolerance, key
        assert torch.equal(rank[name]["losses"], trained(world)[0][name]["losses"])


# ---- Statistics, logits, dtypes and state dicts: equal one process.


def compare_with_one_process(rank: int) -> None:
    world = dist.get_world_size()
    x, labels = batch()
    embeddings = encoder()(x).detach()
    local_x, local_labels = local_rows(rank, embeddings, UNEVEN), local_rows(rank, labels, UNEVEN)

    # Statistics and logits, with a class that has no samples.
    for kwargs in ({}, {"center_update": "ema"}):
        plain, sharded = (
            make_loss(cls, collect_stats=True, **kwargs)
            for cls in (CenterContrastiveLoss, ShardedCenterContrastiveLoss)
        )
        class_mask = labels != 2
        plain(embeddings[class_mask], labels[class_mask])
        sharded(local_x[local_labels != 2], local_labels[local_labels != 2])
        plain.eval(), sharded.eval()
        assert torch.allclose(plain(embeddings, labels), sharded(local_x, local_labels))
        assert sharded.avg_center_similarity == pytest.approx(plain.avg_center_similarity)
        assert sharded.center_accuracy == plain.center_accuracy
        expected = local_rows(rank, plain.get_logits(embeddings), UNEVEN)
        assert torch.allclose(sharded.get_logits(local_x), expected, atol=1e-5)

    # Empty local batches, and a rank whose network is frozen.
    sharded = make_loss()
    loss = sharded(torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    plain = make_loss(CenterContrastiveLoss)
    full_x = embeddings.clone().requires_grad_()
    plain(full_x, labels).backward()
    local_x = local_x.clone().requires_grad_(rank == 0)
    sharded(local_x, local_labels).backward()
    assert torch.allclose(sharded.centers.grad.full_tensor(), plain.centers.grad, atol=1e-6)
    if rank == 0:
        # The gradient is multiplied by the world size, because DistributedDataParallel divides it.
        assert torch.allclose(local_x.grad / world, local_rows(0, full_x.grad, UNEVEN), atol=1e-6)
    else:
        assert local_x.grad is None

    # Half precision on some ranks only.
    half = embeddings.bfloat16().requires_grad_()
    plain.zero_grad(), sharded.zero_grad()
    expected = plain(half, labels)
    expected.backward()
    local_half = local_rows(rank, half.detach(), UNEVEN)
    local_half = (local_half.float() if rank == 0 else local_half).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sharded(local_half, local_labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected)
    assert torch.allclose(sharded.centers.grad.full_tensor(), plain.centers.grad, atol=1e-6)

    # EMA centers that are updated outside of training.
    plain, sharded_ema = (
        make_loss(cls, center_update="ema")
        for cls in (CenterContrastiveLoss, ShardedCenterContrastiveLoss)
    )
    plain.update_centers(embeddings, labels)
    sharded_ema.update_centers(local_half.detach().float(), local_labels)
    assert torch.equal(sharded_ema.class_counts.full_tensor(), plain.class_counts)
    assert torch.allclose(sharded_ema.centers.full_tensor(), plain.centers, atol=1e-2)
    with pytest.raises(ValueError, match='center_update must be "ema" to update'):
        sharded.update_centers(local_x.detach(), local_labels)
    assert sharded_ema.bfloat16().centers.dtype == torch.float32

    # Inside MultipleLosses, without a reducer: one loss per sample of all ranks.
    both = MultipleLosses([make_loss(reducer=DoNothingReducer()), make_loss()])
    assert "loss" in both.losses[0](local_x, local_labels)
    assert len(both.losses[0](local_x, local_labels)["loss"]["losses"]) == N

    # The full state dict equals that of one process.
    ema = make_loss(center_update="ema")
    ema(local_x, local_labels)
    for loss_func in (sharded, ema):
        plain = make_loss(CenterContrastiveLoss, center_update=loss_func.center_update)
        plain.load_state_dict(full_state(loss_func))
        for value in plain.state_dict().values():
            value += 1
        loaded = make_loss(center_update=loss_func.center_update)
        load_full_state(loaded, plain.state_dict())
        for name, value in full_state(loaded).items():
            assert torch.equal(value, plain.state_dict()[name])
    assert repr(sharded).startswith("ShardedCenterContrastiveLoss")


@WORLDS
def test_statistics_logits_dtypes_and_state_dicts_equal_one_process(world, tmp_path):
    run_processes(compare_with_one_process, tmp_path, world_size=world)


# ---- Miners.


def losses_with_mined_tuples(rank: int) -> dict[str, torch.Tensor]:
    x, labels = batch()
    embeddings = encoder()(x).detach()
    local_x, local_labels = local_rows(rank, embeddings), local_rows(rank, labels)
    miner = MultiSimilarityMiner(epsilon=0.0)
    tuples = {
        "all": DistributedMinerWrapper(miner)(local_x, local_labels),
        "efficient": DistributedMinerWrapper(miner, efficient=True)(local_x, local_labels),
        "triplets": DistributedMinerWrapper(BatchEasyHardMiner())(local_x, local_labels),
        "local": miner(local_x, local_labels),
        "empty": (torch.empty(0, dtype=torch.long),) * 4,
    }
    loss_func = make_loss(reducer=DoNothingReducer())
    return {
        name: loss_func(local_x, local_labels, indices)["loss"]["losses"].detach()
        for name, indices in tuples.items()
    }


@WORLDS
def test_mined_tuples_weight_the_samples_as_in_one_process(world, tmp_path):
    x, labels = batch()
    embeddings = encoder()(x).detach()
    miner = MultiSimilarityMiner(epsilon=0.0)
    starts = torch.arange(0, N, N // world)
    per_rank = [
        miner(x, y) for x, y in zip(embeddings.chunk(world), labels.chunk(world), strict=True)
    ]
    tuples = {
        "all": miner(embeddings, labels),
        "efficient": miner(embeddings, labels),
        "triplets": BatchEasyHardMiner()(embeddings, labels),
        "local": tuple(
            torch.cat([start + i for start, i in zip(starts, indices, strict=True)])
            for indices in zip(*per_rank, strict=True)
        ),
        "empty": None,
    }
    loss_func = make_loss(CenterContrastiveLoss, reducer=DoNothingReducer())
    for rank in run_processes(losses_with_mined_tuples, tmp_path, world_size=world):
        for name, indices in tuples.items():
            expected = loss_func(embeddings, labels, indices)["loss"]["losses"].detach()
            assert torch.allclose(rank[name], expected, atol=1e-6), name


# ---- Checkpoints.


def train_from_checkpoint(
    rank: int | None, folder: str, steps: list[int], center_update: str, resume: bool
) -> dict[str, torch.Tensor]:
    """Load the checkpoint if ``resume``, train for these steps, save. Returns the full state.

    Without a rank, one process without a process group has the whole batch.
    """
    loss_class = CenterContrastiveLoss if rank is None else ShardedCenterContrastiveLoss
    # With a smaller momentum, training amplifies rounding errors more.
    options = {"center_update": center_update, "momentum": 0.9}
    model, loss_func = encoder(), make_loss(loss_class, **options)
    network = model if rank is None else DistributedDataParallel(model)
    if resume:
        nn.init.zeros_(model.weight)
        nn.init.ones_(loss_func.centers)
    everything = nn.ModuleDict({"model": network, "loss": loss_func})
    optimizer = torch.optim.AdamW(
        [{"params": m.parameters(), "lr": 0.1} for m in (model, loss_func)]
    )
    if resume:
        states = dict(
            zip(("modules", "optimizer"), get_state_dict(everything, optimizer), strict=True)
        )
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(
            everything,
            optimizer,
            model_state_dict=states["modules"],
            optim_state_dict=states["optimizer"],
        )
    for step in steps:
        x, labels = batch(step)
        if rank is not None:
            x, labels = local_rows(rank, x, UNEVEN), local_rows(rank, labels, UNEVEN)
        optimizer.zero_grad()
        loss_func(network(x), labels).backward()
        optimizer.step()
    modules, states = get_state_dict(everything, optimizer)
    dcp.save({"modules": modules, "optimizer": states}, checkpoint_id=folder)
    return full_state(loss_func)


# With "ema", a parameter group of the optimizer is empty.
NO_PARAMETERS = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="set_state_dict loses the settings of empty groups"
)


@pytest.mark.parametrize("center_update", ["gradient", pytest.param("ema", marks=NO_PARAMETERS)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")
def test_checkpoints_resume_at_another_world_size(tmp_path, center_update):
    steps = iter(range(10))
    for world in (2, 4, 1, 4, 2):
        actual = run_processes(
            train_from_checkpoint,
            tmp_path,
            str(tmp_path / "checkpoint"),
            [next(steps), next(steps)],
            center_update,
            (tmp_path / "checkpoint").exists(),
            world_size=world,
        )[0]
    expected = train_from_checkpoint(
        None, str(tmp_path / "one_process"), list(range(10)), center_update, resume=False
    )
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-6, atol=1e-6)
    # The checkpoint resumes in one process without a process group too.
    actual = train_from_checkpoint(
        None, str(tmp_path / "checkpoint"), [10], center_update, resume=True
    )
    expected = train_from_checkpoint(
        None, str(tmp_path / "one_process"), [10], center_update, resume=True
    )
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-6, atol=1e-6)


# ---- Initialization.


def initial_state(rank: int) -> dict:
    torch.manual_seed(3)
    loss_func = ShardedCenterContrastiveLoss(4, D)
    next_draw = torch.rand(1)
    torch.manual_seed(3)
    same_seed = ShardedCenterContrastiveLoss(4, D)
    torch.manual_seed(4 + rank)
    other_seeds = ShardedCenterContrastiveLoss(4, D)
    ones = ShardedCenterContrastiveLoss(4, D, weight_init_func=nn.init.ones_)
    return {
        "centers": loss_func.centers.full_tensor().detach(),
        "same seed": same_seed.centers.full_tensor().detach(),
        "other seeds": other_seeds.centers.full_tensor().detach(),
        "ones": ones.centers.full_tensor().detach(),
        "next draw": next_draw,
        "classes": (loss_func.first_class, len(loss_func.centers.to_local())),
    }


def test_ranks_with_one_seed_draw_different_centers(tmp_path):
    first, second = run_processes(initial_state, tmp_path)
    assert (first["classes"], second["classes"]) == ((0, 2), (2, 2))
    for key in ("centers", "same seed", "ones", "other seeds"):
        assert torch.equal(first[key], second[key])
    assert torch.equal(first["centers"], first["same seed"])
    assert len(torch.unique(first["centers"])) == 4 * D
    assert len(torch.unique(first["other seeds"])) == 4 * D
    assert not torch.equal(first["centers"], first["other seeds"])
    assert (first["ones"] == 1).all()
    # The global generators stay in sync.
    assert torch.equal(first["next draw"], second["next draw"])


# ---- Memory.


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                self.numel = max(self.numel, x.numel())
        return result


def largest_tensors(rank: int, classes: int, size: int) -> int:
    loss_func = ShardedCenterContrastiveLoss(classes, size, label_smoothing=0.1, collect_stats=True)
    ema = ShardedCenterContrastiveLoss(classes, size, center_update="ema")
    torch.manual_seed(rank)
    x = torch.randn(8, size, requires_grad=True)
    labels = torch.randint(classes, (8,))
    with LargestTensor() as largest:
        loss_func(x, labels).backward()
        ema(x, labels).backward()
    return largest.numel


@pytest.mark.parametrize(("classes", "size"), [(64, 128), (4096, 2)])
def test_no_rank_allocates_all_centers_or_all_logits(tmp_path, classes, size):
    batch_size = 2 * 8
    for largest in run_processes(largest_tensors, tmp_path, classes, size):
        assert largest <= max(classes // 2 * size, batch_size * classes // 2)
        assert largest < max(classes * size, batch_size * classes)


# ---- Errors: raised on all ranks, before any state changes.


def errors_of_invalid_inputs(rank: int) -> dict[str, list[str]]:
    x, labels = batch()
    x = local_rows(rank, encoder()(x).detach())
    labels = local_rows(rank, labels)
    invalid_here = rank == 1
    too_large = labels.clone()
    too_large[3] = C
    pairs = (torch.tensor([0]), torch.tensor([1]))
    same = (torch.ones(4, D), torch.zeros(4, dtype=torch.long))
    calls = {
        "label": lambda f: f(x, too_large if invalid_here else labels),
        "labels": lambda f: f(x, None if invalid_here else labels),
        "float labels": lambda f: f(x, labels.float() if invalid_here else labels),
        "rows": lambda f: f(x, labels[1:] if invalid_here else labels),
        "embedding size": lambda f: f(x[:, :3] if invalid_here else x, labels),
        "dtype": lambda f: f(x.long() if invalid_here else x, labels),
        "no embeddings": lambda f: f(None if invalid_here else x, labels),
        "device": lambda f: f(x.to("meta") if invalid_here else x, labels),
        "references": lambda f: f(x, labels, ref_emb=x if invalid_here else None),
        "index": lambda f: f(x, labels, (torch.tensor([N if invalid_here else 0]), pairs[1])),
        "negative index": lambda f: f(
            x, labels, (torch.tensor([-1 if invalid_here else 0]), pairs[1])
        ),
        "mined": lambda f: f(x, labels, pairs if invalid_here else None),
        "same batch": lambda f: f(*same),
        "wrapper": lambda f: DistributedLossWrapper(f)(x, labels),
        "efficient wrapper": lambda f: DistributedLossWrapper(f, efficient=True)(x, labels),
        "logits": lambda f: f.get_logits(x[:, :3] if invalid_here else x),
    }
    errors = {name: [] for name in calls}
    for loss_func in (make_loss(), make_loss(center_update="ema")):
        loss_func(x, labels)
        before = full_state(loss_func)
        for name, call in calls.items():
            with pytest.raises(Exception) as raised:  # noqa: PT011
                call(loss_func)
            errors[name].append(f"{raised.type.__name__}: {raised.value}")
        with (
            torch.set_grad_enabled(not invalid_here),
            pytest.raises(ValueError, match="got") as raised,
        ):
            loss_func(x, labels)
        errors.setdefault("gradients", []).append(str(raised.value))
        with pytest.raises(ValueError, match="got") as raised:
            loss_func.train(not invalid_here)(x, labels)
        errors.setdefault("mode", []).append(str(raised.value))
        loss_func.train()
        for name, value in full_state(loss_func).items():
            assert torch.equal(value, before[name])
        loss_func(x, labels)  # the ranks are still in sync
    return errors


INVALID_INPUTS = {
    "label": rf"labels must lie in \[0, {C}\), got {C} at index 3",
    "labels": "labels are required",
    "float labels": r"labels must be integers, got torch\.float32",
    "rows": "Number of embeddings must equal number of labels",
    "embedding size": rf"embeddings must have shape \(batch_size, {D}\), got \(8, 3\)",
    "dtype": r"embeddings must be floating-point numbers, got torch\.int64",
    "no embeddings": "'NoneType' object has no attribute",
    "device": "embeddings must be on cpu, as the centers are, got meta",
    "references": "ref_emb is not supported",
    "efficient wrapper": "ref_emb is not supported",
    "logits": rf"embeddings must have shape \(batch_size, {D}\), got \(8, 3\)",
}
INCONSISTENT_INPUTS = {
    "negative index": rf"indices_tuple must lie in \[0, {N}\).* got -1 on rank 1$",
    "index": rf"indices_tuple must lie in \[0, {N}\).* got {N} on rank 1$",
    "mined": r"whether there is an indices_tuple must be the same.* \[False, True\]$",
    "same batch": "all ranks have the same batch",
    "wrapper": "all ranks have the same batch.* no DistributedLossWrapper",
    "gradients": r"is_grad_enabled\(\) must be the same on all ranks, got \[True, False\]$",
    "mode": r"training mode must be the same on all ranks, got \[True, False\]$",
}


def test_invalid_input_on_one_rank_raises_on_all_ranks(tmp_path):
    first, second = run_processes(errors_of_invalid_inputs, tmp_path)
    for name, message in INVALID_INPUTS.items():
        for valid_rank, invalid_rank in zip(first[name], second[name], strict=True):
            assert re.search(f"Error: {message}", invalid_rank), (name, invalid_rank)
            if name != "efficient wrapper":  # invalid on both ranks
                assert re.search(f"ValueError: rank 1: {message}", valid_rank), (name, valid_rank)
    for name, message in INCONSISTENT_INPUTS.items():
        for text in first[name] + second[name]:
            assert re.search(message, text), (name, text)


def check_arguments(rank: int) -> None:
    with pytest.raises(ValueError, match="weight_regularizer is not supported with sharded"):
        ShardedCenterContrastiveLoss(C, D, weight_regularizer=LpRegularizer())
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got 0"):
        ShardedCenterContrastiveLoss(C, D, scale=0)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match=r"must have one dimension, got shape \(2, 1\)"):
        ShardedCenterContrastiveLoss(C, D, device_mesh=mesh)
    # A mesh may cover some of the ranks.
    x, labels = batch(rank)
    groups = [dist.new_group([0]), dist.new_group([1])]
    mesh = dist.device_mesh.DeviceMesh.from_group(groups[rank], "cpu")
    loss_func = ShardedCenterContrastiveLoss(C, D, device_mesh=mesh)
    assert loss_func.centers.to_local().shape == (C, D)
    plain = CenterContrastiveLoss(C, D)
    plain.load_state_dict(full_state(loss_func))
    embeddings = encoder()(x)
    assert torch.allclose(loss_func(embeddings, labels), plain(embeddings, labels))


def test_invalid_arguments_are_reported_and_subgroups_are_supported(tmp_path):
    run_processes(check_arguments, tmp_path)


def test_the_error_without_a_process_group_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"torchrun .*init_process_group.* CenterContrastiveL"):
        ShardedCenterContrastiveLoss(C, D)
