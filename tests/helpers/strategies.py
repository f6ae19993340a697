"""Hypothesis strategies: embeddings and labels as users may pass them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
NON_FINITE = (float("nan"), float("inf"), -float("inf"))

seeds = st.integers(0, 2**32 - 1)
# (number of samples, embedding size)
shapes = st.tuples(st.integers(0, 40), st.integers(1, 16))
small_shapes = st.tuples(st.integers(1, 12), st.integers(1, 8))


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats between 10**low and 10**high."""
    return st.floats(low, high).map(lambda exponent: 10**exponent)


@st.composite
def embeddings(draw, n, d, dtype=None, extreme=True, non_finite=False) -> Tensor:
    """(n, d) embeddings with ties, duplicates and zero vectors.

    ``extreme`` adds norms near the limits of the dtype, ``non_finite`` adds NaN and infinity.
    """
    dtype = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["spread", "concentrated", "grid", "duplicates"]))
    if kind == "concentrated":
        x = 1 + x / 20
    elif kind == "grid":
        x = x.round()
    elif kind == "duplicates":
        x = x[torch.randint(max(1, n // 3), (n,), generator=generator)]
    scales = ["one", "one", "small", "large", *(["tiny", "huge", "mixed"] if extreme else [])]
    scale = draw(st.sampled_from(scales))
    if scale == "mixed":
        exponents = torch.empty(n, 1, dtype=torch.float64).uniform_(-45, 38, generator=generator)
        x = x * 10**exponents
    else:
        x = x * {"one": 1, "small": 1e-3, "large": 1e3, "tiny": 1e-30, "huge": 1e30}[scale]
    limits = torch.finfo(dtype)
    x = x.clamp(limits.min, limits.max).to(dtype)
    if n and draw(st.booleans()):
        x[draw(st.integers(0, n - 1))] = 0
    if n and non_finite:
        for _ in range(draw(st.integers(0, 3))):
            i, j = draw(st.integers(0, n - 1)), draw(st.integers(0, d - 1))
            x[i, j] = draw(st.sampled_from(NON_FINITE))
    return x


@st.composite
def class_labels(draw, n, num_classes) -> Tensor:
    """(n,) labels in [0, num_classes), of any integer type."""
    dtype = draw(st.sampled_from(SIGNED + UNSIGNED))
    generator = torch.Generator().manual_seed(draw(seeds))
    high = draw(st.integers(1, num_classes))
    return torch.randint(high, (n,), generator=generator).to(dtype)


@st.composite
def any_labels(draw, n) -> Tensor:
    """(n,) labels of any integer type, including negative numbers and the limits of the type."""
    dtype = draw(st.sampled_from(SIGNED + UNSIGNED))
    kind = draw(st.sampled_from(["random", "random", "one class", "singletons"]))
    if kind == "singletons":
        numbers = torch.arange(n)
    else:
        generator = torch.Generator().manual_seed(draw(seeds))
        high = 1 if kind == "one class" else draw(st.integers(2, 12))
        numbers = torch.randint(high, (n,), generator=generator)
    limits = torch.iinfo(dtype)
    start = draw(st.sampled_from([0, limits.min, limits.max - 50]))
    largest_long = torch.iinfo(torch.int64).max - 50
    return (numbers + min(start, largest_long)).to(dtype)


@st.composite
def batches(draw, sizes, with_references, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings and labels, (N, D) and (N,), and references and their labels, or None twice.

    ``kwargs`` are those of :func:`embeddings`.
    """
    n, d = draw(sizes)
    x, y = draw(embeddings(n, d, **kwargs)), draw(any_labels(n))
    if not with_references:
        return x, y, None, None
    kwargs["dtype"] = x.dtype
    ref = draw(embeddings(draw(st.integers(0, 20)), d, **kwargs))
    if draw(st.booleans(), label="the references include the batch"):
        ref = torch.cat([x, ref])
    generator = torch.Generator().manual_seed(draw(seeds))
    ref_y = y.new_zeros(len(ref))
    if n:
        ref_y = y[torch.randint(n, (len(ref),), generator=generator)]
    return x, y, ref, ref_y
