"""Our components combined with PML's reducers, regularizers, miners, distances and wrappers."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import distances, miners, reducers, regularizers
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch.nn.functional import normalize

from pml_extras.losses import ContextualLoss, CrossBatchMemory, SelfSupervisedLoss
from pml_extras.regularizers import ClassInterferenceRegularizer

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES

DISTANCES = {
    "cosine": distances.CosineSimilarity(),
    "dot": distances.DotProductSimilarity(normalize_embeddings=False),
    "lp": distances.LpDistance(),
    "l1": distances.LpDistance(p=1, normalize_embeddings=False),
    "squared": distances.LpDistance(power=2),
    "snr": distances.SNRDistance(),
}


def value(component, x, labels, *args, **kwargs):
    """The loss of a new instance on a batch."""
    return component.call(component.make(**kwargs), x, labels, *args)


def elements(component, x, labels):
    """The unreduced elements of each sub-loss."""
    # The distillation term has no elements, and is only computed with gradients.
    with torch.set_grad_enabled(not component.observes_network):
        parts = value(component, x, labels, reducer=reducers.DoNothingReducer())
    return [part["losses"] for part in parts.values()]


def distillation(component, x, labels):
    """The distillation term, which is added after the reduction."""
    with torch.no_grad():
        reduced = value(component, x, labels)
    return value(component, x, labels) - reduced if component.observes_network else 0


weights = torch.linspace(0.5, 2, NUM_CLASSES)
REDUCERS = {
    "mean": (reducers.MeanReducer(), lambda x, y: x.mean()),
    "sum": (reducers.SumReducer(), lambda x, y: x.sum()),
    "nonzero": (reducers.AvgNonZeroReducer(), lambda x, y: x[x > 0].mean()),
    "threshold": (reducers.ThresholdReducer(low=0.02), lambda x, y: x[x > 0.02].mean()),
    "class-weighted": (
        reducers.ClassWeightedReducer(weights),
        lambda x, y: (x * weights[y]).mean(),
    ),
    "per-anchor": (reducers.PerAnchorReducer(), lambda x, y: x.mean()),
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("regularized", [False, True])
def test_loss_is_the_reduced_elements(loss_component, reducer, regularized, x, labels):
    pml_reducer, formula = REDUCERS[reducer]
    expected = sum(formula(e, labels).nan_to_num() for e in elements(loss_component, x, labels))
    expected = expected + distillation(loss_component, x, labels)
    kwargs = {}
    if regularized:  # PML then replaces the reducer of sub-losses that have unexpected names
        kwargs = {
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 0.3,
        }
        regularized_x = loss_component.embed(loss_component.make(), x)
        if loss_component.normalizes_before_regularizer:
            regularized_x = normalize(regularized_x)
        # PML reduces a regularizer's losses with the regularizer's own reducer, a mean.
        expected = expected + 0.3 * regularized_x.norm(dim=1).mean()
    loss = value(loss_component, x, labels, reducer=pml_reducer, **kwargs)
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "regularizer", [regularizers.LpRegularizer, regularizers.ZeroMeanRegularizer], ids=str
)
def test_works_with_every_embedding_regularizer(loss_component, regularizer, x, labels):
    x.requires_grad_()
    loss = value(loss_component, x, labels, embedding_regularizer=regularizer())
    loss.backward()
    assert loss.isfinite()
    assert loss > value(loss_component, x, labels)


@pytest.mark.parametrize(
    "regularizer",
    [
        regularizers.CenterInvariantRegularizer,
        regularizers.LpRegularizer,
        regularizers.RegularFaceRegularizer,
        regularizers.ZeroMeanRegularizer,
        lambda: regularizers.SparseCentersRegularizer(NUM_CLASSES // 2, 2),
    ],
)
@pytest.mark.components_with(supports_weight_regularizer=True)
def test_works_with_every_weight_regularizer(loss_component, regularizer, x, labels):
    loss_func = loss_component.make(weight_regularizer=regularizer())
    loss = loss_component.call(loss_func, x, labels)
    loss.backward()
    assert loss.isfinite()
    assert loss != value(loss_component, x, labels)
    assert all(p.grad.isfinite().all() for p in loss_func.parameters())


@pytest.mark.components_with(supports_weight_regularizer=False)
def test_weight_regularizers_are_refused(loss_component):
    with pytest.raises((ValueError, TypeError), match="weight_regularizer"):
        loss_component.make(weight_regularizer=regularizers.LpRegularizer())


@pytest.mark.components_with(takes_tuples=True)
def test_works_with_every_miner(loss_component, make_miner, x, labels):
    pairs = make_miner()(x, labels)
    x.requires_grad_()
    loss = value(loss_component, x, labels, pairs)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.fixture
def triplets(labels):
    return lmu.get_random_triplet_indices(labels, t_per_anchor=3)


@pytest.mark.components_with(takes_tuples=True)
def test_tuples_change_the_loss(loss_component, triplets, x, labels):
    assert value(loss_component, x, labels, triplets) != value(loss_component, x, labels)


@pytest.mark.components_with(takes_tuples=True, weights_samples=False)
def test_triplets_count_as_the_pairs_they_contain(loss_component, triplets, x, labels):
    a, p, n = triplets
    pairs = (a, p, a, n)
    assert value(loss_component, x, labels, triplets) == value(loss_component, x, labels, pairs)


@pytest.mark.components_with(takes_tuples=True, weights_samples=True)
def test_tuples_weight_their_samples(loss_component, triplets, x, labels):
    a, p, n = triplets
    for indices in (triplets, (a, p, a, n)):
        weights = lmu.convert_to_weights(indices, labels, x.dtype)
        expected = sum((weights * e).mean() for e in elements(loss_component, x, labels))
        expected = expected + distillation(loss_component, x, labels)
        assert torch.allclose(value(loss_component, x, labels, indices), expected)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.components_with(takes_tuples=True)
def test_empty_tuples_give_a_finite_loss(loss_component, length, x, labels):
    none = torch.empty(0, dtype=torch.long)
    loss = value(loss_component, x.requires_grad_(), labels, (none,) * length)
    loss.backward()
    assert loss.isfinite()


def test_an_empty_batch_gives_a_finite_loss(loss_component):
    if loss_component.name == "CrossBatchMemory-ContextualLoss":
        pytest.skip("PML's remove_self_comparisons reads the first index of the batch")
    x = torch.zeros(0, EMBEDDING_SIZE, requires_grad=True)
    loss = value(loss_component, x, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.components_with(takes_tuples=False)
def test_tuples_are_refused(loss_component, triplets, x, labels):
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        value(loss_component, x, labels, triplets)


@pytest.mark.components_with(needs_labels=True)
def test_labels_are_required(loss_component, x):
    with pytest.raises(ValueError, match="labels"):
        value(loss_component, x, None)


@pytest.mark.components_with(needs_labels=False)
def test_labels_are_ignored(loss_component, x, labels):
    assert value(loss_component, x, None) == value(loss_component, x, labels)


@pytest.mark.parametrize("distance", [d for d in DISTANCES if d != "cosine"])
@pytest.mark.components_with(cosine_only=True)
def test_other_distances_are_refused(component, distance):
    with pytest.raises(AssertionError, match="requires the distance metric to be"):
        component.make(distance=DISTANCES[distance])


@pytest.mark.components_with(cosine_only=True)
def test_only_unmodified_cosine_similarity_is_accepted(component):
    component.make(distance=DISTANCES["cosine"])
    with pytest.raises(AssertionError, match=r"requires distance\.power to be 1"):
        component.make(distance=distances.CosineSimilarity(power=2))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.components_with(cosine_only=False)
def test_works_with_every_distance(component, distance, x, labels):
    instance = component.make(distance=DISTANCES[distance])
    for _ in range(2):
        output = component.call(instance, x, labels)
        assert all(o.isfinite().all() for o in (output if isinstance(output, tuple) else [output]))


@pytest.mark.parametrize("distance", ["dot", "l1"])
def test_interference_without_normalization_works_with_unnormalized_distances(distance, x, labels):
    loss_func = ClassInterferenceRegularizer(NUM_CLASSES, EMBEDDING_SIZE, normalize=False).attach(
        pml_losses.ContrastiveLoss(distance=DISTANCES[distance])
    )
    for _ in range(2):
        assert loss_func(x, labels).isfinite()


@pytest.mark.components_with(needs_teacher_embeddings=False)
def test_works_in_multiple_losses(loss_component, miner_component, x, labels):
    ours, miner = loss_component.make(), miner_component.make()
    other, other_miner = pml_losses.TripletMarginLoss(), miners.TripletMarginMiner()
    both = pml_losses.MultipleLosses([ours, other], [miner, other_miner], weights=[0.5, 2])
    embeddings = loss_component.embed(ours, x)
    expected = 0.5 * value(loss_component, x, labels, miner(embeddings, labels)) + 2 * other(
        embeddings, labels, other_miner(embeddings, labels)
    )
    assert torch.allclose(both(embeddings, labels), expected)


@pytest.mark.components_with(needs_teacher_embeddings=True)
def test_multiple_losses_without_teacher_embeddings_are_refused(loss_component, x, labels):
    with pytest.raises(ValueError, match="teacher"):
        pml_losses.MultipleLosses([loss_component.make()])(x, labels)


@pytest.mark.components_with(takes_references=True)
def test_gradients_with_references_are_finite(loss_component, x, labels):
    x.requires_grad_()
    loss_func = loss_component.make()
    embeddings = loss_component.embed(loss_func, x)
    loss = loss_func(embeddings, labels, ref_emb=torch.randn(9, len(x.T)), ref_labels=labels[-9:])
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.components_with(takes_references=False)
def test_references_are_refused(loss_component, x, labels):
    loss_func = loss_component.make()
    embeddings = loss_component.embed(loss_func, x)
    with pytest.raises((ValueError, TypeError), match="ref_emb"):
        loss_func(embeddings, labels, ref_emb=torch.randn(9, len(x.T)), ref_labels=labels[-9:])


def train_with_memory(memory, labels):
    total = 0.0
    for step in range(5):  # until the queue is full and wraps around
        x = torch.randn(len(labels), EMBEDDING_SIZE, requires_grad=True)
        loss = memory(x, labels.roll(step))
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        total += x.grad.abs().sum()
    return total


@pytest.mark.components_with(supports_cross_batch_memory=True)
def test_works_in_cross_batch_memory(loss_component, labels):
    memory = CrossBatchMemory(loss_component.make(), EMBEDDING_SIZE, memory_size=3 * len(labels))
    assert train_with_memory(memory, labels) > 0


@pytest.mark.components_with(supports_cross_batch_memory=True)
def test_works_in_cross_batch_memory_with_every_miner(loss_component, make_miner, labels):
    memory = CrossBatchMemory(
        loss_component.make(), EMBEDDING_SIZE, memory_size=3 * len(labels), miner=make_miner()
    )
    # The gradient may be 0: some miners return only a sample's own copy as its positive.
    train_with_memory(memory, labels)


@pytest.mark.components_with(supports_cross_batch_memory=True)
def test_memory_of_only_the_current_batch_does_not_change_the_loss(loss_component, x, labels):
    memory = CrossBatchMemory(loss_component.make(), EMBEDDING_SIZE, memory_size=len(x))
    assert torch.allclose(memory(x, labels), value(loss_component, x, labels), rtol=1e-5)


def test_cross_batch_memory_resumes_its_queue_position(labels):
    def run(memory, steps):
        x = torch.eye(10, EMBEDDING_SIZE)
        return [memory(x + step, labels[:10]) for step in steps]

    memory = CrossBatchMemory(ContextualLoss(), EMBEDDING_SIZE, memory_size=25)
    run(memory, range(4))
    resumed = CrossBatchMemory(ContextualLoss(), EMBEDDING_SIZE, memory_size=25)
    resumed.load_state_dict(memory.state_dict())
    assert run(resumed, range(4, 8)) == run(memory, range(4, 8))


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda loss: CrossBatchMemory(loss, EMBEDDING_SIZE),
        SelfSupervisedLoss,
        lambda loss: pml_losses.CrossBatchMemory(loss, EMBEDDING_SIZE),
    ],
    ids=["CrossBatchMemory", "SelfSupervisedLoss", "PMLs-CrossBatchMemory"],
)
@pytest.mark.components_with(supports_cross_batch_memory=False)
def test_memory_wrappers_refuse_unsupported_losses(loss_component, wrapper):
    loss_func = loss_component.make()
    with pytest.raises(Exception, match=f"not supported for {type(loss_func).__name__}"):
        wrapper(loss_func)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.components_with(supports_cross_batch_memory=True)
@pytest.mark.filterwarnings("ignore:num_neighbors")  # each class has one or two samples
def test_works_in_self_supervised_loss(loss_component, symmetric, x):
    x.requires_grad_()
    # Each sample is a class of its own.
    loss_func = SelfSupervisedLoss(loss_component.make(num_classes=len(x)), symmetric=symmetric)
    loss = loss_func(x, x.detach() + 0.1 * torch.randn_like(x))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_contextual_loss_is_lower_for_similar_views(symmetric, x):
    x.requires_grad_()
    loss_func = SelfSupervisedLoss(ContextualLoss(num_neighbors=1 + symmetric), symmetric=symmetric)
    similar = loss_func(x, x.detach() + 0.01 * torch.randn_like(x))
    similar.backward()
    assert x.grad.isfinite().all()
    assert similar < loss_func(x, torch.randn_like(x))


def test_a_shared_distance_object_still_works(loss_component, x, labels):
    # Users may pass the same distance object to several components.
    shared = distances.CosineSimilarity(collect_stats=True)
    value(loss_component, x, labels, distance=shared)
    assert shared(x).shape == (len(x), len(x))
