from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel

from pml_extras.inference import ContextualKNN

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def mixture(num_classes=12, per_class=15, dim=16, noise=1.1):
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    centers = torch.nn.functional.normalize(torch.randn(num_classes, dim))
    spread = torch.nn.functional.normalize(torch.randn(len(labels), dim))
    return centers[labels] + noise * spread, labels


def get_accuracy(knn_func, *args, **kwargs):
    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", knn_func=knn_func)
    return calculator.get_accuracy(*args, **kwargs)


def test_improves_retrieval_of_overlapping_classes():
    x, labels = mixture()
    plain = get_accuracy(CustomKNN(CosineSimilarity()), x, labels)
    contextual = get_accuracy(ContextualKNN(num_neighbors=15), x, labels)
    gain = contextual["mean_average_precision_at_r"] - plain["mean_average_precision_at_r"]
    assert gain > 0.05


def test_precision_at_1_is_that_of_the_plain_search():
    x, labels = mixture()
    query, query_labels = mixture(per_class=3)
    plain = CustomKNN(CosineSimilarity())
    for args in ((x, labels), (query, query_labels, x, labels)):
        kept, free, expected = (
            get_accuracy(knn, *args)
            for knn in (ContextualKNN(), ContextualKNN(keep_nearest=False), plain)
        )
        assert kept["precision_at_1"] == expected["precision_at_1"]
        assert free["precision_at_1"] != expected["precision_at_1"]


def test_the_reference_may_include_the_query():
    x, labels = mixture()
    query, query_labels = x[:40], labels[:40]
    indices = ContextualKNN()(query, 20, x, True)[1]
    assert indices.shape == (40, 20)
    assert not (indices == torch.arange(40)[:, None]).any()
    all_indices = ContextualKNN()(x, 20, x, True)[1]
    assert torch.equal(indices, all_indices[:40])
    result = get_accuracy(ContextualKNN(), query, query_labels, x, labels, ref_includes_query=True)
    assert 0 < result["precision_at_1"] <= 1


@pytest.mark.parametrize("ref_includes_query", [False, True])
def test_returns_all_references_if_k_is_larger(ref_includes_query):
    x, _ = mixture(num_classes=2, per_class=4)
    distances, indices = ContextualKNN()(x, 50, x, ref_includes_query)
    assert indices.shape == distances.shape == (8, 8 - ref_includes_query)


