"""Re-ranking: ContextualKNN beside what people use instead, in quality and in time.

    python -m benchmarks.reranking --data-root DIR    # 8 minutes on two cores
    python -m benchmarks.reranking --large            # 1,000,000 references; 15 GiB

Each test image is a query against all others. The networks of Omniglot and CIFAR-100 are trained
with MultiSimilarityLoss; the photographs are embedded by EfficientNet-Lite0 without training. The
results go to benchmarks/results/reranking.json, and the tables to docs/reranking-tables.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor
from torch.nn.functional import normalize

from pml_extras.functional import _knn_search
from pml_extras.inference import ContextualKNN

from . import reference
from .evidence import data, examples, metrics, training
from .evidence.components import Components, Sizes
from .evidence.conditions import Scenario
from .evidence.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "reranking.json"
PAGE = Path(__file__).parents[1] / "docs" / "reranking-tables.md"
SEEDS = range(2)  # of the trained networks
EXPANSIONS = [(k, alpha) for k in (5, 10, 20, 50) for alpha in (0, 3)]
Ranking = Callable[[Tensor, int], Tensor]  # (N, D) normalized and k to the (N, k) nearest others


# ---- Methods.


def plain(x: Tensor, k: int) -> Tensor:
    self_index = torch.arange(len(x))[:, None]
    found = _knn_search.knn_search(x, x, k + 1)
    return _knn_search.move_to_front(self_index, *found)[1][:, 1:]


def expanded(neighbors: int, alpha: float) -> Ranking:
    return lambda x, k: plain(reference.database_augmentation(x, neighbors, alpha), k)


def k_reciprocal(x: Tensor, k: int) -> Tensor:
    return nearest_others(-torch.from_numpy(reference.k_reciprocal_rerank(x.numpy())), k)


def gnn(x: Tensor, k: int) -> Tensor:
    return nearest_others(reference.gnn_rerank(x), k)


def contextual(**options: Any) -> Ranking:
    return lambda x, k: ContextualKNN(**options)(x, k, x, ref_includes_query=True)[1]


def nearest_others(similarity: Tensor, k: int) -> Tensor:
    return similarity.fill_diagonal_(-torch.inf).topk(k, dim=1).indices


METHODS: dict[str, Ranking] = {
    "cosine similarity": plain,
    "database augmentation, 10 neighbors": expanded(10, 3),
    "k-reciprocal (20, 6, 0.3)": k_reciprocal,
    "GNN re-ranking (26, 7)": gnn,
    "ContextualKNN": contextual(),
    "ContextualKNN, keep_nearest=False": contextual(keep_nearest=False),
}
BEST_EXPANSION = f"database augmentation, best of {len(EXPANSIONS)} on these labels"


# ---- Data: names, embeddings and labels of test classes.


def test_sets(root: Path | None) -> Iterator[tuple[str, Tensor, list[int]]]:
    for dataset in ("omniglot", "cifar100"):
        for seed in SEEDS:
            yield (dataset, *trained_embeddings(dataset, seed, root))
    for dataset in ("cars196", "cub"):
        yield (dataset, *pretrained_features(dataset, root))


def trained_embeddings(dataset: str, seed: int, root: Path | None) -> tuple[Tensor, list[int]]:
    scenario, budget = Scenario(dataset, "scratch"), PRESETS["small"].budget
    train_data = data.load_train(scenario, seed, root)
    test = data.load_test(scenario, seed, root).images
    training.seed_everything(seed)
    network = training.build_network(train_data.images, budget)
    components = Components(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner())
    sizes = Sizes(len(train_data.images.names), budget.embedding_size, 4, budget.batch_size)
    device = torch.device("cpu")
    batches = data.Batches(train_data.images, sizes, True, budget.steps_per_epoch, device)
    training.fit(network, components, {"lr": 2e-3}, batches, budget.epochs)
    return metrics.embed(network, test, device), test.labels


@torch.no_grad()
def pretrained_features(dataset: str, root: Path | None) -> tuple[Tensor, list[int]]:
    loaded = examples.load(dataset, root)
    trunk = examples.build_trunk("efficientnet_lite0", channels=3, size=160)
    transform = trunk.transform(loaded)
    pictures = (transform(loaded.test.picture(i)) for i in range(len(loaded.test)))
    features = torch.cat([trunk.network.eval()(p[None]) for p in pictures])
    return normalize(features), loaded.test.labels


# ---- Measurements.


def quality(ranking: Ranking, x: Tensor, labels: list[int]) -> tuple[float, float]:
    """MAP@R and precision@1."""

    def knn(query: Tensor, k: int, *_: Any) -> tuple[None, Tensor]:
        return None, ranking(query, k)

    scores = metrics.retrieval(x, labels, knn, [metrics.MAP, metrics.P1])
    return scores[metrics.MAP], scores[metrics.P1]


def measure_quality(root: Path | None) -> dict[str, Any]:
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, x, labels in test_sets(root):
        scores = {method: quality(ranking, x, labels) for method, ranking in METHODS.items()}
        scores[BEST_EXPANSION] = max(quality(expanded(*e), x, labels) for e in EXPANSIONS)
        for method, score in scores.items():
            rows.setdefault(method, {}).setdefault(name, []).append(score)
            print(name, len(x), method, *(f"{s:.4f}" for s in score), flush=True)
    return {
        method: {
            name: [round(sum(values) / len(values), 5) for values in zip(*scores, strict=True)]
            for name, scores in by_set.items()
        }
        for method, by_set in rows.items()
    }


def clustered(n: int, noise: float = 1.6) -> Tensor:
    """Normalized vectors of 128 values in classes of 20, whose 20 nearest are half of their class.

    It is hard for sparse re-ranking: neighborhoods overlap little, so contexts are long.
    """
    centers = normalize(torch.randn(n // 20, 128))
    x = centers[torch.arange(n) % len(centers)] + noise / 128**0.5 * torch.randn(n, 128)
    return normalize(x)


def measure_time(n: int, dense: bool = True) -> dict[str, float]:
    torch.manual_seed(0)
    x = clustered(n)
    cases: dict[str, Callable[[], Any]] = {
        "faiss": lambda: _knn_search.knn_search(x, x, 100),
        "ContextualKNN": lambda: contextual()(x, 100),
    }
    if dense:
        cases["k-reciprocal (20, 6, 0.3)"] = lambda: k_reciprocal(x, 100)
    return {name: timed(name, run)[0] for name, run in cases.items()}


def measure_large(n: int = 1_000_000) -> dict[str, Any]:
    """Through an approximate index, whose recall is measured on 1,000 queries."""
    import faiss

    torch.manual_seed(0)
    x = clustered(n)
    exact = _knn_search.knn_search(x[:1000], x, 20)[1]
    results: dict[str, Any] = {}
    for description, setting in (("IVF4096,Flat", {"nprobe": 32}), ("HNSW32", {})):
        index = faiss.index_factory(128, description, faiss.METRIC_INNER_PRODUCT)
        for name, value in setting.items():
            setattr(index, name, value)
        filling, index = timed(description, lambda i=index: _knn_search.build_faiss_index(i, x))
        found = torch.from_numpy(index.search(x[:1000].numpy(), 20)[1])
        recall = (found[:, :, None] == exact[:, None]).any(2).double().mean().item()
        knn = ContextualKNN(faiss_index=index)
        seconds, _ = timed("ContextualKNN", lambda knn=knn: knn(x, 100, x, ref_includes_query=True))
        peak = training.resident("VmHWM") / 2**30
        row = {"filling": filling, "recall": recall, "seconds": seconds, "peak_gib": peak}
        results[description] = row
        print(description, results[description], flush=True)
    return results


def timed(name: str, run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.2f} s", flush=True)
    return seconds, result


# ---- Tables.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data.add_data_root(parser)
    parser.add_argument("--large", action="store_true", help="only 1,000,000 references")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.large:
        results["large"] = measure_large()
    else:
        results["threads"] = torch.get_num_threads()
        results["seconds"] = {str(n): measure_time(n) for n in (5_000, 20_000)}
        results["quality"] = measure_quality(args.data_root)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(results))


SETS = {"omniglot": "Omniglot", "cifar100": "CIFAR-100", "cars196": "Cars196", "cub": "CUB"}


def render(results: dict[str, Any]) -> str:
    lines = [f"| MAP@R, precision@1 | {' | '.join(SETS.values())} |", f"|{' --- |' * 5}"]
    for method, by_set in results["quality"].items():
        cells = [f"{by_set[name][0]:.3f}, {by_set[name][1]:.3f}" for name in SETS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    sizes = list(results["seconds"])
    heads = " | ".join(f"{int(n):,} samples" for n in sizes)
    lines += ["", f"| seconds, {results['threads']} threads | {heads} |", "| --- | --- | --- |"]
    for method in results["seconds"][sizes[0]]:
        cells = [f"{results['seconds'][n][method]:.2f}" for n in sizes]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if "large" in results:
        lines += [
            "",
            "| 1,000,000 samples | recall@20 | seconds to fill | seconds to re-rank | peak |",
        ]
        lines.append(f"|{' --- |' * 5}")
        for index, row in results["large"].items():
            cells = f"{row['recall']:.3f} | {row['filling']:.0f} | {row['seconds']:.0f}"
            lines.append(f"| `{index}` | {cells} | {row['peak_gib']:.1f} GiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
