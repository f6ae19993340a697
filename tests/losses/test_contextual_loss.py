from __future__ import annotations

import warnings

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import DoNothingReducer, MultipleReducers, SumReducer
from pytorch_metric_learning.regularizers import LpRegularizer

from helpers.golden import relative_error
from pml_extras.functional import _contextual
from pml_extras.losses import ContextualLoss


@pytest.fixture
def batch():
    return torch.randn(32, 6), torch.arange(8).repeat_interleave(4)


def test_equals_the_golden_values(contextual_case):
    case = contextual_case
    x = case["embeddings"].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in some cases, k exceeds the class size
        loss_func = ContextualLoss(
            num_neighbors=int(case["k"]), neighborhood_slack=float(case["eps"])
        )
        loss = loss_func(x, case["labels"])
    loss.backward()
    weights = {"contextual": 0.4, "contrastive": 0.5, "mean_similarity": 0.1}
    for kind, actual in {"loss": loss, "grad": x.grad}.items():
        expected = sum(w * case[f"{name}_{kind}"].double() for name, w in weights.items())
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("miner", [None, MultiSimilarityMiner(), TripletMarginMiner()])
def test_contrastive_term_equals_pml_contrastive_loss(batch, miner):
    x, labels = batch
    pairs = None if miner is None else miner(x, labels)
    ours = ContextualLoss(contextual_weight=0, similarity_weight=0, contrastive_weight=1)
    theirs = ContrastiveLoss(0.75, 0.6, distance=CosineSimilarity())
    assert torch.allclose(ours(x, labels, pairs), theirs(x, labels, pairs), rtol=1e-5)


def test_weights_multiply_the_three_sub_losses(batch):
    weights = {"contextual_weight": 2.0, "contrastive_weight": 3.0, "similarity_weight": 5.0}
    unweighted = ContextualLoss(**dict.fromkeys(weights, 1.0), reducer=DoNothingReducer())(*batch)
    weighted = ContextualLoss(**weights, reducer=DoNothingReducer())(*batch)
    assert list(unweighted) == ["contextual_loss", "contrastive_loss", "similarity_loss"]
    for name, weight in zip(unweighted, weights.values(), strict=True):
        assert unweighted[name]["losses"].shape == (32,)
        assert torch.allclose(weighted[name]["losses"], weight * unweighted[name]["losses"])


def test_an_embedding_regularizer_does_not_replace_the_reducer(batch):
    loss_func = ContextualLoss(reducer=SumReducer(), embedding_regularizer=LpRegularizer())
    assert isinstance(loss_func.reducer, MultipleReducers)
    expected = 32 * ContextualLoss()(*batch) + batch[0].norm(dim=1).mean()
    assert torch.allclose(loss_func(*batch), expected, rtol=1e-5)


def test_training_reaches_zero(batch):
    x, labels = batch
    x.requires_grad_()
    loss_func = ContextualLoss(similarity_weight=0)
    optimizer = torch.optim.Adam([x], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = loss_func(x, labels)
        loss.backward()
        optimizer.step()
    assert loss == 0


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("slack", [0.0, 4.0])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "random"])
@pytest.mark.parametrize("labels", ["same", "different", "pairs"])
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_is_finite_for_small_batches(num_samples, slack, equal, labels):
    x = torch.ones(num_samples, 3) if equal else torch.randn(num_samples, 3)
    x.requires_grad_()
    y = {
        "same": torch.zeros(num_samples).long(),
        "different": torch.arange(num_samples),
        "pairs": torch.arange(num_samples) // 2,
    }[labels]
    loss = ContextualLoss(neighborhood_slack=slack)(x, y)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_an_empty_batch_has_zero_loss():
    x = torch.empty(0, 4, requires_grad=True)
    loss = ContextualLoss()(x, torch.empty(0).long())
    loss.backward()
    assert loss == 0


