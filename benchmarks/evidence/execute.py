"""One run of an experiment: a trial, which validates, or a test, which also sees test data."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_metric_learning
import torch
from torch import nn

import pml_extras
from pml_extras.label_noise import LabelNoiseDetector

from . import metrics, training
from .components import Components, Hparams, Sizes
from .conditions import CONDITIONS, DATASETS, Experiment
from .data import Batches, TrainData, load_test, load_train
from .examples import checkpoint
from .methods import METHODS
from .metrics import ACCURACY, FEW_SHOT, MAP, P1, RARE
from .presets import Preset
from .probes import Probes
from .records import Record, rounded

TRIAL_SEED = 1000  # of all trials, so that they differ by hyperparameters only; no test uses it
PRETRAINING: Hparams = {"lr": 3e-3, "proxy_lr": 0.1, "temperature": 0.05}


class Runtime(NamedTuple):
    """What does not affect the results."""

    data_root: Path | None
    cache: Path  # for pretrained networks
    device: str = "cpu"


class TrainedModel(NamedTuple):
    network: nn.Module
    components: Components
    sizes: Sizes
    cost: dict[str, Any]


def run_trial(
    preset: Preset, experiment: Experiment, hparams: Hparams, trial: int, runtime: Runtime
) -> Record:
    """Train with drawn hyperparameters and validate. No test class is loaded."""
    train_data = load_train(experiment.scenario, TRIAL_SEED, runtime.data_root)
    model = train(preset, experiment, hparams, TRIAL_SEED, train_data, runtime)
    scores = validate(experiment, model, train_data, runtime)
    return make_record(preset, experiment, hparams, runtime, model, scores) | {"trial": trial}


def run_test(
    preset: Preset, experiment: Experiment, hparams: Hparams, seed: int, runtime: Runtime
) -> Record:
    """Train with the selected hyperparameters, validate and probe after each epoch, then test."""
    train_data = load_train(experiment.scenario, seed, runtime.data_root)
    probes = Probes(train_data, torch.device(runtime.device))
    history: list[Record] = []

    def after_epoch(epoch: int, loss: float | None, model: TrainedModel) -> None:
        k = model.sizes.samples_per_class
        measured = probes.measure(model.network, model.components, k)
        scores = validate(experiment, model, train_data, runtime)
        history.append(rounded({"epoch": epoch, "loss": loss, **scores}) | {"probes": measured})

    model = train(preset, experiment, hparams, seed, train_data, runtime, after_epoch)
    record = make_record(preset, experiment, hparams, runtime, model, history[-1])
    scores = measure_test(experiment, model, train_data, seed, runtime)
    return record | {"seed": seed, "history": history, "test": rounded(scores)}


def train(
    preset: Preset,
    experiment: Experiment,
    hparams: Hparams,
    seed: int,
    train_data: TrainData,
    runtime: Runtime,
    after_epoch: Callable[[int, float | None, TrainedModel], None] = lambda *arguments: None,
) -> TrainedModel:
    """`after_epoch` gets the epoch, its mean loss and the model; first epoch 0 and None."""
    budget, method = preset.budget, METHODS[experiment.method]
    images, device = train_data.images, torch.device(runtime.device)
    training.seed_everything(seed)
    network = training.build_network(images, budget).to(device)
    if experiment.init == "finetune":
        network.load_state_dict(pretrained(preset, experiment, seed, runtime))
        training.seed_everything(seed)  # whether the weights came from the cache or not
    sizes = method.sizes(len(images.names), budget.embedding_size, budget.batch_size)
    components = method.build(hparams, sizes, network, budget.epochs)
    components.loss.to(device)
    balanced = experiment.has_balanced_batches and method.batches != "random"
    batches = Batches(images, sizes, balanced, budget.steps_per_epoch, device)
    detector = LabelNoiseDetector(images.labels)
    model = TrainedModel(network, components, sizes, {})
    after_epoch(0, None, model)

    def end_of_epoch(epoch: int, loss: float) -> None:
        if method.label_filtered and epoch < budget.epochs:
            detector.update(metrics.embed(network, images, device))
            batches.exclude(detector.find_label_issues().tolist())
        after_epoch(epoch, loss, model)

    training.seed_everything(seed)  # the same batches for all methods
    try:
        cost = training.fit(network, components, hparams, batches, budget.epochs, end_of_epoch)
    except training.DivergedError as error:
        cost = {"diverged": str(error)}
    return model._replace(cost=cost)


def pretrained(
    preset: Preset, experiment: Experiment, seed: int, runtime: Runtime
) -> dict[str, Any]:
    """The weights to fine-tune, from the cache if they are there.

    NormalizedSoftmax on the other half of the training classes, with correct labels and all images.
    A long tail applies here too, because its test uses some of the training classes.
    """
    budget, device = preset.budget, torch.device(runtime.device)
    long_tailed = CONDITIONS[experiment.condition].imbalance > 1
    condition = experiment.condition if long_tailed else "clean"
    path = runtime.cache / f"{experiment.dataset}-{condition}-{seed}.pt"
    if path.exists():
        saved = checkpoint.load(path)
        if saved["budget"] == preset.budget._asdict():
            weights: dict[str, Any] = saved["weights"]
            return weights
    scenario = experiment.scenario._replace(init="pretraining", condition=condition)
    images = load_train(scenario, seed, runtime.data_root).images
    training.seed_everything(seed)
    network = training.build_network(images, budget).to(device)
    method = METHODS["normalized_softmax"]
    sizes = method.sizes(len(images.names), budget.embedding_size, budget.batch_size)
    components = method.build(PRETRAINING, sizes, network, budget.pretraining_epochs)
    components.loss.to(device)
    balanced = experiment.has_balanced_batches
    batches = Batches(images, sizes, balanced, budget.steps_per_epoch, device)
    training.fit(network, components, PRETRAINING, batches, budget.pretraining_epochs)
    weights = network.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")  # another process may write the same file
    checkpoint.save(temporary, {"budget": preset.budget._asdict(), "weights": weights})
    os.replace(temporary, path)
    return weights


def validate(
    experiment: Experiment, model: TrainedModel, train_data: TrainData, runtime: Runtime
) -> dict[str, float]:
    images, device = train_data.validation, torch.device(runtime.device)
    if DATASETS[experiment.dataset].classification:
        return metrics.classification(model.network, model.components.loss, images, device)
    embeddings = metrics.embed(model.network, images, device)
    return metrics.retrieval(embeddings, images.labels, include=[P1, MAP])


def measure_test(
    experiment: Experiment,
    model: TrainedModel,
    train_data: TrainData,
    seed: int,
    runtime: Runtime,
) -> dict[str, float]:
    dataset, device = DATASETS[experiment.dataset], torch.device(runtime.device)
    images, rare = load_test(experiment.scenario, seed, runtime.data_root)
    if dataset.classification:
        return metrics.classification(model.network, model.components.loss, images, device)
    embeddings = metrics.embed(model.network, images, device)
    scores = metrics.retrieval(embeddings, images.labels)
    if rare:
        scores[RARE] = metrics.retrieval(embeddings, images.labels, include=[MAP], rare=rare)[MAP]
    if dataset.few_shot and experiment.condition == "clean":
        for name, (ways, shots) in FEW_SHOT.items():
            scores[name] = metrics.few_shot(embeddings, images.labels, ways, shots)
    if experiment.is_reranked:
        validation = train_data.validation
        validation_embeddings = metrics.embed(model.network, validation, device)
        scores |= metrics.reranked(
            (validation_embeddings, validation.labels), (embeddings, images.labels)
        )
    return scores


def make_record(
    preset: Preset,
    experiment: Experiment,
    hparams: Hparams,
    runtime: Runtime,
    model: TrainedModel,
    validation_scores: dict[str, Any],
) -> Record:
    primary = ACCURACY if DATASETS[experiment.dataset].classification else MAP
    diverged = "diverged" in model.cost
    return {
        **experiment._asdict(),
        "hparams": hparams,
        "budget": preset.budget._asdict(),
        "validation": 0.0 if diverged else round(validation_scores[primary], 5),
        **rounded(model.cost),
        "device": runtime.device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "pml_extras": pml_extras.__version__,
        },
    }
