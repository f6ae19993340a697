"""Contracts under torch.distributed: two real processes against one with the joined batch."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo  # which DistributedDataParallel imports: once here, or in every process
import torch.distributed as dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.processes import run_processes

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES

WORLD, N = 2, 16

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
    pytest.mark.filterwarnings("ignore:num_neighbors"),
]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, EMBEDDING_SIZE)


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(NUM_CLASSES, (N,), generator=generator)
    return torch.randn(N, 5, generator=generator), labels


def share(rank: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.chunk(WORLD)[rank] for t in tensors]


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(p.grad.flatten() for p in module.parameters())])


def make(component, model, **kwargs):
    """One in an epoch in which it asks its teacher, if it has one."""
    thing = component.make(models=[model], **kwargs)
    if component.watches_a_network:
        thing.end_epoch()
    return thing


def make_without_draws(component, model):
    """One that can be compared: processes draw differently."""
    return make(component, model, **(component.without_draws or {}))


def two_steps(component, model, embed, loss_func, rank=None):
    """The second loss, and the gradients of both: what the first left behind must agree too."""
    for step in range(2):
        x, labels = batch(step) if rank is None else share(rank, *batch(step))
        loss = component.use(loss_func, embed(x), labels)
        loss.backward()
    return loss.detach(), gradients(model), gradients(loss_func)


def wrapped(rank: int, component):
    model = encoder()
    loss_func = DistributedLossWrapper(make_without_draws(component, model))
    return two_steps(component, model, DistributedDataParallel(model), loss_func, rank)


@pytest.mark.stating(goes_in_distributed_wrapper=True)
def test_loss_wrapper_equals_one_process(loss_component, tmp_path):
    model = encoder()
    loss_func = make_without_draws(loss_component, model)
    loss, grads, own_grads = two_steps(loss_component, model, model, loss_func)
    for rank_loss, rank_grads, rank_own_grads in run_processes(wrapped, tmp_path, loss_component):
        # The wrapper multiplies by the number of processes, for DDP to divide by.
        assert torch.allclose(rank_loss / WORLD, loss, rtol=1e-5)
        assert torch.allclose(rank_grads, grads, rtol=1e-4, atol=1e-6)
        assert torch.allclose(rank_own_grads / WORLD, own_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_efficient", [False, True])
@pytest.mark.stating(goes_in_distributed_wrapper=False)
def test_loss_wrapper_refuses_the_others(loss_component, is_efficient):
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(loss_component.make(), efficient=is_efficient)


def efficient(rank: int, component):
    model = encoder()
    x, labels = share(rank, *batch())
    loss_func = DistributedLossWrapper(make_without_draws(component, model), efficient=True)
    return component.use(loss_func, model(x), labels).detach()


def pairs_of(rows: range, labels):
    """All pairs whose anchor is one of these rows, which then count from 0."""
    a1, p, a2, n = lmu.get_all_pairs_indices(labels)
    of_1, of_2 = ((rows[0] <= a) & (a <= rows[-1]) for a in (a1, a2))
    return a1[of_1] - rows[0], p[of_1], a2[of_2] - rows[0], n[of_2]


@pytest.mark.stating(goes_in_distributed_wrapper=True, takes_references=True)
def test_efficient_wrapper_is_the_rows_of_the_joined_batch(loss_component, tmp_path):
    # Each process compares its rows with all: together they are the whole, up to the pairs' means
    # over active pairs, which each process takes over its own.
    model = encoder()
    x, labels = batch()
    embeddings = model(x)
    for rank, loss in enumerate(run_processes(efficient, tmp_path, loss_component)):
        rows = range(N)[rank * N // WORLD : (rank + 1) * N // WORLD]
        own, own_labels = share(rank, embeddings, labels)
        pairs = pairs_of(rows, labels)
        loss_func = make_without_draws(loss_component, model)
        expected = loss_func(own, own_labels, pairs, embeddings, labels)
        assert torch.allclose(loss / WORLD, expected, rtol=1e-5)


def refused_when_efficient(rank: int, component):
    try:
        efficient(rank, component)
    except ValueError as error:
        return {"message": str(error)}
    return {}


@pytest.mark.stating(goes_in_distributed_wrapper=True, takes_references=False)
def test_efficient_wrapper_is_refused_without_references(loss_component, tmp_path):
    for result in run_processes(refused_when_efficient, tmp_path, loss_component):
        assert re.search("not (currently )?supported", result["message"])


UNEVEN = {"alone": 6, "one empty": N}  # the first rank's samples


def state_after_steps(rank: int, component, way: str):
    model = encoder()
    thing = make(component, model)
    shown = thing if way in UNEVEN else DistributedLossWrapper(thing, way == "efficient")
    for step in range(5):
        x, labels = batch(step)
        if way in UNEVEN:
            first = UNEVEN[way]
            own = (x[:first], labels[:first]) if rank == 0 else (x[first:], labels[first:])
        else:
            own = share(rank, x, labels)
        component.use(shown, model(own[0]), own[1])
    return thing.state_dict()


def check_averages(component, way, tmp_path):
    model = encoder()
    thing = make(component, model)
    for step in range(5):
        x, labels = batch(step)
        component.use(thing, model(x), labels)
    first, second = run_processes(state_after_steps, tmp_path, component, way)
    equal = {key for key, _ in thing.named_buffers() if torch.equal(first[key], second[key])}
    assert equal == set(component.synced_buffers)
    for key in component.synced_buffers:
        assert torch.allclose(first[key], thing.state_dict()[key], atol=1e-6)


def test_averages_are_equal_to_the_last_bit_in_all_processes(component, tmp_path):
    check_averages(component, "alone", tmp_path)


@pytest.mark.stating(synced_buffers=True)
def test_an_empty_share_of_a_batch_keeps_nobody_waiting(component, tmp_path):
    check_averages(component, "one empty", tmp_path)


@pytest.mark.stating(synced_buffers=True, goes_in_distributed_wrapper=True)
def test_averages_are_equal_under_the_loss_wrapper(loss_component, tmp_path):
    check_averages(loss_component, "wrapped", tmp_path)


@pytest.mark.stating(synced_buffers=True, goes_in_distributed_wrapper=True, takes_references=True)
def test_averages_are_equal_under_the_efficient_loss_wrapper(loss_component, tmp_path):
    check_averages(loss_component, "efficient", tmp_path)


def mined(rank: int, component, is_efficient: bool):
    x, labels = share(rank, *batch())
    with torch.no_grad():
        return DistributedMinerWrapper(component.make(), efficient=is_efficient)(
            encoder()(x), labels
        )


@pytest.mark.parametrize("is_efficient", [False, True])
def test_miner_wrapper_finds_the_joined_batchs_pairs(miner_component, is_efficient, tmp_path):
    x, labels = batch()
    joined = lmu.convert_to_pairs(miner_component.make()(encoder()(x), labels), labels)

    def pairs(anchors, others):
        return set(zip(anchors.tolist(), others.tolist(), strict=True))

    for rank, found in enumerate(run_processes(mined, tmp_path, miner_component, is_efficient)):
        # Each process has its own rows first.
        order = torch.arange(N).roll(-rank * (N // WORLD))
        found = [order[i] for i in lmu.convert_to_pairs(found, labels)]
        for first in (0, 2):
            expected = pairs(*joined[first : first + 2])
            if is_efficient:
                own = set(order[: N // WORLD].tolist())
                expected = {(a, b) for a, b in expected if a in own}
            assert pairs(*found[first : first + 2]) == expected


def distilled(rank: int, component):
    model = encoder()
    loss_func = make(component, model)
    loss_func.loss = DistributedLossWrapper(loss_func.loss)
    x, labels = share(rank, *batch())
    with torch.no_grad():
        model.weight += 0.3 * torch.eye(EMBEDDING_SIZE, 5)
    component.use(loss_func, model(x), labels).backward()
    return gradients(model)


@pytest.mark.stating(watches_a_network=True)
def test_distillation_wraps_the_wrapper(loss_component, tmp_path):
    grads = run_processes(distilled, tmp_path, loss_component)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
