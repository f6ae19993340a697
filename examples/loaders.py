"""One function per dataset. Each returns samples to train on and samples to test on.

Unless the user's own split says otherwise, the test classes are not in the training set.
"""

from __future__ import annotations

import csv
import io
import pickle
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from downloads import fetch, fetch_with_pml
from images import UserError, directories, image_files, list_skipped, printable
from PIL import Image
from pytorch_metric_learning import datasets as pml_datasets
from samples import Data, Samples, split_classes
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"


def digits() -> Data:
    """scikit-learn's scanned digits, 8 x 8: 0-4 to train, 5-9 to test. Needs no files.

    Five classes are too few to learn features that generalize to other digits. So the rotations by
    multiples of 90 degrees and their mirror images are classes of their own, as is usual with
    Omniglot: eight classes per digit. The test digits are not transformed.
    """
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8))[:, None]
    names = [str(i) for i in range(10)]
    data = split_classes(pixels, bunch.target, bunch.target >= 5, names)
    original = data.train
    assert isinstance(original.source, Tensor)
    rotated = [original.source.rot90(turns, (2, 3)) for turns in range(4)]
    transformed = rotated + [images.flip(3) for images in rotated]
    views = [f"{90 * i}°{mirrored}" for mirrored in ("", ", mirrored") for i in range(4)]
    train = Samples(
        source=torch.cat(transformed),
        labels=[label + 5 * view for view in range(8) for label in original.labels],
        names=[f"{name} at {view}" for view in views for name in original.names],
    )
    return Data(train, data.test)


def omniglot(root: Path, download: bool = False) -> Data:
    """Handwritten characters, 28 x 28, with the authors' split: 964 to train, 659 to test.

    `root` contains omniglot28.npz, or the authors' images_background and images_evaluation, each as
    a zip file or unpacked (alphabet/character/*.png).
    """
    packed = root / "omniglot28.npz"
    if packed.is_file():
        arrays = _npz(packed, "x", "y", "is_eval", "class_names")
        pixels = torch.from_numpy(arrays["x"])[:, None]
        return split_classes(pixels, arrays["y"], arrays["is_eval"], arrays["class_names"])

    pixels, labels, names = [], [], []
    parts = [("images_background", False), ("images_evaluation", True)]
    for part, _ in parts:
        if not (root / part).is_dir() and not (root / f"{part}.zip").is_file():
            fetch(f"{OMNIGLOT_URL}/{part}.zip", root / f"{part}.zip", "omniglot", download)
    is_test = []
    for part, is_evaluation in parts:
        classes: dict[str, int] = {}
        for name, data in tqdm(_pngs(root / part), desc=f"reading {part}", unit=" images"):
            if name not in classes:
                classes[name] = len(names)
                names.append(name)
            # The originals are black on white, 105 x 105. The box filter keeps thin strokes.
            image = Image.open(io.BytesIO(data)).convert("L").resize((28, 28), Image.Resampling.BOX)
            pixels.append(255 - np.array(image))
            labels.append(classes[name])
            is_test.append(is_evaluation)
    if not (any(is_test) and not all(is_test)):
        raise UserError(
            f"omniglot: no alphabet/character/*.png under {root / parts[any(is_test)][0]}"
        )
    stacked = torch.from_numpy(np.stack(pixels))[:, None]
    return split_classes(stacked, labels, is_test, names)


def cifar100(root: Path, download: bool = False) -> Data:
    """Photographs, 32 x 32, as a retrieval problem: classes 0-49 to train, 50-99 to test.

    `root` contains cifar100_subset.npz, or the authors' "python version", packed or unpacked.
    The images of its training and test files are joined.
    """
    packed, archive = root / "cifar100_subset.npz", root / "cifar-100-python.tar.gz"
    folder = root / "cifar-100-python"
    if packed.is_file():
        arrays = _npz(packed, "train_x", "train_y", "test_x", "test_y", "class_names")
        pixels = np.concatenate([arrays["train_x"], arrays["test_x"]])
        labels = np.concatenate([arrays["train_y"], arrays["test_y"]])
        images, names = torch.from_numpy(pixels).permute(0, 3, 1, 2), arrays["class_names"]
    else:
        if not folder.is_dir() and not archive.is_file():
            fetch(CIFAR100_URL, archive, "cifar100", download)
        try:
            train, test, meta = (
                _cifar_pickle(folder, archive, n) for n in ("train", "test", "meta")
            )
            pixels = np.concatenate([train[b"data"], test[b"data"]])
            labels = np.array(train[b"fine_labels"] + test[b"fine_labels"])
            names = [name.decode() for name in meta[b"fine_label_names"]]
            images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
        except (OSError, KeyError, ValueError, pickle.UnpicklingError, tarfile.TarError) as error:
            raise UserError(f"cifar100: cannot read the files under {root}: {error}") from error
    return split_classes(images, labels, labels >= 50, names, mirrored=True)