def test_clamps_too_many_neighbors_and_warns_once(batch):
    loss_func = ContextualLoss(num_neighbors=4)
    x, labels = torch.randn(3, 5), torch.tensor([0, 0, 1])
    with pytest.warns(UserWarning, match="num_neighbors=4 is clamped to 3 samples"):
        clamped = loss_func(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_func(x, labels) == clamped
        loss_func(*batch)
        expected = ContextualLoss(num_neighbors=3)
        expected._checked_class_sizes = True
        assert expected(x, labels) == clamped


def test_warns_once_about_more_neighbors_than_samples_per_class():
    loss_func = ContextualLoss(num_neighbors=4)
    x, labels = torch.randn(12, 5), torch.arange(12) % 6
    with pytest.warns(UserWarning, match="more than the 2 samples of the largest class"):
        loss_func(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_func(x, labels)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_neighbors", 0),
        ("neighborhood_slack", -0.1),
        ("contextual_weight", -1),
        ("contrastive_weight", float("nan")),
        ("similarity_weight", -1),
        ("pos_margin", 1.5),
        ("neg_margin", -2),
        ("target_similarity", 3),
    ],
)
def test_invalid_hyperparameters_are_reported(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value!r}"):
        ContextualLoss(**{name: value})


def test_invalid_input_is_rejected(batch):
    x, _ = batch
    with pytest.raises(ValueError, match="labels are required"):
        ContextualLoss()(x)
    with pytest.raises(AssertionError, match="CosineSimilarity"):
        ContextualLoss(distance=LpDistance())


@pytest.mark.parametrize("miner", [None, MultiSimilarityMiner()])
def test_references_equal_to_the_batch_do_not_change_the_loss(batch, miner):
    x, labels = batch
    x.requires_grad_()
    pairs = None if miner is None else miner(x, labels)
    results = []
    for references in ({}, {"ref_emb": x.clone(), "ref_labels": labels.clone()}):
        loss = ContextualLoss()(x, labels, pairs, **references)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_references_are_the_context(batch):
    # Two samples give each other no context. A memory with samples of their classes does.
    memory = torch.eye(3).repeat_interleave(4, 0) + 0.05 * torch.randn(12, 3)
    memory_labels = torch.arange(3).repeat_interleave(4)
    x, labels = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0]]), torch.tensor([0, 1])
    loss_func = ContextualLoss(contrastive_weight=0, similarity_weight=0)
    assert loss_func(x, labels, ref_emb=memory, ref_labels=memory_labels) < 0.02
    assert loss_func(x, 1 - labels, ref_emb=memory, ref_labels=memory_labels) > 0.1


def test_stats_of_separate_clusters_and_of_random_embeddings(batch):
    x, labels = batch
    loss_func = ContextualLoss(collect_stats=True)
    loss_func(x, labels)
    random_pos_context = loss_func.avg_pos_context
    loss_func(torch.eye(8).repeat_interleave(4, 0), labels)
    assert loss_func.avg_neighborhood_size == 4
    assert loss_func.avg_pos_context == 1 > random_pos_context
    assert loss_func.avg_neg_context == 0
    assert loss_func.avg_similarity == pytest.approx(1 / 8)


def test_sparse_matrices_do_not_change_the_loss(monkeypatch):
    x = torch.randn(120, 16).repeat_interleave(4, 0) + 0.5 * torch.randn(480, 16)
    x, labels = x.requires_grad_(), torch.arange(120).repeat_interleave(4)
    results = []
    for is_sparse in (True, False):
        monkeypatch.setattr(_contextual, "prefers_sparse", lambda *args, value=is_sparse: value)
        loss = ContextualLoss()(x, labels)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-7)


COMPUTED_BY = {
    "contextual": ("contextual_similarity", "sparse_contextual_term"),
    "contrastive": ("_mean_over_active", "chunked_contrastive_term"),
}


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("name", ["contextual", "contrastive", "similarity"])
@pytest.mark.parametrize("with_tuple", [False, True])
def test_a_term_of_weight_0_is_not_computed(batch, name, is_sparse, with_tuple, monkeypatch):
    x, labels = batch
    x.requires_grad_()
    pairs = MultiSimilarityMiner()(x, labels) if with_tuple else None
    monkeypatch.setattr(_contextual, "prefers_sparse", lambda *args: is_sparse)
    options = {"reducer": DoNothingReducer()}
    every = ContextualLoss(**options)(x, labels, pairs)

    def fail(*args, **kwargs):
        raise AssertionError("it was computed")

    for function in COMPUTED_BY.get(name, ()):
        monkeypatch.setattr(_contextual, function, fail)
    terms = ContextualLoss(**{f"{name}_weight": 0}, **options)(x, labels, pairs)
    for key, value in every.items():
        losses = terms[key]["losses"]
        if key.startswith(name):
            assert torch.equal(losses, torch.zeros(32))
            assert torch.equal(torch.autograd.grad(losses.sum(), x)[0], torch.zeros_like(x))
        else:
            assert torch.equal(losses, value["losses"])
