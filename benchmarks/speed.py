#!/usr/bin/env python3
"""Measures time and memory of the methods, next to plain implementations and losses of PML.

    python benchmarks/speed.py                  # all cases, into benchmarks/results/MACHINE.json
    python benchmarks/speed.py contextual knn   # some cases
    python benchmarks/speed.py --device cuda    # the same on a GPU
    python benchmarks/speed.py --render         # docs/speed.md and its plots

The contenders of a case take turns, so that other load on the machine slows all of them. The order
is random in each round, so that no contender always follows the same one. A short call is repeated
for a tenth of a second per turn, so that filling the caches has little weight. Times are medians
with the interquartile range. Memory is the peak of a new process beyond what it uses before the
call.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference
import speed_page
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils.inference import FaissKNN

from pml_extras import functional
from pml_extras.distillation import SelfDistillation, SnapshotTeacher
from pml_extras.inference import ContextualKNN
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

RESULTS = Path(__file__).parent / "results"
MIN_TURN_SECONDS = 0.1
Contenders = dict[str, Callable[[], Any]]  # the functions to measure, by name


def clustered(
    n: int, dim: int, per_class: int = 4, noise: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings in clusters, and their labels."""
    torch.manual_seed(0)
    labels = torch.arange(n) // per_class
    x = torch.randn(n // per_class, dim)[labels] + noise * torch.randn(n, dim)
    return x.to(DEVICE).requires_grad_(), labels.to(DEVICE)


def grad_step(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """A function that runs forward and backward."""
    return lambda: torch.autograd.grad(loss(), inputs)


def contextual(n: int, noise: float = 0.6, dim: int = 512) -> Contenders:
    x, labels = clustered(n, dim, noise=noise)

    def objective(implementation: str) -> torch.Tensor:
        terms = functional.contextual_loss(x, labels, implementation=implementation)
        return (
            0.4 * terms.contextual.mean() + 0.5 * terms.contrastive.mean() + 0.1 * terms.similarity
        )

    return {
        "pml_extras": grad_step(lambda: objective("auto"), x),
        "plain": grad_step(lambda: objective("reference"), x),
    }


def contextual_and_multi_similarity(n: int) -> Contenders:
    x, labels = clustered(n, 512)
    contextual_loss, pml_loss = ContextualLoss(), pml_losses.MultiSimilarityLoss()
    return {
        "pml_extras": grad_step(lambda: contextual_loss(x, labels), x),
        "MultiSimilarityLoss": grad_step(lambda: pml_loss(x, labels), x),
    }


def contextual_large(n: int) -> Contenders:
    x, labels = clustered(n, 128)
    loss = ContextualLoss()
    return {"pml_extras": grad_step(lambda: loss(x, labels), x)}


def random_centers(num_classes: int, n: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Embeddings (N, D), centers (C, D) and labels (N,)."""
    torch.manual_seed(0)
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    c = torch.randn(num_classes, dim, device=DEVICE, requires_grad=True)
    return x, c, torch.randint(num_classes, (n,), device=DEVICE)


def centers(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x, c, labels = random_centers(num_classes, n, dim)
    contenders = {
        "pml_extras": grad_step(
            lambda: functional.center_contrastive_loss(x, c, labels).mean(), x, c
        ),
        "plain": grad_step(lambda: reference.center_contrastive_loss(x, c, labels), x, c),
    }
    for name in ("NormalizedSoftmaxLoss", "ArcFaceLoss"):
        # Made in the first call, so that only its memory includes its proxies.
        make_loss = functools.cache(
            lambda name=name: getattr(pml_losses, name)(num_classes, dim).to(DEVICE)
        )

        def pml_step(make_loss: Callable[[], Any] = make_loss) -> Any:
            loss = make_loss()
            return torch.autograd.grad(loss(x, labels), (x, loss.W))

        contenders[name] = pml_step
    return contenders


def adam_step(loss: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    """A function that runs a training step with Adam."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()

    return step


def ema_step(x: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Callable[[], None]:
    """A function that runs a training step with EMA centers, which need no optimizer."""
    loss = CenterContrastiveLoss(
        num_classes, x.shape[1], center_update="ema", negative_classes="all"
    ).to(DEVICE)
    loss.class_counts += 1
    with torch.no_grad():
        loss.centers.normal_()
    return lambda: loss(x, labels).backward()


def center_updates(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    torch.manual_seed(0)
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    gradient = CenterContrastiveLoss(num_classes, dim, negative_classes="all").to(DEVICE)
    return {
        "pml_extras": ema_step(x, labels, num_classes),
        "gradient + Adam": adam_step(gradient, x, labels),
    }


def centers_large(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    loss = CenterContrastiveLoss(num_classes, dim, negative_classes="all").to(DEVICE)
    return {"pml_extras": adam_step(loss, x, labels)}


def centers_ema(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    return {"pml_extras": ema_step(x, labels, num_classes)}


def listwise(n: int) -> Contenders:
    x, labels = clustered(n, 128)
    numpy_labels = labels.cpu().numpy()
    teacher = torch.randn(n, 128, device=DEVICE)
    return {
        "pml_extras": grad_step(lambda: functional.listwise_kl(x, teacher).mean(), x),
        "plain": grad_step(lambda: reference.listwise_kl(x, teacher), x),
        "the authors' loop": grad_step(
            lambda: reference.listwise_kl_loop(x, teacher, numpy_labels), x
        ),
    }


def compiled(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Contenders:
    return {
        "pml_extras": grad_step(torch.compile(loss), *inputs),
        "not compiled": grad_step(loss, *inputs),
    }


def contextual_compiled(n: int) -> Contenders:
    x, labels = clustered(n, 512)
    return compiled(lambda: functional.contextual_loss(x, labels).contextual.mean(), x)


def centers_compiled(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x, c, labels = random_centers(num_classes, n, dim)
    return compiled(lambda: functional.center_contrastive_loss(x, c, labels).mean(), x, c)


def listwise_compiled(n: int) -> Contenders:
    x, _ = clustered(n, 128)
    teacher = torch.randn(n, 128, device=DEVICE)
    return compiled(lambda: functional.listwise_kl(x, teacher).mean(), x)


def distillation(n: int) -> Contenders:
    """Self-distillation, and the base loss plus the teacher's forward pass."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 2048)]
    trunk = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(2048, 128)).to(DEVICE)
    inputs, labels = torch.randn(n, 784, device=DEVICE), torch.arange(n, device=DEVICE) // 4
    base = pml_losses.MultiSimilarityLoss()
    distilled = SelfDistillation(base, SnapshotTeacher(trunk), num_epochs=2)
    distilled.end_epoch()
    network = distilled.teacher.network

    def forward_only() -> None:
        base(trunk(inputs), labels).backward()
        distilled.teacher.clear()
        with torch.no_grad():
            network(inputs)

    return {
        "pml_extras": lambda: distilled(trunk(inputs), labels).backward(),
        "teacher's forward alone": forward_only,
    }


def miner(n: int) -> Contenders:
    x, labels = clustered(n, 128, per_class=8, noise=0.9)
    contextual_miner, pml_miner = ContextualSimilarityMiner(), pml_miners.MultiSimilarityMiner()
    return {
        "pml_extras": lambda: contextual_miner(x, labels),
        "MultiSimilarityMiner": lambda: pml_miner(x, labels),
    }


def interference(n: int, triplets_per_anchor: int | str) -> Contenders:
    x, labels = clustered(n, 128)
    plain, regularized = (
        pml_losses.TripletMarginLoss(triplets_per_anchor=triplets_per_anchor) for _ in range(2)
    )
    ClassInterferenceRegularizer(n // 4, 128).to(DEVICE).attach(regularized)
    return {
        "pml_extras": grad_step(lambda: regularized(x, labels), x),
        "TripletMarginLoss": grad_step(lambda: plain(x, labels), x),
    }


def knn(n: int, dim: int = 128, k: int = 20) -> Contenders:
    x, _ = clustered(n, dim, per_class=20, noise=0.9)
    x = torch.nn.functional.normalize(x.detach())
    return {
        "pml_extras": lambda: ContextualKNN(num_neighbors=20)(x, k, x, True),
        "FaissKNN": lambda: FaissKNN()(x, k, x, True),
        "k-reciprocal": lambda: reference.k_reciprocal_rerank(x.cpu().numpy()),
    }


# By name: the label of the case, a function that makes its contenders, and the number of turns.
GPU_CASES: dict[str, tuple[str, Callable[[], Contenders], int]] = {
    "center-ten-million": (
        "Center loss, C=10,000,000, with Adam",
        lambda: centers_large(10_000_000),
        3,
    ),
}
CASES: dict[str, tuple[str, Callable[[], Contenders], int]] = {
    **{
        f"contextual-{n}": (f"ContextualLoss, N={n}, D=512", lambda n=n: contextual(n), turns)
        for n, turns in ((128, 31), (512, 11), (1024, 15), (2048, 9), (4096, 3))
    },
    "contextual-pml": (
        "ContextualLoss, N=512, D=512",
        lambda: contextual_and_multi_similarity(512),
        11,
    ),
    "contextual-32768": ("ContextualLoss, N=32,768, D=128", lambda: contextual_large(32768), 1),
    **{
        f"centers-{c}": (f"Center loss, C={c:,}, N=512, D=128", lambda c=c: centers(c), turns)
        for c, turns in ((100, 31), (1000, 15), (10_000, 15), (100_000, 9))
    },
    "center-updates": (
        'Center loss, "ema", C=100,000, a step',
        lambda: center_updates(100_000),
        15,
    ),
    "center-million": ("Center loss, C=1,000,000, with Adam", lambda: centers_large(1_000_000), 2),
    "center-ten-million-ema": (
        'Center loss, "ema", C=10,000,000, a step',
        lambda: centers_ema(10_000_000),
        2,
    ),
    **{f"listwise-{n}": (f"Listwise KL, N={n}", lambda n=n: listwise(n), 31) for n in (112, 512)},
    **{
        f"compiled-contextual-{n}": (
            f"ContextualLoss, N={n}, D=512, compiled",
            lambda n=n: contextual_compiled(n),
            15,
        )
        for n in (128, 512)
    },
    "compiled-centers": (
        "Center loss, C=1,000, N=512, D=128, compiled",
        lambda: centers_compiled(1000),
        31,
    ),
    "compiled-listwise": ("Listwise KL, N=512, compiled", lambda: listwise_compiled(512), 31),
    "distillation-512": ("SelfDistillation, N=512", lambda: distillation(512), 11),
    **{
        f"miner-{n}": (f"Miner, N={n}", lambda n=n: miner(n), turns)
        for n, turns in ((128, 15), (512, 11), (1024, 7), (2048, 5), (4096, 3))
    },
    **{
        f"interference-{triplets}": (
            f"Interference, N=512, {triplets} triplets per anchor",
            lambda triplets=triplets: interference(512, triplets),
            15,
        )
        for triplets in ("all", 100)
    },
    "knn-5000": ("Re-ranking, 5,000 against themselves", lambda: knn(5000), 3),
    "knn-20000": ("Re-ranking, 20,000 against themselves", lambda: knn(20000), 3),
}


def seconds_per_call(function: Callable[[], Any]) -> float:
    """The mean time of a call in one turn."""
    num_calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < MIN_TURN_SECONDS:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        num_calls, elapsed = num_calls + 1, time.perf_counter() - start
    return elapsed / num_calls


def measure(name: str) -> dict[str, Any]:
    """Measure and print the times and memory of all contenders of a case."""
    label, make_contenders, num_turns = CASES[name]
    contenders = make_contenders()
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    generator = random.Random(0)
    for turn in range(num_turns + 1):
        for contender in generator.sample(list(contenders), len(contenders)):
            seconds = seconds_per_call(contenders[contender])
            if turn > 0 or num_turns == 1:  # the first turn is for warm-up
                times[contender].append(seconds)
    summary = {}
    for contender, values in times.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        summary[contender] = {
            "median_ms": 1e3 * statistics.median(values),
            "middle_half_ms": [1e3 * low, 1e3 * high],
            "turns": len(values),
            # The memory of the compiler exceeds that of the step.
            "extra_mib": None if name.startswith("compiled") else extra_mib(name, contender),
        }
        mib = summary[contender]["extra_mib"]
        print(f"  {contender:24} {summary[contender]['median_ms']:10.2f} ms"
              + ("" if mib is None else f" {mib:9.1f} MiB"), flush=True)  # fmt: skip
    return {"what": label, "contenders": summary}


def extra_mib(name: str, contender: str) -> float:
    """The peak memory of a contender beyond its inputs, in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, contender, "--device", DEVICE]
    output = subprocess.run(
        [*command, "--threads", str(torch.get_num_threads())],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return float(output.split()[-1])


def extra_mib_of_this_process(name: str, contender: str) -> float:
    function = CASES[name][1]()[contender]
    if DEVICE == "cuda":
        function()  # allocates what libraries keep after their first use
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Allocate what libraries keep after their first use.
    small = torch.randn(64, 8, requires_grad=True)
    functional.contextual_loss(
        small, torch.arange(64), implementation="sparse"
    ).contextual.sum().backward()
    (small @ small.T).logsumexp(1).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak memory
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="prefixes of case names; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default=platform.machine())
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    DEVICE = args.device
    torch.set_num_threads(args.threads)
    if DEVICE == "cuda":
        CASES.update(GPU_CASES)
    if args.memory_of:
        print(extra_mib_of_this_process(*args.memory_of))
        return
    path = RESULTS / f"{args.out}-{DEVICE}.json"
    if not args.render:
        run = json.loads(path.read_text()) if path.exists() else {"cases": {}}
        machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
        run["machine"] = f"{machine}, {args.threads} threads"
        versions = [
            f"{package} {importlib.metadata.version(package)}"
            for package in ("torch", "pytorch-metric-learning", "faiss-cpu", "numpy")
        ]
        run["versions"] = ", ".join([f"Python {platform.python_version()}", *versions])
        for name in CASES:
            if not args.cases or any(name.startswith(prefix) for prefix in args.cases):
                print(name, flush=True)
                run["cases"][name] = measure(name)
                # Keep the order of CASES, and drop cases that no longer exist.
                run["cases"] = {n: run["cases"][n] for n in CASES if n in run["cases"]}
                path.write_text(json.dumps(run, indent=1) + "\n")
    speed_page.render(RESULTS)


DEVICE = "cpu"

if __name__ == "__main__":
    main()
