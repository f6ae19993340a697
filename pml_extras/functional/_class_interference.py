"""Class Interference Regularization (arXiv 2009.02396)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from ._kernels.precision import full_precision


@full_precision
def class_interference(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    class_counts: Tensor,
    *,
    strength: float = 0.1,
    probability: float = 1.0,
    normalize: bool = True,
    random_strength: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Move each embedding a little toward the mean of a random negative class.

    .. math::
        e_i' &= e_i + b_i\,\sigma\,(m_{n_i} - e_i) \\
        b_i &\sim \mathrm{Bernoulli}(p), \qquad
            n_i \sim \mathrm{Uniform}\{c \ne y_i : c \text{ has a mean}\}

    drawn independently for each embedding.

    Args:
        embeddings: (N, D).
        labels: (N,) int64 in [0, C).
        class_means: (C, D), without gradient.
        class_counts: (C,) int64; 0 marks a class without a mean.
        strength: :math:`\sigma` in [0, 0.5).
        probability: p in [0, 1].
        normalize: normalize the embeddings before and after.
        random_strength: draw each embedding's strength from U(0, ``strength``).
        generator: for the random draws. Default: torch's global generator.

    Returns:
        (N, D), float32 or wider. Without a negative class that has a mean, an embedding is not
        moved.

    Source: the idea is from the abstract of arXiv 2009.02396; the equation is ours.

    Example:
        >>> import torch
        >>> means, counts = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([5, 5])
        >>> class_interference(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), means, counts,
        ...                    strength=0.25, normalize=False)
        tensor([[0.2500, 1.5000]])
    """
    device = embeddings.device if generator is None else generator.device
    shape = (3, len(labels))
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    class_draw, apply_draw, strength_draw = uniform.to(embeddings.device)

    x = normalize_rows(embeddings) if normalize else embeddings

    # Draw n_i: the n-th class that has a mean, skipping the sample's own. A list of these classes
    # would make the host wait for its length; num_up_to[c] counts them up to and including c.
    has_mean = class_counts > 0
    num_up_to = has_mean.cumsum(0)
    target_has_mean = has_mean[labels]
    num_negatives = num_up_to[-1] - target_has_mean.long()
    nth = (class_draw * num_negatives).long()
    nth = nth + (target_has_mean & (nth >= num_up_to[labels] - 1)).long()
    negatives = torch.searchsorted(num_up_to, nth + 1).clamp_max(len(num_up_to) - 1)

    apply_mask = (apply_draw < probability) & (num_negatives > 0)  # b_i
    step_size = apply_mask.to(x.dtype) * strength
    if random_strength:
        step_size = step_size * strength_draw.to(x.dtype)
    perturbed = torch.lerp(x, class_means.detach()[negatives], step_size[:, None])
    return normalize_rows(perturbed) if normalize else perturbed
