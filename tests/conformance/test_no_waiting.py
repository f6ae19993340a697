"""Contracts on what makes the host wait for a GPU: nothing does, inside a step."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.stating(waits_for_the_device=False)
def test_losses_do_not_wait_in_a_step(loss_component, x, labels):
    loss_func = loss_component.make(NUM_CLASSES, EMBEDDING_SIZE).cuda()
    x, labels = x.cuda().requires_grad_(), labels.cuda()
    for _ in range(2):  # the first step checks the batch, and warns
        loss_component.call(loss_func, x, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_component.call(loss_func, x, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
