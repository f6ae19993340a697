"""Inputs of all kinds, state_dicts, copies, repr and logged statistics."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from record_keeper import RecordKeeper, RecordWriter
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.state import same_state, state_of

TOLERANCE = {
    torch.float64: 1e-5,  # the rounding of the float32 run that it is compared with
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
def test_all_dtypes_give_the_loss_of_float32(loss_component, x, labels, dtype):
    x = x.to(dtype)
    expected = loss_component.call(loss_component.make(), x.float(), labels)
    x.requires_grad_()
    actual = loss_component.call(loss_component.make(), x, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    actual.backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def dtypes(instance):
    return {k: t.dtype for k, t in [*instance.named_parameters(), *instance.named_buffers()]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parameters_and_buffers_keep_their_dtypes(component, x, labels, dtype):
    instance = component.make()
    before = dtypes(instance)
    output = component.call(instance, x.to(dtype), labels)
    assert (dtypes(instance) == before) == (component.keeps_dtypes or dtype == torch.float32)
    assert all(t.isfinite().all() for t in as_tensors(output) if t.is_floating_point())


def test_memory_layout_does_not_matter(any_component, x, labels):
    expected = any_component.call(any_component.make(), x, labels)
    wide = torch.stack([x.T, torch.randn_like(x.T)], 2)
    strided = wide[..., 0].T
    assert not strided.is_contiguous()
    padded_labels = torch.stack([labels, labels + 1], 1)[:, 0]
    assert not padded_labels.is_contiguous()
    actual = any_component.call(any_component.make(), strided, padded_labels)
    for a, e in zip(as_tensors(actual), as_tensors(expected), strict=True):
        assert torch.allclose(a, e, atol=1e-6)


def test_works_without_gradients(any_component, x, labels):
    expected = any_component.call(any_component.make(), x.clone().requires_grad_(), labels)
    assert_same(any_component.call(any_component.make(), x, labels), expected)
    with torch.no_grad():
        any_component.call(any_component.make(), x, labels)


def test_inputs_are_not_changed(any_component, x, labels):
    before = x.clone(), labels.clone()
    any_component.call(any_component.make(), x, labels)
    assert_same((x, labels), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_may_have_any_integer_type(component, x, labels, dtype):
    expected = component.call(component.make(), x, labels)
    assert_same(component.call(component.make(), x, labels.to(dtype)), expected)


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy], ids=["list", "array"])
@pytest.mark.components_with(observes_network=False)
def test_labels_that_are_no_tensor_are_refused(component, x, labels, form):
    instance = component.make()
    before = state_of(instance)
    with pytest.raises(ValueError, match=r"labels must be a tensor, got (list|ndarray)"):
        component.call(instance, x, form(labels))
    assert same_state(state_of(instance), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_works_on_a_gpu(component, x, labels):
    component.call(component.make().cuda(), x.cuda(), labels)


def make_after_two_steps(component, x, labels, **kwargs):
    instance = component.make(**kwargs)
    for _ in range(2):
        component.call(instance, x, labels)
    return instance


class RandomnessDetector(TorchDispatchMode):
    """Records whether any random numbers are drawn."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def test_random_draws_are_declared(component, x, labels):
    instance = make_after_two_steps(component, x, labels)
    with RandomnessDetector() as randomness:
        component.call(instance, x, labels)
    assert randomness.found == (component.without_randomness is not None)


def test_state_dict_restores_the_state(component, x, labels):
    instance = make_after_two_steps(component, x, labels)
    file = io.BytesIO()
    torch.save(instance.state_dict(), file)
    file.seek(0)
    restored = component.make(seed=99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert_same(
            component.call(restored, x.roll(1, 0), labels),
            component.call(instance, x.roll(1, 0), labels),
        )


def test_a_deep_copy_is_independent(component, x, labels):
    instance = make_after_two_steps(component, x, labels)
    copied = copy.deepcopy(instance)
    buffers = [b.clone() for b in instance.buffers()]
    # Embed once, because both observe the same network.
    embeddings = component.embed(instance, x.roll(1, 0))
    actual = component.use(copied, embeddings, labels)
    assert_same(list(instance.buffers()), buffers)
    assert_same(actual, component.use(instance, embeddings, labels))


def modules_of_ours(instance):
    """The modules of a component that belong to this package, such as an attached regularizer.

    Subclasses of PML's wrappers that inherit the constructor are left out: PML defines what they
    show and record.
    """
    modules = instance.modules() if isinstance(instance, torch.nn.Module) else [instance]
    return [m for m in modules if type(m).__init__.__module__.startswith("pml_extras")]


def test_repr_shows_all_hyperparameters(any_component):
    for module in modules_of_ours(any_component.make()):
        parameters = inspect.signature(type(module)).parameters.values()
        hyperparameters = [
            p.name
            for p in parameters
            if p.kind is not p.VAR_KEYWORD
            and p.name not in ("loss", "teacher", "generator", "faiss_index")
        ]
        for name in hyperparameters:
            assert f"{name}={getattr(module, name)!r}" in repr(module)


def test_stats_are_collected_only_on_request_and_are_finite(component, x, labels):
    without_stats = make_after_two_steps(component, x, labels)
    assert not any(hasattr(m, "_record_these_stats") for m in modules_of_ours(without_stats))
    with_stats = make_after_two_steps(component, x, labels, collect_stats=True)
    for module in modules_of_ours(with_stats):
        for name in getattr(module, "_record_these_stats", []):
            value = getattr(module, name)
            assert type(value) in (int, float), name
            assert value == value
            assert abs(value) < float("inf")


def test_stats_do_not_change_the_result(component, x, labels):
    without_stats, with_stats = (
        make_after_two_steps(component, x, labels, collect_stats=on) for on in (False, True)
    )
    assert_same(component.call(with_stats, x, labels), component.call(without_stats, x, labels))


def test_record_keeper_logs_hyperparameters_and_stats(component, x, labels, tmp_path):
    keeper = RecordKeeper(
        record_writer=RecordWriter(str(tmp_path)),
        attributes_to_search_for=["_record_these", "_record_these_stats"],
    )
    instance = make_after_two_steps(component, x, labels, collect_stats=True)
    for iteration in range(2):
        keeper.update_records(
            {"metric_loss": instance}, iteration, recursive_types=[torch.nn.Module, dict]
        )
        keeper.save_records()
    recorded = " ".join(path.read_text() for path in tmp_path.glob("*.csv"))
    for module in modules_of_ours(instance):
        for name in module._record_these:
            assert name in recorded


def test_optimizer_steps_change_the_embeddings_and_keep_them_finite(loss_component, x, labels):
    x.requires_grad_()
    instance = loss_component.make()
    parameters = [x, *instance.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    before = x.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss_component.call(instance, x, labels).backward()
        optimizer.step()
    assert x.isfinite().all()
    assert not torch.equal(x.detach(), before)
