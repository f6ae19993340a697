#!/usr/bin/env python3
"""Run what `plan.py` declares, or one of the papers' own protocols.

    python -m benchmarks.evidence.run --preset small --jobs 2      # two cores, about two hours
    python -m benchmarks.evidence.run --preset small-finetuned --jobs 2              # as long
    python -m benchmarks.evidence.run --only clean 'cifar100/*' --budget-minutes 30
    python -m benchmarks.evidence.run --preset full --device cuda --jobs 8
    python -m benchmarks.evidence.run --protocol cub --data-root DIR --backbone my_nets:resnet50

A run that is done is one line in results/PRESET.jsonl, where presets that differ only in what they
run share a file. Stop at any time, in any way: the same command goes on with what is missing.
`python -m benchmarks.evidence.render` makes the tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

# torch's threads wait by spinning, unless told otherwise before it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import checkpoint
import pytorch_metric_learning
import torch
from datasets import UserError
from torch import nn
from tqdm import tqdm

import pml_extras
from pml_extras.label_noise import LabelNoiseDetector

from . import protocol, training
from .data import ROOT, Batches, Training, load_test, load_training
from .plan import (
    ACCURACY,
    CONDITIONS,
    DATASETS,
    FEW_SHOT,
    MAP,
    METHODS,
    PRESETS,
    PRETRAINING,
    TRIAL_SEED,
    Cell,
    Parts,
    Preset,
    Setting,
    Sizes,
    assemble,
    whole,
)
from .records import Record, Results, appending, read

RESULTS = Path(__file__).parent / "results"


class Where(NamedTuple):
    """What does not decide the outcome."""

    root: Path
    cache: Path  # of pre-trained networks
    device: str = "cpu"


class Trained(NamedTuple):
    network: nn.Module
    parts: Parts
    sizes: Sizes
    cost: dict[str, Any]


# ---- One run.


def run_trial(preset: Preset, cell: Cell, setting: Setting, trial: int, where: Where) -> Record:
    """Train with a setting and score it. What this is given holds no test class."""
    given = load_training(cell.dataset, cell.start, cell.condition, TRIAL_SEED, where.root)
    trained = train(preset, cell, setting, TRIAL_SEED, given, where)
    scores = validate(cell, trained, given, where)
    return record(preset, cell, setting, where, trained, scores) | {"trial": trial}


def run_test(preset: Preset, cell: Cell, setting: Setting, seed: int, where: Where) -> Record:
    """Train with the chosen setting, measuring validation data and probes after each epoch, and
    look at the test classes, once."""
    given = load_training(cell.dataset, cell.start, cell.condition, seed, where.root)
    probes = training.Probes(given, torch.device(where.device))
    history: list[Record] = []

    def after_epoch(epoch: int, loss: float | None, trained: Trained) -> None:
        measured = probes.measure(trained.network, trained.parts, trained.sizes.per_class)
        row = {"epoch": epoch, "loss": loss, **validate(cell, trained, given, where)}
        history.append(rounded(row) | {"probes": measured})

    trained = train(preset, cell, setting, seed, given, where, after_epoch)
    found = record(preset, cell, setting, where, trained, history[-1]) | {"seed": seed}
    scores = measure_test(cell, trained, given, seed, where)
    return found | {"history": history, "test": rounded(scores)}


def train(
    preset: Preset,
    cell: Cell,
    setting: Setting,
    seed: int,
    given: Training,
    where: Where,
    after_epoch: Callable[[int, float | None, Trained], None] = lambda epoch, loss, trained: None,
) -> Trained:
    """The number, from 0, and the mean loss of each epoch go to `after_epoch`."""
    budget, method, device = preset.budget, METHODS[cell.method], torch.device(where.device)
    images = given.images
    training.seed_everything(seed)
    network = training.build_network(images, budget).to(device)
    if cell.start == "finetune":
        network.load_state_dict(pretrained(preset, cell, seed, where))
        training.seed_everything(seed)  # wherever the weights came from
    sizes = Sizes.of(method, len(images.names), budget.embedding_size, budget.batch_size)
    parts = assemble(method, setting, sizes, network, budget.epochs)
    parts.loss.to(device)
    by_class = cell.drawn_by_class and not method.random_batches
    batches = Batches(images, sizes, by_class, budget.steps, device)
    trust = LabelNoiseDetector(images.labels)
    trained = Trained(network, parts, sizes, {})
    after_epoch(0, None, trained)

    def look_then(epoch: int, loss: float) -> None:
        if method.cleaned and epoch < budget.epochs:
            distrusted = trust.update(training.embed(network, images, device)).find_label_issues()
            batches.leave_out(distrusted.tolist())
        after_epoch(epoch, loss, trained)

    training.seed_everything(seed)  # the same batches for all methods
    try:
        cost = training.fit(network, parts, setting, batches, budget.epochs, look_then)
    except training.DivergedError as error:
        cost = {"diverged": str(error)}
    return trained._replace(cost=cost)


def validate(cell: Cell, trained: Trained, given: Training, where: Where) -> dict[str, float]:
    device = torch.device(where.device)
    if DATASETS[cell.dataset].classification:
        return training.classification(
            trained.network, trained.parts.loss, given.validation, device
        )
    embeddings = training.embed(trained.network, given.validation, device)
    include = ["precision_at_1", "map_at_r"]
    return training.retrieval(embeddings, given.validation.labels, include=include)


def pretrained(preset: Preset, cell: Cell, seed: int, where: Where) -> dict[str, Any]:
    """The weights to fine-tune: NormalizedSoftmax on the other half of the training classes, whose
    labels are right and whose images are all there, but for a long tail: that tests training
    classes, which are not to be seen here either."""
    budget, device = preset.budget, torch.device(where.device)
    condition = cell.condition if CONDITIONS[cell.condition].imbalance > 1 else "clean"
    path = where.cache / f"{cell.dataset}-{condition}-{seed}.pt"
    if path.exists():
        saved = checkpoint.load(path)
        if saved["budget"] == preset.describe():
            weights: dict[str, Any] = saved["weights"]
            return weights
    given = load_training(cell.dataset, "pretraining", condition, seed, where.root)
    training.seed_everything(seed)
    network = training.build_network(given.images, budget).to(device)
    method = METHODS["normalized_softmax"]
    sizes = Sizes.of(method, len(given.images.names), budget.embedding_size, budget.batch_size)
    parts = method.build(PRETRAINING, sizes)
    parts.loss.to(device)
    batches = Batches(given.images, sizes, cell.drawn_by_class, budget.steps, device)
    training.fit(network, parts, PRETRAINING, batches, budget.pretraining_epochs)
    weights = network.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = path.with_suffix(f".{os.getpid()}")  # another process may be at the same
    checkpoint.save(ours, {"budget": preset.describe(), "weights": weights})
    os.replace(ours, path)
    return weights


def measure_test(
    cell: Cell, trained: Trained, given: Training, seed: int, where: Where
) -> dict[str, float]:
    spec, device = DATASETS[cell.dataset], torch.device(where.device)
    images, rare = load_test(cell.dataset, cell.start, cell.condition, seed, where.root)
    network = trained.network
    if spec.classification:
        return training.classification(network, trained.parts.loss, images, device)
    embeddings = training.embed(network, images, device)
    scores = training.retrieval(embeddings, images.labels)
    if rare:
        of_rare = training.retrieval(embeddings, images.labels, include=["map_at_r"], rare=rare)
        scores["rare_map_at_r"] = of_rare["map_at_r"]
    if spec.few_shot and cell.condition == "clean":
        for name in FEW_SHOT:
            ways, shots = (int(part.split("-")[0]) for part in name.split())
            scores[name] = training.few_shot(embeddings, images.labels, ways, shots)
    if cell.reranked:
        on_validation = training.embed(network, given.validation, device)
        scores |= training.reranked(
            (on_validation, given.validation.labels), (embeddings, images.labels)
        )
    return scores


def record(
    preset: Preset,
    cell: Cell,
    setting: Setting,
    where: Where,
    trained: Trained,
    scores: dict[str, Any],  # on validation data
) -> Record:
    primary = ACCURACY if DATASETS[cell.dataset].classification else MAP
    return {
        **cell._asdict(),
        "setting": setting,
        "budget": preset.describe(),
        "validation": 0.0 if "diverged" in trained.cost else round(scores[primary], 5),
        **rounded(trained.cost),
        "device": where.device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "pml_extras": pml_extras.__version__,
        },
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}


# ---- All runs.


class Job(NamedTuple):
    cell: Cell
    trial: int | None = None
    seed: int | None = None

    def __str__(self) -> str:
        return f"{'/'.join(self.cell)} " + (
            f"trial {self.trial}" if self.seed is None else f"seed {self.seed}"
        )


def planned(preset: Preset, only: Sequence[str]) -> list[Job]:
    """In order; a cell's trials come before its seeds. `only`: names of blocks, or patterns of
    DATASET/START/CONDITION/METHOD."""
    unknown = [p for p in only if "/" not in p and p not in preset.blocks]
    if unknown:
        raise UserError(f"--only: no block {unknown[0]}; there are {', '.join(preset.blocks)}")
    jobs: dict[Job, None] = {}
    for block in preset.blocks:
        for cell in preset.cells(block):
            if only and block not in only and not any(fnmatch("/".join(cell), p) for p in only):
                continue
            jobs |= {Job(cell.tuned, trial=trial): None for trial in range(preset.trials)}
            jobs |= {Job(cell, seed=seed): None for seed in range(preset.seeds)}
    return list(jobs)


def is_done(job: Job, results: Results) -> bool:
    if job.seed is None:
        return job.trial in results.trials.get(job.cell, {})
    return results.test(job.cell, job.seed) is not None


def task(job: Job, results: Results, where: Where) -> tuple[Any, ...] | None:
    """The call that a job comes to; None as long as the trials it needs are not there."""
    preset, cell = results.preset, job.cell
    if job.trial is not None:
        return run_trial, preset, cell, METHODS[cell.method].draw(job.trial), job.trial, where
    setting = results.selected(cell)
    return None if setting is None else (run_test, preset, cell, setting, job.seed, where)


def sweep(
    jobs: list[Job],
    results: Results,
    where: Where,
    append: Callable[[Record], None],
    processes: int = 1,
    seconds: float = float("inf"),
) -> list[str]:
    """Run what is not done; returns what failed. After so many seconds nothing new is begun."""
    started = time.monotonic()
    waiting = [job for job in jobs if not is_done(job, results)]
    running: dict[Future[Record], Job] = {}
    failures = []
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(waiting), unit="run", smoothing=0.02,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )  # fmt: skip
    with bar, workers(processes) as submit:
        while True:
            for job in list(waiting):
                if len(running) == processes or time.monotonic() - started > seconds:
                    break
                if call := task(job, results, where):
                    waiting.remove(job)
                    running[submit(timed, *call)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    found = future.result()
                except (UserError, OSError, RuntimeError, ValueError) as error:
                    failures.append(f"{job}: {error}")
                    tqdm.write(f"failed: {failures[-1]}")
                    continue
                append(found)
                results.add(found)
                bar.set_postfix_str(f"{job}: {found['validation']:.3f}", refresh=False)
                bar.update()
    return failures


@contextmanager
def workers(processes: int) -> Iterator[Callable[..., Future[Record]]]:
    """A function that runs calls in so many processes, of one thread each; one is this process."""
    if processes == 1:
        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        yield pool.submit


def timed(function: Callable[..., Record], *arguments: Any) -> Record:
    started = time.perf_counter()
    found = function(*arguments)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def run_here(function: Callable[..., Record], *arguments: Any) -> Future[Record]:
    future: Future[Record] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot tell its workers to go.
    threading.Thread(target=follow, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="WHAT",
        help="blocks by name, or patterns of DATASET/START/CONDITION/METHOD")  # fmt: skip
    add("--jobs", type=int, default=1, help="processes at a time, one thread each")
    add("--budget-minutes", type=float, default=float("inf"), help="begin nothing new after that")
    add("--device", default="cpu", help="default: %(default)s")
    add("--data-root", type=Path, default=ROOT, help="default: %(default)s")
    add("--results", type=Path, help="default: results/PRESET.jsonl beside this file")
    add("--cache", type=Path, help="of pre-trained networks; default: runs/evidence-PRESET")
    add("--list", action="store_true", help="say what is done and what is missing, and stop")
    add("--protocol", choices=protocol.NAMES, help="the papers' own; all below are for it")
    protocol.add_arguments(parser.add_argument_group("with --protocol").add_argument)
    args = parser.parse_args(arguments)
    name = "protocol" if args.protocol else whole(args.preset)[0]
    path = args.results or RESULTS / f"{name}.jsonl"
    try:
        if args.protocol:
            protocol.run(args, args.data_root, path)
            return 0
        return run_preset(args, PRESETS[args.preset], path)
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrun.py: stopped; the same command goes on", file=sys.stderr)
        return 130


def run_preset(args: argparse.Namespace, preset: Preset, path: Path) -> int:
    if args.list:
        results = Results(preset, read(path))
        for block in preset.blocks:
            jobs = planned(preset, [block])
            done = sum(is_done(job, results) for job in jobs)
            print(f"{block:24} {done:5} of {len(jobs):5} runs")
        return 0
    cache = args.cache or Path("runs") / f"evidence-{whole(args.preset)[0]}"
    where = Where(args.data_root, cache, args.device)
    jobs = planned(preset, args.only)
    with appending(path) as append:
        results = Results(preset, read(path))
        seconds = 60 * args.budget_minutes
        failures = sweep(jobs, results, where, append, args.jobs, seconds)
    left = sum(not is_done(job, results) for job in jobs)
    print(f"{len(jobs) - left} of {len(jobs)} runs are in {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
