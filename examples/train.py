#!/usr/bin/env python3
"""Train an embedding with pytorch-metric-learning and pml_extras, and see what it learnt.

    python examples/train.py                                     # under a minute, needs no files
    python examples/train.py --loss center_contrastive --dataset cub --data-root DIR --download
    python examples/train.py --loss triplet --miner contextual --interfere --distill ema
    python examples/train.py --loss ntxent --label-noise 0.2 --leave-out

The trainer, the sampler, the tester and the logging are PML's own; a method of pml_extras goes
where a loss or a miner of PML would go. Accuracy is measured on classes that training never sees:
once before and once after. The model that is kept is the one that retrieves held-out images of the
*training* classes best. Every epoch ends with a checkpoint, from which --resume goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import logging
import math
import os
import platform
import random
import shutil
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

# torch's threads wait by spinning, unless told otherwise before it is imported: on a machine that
# does something else too, two then take four times as long as one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import checkpoint
import datasets
import figures
import numpy as np
import pytorch_metric_learning
import torch
import tqdm
from datasets import Images, UserError
from networks import Bfloat16, build_embedder, build_trunk
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.common_functions import get_labels_to_indices
from pytorch_metric_learning.utils.inference import CustomKNN
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper
from torch import Tensor, nn

import pml_extras
from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher
from pml_extras.label_noise import LabelNoiseDetector
from pml_extras.losses import CenterContrastiveLoss, ContextualLoss
from pml_extras.miners import ContextualSimilarityMiner
from pml_extras.regularizers import ClassInterferenceRegularizer

# ---- The methods, by name. c: training classes, d: embedding size, m: images a class in a batch.

cosine = CosineSimilarity
LOSSES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "contextual": lambda c, d, m: ContextualLoss(num_neighbors=m),
    "center_contrastive": lambda c, d, m: CenterContrastiveLoss(c, d),
    "center_contrastive_average": lambda c, d, m: CenterContrastiveLoss(c, d, center_update="ema"),
    "contrastive": lambda c, d, m: losses.ContrastiveLoss(1.0, 0.5, distance=cosine()),
    "triplet": lambda c, d, m: losses.TripletMarginLoss(0.2, distance=cosine()),
    "multi_similarity": lambda c, d, m: losses.MultiSimilarityLoss(),
    "supcon": lambda c, d, m: losses.SupConLoss(),
    "ntxent": lambda c, d, m: losses.NTXentLoss(temperature=0.1),
    "proxy_anchor": lambda c, d, m: losses.ProxyAnchorLoss(c, d),
    "arcface": lambda c, d, m: losses.ArcFaceLoss(c, d, scale=16),
    "cosface": lambda c, d, m: losses.CosFaceLoss(c, d, scale=16),
    "normalized_softmax": lambda c, d, m: losses.NormalizedSoftmaxLoss(c, d),
    "smooth_ap": lambda c, d, m: losses.SmoothAPLoss(),
}
LOSS_LR = {"center_contrastive": 0.1}  # centers need big steps; other losses' proxies 0.01
MINERS: dict[str, Callable[[int], Any]] = {
    "none": lambda m: None,
    "multi_similarity": lambda m: miners.MultiSimilarityMiner(epsilon=0.1),
    "triplet_margin": lambda m: miners.TripletMarginMiner(0.2, "semihard", distance=cosine()),
    "contextual": lambda m: ContextualSimilarityMiner(num_neighbors=m),
}
TEACHERS = {"snapshot": SnapshotTeacher, "ema": EMATeacher}
PRIMARY = "mean_average_precision_at_r"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parse(arguments)
        with tidy_output():
            run(args)
    except UserError as error:
        # A worker process sends its traceback along; its last words are the message.
        message = str(error).rsplit("UserError: ", 1)[-1]
        print(f"train.py: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; --resume goes on from the last whole epoch", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    # ---- Check everything that can be checked before anything is written.
    out, device = args.out, pick_device(args.device)
    resuming = check_out(out, args)
    data = datasets.load(args.dataset, args.data_root, args.image_size, args.download)
    train_set, val_set = datasets.hold_out(data.train)
    num_classes = len(data.train.names)
    train_set = replace(train_set, flip=data.mirrored)
    true_labels = train_set.labels
    train_set = datasets.with_label_noise(train_set, args.label_noise, args.seed)
    trust = LabelNoiseDetector(train_set.labels) if args.check_labels else None
    batch_size, samples_per_class = pick_batch(args, train_set)
    config = {**describe(args), "batch_size": batch_size, "samples_per_class": samples_per_class}
    saved = checkpoint.load(out / "checkpoint.pt") if resuming else None
    if saved:
        check_same(config, saved, args.epochs)

    # ---- Networks, loss, miner: the only lines that a method of pml_extras changes.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    trunk = build_trunk(data.train.channels, data.train.size)
    embedder = build_embedder(args.embedding_size)
    if args.amp:
        trunk, embedder = Bfloat16(trunk), Bfloat16(embedder)
    models = {"trunk": trunk.to(device), "embedder": embedder.to(device)}

    loss = LOSSES[args.loss](num_classes, args.embedding_size, samples_per_class)
    if args.interfere is not None:
        ClassInterferenceRegularizer(
            num_classes, args.embedding_size, strength=args.interfere
        ).attach(loss)
    if args.distill:
        teacher = TEACHERS[args.distill](models["trunk"], models["embedder"])
        loss = SelfDistillation(loss, teacher, num_epochs=args.epochs)
    loss_funcs = {"metric_loss": loss.to(device)}
    miner = MINERS[args.miner](samples_per_class)
    mining_funcs = {"tuple_miner": miner.to(device)} if miner else {}

    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(model.parameters(), lr=args.lr)
        for name, model in models.items()
    }
    # Proxies and centers are the loss's own parameters. Without this they would never move.
    if any(True for _ in loss.parameters()):
        optimizers["metric_loss_optimizer"] = torch.optim.Adam(loss.parameters(), lr=args.loss_lr)

    # ---- Testing. PML's own k-nearest-neighbours, so that faiss is not needed.
    tester = GlobalEmbeddingSpaceTester(
        batch_size=256,
        dataloader_num_workers=args.workers,
        data_device=device,
        accuracy_calculator=AccuracyCalculator(
            include=tuple(figures.METRICS),
            k="max_bin_count",  # enough neighbours for R-precision and MAP@R, no more
            device=device,
            knn_func=CustomKNN(CosineSimilarity(), batch_size=1024),
        ),
    )
    print(f"{args.dataset}: {len(train_set)} images of {num_classes} classes to train, "
          f"{len(val_set)} to validate; {len(data.test)} images of {len(data.test.names)} "
          f"unseen classes\n{args.loss} on {device}: {args.epochs} epochs, batches of "
          f"{batch_size // samples_per_class} classes x {samples_per_class} images")  # fmt: skip
    before, embeddings_before = measure(tester, data.test, models)
    untrained, _ = measure(tester, val_set, models)

    # ---- Training: PML's trainer, PML's hooks, and a checkpoint when an epoch is over.
    sampler = MPerClassSampler(
        train_set.labels,
        m=samples_per_class,
        batch_size=batch_size,
        # One pass of the sampler is one epoch, so that no half-used pass is lost at a checkpoint.
        length_before_new_iter=len(train_set),
    )
    state: dict[str, Any] = {
        "config": config,
        "epoch": 0,
        "history": [{"epoch": 0, **untrained}],
        "best": None,
        "seconds": 0.0,
        "trust": None,
    }
    trainer = MetricLossOnly(
        models,
        optimizers,
        batch_size,
        loss_funcs,
        train_set,
        mining_funcs=mining_funcs,
        sampler=sampler,
        data_device=device,
        dataloader_num_workers=args.workers,
    )
    if saved:
        state = {key: saved[key] for key in state}
        state["config"] = config
        checkpoint.restore_trainer(trainer, saved)
        if trust and state["trust"]:
            trust.load_state_dict(state["trust"])
        if trust and args.leave_out:
            leave_out(sampler, trust)
        iterations = len(sampler) // batch_size * state["epoch"]
        forget_after(out / "logs", state["epoch"], iterations)
        print(f"going on after epoch {state['epoch']}")
    else:
        start_afresh(out)
        checkpoint.save(out / "checkpoint.pt", {**state, **checkpoint.trainer_state(trainer)})

    record_keeper, _, tensorboard = get_record_keeper(
        str(out / "logs"), str(out / "logs" / "tensorboard")
    )
    # Logging copies a loss's parameters into lists each time: once an epoch when they are many.
    many = sum(p.numel() for p in loss.parameters()) > 100_000
    hooks = HookContainer(
        record_keeper,
        primary_metric=PRIMARY,
        validation_split_name="val",
        save_models=False,  # ours is one file, written whole, with the random states in it
        log_freq=len(sampler) // batch_size if many else 10,
    )
    tester.end_of_testing_hook = hooks.end_of_testing_hook
    test_and_log = hooks.end_of_epoch_hook(tester, {"val": val_set}, str(out / "logs"))
    epoch_losses: list[float] = []
    started = time.perf_counter() - state["seconds"]

    def end_of_iteration(trainer: MetricLossOnly) -> None:
        epoch_losses.append(trainer.losses["total_loss"].item())
        if not math.isfinite(epoch_losses[-1]):
            raise UserError(
                f"the loss became {epoch_losses[-1]} in epoch {trainer.epoch}; try a lower --lr"
            )
        hooks.end_of_iteration_hook(trainer)

    def end_of_epoch(trainer: MetricLossOnly) -> Any:
        if trust and args.leave_out:
            leave_out(sampler, trust)
        keep_going = test_and_log(trainer)
        measured = tester.all_accuracies["val"]
        row = {key: measured[f"{key}_level0"] for key in figures.METRICS}
        row = {"epoch": trainer.epoch, "loss": float(np.mean(epoch_losses)), **row}
        epoch_losses.clear()
        is_best = state["best"] is None or row[PRIMARY] > state["best"][PRIMARY]
        if is_best:
            weights = {name: cpu_copy(model.state_dict()) for name, model in models.items()}
            state["best"] = {**row, "models": weights}
        state.update(epoch=trainer.epoch, seconds=time.perf_counter() - started)
        state["trust"] = trust.state_dict() if trust else None
        state["history"].append(row)
        checkpoint.save(out / "checkpoint.pt", {**state, **checkpoint.trainer_state(trainer)})
        tqdm.tqdm.write(f"epoch {row['epoch']:>3}   loss {row['loss']:8.4f}   "
                        f"val P@1 {row['precision_at_1']:.3f}   val MAP@R {row[PRIMARY]:.3f}"
                        f"{'   best so far' if is_best else ''}")  # fmt: skip
        return keep_going

    trainer.end_of_iteration_hook = end_of_iteration
    # A report on labels, and a teacher, need to know when an epoch is over; each calls the hook it
    # is given.
    hook = end_of_epoch
    if trust:
        hook = trust.end_of_epoch_hook(tester, replace(train_set, flip=False), hook)
    if args.distill:
        hook = loss.end_of_epoch_hook(hook)
    trainer.end_of_epoch_hook = hook
    trainer.train(start_epoch=state["epoch"] + 1, num_epochs=args.epochs)
    tensorboard.close()

    # ---- The best model on the unseen classes, the table, the pictures.
    best = state["best"]
    for name, model in models.items():
        model.load_state_dict(best["models"][name])
    tester.end_of_testing_hook = None
    checkpoint.save(out / "best.pt", best)
    after, embeddings_after = measure(tester, data.test, models)
    print("drawing")
    pictures = {name: out / f"{name}.png" for name in ("curves", "retrieval", "map")}
    figures.training_curves(pictures["curves"], state["history"], best["epoch"])
    views = (data.test, embeddings_before, embeddings_after, args.seed)
    figures.retrieval_board(pictures["retrieval"], *views)
    figures.embedding_map(pictures["map"], *views)
    if trust:
        files = None if isinstance(train_set.source, Tensor) else list(map(str, train_set.source))
        trust.to_csv(out / "labels.csv", class_names=train_set.names, sample_names=files)
        pictures["labels"] = out / "labels.png"
        figures.label_board(pictures["labels"], train_set, trust)
    results = {
        "config": {**config, "epochs": args.epochs, "device": str(device)},
        "before": before,
        "after": after,
        "best_epoch": best["epoch"],
        "seconds": round(state["seconds"], 2),
        "history": state["history"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "pml_extras": pml_extras.__version__,
        },
        "figures": {name: str(path) for name, path in pictures.items()},
    }
    if trust:
        results["labels"] = judge(trust, true_labels)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print(f"\n{len(data.test.names)} unseen classes, {len(data.test)} images: "
          f"before and after {args.loss} (best epoch {best['epoch']})\n\n"
          f"  {'':14}{'before':>8}{'after':>8}{'change':>9}")  # fmt: skip
    for key, label in figures.METRICS.items():
        print(f"  {label:14}{before[key]:8.3f}{after[key]:8.3f}{after[key] - before[key]:+9.3f}")
    if trust:
        print(f"\n{results['labels']['distrusted']} of {len(train_set)} training labels are "
              f"distrusted: {out / 'labels.csv'}")  # fmt: skip
        if args.label_noise:
            print("precision {precision:.3f}, recall {recall:.3f}: of them that are wrong, and of "
                  "the wrong ones that are found".format(**results["labels"]))  # fmt: skip
    print(f"\nnumbers    {out / 'results.json'}")
    for name, path in pictures.items():
        print(f"{name:10} {path}")


def measure(
    tester: GlobalEmbeddingSpaceTester, images: Images, models: dict[str, nn.Module]
) -> tuple[dict[str, float], Tensor]:
    """How well each image's own class is retrieved among `images`, and the embeddings."""
    embeddings, labels = tester.get_all_embeddings(images, models["trunk"], models["embedder"])
    accuracy = tester.accuracy_calculator.get_accuracy(embeddings, labels.squeeze(1))
    return {key: accuracy[key] for key in figures.METRICS}, embeddings.cpu()


