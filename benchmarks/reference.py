"""What the package is measured against: the formulas written down plainly, as research code has
them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import KLDivLoss, LogSoftmax, Softmax
from torch.nn.functional import cross_entropy, kl_div, normalize


class Step(torch.autograd.Function):
    """The Heaviside function, with a constant slope in backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 10 * grad


def contextual_loss(embeddings: Tensor, labels: Tensor, k: int = 4, slack: float = 0.05) -> Tensor:
    """The contextual term, transcribed line by line: three products forward, six backward."""
    x = normalize(embeddings)
    n = len(x)
    d = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = d.detach().sort(1).values
    m = Step.apply(ordered[:, k - 1 : k] + slack - d)
    m2 = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - d)
    c = m.sum(1, keepdim=True).detach()
    inside = m @ m.T / c
    outside = (1 - m) @ (1 - m).T / (n - c).clamp_min(1)
    w = 0.5 * (inside + outside) * m
    r = m2 * m2.T
    j = r @ w / r.sum(1, keepdim=True)
    s = (j + j.T) / 2
    y = (labels[:, None] == labels).to(x.dtype)
    off_diagonal = 1 - torch.eye(n)
    return ((s - y).square() * off_diagonal).sum() / n**2


def center_contrastive_loss(embeddings: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Plain logits for all classes, margin and cross-entropy."""
    x, c = normalize(embeddings), normalize(centers)
    cosines = x @ c.T
    own = cosines.gather(1, labels[:, None])
    logits = 16 * cosines.scatter(1, labels[:, None], own - 0.2)
    return cross_entropy(logits, labels) + 1.5 * (2 - 2 * own).mean()


def listwise_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """All samples at once, in the operations that torch has for it."""
    f, g = normalize(student), normalize(teacher)
    return kl_div((f @ f.T).log_softmax(1), (g @ g.T).softmax(1), reduction="batchmean")


def listwise_kl_loop(
    student: Tensor, teacher: Tensor, labels: np.ndarray, temperature: float = 1.0
) -> Tensor:
    """One sample at a time, in the steps of the authors' triplet_lsd.py. The similarities to its
    own class and to the others are taken apart and put end to end, which changes no divergence."""
    f, g = normalize(student), normalize(teacher)
    of_student, of_teacher = f @ f.T, g @ g.T
    divergences = []
    for i in range(len(f)):
        same, others = labels == labels[i], labels != labels[i]
        q, p = (
            torch.cat([row[same][None], row[others][None]], dim=1) / temperature
            for row in (of_student[i], of_teacher[i])
        )
        q, p = LogSoftmax(dim=1)(q), Softmax(dim=1)(p)
        divergences.append(KLDivLoss(reduction="batchmean")(q, p.detach()))
    return torch.stack(divergences).mean()


def k_reciprocal_rerank(
    embeddings: np.ndarray, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """k-reciprocal re-ranking (Zhong et al. 2017) of a set against itself, as usually written:
    dense matrices, and a loop over the samples."""
    n = len(embeddings)
    x = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    original = (2 - 2 * x @ x.T).astype(np.float32)
    original /= original.max(axis=0)
    v = np.zeros_like(original)
    rank = np.argpartition(original, range(1, k1 + 1))

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = rank[i, : k + 1]
        backward = rank[forward, : k + 1]
        return forward[np.where(backward == i)[0]]

    for i in range(n):
        index = expanded = reciprocal(i, k1)
        for candidate in index:
            more = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(np.intersect1d(more, index)) > 2 / 3 * len(more):
                expanded = np.append(expanded, more)
        expanded = np.unique(expanded)
        weights = np.exp(-original[i, expanded])
        v[i, expanded] = weights / weights.sum()
    if k2 > 1:
        v = np.stack([v[rank[i, :k2]].mean(axis=0) for i in range(n)])
    inverted = [np.where(v[:, i] != 0)[0] for i in range(n)]
    jaccard = np.zeros_like(original)
    for i in range(n):
        shared = np.zeros(n, dtype=np.float32)
        for j in np.where(v[i] != 0)[0]:
            shared[inverted[j]] += np.minimum(v[i, j], v[inverted[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return jaccard * (1 - weight) + original * weight
