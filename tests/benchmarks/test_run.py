"""The plan holds together, and a sweep survives every way of being stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from datasets import UserError

from benchmarks.evidence import claims, plan, records, run
from benchmarks.evidence.plan import METHODS, PRESETS, Block, Budget, Cell, Preset

TINY = Preset(
    Budget(epochs=1, steps=2, batch_size=16, width=2, shrink=False, pretraining_epochs=1,
           embedding_size=4),
    trials=2,
    seeds=2,
    blocks={"clean": Block(("digits",), ("finetune",), ("clean",), ("contrastive", "arcface"))},
)  # fmt: skip
TIMES = ("seconds", "seconds_per_step", "peak_mib", "threads")


def sweep(preset, path, processes=1):
    """As main does it."""
    where = run.Where(path.parent, path.parent / "cache")
    with records.appending(path) as append:
        results = run.Results(preset, records.read(path))
        failures = run.sweep(run.planned(preset, []), results, where, append, processes)
    assert failures == []
    return results


def without_times(path):
    lines = [{k: v for k, v in record.items() if k not in TIMES} for record in records.read(path)]
    return sorted(json.dumps(line) for line in lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "tiny.jsonl"
    sweep(TINY, path)
    return path


# ---- The plan.


@pytest.mark.filterwarnings("ignore:num_neighbors")  # which "contextual_k" is about
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name):
    method = METHODS[name]
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 8)
    sizes = plan.Sizes.of(method, 16, 8, 64)
    labels = torch.arange(sizes.batch) // sizes.per_class
    before, means = network.weight.clone(), torch.randn(16, 6)
    for trial in range(2):
        setting = method.draw(trial)
        for key, distribution in (plan.LR | method.space).items():
            assert distribution._contains(distribution.to_internal_repr(setting[key]))
        parts = plan.assemble(method, setting, sizes, network, 2)
        batches = [(means[labels] + 0.5 * torch.randn(sizes.batch, 6), labels)] * 2
        cost = run.training.fit(network, parts, setting, batches, 2)
        assert cost["seconds_per_step"] > 0
    assert torch.isfinite(network.weight).all()
    assert not torch.equal(network.weight, before)


def test_draws_repeat_and_begin_alike_with_and_without_an_addition():
    for trial in range(5):
        draw = METHODS["triplet"].draw(trial)
        assert draw == METHODS["triplet"].draw(trial) != METHODS["triplet"].draw(trial + 1)
        for more in ("triplet+lsd", "triplet+cir", "triplet+ms_miner"):
            assert draw.items() < METHODS[more].draw(trial).items()
    assert len({METHODS["triplet"].draw(trial)["lr"] for trial in range(20)}) == 20


def test_names_are_told_apart():
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["small", "full"])
def test_the_plan_has_runs_for_every_comparison(name):
    _, preset = plan.whole(name)
    cells = set(preset.cells())
    asked = set()

    def scores(cell, metric):
        asked.add((cell, metric))
        curve = [0.1] * (preset.budget.epochs + 1)
        return dict.fromkeys(range(preset.seeds), curve if metric == "curve" else 0.5)

    found = claims.claims(preset)
    assert len(found) >= 8
    for comparison in (c for claim in found for c in claim.comparisons):
        assert len(comparison.differences(scores)) == preset.seeds
    assert {cell for cell, _ in asked} <= cells
    for cell, metric in asked:
        assert metric != plan.RERANKED or cell.reranked
    assert preset.seeds >= 5
    assert {run.Job(cell.tuned, trial=0) for cell in cells} <= set(run.planned(preset, []))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_one_budget_share_a_file_and_a_page(name):
    first, every = plan.whole(name)
    assert name.startswith(first)  # by its name one can tell
    alike = [preset for n, preset in PRESETS.items() if n.startswith(first)]
    assert {(p.budget, p.trials, p.seeds) for p in alike} == {
        (every.budget, every.trials, every.seeds)
    }
    assert len(every.blocks) == sum(len(preset.blocks) for preset in alike)
    assert set(every.cells()) == {cell for preset in alike for cell in preset.cells()}


def test_a_warm_up_moves_the_weight_from_one_term_to_the_other():
    method = METHODS["contextual_warmup"]
    setting = method.draw(0) | {"warmup": 0.5, "contextual_weight": 0.6}
    parts = method.build(setting, plan.Sizes(4, 8, 4, 16))
    for progress, weight in ((0, 0), (0.25, 0.3), (0.5, 0.6), (1, 0.6)):
        parts.schedule(progress)
        assert parts.loss.contextual_weight == pytest.approx(weight)
        assert parts.loss.contrastive_weight == pytest.approx(0.9 - weight)


def test_a_late_miner_starts_late():
    calls = []

    class Miner(torch.nn.Module):
        def forward(self, embeddings, labels):
            calls.append(step[0])

    step = [-1]

    class Batches(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                step[0] += 1
                yield batch

    network = torch.nn.Linear(2, 2)
    loss = METHODS["triplet"].build({"margin": 0.1}, None).loss
    parts = plan.Parts(loss, Miner(), miner_starts=0.5)
    batches = Batches([(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))] * 4)
    run.training.fit(network, parts, {"lr": 0.1}, batches, 2)
    assert calls == [4, 5, 6, 7]


# ---- Records.


def test_a_torn_last_line_is_no_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    assert records.read(path) == [{"a": 1}, {"a": 2}]
    with records.appending(path) as append:
        append({"a": 4})
        with pytest.raises(UserError, match="another run is writing"), records.appending(path):
            pass
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 4}\n'
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        records.read(path)
    assert records.read(tmp_path / "absent.jsonl") == []


def test_only_what_the_plan_asks_for_counts(whole):
    lines = records.read(whole)
    results = run.Results(TINY, lines)
    cell = Cell("digits", "finetune", "clean", "contrastive")
    assert [r["seed"] for r in results.tested(cell)] == [0, 1]
    best = max((r for r in results.trials[cell].values()), key=lambda r: r["validation"])
    assert results.selected(cell) == best["setting"]
    for spoil in (
        {"setting": {"lr": 1.0}},  # the search space was another
        {"budget": {**TINY.describe(), "epochs": 7}},
        {"method": "no longer declared"},
    ):
        others = run.Results(TINY, [line | spoil for line in lines])
        assert others.selected(cell) is None
        assert others.tested(cell) == []
    # One trial that turns out otherwise may choose another setting, and the tests go by it.
    loser = next(r for r in lines if r.get("trial") is not None and r["method"] == cell.method
                 and r["setting"] != best["setting"])  # fmt: skip
    turned = run.Results(TINY, [*lines, loser | {"validation": 2.0}])
    assert turned.selected(cell) == loser["setting"]
    assert turned.tested(cell) == []


def test_a_trial_has_no_test_in_it(whole):
    for record in records.read(whole):
        assert ("test" in record) == ("seed" in record) != ("trial" in record)


# ---- Sweeps.


def test_a_sweep_that_is_done_does_nothing(whole):
    before = whole.read_bytes()
    sweep(TINY, whole)
    assert whole.read_bytes() == before


def test_two_processes_find_what_one_finds(whole, tmp_path):
    sweep(TINY, tmp_path / "tiny.jsonl", processes=2)
    assert without_times(tmp_path / "tiny.jsonl") == without_times(whole)


def test_killed_sweeps_go_on(whole, tmp_path):
    path = tmp_path / "tiny.jsonl"
    fork = multiprocessing.get_context("fork")
    wanted = len(records.read(whole))
    for kill in range(3):
        attempt = fork.Process(target=sweep, args=(TINY, path))
        attempt.start()
        while attempt.is_alive() and len(records.read(path)) <= 2 * kill:
            time.sleep(0.01)
        os.kill(attempt.pid, signal.SIGKILL)
        attempt.join()
        with open(path, "ab") as file:  # as if it had been writing
            file.write(b'{"dataset": "dig')
    done = records.read(path)
    assert 3 <= len(done) < wanted
    sweep(TINY, path)
    assert records.read(path)[: len(done)] == done
    assert without_times(path) == without_times(whole)


def test_time_runs_out(tmp_path):
    results = run.Results(TINY, [])
    where, found = run.Where(tmp_path, tmp_path), []
    run.sweep(run.planned(TINY, []), results, where, found.append, seconds=0.0)
    assert found == []


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(preset, cell, setting, trial, where):
        if cell.method == "arcface":
            raise RuntimeError("out of memory")
        return run_trial(preset, cell, setting, trial, where)

    run_trial = run.run_trial
    monkeypatch.setattr(run, "run_trial", fail)
    results = run.Results(TINY, [])
    where = run.Where(tmp_path, tmp_path)
    failures = run.sweep(run.planned(TINY, []), results, where, lambda record: None)
    assert len(failures) == TINY.trials
    assert "out of memory" in failures[0]
    assert len(results.tested(Cell("digits", "finetune", "clean", "contrastive"))) == TINY.seeds


def test_a_diverging_setting_loses(tmp_path):
    cell = Cell("digits", "scratch", "clean", "contrastive")
    setting = METHODS["contrastive"].draw(0) | {"lr": 1e30}
    where = run.Where(tmp_path, tmp_path)
    found = run.run_trial(TINY, cell, setting, 0, where)
    assert found["validation"] == 0
    assert "diverged" in found
    tested = run.run_test(TINY, cell, setting, 0, where)
    assert tested["test"]["map_at_r"] < 0.5


def test_the_command_line(tmp_path, capsys):
    where = ["--results", str(tmp_path / "x.jsonl"), "--cache", str(tmp_path)]
    assert run.main(["--preset", "smoke", *where, "--list"]) == 0
    assert "0 of    16" in capsys.readouterr().out
    assert run.main(["--preset", "smoke", *where, "--only", "nothing"]) == 2
    assert "no block nothing" in capsys.readouterr().err
    pattern = ["--only", "digits/scratch/clean/contrastive", "--budget-minutes", "0"]
    assert run.main(["--preset", "smoke", *where, *pattern]) == 0
    assert "0 of 4 runs" in capsys.readouterr().out
    missing = ["--data-root", str(tmp_path / "none"), "--only", "omniglot/scratch/clean/triplet"]
    assert run.main(["--preset", "small", *where, *missing]) == 1  # said for each run


def test_a_run_without_re_ranking_is_run_again_once_that_is_asked_for():
    preset = PRESETS["small"]
    cell = Cell("omniglot", "scratch", "clean", "contextual")
    assert cell.reranked
    line = {**cell._asdict(), "budget": preset.describe()}
    trials = [
        line | {"trial": n, "setting": METHODS["contextual"].draw(n), "validation": -n}
        for n in range(preset.trials)
    ]
    test = line | {"seed": 0, "setting": trials[0]["setting"], "test": {plan.MAP: 0.5}}
    job = run.Job(cell, seed=0)
    assert not run.is_done(job, run.Results(preset, [*trials, test]))
    test["test"][plan.RERANKED] = 0.5
    assert run.is_done(job, run.Results(preset, [*trials, test]))


def test_cleaning_leaves_out_what_is_distrusted(tmp_path, monkeypatch):
    """From the epoch after the look on, and for good only as long as it is distrusted."""
    left_out, looks = [], []

    class Batches(run.Batches):
        def leave_out(self, indices):
            left_out.append(list(indices))
            super().leave_out(indices)

    class Trust(run.LabelNoiseDetector):
        def find_label_issues(self):
            looks.append(int(self.num_updates))
            return torch.tensor([int(self.num_updates)])

    monkeypatch.setattr(run, "Batches", Batches)
    monkeypatch.setattr(run, "LabelNoiseDetector", Trust)
    preset = PRESETS["smoke"]
    given = run.load_training("digits", "scratch", "clean", 0, tmp_path)
    where = run.Where(tmp_path, tmp_path)
    for method, expected in {"supcon_cleaned": [[], [1]], "supcon": [[]]}.items():
        left_out.clear()
        cell = Cell("digits", "scratch", "clean", method)
        run.train(preset, cell, METHODS[method].draw(0), 0, given, where)
        assert left_out == expected
    assert looks == [1]  # after the last of two epochs there is nothing to leave out of
