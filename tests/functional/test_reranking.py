from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from pml_extras.functional import (
    _knn_search,
    build_reference_index,
    contextual_rerank,
    pairwise_cosine,
)
from pml_extras.functional._contexts import WEIGHTS_PER_NEIGHBOR, expansion_size
from pml_extras.functional._kernels import sparse_rows


def mixture(num_references, dim=10, noise=0.5):
    centers = torch.randn(6, dim)[torch.arange(num_references) % 6]
    return centers + noise * torch.randn(num_references, dim)


def largest(matrix, k):
    kept = matrix.topk(min(k, matrix.shape[1]), dim=1)
    return torch.zeros_like(matrix).scatter(1, kept.indices, kept.values)


def brute_force(query, references, k, queries_are_references=False, exclude=None):
    """The contextual similarity of queries and references, in dense float64 matrices."""
    num_references = len(references)
    k = min(k, num_references)
    cosine = pairwise_cosine(references.double())
    order = cosine.fill_diagonal_(2).argsort(dim=1, descending=True)
    knn = torch.zeros_like(cosine).scatter(1, order[:, :k], 1)
    size, kept = expansion_size(k), WEIGHTS_PER_NEIGHBOR * k
    nearest = torch.zeros_like(cosine).scatter(1, order[:, :size], 1 / size)
    reciprocal = knn * knn.T
    reciprocal = reciprocal / reciprocal.sum(1, keepdim=True)
    expanded = largest(nearest @ reciprocal, kept)
    contexts = normalize(largest(nearest @ expanded, kept))
    if queries_are_references:
        return contexts[: len(query)] @ contexts.T
    radius = cosine.sort(1, descending=True).values[:, k - 1].clamp_max(1)
    query_cosine = pairwise_cosine(query.double(), references.double())
    if exclude is not None:
        query_cosine = query_cosine.masked_fill(exclude, -torch.inf)
    query_contexts = []
    for row in query_cosine:
        found = [j for j in row.argsort(descending=True).tolist() if row[j] > -torch.inf]
        own = torch.zeros(num_references).double()
        own[[j for j in found[:k] if row[j] >= radius[j]]] = 1
        own = own / own.sum().clamp_min(1e-30)
        others = found[: size - 1]
        own_expanded = (own + reciprocal[others].sum(0)) / size
        query_contexts.append((own_expanded + expanded[others].sum(0)) / size)
    return normalize(torch.stack(query_contexts)) @ contexts.T


@pytest.fixture(params=["faiss", "torch"])
def _search_library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_knn_search.importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("faiss")


def check_order(distances, indices, similarity):
    """The distances are those of the similarity, apart from the tie weight, and ascending."""
    rows = torch.arange(len(indices))[:, None]
    assert torch.allclose(distances.double(), 1 - similarity[rows, indices], atol=2e-3)
    assert (distances.diff(dim=1) >= 0).all()
    k = indices.shape[1]
    assert torch.allclose(distances.double(), 1 - similarity.topk(k).values, atol=2e-3)


@pytest.mark.usefixtures("_search_library")
@pytest.mark.parametrize("queries_are_references", [True, False])
@pytest.mark.parametrize(("num_references", "k"), [(60, 7), (60, 20), (30, 30), (40, 1), (5, 9)])
def test_equals_the_dense_formula(queries_are_references, num_references, k):
    references = mixture(num_references)
    query = references[:20] if queries_are_references else mixture(20)
    query_indices = torch.arange(len(query)) if queries_are_references else None
    index = build_reference_index(references, num_neighbors=k)
    for count in (3, num_references):
        distances, indices = contextual_rerank(
            query, index, count, keep_nearest=False, query_indices=query_indices
        )
        similarity = brute_force(query, references, k, queries_are_references)
        if queries_are_references:
            assert torch.equal(indices[:, 0], query_indices)
            similarity[query_indices, query_indices] = 1
        check_order(distances, indices, similarity)
    assert (indices.sort(1).values == torch.arange(num_references)).all()


def test_equal_contexts_are_ordered_by_cosine_similarity():
    references, query = mixture(15), mixture(8)
    index = build_reference_index(references, num_neighbors=15)  # each has all neighbors
    indices = contextual_rerank(query, index, 15)[1]
    assert torch.equal(indices, pairwise_cosine(query, references).argsort(1, descending=True))


