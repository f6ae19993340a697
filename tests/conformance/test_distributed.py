"""torch.distributed: two processes must get the same result as one with the whole batch."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo  # DistributedDataParallel needs it. Imported before the processes fork.
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

WORLD_SIZE, BATCH_SIZE = 2, 16

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
    pytest.mark.filterwarnings("ignore:num_neighbors"),
]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, EMBEDDING_SIZE)


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    return torch.randn(BATCH_SIZE, 5, generator=generator), labels


def rank_chunk(rank: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The rank's rows of the batch."""
    return [t.chunk(WORLD_SIZE)[rank] for t in tensors]


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(p.grad.flatten() for p in module.parameters())])


def make(component, model, **kwargs):
    """A new instance, after the first epoch if it has a teacher, so that distillation is active."""
    instance = component.make(models=[model], **kwargs)
    if component.observes_network:
        instance.end_epoch()
    return instance


def make_without_randomness(component, model):
    """A new instance whose results do not depend on random draws, which differ between ranks."""
    return make(component, model, **(component.without_randomness or {}))


def two_steps(component, model, embed, loss_func, rank=None):
    """The second loss, and the gradients of both. The second step depends on the updated state."""
    for step in range(2):
        x, labels = batch(step) if rank is None else rank_chunk(rank, *batch(step))
        loss = component.use(loss_func, embed(x), labels)
        loss.backward()
    return loss.detach(), gradients(model), gradients(loss_func)


def steps_in_wrapper(rank: int, component):
    model = encoder()
    loss_func = DistributedLossWrapper(make_without_randomness(component, model))
    return two_steps(component, model, DistributedDataParallel(model), loss_func, rank)


