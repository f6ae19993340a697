#!/usr/bin/env python3
"""Draws the figures of the component pages: `python docs/pictures.py`.

Each figure is computed with the component that it shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import INK, MUTED, RIGHT, STYLE, WRONG
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from pml_extras import functional as f

CLASSES = ("#1b6ca8", "#e8872b", "#6a3d9a", "#2a9d4a")
HERE = Path(__file__).parent / "figures"


def on_circle(degrees: Tensor) -> Tensor:
    radians = torch.deg2rad(degrees)
    return torch.stack([radians.cos(), radians.sin()], 1)


def draw_circle(axes: Axes, title: str) -> None:
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
    axes.set(title=title, xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.grid(False)
    axes.spines[:].set_visible(False)


def colors(labels: Tensor) -> list[str]:
    return [CLASSES[label] for label in labels]


def center_contrastive_loss() -> Figure:
    centers = on_circle(torch.tensor([90.0, 210, 330]))
    labels = torch.arange(3).repeat_interleave(6)
    x = on_circle(torch.tensor([90.0, 210, 330])[labels] + 45 * torch.randn(18)).requires_grad_()
    figure, both = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    for axes, weight in zip(both, (0.0, 1.5), strict=True):
        losses = f.center_contrastive_loss(x, centers, labels, scale=4, center_weight=weight)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        with torch.no_grad():
            start, step = x.numpy(), -0.09 * gradient.numpy()
        draw_circle(axes, f"center_weight = {weight}")
        axes.scatter(*start.T, c=colors(labels), s=25, zorder=3)
        axes.scatter(*centers.T, c=CLASSES[:3], s=220, marker="*", edgecolors=INK, zorder=4)
        axes.quiver(*start.T, *step.T, color=colors(labels), angles="xy", scale_units="xy",
                    scale=1, width=0.006)  # fmt: skip
    return figure


def contextual_loss() -> Figure:
    # Four classes, the last two of which overlap.
    means = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.3, 1], [0, -0.2, 1]])
    labels = torch.arange(4).repeat_interleave(6)
    x = normalize(means[labels] + 0.22 * torch.randn(24, 3))
    similarities = f.pairwise_cosine(x)
    shown = {
        "cosine similarity": similarities,
        "contextual similarity": f.contextual_similarity(
            2 - 2 * similarities, num_neighbors=6, slack=0.02
        ),
        "target": (labels[:, None] == labels).float(),
    }
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained")
    for axes, (title, matrix) in zip(panels, shown.items(), strict=True):
        drawn = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="magma_r")
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
    figure.colorbar(drawn, ax=panels, shrink=0.8)
    return figure


def class_interference() -> Figure:
    labels = torch.arange(3).repeat_interleave(5)
    angles = torch.tensor([80.0, 200, 320])
    x = on_circle(angles[labels] + 12 * torch.randn(15))
    means = on_circle(angles)
    seen = torch.ones(3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(4)
    figure, both = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    for axes, strength in zip(both, (0.1, 0.3), strict=True):
        moved = f.class_interference(x, labels, means, seen, strength=strength, generator=generator)
        draw_circle(axes, f"strength = {strength}")
        axes.scatter(*x.T, facecolors="none", edgecolors=colors(labels), s=25)
        axes.scatter(*moved.T, c=colors(labels), s=25, zorder=3)
        axes.scatter(*means.T, c=CLASSES[:3], marker="X", s=130, edgecolors=INK, zorder=4)
        axes.quiver(*x.T, *(moved - x).T, color=colors(labels), angles="xy", scale_units="xy",
                    scale=1, width=0.004)  # fmt: skip
    return figure


def self_distillation() -> Figure:
    teacher = on_circle(torch.tensor([0.0, 20, 35, 80, 120, 190]))
    student = on_circle(torch.tensor([0.0, 5, 80, 90, 150, 200]))
    p, q = ((x @ x.T / 0.5).softmax(1)[0].numpy() for x in (teacher, student))
    divergence = f.listwise_kl(student, teacher, temperature=0.5)[0].item()
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    position = np.arange(6)
    axes.bar(position - 0.2, p, 0.4, color=MUTED, label="teacher")
    axes.bar(position + 0.2, q, 0.4, color=CLASSES[0], label="student")
    for i in position[1:]:
        axes.annotate("", (i + 0.2, p[i]), (i + 0.2, q[i]),
                      arrowprops={"arrowstyle": "->", "color": WRONG})  # fmt: skip
    axes.set(title=f"Similarity distribution of one sample: KL = {divergence:.3f}")
    axes.set_xticks(position, ["itself", *(f"sample {i}" for i in range(1, 6))])
    axes.set_axisbelow(True)
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def blobs(per_class: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Points of three classes, their true labels, and noisy labels with three errors."""
    true = torch.arange(3).repeat_interleave(per_class)
    x = torch.tensor([[0.0, 0], [2.4, 0.4], [1.0, 2.2]])[true] + 0.55 * torch.randn(len(true), 2)
    noisy = true.clone()
    noisy[[3, 14, 27]] = torch.tensor([1, 2, 0])
    return x, true, noisy


