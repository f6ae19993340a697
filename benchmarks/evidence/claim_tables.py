"""The tables of the claims, their comparisons, and the best methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .claims import Claim, claims
from .conditions import CONDITIONS, INITS, SCENARIOS, Experiment
from .formatting import difference, markdown_table, mean, mean_percent, signed
from .methods import BASELINES, METHODS
from .metrics import MAP, RERANKED
from .records import Results
from .verdicts import CONTRADICTED, DOES_NOT_HOLD, HOLDS, NOT_RUN, Judged, judge, overall

SIGNS = {HOLDS: "✓", CONTRADICTED: "✗", DOES_NOT_HOLD: "–", NOT_RUN: ""}


def claim_table(results: Results) -> str:
    rows = []
    for claim in claims(results.preset):
        judged = [judge(comparison, results) for comparison in claim.comparisons]
        by_init = [[j for j in judged if j.comparison.experiment.init == init] for init in INITS]
        verdicts = [f"**{overall(js)}**: {count_signs(js)}" if js else "" for js in by_init]
        rows.append([claim.title, link(claim), *verdicts])
    return markdown_table(["claim", "source", *INITS.values()], rows, align="left")


def count_signs(judged: Sequence[Judged]) -> str:
    verdicts = [j.verdict for j in judged]
    return ", ".join(
        f"{verdicts.count(kind)} {sign or kind}" for kind, sign in SIGNS.items() if kind in verdicts
    )


def link(claim: Claim) -> str:
    is_arxiv_id = claim.source.replace(".", "").isdigit()
    return (
        f"[{claim.source}](https://arxiv.org/abs/{claim.source})" if is_arxiv_id else claim.source
    )


def comparison_tables(results: Results) -> str:
    parts = []
    for claim in claims(results.preset):
        rows = []
        for comparison in claim.comparisons:
            judged, unit = judge(comparison, results), comparison.unit
            shown = f"{signed(judged.difference, unit)} {unit}" if judged.difference else NOT_RUN
            rows.append([comparison.title, shown, SIGNS[judged.verdict]])
        table = markdown_table(["", "difference", ""], rows)
        parts.append(f"**{claim.title}.** Test: {claim.test}.\n\n{table}")
    return "\n\n".join(parts)


def best_method_table(results: Results) -> str:
    """Our method with the best validation score, against PML's with the best test score."""
    rows = []
    for scenario in (s.under(c) for s in SCENARIOS for c in ("clean", "noise30")):
        done = [n for n in METHODS if results.is_complete(Experiment(*scenario, n))]
        ours = [Experiment(*scenario, n) for n in done if not METHODS[n].from_pml]
        ours = [e for e in ours if e in results.planned]
        pml = [Experiment(*scenario, n) for n in done if METHODS[n].from_pml]
        if not ours or not set(BASELINES).issubset(e.method for e in pml):
            continue
        best = max(ours, key=lambda e: validation_score(results, e))
        rival = max(pml, key=lambda e: mean(results, e, MAP).mean)  # type: ignore[union-attr]
        rows.append(
            [
                f"{scenario.title}, {CONDITIONS[scenario.condition].label}",
                METHODS[best.method].label,
                mean_percent(results, best, MAP),
                METHODS[rival.method].label,
                mean_percent(results, rival, MAP),
                difference(results, best, rival, MAP),
                difference(results, best, rival, RERANKED, MAP) if best.is_reranked else "",
            ]
        )
    header = ["", "our best", "MAP@R", "PML's best", "MAP@R", "difference", "ours re-ranked"]
    return markdown_table(header, rows, align="left") if rows else NOT_RUN


def validation_score(results: Results, experiment: Experiment) -> float:
    return float(np.mean([run["validation"] for run in results.tested(experiment)]))
