"""The page from synthetic results: none, some or all of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.evidence import formatting, metrics, records, render
from benchmarks.evidence.claims import claims
from benchmarks.evidence.conditions import CONDITIONS, INITS, Experiment
from benchmarks.evidence.methods import BASELINES, MAIN, METHODS
from benchmarks.evidence.presets import PRESETS, merge_presets
from benchmarks.evidence.sweep import plan_jobs

PRESET = replace(merge_presets("small")[1], trials=1, seeds=2)


def synthetic(preset, keep=lambda job: True):
    """Scores that differ by method, fall with noise, and hardly differ by seed."""
    lines = []
    for job in filter(keep, plan_jobs(preset, [])):
        experiment, number = job.experiment, job.trial if job.seed is None else job.seed
        condition = CONDITIONS[experiment.condition]
        level = 0.2 + 0.01 * list(METHODS).index(experiment.method)
        level *= (1 - condition.noise) * (1 - condition.withheld / 2)
        score = level + 0.001 * (number or 0)
        line = {
            **experiment._asdict(),
            "budget": preset.budget._asdict(),
            "hparams": METHODS[experiment.method].draw(0),
            "validation": score,
            "seconds_per_step": 0.02,
            "peak_mib": 30.0,
        }
        if job.seed is None:
            lines.append(line | {"trial": number})
            continue
        probes = {"purity": 0.5, "plurality_wrong": None}
        history = [
            {"epoch": e, "map_at_r": score * e / 5, "probes": probes}
            for e in range(preset.budget.epochs + 1)
        ]
        names = (metrics.P1, metrics.R_PRECISION, metrics.MAP, metrics.RARE, metrics.ACCURACY,
                 metrics.RERANKED, metrics.RERANKED_P1, *metrics.FEW_SHOT)  # fmt: skip
        test = dict.fromkeys(names, score) | {metrics.RERANKED: score + 0.05}
        lines.append(line | {"seed": number, "history": history, "test": test})
    return lines


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", PRESET)


def page(lines, tmp_path):
    return render.render("small", lines, tmp_path / "docs", tmp_path).read_text()


def test_nothing_was_run(tmp_path):
    text = page([], tmp_path)
    expected = {
        (claim.title, comparison.experiment.init)
        for claim in claims(PRESET)
        for comparison in claim.comparisons
    }
    assert text.count("**not run**") == len(expected) > len(claims(PRESET))
    assert "NaN" not in text
    assert not list((tmp_path / "docs").rglob("*.png"))


def test_everything_was_run(tmp_path):
    (tmp_path / "notes-small.md").write_text("By hand.\n")
    text = page(synthetic(PRESET), tmp_path)
    assert "not run" not in text
    assert "nan" not in text.lower().replace("triplet margin", "")
    assert "By hand." in text
    figures = {path.name for path in (tmp_path / "docs" / "evidence").iterdir()}
    assert figures == {"curves.png", "conditions.png", "cost.png", "additions.png"}
    assert all(f"evidence/{name}" in text for name in figures)
    # The score grows by 1 point from each method to the next.
    for name in BASELINES:
        between = list(METHODS).index(f"{name}+lsd") - list(METHODS).index(name)
        label = METHODS[name].label
        for init in INITS.values():
            assert f"| Omniglot, {init}, {label} | +{between:.1f} ± 0.0 points | ✓ |" in text
    assert "| LSD improves every loss |" in text
    assert "| **holds**: 20 ✓ | **holds**: 20 ✓ |" in text
    assert "| Omniglot, fine-tuned | +5.0 ± 0.0 points | ✓ |" in text  # re-ranking
    for block in text.split("\n\n"):  # the rows of a table have equally many cells
        assert len({row.count("|") for row in block.splitlines() if row.startswith("|")}) <= 1
    again = page(synthetic(PRESET), tmp_path)
    assert again == text


def test_label_reports_are_a_table(tmp_path):
    lines = [
        {"dataset": "omniglot", "condition": condition, "seed": seed}
        | {"flagged": 0.25, "false_positive_rate": 0.125}
        | ({} if condition == "clean" else {"precision": 0.5 + 0.1 * seed})
        for condition in ("clean", "noise30")
        for seed in (0, 1)
    ]
    (tmp_path / "labels-small.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = page([], tmp_path)
    assert "| Omniglot, clean | 25.0 ± 0.0 |  |  | 12.5 ± 0.0 |  |  |  |" in text
    assert "| Omniglot, 30% wrong labels | 25.0 ± 0.0 | 55.0 ± 63.5 |" in text


def test_the_long_preset_has_a_section(tmp_path, monkeypatch):
    preset = replace(PRESETS["long"], trials=1, seeds=2)
    monkeypatch.setitem(PRESETS, "long", preset)
    lines = synthetic(preset, lambda job: job.experiment.method in ("supcon", "contextual"))
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = page([], tmp_path)
    section = text.split("## With more steps")[1].split("\n## ")[0]
    assert "for 10 epochs of 100 batches" in section
    rows = [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")]
    assert set(rows[2:]) == {METHODS[e.method].label for e in preset.experiments()}
    assert {p.name for p in (tmp_path / "docs" / "evidence-long").iterdir()} == {
        "curves.png", "cost.png",
    }  # fmt: skip


def test_some_were_run(tmp_path):
    def keep(job):
        dataset, _, condition, method = job.experiment
        return (dataset, condition) == ("omniglot", "clean") and (
            job.seed != 1 or method != "supcon"
        )

    text = page(synthetic(PRESET, keep), tmp_path)
    assert "(1 of 2)" in text  # one seed of SupCon
    assert "| CIR improves few-shot recognition with the triplet loss" in text
    assert "**holds**: 4 ✓ |" in text
    assert "**holds so far**: 9 ✓, 11 not run |" in text  # LSD: neither CIFAR-100 nor SupCon
    assert "**not run**: 6 not run |" in text  # CCL: the best baseline is unknown
    assert "nan" not in text.lower()


def test_the_best_and_its_ties_are_marked():
    experiments = [Experiment("omniglot", "scratch", "clean", name) for name in list(MAIN)[:3]]
    values = dict(zip(experiments, ([0.5, 0.6], [0.6, 0.61], [0.1, 0.11]), strict=True))
    lines = []
    for line in synthetic(PRESET, lambda job: job.experiment in experiments):
        experiment = Experiment(*(line[name] for name in Experiment._fields))
        if "seed" in line:
            score = values[experiment][line["seed"]]
            line["test"] = {metrics.MAP: score, metrics.RERANKED: score}
        lines.append(line)
    texts = formatting.column(records.Results(PRESET, lines), experiments, metrics.MAP)
    assert texts[1].startswith("**60.5 ±")
    assert texts[0].startswith("*55.0 ±")
    assert texts[2].startswith("10.5 ±")


def test_the_command_line(tmp_path, capsys):
    lines = synthetic(PRESET, lambda job: job.experiment.dataset == "cifar100_classes")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "small.jsonl").write_text(text + '{"torn')
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert render.main(arguments) == 0
    assert "| Cross-entropy + CIR | **" in (tmp_path / "docs" / "evidence.md").read_text()
    (tmp_path / "small.jsonl").write_text("junk\n" + text)
    assert render.main(arguments) == 2
    assert "line 1" in capsys.readouterr().err
    assert np.isfinite(lines[0]["validation"])
