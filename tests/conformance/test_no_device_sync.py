"""A training step must not make the host wait for the GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES
from .test_precision_and_compile import FUNCTIONS, inputs  # noqa: F401

# Operations that read values, or whose output size depends on values.
SYNCHRONIZING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.equal.default,
}


class NoSync(TorchDispatchMode):
    """Fails on operations that synchronize with the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in SYNCHRONIZING, function
        if function is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, "indexing with a mask: the output size depends on values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_do_not_synchronize(name, inputs):  # noqa: F811
    torch._dynamo.reset()
    with NoSync():
        value = FUNCTIONS[name](*inputs)
        if value.requires_grad:
            value.sum().backward()


@pytest.mark.parametrize(
    "synchronize", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.unique]
)
def test_synchronization_is_detected(synchronize):
    with pytest.raises(AssertionError), NoSync():
        synchronize(torch.randn(5))


def move(component, loss_func, device):
    loss_func.to(device)
    if component.observes_network:
        loss_func.teacher._trunk.to(device)
        loss_func.teacher.network.to(device)


def steps(component, loss_func, x, labels, count):
    for _ in range(count):
        component.call(loss_func, x.clone().requires_grad_(), labels).backward()


class OneDevice(TorchDispatchMode):
    """Fails on mixed devices, which many functions accept if one is the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.ndim > 0}
        assert len(devices) < 2, (function, devices)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def meta_step(x, labels):
    """A training step on the meta device, where tensors have a shape but no values."""

    def step(component):
        loss_func = component.make(NUM_CLASSES, EMBEDDING_SIZE)
        steps(component, loss_func, x, labels, 2)  # the first step checks the batch and may warn
        move(component, loss_func, "meta")
        meta_inputs = x.to("meta"), labels.to("meta")
        with OneDevice():
            steps(component, loss_func, *meta_inputs, 1)

    return step


def test_mixed_devices_are_detected():
    table, y = torch.randn(6, 8), torch.arange(3, device="meta")
    with pytest.raises(AssertionError, match="index"), OneDevice():
        table[y]


@pytest.mark.components_with(syncs_device=False)
def test_losses_do_not_read_values(loss_component, meta_step):
    meta_step(loss_component)


@pytest.mark.components_with(syncs_device=True)
def test_losses_that_synchronize_read_values(loss_component, meta_step):
    with pytest.raises(RuntimeError, match=r"nonzero|item\(\)"):
        meta_step(loss_component)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.components_with(syncs_device=False)
def test_losses_do_not_synchronize_on_a_gpu(loss_component, x, labels):
    loss_func = loss_component.make(NUM_CLASSES, EMBEDDING_SIZE)
    move(loss_component, loss_func, "cuda")
    x, labels = x.cuda(), labels.cuda()
    steps(loss_component, loss_func, x, labels, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(loss_component, loss_func, x, labels, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
