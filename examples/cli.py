"""The command line of train.py, and all checks of its arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import checkpoint
import datasets
import methods
import torch
from datasets import Images, UserError

IMAGE_FILE_DATASETS = (*datasets.PML_LOADERS, "folder")


def call(run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run, and return the exit code. A user's error is printed in one line."""
    # PML's progress bar formats the loss without detaching it; torch warns about that.
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
    try:
        run(parse(arguments))
    except UserError as error:
        # An error in a worker process contains the worker's traceback. Its end is the message.
        message = str(error).rsplit("UserError: ", 1)[-1]
        print(f"train.py: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; use --resume to continue after the last complete epoch",
              file=sys.stderr)  # fmt: skip
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        description="Train an embedding with pytorch-metric-learning and pml_extras, and report "
        "what it learned.",
    )
    add = parser.add_argument
    add("--loss", choices=methods.LOSSES, default="contextual", help="default: %(default)s")
    add("--loss-lr", type=at_least(float, 0), help="learning rate of the loss's own parameters")
    add("--interfere", nargs="?", const=0.1, type=at_least(float, 0, 0.5), metavar="STRENGTH",
        help="add class interference regularization (default strength: 0.1)")  # fmt: skip
    add("--distill", choices=methods.TEACHERS, help="add self-distillation with this teacher")
    add("--miner", choices=methods.MINERS, default="none", help="default: %(default)s")
    add("--dataset", choices=datasets.NAMES, default="digits", help="default: %(default)s")
    add("--data-root", type=Path, metavar="DIR", default=os.environ.get(datasets.ROOT_VARIABLE),
        help=f"directory of the dataset (default: ${datasets.ROOT_VARIABLE})")  # fmt: skip
    add("--download", action="store_true", help="download the dataset if it is missing")
    add("--image-size", type=at_least(int, 8), help="resize image files (default: 128)")
    add("--label-noise", type=at_least(float, 0, 1), default=0.0, metavar="FRACTION",
        help="replace this fraction of the training labels by other classes")  # fmt: skip
    add("--check-labels", action="store_true",
        help="report training labels that are probably wrong: labels.csv, labels.png")  # fmt: skip
    add("--drop-label-issues", action="store_true",
        help="--check-labels, and do not train on the reported images")  # fmt: skip
    add("--epochs", type=at_least(int, 1), default=20, help="default: %(default)s")
    add("--batch-size", type=at_least(int, 2), help="default: 128, or less if there are few images")
    add("--samples-per-class", type=at_least(int, 2), help="images per class in a batch")
    add("--embedding-size", type=at_least(int, 1), default=64, help="default: %(default)s")
    add("--lr", type=at_least(float, 0), default=1e-3, help="default: %(default)s")
    add("--seed", type=at_least(int, 0, 2**32), default=0, help="default: %(default)s")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--amp", action="store_true", help="run the network in bfloat16")
    add("--workers", type=at_least(int, 0), default=0, help="processes that read image files")
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET-LOSS")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args(arguments)

    has_image_files = args.dataset in IMAGE_FILE_DATASETS
    if args.image_size and not has_image_files:
        raise UserError(f"--image-size is for image files; {args.dataset} has a fixed size")
    if args.download and args.dataset in ("digits", "folder"):
        raise UserError(f"--download: there is nothing to download for --dataset {args.dataset}")
    if has_image_files:
        args.image_size = args.image_size or 128
    if args.loss_lr is None:
        args.loss_lr = methods.LOSS_LR.get(args.loss, methods.DEFAULT_LOSS_LR)
    args.check_labels |= args.drop_label_issues
    args.out = args.out or Path("runs") / f"{args.dataset}-{args.loss}"
    return args


def config(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide the result: runs of the same configuration are equal."""
    other = {"device", "out", "resume", "overwrite", "data_root", "download"}
    if not args.distill:  # the weight of distillation grows with epoch / epochs
        other.add("epochs")
    return {key: value for key, value in vars(args).items() if key not in other}


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
        raise UserError(f"--batch-size {batch} is more than the {len(images)} training images")
    return batch, m


def check_out(args: argparse.Namespace) -> None:
    """Check that --out holds a run to resume, or nothing that would be lost."""
    out = args.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file")
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


def load_run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the run to resume. It must have the same configuration and not be past --epochs."""
    saved = checkpoint.load(args.out / "checkpoint.pt")
    for key, value in config(args).items():
        saved_value = saved["config"].get(key)
        if value != saved_value:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"--resume: the run was started with {flag} {saved_value}, not {value}")
    if args.epochs < saved["epoch"]:
        raise UserError(
            f"--resume: --epochs {args.epochs} is too few, the run has done {saved['epoch']}"
        )
    return saved
