"""The page from made-up results: none, some, all."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.evidence import claims, plan, records, render, run
from benchmarks.evidence.plan import METHODS, PRESETS, Cell

PRESET = replace(plan.whole("small")[1], trials=1, seeds=2)


def made_up(preset, kept=lambda job: True):
    """Scores that differ by method, fall with noise, and hardly differ by seed."""
    lines = []
    for job in filter(kept, run.planned(preset, [])):
        cell, number = job.cell, job.trial if job.seed is None else job.seed
        condition = plan.CONDITIONS[cell.condition]
        level = 0.2 + 0.01 * list(METHODS).index(cell.method)
        level *= (1 - condition.noise) * (1 - condition.withheld / 2)
        score = level + 0.001 * (number or 0)
        line = {
            **cell._asdict(),
            "budget": preset.describe(),
            "setting": METHODS[cell.method].draw(0),
            "validation": score,
            "seconds_per_step": 0.02,
            "peak_mib": 30.0,
        }
        if job.seed is None:
            lines.append(line | {"trial": number})
            continue
        probes = {"purity": 0.5, "trusted_wrong": None}
        history = [
            {"epoch": e, "map_at_r": score * e / 5, "probes": probes}
            for e in range(preset.budget.epochs + 1)
        ]
        metrics = (plan.P1, "r_precision", plan.MAP, plan.RARE, plan.ACCURACY, plan.RERANKED,
                   f"reranked_{plan.P1}", *plan.FEW_SHOT)  # fmt: skip
        test = dict.fromkeys(metrics, score) | {plan.RERANKED: score + 0.05}
        lines.append(line | {"seed": number, "history": history, "test": test})
    return lines


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", PRESET)


def page(lines, tmp_path):
    return render.render("small", lines, tmp_path / "docs", tmp_path).read_text()


def test_nothing_was_run(tmp_path):
    text = page([], tmp_path)
    asked = {(c.text, j.cell.start) for c in claims.claims(PRESET) for j in c.comparisons}
    assert text.count("**not run**") == len(asked) > len(claims.claims(PRESET))
    assert "NaN" not in text
    assert not list((tmp_path / "docs").rglob("*.png"))


def test_everything_was_run(tmp_path):
    (tmp_path / "notes-small.md").write_text("## Reading\n\nBy hand.\n")
    text = page(made_up(PRESET), tmp_path)
    assert "not run" not in text
    assert "nan" not in text.lower().replace("triplet margin", "")
    assert "By hand." in text
    figures = {path.name for path in (tmp_path / "docs" / "evidence").iterdir()}
    assert figures == {"curves.png", "conditions.png", "cost.png", "additions.png"}
    assert all(f"evidence/{name}" in text for name in figures)
    # Methods that stand later in the plan score higher: LSD's difference is 20 methods' worth.
    for name in plan.BASELINES:
        between = list(METHODS).index(f"{name}+lsd") - list(METHODS).index(name)
        label = METHODS[name].label
        for start in plan.STARTS.values():
            assert f"| Omniglot, {start}, {label} | +{between:.1f} ± 0.0 points | ✓ |" in text
    assert "| LSD improves every loss |" in text
    assert "| **holds**: 20 ✓ | **holds**: 20 ✓ |" in text
    assert "| Omniglot, fine-tuned | +5.0 ± 0.0 points | ✓ |" in text  # re-ranking
    for block in text.split("\n\n"):  # every row of a table has as many cells
        assert len({row.count("|") for row in block.splitlines() if row.startswith("|")}) <= 1
    again = page(made_up(PRESET), tmp_path)
    assert again == text


def test_reports_on_labels_are_a_table(tmp_path):
    lines = [
        {"dataset": "omniglot", "condition": condition, "seed": seed, "distrusted": 0.25,
         "mistrusted": 0.125} | ({} if condition == "clean" else {"precision": 0.5 + 0.1 * seed})
        for condition in ("clean", "noise30") for seed in (0, 1)
    ]  # fmt: skip
    (tmp_path / "labels-small.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = page([], tmp_path)
    assert "| Omniglot, clean | 25.0 ± 0.0 |  |  | 12.5 ± 0.0 |  |  |  |" in text
    assert "| Omniglot, 30% wrong labels | 25.0 ± 0.0 | 55.0 ± 63.5 |" in text


def test_the_longer_preset_has_a_section(tmp_path, monkeypatch):
    preset = replace(PRESETS["long"], trials=1, seeds=2)
    monkeypatch.setitem(PRESETS, "long", preset)
    lines = made_up(preset, lambda job: job.cell.method in ("supcon", "contextual"))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = page([], tmp_path)
    section = text.split("## With more steps")[1].split("\n## ")[0]
    assert "for 10 epochs of 100 batches" in section
    rows = [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")]
    assert set(rows[2:]) == {METHODS[cell.method].label for cell in preset.cells()}
    assert {p.name for p in (tmp_path / "docs" / "evidence-long").iterdir()} == {
        "curves.png", "cost.png",
    }  # fmt: skip


def test_some_were_run(tmp_path):
    def kept(job):
        return job.cell.dataset == "omniglot" and job.cell.condition == "clean" and (
            job.seed != 1 or job.cell.method != "supcon"
        )  # fmt: skip

    text = page(made_up(PRESET, kept), tmp_path)
    assert "(1 of 2)" in text  # one seed of SupCon
    assert "| CIR improves few-shot recognition with the triplet loss" in text
    assert "**holds**: 4 ✓ |" in text
    assert "**holds so far**: 9 ✓, 11 not run |" in text  # LSD: not on CIFAR-100, nor SupCon
    assert "**not run**: 6 not run |" in text  # CCL: the best baseline is not known yet
    assert "nan" not in text.lower()


def test_the_best_and_its_ties_are_marked(tmp_path):
    cells = [Cell("omniglot", "scratch", "clean", name) for name in plan.MAIN[:3]]
    values = {cells[0]: [0.5, 0.6], cells[1]: [0.6, 0.61], cells[2]: [0.1, 0.11]}
    lines = []
    for line in made_up(PRESET, lambda job: job.cell in cells):
        cell = Cell(*(line[name] for name in Cell._fields))
        if "seed" in line:
            score = values[cell][line["seed"]]
            line["test"] = {plan.MAP: score, plan.RERANKED: score}
        lines.append(line)
    shown = render.Page(records.Results(PRESET, lines), tmp_path)
    texts = shown.column(cells, plan.MAP)
    assert texts[1].startswith("**60.5 ±")
    assert texts[0].startswith("*55.0 ±")
    assert texts[2].startswith("10.5 ±")


def test_the_command_line(tmp_path, capsys):
    lines = made_up(PRESET, lambda job: job.cell.dataset == "cifar100_classes")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "small.jsonl").write_text(text + '{"torn')
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert render.main(arguments) == 0
    assert "| Cross-entropy + CIR | **" in (tmp_path / "docs" / "evidence.md").read_text()
    (tmp_path / "small.jsonl").write_text("junk\n" + text)
    assert render.main(arguments) == 2
    assert "line 1" in capsys.readouterr().err
    assert np.isfinite(lines[0]["validation"])
