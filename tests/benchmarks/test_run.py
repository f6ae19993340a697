"""The declared experiments are consistent, and a sweep survives interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from images import UserError

from benchmarks.evidence import execute, metrics, records, run, sweep, training
from benchmarks.evidence.claims import claims
from benchmarks.evidence.components import LR, Components, Sizes
from benchmarks.evidence.conditions import Experiment
from benchmarks.evidence.data import load_train
from benchmarks.evidence.execute import Runtime
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.presets import PRESETS, Budget, Grid, Preset, merge_presets
from benchmarks.evidence.records import Results
from benchmarks.evidence.sweep import Job, plan_jobs

TINY = Preset(
    Budget(epochs=1, steps_per_epoch=2, batch_size=16, width=2, pixel_unshuffle=False,
           pretraining_epochs=1, embedding_size=4),
    trials=2,
    seeds=2,
    grids={"clean": Grid(("digits",), ("finetune",), ("clean",), ("contrastive", "arcface"))},
)  # fmt: skip
TIMES = ("seconds", "seconds_per_step", "peak_mib", "threads")


def run_sweep(preset, path, processes=1):
    """Like run.main."""
    runtime = Runtime(path.parent, path.parent / "cache")
    with records.appending(path) as append:
        results = Results(preset, records.read(path))
        failures = sweep.sweep(plan_jobs(preset, []), results, runtime, append, processes)
    assert failures == []
    return results


def without_times(path):
    lines = [{k: v for k, v in record.items() if k not in TIMES} for record in records.read(path)]
    return sorted(json.dumps(line) for line in lines)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The result lines of a complete sweep."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("complete") / "tiny.jsonl"
    run_sweep(TINY, path)
    return path


# ---- The declared experiments.


@pytest.mark.filterwarnings("ignore:num_neighbors")  # "contextual_k" varies it
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name):
    method = METHODS[name]
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 8)
    sizes = method.sizes(16, 8, 64)
    labels = torch.arange(sizes.batch_size) // sizes.samples_per_class
    before, means = network.weight.clone(), torch.randn(16, 6)
    for trial in range(2):
        hparams = method.draw(trial)
        for key, distribution in (LR | method.space).items():
            assert distribution._contains(distribution.to_internal_repr(hparams[key]))
        components = method.build(hparams, sizes, network, 2)
        batches = [(means[labels] + 0.5 * torch.randn(sizes.batch_size, 6), labels)] * 2
        cost = training.fit(network, components, hparams, batches, 2)
        assert cost["seconds_per_step"] > 0
    assert torch.isfinite(network.weight).all()
    assert not torch.equal(network.weight, before)


def test_draws_repeat_and_agree_with_and_without_an_addition():
    for trial in range(5):
        draw = METHODS["triplet"].draw(trial)
        assert draw == METHODS["triplet"].draw(trial) != METHODS["triplet"].draw(trial + 1)
        for more in ("triplet+lsd", "triplet+cir", "triplet+ms_miner"):
            assert draw.items() < METHODS[more].draw(trial).items()
    assert len({METHODS["triplet"].draw(trial)["lr"] for trial in range(20)}) == 20


def test_labels_are_unique():
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["small", "full"])
def test_presets_have_the_runs_of_every_comparison(name):
    _, preset = merge_presets(name)
    experiments = set(preset.experiments())
    used = set()

    def scores(experiment, metric):
        used.add((experiment, metric))
        curve = [0.1] * (preset.budget.epochs + 1)
        return dict.fromkeys(range(preset.seeds), curve if metric == "curve" else 0.5)

    found = claims(preset)
    assert len(found) >= 8
    for comparison in (c for claim in found for c in claim.comparisons):
        assert len(comparison.differences(scores)) == preset.seeds
    assert {experiment for experiment, _ in used} <= experiments
    for experiment, metric in used:
        assert metric != metrics.RERANKED or experiment.is_reranked
    assert preset.seeds >= 5
    assert {Job(e.tuned_as, trial=0) for e in experiments} <= set(plan_jobs(preset, []))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_one_budget_share_a_file_and_a_page(name):
    first, merged = merge_presets(name)
    assert name.startswith(first)
    same_budget = [preset for n, preset in PRESETS.items() if n.startswith(first)]
    assert {(p.budget, p.trials, p.seeds) for p in same_budget} == {
        (merged.budget, merged.trials, merged.seeds)
    }
    assert len(merged.grids) == sum(len(preset.grids) for preset in same_budget)
    assert set(merged.experiments()) == {e for preset in same_budget for e in preset.experiments()}


def test_the_warm_up_shifts_weight_to_the_contextual_term():
    method = METHODS["contextual_warmup"]
    hparams = method.draw(0) | {"warmup": 0.5, "contextual_weight": 0.6}
    components = method.build(hparams, Sizes(4, 8, 4, 16), torch.nn.Linear(2, 8), 1)
    for progress, weight in ((0, 0), (0.25, 0.3), (0.5, 0.6), (1, 0.6)):
        components.schedule(progress)
        assert components.loss.contextual_weight == pytest.approx(weight)
        assert components.loss.contrastive_weight == pytest.approx(0.9 - weight)


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
    loss = METHODS["triplet"].build_loss({"margin": 0.1}, None)
    components = Components(loss, Miner(), miner_start=0.5)
    batches = Batches([(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))] * 4)
    training.fit(network, components, {"lr": 0.1}, batches, 2)
    assert calls == [4, 5, 6, 7]


# ---- Records.


def test_an_incomplete_last_line_is_ignored(tmp_path):
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


def test_only_records_that_match_the_preset_count(complete):
    lines = records.read(complete)
    results = Results(TINY, lines)
    experiment = Experiment("digits", "finetune", "clean", "contrastive")
    assert [r["seed"] for r in results.tested(experiment)] == [0, 1]
    best = max((r for r in results.trials[experiment].values()), key=lambda r: r["validation"])
    assert results.selected(experiment) == best["hparams"]
    for change in (
        {"hparams": {"lr": 1.0}},  # another search space
        {"budget": {**TINY.budget._asdict(), "epochs": 7}},
        {"method": "no longer declared"},
    ):
        others = Results(TINY, [line | change for line in lines])
        assert others.selected(experiment) is None
        assert others.tested(experiment) == []
    # Another result of a trial may select other hyperparameters, and then the tests do not count.
    loser = next(r for r in lines if r.get("trial") is not None and r["method"] == experiment.method
                 and r["hparams"] != best["hparams"])  # fmt: skip
    changed = Results(TINY, [*lines, loser | {"validation": 2.0}])
    assert changed.selected(experiment) == loser["hparams"]
    assert changed.tested(experiment) == []


def test_a_trial_has_no_test_result(complete):
    for record in records.read(complete):
        assert ("test" in record) == ("seed" in record) != ("trial" in record)


# ---- Sweeps.


def test_a_complete_sweep_does_nothing(complete):
    before = complete.read_bytes()
    run_sweep(TINY, complete)
    assert complete.read_bytes() == before


def test_two_processes_give_the_results_of_one(complete, tmp_path):
    run_sweep(TINY, tmp_path / "tiny.jsonl", processes=2)
    assert without_times(tmp_path / "tiny.jsonl") == without_times(complete)


def test_killed_sweeps_continue(complete, tmp_path):
    path = tmp_path / "tiny.jsonl"
    fork = multiprocessing.get_context("fork")
    total = len(records.read(complete))
    for kill in range(3):
        attempt = fork.Process(target=run_sweep, args=(TINY, path))
        attempt.start()
        while attempt.is_alive() and len(records.read(path)) <= 2 * kill:
            time.sleep(0.01)
        os.kill(attempt.pid, signal.SIGKILL)
        attempt.join()
        with open(path, "ab") as file:  # an incomplete line
            file.write(b'{"dataset": "dig')
    done = records.read(path)
    assert 3 <= len(done) < total
    run_sweep(TINY, path)
    assert records.read(path)[: len(done)] == done
    assert without_times(path) == without_times(complete)


def test_no_run_starts_after_the_time_budget(tmp_path):
    results = Results(TINY, [])
    runtime, found = Runtime(tmp_path, tmp_path), []
    sweep.sweep(plan_jobs(TINY, []), results, runtime, found.append, seconds=0.0)
    assert found == []


def test_a_failure_is_reported_and_the_rest_continues(tmp_path, monkeypatch):
    def fail(preset, experiment, *arguments):
        if experiment.method == "arcface":
            raise RuntimeError("out of memory")
        return run_trial(preset, experiment, *arguments)

    run_trial = execute.run_trial
    monkeypatch.setattr(execute, "run_trial", fail)
    results = Results(TINY, [])
    runtime = Runtime(tmp_path, tmp_path)
    failures = sweep.sweep(plan_jobs(TINY, []), results, runtime, lambda record: None)
    assert len(failures) == TINY.trials
    assert "out of memory" in failures[0]
    assert results.is_complete(Experiment("digits", "finetune", "clean", "contrastive"))


def test_a_diverging_trial_scores_zero(tmp_path):
    experiment = Experiment("digits", "scratch", "clean", "contrastive")
    hparams = METHODS["contrastive"].draw(0) | {"lr": 1e30}
    runtime = Runtime(tmp_path, tmp_path)
    found = execute.run_trial(TINY, experiment, hparams, 0, runtime)
    assert found["validation"] == 0
    assert "diverged" in found
    tested = execute.run_test(TINY, experiment, hparams, 0, runtime)
    assert tested["test"]["map_at_r"] < 0.5


def test_the_command_line(tmp_path, capsys):
    paths = ["--results", str(tmp_path / "x.jsonl"), "--cache", str(tmp_path)]
    assert run.main(["--preset", "smoke", *paths, "--list"]) == 0
    assert "0 of    16" in capsys.readouterr().out
    assert run.main(["--preset", "smoke", *paths, "--only", "nothing"]) == 2
    assert "no grid nothing" in capsys.readouterr().err
    pattern = ["--only", "digits/scratch/clean/contrastive", "--budget-minutes", "0"]
    assert run.main(["--preset", "smoke", *paths, *pattern]) == 0
    assert "0 of 4 runs" in capsys.readouterr().out
    only = ["--only", "omniglot/scratch/clean/triplet"]
    missing = ["--data-root", str(tmp_path / "none")]
    assert run.main(["--preset", "small", *paths, *only, *missing]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no directory" in error
    assert "--data-root DIR or set PML_EXTRAS_DATA" in error
    empty = ["--data-root", str(tmp_path)]
    assert run.main(["--preset", "small", *paths, *only, *empty]) == 1  # each run fails


def test_a_test_without_reranking_does_not_count_if_it_is_measured_now():
    preset = PRESETS["small"]
    experiment = Experiment("omniglot", "scratch", "clean", "contextual")
    assert experiment.is_reranked
    line = {**experiment._asdict(), "budget": preset.budget._asdict()}
    trials = [
        line | {"trial": n, "hparams": METHODS["contextual"].draw(n), "validation": -n}
        for n in range(preset.trials)
    ]
    test = line | {"seed": 0, "hparams": trials[0]["hparams"], "test": {metrics.MAP: 0.5}}
    job = Job(experiment, seed=0)
    assert not job.is_done(Results(preset, [*trials, test]))
    test["test"][metrics.RERANKED] = 0.5
    assert job.is_done(Results(preset, [*trials, test]))


def test_label_filtering_excludes_the_label_issues(tmp_path, monkeypatch):
    """From the epoch after the update, and only while they are flagged."""
    excluded, updates = [], []

    class Batches(execute.Batches):
        def exclude(self, indices):
            excluded.append(list(indices))
            super().exclude(indices)

    class Detector(execute.LabelNoiseDetector):
        def find_label_issues(self):
            updates.append(int(self.num_updates))
            return torch.tensor([int(self.num_updates)])

    monkeypatch.setattr(execute, "Batches", Batches)
    monkeypatch.setattr(execute, "LabelNoiseDetector", Detector)
    preset, runtime = PRESETS["smoke"], Runtime(None, tmp_path)
    for method, expected in {"supcon_label_filtered": [[], [1]], "supcon": [[]]}.items():
        excluded.clear()
        experiment = Experiment("digits", "scratch", "clean", method)
        train_data = load_train(experiment.scenario, 0, None)
        hparams = METHODS[method].draw(0)
        execute.train(preset, experiment, hparams, 0, train_data, runtime)
        assert excluded == expected
    assert updates == [1]  # none after the last of two epochs
