"""Training a network with a method, as a user would, and measuring it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Images
from networks import build_embedder, build_trunk
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn

from pml_extras.distillation import SelfDistillation
from pml_extras.functional import (
    contextual_similarity,
    pairwise_cosine,
    weighted_label_vote,
)
from pml_extras.functional._neighborhoods import knn_radii
from pml_extras.inference import ContextualKNN

from .data import Training, normalized
from .plan import Budget, Parts, Setting

Metrics = dict[str, float]


class Epochs(Protocol):
    """Iterating it is one epoch of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def build_network(images: Images, budget: Budget) -> nn.Module:
    channels, size, width = images.channels, images.size, budget.width
    fold: list[nn.Module] = []
    if budget.shrink:
        fold, channels, size = [nn.PixelUnshuffle(2)], 4 * channels, size // 2
    network = nn.Sequential(
        *fold, build_trunk(channels, size, width), build_embedder(budget.embedding_size, width)
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def seed_everything(seed: int) -> None:
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)


class DivergedError(Exception):
    """The loss is no number any more."""


def fit(
    network: nn.Module,
    parts: Parts,
    setting: Setting,
    batches: Epochs,
    num_epochs: int,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict[str, float | None]:
    """Train; returns the cost of a step. Hands the number and the mean loss of each epoch on."""
    loss_func, miner = parts.loss, parts.miner
    optimizers = [torch.optim.Adam(network.parameters(), lr=setting["lr"])]
    if proxies := list(loss_func.parameters()):
        optimizers.append(torch.optim.Adam(proxies, lr=setting["proxy_lr"]))
    # On a CPU, its own time: other programs' turns do not count.
    on_cpu = next(network.parameters()).device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds, memory = 0.0, None
    for epoch in range(1, num_epochs + 1):
        network.train()
        losses = []
        started = clock()
        with PeakMemory(next(network.parameters()).device) as peak:
            for step, (images, labels) in enumerate(batches):
                progress = ((epoch - 1) + step / len(batches)) / num_epochs
                if parts.schedule:
                    parts.schedule(progress)
                embeddings = network(images)
                mines = miner is not None and progress >= parts.miner_starts
                pairs = miner(embeddings, labels) if mines else None
                loss = loss_func(embeddings, labels, pairs)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                losses.append(loss.detach())
            mean_loss = float(torch.stack(losses).mean())  # waits for a GPU
        seconds += clock() - started
        memory = memory or peak.mib  # of the first epoch, without what testing leaves behind
        if not math.isfinite(mean_loss):
            raise DivergedError(f"the loss became {mean_loss} in epoch {epoch}")
        if isinstance(loss_func, SelfDistillation):
            loss_func.end_epoch()
        after_epoch(epoch, mean_loss)
    return {"seconds_per_step": seconds / (num_epochs * len(batches)), "peak_mib": memory}


class PeakMemory:
    """`mib`: the most memory used within, beyond what was used before; None where unknown."""

    mib: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):  # Linux with glibc only
                ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs have freed
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # the peak starts anew
                self.before = resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        elif self.before:
            self.mib = (resident("VmHWM") - self.before) / 2**20


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


# ---- Measuring.


@torch.no_grad()
def embed(network: nn.Module, images: Images, device: torch.device) -> Tensor:
    """Unit embeddings; rows of zeros where the network gives no numbers."""
    assert isinstance(images.source, Tensor)
    network.eval()
    found = [network(normalized(part.to(device))) for part in images.source.split(512)]
    return nn.functional.normalize(torch.nan_to_num(torch.cat(found), 0, 0, 0))


RETRIEVAL = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
}


def retrieval(
    embeddings: Tensor,
    labels: Sequence[int],
    knn: Any = None,
    include: Collection[str] = tuple(RETRIEVAL),
    rare: Collection[int] | None = None,
) -> Metrics:
    """Every image against all others; of the `rare` classes' images only, if given."""
    calculator = AccuracyCalculator(
        include=tuple(RETRIEVAL[name] for name in include),
        k="max_bin_count",
        device=embeddings.device,
        return_per_class=rare is not None,
        knn_func=knn or CustomKNN(CosineSimilarity(), batch_size=1024),
    )
    found = calculator.get_accuracy(embeddings, torch.tensor(labels, device=embeddings.device))
    scores = {name: found[RETRIEVAL[name]] for name in include}
    if rare is None:
        return scores
    return {name: float(np.mean([s[label] for label in rare])) for name, s in scores.items()}


RERANKING = [5, 10, 20]  # neighbours; the validation classes choose


def reranked(validation: tuple[Tensor, Sequence[int]], test: tuple[Tensor, Sequence[int]]) -> Any:
    """MAP@R and precision@1 with contextual re-ranking, and the number of neighbours chosen."""
    on_validation = {
        k: retrieval(*validation, ContextualKNN(num_neighbors=k), ["map_at_r"])["map_at_r"]
        for k in RERANKING
    }
    k = max(RERANKING, key=on_validation.__getitem__)
    scores = retrieval(*test, ContextualKNN(num_neighbors=k), ["map_at_r", "precision_at_1"])
    return {f"reranked_{name}": value for name, value in scores.items()} | {"reranked_k": k}


