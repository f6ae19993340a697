"""Class Interference Regularization (arXiv 2009.02396)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from ._precision import full_precision


@full_precision
def class_interference(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    class_counts: Tensor,
    strength: float = 0.1,
    probability: float = 1.0,
    normalize: bool = True,
    random_strength: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Move each embedding a little towards the mean of a random other class.

    .. math::
        e_i' &= e_i + b_i\,\sigma\,(m_{n_i} - e_i) \\
        b_i &\sim \mathrm{Bernoulli}(p), \qquad
            n_i \sim \mathrm{Uniform}\{c \ne y_i : c \text{ has been seen}\}

    drawn independently for each embedding.

    Args:
        embeddings: (N, D).
        labels: (N,) int64 in [0, C).
        class_means: (C, D); no gradient flows to them.
        class_counts: (C,) int64; 0 marks a class that has not been seen.
        strength: :math:`\sigma` in [0, 0.5).
        probability: p in [0, 1].
        normalize: normalise the embeddings before and after.
        random_strength: draw each embedding's strength from U(0, ``strength``).
        generator: where the draws come from; default: torch's global generator.

    Returns:
        (N, D), float32 or wider. An embedding stays where it is while no other class has been seen.

    Source: the idea is the abstract's of arXiv 2009.02396; the equation is ours.

    Example:
        >>> import torch
        >>> means, counts = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([5, 5])
        >>> class_interference(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), means, counts,
        ...                    strength=0.25, normalize=False)
        tensor([[0.2500, 1.5000]])
    """

    def draw(*, high: int) -> Tensor:
        device = embeddings.device if generator is None else generator.device
        return torch.randint(high, labels.shape, generator=generator, device=device).to(
            embeddings.device
        )

    def draw_uniform() -> Tensor:
        return draw(high=1 << 24).to(embeddings.dtype) / (1 << 24)

    x = unit(embeddings) if normalize else embeddings

    # The n-th seen class other than one's own, without a list of them, whose length the host would
    # have to wait for: rank[c] counts the seen classes up to and including c.
    seen = class_counts > 0
    rank = seen.cumsum(0)
    own_seen = seen[labels]
    num_negatives = rank[-1] - own_seen.long()
    nth = draw(high=1 << 62) % num_negatives.clamp_min(1)
    nth = nth + (own_seen & (nth >= rank[labels] - 1)).long()
    negatives = torch.searchsorted(rank, nth + 1).clamp_max(len(rank) - 1)

    moved = (draw_uniform() < probability) & (num_negatives > 0)
    amount = moved.to(x.dtype) * strength
    if random_strength:
        amount = amount * draw_uniform()
    x = torch.lerp(x, class_means.detach()[negatives], amount[:, None])
    return unit(x) if normalize else x
