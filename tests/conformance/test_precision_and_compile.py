"""Autocast, torch.compile, second derivatives and vmap."""

from __future__ import annotations

import pytest
import torch

from pml_extras import functional as f
from pml_extras.functional._kernels.self_matches import self_match_mask

from .capabilities import EMBEDDING_SIZE as D
from .capabilities import NUM_CLASSES as C

N = 24


def interference(x, c, y):
    generator = None  # torch.compile cannot trace a Generator
    return f.class_interference(
        x, y, c, torch.ones(C, dtype=torch.long), strength=0.2, generator=generator
    )


FUNCTIONS = {
    "center_contrastive_loss": lambda x, c, y: f.center_contrastive_loss(
        x, c, y, label_smoothing=0.1, class_mask=torch.ones(C, dtype=torch.bool)
    ),
    "contextual_similarity": lambda x, c, y: f.contextual_similarity(2 - 2 * f.pairwise_cosine(x)),
    "contextual_similarity-references": lambda x, c, y: f.contextual_similarity(
        2 - 2 * f.pairwise_cosine(x, c), 2 - 2 * f.pairwise_cosine(c), num_neighbors=3
    ),
    "contextual_loss": lambda x, c, y: f.contextual_loss(x, y).contextual,
    "contextual_loss-reference": lambda x, c, y: (
        f.contextual_loss(x, y, implementation="reference").contextual
    ),
    "contrastive_term": lambda x, c, y: f.contextual_loss(x, y).contrastive,
    "mean_similarity_term": lambda x, c, y: f.contextual_loss(x, y, c, torch.arange(C)).similarity,
    "listwise_kl": lambda x, c, y: f.listwise_kl(x, x.relu(), temperature=0.5, include_self=False),
    "class_interference": interference,
    "moving_class_means": lambda x, c, y: f.moving_class_means(
        c.detach(), torch.ones(C, dtype=torch.long), x, y, momentum=0.9, normalize=True
    )[0],
    "self_match_mask": lambda x, c, y: self_match_mask(x, c),
    "pairwise_cosine": lambda x, c, y: f.pairwise_cosine(x, c),
}


FOR_LARGE_INPUTS = {
    "center_contrastive_loss-chunked": lambda x, c, y: f.center_contrastive_loss(
        x, c, y, implementation="chunked"
    ),
    "contextual_loss-sparse": lambda x, c, y: (
        f.contextual_loss(x, y, implementation="sparse").contextual
    ),
    "contrastive_term-chunked": lambda x, c, y: (
        f.contextual_loss(
            x, y, pos_margin=0.9, neg_margin=-0.5, implementation="sparse"
        ).contrastive
    ),
}
NOT_TESTED_HERE = {
    "sharded_center_contrastive_loss": "needs a process group",
    "contextual_pairs": "returns indices: their number depends on values",
    "weighted_label_vote": "only counts votes: the number of classes depends on values",
    "label_vote": "not in a training step, no gradients",
    "build_reference_index": "not in a training step, no gradients",
    "contextual_rerank": "not in a training step, no gradients",
}
MATMUL_HINT = (
    "the backward of @ runs in autocast's dtype: use pairwise_dot or pairwise_cosine instead"
)


@pytest.fixture
def inputs():
    x = torch.randn(N, D, requires_grad=True)
    return x, torch.randn(C, D, requires_grad=True), torch.arange(C).repeat_interleave(N // C)


def value_and_gradients(function, inputs, autocast=None):
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = function(*inputs)
    if not value.requires_grad:
        return [value]
    weights = torch.linspace(0.5, 1.5, value.numel()).view(value.shape)
    grads = torch.autograd.grad((value * weights).sum(), inputs[:2], allow_unused=True)
    return [value, *(g for g in grads if g is not None)]


def test_every_function_is_listed():
    listed = {
        name
        for function in (FUNCTIONS | FOR_LARGE_INPUTS).values()
        for name in function.__code__.co_names
    }
    public = {name for name in f.__all__ if not isinstance(getattr(f, name), type)}
    assert public & listed == public - NOT_TESTED_HERE.keys()
    assert public >= NOT_TESTED_HERE.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_graph_breaks(name, inputs):
    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, but needs no C++ compiler.
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    expected = value_and_gradients(FUNCTIONS[name], inputs)
    actual = value_and_gradients(compiled, inputs)
    assert len(actual) == len(expected)
    if name == "class_interference":  # compiled code draws other random numbers
        assert actual[0].shape == expected[0].shape
        assert torch.allclose(actual[0].norm(dim=1), torch.ones(N))
        return
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-6)
    # Backward is compiled under the autocast context of the call.
    under_autocast = value_and_gradients(compiled, inputs, autocast=torch.bfloat16)
    for a, e in zip(under_autocast, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-6), MATMUL_HINT


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FUNCTIONS, *FOR_LARGE_INPUTS])
def test_autocast_changes_nothing(name, inputs, dtype, backward_too):
    function = {**FUNCTIONS, **FOR_LARGE_INPUTS}[name]
    expected = value_and_gradients(function, inputs)
    # torch advises against a backward pass under autocast, but many users do it.
    with torch.autocast("cpu", dtype=dtype, enabled=backward_too):
        actual = value_and_gradients(function, inputs, autocast=dtype)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.allclose(a, e, atol=1e-6), MATMUL_HINT


@pytest.mark.parametrize("backward_too", [False, True])
def test_losses_in_a_training_step_under_autocast(loss_component, x, labels, backward_too):
    def step(enabled):
        loss_func = loss_component.make()
        torch.manual_seed(0)
        model = torch.nn.Linear(D, D)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_component.call(loss_func, model(x), labels)
            if backward_too:
                loss.backward()
        if not backward_too:
            loss.backward()
        return loss, model, loss_func

    expected, _, _ = step(enabled=False)
    loss, model, loss_func = step(enabled=True)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    state = (*loss_func.parameters(), *loss_func.buffers())
    kept = all(t.dtype == torch.float32 for t in state if t.is_floating_point())
    assert kept == loss_component.keeps_dtypes


@pytest.mark.parametrize("name", ["center_contrastive_loss", "mean_similarity_term"])
def test_smooth_functions_have_second_derivatives(name):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(C, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, c: FUNCTIONS[name](x, c, torch.arange(5)), (x, c))


def test_listwise_kl_has_second_derivatives_for_the_student():
    x, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    function = lambda x: f.listwise_kl(x, teacher, temperature=0.5)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, x.requires_grad_())


def test_vmap_over_batches():
    x, c, y = torch.randn(3, N, D), torch.randn(C, D), torch.arange(N) % C
    stacked = torch.vmap(lambda x: f.center_contrastive_loss(x, c, y))(x)
    expected = torch.stack([f.center_contrastive_loss(b, c, y) for b in x])
    assert torch.allclose(stacked, expected, atol=1e-6)
    stacked = torch.vmap(lambda x: f.listwise_kl(x, x.flip(1).relu()))(x)
    expected = torch.stack([f.listwise_kl(b, b.flip(1).relu()) for b in x])
    assert torch.allclose(stacked, expected, atol=1e-6)
