"""Contracts on what PML's other components do with ours, and ours with them."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import distances, miners, reducers, regularizers
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_extras.losses import (
    CenterContrastiveLoss,
    ContextualLoss,
    CrossBatchMemory,
    ListwiseDistillationLoss,
    SelfSupervisedLoss,
)
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

C, D, N = 6, 8, 24

LOSSES = {
    "center": lambda **kw: CenterContrastiveLoss(C, D, **kw),
    "center-average": lambda **kw: CenterContrastiveLoss(C, D, center_update="average", **kw),
    "contextual": ContextualLoss,
    "listwise": ListwiseDistillationLoss,
    "interfered": lambda **kw: ClassInterferenceRegularizer(
        C, D, generator=torch.Generator().manual_seed(0)
    ).attach(pml_losses.MultiSimilarityLoss(**kw)),
}
MINERS = {
    "angular": miners.AngularMiner(angle=5),
    "batch-easy-hard": miners.BatchEasyHardMiner(),
    "batch-hard": miners.BatchHardMiner(),
    "distance-weighted": miners.DistanceWeightedMiner(),
    "multi-similarity": miners.MultiSimilarityMiner(),
    "pair-margin": miners.PairMarginMiner(),
    "triplet-margin": miners.TripletMarginMiner(margin=1),
    "uniform-histogram": miners.UniformHistogramMiner(),
    "contextual": ContextualSimilarityMiner(),
}
DISTANCES = {
    "cosine": distances.CosineSimilarity(),
    "dot": distances.DotProductSimilarity(normalize_embeddings=False),
    "lp": distances.LpDistance(),
    "l1": distances.LpDistance(p=1, normalize_embeddings=False),
    "squared": distances.LpDistance(power=2),
    "snr": distances.SNRDistance(),
}


@pytest.fixture
def batch():
    return torch.randn(N, D), torch.arange(C).repeat_interleave(N // C)


def make(name, **kwargs):
    torch.manual_seed(1)
    return LOSSES[name](**kwargs)


def call(loss_func, x, labels, pairs=None):
    if isinstance(loss_func, ListwiseDistillationLoss):
        return loss_func(x, labels, pairs, ref_emb=x.detach().relu())
    return loss_func(x, labels, pairs)


def elements(name, batch):
    """Each sub-loss's elements."""
    parts = call(make(name, reducer=reducers.DoNothingReducer()), *batch)
    return [part["losses"].detach() for part in parts.values()]


weights = torch.linspace(0.5, 2, C)
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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("regularized", [False, True])
def test_every_reducer(name, reducer, regularized, batch):
    pml_reducer, by_hand = REDUCERS[reducer]
    expected = sum(by_hand(x, batch[1]).nan_to_num() for x in elements(name, batch))
    kwargs = {}
    if regularized:  # with which PML replaces a reducer where sub-losses are misnamed
        kwargs = {
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 0.3,
        }
    loss = call(make(name, reducer=pml_reducer, **kwargs), *batch)
    if regularized:
        embeddings = batch[0]
        if name == "interfered":  # the loss, and so its regularizer, sees unit vectors
            embeddings = torch.nn.functional.normalize(embeddings)
        # PML reduces a regularizer's losses with the regularizer's own reducer, a mean.
        expected = expected + 0.3 * embeddings.norm(dim=1).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "regularizer", [regularizers.LpRegularizer, regularizers.ZeroMeanRegularizer], ids=str
)
def test_every_embedding_regularizer(name, regularizer, batch):
    x, labels = batch
    x.requires_grad_()
    loss = call(make(name, embedding_regularizer=regularizer()), x, labels)
    loss.backward()
    assert loss.isfinite()
    assert loss > call(make(name), x, labels)


@pytest.mark.parametrize(
    "regularizer",
    [
        regularizers.CenterInvariantRegularizer,
        regularizers.LpRegularizer,
        regularizers.RegularFaceRegularizer,
        regularizers.ZeroMeanRegularizer,
        lambda: regularizers.SparseCentersRegularizer(C // 2, 2),
    ],
)
def test_every_weight_regularizer(regularizer, batch):
    loss_func = make("center", weight_regularizer=regularizer())
    loss = loss_func(*batch)
    loss.backward()
    assert loss.isfinite()
    assert loss != make("center")(*batch)
    assert loss_func.centers.grad.isfinite().all()


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "listwise"])
@pytest.mark.parametrize("miner", MINERS)
def test_every_miner(name, miner, batch):
    x, labels = batch
    x.requires_grad_()
    pairs = MINERS[miner](x, labels)
    loss = call(make(name), x, labels, pairs)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_tuples_of_three_are_the_pairs_they_contain(name, batch):
    if name == "listwise":
        with pytest.raises(ValueError, match="indices_tuple is not supported"):
            call(make(name), *batch, (torch.tensor([0]),) * 3)
        return
    a, p, n = lmu.get_random_triplet_indices(batch[1], t_per_anchor=3)
    if name.startswith("center"):  # samples count as often as they are named, each time
        pytest.skip("weights samples: see the loss's own tests")
    triplets, pairs = (call(make(name), *batch, t) for t in ((a, p, n), (a, p, a, n)))
    assert torch.equal(triplets, pairs)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_tuples(name, batch):
    if name == "listwise":
        pytest.skip("takes none")
    x = batch[0].requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    for length in (3, 4):
        loss = call(make(name), x, batch[1], (none,) * length)
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_labels_are_required_where_they_are(name, batch):
    if name == "listwise":
        assert call(make(name), batch[0], None) == call(make(name), *batch)
    else:
        with pytest.raises(ValueError, match="labels"):
            call(make(name), batch[0], None)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["center", "center-average", "contextual", "listwise"])
