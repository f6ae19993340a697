"""Measure how well `LabelNoiseDetector` finds wrong labels while a network trains on them.

    python -m benchmarks.evidence.labels --jobs 2

Networks train as for the tables, with the hyperparameters that the preset's trials selected, and
the detector is updated after each epoch. Each finished run is one line in
results/labels-PRESET.jsonl. An interrupted command continues when it is started again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from pml_extras.functional import label_vote, pairwise_cosine
from pml_extras.functional._label_noise import class_size_neighbors
from pml_extras.label_noise import LabelNoiseDetector

from . import metrics
from .components import Hparams
from .conditions import DATASETS, Experiment
from .data import add_data_root, check_data_root, load_train
from .examples import UserError
from .execute import Runtime, TrainedModel, train
from .presets import PRESETS, Preset
from .records import RESULTS, Record, Results, appending, read, rounded
from .sweep import workers

CONDITIONS = ("clean", "noise10", "noise30", "noise50")
METHOD = "ntxent"
SEEDS = 5


def measure(
    preset: Preset, experiment: Experiment, hparams: Hparams, seed: int, data_root: Path | None
) -> Record:
    """Train, update the detector after each epoch, and compare the label issues with the truth."""
    runtime = Runtime(data_root, cache=Path())  # training from scratch needs no cache
    train_data = load_train(experiment.scenario, seed, data_root)
    images, device = train_data.images, torch.device(runtime.device)
    detector = LabelNoiseDetector(images.labels)
    knn_scores = torch.zeros(len(images))

    def update(epoch: int, loss: float | None, model: TrainedModel) -> None:
        if epoch > 0:
            embeddings = metrics.embed(model.network, images, device)
            detector.update(embeddings)
            knn_scores.add_(knn_label_agreement(embeddings, detector.labels))

    network = train(preset, experiment, hparams, seed, train_data, runtime, update).network
    embeddings = metrics.embed(network, images, device)
    last_scores = label_vote(embeddings, detector.labels).vote_lift
    wrong = np.array(images.labels) != np.array(train_data.true_labels)
    flagged = detector.is_issue.numpy()
    record: Record = {
        **experiment._asdict(),
        "seed": seed,
        "hparams": hparams,
        "budget": preset.budget._asdict(),
        "wrong": float(wrong.mean()),
        "flagged": float(flagged.mean()),
        "false_positive_rate": float(flagged[~wrong].mean()),
    }
    if wrong.any():
        record |= {
            "precision": float(wrong[flagged].mean()) if flagged.any() else 0.0,
            "recall": float(flagged[wrong].mean()),
            "average_precision": average_precision_score(wrong, -detector.scores.numpy()),
            "average_precision_last": average_precision_score(wrong, -last_scores.numpy()),
            "average_precision_knn": average_precision_score(wrong, -knn_scores.numpy()),
        }
    return rounded(record)


def knn_label_agreement(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The baseline: (N,) the fraction of the nearest neighbors with the same label."""
    num_neighbors = int(class_size_neighbors(labels).median())
    fractions = []
    for rows in torch.arange(len(labels)).split(512):
        similarities = pairwise_cosine(embeddings[rows], embeddings)
        similarities[torch.arange(len(rows)), rows] = -2  # exclude the sample itself
        neighbors = similarities.topk(num_neighbors).indices
        fractions.append((labels[neighbors] == labels[rows, None]).float().mean(1))
    return torch.cat(fractions)


def missing_runs(
    results: Results, records: list[Record], folder: Path
) -> Iterator[tuple[Experiment, Hparams, int]]:
    """Experiment, selected hyperparameters and seed of each run that has no record."""
    done = {(r["dataset"], r["condition"], r["seed"]) for r in records}
    for dataset in dict.fromkeys(e.dataset for e in results.preset.experiments()):
        if DATASETS[dataset].classification:
            continue
        for condition in CONDITIONS:
            experiment = Experiment(dataset, "scratch", condition, METHOD)
            hparams = results.selected(experiment)
            if hparams is None:
                print(f"{experiment} has no trials in {folder}", file=sys.stderr)
                continue
            for seed in range(SEEDS):
                if (dataset, condition, seed) not in done:
                    yield experiment, hparams, seed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labels.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    add_data_root(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    path = args.results / f"labels-{args.preset}.jsonl"
    try:
        results = Results(preset, read(args.results / f"{args.preset}.jsonl"))
        with appending(path) as append, workers(args.jobs) as submit:
            runs = list(missing_runs(results, read(path), args.results))
            check_data_root(args.data_root, (DATASETS[e.dataset].source for e, *_ in runs))
            submitted = (submit(measure, preset, *run, args.data_root) for run in runs)
            # With one process, a call runs when it is submitted.
            for future in submitted if args.jobs == 1 else list(submitted):
                record = future.result()
                append(record)
                print(json.dumps(record), flush=True)
    except UserError as error:
        print(f"labels.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