def test_references_without_common_context_follow_in_the_order_of_cosine_similarity():
    # Two groups that do not know each other
    groups = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat_interleave(10, 0)
    references = groups + 0.05 * torch.rand(20, 3)
    index = build_reference_index(references, num_neighbors=5)
    query = torch.tensor([[1.0, 0.3, 0.0]])
    distances, indices = contextual_rerank(query, index, 20)
    assert (indices[0, :10] < 10).all()
    farther = indices[0, 10:]
    cosine = pairwise_cosine(query, references)[0]
    assert torch.equal(farther, 10 + cosine[10:].argsort(descending=True))
    assert (distances[0, 10:] > 0.999).all()


def test_the_nearest_stays_first():
    references, query = mixture(80, noise=1.5), mixture(30, noise=1.5)
    index = build_reference_index(references, num_neighbors=10)
    cosine = pairwise_cosine(query, references)
    free = contextual_rerank(query, index, 10, keep_nearest=False)
    kept = contextual_rerank(query, index, 10)
    assert not torch.equal(free[1][:, 0], cosine.argmax(1))
    assert torch.equal(kept[1][:, 0], cosine.argmax(1))
    assert (kept[0].diff(dim=1) >= 0).all()
    for free_row, kept_row in zip(free[1].tolist(), kept[1].tolist(), strict=True):
        others = [i for i in free_row if i != kept_row[0]]
        assert kept_row[1:] == others[:9]
    # Among the references, the query itself is first and the nearest second.
    rows = torch.arange(80)
    indices = contextual_rerank(references, index, 10, query_indices=rows)[1]
    cosine = pairwise_cosine(references).fill_diagonal_(-1)
    assert torch.equal(indices[:, 0], rows)
    assert torch.equal(indices[:, 1], cosine.argmax(1))


def test_context_corrects_the_order_of_the_distances():
    # Points 0 to 3 are a chain that starts at the query. Point 4 belongs to another group, but is
    # nearer to the query than the end of the chain.
    angles = torch.tensor([0.0, 0.12, 0.24, 0.36, -0.33, -0.40, -0.45, -0.5])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    index = build_reference_index(points, num_neighbors=4)
    order = contextual_rerank(points[:1], index, 8, query_indices=torch.tensor([0]))[1][0].tolist()
    assert order.index(3) < order.index(4)
    assert pairwise_cosine(points)[0, 3] < pairwise_cosine(points)[0, 4]


def test_chunks_do_not_change_the_result(monkeypatch):
    references, query = mixture(50), mixture(17)
    index = build_reference_index(references, num_neighbors=8)
    exclude = torch.rand(17, 50) < 0.2
    expected = contextual_rerank(query, index, 10)
    expected_allowed = contextual_rerank(query, index, 10, exclude=exclude)
    monkeypatch.setattr(sparse_rows, "CHUNK_ROWS", 5)
    monkeypatch.setattr(_knn_search, "CHUNK_NUMEL", 120)
    chunked_index = build_reference_index(references, num_neighbors=8)
    for actual, wanted in zip(chunked_index.contexts, index.contexts, strict=True):
        assert abs(actual - wanted).max() < 1e-6
    for actual, wanted in (
        (contextual_rerank(query, chunked_index, 10), expected),
        (contextual_rerank(query, chunked_index, 10, exclude=exclude), expected_allowed),
    ):
        assert torch.allclose(actual[0], wanted[0], atol=1e-6)
        assert torch.equal(actual[1], wanted[1])


def test_the_index_holds_neighbors_and_similarities():
    references = mixture(40)
    index = build_reference_index(references, num_neighbors=6, num_candidates=11)
    cosine = pairwise_cosine(references)
    assert torch.equal(index.neighbors, cosine.topk(11).indices)
    assert torch.equal(index.neighbors[:, 0], torch.arange(40))
    assert torch.allclose(index.similarity, cosine.topk(11).values, atol=1e-6)


def test_duplicates_find_themselves_first():
    references = mixture(10).repeat(4, 1)  # four copies of each
    index = build_reference_index(references, num_neighbors=4)
    assert torch.equal(index.neighbors[:, 0], torch.arange(40))
    distances, indices = contextual_rerank(references, index, 4, query_indices=torch.arange(40))
    assert distances.isfinite().all()
    assert torch.equal(indices[:, 0], torch.arange(40))
    assert (indices % 10 == torch.arange(40)[:, None] % 10).all()


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