PML_LOADERS: dict[str, Callable[..., Any]] = {
    "cub": pml_datasets.CUB,
    "cars196": pml_datasets.Cars196,
    "sop": pml_datasets.StanfordOnlineProducts,
    "inaturalist": pml_datasets.INaturalist2018,
}
PACKED = {"cub": "cub200_2010_crop160.npz", "cars196": "cars196_crop160.npz"}
PACKED_NOTES = {
    "cub": "the first edition of CUB (2010), cropped to the birds",
    "cars196": "only the official training images of Cars196, cropped to the cars",
}


def from_pml(name: str, root: Path, download: bool = False) -> Data:
    """The datasets for which PML has loaders, with the loaders' split into classes.

    `root`/`name` (if that directory exists) or `root` contains the unpacked archive of the authors.
    """
    loader = PML_LOADERS[name]
    folder = root / name
    if download and not folder.exists():
        fetch_with_pml(loader, folder, name)
    if not folder.is_dir():
        folder = root
    try:
        splits = [loader(root=str(folder), split=split) for split in ("train", "test")]
    except FileNotFoundError as error:
        raise UserError(
            f"{name}: {error.filename} is missing; put the dataset under {root}, or add --download"
        ) from error
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{name}: cannot read the files in {folder}: {error}") from error
    files = [Path(path) for split in splits for path in split.paths]
    labels = np.concatenate([np.asarray(split.labels) for split in splits])
    is_test = np.repeat([False, True], [len(split.paths) for split in splits])
    directory = {label: path.parent.name for label, path in zip(labels, files, strict=True)}
    shared = Counter(directory.values())  # SOP has many products per directory
    names = {k: d if shared[d] == 1 else f"{d} {k}" for k, d in directory.items()}
    return split_classes(files, labels, is_test, names, mirrored=True)


def packed(path: Path) -> Data:
    """An npz file of encoded images.

    jpeg: uint8, all image files end to end. offset: (n + 1,), where each begins, and the end.
    y: (n,) classes from 0. is_test: (n,). class_names: optional.
    """
    arrays = _npz(path, "jpeg", "offset", "y", "is_test", optional=["class_names"])
    names = arrays.get("class_names")
    jpeg, offset, y = arrays["jpeg"], arrays["offset"], arrays["y"]
    is_valid = (
        jpeg.dtype == np.uint8
        and offset.ndim == y.ndim == arrays["is_test"].ndim == 1
        and np.issubdtype(offset.dtype, np.integer)
        and np.issubdtype(y.dtype, np.integer)
        and len(offset) - 1 == len(y) == len(arrays["is_test"]) > 0
        and (offset[0], offset[-1]) == (0, len(jpeg))
        and (np.diff(offset) > 0).all()
        and (y >= 0).all()
        and (names is None or y.max() < len(names))
    )
    if not is_valid:
        raise UserError(f"{path}: the arrays do not have the shapes and values of a packed file")
    content = jpeg.tobytes()
    images = [content[start:end] for start, end in pairwise(offset.tolist())]
    is_test = _is_test(arrays["is_test"], path)
    return split_classes(images, y, is_test, names, mirrored=True, cropped=True)


