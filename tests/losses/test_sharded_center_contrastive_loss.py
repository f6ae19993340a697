"""ShardedCenterContrastiveLoss in one, two and four processes, against one with all centers."""

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

from helpers.processes import run_processes
from pml_extras.functional import _center_contrastive
from pml_extras.functional._kernels import negative_logsumexp
from pml_extras.losses import CenterContrastiveLoss, ShardedCenterContrastiveLoss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

# Of five classes, four ranks hold 2, 2, 1 and none.
N, C, D = 16, 5, 6
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


def share(rank: int, tensor: torch.Tensor, sizes: dict[int, list[int]] = EVEN) -> torch.Tensor:
    return tensor.split(sizes[dist.get_world_size()])[rank]


def first_centers(classes: int = C) -> torch.Tensor:
    return torch.randn(classes, D, generator=torch.Generator().manual_seed(9))


def make(loss_class=ShardedCenterContrastiveLoss, classes: int = C, **settings):
    loss_func = loss_class(classes, D, **settings)
    if loss_func.center_update == "gradient":
        set_whole_state(loss_func, {"centers": first_centers(classes)})
    return loss_func


WHOLE = StateDictOptions(full_state_dict=True)


def set_whole_state(loss_func, state: dict[str, torch.Tensor]) -> None:
    set_model_state_dict(loss_func, state, options=WHOLE)


def whole_state(loss_func) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(loss_func, options=WHOLE)
    return {name: value.detach().clone() for name, value in state.items()}


# ---- Training equals that of one process.

RUNS = {
    "adam": {},
    "sgd": {"optimizer": "sgd"},
    # Few steps, since training amplifies what float32 rounds.
    "float32": {"dtype": torch.float32, "steps": 2},
    "uneven": {"sizes": UNEVEN},
    "more classes than samples": {"classes": 41},
    "one class": {"classes": 1},
    "smoothing": {"label_smoothing": 0.2},
    "settings": {"scale": 64.0, "margin": 0.0, "center_weight": 0.0},
    "reducer and regularizer": {
        "reducer": lambda: ClassWeightedReducer(torch.arange(1.0, C + 1)),
        "embedding_regularizer": LpRegularizer,
        "sizes": UNEVEN,
    },
    "ema": {"center_update": "ema"},
    "average uneven": {"center_update": "ema", "sizes": UNEVEN, "momentum": 0.5},
    "average smoothing": {"center_update": "ema", "label_smoothing": 0.2, "classes": 41},
}


def train(loss_class, name: str, rank: int | None = None) -> dict:
    """Some steps; ``rank`` is None in the one process, which has the joined batch."""
    settings = dict(RUNS[name])
    dtype, sizes = settings.pop("dtype", torch.float64), settings.pop("sizes", EVEN)
    optimizer, classes = settings.pop("optimizer", "adam"), settings.pop("classes", C)
    num_steps = settings.pop("steps", 5)
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    model, loss_func = encoder().to(dtype), make(loss_class, classes, **settings).to(dtype)
    network = model if rank is None else DistributedDataParallel(model)
    steps = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    parts = [module for module in (model, loss_func) if list(module.parameters())]
    optimizers = [steps[optimizer](module.parameters()) for module in parts]
    losses = []
    for step in range(num_steps):
        x, labels = batch(step, classes)
        if rank is not None:
            x, labels = share(rank, x, sizes), share(rank, labels, sizes)
        for o in optimizers:
            o.zero_grad()
        loss = loss_func(network(x.to(dtype)), labels)
        loss.backward()
        losses.append(loss.detach())
        if step < num_steps - 1:  # so that the last gradients are looked at
            for o in optimizers:
                o.step()
    return {
        "losses": torch.stack(losses),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]),
        **{f"gradient of {k}": p.grad.clone() for k, p in loss_func.named_parameters()},
        **whole_state(loss_func),
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
    """The results of all runs on all ranks, by world size."""
    results = {}

    def of(world):
        if world not in results:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                # The 41 classes are taken a chunk at a time, the 5 at once.
                patch.setattr(_center_contrastive, "DENSE_MAX_LOGITS", N * C)
                patch.setattr(negative_logsumexp, "CHUNK_NUMEL", N * 3)
                results[world] = run_processes(train_all, folder, world_size=world)
        return results[world]

    return of