def contextual_miner() -> Figure:
    x, true, noisy = blobs()
    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, filtered in zip(both, (False, True), strict=True):
        a1, p, a2, n = f.contextual_pairs(
            x, noisy, num_neighbors=8, filter_noise=filtered, distance=torch.cdist
        )
        for first, second, color, width in ((a2, n, WRONG, 0.5), (a1, p, RIGHT, 0.7)):
            for i, j in zip(first.tolist(), second.tolist(), strict=True):
                axes.plot(*x[[i, j]].T, color=color, lw=width, alpha=0.5)
        axes.scatter(*x.T, c=colors(noisy), s=40, zorder=3)
        wrong = true != noisy
        axes.scatter(*x[wrong].T, facecolors="none", edgecolors=INK, s=160, lw=1.6, zorder=4)
        axes.set(title=f"filter_noise={filtered}", xticks=[], yticks=[])
    figure.text(0.5, -0.04, "green: positive pairs, red: negative pairs, ringed: wrong labels",
                ha="center", color=MUTED)  # fmt: skip
    return figure


def contextual_knn() -> Figure:
    t = torch.linspace(0, np.pi, 40)
    moons = torch.cat([torch.stack([t.cos(), t.sin()], 1),
                       torch.stack([1 - t.cos(), 0.35 - t.sin()], 1)])  # fmt: skip
    x = moons + 0.07 * torch.randn(80, 2)
    labels = torch.arange(80) // 40
    # On a small part of a sphere, angles are proportional to distances in the plane.
    embeddings = normalize(torch.cat([x / 50, torch.ones(80, 1)], 1)).double()
    index = f.build_reference_index(embeddings, num_neighbors=8)
    plain = (-f.pairwise_cosine(embeddings)).argsort()[:, 1:11]
    self_indices = torch.arange(80)
    _, ranked = f.contextual_rerank(embeddings, index, 11, query_indices=self_indices)
    ranked = ranked[:, 1:]
    # The query that gains most.
    gain = (labels[ranked] == labels[:, None]).sum(1) - (labels[plain] == labels[:, None]).sum(1)
    query = int(gain.argmax())
    plain, ranked = plain[query], ranked[query]
    figure, both = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, title, neighbors in zip(both, ("nearest", "re-ranked"), (plain, ranked), strict=True):
        axes.scatter(*x.T, c=colors(labels), s=16, alpha=0.6)
        is_right = labels[neighbors] == labels[query]
        edges = [RIGHT if right else WRONG for right in is_right]
        axes.scatter(*x[neighbors].T, facecolors="none", edgecolors=edges, s=90, lw=1.8)
        axes.scatter(*x[query], c=INK, marker="*", s=160)
        axes.set(title=f"10 {title}: {int(is_right.sum())} of its class", xticks=[], yticks=[])
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        center_contrastive_loss,
        contextual_loss,
        class_interference,
        self_distillation,
        contextual_miner,
        contextual_knn,
    )
}


def main(folder: Path = HERE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Makes the files reproducible.
    with plt.rc_context({**STYLE, "svg.hashsalt": "pml_extras"}):
        for name, draw in PICTURES.items():
            torch.manual_seed(0)
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
