#!/usr/bin/env python3
"""Time and memory of the methods, as ratios to plain transcriptions and to PML's own, in one run.

    python benchmarks/speed.py                  # everything, into benchmarks/results/MACHINE.json
    python benchmarks/speed.py contextual knn   # some cases
    python benchmarks/speed.py --device cuda    # the same on a GPU
    python benchmarks/speed.py --render         # docs/speed.md and its plots

The contenders of a case take turns, so that whatever slows the machine down slows all of them, in
an order drawn anew each time, so that none always finds what another has left in the caches. What
is short is repeated within its turn, so that it is not the caches' filling that is measured. The
figures are medians, with the spread of the middle half. Memory is what a fresh process, which does
nothing else, needs beyond what it had before the first call.
"""

from __future__ import annotations

import argparse
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
TURN = 0.1  # seconds, at least
Contenders = dict[str, Callable[[], Any]]


def clustered(n: int, dim: int, per_class: int = 4, noise: float = 0.6) -> Any:
    torch.manual_seed(0)
    labels = torch.arange(n) // per_class
    x = torch.randn(n // per_class, dim)[labels] + noise * torch.randn(n, dim)
    return x.to(DEVICE).requires_grad_(), labels.to(DEVICE)


def step(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(), inputs)


def contextual(n: int, noise: float = 0.6, dim: int = 512) -> Contenders:
    x, labels = clustered(n, dim, noise=noise)

    def objective(implementation: str) -> torch.Tensor:
        terms = functional.contextual_loss(x, labels, implementation=implementation)
        return (
            0.4 * terms.contextual.mean() + 0.5 * terms.contrastive.mean() + 0.1 * terms.similarity
        )

    return {
        "pml_extras": step(lambda: objective("auto"), x),
        "plain": step(lambda: objective("reference"), x),
    }


def contextual_against_pml(n: int) -> Contenders:
    x, labels = clustered(n, 512)
    ours, theirs = ContextualLoss(), pml_losses.MultiSimilarityLoss()
    return {
        "pml_extras": step(lambda: ours(x, labels), x),
        "MultiSimilarityLoss": step(lambda: theirs(x, labels), x),
    }


def contextual_large(n: int) -> Contenders:
    x, labels = clustered(n, 128)
    loss = ContextualLoss()
    return {"pml_extras": step(lambda: loss(x, labels), x)}


def with_centers(num_classes: int, n: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    c = torch.randn(num_classes, dim, device=DEVICE, requires_grad=True)
    return x, c, torch.randint(num_classes, (n,), device=DEVICE)


def centers(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x, c, labels = with_centers(num_classes, n, dim)
    contenders = {
        "pml_extras": step(lambda: functional.center_contrastive_loss(x, c, labels).mean(), x, c),
        "plain": step(lambda: reference.center_contrastive_loss(x, c, labels), x, c),
    }
    for name in ("NormalizedSoftmaxLoss", "ArcFaceLoss"):
        # Each is made when it is first called, so that its proxies are part of its memory alone.
        made: dict[str, Any] = {}

        def call(name: str = name, made: dict[str, Any] = made) -> Any:
            if "loss" not in made:
                made["loss"] = getattr(pml_losses, name)(num_classes, dim).to(DEVICE)
            loss = made["loss"]
            return torch.autograd.grad(loss(x, labels), (x, loss.W))

        contenders[name] = call
    return contenders


def optimized(loss: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    """A step with Adam."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()

    return step


def averaged(x: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Callable[[], None]:
    loss = CenterContrastiveLoss(num_classes, x.shape[1], center_update="ema").to(DEVICE)
    loss.class_counts += 1
    with torch.no_grad():
        loss.centers.normal_()
    return lambda: loss(x, labels).backward()


def center_updates(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    torch.manual_seed(0)
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    gradient = CenterContrastiveLoss(num_classes, dim).to(DEVICE)
    return {
        "pml_extras": averaged(x, labels, num_classes),
        "gradient + Adam": optimized(gradient, x, labels),
    }


def centers_large(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    loss = CenterContrastiveLoss(num_classes, dim).to(DEVICE)
    return {"pml_extras": optimized(loss, x, labels)}


def centers_averaged(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x = torch.randn(n, dim, device=DEVICE, requires_grad=True)
    labels = torch.randint(num_classes, (n,), device=DEVICE)
    return {"pml_extras": averaged(x, labels, num_classes)}


def listwise(n: int) -> Contenders:
    x, labels = clustered(n, 128)
    numbers = labels.cpu().numpy()
    teacher = torch.randn(n, 128, device=DEVICE)
    return {
        "pml_extras": step(lambda: functional.listwise_kl(x, teacher).mean(), x),
        "plain": step(lambda: reference.listwise_kl(x, teacher), x),
        "the authors' loop": step(lambda: reference.listwise_kl_loop(x, teacher, numbers), x),
    }


def compiled(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Contenders:
    return {"pml_extras": step(torch.compile(loss), *inputs), "not compiled": step(loss, *inputs)}


def contextual_compiled(n: int) -> Contenders:
    x, labels = clustered(n, 512)
    return compiled(lambda: functional.contextual_loss(x, labels).contextual.mean(), x)


def centers_compiled(num_classes: int, n: int = 512, dim: int = 128) -> Contenders:
    x, c, labels = with_centers(num_classes, n, dim)
    return compiled(lambda: functional.center_contrastive_loss(x, c, labels).mean(), x, c)


def listwise_compiled(n: int) -> Contenders:
    x, _ = clustered(n, 128)
    teacher = torch.randn(n, 128, device=DEVICE)
    return compiled(lambda: functional.listwise_kl(x, teacher).mean(), x)


def distillation(n: int) -> Contenders:
    """A step with distillation, against the same with the teacher's forward pass alone."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 2048)]
    trunk = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(2048, 128)).to(DEVICE)
    inputs, labels = torch.randn(n, 784, device=DEVICE), torch.arange(n, device=DEVICE) // 4
    base = pml_losses.MultiSimilarityLoss()
    distilled = SelfDistillation(base, SnapshotTeacher(trunk), num_epochs=2)
    distilled.end_epoch()
    network = distilled.teacher.network

    def with_forward_alone() -> None:
        base(trunk(inputs), labels).backward()
        distilled.teacher.clear()
        with torch.no_grad():
            network(inputs)

    return {
        "pml_extras": lambda: distilled(trunk(inputs), labels).backward(),
        "teacher's forward alone": with_forward_alone,
    }


def miner(n: int) -> Contenders:
    x, labels = clustered(n, 128, per_class=8, noise=0.9)
    ours, theirs = ContextualSimilarityMiner(), pml_miners.MultiSimilarityMiner()
    return {
        "pml_extras": lambda: ours(x, labels),
        "MultiSimilarityMiner": lambda: theirs(x, labels),
    }


def interference(n: int, triplets_per_anchor: int | str) -> Contenders:
    x, labels = clustered(n, 128)
    plain, interfered = (
        pml_losses.TripletMarginLoss(triplets_per_anchor=triplets_per_anchor) for _ in range(2)
    )
    ClassInterferenceRegularizer(n // 4, 128).to(DEVICE).attach(interfered)
    return {
        "pml_extras": step(lambda: interfered(x, labels), x),
        "TripletMarginLoss": step(lambda: plain(x, labels), x),
    }


def knn(n: int, dim: int = 128, k: int = 20) -> Contenders:
    x, _ = clustered(n, dim, per_class=20, noise=0.9)
    x = torch.nn.functional.normalize(x.detach())
    return {
        "pml_extras": lambda: ContextualKNN(num_neighbors=20)(x, k, x, True),
        "FaissKNN": lambda: FaissKNN()(x, k, x, True),
        "k-reciprocal": lambda: reference.k_reciprocal_rerank(x.cpu().numpy()),
    }


# Name, what is measured, the contenders, and how many turns they take.
ON_GPU_ONLY = {
    "center-ten-million": (
        "Center loss, C=10,000,000, with Adam",
        lambda: centers_large(10_000_000),
        3,
    ),
}
CASES: dict[str, tuple[str, Callable[[], Contenders], int]] = {
    **{
        f"contextual-{n}": (f"Contextual term, N={n}, D=512", lambda n=n: contextual(n), turns)
        for n, turns in ((128, 31), (512, 11), (1024, 15), (2048, 9), (4096, 3))
    },
    "contextual-dense-512": (
        "Contextual term, N=512, all samples neighbours",
        lambda: contextual(512, noise=0.0),
        11,
    ),
    "contextual-spread-1024": (
        "Contextual term, N=1024, random embeddings",
        lambda: contextual(1024, noise=30.0),
        5,
    ),
    "contextual-pml": ("ContextualLoss, N=512", lambda: contextual_against_pml(512), 11),
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
    "center-ten-million-averaged": (
        'Center loss, "ema", C=10,000,000, a step',
        lambda: centers_averaged(10_000_000),
        2,
    ),
    **{f"listwise-{n}": (f"Listwise KL, N={n}", lambda n=n: listwise(n), 31) for n in (112, 512)},
    "compiled-contextual": (
        "Contextual term, N=512, D=512, in dense products, compiled",
        lambda: contextual_compiled(512),
        15,
    ),
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
            f"Interference, N=512, {triplets} triplets an anchor",
            lambda triplets=triplets: interference(512, triplets),
            15,
        )
        for triplets in ("all", 100)
    },
    "knn-5000": ("Re-ranking, 5,000 against themselves", lambda: knn(5000), 3),
    "knn-20000": ("Re-ranking, 20,000 against themselves", lambda: knn(20000), 3),
}


def seconds(function: Callable[[], Any]) -> float:
    """A call's, on average over a turn."""
    calls, took, started = 0, 0.0, time.perf_counter()
    while took < TURN:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        calls, took = calls + 1, time.perf_counter() - started
    return took / calls


def measure(name: str) -> dict[str, Any]:
    what, make, turns = CASES[name]
    contenders = make()
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    order = random.Random(0)
    for turn in range(turns + 1):
        for contender in order.sample(list(contenders), len(contenders)):
            took = seconds(contenders[contender])
            if turn > 0 or turns == 1:  # the first is to warm up
                times[contender].append(took)
    summary = {}
    for contender, values in times.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        summary[contender] = {
            "median_ms": 1e3 * statistics.median(values),
            "middle_half_ms": [1e3 * low, 1e3 * high],
            "turns": len(values),
            # What the compiler needs would drown the rest.
            "extra_mib": None if name.startswith("compiled") else memory(name, contender),
        }
        mib = summary[contender]["extra_mib"]
        print(f"  {contender:24} {summary[contender]['median_ms']:10.2f} ms"
              + ("" if mib is None else f" {mib:9.1f} MiB"), flush=True)  # fmt: skip
    return {"what": what, "contenders": summary}


def memory(name: str, contender: str) -> float:
    """Peak memory beyond the inputs, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, contender, "--device", DEVICE]
    output = subprocess.run(
        [*command, "--threads", str(torch.get_num_threads())],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return float(output.split()[-1])


def memory_here(name: str, contender: str) -> float:
    function = CASES[name][1]()[contender]
    if DEVICE == "cuda":
        function()  # what libraries keep from their first use on is not the method's
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What the libraries take when they are first used is not the method's.
    small = torch.randn(64, 8, requires_grad=True)
    functional.contextual_loss(
        small, torch.arange(64), implementation="sparse"
    ).contextual.sum().backward()
    (small @ small.T).logsumexp(1).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew at what is held
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="beginnings of cases' names; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default=platform.machine())
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    DEVICE = args.device
    torch.set_num_threads(args.threads)
    if DEVICE == "cuda":
        CASES.update(ON_GPU_ONLY)
    if args.memory_of:
        print(memory_here(*args.memory_of))
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
                # In the order above, without what is measured no more.
                run["cases"] = {n: run["cases"][n] for n in CASES if n in run["cases"]}
                path.write_text(json.dumps(run, indent=1) + "\n")
    speed_page.render(RESULTS)


DEVICE = "cpu"

if __name__ == "__main__":
    main()
