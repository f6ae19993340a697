"""Formulas in float64, as plainly as the docstrings state them, and when they can be compared."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(x: Tensor) -> Tensor:
    """(N, D) rows scaled to length one, in float64."""
    x = x.double()
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def knn_mask(distances: Tensor, k: int, slack: float) -> Tensor:
    """1 where the distance is at most that of the k-th neighbor plus ``slack``, else 0."""
    return (distances <= distances.sort(1).values[:, k - 1 : k] + slack).double()


def contextual_similarity_formula(
    distances: Tensor, k: int, slack: float, ref_distances: Tensor | None = None
) -> Tensor:
    """The contextual similarity of queries to references, from (N, R) and (R, R) distances.

    Without ``ref_distances`` the queries are the references.
    """
    to_self = ref_distances is None
    ref = (distances if to_self else ref_distances).clone()
    # Each reference is its own nearest neighbor.
    ref.fill_diagonal_(0)
    ref[torch.arange(len(ref)), torch.arange(len(ref))] = (
        distances if to_self else ref_distances
    ).amin(1)
    k = min(k, ref.shape[1])
    half = max(k // 2, 1)

    def neighborhood_overlap(a, b):
        inside = a @ b.T / a.sum(1, keepdim=True)
        outside = (1 - a) @ (1 - b).T / (1 - a).sum(1, keepdim=True).clamp_min(1)
        return (inside + outside) / 2

    def average(weights, values):
        return weights @ values / weights.sum(1, keepdim=True).clamp_min(1)

    ref_knn, ref_half_knn = knn_mask(ref, k, slack), knn_mask(ref, half, slack)
    ref_weights = neighborhood_overlap(ref_knn, ref_knn) * ref_knn
    ref_reciprocal = ref_half_knn * ref_half_knn.T
    if to_self:
        expanded = average(ref_reciprocal, ref_weights)
        return (expanded + expanded.T) / 2
    radius = ref.sort(1).values[:, k - 1] + slack
    half_radius = ref.sort(1).values[:, half - 1] + slack
    knn, half_knn = knn_mask(distances, k, slack), knn_mask(distances, half, slack)
    query_to_ref = average(half_knn * (distances <= half_radius), ref_weights)
    overlap = neighborhood_overlap(ref_knn, knn) * (distances <= radius).double().T
    ref_to_query = average(ref_reciprocal, overlap)
    return (query_to_ref + ref_to_query.T) / 2


def has_no_near_ties(
    distances: Tensor,
    k: int,
    slack: float,
    ref_distances: Tensor | None = None,
    tolerance: float = 1e-4,
) -> bool:
    """Whether no distance is so close to a neighborhood's radius that rounding could decide."""
    tables = [distances] if ref_distances is None else [distances, ref_distances]
    radii_to_check = []
    for number, table in enumerate(tables):
        table = table.clone()
        if number == len(tables) - 1:
            at = torch.arange(len(table))
            table[at, at] = table.amin(1)
        kk = min(k, table.shape[1])
        for r in (kk, max(kk // 2, 1)):
            radius = table.sort(1).values[:, r - 1 : r]
            close = ((table - radius - slack).abs() <= tolerance).sum(1)
            # Without slack, the k-th neighbor lies exactly on the radius that it defines.
            if (close > (1 if slack <= tolerance else 0)).any():
                return False
            if 0 < slack <= tolerance:
                return False
            if ref_distances is not None and number == 1:
                radii_to_check.append(radius.T + slack)
    return not any(((distances - radius).abs() <= tolerance).any() for radius in radii_to_check)


def norms_fit_float32(*batches: Tensor) -> bool:
    """Whether torch can normalize all rows in float32.

    It divides by at least 1e-12, and above 1e19 the squared norm overflows.
    """
    for x in batches:
        norms = x.double().norm(dim=1)
        if not ((norms == 0) | ((norms > 1e-11) & (norms < 1e18))).all():
            return False
    return True


def gradients_fit_dtype(x: Tensor, slope: float) -> bool:
    """Whether gradients with respect to x are finite in x's dtype.

    ``slope`` is an upper bound of the norm of the gradient with respect to x / |x|.
    """
    norm = float(x.detach().double().norm(dim=1).clamp_min(1e-12).amin()) if len(x) else 1.0
    return slope / norm < torch.finfo(x.dtype).max / 100
