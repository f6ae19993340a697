from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import (
    _reranking,
    build_reference_index,
    contextual_rerank,
    contextual_similarity,
    pairwise_cosine,
)


@pytest.fixture(params=["faiss", "torch"])
def _search_library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("faiss")


def mixture(num_references, dim=10, noise=0.5):
    centers = torch.randn(6, dim)[torch.arange(num_references) % 6]
    return centers + noise * torch.randn(num_references, dim)


def brute_force(query, references, k, weight, queries_are_references):
    cosine = pairwise_cosine(query, references)
    ref_distances = 1 - pairwise_cosine(references)
    if queries_are_references:
        context = contextual_similarity(ref_distances, num_neighbors=k, slack=0.0)[: len(query)]
    else:
        context = contextual_similarity(1 - cosine, ref_distances, num_neighbors=k, slack=0.0)
    return (1 - weight) * (1 - context) + weight * (1 - cosine) / 2


@pytest.mark.usefixtures("_search_library")
@pytest.mark.parametrize("queries_are_references", [True, False])
@pytest.mark.parametrize(("num_references", "k"), [(60, 7), (60, 20), (30, 30), (40, 1), (5, 9)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equals_brute_force(queries_are_references, num_references, k, weight):
    references = mixture(num_references)
    query = references[:20] if queries_are_references else mixture(20)
    query_indices = torch.arange(len(query)) if queries_are_references else None
    expected = brute_force(query, references, k, weight, queries_are_references)
    index = build_reference_index(references, num_neighbors=k)
    distances, indices = contextual_rerank(
        query,
        index,
        num_references,
        num_candidates=num_references,
        distance_weight=weight,
        query_indices=query_indices,
    )
    assert torch.allclose(distances, expected.gather(1, indices), atol=1e-6)
    assert torch.allclose(distances, expected.sort(1).values, atol=1e-6)
    assert (indices.sort(1).values == torch.arange(num_references)).all()


def test_chunks_do_not_change_the_result(monkeypatch):
    references, query = mixture(50), mixture(17)
    index = build_reference_index(references, num_neighbors=8)
    expected = contextual_rerank(query, index, 10)
    monkeypatch.setattr(_reranking, "CHUNK_NUMEL", 700)
    chunked_index = build_reference_index(references, num_neighbors=8)
    assert all(torch.equal(a, b) for a, b in zip(chunked_index, index, strict=True))
    actual = contextual_rerank(query, chunked_index, 10)
    assert torch.allclose(actual[0], expected[0], atol=1e-6)
    assert torch.equal(actual[1], expected[1])


def test_the_index_holds_neighbors_similarities_and_reciprocity():
    references = mixture(40)
    index = build_reference_index(references, num_neighbors=6)
    cosine = pairwise_cosine(references)
    assert torch.equal(index.neighbors, cosine.topk(6).indices)
    assert torch.equal(index.neighbors[:, 0], torch.arange(40))
    assert torch.allclose(
        index.candidate_similarity[:, :6], cosine.gather(1, index.neighbors), atol=1e-6
    )
    half_knn = index.neighbors[:, :3].tolist()
    for i in range(40):
        assert index.is_reciprocal_half[i].tolist() == [i in half_knn[j] for j in half_knn[i]]


def test_duplicates_find_themselves_first():
    references = mixture(10).repeat(4, 1)  # four copies of each
    index = build_reference_index(references, num_neighbors=4)
    assert torch.equal(index.neighbors[:, 0], torch.arange(40))
    distances, indices = contextual_rerank(references, index, 4, query_indices=torch.arange(40))
    assert distances.isfinite().all()
    assert (indices % 10 == torch.arange(40)[:, None] % 10).all()


def test_only_candidates_are_reranked():
    references, query = mixture(60), mixture(8)
    index = build_reference_index(references, num_neighbors=5)
    all_distances, _ = contextual_rerank(query, index, 60, num_candidates=60)
    distances, indices = contextual_rerank(query, index, 12, num_candidates=12)
    candidates = pairwise_cosine(query, references).topk(12).indices
    assert torch.equal(indices.sort(1).values, candidates.sort(1).values)
    assert distances.min() >= all_distances.min() - 1e-6


def test_context_corrects_the_order_of_the_distances():
    # Points 0 to 3 are a chain that starts at the query. Point 4 belongs to another group, but is
    # nearer to the query than the end of the chain.
    angles = torch.tensor([0.0, 0.12, 0.24, 0.36, -0.33, -0.40, -0.45, -0.5])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    index = build_reference_index(points, num_neighbors=4)
    order = contextual_rerank(
        points[:1],
        index,
        8,
        num_candidates=8,
        distance_weight=0.0,
        query_indices=torch.tensor([0]),
    )[1][0].tolist()
    assert order.index(3) < order.index(4)
    assert pairwise_cosine(points)[0, 3] < pairwise_cosine(points)[0, 4]


def test_accepts_half_precision_and_rescaled_inputs():
    references, query = mixture(40), mixture(9)
    expected = contextual_rerank(query, build_reference_index(references, num_neighbors=5), 40)
    scaled = contextual_rerank(
        4 * query, build_reference_index(0.5 * references, num_neighbors=5), 40
    )
    assert torch.equal(scaled[1], expected[1])
    half = contextual_rerank(
        normalize(query).half(), build_reference_index(references.half(), num_neighbors=5), 40
    )
    assert half[0].dtype == torch.float32


def test_float64_is_computed_in_float64():
    references = mixture(40).double()
    index = build_reference_index(references, num_neighbors=5)
    distances, indices = contextual_rerank(references, index, 40, query_indices=torch.arange(40))
    expected = brute_force(references, references, 5, 0.3, queries_are_references=True)
    assert torch.allclose(distances, expected.gather(1, indices), atol=1e-14)


def reid_set(num_people=6, cameras=3, per_camera=4):
    people = torch.arange(num_people).repeat_interleave(cameras * per_camera)
    camera = torch.arange(cameras).repeat_interleave(per_camera).repeat(num_people)
    x = torch.randn(num_people, 10)[people] + 0.8 * torch.randn(cameras, 10)[camera]
    return x + 0.3 * torch.randn(len(people), 10), people, camera


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 6, 15])
def test_excluded_references_are_neither_neighbors_nor_results(as_function, weight, k, monkeypatch):
    references, ref_ids, ref_cameras = reid_set()
    ids, cameras = torch.arange(20) % 6, torch.arange(20) % 3
    query = references[ids * 12 + cameras * 4] + 0.1 * torch.randn(20, 10)
    mask = (ids[:, None] == ref_ids) & (cameras[:, None] == ref_cameras)
    monkeypatch.setattr(_reranking, "CHUNK_NUMEL", 500)
    distances, indices = contextual_rerank(
        query,
        build_reference_index(references, num_neighbors=k),
        100,
        num_candidates=100,
        distance_weight=weight,
        exclude=(lambda rows: mask[rows]) if as_function else mask,
    )
    # An excluded reference is farther away from the query than all others.
    cosine = pairwise_cosine(query, references)
    far = (1 - cosine).masked_fill(mask, 1e6)
    context = contextual_similarity(
        far, 1 - pairwise_cosine(references), num_neighbors=k, slack=0.0
    )
    expected = (1 - weight) * (1 - context) + weight * (1 - cosine) / 2
    expected = expected.masked_fill(mask, torch.inf)
    assert torch.allclose(distances, expected.sort(1).values, atol=1e-6)
    is_result = indices >= 0
    assert torch.equal(is_result.sum(1), (~mask).sum(1))
    assert not mask.gather(1, indices.clamp_min(0))[is_result].any()
    assert torch.equal(is_result, distances < torch.inf)


