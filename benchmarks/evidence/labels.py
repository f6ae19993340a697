#!/usr/bin/env python3
"""How well `LabelNoiseDetector` finds wrong labels while a network is trained on them.

    python -m benchmarks.evidence.labels --jobs 2

Networks are trained as for the tables, with the settings that the preset's trials chose, and looked
at after each epoch. A run is one line in results/labels-PRESET.jsonl; stop at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import UserError
from sklearn.metrics import average_precision_score
from torch import Tensor

from pml_extras.functional import label_vote, pairwise_cosine
from pml_extras.label_noise import LabelNoiseDetector

from . import training
from .data import ROOT, load_training
from .plan import DATASETS, PRESETS, Cell, Preset, Setting
from .records import Record, Results, appending, read
from .run import RESULTS, Trained, Where, train, workers

CONDITIONS = ("clean", "noise10", "noise30", "noise50")
METHOD = "ntxent"
SEEDS = 5
NEIGHBORS = 40  # as LabelNoiseDetector has it


def measure(preset: Preset, cell: Cell, setting: Setting, seed: int, root: Path) -> Record:
    """Train, look after each epoch, and compare what is distrusted with what is wrong."""
    where = Where(root, cache=Path())  # from scratch there is nothing to keep
    given = load_training(cell.dataset, cell.start, cell.condition, seed, root)
    images, device = given.images, torch.device(where.device)
    trust = LabelNoiseDetector(images.labels, num_neighbors=NEIGHBORS)
    plain = torch.zeros(len(images))

    def look(epoch: int, loss: float | None, trained: Trained) -> None:
        if epoch > 0:
            embeddings = training.embed(trained.network, images, device)
            trust.update(embeddings)
            plain.add_(share_of_nearest(embeddings, trust.labels))

    network = train(preset, cell, setting, seed, given, where, look).network
    last = label_vote(
        training.embed(network, images, device), trust.labels, num_neighbors=NEIGHBORS
    ).vote_lift
    wrong = np.array(images.labels) != np.array(given.true_labels)
    distrusted = (trust.scores < 1).numpy()
    found: Record = {
        **cell._asdict(),
        "seed": seed,
        "setting": setting,
        "budget": preset.describe(),
        "wrong": float(wrong.mean()),
        "distrusted": float(distrusted.mean()),
        "mistrusted": float(distrusted[~wrong].mean()),  # though they are right
    }
    if wrong.any():
        found |= {
            "precision": float(wrong[distrusted].mean()) if distrusted.any() else 0.0,
            "recall": float(distrusted[wrong].mean()),
            "average_precision": average_precision_score(wrong, -trust.scores.numpy()),
            "last_look": average_precision_score(wrong, -last.numpy()),
            "plain_neighbours": average_precision_score(wrong, -plain.numpy()),
        }
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}


def share_of_nearest(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The baseline: the fraction of the nearest neighbors with the same label."""
    shares = []
    for rows in torch.arange(len(labels)).split(512):
        similarities = pairwise_cosine(embeddings[rows], embeddings)
        similarities[torch.arange(len(rows)), rows] = -2
        nearest = similarities.topk(NEIGHBORS).indices
        shares.append((labels[nearest] == labels[rows, None]).float().mean(1))
    return torch.cat(shares)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="labels.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-root", type=Path, default=ROOT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    results = Results(preset, read(args.results / f"{args.preset}.jsonl"))
    path = args.results / f"labels-{args.preset}.jsonl"
    try:
        with appending(path) as append, workers(args.jobs) as submit:
            done = {(r["dataset"], r["condition"], r["seed"]) for r in read(path)}
            running = []
            for dataset in dict.fromkeys(cell.dataset for cell in preset.cells()):
                if DATASETS[dataset].classification:
                    continue
                for condition in CONDITIONS:
                    cell = Cell(dataset, "scratch", condition, METHOD)
                    setting = results.selected(cell)
                    if setting is None:
                        print(f"{'/'.join(cell)} has no trials in {args.results}", file=sys.stderr)
                        continue
                    for seed in range(SEEDS):
                        if (dataset, condition, seed) not in done:
                            call = measure, preset, cell, setting, seed, args.data_root
                            running.append(submit(*call))
            for future in running:
                record = future.result()
                append(record)
                print(json.dumps(record), flush=True)
    except UserError as error:
        print(f"labels.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
