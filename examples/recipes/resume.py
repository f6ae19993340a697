#!/usr/bin/env python3
"""Resume a stopped run exactly: what a checkpoint must contain.

python examples/recipes/resume.py                # stops after half of the epochs and resumes
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from digits import build_model, load
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from pml_extras.distillation import EMATeacher, SelfDistillation
from pml_extras.regularizers import ClassInterferenceRegularizer


class Run:
    def __init__(self, num_epochs: int, path: Path) -> None:
        torch.manual_seed(0)
        self.num_epochs, self.path, self.epoch = num_epochs, path, 0
        self.model = build_model()
        loss_func = ContrastiveLoss()
        ClassInterferenceRegularizer(num_classes=10, embedding_size=32).attach(loss_func)
        # The state_dict of the loss contains the teacher's weights and the class means.
        self.loss_func = SelfDistillation(loss_func, EMATeacher(self.model), num_epochs)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.parts: dict[str, Any] = {
            "model": self.model,
            "loss_func": self.loss_func,
            "optimizer": self.optimizer,
        }
        if path.exists():
            saved = torch.load(path, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            self.epoch = saved["epoch"]
            print(f"resuming after epoch {self.epoch}")

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"epoch": self.epoch, "random": torch.get_rng_state()}
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)  # atomic

    def train(self, until: int) -> Tensor:
        (images, labels), _ = (data.tensors for data in load())
        while self.epoch < until:
            for batch in torch.randperm(len(images)).split(100):
                loss: Tensor = self.loss_func(self.model(images[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.loss_func.end_epoch()
            self.epoch += 1
            self.save()
            print(f"epoch {self.epoch}: loss {loss.item():.6f}")
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def main(epochs: int = 4, path: Path = Path("runs/resume.pt")) -> tuple[Tensor, Tensor]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    uninterrupted = Run(epochs, path).train(epochs)
    path.unlink()
    Run(epochs, path).train(epochs // 2)
    resumed = Run(epochs, path).train(epochs)
    print("equal weights" if torch.equal(uninterrupted, resumed) else "different weights")
    return uninterrupted, resumed


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--path", type=Path, default=Path("runs/resume.pt"))
    main(**vars(parser.parse_args()))
