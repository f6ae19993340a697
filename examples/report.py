"""What a run prints and writes: the log, the figures, results.json and the table at the end."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import pytorch_metric_learning
import torch
from datasets import Images
from images import printable
from pytorch_metric_learning.utils.logging_presets import get_record_keeper
from torch import Tensor

import pml_extras
from pml_extras.label_noise import LabelNoiseDetector

FIGURES = ("curves.png", "retrieval.png", "map.png", "labels.png")


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


def print_setup(
    args: argparse.Namespace, device: torch.device, train: Images, val: Images, test: Images
) -> None:
    num_classes = args.batch_size // args.samples_per_class
    print(f"{args.dataset}: {len(train)} training images of {len(train.names)} classes, "
          f"{len(val)} validation images,\n"
          f"  {len(test)} test images of {len(test.names)} unseen classes\n"
          f"{args.loss} on {device}: {args.epochs} epochs, batches of {num_classes} classes "
          f"x {args.samples_per_class} images")  # fmt: skip


def print_epoch(row: dict[str, Any], is_best: bool) -> None:
    print(f"epoch {row['epoch']:>3}   loss {row['loss']:8.4f}   "
          f"val P@1 {row['precision_at_1']:.3f}   "
          f"val MAP@R {row[figures.PRIMARY_METRIC]:.3f}"
          f"{'   best so far' if is_best else ''}", flush=True)  # fmt: skip


def label_issues(
    out: Path, detector: LabelNoiseDetector, train: Images, clean_labels: list[int]
) -> dict[str, float]:
    """Write labels.csv. Return how well the label issues match the wrong labels."""
    files = None if isinstance(train.source, Tensor) else list(map(printable, train.source))
    detector.to_csv(out / "labels.csv", class_names=train.names, sample_names=files)
    is_wrong = detector.labels != torch.tensor(clean_labels)
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
    test: Images,
    before: dict[str, float],
    after: dict[str, float],
    issues: dict[str, float] | None,
) -> None:
    """Write results.json and print the table."""
    results = {
        "config": {**state["config"], "epochs": args.epochs, "device": str(device)},
        "before": before,
        "after": after,
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

    print(f"\n{args.loss} on {len(test)} images of {len(test.names)} unseen classes "
          f"(best epoch: {results['best_epoch']})\n\n"
          f"  {'':14}{'before':>8}{'after':>8}{'change':>9}")  # fmt: skip
    for key, label in figures.METRICS.items():
        print(f"  {label:14}{before[key]:8.3f}{after[key]:8.3f}{after[key] - before[key]:+9.3f}")
    if issues:
        print(f"\n{issues['count']} label issues in the training set: {args.out / 'labels.csv'}")
        if args.label_noise:
            print(f"  precision {issues['precision']:.3f}, recall {issues['recall']:.3f} "
                  "for the replaced labels")  # fmt: skip
    print(f"\nresults    {args.out / 'results.json'}")


def draw(
    args: argparse.Namespace,
    state: dict[str, Any],
    test: Images,
    before: Tensor,
    after: Tensor,
    train: Images,
    detector: LabelNoiseDetector | None,
) -> None:
    """Draw the figures, with the embeddings of the test images before and after training.

    It comes last, and a figure that fails does not stop the others.
    """
    print("drawing the figures", flush=True)
    embeddings = (test, before, after, args.seed)
    calls: dict[str, tuple[Any, ...]] = {
        "curves.png": (figures.training_curves, state["history"], state["best"]["epoch"]),
        "retrieval.png": (figures.retrieval_board, *embeddings),
        "map.png": (figures.embedding_map, *embeddings),
    }
    if detector:
        calls["labels.png"] = (figures.label_board, train, detector)
    for name, (function, *arguments) in calls.items():
        try:
            function(args.out / name, *arguments)
        except Exception as error:  # of any kind: the results are complete without it
            line = " ".join(str(error).split())
            print(f"could not draw {name}: {type(error).__name__}: {line}", file=sys.stderr)
        else:
            print(f"{Path(name).stem:10} {args.out / name}")
