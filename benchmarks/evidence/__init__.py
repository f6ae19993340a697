"""Do the methods do what their papers claim? `plan.py` says what is run and what is compared."""

import sys
from pathlib import Path

# The examples are scripts beside each other, not a package: they find one another by the path.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
