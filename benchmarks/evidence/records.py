"""One JSON line a run, in a file that survives any stop."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import UserError

from .plan import METHODS, RERANKED, Cell, Preset, Setting

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """A last line without an end was being written when the run was killed: it is no line."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no JSON: {error}") from error
    return records


@contextmanager
def appending(path: Path) -> Iterator[Any]:
    """A function that adds a record and returns when it is on the disk. One writer at a time."""
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


class Results:
    """The records that the plan, as it stands, asks for. Others are as if they were not there:
    those of another budget, of a setting that is no longer drawn or chosen, and those from before
    re-ranking was asked for."""

    def __init__(self, preset: Preset, records: Iterable[Record]) -> None:
        self.preset = preset
        self.trials: dict[Cell, dict[int, Record]] = {}
        self.tests: dict[Cell, dict[int, Record]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        cell = Cell(*(record[name] for name in Cell._fields))
        if cell.method not in METHODS or record["budget"] != self.preset.describe():
            return
        if "trial" in record:
            number = record["trial"]
            if record["setting"] == METHODS[cell.method].draw(number):
                self.trials.setdefault(cell, {})[number] = record
        else:
            self.tests.setdefault(cell, {})[record["seed"]] = record

    def selected(self, cell: Cell) -> Setting | None:
        """The setting that does best on the validation data; None before all trials are run."""
        trials = self.trials.get(cell.tuned, {})
        if any(number not in trials for number in range(self.preset.trials)):
            return None
        ours = [trials[number] for number in range(self.preset.trials)]
        setting: Setting = max(ours, key=lambda record: record["validation"])["setting"]
        return setting

    def test(self, cell: Cell, seed: int) -> Record | None:
        record = self.tests.get(cell, {}).get(seed)
        if record is None or record["setting"] != self.selected(cell):
            return None
        return None if cell.reranked and RERANKED not in record["test"] else record

    def tested(self, cell: Cell) -> list[Record]:
        """The runs with the selected setting, in the order of the seeds."""
        found = [self.test(cell, seed) for seed in range(self.preset.seeds)]
        return [record for record in found if record]
