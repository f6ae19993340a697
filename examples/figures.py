"""The figures of a run. They are drawn off screen, so no display is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from metrics import METRICS
from samples import Samples
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from pml_extras.label_noise import LabelNoiseDetector

RIGHT, WRONG, INK, MUTED = "#2a9d4a", "#d1343f", "#222222", "#777777"
COLORS = ("#4878cf", "#e8872b", "#6a3d9a")
TILE_PIXELS = 160
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def training_curves(path: Path, history: Sequence[dict[str, Any]], best_epoch: int) -> None:
    """Training loss and validation accuracy of each epoch."""
    trained = [row for row in history if row["epoch"] > 0]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        left.plot(
            [row["epoch"] for row in trained],
            [row["loss"] for row in trained],
            color=INK,
            marker=".",
        )
        left.set(title="Training loss", xlabel="epoch", ylabel="mean loss of the epoch")
        validated = [row for row in history if METRICS.keys() <= row.keys()]
        for (key, label), color in zip(METRICS.items(), COLORS, strict=True):
            right.plot(
                [row["epoch"] for row in validated],
                [row[key] for row in validated],
                color=color,
                marker=".",
                label=label,
            )
        right.set(xlabel="epoch", ylabel="accuracy")
        if validated:
            right.set_title("Validation (held-out samples of training classes)")
            right.axvline(best_epoch, color=MUTED, linestyle=":", label=f"best: epoch {best_epoch}")
            right.legend(frameon=True, framealpha=0.9, edgecolor="none")
        else:
            right.set_title("No validation set")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path)
        plt.close(figure)


def retrieval_board(
    path: Path, images: Samples, before: Tensor, after: Tensor, seed: int, rows: int = 8, k: int = 5
) -> None:
    """Random queries with their nearest images before and after training, right or wrong.

    Queries with a wrong neighbor before or after training are preferred. The others show no
    difference.
    """
    k = min(k, len(images) - 1)
    queries = _informative_queries(images, before, after, seed, rows, k)
    # All images are tiles of one axes object: a hundred axes would take seconds.
    blocks = [(1.4, "before", before), (1.8 + k, "after", after)]
    width = 1.8 + 2 * k
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(0.8 * width, 0.8 * (len(queries) + 1.1)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.text(0.05, -0.6, "Test samples: random queries with a wrong neighbor before or "
                  "after training", color=MUTED)  # fmt: skip
        axes.text(0.05, -0.15, "query", weight="bold", size=11)
        for x, when, _ in blocks:
            axes.text(x + 0.05, -0.15, f"{k} nearest {when} training", weight="bold", size=11)
        axes.text(width - 0.05, -0.3, "another class", color=WRONG, ha="right")
        axes.text(width - 0.05, -0.6, "same class", color=RIGHT, ha="right")
        for row, query in enumerate(queries):
            _tile(axes, images, query, 0, row, None)
            for x, _, embeddings in blocks:
                for column, index in enumerate(_nearest(embeddings, [query], k)[0].tolist()):
                    right = images.labels[index] == images.labels[query]
                    _tile(axes, images, index, x + column, row, RIGHT if right else WRONG)
        axes.set(xlim=(-0.1, width + 0.1), ylim=(len(queries) + 0.1, -1))
        figure.savefig(path)
        plt.close(figure)


def label_board(
    path: Path, images: Samples, detector: LabelNoiseDetector, rows: int = 8, k: int = 5
) -> None:
    """The most suspicious images, each with images of its labeled class and its suggested class."""
    issues = detector.find_label_issues()[:rows].tolist()
    order = detector.scores.argsort(descending=True)  # the most reliable examples first
    ordered_labels = detector.labels[order]
    blocks = [
        (1.4, "labeled class", detector.labels),
        (1.8 + k, "suggested class", detector.suggested_labels),
    ]
    width = 1.8 + 2 * k
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(0.8 * width, 0.8 * (1.25 * len(issues) + 1.1)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.text(0.05, -0.6, "Training images with the most suspicious labels"
                  if issues else "No label issues", color=MUTED)  # fmt: skip
        for x, title, _ in blocks if issues else ():
            axes.text(x + 0.05, -0.15, title, weight="bold", size=11)
        for row, issue in enumerate(issues):
            y = 1.25 * row
            _tile(axes, images, issue, 0, y, WRONG)
            axes.text(0.05, y + 1.12, _short(images.name(issue)), size=8, color=MUTED)
            for x, _, labels in blocks:
                label = int(labels[issue])
                axes.text(x + 0.05, y + 1.12, _short(images.names[label], 40), size=8, color=MUTED)
                examples = order[ordered_labels == label].tolist()
                examples = [i for i in examples if i != issue][:k]
                for column, index in enumerate(examples):
                    _tile(axes, images, index, x + column, y, None)
        axes.set(xlim=(-0.1, width + 0.1), ylim=(1.25 * len(issues) + 0.1, -1))
        figure.savefig(path)
        plt.close(figure)


def embedding_map(
    path: Path, images: Samples, before: Tensor, after: Tensor, seed: int, max_classes: int = 10
) -> None:
    """Up to ten test classes in two dimensions (t-SNE of cosine distances), before and after."""
    generator = np.random.default_rng(seed)
    labels = np.array(images.labels)
    classes = np.unique(labels)
    if len(classes) > max_classes:
        classes = np.sort(generator.choice(classes, max_classes, replace=False))
    chosen = np.flatnonzero(np.isin(labels, classes))
    chosen = np.sort(generator.permutation(chosen)[:1000])
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, both = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
        panels = (("Before training", before), ("After training", after))
        for axes, (title, embeddings) in zip(both, panels, strict=True):
            points = _two_dimensions(embeddings[torch.from_numpy(chosen)].numpy(), seed)
            for color, label in enumerate(classes):
                mask = labels[chosen] == label
                axes.scatter(*points[mask].T, s=14, color=plt.cm.tab10(color), linewidths=0,
                             alpha=0.85, label=_short(images.names[label]))  # fmt: skip
            axes.set(title=title, xticks=[], yticks=[])
            axes.set_aspect("equal", adjustable="datalim")
            axes.spines[:].set_visible(True)
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=5, markerscale=2)  # fmt: skip
        figure.suptitle(f"{len(classes)} test classes, t-SNE of {len(chosen)} samples")
        figure.savefig(path)
        plt.close(figure)


def similarity_distributions(
    path: Path, images: Samples, before: Tensor, after: Tensor, seed: int, max_samples: int = 2000
) -> None:
    """Cosine similarities of pairs of test samples: of the same class, and of different classes."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:max_samples]
    labels = torch.tensor(images.labels)[chosen]
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    is_positive = labels[first] == labels[second]
    with plt.rc_context(STYLE):
        figure, both = plt.subplots(
            1, 2, figsize=(10, 3.6), layout="constrained", sharex=True, sharey=True
        )
        for axes, when, embeddings in zip(both, ("Before", "After"), (before, after), strict=True):
            normalized = torch.nn.functional.normalize(embeddings[chosen].float())
            similarity = (normalized @ normalized.T)[first, second].clamp(-1, 1)
            for mask, color, label in (
                (~is_positive, WRONG, "different classes"),
                (is_positive, RIGHT, "same class"),
            ):
                axes.hist(similarity[mask].numpy(), bins=np.linspace(-1, 1, 101), density=True,
                          color=color, alpha=0.55, label=label)  # fmt: skip
            auc = roc_auc_score(is_positive.numpy(), similarity.numpy())
            axes.set(title=f"{when} training (AUC {auc:.3f})", xlabel="cosine similarity of a pair")
        both[0].set(ylabel="density", yticks=[])
        low = min(float((e[chosen] @ e[chosen].T).min()) for e in (before, after))
        both[0].set_xlim(max(-1.0, low), 1)
        both[0].legend(loc="upper right")
        figure.savefig(path)
        plt.close(figure)


