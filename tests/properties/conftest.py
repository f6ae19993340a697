"""How many examples hypothesis tries for each property."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# HYPOTHESIS_PROFILE=long searches for hours instead of half a minute.
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}
settings.register_profile("default", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=10_000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
