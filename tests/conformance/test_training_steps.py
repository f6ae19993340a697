"""State changes in training steps only, and accumulates in float32 whatever the module's dtype."""

from __future__ import annotations

import pytest
import torch

from helpers.state import same_state, state_of

OUTSIDE_TRAINING = {
    "no_grad": (True, torch.no_grad),
    "inference_mode": (True, torch.inference_mode),
    "eval": (False, torch.enable_grad),
    "eval and no_grad": (False, torch.no_grad),
}


@pytest.fixture(params=OUTSIDE_TRAINING)
def validate(request):
    """Calls a function as a validation loop would."""
    trains, grad_mode = OUTSIDE_TRAINING[request.param]

    def call(instance, function):
        instance.train(trains)
        with grad_mode():
            result = function()
        instance.train()
        return result

    return call


def as_tensors(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


def test_validation_changes_no_state_and_draws_nothing(component, validate, x, labels):
    instance = component.make()
    for _ in range(2):
        component.call(instance, x, labels)
    before, random_state = state_of(instance), torch.get_rng_state()
    outputs = [
        validate(instance, lambda: component.call(instance, x.roll(1, 0), labels)) for _ in range(2)
    ]
    assert same_state(state_of(instance), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    for first, second in zip(*map(as_tensors, outputs), strict=True):
        assert torch.equal(first, second)


def test_training_goes_on_as_if_there_had_been_no_validation(component, validate, x, labels):
    losses = []
    for validates in (False, True):
        instance = component.make()
        torch.manual_seed(0)
        for _ in range(2):
            losses.append(component.call(instance, x, labels))
            if validates:
                validate(instance, lambda: component.call(instance, -x, labels))  # noqa: B023
    for with_validation, without in zip(losses[2:], losses[:2], strict=True):
        for a, b in zip(as_tensors(with_validation), as_tensors(without), strict=True):
            assert torch.equal(a, b)


def test_validation_between_the_pass_and_the_loss_does_not_matter(component, validate, x, labels):
    instances = [component.make(), component.make()]
    outputs = []
    for number, instance in enumerate(instances):
        embeddings = component.embed(instance, x)
        if number:
            validate(instance, lambda: component.call(instance, -x, labels))  # noqa: B023
        torch.manual_seed(0)
        outputs.append(as_tensors(component.use(instance, embeddings, labels)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.components_with(synced_buffers=True)
def test_buffers_accumulate_in_float32(component, dtype, x, labels):
    narrow, wide = component.make().to(dtype), component.make()
    for name in component.synced_buffers:
        assert narrow.get_buffer(name).dtype == wide.get_buffer(name).dtype
    x = x.to(dtype)
    for _ in range(3):
        for instance in (narrow, wide):
            component.call(instance, x.to(dtype), labels)
    for name in component.synced_buffers:
        assert torch.equal(narrow.get_buffer(name), wide.get_buffer(name))


@pytest.mark.components_with(synced_buffers=True)
def test_buffers_are_float32_under_a_narrow_default_dtype(component):
    torch.set_default_dtype(torch.bfloat16)
    try:
        instance = component.make()
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes = {instance.get_buffer(name).dtype for name in component.synced_buffers}
    assert dtypes == {torch.float32, torch.int64}
    assert {instance.double().get_buffer(n).dtype for n in component.synced_buffers} == {
        torch.float64,
        torch.int64,
    }
