"""One file that holds everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import UserError
from pytorch_metric_learning.trainers import BaseTrainer

STATEFUL = ("models", "optimizers", "loss_funcs", "mining_funcs")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: a stop half-way leaves the previous file as it was."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return state


def trainer_state(trainer: BaseTrainer) -> dict[str, Any]:
    state: dict[str, Any] = {
        group: {name: part.state_dict() for name, part in getattr(trainer, group).items()}
        for group in STATEFUL
    }
    # MPerClassSampler shuffles its list of classes in place: tomorrow's order follows from today's.
    return {**state, "sampler": list(trainer.sampler.labels), "random": _random_state()}


def restore_trainer(trainer: BaseTrainer, state: dict[str, Any]) -> None:
    for group in STATEFUL:
        for name, part in getattr(trainer, group).items():
            part.load_state_dict(state[group][name])
    trainer.sampler.labels = list(state["sampler"])
    _set_random_state(state["random"])


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
