"""Plain implementations of the formulas, as research code has them, to compare the package with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import KLDivLoss, LogSoftmax, Softmax
from torch.nn.functional import cross_entropy, kl_div, normalize


def center_contrastive_loss(embeddings: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits of all classes, with a margin, plus the center term."""
    x, c = normalize(embeddings), normalize(centers)
    cosines = x @ c.T
    target = cosines.gather(1, labels[:, None])
    logits = 16 * cosines.scatter(1, labels[:, None], target - 0.2)
    return cross_entropy(logits, labels) + 1.5 * (2 - 2 * target).mean()


def listwise_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """All samples at once, with torch's kl_div."""
    f, g = normalize(student), normalize(teacher)
    return kl_div((f @ f.T).log_softmax(1), (g @ g.T).softmax(1), reduction="batchmean")


def listwise_kl_loop(
    student: Tensor, teacher: Tensor, labels: np.ndarray, temperature: float = 1.0
) -> Tensor:
    """One sample at a time, like the authors' triplet_lsd.py.

    Their code orders the similarities by positive and negative pairs. The divergence does not
    depend on the order.
    """
    f, g = normalize(student), normalize(teacher)
    student_similarity, teacher_similarity = f @ f.T, g @ g.T
    divergences = []
    for i in range(len(f)):
        positive, negative = labels == labels[i], labels != labels[i]
        q, p = (
            torch.cat([row[positive][None], row[negative][None]], dim=1) / temperature
            for row in (student_similarity[i], teacher_similarity[i])
        )
        q, p = LogSoftmax(dim=1)(q), Softmax(dim=1)(p)
        divergences.append(KLDivLoss(reduction="batchmean")(q, p.detach()))
    return torch.stack(divergences).mean()


def k_reciprocal_rerank(
    embeddings: np.ndarray, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """k-reciprocal re-ranking (Zhong et al. 2017) of a set against itself.

    As in the usual code: dense matrices, and a loop over the samples.
    """
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


def database_augmentation(x: Tensor, k: int, alpha: float) -> Tensor:
    """Each normalized feature becomes the mean of its k nearest, itself included.

    The weights are cos^alpha. The features of a set searched in itself are queries and references
    at once, so that this is also alpha query expansion (Radenovic et al. 2018).
    """
    similarity, indices = (x @ x.T).topk(k, dim=1)
    weights = similarity.clamp_min(0) ** alpha
    return normalize((weights[:, :, None] * x[indices]).sum(1))


def gnn_rerank(x: Tensor, k1: int = 26, k2: int = 7) -> Tensor:
    """The similarity of GNN re-ranking (Zhang et al. 2020, arXiv 2012.07620), in dense matrices.

    The k nearest neighbors of each sample as a symmetric graph, and two rounds in which each sample
    adds the rows of its k2 nearest with the weights cos^2.
    """
    similarity, ranked = (x @ x.T).topk(k1, dim=1)
    rows = torch.zeros(len(x), len(x)).scatter_(1, ranked, 1.0)
    neighbors, weights = ranked[:, :k2], similarity[:, :k2].square()
    for _ in range(2):
        rows = rows + rows.T
        rows = torch.stack([w @ rows[n] for w, n in zip(weights, neighbors, strict=True)])
        rows = normalize(rows)
    return rows @ rows.T