def _informative_queries(
    images: Samples, before: Tensor, after: Tensor, seed: int, rows: int, k: int
) -> list[int]:
    """Random queries, those with a wrong neighbor first, and from as many classes as possible."""
    candidates = np.random.default_rng(seed).permutation(len(images))[:500].tolist()
    labels = torch.tensor(images.labels)
    neighbors = torch.cat([_nearest(e, candidates, k) for e in (before, after)], dim=1)
    all_right = (labels[neighbors] == labels[candidates][:, None]).all(dim=1).tolist()
    group_sizes: Counter[tuple[bool, int]] = Counter()
    order = []
    for index, perfect in zip(candidates, all_right, strict=True):
        group = (perfect, images.labels[index])
        order.append((perfect, group_sizes[group], index))  # the first of each class come first
        group_sizes[group] += 1
    chosen = [index for *_, index in sorted(order, key=lambda item: item[:2])[:rows]]
    return sorted(chosen, key=lambda index: images.labels[index])


def _nearest(embeddings: Tensor, queries: Sequence[int], k: int) -> Tensor:
    similarity = embeddings[list(queries)] @ embeddings.T
    similarity[torch.arange(len(queries)), list(queries)] = -torch.inf
    return similarity.topk(k).indices


def _tile(axes: Axes, images: Samples, index: int, x: float, y: float, frame: str | None) -> None:
    picture = images.picture(index)
    picture.thumbnail((TILE_PIXELS, TILE_PIXELS))
    pixels = np.asarray(picture)
    edges = (x + 0.05, x + 0.95, y + 0.95, y + 0.05)
    gray = {"cmap": "gray_r", "vmin": 0, "vmax": 255} if pixels.ndim == 2 else {}  # dark on white
    axes.imshow(fit(pixels), extent=edges, aspect="auto", **gray)
    if frame:
        axes.add_patch(plt.Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fill=False, ec=frame, lw=3))


def fit(pixels: np.ndarray) -> np.ndarray:
    """The largest square in the center."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _two_dimensions(embeddings: np.ndarray, seed: int) -> np.ndarray:
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    # With two threads that spin while they wait, t-SNE takes eight times as long on a busy machine.
    with threadpool_limits(1):
        points: np.ndarray = tsne.fit_transform(embeddings)
    return points


def _short(name: str, length: int = 22) -> str:
    name = name if len(name) <= length else f"…{name[1 - length :]}"
    # matplotlib reads $ as math, and leaves names with an underscore in front out of the legend.
    return name.replace("$", r"\$").replace("_", " _", name.startswith("_"))
