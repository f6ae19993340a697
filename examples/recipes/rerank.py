#!/usr/bin/env python3
"""Re-rank existing embeddings: no training and no model, only two files.

python examples/recipes/rerank.py                              # pixels of the digits
python examples/recipes/rerank.py embeddings.npy labels.npy    # your own: (N, D) and (N,)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from digits import load, map_at_r

from pml_extras.inference import ContextualKNN


def main(embeddings: Path | None = None, labels: Path | None = None) -> dict[int, float]:
    if embeddings and labels:
        x, y = torch.from_numpy(np.load(embeddings)), torch.from_numpy(np.load(labels))
    else:
        _, test = load()
        x, y = test.tensors[0].flatten(1), test.tensors[1]
    scores = {0: map_at_r(torch.nn.functional.normalize(x), y)}
    print(f"nearest neighbors: MAP@R {scores[0]:.3f}")
    for k in (5, 10, 20, 40):  # choose it on other classes than those you report
        scores[k] = map_at_r(x, y, ContextualKNN(num_neighbors=k))
        print(f"re-ranked, num_neighbors={k:<3}: MAP@R {scores[k]:.3f}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("embeddings", nargs="?", type=Path)
    parser.add_argument("labels", nargs="?", type=Path)
    main(**vars(parser.parse_args()))
