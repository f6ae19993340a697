"""The trunk and the embedder that the arguments ask for, and the samples in the form they take."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import activations
import protocols
import torch
import trunks
from images import UserError
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from samples import Data, Samples
from torch import Tensor, nn
from trunks import Bfloat16, Trunk

MAX_PCA_SAMPLES = 5000
Sets = tuple[Samples, Samples | None, Samples]  # to train, to validate, to test


@dataclass(frozen=True)
class Networks:
    models: dict[str, nn.Module]  # trunk and embedder, as PML's trainers take them
    frozen_weights: dict[str, Tensor]  # of the part of the trunk whose activations are cached
    frozen_modules: Sequence[nn.Module]  # that stay in evaluation mode
    workers: int  # processes that decode images

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the weights, as those of networks that were not wrapped or split."""
        weights = {name: copy_of(plain(model)) for name, model in self.models.items()}
        weights["trunk"] = {**self.frozen_weights, **weights["trunk"]}
        return weights

    def load_weights(self, weights: dict[str, dict[str, Tensor]]) -> None:
        for name, model in self.models.items():
            own = plain(model).state_dict().keys()
            plain(model).load_state_dict({key: weights[name][key] for key in own})


def build(
    args: Namespace,
    data: Data,
    sets: Sets,
    tester: GlobalEmbeddingSpaceTester,
    device: torch.device,
) -> tuple[Networks, Sets]:
    frozen_weights, frozen_modules, workers = {}, [], args.workers
    if data.train.has_pictures:
        trunk, sets = build_trunk(args, data, sets)
    else:
        trunk = Trunk(nn.Identity(), width=data.train.source.shape[1])
    if args.cache:
        frozen, trained = trunks.split(trunk, args.cache)
        sets = tuple(
            samples and activations.cache(samples, frozen, args.cache_dir, device, args.workers)
            for samples in sets
        )
        frozen_weights, trunk = copy_of(frozen), replace(trunk, network=trained)
        workers = tester.dataloader_num_workers = 0  # activations need no decoding
    elif args.train_from:
        frozen_modules = trunks.freeze_before(trunk.network, args.train_from)

    network = Bfloat16(trunk.network) if args.amp else trunk.network
    network = network.to(device)
    if args.init == "pca":
        embedder = pca_embedder(features(sets[0], network, tester), args.embedding_size)
    else:
        embedder = nn.Linear(trunk.width, args.embedding_size)
    models = {"trunk": network, "embedder": Bfloat16(embedder) if args.amp else embedder}
    models["embedder"].to(device)
    return Networks(models, frozen_weights, frozen_modules, workers), sets


def build_trunk(args: Namespace, data: Data, sets: Sets) -> tuple[Trunk, Sets]:
    size = args.image_size
    if args.trunk == "small":
        size = data.train.size or size
    trunk = trunks.build(args.trunk, data.train.channels, size, args.random_weights)
    if args.protocol:
        trunk = protocols.adapt(trunk, args.protocol)
    transform = trunk.transform(data)
    train_set, *others = sets
    train_set = replace(train_set, transform=replace(transform, random=True))
    others = [samples and replace(samples, transform=transform) for samples in others]
    return trunk, (train_set, *others)


def for_testing(samples: Samples) -> Samples:
    """The same samples without random crops and mirror images."""
    return replace(samples, transform=replace(samples.transform, random=False))


def features(samples: Samples, trunk: nn.Module, tester: GlobalEmbeddingSpaceTester) -> Tensor:
    """The features of some of the samples, (N, width)."""
    chosen = torch.randperm(len(samples))[:MAX_PCA_SAMPLES].sort().values
    subset = torch.utils.data.Subset(for_testing(samples), chosen.tolist())
    tester.normalize_embeddings = False
    outputs: Tensor = tester.get_all_embeddings(subset, trunk)[0]
    tester.normalize_embeddings = True
    return outputs


def pca_embedder(features: Tensor, embedding_size: int) -> nn.Linear:
    """Principal components of features (N, width), halfway between PCA and whitening.

    Each component is divided by the square root of its standard deviation. On the training classes
    of Cars196 and CUB, this retrieves better than components without a scale and than whitening.
    """
    features = features.double().cpu()
    count, width = features.shape
    if embedding_size > width:
        raise UserError(
            f"--embedding-size {embedding_size}: --init pca needs at least as many features; the "
            f"trunk has {width}; choose a smaller size or --init random"
        )
    mean = features.mean(0)
    # With fewer samples than features, the full matrix has further orthogonal rows.
    _, scales, components = torch.linalg.svd(features - mean, full_matrices=count < embedding_size)
    scales = nn.functional.pad(scales, (0, width - len(scales)))[:embedding_size]
    scales = scales.clamp(min=max(1e-3 * float(scales[0]), 1e-12))
    weight = components[:embedding_size] * (scales[0] / scales).sqrt()[:, None]
    embedder = nn.Linear(width, embedding_size)
    with torch.no_grad():
        embedder.weight.copy_(weight)
        embedder.bias.copy_(-weight @ mean)
    return embedder


def plain(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, Bfloat16) else model


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


class Trainer(MetricLossOnly):
    """PML's trainer. Frozen modules stay in evaluation mode and need no optimizer."""

    def __init__(self, networks: Networks, *arguments: Any, **options: Any) -> None:
        super().__init__(networks.models, *arguments, **options)
        self.frozen_modules = networks.frozen_modules

    def modify_schema(self) -> None:
        self.schema["optimizers"].important = list(self.optimizers)

    def set_to_train(self) -> None:
        super().set_to_train()
        for module in self.frozen_modules:
            module.eval()