def test_cosine_losses_refuse_other_distances(name, distance):
    if distance == "cosine":
        make(name, distance=DISTANCES[distance])
    else:
        with pytest.raises(AssertionError, match="requires the distance metric to be"):
            make(name, distance=DISTANCES[distance])
    with pytest.raises(AssertionError, match=r"requires distance\.power to be 1"):
        make(name, distance=distances.CosineSimilarity(power=2))


@pytest.mark.parametrize("distance", DISTANCES)
def test_interference_goes_with_every_distance(distance, batch):
    loss_func = ClassInterferenceRegularizer(C, D, normalize=distance != "dot").attach(
        pml_losses.ContrastiveLoss(distance=DISTANCES[distance])
    )
    for _ in range(2):
        assert loss_func(*batch).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_inside_multiple_losses(name, batch):
    if name == "listwise":  # which needs the teacher's embeddings: SelfDistillation brings them
        with pytest.raises(ValueError, match="teacher"):
            pml_losses.MultipleLosses([make(name)])(*batch)
        return
    both = pml_losses.MultipleLosses(
        [make(name), pml_losses.TripletMarginLoss()],
        miners=[ContextualSimilarityMiner(), miners.TripletMarginMiner()],
        weights=[0.5, 2],
    )
    pairs = ContextualSimilarityMiner()(*batch)
    triplets = miners.TripletMarginMiner()(*batch)
    expected = 0.5 * make(name)(*batch, pairs) + 2 * pml_losses.TripletMarginLoss()(
        *batch, triplets
    )
    assert torch.allclose(both(*batch), expected)


def memories():
    for miner in (None, "multi-similarity", "triplet-margin", "contextual"):
        for name in ("contextual", "interfered"):
            yield pytest.param(name, miner, id=f"{name}-{miner}")


@pytest.mark.parametrize(("name", "miner"), list(memories()))
def test_inside_a_cross_batch_memory(name, miner, batch):
    memory = CrossBatchMemory(make(name), D, memory_size=3 * N, miner=MINERS.get(miner))
    total = 0.0
    for step in range(5):  # the memory is filled, and wraps around
        x = torch.randn(N, D, requires_grad=True)
        loss = memory(x, batch[1].roll(step))
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        total += x.grad.abs().sum()
    assert total > 0


def test_a_memory_of_the_batch_alone_is_the_batch(batch):
    memory = CrossBatchMemory(ContextualLoss(), D, memory_size=N)
    assert torch.allclose(memory(*batch), ContextualLoss()(*batch), rtol=1e-5)


def test_a_memorys_place_in_the_queue_is_resumed(batch):
    def run(memory, steps):
        return [
            memory(torch.full((10, D), float(s)) + torch.eye(10, D), batch[1][:10]) for s in steps
        ]

    memory = CrossBatchMemory(ContextualLoss(), D, memory_size=25)
    run(memory, range(4))
    resumed = CrossBatchMemory(ContextualLoss(), D, memory_size=25)
    resumed.load_state_dict(memory.state_dict())
    assert run(resumed, range(4, 8)) == run(memory, range(4, 8))


@pytest.mark.parametrize("name", ["center", "listwise"])
def test_memories_refuse_what_takes_no_references(name):
    for wrapper in (
        lambda loss: CrossBatchMemory(loss, D),
        SelfSupervisedLoss,
        lambda loss: pml_losses.CrossBatchMemory(loss, D),
    ):
        with pytest.raises(Exception, match=f"not supported for {type(make(name)).__name__}"):
            wrapper(make(name))


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(symmetric, batch):
    x = batch[0].requires_grad_()
    loss_func = SelfSupervisedLoss(ContextualLoss(1 + symmetric), symmetric=symmetric)
    near = loss_func(x, x.detach() + 0.01 * torch.randn(N, D))
    near.backward()
    assert x.grad.isfinite().all()
    assert near < loss_func(x, torch.randn(N, D))


def test_self_supervised_with_interference_counts_samples_as_classes(batch):
    loss_func = ClassInterferenceRegularizer(N, D).attach(pml_losses.NTXentLoss())
    assert SelfSupervisedLoss(loss_func)(batch[0], batch[0] + 0.1).isfinite()


@pytest.mark.parametrize("name", ["center", "contextual", "interfered"])
def test_batched_distances_and_inference_are_left_alone(name, batch):
    # A loss's distance object may be shared with other components.
    shared = distances.CosineSimilarity(collect_stats=True)
    loss_func = make(name, distance=shared)
    call(loss_func, *batch)
    assert shared(batch[0]).shape == (N, N)
