"""The result lines: one JSON object per run, in a file that survives being interrupted."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .components import Hparams
from .conditions import Experiment
from .examples import UserError
from .methods import METHODS
from .metrics import RERANKED
from .presets import Preset

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file. An incomplete last line, from an interrupted run, is ignored."""
    if not path.exists():
        return []
    *lines, _incomplete = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    return records


@contextmanager
def appending(path: Path) -> Iterator[Any]:
    """A function that adds a record and returns once it is on disk. Allows one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}") from None
        file.truncate(path.read_bytes().rfind(b"\n") + 1)

        def append(record: Record) -> None:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}


class Results:
    """The records that match the preset as it is now.

    Ignored are records of another budget, with hyperparameters that are no longer drawn or
    selected, and tests without re-ranking where it is now measured.
    """

    def __init__(self, preset: Preset, records: Iterable[Record]) -> None:
        self.preset = preset
        self.planned = frozenset(preset.experiments())
        self.trials: dict[Experiment, dict[int, Record]] = {}
        self.tests: dict[Experiment, dict[int, Record]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        experiment = Experiment(*(record[name] for name in Experiment._fields))
        if experiment.method not in METHODS or record["budget"] != self.preset.budget._asdict():
            return
        if "trial" in record:
            trial = record["trial"]
            if record["hparams"] == METHODS[experiment.method].draw(trial):
                self.trials.setdefault(experiment, {})[trial] = record
        else:
            self.tests.setdefault(experiment, {})[record["seed"]] = record

    def selected(self, experiment: Experiment) -> Hparams | None:
        """The hyperparameters with the best validation score, or None before all trials ran."""
        trials = self.trials.get(experiment.tuned_as, {})
        if any(trial not in trials for trial in range(self.preset.trials)):
            return None
        records = [trials[trial] for trial in range(self.preset.trials)]
        hparams: Hparams = max(records, key=lambda record: record["validation"])["hparams"]
        return hparams

    def test(self, experiment: Experiment, seed: int) -> Record | None:
        record = self.tests.get(experiment, {}).get(seed)
        if record is None or record["hparams"] != self.selected(experiment):
            return None
        return None if experiment.is_reranked and RERANKED not in record["test"] else record

    def tested(self, experiment: Experiment) -> list[Record]:
        """The tests with the selected hyperparameters, in the order of the seeds."""
        found = [self.test(experiment, seed) for seed in range(self.preset.seeds)]
        return [record for record in found if record]

    def is_complete(self, experiment: Experiment) -> bool:
        return len(self.tested(experiment)) == self.preset.seeds
