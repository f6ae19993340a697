"""Write docs/evidence.md and its figures from the result lines.

    python -m benchmarks.evidence.render                   # preset full if it has results
    python -m benchmarks.evidence.render --preset small    # with all presets of its budget

The page's text is in page.md.template, the optional discussion in results/notes-PRESET.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from . import labels
from .claims import claims
from .examples import UserError
from .figures import FIGURES, save_figure
from .methods import METHODS
from .presets import PRESETS, merge_presets
from .records import RESULTS, Record, Results, read
from .tables import TABLES, label_report_table

TEMPLATE = Path(__file__).with_name("page.md.template")
DOCS = Path(__file__).parents[2] / "docs"


def render(preset_name: str, records: list[Record], docs: Path, folder: Path = RESULTS) -> Path:
    """Write the page and its figures into `docs`. Notes and other results are in `folder`."""
    name, preset = merge_presets(preset_name)
    results = Results(preset, records)
    notes = folder / f"notes-{name}.md"
    num_comparisons = sum(len(claim.comparisons) for claim in claims(preset))
    values = {
        **{key: table(results) for key, table in TABLES.items()},
        **{f"{key}_figure": save_figure(results, key, docs / "evidence") for key in FIGURES},
        **preset.budget._asdict(),
        "presets": ", ".join(f"`{n}`" for n, p in PRESETS.items() if p.budget == preset.budget),
        "trials": preset.trials,
        "seeds": preset.seeds,
        "notes": notes.read_text().strip() if notes.exists() else "",
        "num_comparisons": num_comparisons,
        "num_expected_misses": f"{0.05 * num_comparisons:.0f}",
    }
    if long_records := read(folder / "long.jsonl"):
        values |= long_values(Results(PRESETS["long"], long_records), docs / "evidence-long")
    if label_records := read(folder / f"labels-{name}.jsonl"):
        values["label_reports"] = label_report_table(label_records)
        values |= {"label_method": METHODS[labels.METHOD].label, "label_seeds": labels.SEEDS}
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "evidence.md"
    page.write_text(fill(TEMPLATE.read_text(), values))
    return page


def long_values(results: Results, folder: Path) -> dict[str, Any]:
    """What the page shows of the preset with more steps."""
    return {
        "long_epochs": results.preset.budget.epochs,
        "long_steps": results.preset.budget.steps_per_epoch,
        "long_clean": TABLES["clean"](results),
        **{f"long_{key}_figure": save_figure(results, key, folder) for key in ("curves", "cost")},
    }


def fill(template: str, values: dict[str, Any]) -> str:
    """Substitute the values. Leaves out sections whose values are all empty or missing."""
    kept = []
    for section in template.split("\n## "):
        names = re.findall(r"\$\{(\w+)\}", section)
        if not names or any(values.get(name) for name in names):
            kept.append(Template(section).substitute(values))
    return re.sub(r"\n{3,}", "\n\n", "\n## ".join(kept)).strip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="render.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, help="default: %(default)s")
    args = parser.parse_args(arguments)
    full = (args.results / "full.jsonl").exists()
    name, _ = merge_presets(args.preset or ("full" if full else "small"))
    try:
        print(render(name, read(args.results / f"{name}.jsonl"), args.docs, args.results))
    except UserError as error:
        print(f"render.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