@pytest.mark.components_with(supports_distributed_wrapper=True)
def test_loss_wrapper_gives_the_result_of_one_process(loss_component, tmp_path):
    model = encoder()
    loss_func = make_without_randomness(loss_component, model)
    loss, grads, loss_grads = two_steps(loss_component, model, model, loss_func)
    results = run_processes(steps_in_wrapper, tmp_path, loss_component)
    for rank_loss, rank_grads, rank_loss_grads in results:
        # The wrapper multiplies by the world size, because DDP divides by it.
        assert torch.allclose(rank_loss / WORLD_SIZE, loss, rtol=1e-5)
        assert torch.allclose(rank_grads, grads, rtol=1e-4, atol=1e-6)
        assert torch.allclose(rank_loss_grads / WORLD_SIZE, loss_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_efficient", [False, True])
@pytest.mark.components_with(supports_distributed_wrapper=False)
def test_loss_wrapper_refuses_unsupported_losses(loss_component, is_efficient):
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(loss_component.make(), efficient=is_efficient)


def step_in_efficient_wrapper(rank: int, component):
    model = encoder()
    x, labels = rank_chunk(rank, *batch())
    loss_func = DistributedLossWrapper(make_without_randomness(component, model), efficient=True)
    return component.use(loss_func, model(x), labels).detach()


def pairs_of(rows: range, labels):
    """All pairs with an anchor in ``rows``. Anchors are numbered from the first of these rows."""
    a1, p, a2, n = lmu.get_all_pairs_indices(labels)
    of_1, of_2 = ((rows[0] <= a) & (a <= rows[-1]) for a in (a1, a2))
    return a1[of_1] - rows[0], p[of_1], a2[of_2] - rows[0], n[of_2]


@pytest.mark.components_with(supports_distributed_wrapper=True, takes_references=True)
def test_efficient_wrapper_compares_own_rows_with_the_whole_batch(loss_component, tmp_path):
    # Each process averages over the active pairs of its own rows, so the expected loss is computed
    # per process.
    model = encoder()
    x, labels = batch()
    embeddings = model(x)
    for rank, loss in enumerate(run_processes(step_in_efficient_wrapper, tmp_path, loss_component)):
        (indices,) = rank_chunk(rank, torch.arange(BATCH_SIZE))
        rows = range(indices[0], indices[-1] + 1)
        local, local_labels = rank_chunk(rank, embeddings, labels)
        pairs = pairs_of(rows, labels)
        loss_func = make_without_randomness(loss_component, model)
        expected = loss_func(local, local_labels, pairs, embeddings, labels)
        assert torch.allclose(loss / WORLD_SIZE, expected, rtol=1e-5)


def error_of_efficient_wrapper(rank: int, component):
    try:
        step_in_efficient_wrapper(rank, component)
    except ValueError as error:
        return {"message": str(error)}
    return {}


@pytest.mark.components_with(supports_distributed_wrapper=True, takes_references=False)
def test_efficient_wrapper_is_refused_if_references_are(loss_component, tmp_path):
    for result in run_processes(error_of_efficient_wrapper, tmp_path, loss_component):
        assert re.search("not (currently )?supported", result["message"])


NUM_FIRST = {"unwrapped": 6, "one rank empty": BATCH_SIZE}  # samples on the first rank


def state_after_steps(rank: int, component, setup: str):
    model = encoder()
    instance = make(component, model)
    called = instance
    if setup not in NUM_FIRST:
        called = DistributedLossWrapper(instance, setup == "efficient")
    for step in range(5):
        x, labels = batch(step)
        if setup in NUM_FIRST:
            first = NUM_FIRST[setup]
            local = (x[:first], labels[:first]) if rank == 0 else (x[first:], labels[first:])
        else:
            local = rank_chunk(rank, x, labels)
        component.use(called, model(local[0]), local[1])
    return instance.state_dict()


def check_synced_buffers(component, setup, tmp_path):
    model = encoder()
    instance = make(component, model)
    for step in range(5):
        x, labels = batch(step)
        component.use(instance, model(x), labels)
    first, second = run_processes(state_after_steps, tmp_path, component, setup)
    equal = {key for key, _ in instance.named_buffers() if torch.equal(first[key], second[key])}
    assert equal == set(component.synced_buffers)
    for key in component.synced_buffers:
        assert torch.allclose(first[key], instance.state_dict()[key], atol=1e-6)


def test_synced_buffers_are_bitwise_equal_in_all_processes(component, tmp_path):
    check_synced_buffers(component, "unwrapped", tmp_path)


@pytest.mark.components_with(synced_buffers=True)
def test_a_rank_without_samples_does_not_block_the_others(component, tmp_path):
    check_synced_buffers(component, "one rank empty", tmp_path)


@pytest.mark.components_with(synced_buffers=True, supports_distributed_wrapper=True)
def test_synced_buffers_are_equal_in_the_loss_wrapper(loss_component, tmp_path):
    check_synced_buffers(loss_component, "wrapped", tmp_path)


@pytest.mark.components_with(
    synced_buffers=True, supports_distributed_wrapper=True, takes_references=True
)
def test_synced_buffers_are_equal_in_the_efficient_loss_wrapper(loss_component, tmp_path):
    check_synced_buffers(loss_component, "efficient", tmp_path)


def mine_in_wrapper(rank: int, component, is_efficient: bool):
    x, labels = rank_chunk(rank, *batch())
    with torch.no_grad():
        return DistributedMinerWrapper(component.make(), efficient=is_efficient)(
            encoder()(x), labels
        )


@pytest.mark.parametrize("is_efficient", [False, True])
def test_miner_wrapper_finds_the_pairs_of_the_whole_batch(miner_component, is_efficient, tmp_path):
    x, labels = batch()
    whole_batch = lmu.convert_to_pairs(miner_component.make()(encoder()(x), labels), labels)

    def pairs(anchors, others):
        return set(zip(anchors.tolist(), others.tolist(), strict=True))

    results = run_processes(mine_in_wrapper, tmp_path, miner_component, is_efficient)
    for rank, found in enumerate(results):
        # Each process numbers its own rows first.
        order = torch.arange(BATCH_SIZE).roll(-rank * (BATCH_SIZE // WORLD_SIZE))
        found = [order[i] for i in lmu.convert_to_pairs(found, labels)]
        for first in (0, 2):
            expected = pairs(*whole_batch[first : first + 2])
            if is_efficient:
                local = set(order[: BATCH_SIZE // WORLD_SIZE].tolist())
                expected = {(a, b) for a, b in expected if a in local}
            assert pairs(*found[first : first + 2]) == expected


def distill_around_wrapper(rank: int, component):
    model = encoder()
    loss_func = make(component, model)
    loss_func.loss = DistributedLossWrapper(loss_func.loss)
    x, labels = rank_chunk(rank, *batch())
    with torch.no_grad():
        model.weight += 0.3 * torch.eye(EMBEDDING_SIZE, 5)
    component.use(loss_func, model(x), labels).backward()
    return gradients(model)


@pytest.mark.components_with(observes_network=True)
def test_distillation_can_wrap_the_loss_wrapper(loss_component, tmp_path):
    grads = run_processes(distill_around_wrapper, tmp_path, loss_component)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