def leave_out(sampler: MPerClassSampler, trust: LabelNoiseDetector) -> None:
    """Draw no more images whose labels are distrusted, but of classes that have no others."""
    trusted = trust.scores.numpy() >= 1
    for label, images in get_labels_to_indices(trust.labels).items():
        kept = images[trusted[images]]
        sampler.labels_to_indices[label] = kept if len(kept) else images


def judge(trust: LabelNoiseDetector, true_labels: list[int]) -> dict[str, float]:
    """How well the distrusted labels are the wrong ones."""
    wrong = trust.labels != torch.tensor(true_labels)
    suspected = wrong[trust.find_label_issues()]
    found = int(suspected.sum())
    return {
        "distrusted": len(suspected),
        "precision": found / max(len(suspected), 1),
        "recall": found / max(int(wrong.sum()), 1),
    }


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


# ---- Arguments, and the checks that keep a bad one from leaving anything behind.


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def at_least(kind: Callable[[str], Any], low: float, below: float = math.inf) -> Callable[..., Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value < below:
            limit = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    convert.__name__ = kind.__name__  # argparse's message for text that is no number
    return convert


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--loss", choices=LOSSES, default="contextual", help="default: %(default)s")
    add("--loss-lr", type=at_least(float, 0), help="learning rate of the loss's own parameters")
    add("--interfere", nargs="?", const=0.1, type=at_least(float, 0, 0.5), metavar="STRENGTH",
        help="class interference regularization (default strength: 0.1)")  # fmt: skip
    add("--distill", choices=TEACHERS, help="self-distillation from an earlier self")
    add("--miner", choices=MINERS, default="none", help="default: %(default)s")
    add("--dataset", choices=datasets.NAMES, default="digits", help="default: %(default)s")
    add("--data-root", type=Path, metavar="DIR", help="where the dataset is")
    add("--download", action="store_true", help="fetch a dataset that is not there")
    add("--image-size", type=at_least(int, 8), help="for image files (default: 128)")
    add("--label-noise", type=at_least(float, 0, 1), default=0.0, metavar="FRACTION",
        help="training labels to replace by another class's")  # fmt: skip
    add("--check-labels", action="store_true",
        help="report which training labels to distrust: labels.csv, labels.png")  # fmt: skip
    add("--leave-out", action="store_true",
        help="the same, and go on without them after each epoch")  # fmt: skip
    add("--epochs", type=at_least(int, 1), default=20, help="default: %(default)s")
    add("--batch-size", type=at_least(int, 2), help="default: 128, or what the classes fill")
    add("--samples-per-class", type=at_least(int, 2), help="images of a class in a batch")
    add("--embedding-size", type=at_least(int, 1), default=64, help="default: %(default)s")
    add("--lr", type=at_least(float, 0), default=1e-3, help="default: %(default)s")
    add("--seed", type=at_least(int, 0, 2**32), default=0, help="default: %(default)s")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--amp", action="store_true", help="run the network in bfloat16")
    add("--workers", type=at_least(int, 0), default=0, help="processes that read image files")
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET-LOSS")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args(arguments)

    in_files = args.dataset in (*datasets.PML_LOADERS, "folder")
    if args.image_size and not in_files:
        raise UserError(f"--image-size is for image files; {args.dataset} has a size of its own")
    args.image_size = args.image_size or (128 if in_files else None)
    if args.download and args.dataset in ("digits", "folder"):
        raise UserError(f"--download: there is nothing to fetch for --dataset {args.dataset}")
    if args.loss_lr is None:
        args.loss_lr = LOSS_LR.get(args.loss, 0.01)
    args.check_labels |= args.leave_out
    args.out = args.out or Path("runs") / f"{args.dataset}-{args.loss}"
    return args


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def pick_batch(args: argparse.Namespace, images: Images) -> tuple[int, int]:
    """Batch size and images per class, checked against what the sampler can fill."""
    num_classes = len(set(images.labels))
    m, batch = args.samples_per_class, args.batch_size
    if args.loss == "smooth_ap":
        m = m or min(11, num_classes)
        batch = batch or m * m
        if batch != m * m:
            # Its groups are transposed otherwise: the average precision of the wrong images.
            raise UserError(
                "PML 2.9's SmoothAPLoss is right only for batches of as many classes as images a "
                f"class: --batch-size {m * m} for --samples-per-class {m}, not {batch}"
            )
    m = m or (4 if num_classes >= 16 else 8)
    batch = batch or m * min(128 // m, num_classes, len(images) // m)
    classes = batch // m
    if batch % m:
        raise UserError(f"--batch-size {batch} is not a multiple of --samples-per-class {m}")
    if classes < 2:
        raise UserError(
            f"--batch-size {batch} holds {classes} class of {m} images; a loss compares at least 2"
        )
    if classes > num_classes:
        raise UserError(
            f"--batch-size {batch} at {m} images a class takes {classes} classes; "
            f"there are {num_classes} to train on"
        )
    if batch > len(images):
        raise UserError(f"--batch-size {batch} is more than the {len(images)} training images")
    return batch, m


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the outcome: the same description, the same run."""
    elsewhere = {"device", "out", "resume", "overwrite", "data_root", "download"}
    if not args.distill:  # whose weight grows with epoch / epochs
        elsewhere.add("epochs")
    return {key: value for key, value in vars(args).items() if key not in elsewhere}


def check_out(out: Path, args: argparse.Namespace) -> bool:
    """Whether there is a run to resume; an error if something is in the way."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file")
    holds_run = (out / "checkpoint.pt").is_file()
    if args.resume and not holds_run:
        raise UserError(f"--resume: there is no run in {out}")
    if holds_run and not (args.resume or args.overwrite):
        raise UserError(f"{out} holds a run already: --resume, --overwrite or another --out")
    if not holds_run and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty, and what it holds is no run of this script")
    return bool(args.resume)


def check_same(config: dict[str, Any], saved: dict[str, Any], epochs: int) -> None:
    for key, value in config.items():
        before = saved["config"].get(key)
        if value != before:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"--resume: the run was started with {flag} {before}, not {value}")
    if epochs < saved["epoch"]:
        raise UserError(
            f"--resume: the run is past --epochs {epochs}: it has done {saved['epoch']}"
        )


