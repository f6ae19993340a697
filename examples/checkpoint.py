"""One file that holds everything a run needs to continue exactly."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import UserError
from pytorch_metric_learning.trainers import BaseTrainer

from pml_extras.label_noise import LabelNoiseDetector

RUN_STATE = ("config", "epoch", "seconds", "best", "history")
# Of a PML trainer.
STATEFUL_GROUPS = ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs")
# Of a checkpoint.
KEYS = {*RUN_STATE, *STATEFUL_GROUPS, "sampler", "detector", "random"}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically: if this is interrupted, the previous file stays."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return content


def new_run(config: dict[str, Any], accuracy: dict[str, float]) -> dict[str, Any]:
    """The state of a run before training, with the validation accuracy at that point."""
    history = [{"epoch": 0, **accuracy}]
    return {"config": config, "epoch": 0, "seconds": 0.0, "best": None, "history": history}


def save_run(
    path: Path, state: dict[str, Any], trainer: BaseTrainer, detector: LabelNoiseDetector | None
) -> None:
    content = {key: state[key] for key in RUN_STATE}
    for group in STATEFUL_GROUPS:
        parts = getattr(trainer, group)
        content[group] = {name: part.state_dict() for name, part in parts.items()}
    # MPerClassSampler shuffles its list of classes in place, so the next order depends on this one.
    content["sampler"] = list(trainer.sampler.labels)
    content["detector"] = detector.state_dict() if detector else None
    content["random"] = _random_state()
    save(path, content)


def restore_run(
    saved: dict[str, Any], trainer: BaseTrainer, detector: LabelNoiseDetector | None
) -> dict[str, Any]:
    """Restore the trainer, the detector and the random generators, and return the run's state."""
    for group in STATEFUL_GROUPS:
        for name, part in getattr(trainer, group).items():
            part.load_state_dict(saved[group][name])
    trainer.sampler.labels = list(saved["sampler"])
    if detector:
        detector.load_state_dict(saved["detector"])
    _set_random_state(saved["random"])
    return {key: saved[key] for key in RUN_STATE}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # PML's samplers use NumPy
    torch.manual_seed(seed)


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
