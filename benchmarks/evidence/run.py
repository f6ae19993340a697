"""Run the experiments of a preset.

    export PML_EXTRAS_DATA=DIR                                     # or --data-root DIR
    python -m benchmarks.evidence.run --preset small --jobs 2      # two cores, about two hours
    python -m benchmarks.evidence.run --preset small-finetuned --jobs 2              # the same
    python -m benchmarks.evidence.run --only clean 'cifar100/*' --budget-minutes 30
    python -m benchmarks.evidence.run --preset full --device cuda --jobs 8

Each finished run is one line in results/PRESET.jsonl. Presets with the same budget share a file.
An interrupted command continues when it is started again. `python -m benchmarks.evidence.render`
makes the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# OpenMP threads that wait actively take the cores from other processes. Set before importing torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .conditions import DATASETS
from .data import add_data_root, check_data_root
from .examples import UserError
from .execute import Runtime
from .presets import PRESETS, Preset, merge_presets
from .records import RESULTS, Results, appending, read
from .sweep import plan_jobs, sweep


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="WHAT",
        help="names of grids, or patterns of DATASET/INIT/CONDITION/METHOD")  # fmt: skip
    add("--jobs", type=int, default=1, help="number of processes, of one thread each")
    add("--budget-minutes", type=float, default=float("inf"), help="start no run after this time")
    add("--device", default="cpu", help="default: %(default)s")
    add_data_root(parser)
    add("--results", type=Path, help="default: results/PRESET.jsonl next to this file")
    add("--cache", type=Path, help="for pretrained networks; default: runs/evidence-PRESET")
    add("--list", action="store_true", help="print how many runs are done, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    name, _ = merge_presets(args.preset)
    path = args.results or RESULTS / f"{name}.jsonl"
    try:
        return run_preset(args, PRESETS[args.preset], path)
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrun.py: stopped; the same command continues", file=sys.stderr)
        return 130


def run_preset(args: argparse.Namespace, preset: Preset, path: Path) -> int:
    if args.list:
        results = Results(preset, read(path))
        for grid in preset.grids:
            jobs = plan_jobs(preset, [grid])
            done = sum(job.is_done(results) for job in jobs)
            print(f"{grid:24} {done:5} of {len(jobs):5} runs")
        return 0
    cache = args.cache or Path("runs") / f"evidence-{merge_presets(args.preset)[0]}"
    runtime = Runtime(args.data_root, cache, args.device)
    jobs = plan_jobs(preset, args.only)
    check_data_root(args.data_root, (DATASETS[job.experiment.dataset].source for job in jobs))
    with appending(path) as append:
        results = Results(preset, read(path))
        seconds = 60 * args.budget_minutes
        failures = sweep(jobs, results, runtime, append, args.jobs, seconds)
    done = sum(job.is_done(results) for job in jobs)
    print(f"{done} of {len(jobs)} runs are in {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