def test_excluding_nothing_changes_nothing():
    references, query = mixture(40), mixture(9)
    index = build_reference_index(references, num_neighbors=8)
    expected = contextual_rerank(query, index, 10)
    actual = contextual_rerank(query, index, 10, exclude=torch.zeros(9, 40, dtype=torch.bool))
    assert torch.allclose(actual[0], expected[0], atol=1e-6)
    assert torch.equal(actual[1], expected[1])


def test_a_query_never_excludes_itself():
    x, ids, cameras = reid_set()
    mask = (ids[:, None] == ids) & (cameras[:, None] == cameras)
    index = build_reference_index(x, num_neighbors=6)
    rows = torch.arange(len(x))
    indices = contextual_rerank(x, index, 100, query_indices=rows, exclude=mask)[1]
    assert (indices == rows[:, None]).any(1).all()
    is_other = (indices >= 0) & (indices != rows[:, None])
    assert not mask.gather(1, indices.clamp_min(0))[is_other].any()
    assert torch.equal(is_other.sum(1), (~mask).sum(1))


def test_few_references_may_be_left():
    references, query = mixture(12), mixture(3)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 4], mask[2, :3] = False, False
    index = build_reference_index(references, num_neighbors=5)
    distances, indices = contextual_rerank(query, index, 6, exclude=mask)
    assert indices[0].tolist() == [-1] * 6
    assert indices[1].tolist() == [4] + [-1] * 5
    assert sorted(indices[2].tolist()) == [-1, -1, -1, 0, 1, 2]
    assert torch.equal(distances == torch.inf, indices == -1)
    assert not distances.isnan().any()
    with pytest.raises(ValueError, match=r"exclude must be bool of shape \(3, 12\), .*\(3, 11\)"):
        contextual_rerank(query, index, 6, exclude=mask[:, 1:])