def test_works_in_a_tester_and_an_inference_model(tmp_path):
    x, labels = mixture()
    data = torch.utils.data.TensorDataset(x, labels)
    tester = GlobalEmbeddingSpaceTester(
        accuracy_calculator=AccuracyCalculator(
            include=METRICS, k="max_bin_count", knn_func=ContextualKNN()
        ),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    result = tester.test({"val": data}, 0, torch.nn.Identity())["val"]
    expected = get_accuracy(ContextualKNN(), x, labels)["precision_at_1"]
    assert result["precision_at_1_level0"] == expected

    knn = ContextualKNN()
    model = InferenceModel(torch.nn.Identity(), knn_func=knn, data_device=torch.device("cpu"))
    model.train_knn(x[:100])
    model.add_to_knn(x[100:])
    expected = ContextualKNN()(x[:5], 7, x)
    actual = model.get_nearest_neighbors(x[:5], 7)
    assert torch.equal(actual[1], expected[1])

    model.save_knn_func(tmp_path / "references.pt")
    knn.reset()
    with pytest.raises(ValueError, match="there are no references: pass some, or call train"):
        model.get_nearest_neighbors(x[:5], 7)
    with pytest.raises(ValueError, match="no references to save"):
        model.save_knn_func(tmp_path / "none.pt")
    model.load_knn_func(tmp_path / "references.pt")
    assert torch.equal(model.get_nearest_neighbors(x[:5], 7)[1], expected[1])


def test_a_loaded_index_answers_with_its_own_number_of_neighbors(tmp_path):
    x = torch.randn(60, 8)
    saved = ContextualKNN(num_neighbors=5)
    saved.train(x)
    saved.save(tmp_path / "references.pt")
    loaded = ContextualKNN(num_neighbors=20)
    loaded.load(tmp_path / "references.pt")
    assert "num_neighbors=5," in repr(loaded)
    assert torch.equal(loaded(x[:9], 7)[1], saved(x[:9], 7)[1])
    few = ContextualKNN(num_neighbors=20)
    few.train(x[:4])
    few.save(tmp_path / "few.pt")
    loaded.load(tmp_path / "few.pt")
    assert loaded.num_neighbors == 20
    loaded.load(tmp_path / "references.pt")
    more = torch.randn(30, 8)
    loaded.add(more)
    query = torch.randn(9, 8)
    expected = ContextualKNN(num_neighbors=5)(query, 7, torch.cat([x, more]))
    assert torch.allclose(loaded(query, 7)[0], expected[0], atol=1e-5)


def test_accepts_numpy_arrays():
    x, query = torch.randn(60, 8), torch.randn(9, 8)
    expected = ContextualKNN()(query, 7, x)[1]
    assert torch.equal(ContextualKNN()(query.numpy(), 7, x.numpy())[1], expected)
    knn = ContextualKNN()
    knn.train(x[:40].numpy())
    knn.add(x[40:].numpy())
    assert torch.equal(knn(query, 7)[1], expected)
    labels = torch.arange(60) % 6
    arrays = get_accuracy(ContextualKNN(), x.numpy(), labels.numpy())
    assert arrays == get_accuracy(ContextualKNN(), x, labels)


def test_excludes_references_of_a_query():
    x, labels = mixture(num_classes=6, per_class=8)
    camera = torch.arange(len(x)) % 2
    exclude = (labels[:, None] == labels) & (camera[:, None] == camera)
    distances, indices = ContextualKNN(num_neighbors=8)(x, 5, x, True, exclude=exclude)
    assert distances.isfinite().all()
    assert not exclude.gather(1, indices).any()
    knn = ContextualKNN(num_neighbors=8)
    knn.train(x)
    found = knn(x[:9], 5, exclude=exclude[:9])[1]
    assert not exclude[:9].gather(1, found).any()
    assert torch.equal(knn(x[:9].numpy(), 5, exclude=exclude[:9].numpy())[1], found)
    assert knn(x[:0], 5, exclude=exclude[:0])[1].shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda knn, x: knn(x, 3, exclude=torch.zeros(9, 9).bool()),
            "8 rows, one per query, got 9",
        ),
        (lambda knn, x: knn(x, 3, exclude=torch.zeros(8, 8)), "must be bool of shape"),
        (lambda knn, x: knn(x, 3, exclude=torch.zeros(8, 7).bool()), r"\(8, 8\), got .*\(8, 7\)"),
        (lambda knn, x: knn(x, -1), "k must be a whole number from 1 up, got -1"),
        (lambda knn, x: knn(x, 3, x[:4], True), "the first 8 references must be the queries"),
    ],
)
def test_invalid_calls_are_reported(call, message):
    knn, x = ContextualKNN(num_neighbors=np.int64(4)), torch.randn(8, 6)
    knn.train(x)
    with pytest.raises(ValueError, match=message):
        call(knn, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_references_move_to_the_device_of_the_queries(tmp_path):
    x = torch.randn(50, 8)
    knn = ContextualKNN(num_neighbors=10)
    knn.train(x.cuda())
    expected = knn(x[:5].cuda(), 7)[1]
    knn.save(tmp_path / "references.pt")
    knn.load(tmp_path / "references.pt")
    assert torch.equal(knn(x[:5], 7)[1], expected.cpu())
    assert torch.equal(knn(x[:5].cuda(), 7)[1], expected)
    knn.load(tmp_path / "references.pt")
    knn.add(x.cuda())
    assert len(knn.index.embeddings) == 100


def test_invalid_hyperparameters_are_reported():
    for value in (0, 2.5):
        message = f"^num_neighbors must be a whole number from 1 up, got {value!r}"
        with pytest.raises(ValueError, match=message):
            ContextualKNN(num_neighbors=value)
    assert repr(ContextualKNN(num_neighbors=7, faiss_index="HNSW16")) == (
        "ContextualKNN(num_neighbors=7, keep_nearest=True, faiss_index='HNSW16')"
    )


def test_searches_with_an_index_of_faiss(tmp_path):
    pytest.importorskip("faiss")
    x, labels = mixture()
    exact, flat = ContextualKNN(), ContextualKNN(faiss_index="Flat")
    assert get_accuracy(flat, x, labels) == get_accuracy(exact, x, labels)
    flat.train(x[:90])
    flat.add(x[90:])
    expected = exact(x[:9], 7, x)[1]
    assert torch.equal(flat(x[:9], 7)[1], expected)
    flat.save(tmp_path / "references.pt")
    loaded = ContextualKNN(faiss_index="Flat")
    loaded.load(tmp_path / "references.pt")
    assert loaded.index.faiss_index.ntotal == len(x)
    assert torch.equal(loaded(x[:9], 7)[1], expected)


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_rejected(bad_value):
    x = torch.randn(50, 4)
    broken = x.clone()
    broken[3, 1] = bad_value
    for query, reference, name in ((broken, x, "query"), (x, broken, "reference")):
        with pytest.raises(ValueError, match=f"{name} must be finite, and row 3 is not"):
            ContextualKNN()(query, 5, reference)
    with pytest.raises(ValueError, match="must have at least one row"):
        ContextualKNN()(x, 5, x[:0])


def test_accepts_float64():
    x = torch.randn(50, 4, dtype=torch.float64)
    distances, _ = ContextualKNN(num_neighbors=5)(x, 5, x, True)
    expected = ContextualKNN(num_neighbors=5)(x.float(), 5, x.float(), True)
    assert torch.allclose(distances, expected[0].double(), atol=1e-6)


def test_dtypes_of_query_and_reference_may_differ():
    x, references = torch.randn(2, 50, 4).half().float()
    expected = ContextualKNN(num_neighbors=5)(x, 5, references)
    for query, reference in (
        (x.double(), references),
        (x, references.double()),
        (x.half(), references),
    ):
        knn = ContextualKNN(num_neighbors=5)
        knn.train(reference)
        for actual in (knn(query, 5), knn(query, 5, reference)):
            assert torch.allclose(actual[0].float(), expected[0], atol=1e-6)


def test_invalid_shapes_and_dtypes_are_reported():
    knn, x = ContextualKNN(num_neighbors=5), torch.randn(20, 4)
    with pytest.raises(ValueError, match=r"query must have shape \(batch_size, 4\), got \(20, 3\)"):
        knn(x[:, :3], 5, x)
    with pytest.raises(ValueError, match="query must have shape"):
        knn(x[0], 5, x)
    with pytest.raises(ValueError, match="reference must have shape"):
        knn(x, 5, x[0])
    with pytest.raises(ValueError, match="embeddings must be floating-point"):
        knn.train(x.long())