def inshop(root: Path) -> Data:
    """In-Shop Clothes Retrieval, with the authors' training set, queries and gallery.

    `root` (or `root`/inshop) contains the authors' Img/img or img and list_eval_partition.txt. They
    send the images on request.
    """
    root = root / "inshop" if (root / "inshop").is_dir() else root
    lists = sorted(root.glob("**/list_eval_partition.txt"))
    if not lists:
        raise UserError(f"inshop: list_eval_partition.txt is missing under {root}")
    rows = [line.split() for line in lists[0].read_text().splitlines()[2:] if line.strip()]
    if not all(len(row) == 3 and row[2] in ("train", "query", "gallery") for row in rows):
        raise UserError(
            f"inshop: {lists[0]} does not have the lines `image item train|query|gallery`"
        )
    images = root / "Img" if (root / "Img").is_dir() else root
    files = [images / path for path, *_ in rows]
    parts = np.array([part for *_, part in rows])
    items = [item for _, item, _ in rows]
    data = split_classes(files, items, parts != "train", mirrored=True)
    is_query = (parts[parts != "train"] == "query").tolist()
    return replace(data, test=replace(data.test, is_query=is_query))


def folder(root: Path) -> Data:
    """Image files in one directory per class, or listed in a CSV file.

    Subdirectories belong to the class. If `root` contains `train` and `test` (or `val`), these
    contain the training and test images. Otherwise the first half of the directories in sorted
    order (rounded up) is to train and the rest to test.
    """
    if root.is_file():
        return _from_csv(root)
    held_out = next((n for n in ("test", "val", "valid", "validation") if (root / n).is_dir()), "")
    has_split = (root / "train").is_dir() and bool(held_out)
    parts = [root / "train", root / held_out] if has_split else [root]
    if not has_split and [path.name for path in directories(root)] == ["train"]:
        raise UserError(f"folder: {root} has train/, but no test/ or val/")
    skipped: Counter[str] = Counter()
    files, labels, is_test = [], [], []
    for index, part in enumerate(parts):
        for directory in directories(part):
            found = image_files(directory, skipped)
            if not found:
                raise UserError(f"folder: {directory} contains no images ({list_skipped(skipped)})")
            files += found
            labels += [printable(directory.name)] * len(found)
            is_test += [index == 1] * len(found)
    if skipped:
        print(f"folder: {list_skipped(skipped)}")
    return split_classes(files, labels, is_test if has_split else None, mirrored=True)