def start_afresh(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "logs", ignore_errors=True)
    # The checkpoint goes last: until then this is still a run, whatever stops us.
    for name in (
        "results.json",
        "curves.png",
        "retrieval.png",
        "map.png",
        "labels.png",
        "labels.csv",
        "best.pt",
        "checkpoint.pt",
    ):
        (out / name).unlink(missing_ok=True)


def forget_after(logs: Path, epoch: int, iterations: int) -> None:
    """Drop what record-keeper wrote after the checkpoint, which is about to be written again.

    (TensorBoard gets such a point twice, with the same step and value.)
    """
    if not (logs / "logs.db").is_file():
        return
    step = "~iteration~"
    with contextlib.closing(sqlite3.connect(logs / "logs.db")) as database, database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'")
        for (table,) in tables.fetchall():
            by_epoch = table.startswith("accuracies")
            limit = epoch if by_epoch else iterations - 1
            database.execute(f'DELETE FROM "{table}" WHERE "{step}" > ?', (limit,))
    for path in logs.glob("*.csv"):
        limit = epoch if path.name.startswith("accuracies") else iterations - 1
        with open(path, newline="") as file:
            rows = [r for r in csv.reader(file) if r and (r[0] == step or int(r[0]) <= limit)]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)


@contextlib.contextmanager
def tidy_output() -> Iterator[None]:
    """PML draws a bar an epoch and a bar a test: let each go when it is full, and let there be
    none where there is no terminal. Its loggers keep to warnings."""
    logging.getLogger("PML").setLevel(logging.WARNING)
    draw = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(draw, leave=False, disable=None)
    try:
        with warnings.catch_warnings():
            # PML's bar shows the loss without detaching it, which newer versions of torch mind.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
            yield
    finally:
        tqdm.tqdm.__init__ = draw


if __name__ == "__main__":
    sys.exit(main())
