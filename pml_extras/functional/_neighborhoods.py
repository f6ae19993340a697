"""k-nearest neighborhoods: what all forms of the contextual similarity share."""

from typing import TypeAlias

from torch import Tensor

NumNeighbors: TypeAlias = int | Tensor  # k of all rows, or (B,) int64, one per row

# The straight-through estimator of [D <= radius] has this derivative with respect to D everywhere.
# It is the authors' choice.
STEP_SLOPE = -10.0


def squared_distances(similarities: Tensor) -> Tensor:
    """Squared Euclidean distances of normalized embeddings, from their cosine similarities."""
    return (2 - 2 * similarities).clamp_min(0)


def self_nearest(distances: Tensor, self_index: Tensor) -> Tensor:
    """The distances with every sample as its own nearest neighbor, at a distance without gradient.

    Rounding, or a distance such as the negative dot product, can put other samples first.

    Args:
        distances: (B, N).
        self_index: (B,) int64, the column of each row's own sample.
    """
    nearest = distances.detach().amin(1, keepdim=True)
    return distances.scatter(1, self_index[:, None], nearest)


def knn_radii(
    distances: Tensor, num_neighbors: NumNeighbors, slack: float
) -> tuple[Tensor, Tensor]:
    """Radii of the neighborhoods of k and of k // 2 neighbors, (B, 1) each, without gradient.

    A radius is the distance to the k-th nearest neighbor plus the slack. k is clamped to N, k // 2
    to 1 or more.
    """
    if isinstance(num_neighbors, int):
        k = min(num_neighbors, distances.shape[1])
        radii = distances.detach().topk(k, dim=1, largest=False).values + slack
        return radii[:, -1:], radii[:, max(k // 2, 1) - 1, None]
    row_k = num_neighbors.clamp(max=distances.shape[1])[:, None]  # (B, 1)
    radii = distances.detach().topk(int(row_k.max()), dim=1, largest=False).values + slack
    return radii.gather(1, row_k - 1), radii.gather(1, (row_k // 2).clamp_min(1) - 1)


def neighbors_of_rows(num_neighbors: NumNeighbors, rows: slice) -> NumNeighbors:
    return num_neighbors if isinstance(num_neighbors, int) else num_neighbors[rows]


def neighborhood_overlap(
    num_shared: Tensor, size: Tensor, other_size: Tensor, num_references: int
) -> Tensor:
    r"""The overlap H of two neighborhoods, in [0, 1].

    It is the mean of two fractions: of i's neighbors that are j's neighbors too, and of i's
    non-neighbors that are j's non-neighbors too,

    .. math:: H_{ij} = \tfrac12 \Big(\frac{G_{ij}}{c_i}
        + \frac{N - c_i - c_j + G_{ij}}{N - c_i}\Big)

    where :math:`N - c_i - c_j + G = (1-M)(1-M)^\top` counts the shared non-neighbors.

    Args:
        num_shared: G, the number of shared neighbors.
        size: :math:`c_i`, which carries no gradient as a denominator.
        other_size: :math:`c_j`.
        num_references: N, the number of samples that can be neighbors.
    """
    num_shared_non_neighbors = num_references - size - other_size + num_shared
    # A neighborhood of all samples has no non-neighbors; the authors' code divides 0 by 0.
    num_non_neighbors = (num_references - size.detach()).clamp_min(1)
    return (num_shared / size.detach() + num_shared_non_neighbors / num_non_neighbors) / 2