def _from_csv(path: Path) -> Data:
    """The columns path (relative to the CSV file), label and, optional, split: train or test."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
            rows = [dict(zip_longest(header, line)) for line in lines]
    except ValueError as error:
        raise UserError(f"folder: {path} is empty or not text: {error}") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"folder: cannot read {path}: {error}") from error
    columns = rows[0].keys() if rows else []
    if not {"path", "label"} <= set(columns):
        raise UserError(
            f"folder: {path} needs a header with the columns path, label and, optional, split; it "
            f"has {', '.join(map(str, columns)) or 'no rows'}"
        )
    for number, row in enumerate(rows, 1):
        empty = next((column for column in ("path", "label") if not row[column]), None)
        if empty:
            raise UserError(f"folder: row {number} of {path} has no {empty}")
    files = [path.parent / row["path"] for row in rows]
    is_test = _is_test([row["split"] for row in rows], path) if "split" in columns else None
    return split_classes(files, [row["label"] for row in rows], is_test, mirrored=True)


def _is_test(split: Sequence[Any] | np.ndarray, path: Path) -> np.ndarray:
    """Which samples are to test. The values are train or 0, and test, val or 1."""
    values = np.array([str(value).strip().lower() for value in split])
    is_train = np.isin(values, ["train", "0", "false"])
    is_test = np.isin(values, ["test", "val", "valid", "validation", "1", "true"])
    unknown = values[~(is_train | is_test)]
    if len(unknown):
        raise UserError(f"{path}: the split {str(unknown[0])!r} is not train or test")
    return is_test


def features(path: Path) -> Data:
    """Embeddings from anywhere: an npz file with `embeddings`, `labels` and, optional, `split`.

    embeddings: (n, width). labels: (n,) numbers or strings. split: (n,) train or test, or the same
    as 0 or 1.
    """
    arrays = _npz(path, "embeddings", "labels", optional=["split"])
    embeddings, labels = arrays["embeddings"], arrays["labels"]
    is_real = np.issubdtype(embeddings.dtype, np.floating) or np.issubdtype(
        embeddings.dtype, np.integer
    )
    if embeddings.ndim != 2 or not is_real:
        raise UserError(
            f"{path}: embeddings must be numbers (n, width), not {embeddings.dtype} "
            f"{embeddings.shape}"
        )
    split = arrays.get("split")
    for name, array in (("labels", labels), ("split", split)):
        if array is not None and array.shape != embeddings.shape[:1]:
            raise UserError(f"{path}: {name} must be ({len(embeddings)},), not {array.shape}")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise UserError(f"{path}: the label at row {np.isnan(labels).argmax()} is NaN")
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    with np.errstate(over="ignore"):
        embeddings = embeddings.astype(np.float32)  # values that are too large become infinite
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(1))[0])
        raise UserError(f"{path}: the embedding at row {row} is not finite")
    is_test = None if split is None else _is_test(split, path)
    return split_classes(torch.from_numpy(embeddings), labels, is_test)


ROOT_VARIABLE = "PML_EXTRAS_DATA"
NAMES = ["digits", "omniglot", "cifar100", *PML_LOADERS, "inshop", "folder"]
DOWNLOADS = ["omniglot", "cifar100", *PML_LOADERS]


def load(name: str, root: Path | None, download: bool = False) -> Data:
    """Load a dataset, and check that every file exists and every class has at least two samples."""
    if name == "digits":
        return digits()
    if root is None:
        raise UserError(
            f"--dataset {name} needs --data-root DIR, or {ROOT_VARIABLE}=DIR in the environment"
        )
    is_file = name == "features" or (name == "folder" and (root.suffix == ".csv" or root.is_file()))
    if not (root.is_file() if is_file else root.is_dir() or download):
        kind = "file" if is_file else "directory"
        raise UserError(f"there is no {kind} {root} (--data-root or {ROOT_VARIABLE})")
    if name in PML_LOADERS:
        file = root / PACKED.get(name, "-")
        data = (
            replace(packed(file), note=PACKED_NOTES[name])
            if file.is_file()
            else from_pml(name, root, download)
        )
    elif name in DOWNLOADS:
        data = {"omniglot": omniglot, "cifar100": cifar100}[name](root, download)
    else:
        data = {"inshop": inshop, "folder": folder, "features": features}[name](root)
    check(name, "training", data.train)
    check(name, "test", data.test)
    return data


def check(name: str, part: str, samples: Samples) -> None:
    if len(samples.names) < 2:
        raise UserError(
            f"{name}: the training set and the test set need at least two classes each; the {part} "
            f"set has {len(samples.names)}"
        )
    counts = Counter(samples.labels)
    too_small = [name for label, name in enumerate(samples.names) if counts[label] < 2]
    if too_small:
        raise UserError(
            f"class {too_small[0]} has one sample; every class needs at least two"
            + (f" ({len(too_small)} classes have one)" if len(too_small) > 1 else "")
        )
    if not isinstance(samples.source, Tensor):
        files = (file for file in samples.source if isinstance(file, Path))
        missing = next((path for path in files if not path.is_file()), None)
        if missing:
            raise UserError(f"{name}: the image {missing} is missing")


def _npz(path: Path, *keys: str, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            present = [key for key in optional if key in file]
            return {key: file[key] for key in (*keys, *present)}
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _pngs(part: Path) -> Iterable[tuple[str, bytes]]:
    """Yield alphabet/character and the bytes of each drawing, from a directory or a zip file."""
    if part.is_dir():
        for path in sorted(part.glob("*/*/*.png")):
            yield f"{path.parent.parent.name}/{path.parent.name}", path.read_bytes()
        return
    try:
        with zipfile.ZipFile(part.with_suffix(".zip")) as archive:
            for entry in sorted(archive.namelist()):
                *_, alphabet, character, file = ("", "", *entry.split("/"))
                if file.endswith(".png"):
                    yield f"{alphabet}/{character}", archive.read(entry)
    except zipfile.BadZipFile as error:
        raise UserError(f"cannot read {part.with_suffix('.zip')}: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only what the CIFAR files need, NumPy arrays: a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, in old protocols
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a CIFAR file")


def _cifar_pickle(folder: Path, archive: Path, name: str) -> dict[bytes, Any]:
    if folder.is_dir():
        data = (folder / name).read_bytes()
    else:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"cifar-100-python/{name}")
            data = member.read() if member else b""
    content: dict[bytes, Any] = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    return content
