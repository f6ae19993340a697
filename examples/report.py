"""What a run prints and writes: the log, the figures, results.json and the table at the end."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import protocols
import pytorch_metric_learning
import torch
from metrics import PRIMARY_METRIC, label
from pytorch_metric_learning.utils.logging_presets import get_record_keeper
from samples import Data, Samples
from torch import Tensor

import pml_extras
from pml_extras.label_noise import LabelNoiseDetector

FIGURES = ("curves.png", "retrieval.png", "map.png", "similarities.png", "labels.png")


def clear(out: Path) -> None:
    """Remove an earlier run. Its checkpoint goes last, so an interrupted call can be repeated."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "logs", ignore_errors=True)
    for name in (*FIGURES, "labels.csv", "results.json", "best.pt", "checkpoint.pt"):
        (out / name).unlink(missing_ok=True)


class EpochLog:
    """Logs each epoch to CSV, SQLite and TensorBoard, with PML's record keeper.

    The log is rebuilt from the history in the checkpoint whenever a run starts. So a resumed run
    has the log of an uninterrupted one, wherever it was stopped.
    """

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.record_keeper, _, self.tensorboard = get_record_keeper(
            str(folder), str(folder / "tensorboard")
        )
        self.add(*history[1:])  # epoch 0 is before training and has no loss

    def add(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            self.record_keeper.update_records(row, row["epoch"], parent_name="epochs")
        self.record_keeper.save_records()
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()


class Throughput:
    """Samples per second of training, without evaluation."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started = self.stopped = time.perf_counter()
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count
        self.stopped = time.perf_counter()

    @property
    def rate(self) -> float:
        return self.count / max(self.stopped - self.started, 1e-9)


def print_setup(
    args: argparse.Namespace,
    device: torch.device,
    train: Samples,
    val: Samples | None,
    data: Data,
) -> None:
    num_classes = args.batch_size // args.samples_per_class
    validation = f"{len(val)} validation samples" if val else "no validation samples"
    print(f"{args.dataset}: {len(train)} training samples of {len(train.names)} classes, "
          f"{validation},\n  {describe_test(data)}\n"
          f"{args.loss} on {device}: {args.epochs} epochs, batches of {num_classes} classes "
          f"x {args.samples_per_class} samples")  # fmt: skip
    if data.note:
        print(f"note: {data.note}")


def describe_test(data: Data) -> str:
    test, known = data.test, len(set(data.test.names) & set(data.train.names))
    classes = f"{len(test.names)} {'classes' if known else 'unseen classes'}"
    return (
        f"{len(test)} test samples of {classes}"
        f"{f', of which {known} are also training classes' if known else ''}"
    )


def print_epoch(row: dict[str, Any], is_best: bool, rate: float) -> None:
    line = f"epoch {row['epoch']:>3}   loss {row['loss']:8.4f}"
    if PRIMARY_METRIC in row:
        line += f"   val P@1 {row['precision_at_1']:.3f}   val MAP@R {row[PRIMARY_METRIC]:.3f}"
        line += "   best so far" if is_best else " " * 14
    print(f"{line}   {rate:,.0f} samples/s", flush=True)


def label_issues(
    out: Path, detector: LabelNoiseDetector, train: Samples, true_labels: list[int]
) -> dict[str, float]:
    """Write labels.csv. Return the number of label issues, and how well they match wrong labels."""
    names = [train.name(index) for index in range(len(train))]
    detector.to_csv(out / "labels.csv", class_names=train.names, sample_names=names)
    if train.labels == true_labels:
        return {"count": len(detector.find_label_issues())}
    is_wrong = detector.labels != torch.tensor(true_labels)
    is_wrong_issue = is_wrong[detector.find_label_issues()]
    found = int(is_wrong_issue.sum())
    return {
        "count": len(is_wrong_issue),
        "precision": found / max(len(is_wrong_issue), 1),
        "recall": found / max(int(is_wrong.sum()), 1),
    }


def write(
    args: argparse.Namespace,
    device: torch.device,
    state: dict[str, Any],
    data: Data,
    accuracies: dict[str, dict[str, float] | None],
    issues: dict[str, float] | None,
) -> None:
    """Write results.json and print the table."""
    accuracies = {name: accuracy for name, accuracy in accuracies.items() if accuracy}
    results = {
        "config": {**state["config"], "epochs": args.epochs, "device": str(device)},
        **accuracies,
        "best_epoch": state["best"]["epoch"],
        "seconds": round(state["seconds"], 2),
        "history": state["history"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "pml_extras": pml_extras.__version__,
        },
        **({"label_issues": issues} if issues else {}),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    which = "last" if args.protocol else "best"
    print(f"\n{args.loss} on {describe_test(data)} ({which} epoch: {results['best_epoch']})\n")
    print_table(accuracies)
    if args.protocol:
        size = args.image_size
        print("\n" + protocols.row(args.protocol, args.loss, args.trunk, size, accuracies["after"],
                                   args.epochs, data.note))  # fmt: skip
    if issues:
        print(f"\n{issues['count']} label issues in the training set: {args.out / 'labels.csv'}")
        if "precision" in issues:
            print(f"  precision {issues['precision']:.3f}, recall {issues['recall']:.3f} "
                  "for the replaced labels")  # fmt: skip
    print(f"\nresults    {args.out / 'results.json'}")


def print_table(accuracies: dict[str, dict[str, float]]) -> None:
    """A column for each kind of embeddings, and the change from before to after training."""
    before, after = accuracies["before"], accuracies["after"]
    print(f"  {'':14}" + "".join(f"{name:>10}" for name in accuracies) + f"{'change':>10}")
    for key in after:
        values = (accuracy.get(key) for accuracy in accuracies.values())
        cells = ("" if value is None else f"{value:.3f}" for value in values)
        line = "".join(f"{cell:>10}" for cell in cells)
        print(f"  {label(key):14}{line}{after[key] - before[key]:+10.3f}")


def draw(
    args: argparse.Namespace,
    state: dict[str, Any],
    test: Samples,
    before: Tensor,
    after: Tensor,
    train: Samples,
    detector: LabelNoiseDetector | None,
) -> None:
    """Draw the figures, with the embeddings of the test images before and after training.

    It comes last, and a figure that fails does not stop the others.
    """
    print("drawing the figures", flush=True)
    embeddings = (test, before, after, args.seed)
    calls: dict[str, tuple[Any, ...]] = {
        "curves.png": (figures.training_curves, state["history"], state["best"]["epoch"]),
        "map.png": (figures.embedding_map, *embeddings),
        "similarities.png": (figures.similarity_distributions, *embeddings),
    }
    if test.has_pictures:
        calls["retrieval.png"] = (figures.retrieval_board, *embeddings)
    if detector and train.has_pictures:
        calls["labels.png"] = (figures.label_board, train, detector)
    for name, (function, *arguments) in calls.items():
        try:
            function(args.out / name, *arguments)
        except Exception as error:  # of any kind: the results are complete without it
            line = " ".join(str(error).split())
            print(f"could not draw {name}: {type(error).__name__}: {line}", file=sys.stderr)
        else:
            print(f"{Path(name).stem:10} {args.out / name}")
