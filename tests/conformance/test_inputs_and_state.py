"""Contracts on what goes in and what is kept."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from record_keeper import RecordKeeper, RecordWriter
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = {
    torch.float64: 1e-5,  # of the float32 run it is compared with
    torch.float32: 0,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def as_tensors(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def assert_same(actual, expected):
    for a, e in zip(as_tensors(actual), as_tensors(expected), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_agree_with_float32(loss_component, x, labels, dtype):
    x = x.to(dtype)
    expected = loss_component.call(loss_component.make(), x.float(), labels)
    x.requires_grad_()
    actual = loss_component.call(loss_component.make(), x, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    actual.backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_keep_parameters_and_buffers(component, x, labels, dtype):
    thing = component.make()
    kinds = {name: t.dtype for name, t in [*thing.named_parameters(), *thing.named_buffers()]}
    output = component.call(thing, x.to(dtype), labels)
    kept = {name: t.dtype for name, t in [*thing.named_parameters(), *thing.named_buffers()]}
    assert (kept == kinds) == (component.keeps_dtypes or dtype == torch.float32)
    assert all(t.isfinite().all() for t in as_tensors(output) if t.is_floating_point())


def test_layout_of_memory_does_not_matter(any_component, x, labels):
    expected = any_component.call(any_component.make(), x, labels)
    wide = torch.stack([x.T, torch.randn_like(x.T)], 2)
    strided = wide[..., 0].T
    assert not strided.is_contiguous()
    padded_labels = torch.stack([labels, labels + 1], 1)[:, 0]
    assert not padded_labels.is_contiguous()
    actual = any_component.call(any_component.make(), strided, padded_labels)
    for a, e in zip(as_tensors(actual), as_tensors(expected), strict=True):
        assert torch.allclose(a, e, atol=1e-6)


def test_inputs_without_gradient(any_component, x, labels):
    expected = any_component.call(any_component.make(), x.clone().requires_grad_(), labels)
    assert_same(any_component.call(any_component.make(), x, labels), expected)
    with torch.no_grad():
        any_component.call(any_component.make(), x, labels)


def test_inputs_are_not_changed(any_component, x, labels):
    before = x.clone(), labels.clone()
    any_component.call(any_component.make(), x, labels)
    assert_same((x, labels), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_any_integer_type(component, x, labels, dtype):
    expected = component.call(component.make(), x, labels)
    assert_same(component.call(component.make(), x, labels.to(dtype)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no GPU here")
def test_labels_on_another_device(component, x, labels):
    component.call(component.make().cuda(), x.cuda(), labels)


def warmed(component, x, labels, **kwargs):
    thing = component.make(**kwargs)
    for _ in range(2):
        component.call(thing, x, labels)
    return thing


class Draws(TorchDispatchMode):
    """Notes whether anything is drawn at random."""

    noted = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.noted |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def test_random_draws_are_stated(component, x, labels):
    thing = warmed(component, x, labels)
    with Draws() as draws:
        component.call(thing, x, labels)
    assert draws.noted == (component.without_draws is not None)


def test_state_dict_round_trip(component, x, labels):
    thing = warmed(component, x, labels)
    file = io.BytesIO()
    torch.save(thing.state_dict(), file)
    file.seek(0)
    restored = component.make(seed=99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert_same(
            component.call(restored, x.roll(1, 0), labels),
            component.call(thing, x.roll(1, 0), labels),
        )


def test_deep_copy_goes_its_own_way(component, x, labels):
    thing = warmed(component, x, labels)
    copied = copy.deepcopy(thing)
    buffers = [b.clone() for b in thing.buffers()]
    embeddings = component.embed(thing, x.roll(1, 0))  # once: copies watch the same network
    actual = component.use(copied, embeddings, labels)
    assert_same(list(thing.buffers()), buffers)
    assert_same(actual, component.use(thing, embeddings, labels))


def ours_in(thing):
    """What of this package is in a component, the attached regularizer among it.

    A wrapper of PML's whose constructor we left alone shows and records what PML would.
    """
    modules = thing.modules() if isinstance(thing, torch.nn.Module) else [thing]
    return [m for m in modules if type(m).__init__.__module__.startswith("pml_extras")]


def test_repr_shows_all_settings(any_component):
    for module in ours_in(any_component.make()):
        parameters = inspect.signature(type(module)).parameters.values()
        settings = [
            p.name
            for p in parameters
            if p.kind is not p.VAR_KEYWORD and p.name not in ("loss", "teacher", "generator")
        ]
        for name in settings:
            assert f"{name}={getattr(module, name)!r}" in repr(module)


def test_stats_only_when_asked_for_and_then_finite_numbers(component, x, labels):
    silent = warmed(component, x, labels)
    assert not any(hasattr(m, "_record_these_stats") for m in ours_in(silent))
    talking = warmed(component, x, labels, collect_stats=True)
    for module in ours_in(talking):
        for name in getattr(module, "_record_these_stats", []):
            value = getattr(module, name)
            assert type(value) in (int, float), name
            assert value == value
            assert abs(value) < float("inf")


def test_stats_do_not_change_the_result(component, x, labels):
    silent, talking = (warmed(component, x, labels, collect_stats=on) for on in (False, True))
    assert_same(component.call(talking, x, labels), component.call(silent, x, labels))


def test_record_keeper_takes_settings_and_stats(component, x, labels, tmp_path):
    keeper = RecordKeeper(
        record_writer=RecordWriter(str(tmp_path)),
        attributes_to_search_for=["_record_these", "_record_these_stats"],
    )
    thing = warmed(component, x, labels, collect_stats=True)
    for iteration in range(2):
        keeper.update_records(
            {"metric_loss": thing}, iteration, recursive_types=[torch.nn.Module, dict]
        )
        keeper.save_records()
    recorded = " ".join(path.read_text() for path in tmp_path.glob("*.csv"))
    for module in ours_in(thing):
        for name in module._record_these:
            assert name in recorded


def test_trains(loss_component, x, labels):
    x.requires_grad_()
    thing = loss_component.make()
    parameters = [x, *thing.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    before = x.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss_component.call(thing, x, labels).backward()
        optimizer.step()
    assert x.isfinite().all()
    assert not torch.equal(x.detach(), before)