@WORLDS
@pytest.mark.parametrize("name", RUNS)
def test_training_equals_one_process(trained, relative_error, world, name):
    expected = train(CenterContrastiveLoss, name)
    tolerance = 1e-6 if RUNS[name].get("dtype") is torch.float32 else 1e-12
    for rank in trained(world):
        assert rank[name].keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(rank[name][key], value) < tolerance, key
        assert torch.equal(rank[name]["losses"], trained(world)[0][name]["losses"])


# ---- What else it shares with its parent.


def several_things(rank: int) -> None:
    world = dist.get_world_size()
    x, labels = batch()
    embeddings = encoder()(x).detach()
    own, own_labels = share(rank, embeddings, UNEVEN), share(rank, labels, UNEVEN)

    # Statistics and logits, where one class has not been seen.
    for settings in ({}, {"center_update": "ema"}):
        plain, sharded = (
            make(cls, collect_stats=True, **settings)
            for cls in (CenterContrastiveLoss, ShardedCenterContrastiveLoss)
        )
        seen = labels != 2
        plain(embeddings[seen], labels[seen])
        sharded(own[own_labels != 2], own_labels[own_labels != 2])
        plain.eval(), sharded.eval()
        assert torch.allclose(plain(embeddings, labels), sharded(own, own_labels))
        assert sharded.avg_center_similarity == pytest.approx(plain.avg_center_similarity)
        assert sharded.center_accuracy == plain.center_accuracy
        expected = share(rank, plain.get_logits(embeddings), UNEVEN)
        assert torch.allclose(sharded.get_logits(own), expected, atol=1e-5)

    # Shares without rows, and a rank whose network is frozen.
    sharded = make()
    loss = sharded(torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    plain = make(CenterContrastiveLoss)
    whole = embeddings.clone().requires_grad_()
    plain(whole, labels).backward()
    own = own.clone().requires_grad_(rank == 0)
    sharded(own, own_labels).backward()
    assert torch.allclose(sharded.centers.grad.full_tensor(), plain.centers.grad, atol=1e-6)
    if rank == 0:
        # For DistributedDataParallel to divide by.
        assert torch.allclose(own.grad / world, share(0, whole.grad, UNEVEN), atol=1e-6)
    else:
        assert own.grad is None

    # Half precision, of which some ranks may know nothing.
    half = embeddings.bfloat16().requires_grad_()
    plain.zero_grad(), sharded.zero_grad()
    expected = plain(half, labels)
    expected.backward()
    own_half = share(rank, half.detach(), UNEVEN)
    own_half = (own_half.float() if rank == 0 else own_half).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sharded(own_half, own_labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected)
    assert torch.allclose(sharded.centers.grad.full_tensor(), plain.centers.grad, atol=1e-6)

    # With other losses, each rank's own or not.
    both = MultipleLosses([make(reducer=DoNothingReducer()), make()])
    assert "loss" in both.losses[0](own, own_labels)
    assert len(both.losses[0](own, own_labels)["loss"]["losses"]) == N

    # Whole state dicts are those of one process.
    average = make(center_update="ema")
    average(own, own_labels)
    for loss_func in (sharded, average):
        plain = make(CenterContrastiveLoss, center_update=loss_func.center_update)
        plain.load_state_dict(whole_state(loss_func))
        for value in plain.state_dict().values():
            value += 1
        again = make(center_update=loss_func.center_update)
        set_whole_state(again, plain.state_dict())
        for name, value in whole_state(again).items():
            assert torch.equal(value, plain.state_dict()[name])
    assert repr(sharded).startswith("ShardedCenterContrastiveLoss")


@WORLDS
def test_statistics_logits_types_and_state_dicts_equal_one_process(world, tmp_path):
    run_processes(several_things, tmp_path, world_size=world)


# ---- Miners.


def mined(rank: int) -> dict[str, torch.Tensor]:
    x, labels = batch()
    embeddings = encoder()(x).detach()
    own, own_labels = share(rank, embeddings), share(rank, labels)
    miner = MultiSimilarityMiner(epsilon=0.0)
    tuples = {
        "all": DistributedMinerWrapper(miner)(own, own_labels),
        "efficient": DistributedMinerWrapper(miner, efficient=True)(own, own_labels),
        "triplets": DistributedMinerWrapper(BatchEasyHardMiner())(own, own_labels),
        "own": miner(own, own_labels),
        "nothing": (torch.empty(0, dtype=torch.long),) * 4,
    }
    loss_func = make(reducer=DoNothingReducer())
    return {
        name: loss_func(own, own_labels, indices)["loss"]["losses"].detach()
        for name, indices in tuples.items()
    }


@WORLDS
def test_a_miners_tuple_weights_the_samples_as_in_one_process(world, tmp_path):
    x, labels = batch()
    embeddings = encoder()(x).detach()
    miner = MultiSimilarityMiner(epsilon=0.0)
    starts = torch.arange(0, N, N // world)
    own = [miner(x, y) for x, y in zip(embeddings.chunk(world), labels.chunk(world), strict=True)]
    tuples = {
        "all": miner(embeddings, labels),
        "efficient": miner(embeddings, labels),
        "triplets": BatchEasyHardMiner()(embeddings, labels),
        "own": tuple(
            torch.cat([start + i for start, i in zip(starts, indices, strict=True)])
            for indices in zip(*own, strict=True)
        ),
        "nothing": None,
    }
    loss_func = make(CenterContrastiveLoss, reducer=DoNothingReducer())
    for rank in run_processes(mined, tmp_path, world_size=world):
        for name, indices in tuples.items():
            expected = loss_func(embeddings, labels, indices)["loss"]["losses"].detach()
            assert torch.allclose(rank[name], expected, atol=1e-6), name


# ---- Checkpoints.


def go_on(
    rank: int | None, folder: str, steps: list[int], center_update: str, resume: bool
) -> dict[str, torch.Tensor]:
    """Load, train for these steps, save; in the one process, without a process group."""
    loss_class = CenterContrastiveLoss if rank is None else ShardedCenterContrastiveLoss
    model, loss_func = encoder(), make(loss_class, center_update=center_update)
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
            x, labels = share(rank, x, UNEVEN), share(rank, labels, UNEVEN)
        optimizer.zero_grad()
        loss_func(network(x), labels).backward()
        optimizer.step()
    modules, states = get_state_dict(everything, optimizer)
    dcp.save({"modules": modules, "optimizer": states}, checkpoint_id=folder)
    return whole_state(loss_func)


# "ema" leaves a parameter group of the optimizer empty.
NO_PARAMETERS = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="set_state_dict loses the settings of empty groups"
)


@pytest.mark.parametrize("center_update", ["gradient", pytest.param("ema", marks=NO_PARAMETERS)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")
def test_checkpoints_go_on_at_another_world_size(tmp_path, center_update):
    steps = iter(range(10))
    for world in (2, 4, 1, 4, 2):
        found = run_processes(
            go_on,
            tmp_path,
            str(tmp_path / "checkpoint"),
            [next(steps), next(steps)],
            center_update,
            (tmp_path / "checkpoint").exists(),
            world_size=world,
        )[0]
    expected = go_on(None, str(tmp_path / "whole"), list(range(10)), center_update, resume=False)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6)
    # And into one process, which knows nothing of ranks.
    alone = go_on(None, str(tmp_path / "checkpoint"), [10], center_update, resume=True)
    expected = go_on(None, str(tmp_path / "whole"), [10], center_update, resume=True)
    for name, value in expected.items():
        assert torch.allclose(alone[name], value, rtol=1e-6, atol=1e-6)


# ---- Where the centers come from.


def first_state(rank: int) -> dict:
    torch.manual_seed(3)
    loss_func = ShardedCenterContrastiveLoss(4, D)
    after = torch.rand(1)
    torch.manual_seed(3)
    again = ShardedCenterContrastiveLoss(4, D)
    torch.manual_seed(4 + rank)
    own = ShardedCenterContrastiveLoss(4, D)
    ones = ShardedCenterContrastiveLoss(4, D, weight_init_func=nn.init.ones_)
    return {
        "centers": loss_func.centers.full_tensor().detach(),
        "again": again.centers.full_tensor().detach(),
        "other seeds": own.centers.full_tensor().detach(),
        "ones": ones.centers.full_tensor().detach(),
        "after": after,
        "classes": (loss_func.first_class, len(loss_func.centers.to_local())),
    }


def test_ranks_with_one_seed_draw_different_centers(tmp_path):
    first, second = run_processes(first_state, tmp_path)
    assert (first["classes"], second["classes"]) == ((0, 2), (2, 2))
    for key in ("centers", "again", "ones", "other seeds"):
        assert torch.equal(first[key], second[key])
    assert torch.equal(first["centers"], first["again"])
    assert len(torch.unique(first["centers"])) == 4 * D
    assert len(torch.unique(first["other seeds"])) == 4 * D
    assert not torch.equal(first["centers"], first["other seeds"])
    assert (first["ones"] == 1).all()
    assert torch.equal(first["after"], second["after"])  # the ranks' own draws stay in step


# ---- No rank holds what one process would.


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                self.numel = max(self.numel, x.numel())
        return result


def largest_tensors(rank: int, classes: int, size: int) -> int:
    loss_func = ShardedCenterContrastiveLoss(classes, size, label_smoothing=0.1, collect_stats=True)
    average = ShardedCenterContrastiveLoss(classes, size, center_update="ema")
    torch.manual_seed(rank)
    x = torch.randn(8, size, requires_grad=True)
    labels = torch.randint(classes, (8,))
    with LargestTensor() as largest:
        loss_func(x, labels).backward()
        average(x, labels).backward()
    return largest.numel


@pytest.mark.parametrize(("classes", "size"), [(64, 128), (4096, 2)])
def test_no_rank_makes_all_centers_or_all_logits(tmp_path, classes, size):
    batch_size = 2 * 8
    for largest in run_processes(largest_tensors, tmp_path, classes, size):
        assert largest <= max(classes // 2 * size, batch_size * classes // 2)
        assert largest < max(classes * size, batch_size * classes)


# ---- Errors: on all ranks, before anything moves.


def bad_inputs(rank: int) -> dict[str, list[str]]:
    x, labels = batch()
    x = share(rank, encoder()(x).detach())
    labels = share(rank, labels)
    bad = rank == 1
    too_large = labels.clone()
    too_large[3] = C
    pairs = (torch.tensor([0]), torch.tensor([1]))
    same = (torch.ones(4, D), torch.zeros(4, dtype=torch.long))
    calls = {
        "label": lambda f: f(x, too_large if bad else labels),
        "labels": lambda f: f(x, None if bad else labels),
        "float labels": lambda f: f(x, labels.float() if bad else labels),
        "rows": lambda f: f(x, labels[1:] if bad else labels),
        "size": lambda f: f(x[:, :3] if bad else x, labels),
        "type": lambda f: f(x.long() if bad else x, labels),
        "nothing": lambda f: f(None if bad else x, labels),
        "device": lambda f: f(x.to("meta") if bad else x, labels),
        "references": lambda f: f(x, labels, ref_emb=x if bad else None),
        "index": lambda f: f(x, labels, (torch.tensor([N if bad else 0]), pairs[1])),
        "negative index": lambda f: f(x, labels, (torch.tensor([-1 if bad else 0]), pairs[1])),
        "mined": lambda f: f(x, labels, pairs if bad else None),
        "same batch": lambda f: f(*same),
        "wrapper": lambda f: DistributedLossWrapper(f)(x, labels),
        "efficient wrapper": lambda f: DistributedLossWrapper(f, efficient=True)(x, labels),
        "logits": lambda f: f.get_logits(x[:, :3] if bad else x),
    }
    found = {name: [] for name in calls}
    for loss_func in (make(), make(center_update="ema")):
        loss_func(x, labels)
        before = whole_state(loss_func)
        for name, call in calls.items():
            with pytest.raises(Exception) as raised:  # noqa: PT011
                call(loss_func)
            found[name].append(f"{raised.type.__name__}: {raised.value}")
        with torch.set_grad_enabled(not bad), pytest.raises(ValueError, match="got") as raised:
            loss_func(x, labels)
        found.setdefault("gradients", []).append(str(raised.value))
        with pytest.raises(ValueError, match="got") as raised:
            loss_func.train(not bad)(x, labels)
        found.setdefault("mode", []).append(str(raised.value))
        loss_func.train()
        for name, value in whole_state(loss_func).items():
            assert torch.equal(value, before[name])
        loss_func(x, labels)  # and the ranks are still in step
    return found


BAD_INPUTS = {
    "label": rf"labels must lie in \[0, {C}\), got {C} at index 3",
    "labels": "labels are required",
    "float labels": r"labels must be integers, got torch\.float32",
    "rows": "Number of embeddings must equal number of labels",
    "size": rf"embeddings must have shape \(batch_size, {D}\), got \(8, 3\)",
    "type": r"embeddings must be floating-point numbers, got torch\.int64",
    "nothing": "'NoneType' object has no attribute",
    "device": "embeddings must be on cpu, as the centers are, got meta",
    "references": "ref_emb is not supported",
    "efficient wrapper": "ref_emb is not supported",
    "logits": rf"embeddings must have shape \(batch_size, {D}\), got \(8, 3\)",
}
DISAGREEMENTS = {
    "negative index": rf"indices_tuple must lie in \[0, {N}\).* got -1 on rank 1$",
    "index": rf"indices_tuple must lie in \[0, {N}\).* got {N} on rank 1$",
    "mined": r"whether there is an indices_tuple must be the same.* \[False, True\]$",
    "same batch": "all ranks have the same batch",
    "wrapper": "all ranks have the same batch.* no DistributedLossWrapper",
    "gradients": r"is_grad_enabled\(\) must be the same on all ranks, got \[True, False\]$",
    "mode": r"training mode must be the same on all ranks, got \[True, False\]$",
}


def test_an_input_that_one_rank_refuses_raises_on_all(tmp_path):
    first, second = run_processes(bad_inputs, tmp_path)
    for name, message in BAD_INPUTS.items():
        for there, here in zip(first[name], second[name], strict=True):
            assert re.search(f"Error: {message}", here), (name, here)
            if name != "efficient wrapper":  # which is wrong on both
                assert re.search(f"ValueError: rank 1: {message}", there), (name, there)
    for name, message in DISAGREEMENTS.items():
        for text in first[name] + second[name]:
            assert re.search(message, text), (name, text)


def bad_settings(rank: int) -> None:
    with pytest.raises(ValueError, match="weight_regularizer is not supported with sharded"):
        ShardedCenterContrastiveLoss(C, D, weight_regularizer=LpRegularizer())
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got 0"):
        ShardedCenterContrastiveLoss(C, D, scale=0)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match=r"must have one dimension, got shape \(2, 1\)"):
        ShardedCenterContrastiveLoss(C, D, device_mesh=mesh)
    # Some of the ranks, or a group of them, will do.
    x, labels = batch(rank)
    groups = [dist.new_group([0]), dist.new_group([1])]
    mesh = dist.device_mesh.DeviceMesh.from_group(groups[rank], "cpu")
    loss_func = ShardedCenterContrastiveLoss(C, D, device_mesh=mesh)
    assert loss_func.centers.to_local().shape == (C, D)
    plain = CenterContrastiveLoss(C, D)
    plain.load_state_dict(whole_state(loss_func))
    embeddings = encoder()(x)
    assert torch.allclose(loss_func(embeddings, labels), plain(embeddings, labels))


def test_bad_settings_are_named_and_groups_are_taken(tmp_path):
    run_processes(bad_settings, tmp_path)


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"torchrun .*init_process_group.* CenterContrastiveL"):
        ShardedCenterContrastiveLoss(C, D)
