"""Running the missing runs of a preset, in one or several processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import execute
from .conditions import Experiment
from .examples import UserError
from .execute import Runtime
from .methods import METHODS
from .presets import Preset
from .records import Record, Results


class Job(NamedTuple):
    """A trial or a test of an experiment."""

    experiment: Experiment
    trial: int | None = None
    seed: int | None = None

    def __str__(self) -> str:
        run = f"trial {self.trial}" if self.seed is None else f"seed {self.seed}"
        return f"{self.experiment} {run}"

    def is_done(self, results: Results) -> bool:
        if self.seed is None:
            return self.trial in results.trials.get(self.experiment, {})
        return results.test(self.experiment, self.seed) is not None

    def call(self, results: Results, runtime: Runtime) -> tuple[Any, ...] | None:
        """The function to call and its arguments, or None while a test's trials are missing."""
        preset, experiment = results.preset, self.experiment
        if self.trial is not None:
            hparams = METHODS[experiment.method].draw(self.trial)
            return execute.run_trial, preset, experiment, hparams, self.trial, runtime
        selected = results.selected(experiment)
        if selected is None:
            return None
        return execute.run_test, preset, experiment, selected, self.seed, runtime


def plan_jobs(preset: Preset, only: Sequence[str]) -> list[Job]:
    """The jobs in order, each experiment's trials before its tests.

    `only`: names of grids, or patterns of DATASET/INIT/CONDITION/METHOD. Empty means all.
    """
    unknown = [p for p in only if "/" not in p and p not in preset.grids]
    if unknown:
        names = ", ".join(preset.grids)
        raise UserError(f"--only: there is no grid {unknown[0]}; the grids are {names}")
    jobs: dict[Job, None] = {}
    for grid in preset.grids:
        for experiment in preset.experiments(grid):
            if only and grid not in only and not any(fnmatch(str(experiment), p) for p in only):
                continue
            tuned_as = experiment.tuned_as
            jobs |= {Job(tuned_as, trial=trial): None for trial in range(preset.trials)}
            jobs |= {Job(experiment, seed=seed): None for seed in range(preset.seeds)}
    return list(jobs)


def sweep(
    jobs: list[Job],
    results: Results,
    runtime: Runtime,
    append: Callable[[Record], None],
    processes: int = 1,
    seconds: float = float("inf"),
) -> list[str]:
    """Run the jobs that are not done, and return messages of those that failed.

    No job starts after the given number of seconds.
    """
    started = time.monotonic()
    waiting = [job for job in jobs if not job.is_done(results)]
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
                if call := job.call(results, runtime):
                    waiting.remove(job)
                    running[submit(timed, *call)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    record = future.result()
                except (UserError, OSError, RuntimeError, ValueError) as error:
                    failures.append(f"{job}: {error}")
                    tqdm.write(f"failed: {failures[-1]}")
                    continue
                append(record)
                results.add(record)
                bar.set_postfix_str(f"{job}: {record['validation']:.3f}", refresh=False)
                bar.update()
    return failures


@contextmanager
def workers(processes: int) -> Iterator[Callable[..., Future[Record]]]:
    """A function that submits calls to processes of one thread each, or calls here if it is one."""
    if processes == 1:
        yield call_here
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        yield pool.submit


def timed(function: Callable[..., Record], *arguments: Any) -> Record:
    started = time.perf_counter()
    record = function(*arguments)
    return record | {"seconds": round(time.perf_counter() - started, 2)}


def call_here(function: Callable[..., Record], *arguments: Any) -> Future[Record]:
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

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot stop its workers.
    threading.Thread(target=exit_with_parent, daemon=True).start()