def few_shot(
    embeddings: Tensor, labels: Sequence[int], ways: int, shots: int, episodes: int = 1000
) -> float:
    """Accuracy in episodes of `ways` classes, with `shots` images to know each by and one to
    recognise: the nearest mean. The episodes are the same for every network."""
    generator = np.random.default_rng(0)
    numbers = np.array(labels)
    members = [np.flatnonzero(numbers == label) for label in np.unique(numbers)]
    sizes = np.array([len(m) for m in members])
    table = np.stack([np.resize(m, sizes.max()) for m in members])
    classes = generator.random((episodes, len(members))).argsort(1)[:, :ways, None]
    order = generator.random((episodes, ways, sizes.max()))
    order[np.arange(sizes.max()) >= sizes[classes]] = 2  # behind all there is
    drawn = torch.from_numpy(table[classes, order.argsort(2)[..., : shots + 1]])
    drawn = drawn.to(embeddings.device)
    known = nn.functional.normalize(embeddings[drawn[..., :shots]].mean(2), dim=2)
    nearest = (embeddings[drawn[..., shots]] @ known.mT).argmax(2)
    right = nearest == torch.arange(ways, device=embeddings.device)
    return right.double().mean().item()


@torch.no_grad()
def classification(network: nn.Module, loss: Any, images: Images, device: torch.device) -> Metrics:
    assert isinstance(images.source, Tensor)
    network.eval()
    found = [
        loss.get_logits(network(normalized(part.to(device)))).argmax(1)
        for part in images.source.split(512)
    ]
    labels = torch.tensor(images.labels, device=device)
    return {"accuracy": (torch.cat(found) == labels).double().mean().item()}


# ---- Probes: what the methods' mechanisms are doing, to explain what comes of them.


class Probes:
    """Measures, after each epoch, a fixed sample of the training images as a batch sees it."""

    def __init__(self, training: Training, device: torch.device, classes: int = 32) -> None:
        generator = np.random.default_rng(0)
        labels = np.array(training.images.labels)
        chosen = generator.permutation(np.unique(labels))[:classes]
        indices = [i for c in chosen for i in np.flatnonzero(labels == c)[: 256 // len(chosen)]]
        self.images = training.images.subset(indices)
        self.labels = torch.tensor(self.images.labels, device=device)
        true = torch.tensor([training.true_labels[i] for i in indices], device=device)
        self.true, self.right = true, true == self.labels
        self.device = device
        self.centers: Tensor | None = None

    @torch.no_grad()
    def measure(self, network: nn.Module, parts: Parts, k: int) -> dict[str, float | None]:
        embeddings = embed(network, self.images, self.device)
        similarities = pairwise_cosine(embeddings)
        distances = (2 - 2 * similarities).clamp_min(0)
        near = distances <= knn_radii(distances, k, 0.05)[0]
        itself = torch.eye(len(similarities), dtype=torch.bool, device=self.device)
        nearest = similarities.masked_fill(itself, -1).topk(k - 1).indices
        purity = (self.true[nearest] == self.true[:, None]).double().mean(1)
        context = contextual_similarity(distances, num_neighbors=k, slack=0.0)
        trusted = weighted_label_vote(
            context.masked_fill(itself, 0), self.labels, self.labels
        ).is_plurality
        found = {
            "mean_cosine": mean_of(similarities[~itself]),
            "neighborhood_size": mean_of(near.sum(1)),
            # Of the nearest k - 1 to rightly labelled images, how many truly are of their class.
            "purity": mean_of(purity[self.right]),
            "trusted_right": mean_of(trusted[self.right]),
            "trusted_wrong": mean_of(trusted[~self.right]),
        }
        loss: Any = parts.loss
        if isinstance(loss, SelfDistillation):
            found["teacher_entropy"] = self.entropy(loss)
            loss = loss.loss
        centers = getattr(loss, "centers", getattr(loss, "proxies", None))
        if isinstance(centers, Tensor):
            if self.centers is not None:
                turned = nn.functional.cosine_similarity(centers, self.centers)
                found["center_turn"] = 1 - mean_of(turned)
            self.centers = centers.detach().clone()
        return {name: None if math.isnan(v) else round(v, 4) for name, v in found.items()}

    def entropy(self, loss: SelfDistillation) -> float:
        """Of what the teacher says of who is similar to whom, as a share of knowing nothing."""
        similarities = pairwise_cosine(embed(loss.teacher.network, self.images, self.device))
        logarithms = (similarities / loss.temperature).log_softmax(1)
        entropy = -(logarithms.exp() * logarithms).sum(1).mean()
        return float(entropy) / math.log(len(similarities))


def mean_of(values: Tensor | Iterable[float]) -> float:
    return float(torch.as_tensor(values).double().mean())  # NaN if there are none
