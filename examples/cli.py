"""The command line of train.py, and all checks of its arguments."""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import checkpoint
import loaders
import methods
import optimizers
import protocols
import torch
import trunks
from images import UserError
from samples import Samples, digest

DEFAULT_LR, FINE_TUNING_LR = 1e-3, 1e-4
IN_MEMORY = ("digits", "omniglot", "cifar100", "features")


def call(run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run, and return the exit code. A user's error is printed in one line."""
    # PML's progress bar formats the loss without detaching it; torch warns about that.
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
    args = None
    try:
        args = parse(arguments)
        run(args)
    except UserError as error:
        # An error in a worker process contains the worker's traceback. Its end is the message.
        message = str(error).rsplit("UserError: ", 1)[-1]
        print(f"train.py: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        has_checkpoint = args and (args.out / "checkpoint.pt").is_file()
        hint = "; use --resume to continue after the last complete epoch" if has_checkpoint else ""
        print(f"\ntrain.py: stopped{hint}", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def at_least(kind: Callable[[str], Any], low: float, below: float = math.inf) -> Callable[..., Any]:
    """An argument type: a number in [low, below)."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value < below:
            limit = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type if the text is not a number
    return convert


def option(text: str) -> tuple[str, Any]:
    """An argument type: NAME=VALUE, where VALUE is a number, true, false, none or text."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Train an embedding with pytorch-metric-learning and pml_extras, and report "
        "what it learned.",
    )
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=methods.LOSSES, default="contextual", help="default: %(default)s")
    add("--loss-lr", type=at_least(float, 0), help="learning rate of the loss's own parameters")
    add("--loss-options", nargs="+", type=option, default=[], metavar="NAME=VALUE",
        help="arguments of the loss, such as pos_margin=0.9")  # fmt: skip
    add("--interfere", nargs="?", const=0.1, type=at_least(float, 0, 0.5), metavar="STRENGTH",
        help="add class interference regularization (default strength: 0.1)")  # fmt: skip
    add("--distill", choices=methods.TEACHERS, help="add self-distillation with this teacher")
    add("--miner", choices=methods.MINERS, default="none", help="default: %(default)s")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=loaders.NAMES, default="digits", help="default: %(default)s")
    add("--data-root", type=Path, metavar="DIR", default=os.environ.get(loaders.ROOT_VARIABLE),
        help="directory of the dataset, or a CSV file with the columns path, label and, optional, "
             f"split, for --dataset folder (default: ${loaders.ROOT_VARIABLE})")  # fmt: skip
    add("--download", action="store_true", help="download the dataset if it is missing")
    add("--features", type=Path, metavar="FILE",
        help="train only an embedder, on embeddings from anywhere: an npz file with embeddings, "
             "labels and, optional, split")  # fmt: skip
    add("--label-noise", type=at_least(float, 0, 1), default=0.0, metavar="FRACTION",
        help="replace this fraction of the training labels by other classes")  # fmt: skip
    add("--check-labels", action="store_true",
        help="report training labels that are probably wrong: labels.csv, labels.png")  # fmt: skip
    add("--drop-label-issues", action="store_true",
        help="--check-labels, and do not train on the reported samples")  # fmt: skip
    add("--workers", type=at_least(int, 0),
        help="processes that decode images (default: up to 4 for image files)")  # fmt: skip

    add = parser.add_argument_group("network").add_argument
    add("--trunk", default="small", metavar="NAME", help=f"{trunks.NAMES} (default: %(default)s)")
    add("--image-size", type=at_least(int, 8), help="in pixels; default: that of the trunk")
    add("--random-weights", action="store_true", help="do not load pretrained weights")
    add("--freeze-trunk", action="store_true", help="train only the embedder")
    add("--train-from", metavar="BLOCK", help="freeze the trunk before this block: blocks.14")
    add("--cache", metavar="BLOCK",
        help="like --train-from; computes the activations before the block only once")  # fmt: skip
    add("--cache-dir", type=Path, metavar="DIR", default=Path("runs/activations"),
        help="default: %(default)s")  # fmt: skip
    add("--freeze-norm", action="store_true",
        help="keep the running statistics of the trunk's batch normalization")  # fmt: skip
    add("--embedding-size", type=at_least(int, 1), default=64, help="default: %(default)s")
    add("--init", choices=("pca", "random"),
        help="of the embedder: principal components of the features (default for pretrained trunks "
             "and features) or random")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--protocol", choices=protocols.NAMES,
        help="the published settings of the contextual loss for this dataset; other arguments "
             "override them")  # fmt: skip
    add("--epochs", type=at_least(int, 1), default=20, help="default: %(default)s")
    add(
        "--batch-size", type=at_least(int, 2), help="default: 128, or less if there are few samples"
    )
    add("--samples-per-class", type=at_least(int, 2), help="samples per class in a batch")
    add("--lr", type=at_least(float, 0),
        help=f"default: {DEFAULT_LR}; for whole pretrained trunks: {FINE_TUNING_LR}")  # fmt: skip
    add("--trunk-lr", type=at_least(float, 0), help="learning rate of the trunk (default: --lr)")
    add("--weight-decay", type=at_least(float, 0), default=0.0, help="default: %(default)s")
    add("--schedule", choices=optimizers.SCHEDULES, default="none",
        help="of the learning rates; multistep: times 0.3 after 3/16, 6/16 and 9/16 of the epochs "
             "(default: %(default)s)")  # fmt: skip
    add("--warmup", type=at_least(int, 0), default=0, metavar="EPOCHS",
        help="raise the learning rates from 0 in the first epochs")  # fmt: skip
    add("--seed", type=at_least(int, 0, 2**32), default=0, help="default: %(default)s")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--amp", action="store_true", help="run the network in bfloat16")

    add = parser.add_argument_group("results").add_argument
    add("--rerank", action="store_true", help="also test with re-ranked neighbors")
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET-LOSS")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.protocol:
        parser.set_defaults(**protocols.settings(args.protocol))
        args = parser.parse_args(arguments)
        protocols.check(args.protocol, args.dataset)
    if args.features:
        args.dataset, args.data_root = "features", args.features
    check(args)

    is_pretrained = args.trunk != "small"
    if args.lr is None:
        is_whole = not (args.cache or args.train_from or args.freeze_trunk)
        args.lr = FINE_TUNING_LR if is_pretrained and is_whole else DEFAULT_LR
    if args.trunk_lr is None:
        args.trunk_lr = args.lr
    if args.loss_lr is None:
        args.loss_lr = methods.LOSS_LR.get(args.loss, methods.DEFAULT_LOSS_LR)
    if args.init is None:
        args.init = "pca" if is_pretrained or args.features else "random"
    if args.workers is None:
        args.workers = 0 if args.dataset in IN_MEMORY else min(4, os.cpu_count() or 1)
    args.loss_options = dict(args.loss_options)
    args.check_labels |= args.drop_label_issues
    args.out = args.out or Path("runs") / f"{args.dataset}-{args.loss}"
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together."""
    if args.features:
        for name in ("protocol", "trunk", "trunk_lr", "train_from", "cache", "image_size",
                     "freeze_trunk", "freeze_norm", "random_weights"):  # fmt: skip
            if getattr(args, name) not in (None, False, "small"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is for images; --features has no images and no trunk")
    if args.trunk == "small" and args.dataset in IN_MEMORY and args.image_size:
        raise UserError(f"--image-size: {args.dataset} has a fixed size for --trunk small")
    if args.download and args.dataset not in loaders.DOWNLOADS:
        raise UserError(f"--download: there is nothing to download for --dataset {args.dataset}")
    for flag, block in (("--cache", args.cache), ("--train-from", args.train_from)):
        if block == "":
            raise UserError(f"{flag}: the name of the block is empty")
    if sum(map(bool, (args.freeze_trunk, args.train_from, args.cache))) > 1:
        raise UserError("--freeze-trunk, --train-from and --cache exclude each other")
    if args.warmup >= args.epochs:
        raise UserError(f"--warmup {args.warmup} is not below --epochs {args.epochs}")


def config(args: argparse.Namespace, train_set: Samples) -> dict[str, Any]:
    """What decides the result: runs of the same configuration are equal."""
    other = {"device", "out", "resume", "overwrite", "rerank"}
    other |= {"data_root", "download", "features", "cache_dir"}
    # The weight of distillation and the schedules depend on epoch / epochs.
    if not args.distill and args.schedule == "none":
        other.add("epochs")
    arguments = {key: value for key, value in vars(args).items() if key not in other}
    return {**arguments, "data": digest(train_set)}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def pick_batch(args: argparse.Namespace, images: Samples) -> tuple[int, int]:
    """Batch size and samples per class, checked against the number of images and classes."""
    num_classes = len(set(images.labels))
    m, batch = args.samples_per_class, args.batch_size
    if args.loss == "smooth_ap":
        m = m or min(11, num_classes)
        batch = batch or m * m
        if batch != m * m:
            # PML 2.9 mixes up the two axes, which gives a wrong average precision.
            raise UserError(
                "SmoothAPLoss of PML 2.9 is correct only for batches with as many classes as "
                f"samples per class: --batch-size {m * m} for --samples-per-class {m}, not {batch}"
            )
    m = m or max(2, min(4 if num_classes >= 16 else 8, len(images) // 2))
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
            f"--batch-size {batch} with {m} images per class takes {classes} classes; "
            f"there are {num_classes} in the training set"
        )
    if batch > len(images):
        raise UserError(f"--batch-size {batch} is more than the {len(images)} training samples")
    return batch, m


def check_out(args: argparse.Namespace) -> None:
    """Check that --out holds a run to resume, or nothing that would be lost."""
    out = args.out
    for flag, folder in (("--out", out), ("--cache-dir", args.cache_dir)):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"{flag}: {existing} is a file")
        if not os.access(existing, os.W_OK):
            raise UserError(f"{flag}: {existing} is not writable")
    holds_run = (out / "checkpoint.pt").is_file()
    if args.resume and not holds_run:
        raise UserError(f"--resume: there is no run in {out}")
    # A run that stopped before the end of its first epoch has nothing to lose.
    if holds_run and not (args.resume or args.overwrite) and has_epochs(out / "checkpoint.pt"):
        raise UserError(f"{out} already holds a run: use --resume, --overwrite or another --out")
    others = [path for path in out.iterdir() if path.suffix != ".part"] if out.is_dir() else []
    if not holds_run and others:
        raise UserError(f"--out: {out} is not empty and does not hold a run of this script")


def has_epochs(path: Path) -> bool:
    try:
        return bool(checkpoint.load(path)["epoch"] > 0)
    except (UserError, KeyError):
        return True  # of an unknown kind, so not to be replaced unless the user says so


def load_run(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Load the run to resume. It must have the same configuration and not be past --epochs."""
    path = args.out / "checkpoint.pt"
    saved = checkpoint.load(path)
    if not (isinstance(saved, dict) and saved.keys() >= checkpoint.KEYS):
        raise UserError(f"--resume: {path} is not a checkpoint of this script")
    for key, value in config.items():
        saved_value = saved["config"].get(key)
        if value != saved_value and key == "data":
            raise UserError("--resume: the run was started with other training samples")
        if value != saved_value:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"--resume: the run was started with {flag} {saved_value}, not {value}")
    if args.epochs < saved["epoch"]:
        raise UserError(
            f"--resume: --epochs {args.epochs} is too few, the run has done {saved['epoch']}"
        )
    return saved
