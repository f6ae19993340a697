"""Contracts on what makes the host wait for a GPU: nothing does, inside a step."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES
from .test_precision_and_compile import FUNCTIONS, inputs  # noqa: F401

# What has to know values, or a size that depends on them.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.equal.default,
}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITING, function
        if function is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, "a mask is a size that depends on values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_need_no_word_from_the_device(name, inputs):  # noqa: F811
    torch._dynamo.reset()
    with NoWaiting():
        value = FUNCTIONS[name](*inputs)
        if value.requires_grad:
            value.sum().backward()


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.unique])
def test_waiting_is_seen(waits):
    with pytest.raises(AssertionError), NoWaiting():
        waits(torch.randn(5))


def move(component, loss_func, device):
    loss_func.to(device)
    if component.watches_a_network:
        loss_func.teacher._trunk.to(device)
        loss_func.teacher.network.to(device)


def steps(component, loss_func, x, labels, count):
    for _ in range(count):
        component.call(loss_func, x.clone().requires_grad_(), labels).backward()


class OneDevice(TorchDispatchMode):
    """Finds what was left on another device: many functions take that from a meta tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.ndim > 0}
        assert len(devices) < 2, (function, devices)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def without_values(x, labels):
    """A component's step on a device whose tensors have shapes and no values to be read."""

    def step(component):
        loss_func = component.make(NUM_CLASSES, EMBEDDING_SIZE)
        steps(component, loss_func, x, labels, 2)  # the first checks the batch, and warns
        move(component, loss_func, "meta")
        there = x.to("meta"), labels.to("meta")
        with OneDevice():
            steps(component, loss_func, *there, 1)

    return step


def test_what_is_on_another_device_is_seen():
    table, y = torch.randn(6, 8), torch.arange(3, device="meta")
    with pytest.raises(AssertionError, match="index"), OneDevice():
        table[y]


@pytest.mark.stating(syncs_device=False)
def test_losses_get_by_without_values(loss_component, without_values):
    without_values(loss_component)


@pytest.mark.stating(syncs_device=True)
def test_those_that_wait_ask_for_values(loss_component, without_values):
    with pytest.raises(NotImplementedError, match="nonzero"):
        without_values(loss_component)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.stating(syncs_device=False)
def test_losses_do_not_wait_in_a_step(loss_component, x, labels):
    loss_func = loss_component.make(NUM_CLASSES, EMBEDDING_SIZE)
    move(loss_component, loss_func, "cuda")
    x, labels = x.cuda(), labels.cuda()
    steps(loss_component, loss_func, x, labels, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(loss_component, loss_func, x, labels, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