@pytest.mark.parametrize("description", ["HNSW16", "IVF4,Flat", "Flat"])
def test_searches_with_an_index_of_faiss(description):
    faiss = pytest.importorskip("faiss")
    references, query = mixture(400), mixture(30)
    exact = contextual_rerank(query, build_reference_index(references, num_neighbors=10), 20)
    index = build_reference_index(references, num_neighbors=10, faiss_index=description)
    distances, indices = contextual_rerank(query, index, 20)
    assert (distances.diff(dim=1) >= 0).all()
    if description == "Flat":
        assert torch.equal(indices, exact[1])
    shared = (indices[:, :, None] == exact[1][:, None]).any(2).double().mean()
    assert shared > 0.5  # far more than the 0.05 of chance
    # An index that the user has filled, and an empty one, which is copied
    ready = faiss.IndexFlatL2(10)
    empty = faiss.clone_index(ready)
    ready.add(normalize(references).numpy())
    for faiss_index in (ready, empty):
        index = build_reference_index(references, num_neighbors=10, faiss_index=faiss_index)
        actual = contextual_rerank(query, index, 20)
        assert torch.equal(actual[1], exact[1])
        assert torch.allclose(actual[0], exact[0], atol=1e-6)
    assert empty.ntotal == 0
    with pytest.raises(ValueError, match=r"no vectors or 399, of 10 values, got 400 of 10 values"):
        build_reference_index(references[1:], num_neighbors=10, faiss_index=ready)
    with pytest.raises(ValueError, match=r"of 9 values, got 400 of 10 values"):
        build_reference_index(references[:, 1:], num_neighbors=10, faiss_index=ready)


def test_an_approximate_search_may_find_too_few():
    faiss = pytest.importorskip("faiss")
    faiss_index = faiss.index_factory(10, "IVF20,Flat", faiss.METRIC_INNER_PRODUCT)  # probes 1 list
    references = mixture(400)
    index = build_reference_index(
        references, num_neighbors=40, num_candidates=60, faiss_index=faiss_index
    )
    assert torch.isinf(index.similarity).any()
    distances, indices = contextual_rerank(
        references, index, 60, query_indices=torch.arange(400), keep_nearest=True
    )
    assert torch.equal(indices == -1, distances == torch.inf)
    assert torch.equal(indices[:, 0], torch.arange(400))
    for row in indices.tolist():
        found = [i for i in row if i >= 0]
        assert len(found) == len(set(found))
    assert not distances.isnan().any()


def reid_set(num_people=6, cameras=3, per_camera=4):
    people = torch.arange(num_people).repeat_interleave(cameras * per_camera)
    camera = torch.arange(cameras).repeat_interleave(per_camera).repeat(num_people)
    x = torch.randn(num_people, 10)[people] + 0.8 * torch.randn(cameras, 10)[camera]
    return x + 0.3 * torch.randn(len(people), 10), people, camera


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("k", [1, 6, 15])
def test_excluded_references_are_neither_neighbors_nor_results(as_function, k, monkeypatch):
    references, ref_ids, ref_cameras = reid_set()
    ids, cameras = torch.arange(20) % 6, torch.arange(20) % 3
    query = references[ids * 12 + cameras * 4] + 0.1 * torch.randn(20, 10)
    mask = (ids[:, None] == ref_ids) & (cameras[:, None] == ref_cameras)
    monkeypatch.setattr(_knn_search, "CHUNK_NUMEL", 500)
    monkeypatch.setattr(sparse_rows, "CHUNK_ROWS", 7)
    distances, indices = contextual_rerank(
        query,
        build_reference_index(references, num_neighbors=k),
        100,
        keep_nearest=False,
        exclude=(lambda rows: mask[rows]) if as_function else mask,
    )
    similarity = brute_force(query, references, k, exclude=mask)
    expected = (1 - similarity).masked_fill(mask, torch.inf)
    assert torch.allclose(distances.double(), expected.sort(1).values, atol=2e-3)
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
    assert torch.equal(indices[:, 0], rows)
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
    itself = contextual_rerank(
        references[:3], index, 6, query_indices=torch.arange(3), exclude=torch.ones_like(mask)
    )
    assert itself[1][:, 0].tolist() == [0, 1, 2]
    assert (itself[1][:, 1:] == -1).all()


def test_opposite_references_are_still_results():
    references = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    index = build_reference_index(references, num_neighbors=1)
    distances, indices = contextual_rerank(torch.tensor([[1.0, 0.0]]), index, 3)
    assert indices.tolist() == [[0, 2, 1]]
    assert distances[0, 0] < 1e-6
    assert (distances[0, 1:] > 0.999).all()
