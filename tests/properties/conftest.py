"""What the properties share: how long to look, what batches look like, plain float64 formulas."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

# HYPOTHESIS_PROFILE=long pytest tests/properties: hours of searching instead of half a minute.
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}
settings.register_profile("default", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=10_000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SPECIAL = (float("nan"), float("inf"), -float("inf"))
# What PML, torch and we raise for bad input: never an AssertionError, AttributeError or KeyError.
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)

seeds = st.integers(0, 2**32 - 1)


@st.composite
def embeddings(draw, n, d, dtype=None, extreme=True, broken=False) -> Tensor:
    """(n, d): with ties, copies and zero vectors, of all scales, and perhaps not finite."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["spread", "concentrated", "grid", "copies"]))
    if kind == "concentrated":
        x = 1 + x / 20
    elif kind == "grid":
        x = x.round()
    elif kind == "copies":
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
    if n and broken:
        for _ in range(draw(st.integers(0, 3))):
            i, j = draw(st.integers(0, n - 1)), draw(st.integers(0, d - 1))
            x[i, j] = draw(st.sampled_from(SPECIAL))
    return x


@st.composite
def class_labels(draw, n, num_classes) -> Tensor:
    """(n,) in [0, num_classes), of any integer type."""
    dtype = draw(st.sampled_from(SIGNED + UNSIGNED))
    generator = torch.Generator().manual_seed(draw(seeds))
    high = draw(st.integers(1, num_classes))
    return torch.randint(high, (n,), generator=generator).to(dtype)


@st.composite
def any_labels(draw, n) -> Tensor:
    """(n,) integers, huge and negative ones too, of any type."""
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


def log_uniform(low: float, high: float):
    """Floats between two powers of ten, given by their exponents."""
    return st.floats(low, high).map(lambda exponent: 10**exponent)


shapes = st.tuples(st.integers(0, 40), st.integers(1, 16))
small_shapes = st.tuples(st.integers(1, 12), st.integers(1, 8))


def norms_are_ordinary(*batches: Tensor) -> bool:
    """Whether torch can normalise all rows in float32: below 1e-12 it does so by halves, and above
    1e19 the square overflows."""
    for x in batches:
        norms = x.double().norm(dim=1)
        if not ((norms == 0) | ((norms > 1e-11) & (norms < 1e18))).all():
            return False
    return True


def gradients_fit(x: Tensor, slope: float) -> bool:
    """Whether gradients through x / |x| are numbers of x's type, for a gradient of ``slope``."""
    norm = float(x.detach().double().norm(dim=1).clamp_min(1e-12).amin()) if len(x) else 1.0
    return slope / norm < torch.finfo(x.dtype).max / 100


def unit(x: Tensor) -> Tensor:
    """Rows of length one in float64."""
    x = x.double()
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def plain_nearest(distances: Tensor, k: int, slack: float) -> Tensor:
    return (distances <= distances.sort(1).values[:, k - 1 : k] + slack).double()


def plain_context(distances, k, slack, ref_distances=None):
    """The contextual similarity, written as the docstring's formulas."""
    to_self = ref_distances is None
    ref = (distances if to_self else ref_distances).clone()
    ref.fill_diagonal_(0)
    ref[torch.arange(len(ref)), torch.arange(len(ref))] = (
        distances if to_self else ref_distances
    ).amin(1)
    k = min(k, ref.shape[1])
    half = max(k // 2, 1)

    def agreement(a, b):
        inside = a @ b.T / a.sum(1, keepdim=True)
        outside = (1 - a) @ (1 - b).T / (1 - a).sum(1, keepdim=True).clamp_min(1)
        return (inside + outside) / 2

    def average(weights, values):
        return weights @ values / weights.sum(1, keepdim=True).clamp_min(1)

    m, m2 = plain_nearest(ref, k, slack), plain_nearest(ref, half, slack)
    w, r = agreement(m, m) * m, m2 * m2.T
    if to_self:
        j = average(r, w)
        return (j + j.T) / 2
    radius = ref.sort(1).values[:, k - 1] + slack
    half_radius = ref.sort(1).values[:, half - 1] + slack
    q, q2 = plain_nearest(distances, k, slack), plain_nearest(distances, half, slack)
    there = average(q2 * (distances <= half_radius), w)
    back = average(r, agreement(m, q) * (distances <= radius).double().T)
    return (there + back.T) / 2


def has_gap(distances, k, slack, ref_distances=None, tolerance=1e-4) -> bool:
    """Whether no distance is so near a radius that rounding could decide."""
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
            # The neighbour that sets the radius lies on it exactly: that is no accident.
            if (close > (1 if slack <= tolerance else 0)).any():
                return False
            if 0 < slack <= tolerance:
                return False
            if ref_distances is not None and number == 1:
                radii_to_check.append(radius.T + slack)
    return not any(((distances - radius).abs() <= tolerance).any() for radius in radii_to_check)


def state_of(module: torch.nn.Module) -> dict:
    return copy.deepcopy(module.state_dict())


def same_state(a, b) -> bool:
    """Whether two state_dicts, or what is in them, are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    return a == b


def state_is_finite(state) -> bool:
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    return not isinstance(state, dict) or all(state_is_finite(value) for value in state.values())


def assert_refused_without_a_trace(module, call, what: str) -> None:
    """``call`` must raise an error that says something, and leave the module as it was."""
    before, message = state_of(module), "not refused"
    try:
        call()
    except REFUSALS as error:
        message = str(error).strip()
    assert message, what
    assert message != "not refused", what
    assert "NoneType" not in message, f"{what}: the message does not name the problem"
    assert same_state(state_of(module), before), f"{what}: refused, but the state has changed"


class Cases(SimpleNamespace):
    def __repr__(self) -> str:
        return "cases"  # hypothesis prints it with each failure


@pytest.fixture(scope="session")
def cases() -> Cases:
    """The strategies, formulas and checks above, which test files cannot import."""
    return Cases(**{k: v for k, v in globals().items() if not k.startswith("_")})
