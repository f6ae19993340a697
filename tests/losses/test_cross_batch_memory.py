"""How our CrossBatchMemory differs from PML's: what enters the memory, and what is saved."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses

from helpers.state import same_state, state_of
from pml_extras.losses import ContextualLoss, CrossBatchMemory

D, SIZE = 4, 24


def make_memory(loss=None, **kwargs):
    kwargs = {"memory_size": SIZE} | kwargs
    return CrossBatchMemory(loss or pml_losses.ContrastiveLoss(), D, **kwargs)


@pytest.fixture
def batch():
    return torch.randn(8, D, requires_grad=True), torch.arange(8) % 4


def batches(number):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, D, generator=generator), torch.arange(8) % 4) for _ in range(number)]


@pytest.mark.parametrize("masked", [False, True])
def test_training_equals_pml(masked):
    ours = make_memory()
    theirs = pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(), D, memory_size=SIZE)
    mask = torch.arange(8) < 5 if masked else None
    for x, labels in batches(7):
        assert ours(x, labels, enqueue_mask=mask) == theirs(x, labels, enqueue_mask=mask)
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)
    assert ours.queue_idx == theirs.queue_idx


def test_validation_compares_with_the_memory_and_enqueues_nothing(batch):
    memory, trained = make_memory(), make_memory()
    for x, labels in batches(5):
        memory(x, labels), trained(x, labels)
    before = state_of(memory)
    with torch.no_grad():
        loss = memory(*batch)
    assert memory.eval()(*batch) == loss
    assert same_state(state_of(memory), before)
    assert loss == trained(*batch)  # as a training batch would be compared


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_not_finite_stay_out(batch, value, masked):
    x, labels = batch
    mask = torch.arange(8) < 5 if masked else None
    memory, expected = make_memory(), make_memory()
    broken = x.detach().clone()
    broken[2, 1] = value
    kept = torch.arange(8) != 2 if mask is None else mask & (torch.arange(8) != 2)
    memory(broken, labels, enqueue_mask=mask)
    expected.add_to_memory(x.detach()[kept], labels[kept], int(kept.sum()))
    assert same_state(memory.state_dict(), expected.state_dict())
    assert memory(x, labels).isfinite()


def test_a_broken_batch_does_not_poison_the_memory(batch):
    memory = make_memory(ContextualLoss())
    memory(*batch)
    memory(torch.full((8, D), torch.nan), batch[1])
    assert memory(*batch).isfinite()
    assert memory.queue_idx == 16


def test_an_empty_mask_does_not_fill_the_memory(batch):
    memory = make_memory()
    memory(*batch)
    memory(*batch, enqueue_mask=torch.zeros(8, dtype=torch.bool))
    assert (memory.queue_idx, memory.has_been_filled) == (8, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_memory_takes_the_dtype_of_the_batch(batch, dtype):
    memory = make_memory(pml_losses.NTXentLoss())
    x = batch[0].detach().to(dtype)
    x[3] = torch.nan
    memory(x, batch[1].int())
    assert memory.embedding_memory.dtype == dtype
    assert memory.embedding_memory.isfinite().all()


def test_a_checkpoint_holds_tensors_and_resumes_the_position():
    memory, resumed = make_memory(), make_memory()
    for x, labels in batches(4):
        memory(x, labels)
    state = memory.state_dict()
    assert set(state) == {"embedding_memory", "label_memory", "queue_idx", "has_been_filled"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    resumed.load_state_dict(state)
    assert (resumed.queue_idx, resumed.has_been_filled) == (8, True)
    for x, labels in batches(4):
        assert memory(x, labels) == resumed(x, labels)


def test_a_checkpoint_of_pml_has_no_position():
    theirs = pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(), D, memory_size=SIZE)
    theirs(*batches(1)[0])
    memory = make_memory()
    with pytest.raises(RuntimeError, match=r"Missing key.*queue_idx"):
        memory.load_state_dict(theirs.state_dict())
    memory.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(memory.embedding_memory, theirs.embedding_memory)


def one_hot(labels):
    return torch.nn.functional.one_hot(labels)


INVALID = {
    "labels are required": lambda f, x, y: f(x, None),
    "labels must be a tensor, got list": lambda f, x, y: f(x, y.tolist()),
    "labels must be a tensor, got ndarray": lambda f, x, y: f(x, y.numpy()),
    r"labels must be integers, got torch\.float32": lambda f, x, y: f(x, y.float()),
    r"labels must have shape \(8,\), got \(8, 4\)": lambda f, x, y: f(x, one_hot(y)),
    r"labels must have shape \(8,\), got \(7,\)": lambda f, x, y: f(x, y[1:]),
    r"embeddings must have shape \(batch_size, 4\), got \(8, 4, 1\)": lambda f, x, y: f(
        x[..., None], y
    ),
    r"embeddings must have shape \(batch_size, 4\), got \(8, 3\)": lambda f, x, y: f(x[:, 1:], y),
    r"embeddings must be floating-point numbers, got torch\.int64": lambda f, x, y: f(x.long(), y),
    "embeddings must have at least one row": lambda f, x, y: f(x[:0], y[:0]),
    "a batch of 32 does not fit into memory_size=24": lambda f, x, y: f(
        x.repeat(4, 1), y.repeat(4)
    ),
    r"enqueue_mask must have shape \(8,\), got \(7,\)": lambda f, x, y: f(
        x, y, enqueue_mask=torch.ones(7, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_input_is_refused_before_anything_changes(batch, message):
    memory = make_memory()
    memory(*batch)
    before = state_of(memory)
    with pytest.raises(ValueError, match=message):
        INVALID[message](memory, *batch)
    assert same_state(state_of(memory), before)


def test_a_memory_in_float64_is_restored_exactly():
    loss_func, restored = make_memory(), make_memory()
    loss_func(torch.randn(8, D).double(), torch.arange(8) // 2)
    restored.load_state_dict(loss_func.state_dict())
    assert same_state(state_of(restored), state_of(loss_func))
