"""Where the images come from: one function per dataset, each returning the images of the classes
to train on and the images of the classes that training never sees."""

from __future__ import annotations

import io
import pickle
import shutil
import socket
import tarfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning import datasets as pml_datasets
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class UserError(Exception):
    """Something the user can put right; shown as one line."""


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images, in memory or in files. `labels` index `names`."""

    source: Tensor | Sequence[Path]  # uint8 (N, channels, height, width), or one file per image
    labels: list[int]
    names: list[str]
    size: int  # pixels a side
    flip: bool = False  # mirror half of the images, at random

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.picture(index).float() / 127.5 - 1
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self.labels[index]

    @property
    def channels(self) -> int:
        return self.source.shape[1] if isinstance(self.source, Tensor) else 3

    def picture(self, index: int) -> Tensor:
        """One image as uint8 (channels, height, width)."""
        if isinstance(self.source, Tensor):
            return self.source[index]
        path = self.source[index]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB").resize((self.size, self.size)))
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def subset(self, indices: Sequence[int]) -> Images:
        labels = [self.labels[i] for i in indices]
        if isinstance(self.source, Tensor):
            return replace(self, source=self.source[torch.tensor(indices)], labels=labels)
        return replace(self, source=[self.source[i] for i in indices], labels=labels)


@dataclass(frozen=True)
class Data:
    train: Images
    test: Images  # classes that are not in `train`
    mirrored: bool  # whether a mirrored image still shows its class


def digits() -> Data:
    """scikit-learn's scanned digits, 8 x 8: 0-4 to train, 5-9 unseen. Needs no files.

    Five classes teach little about a sixth: whatever tells 0-4 apart is learnt in one epoch, at the
    expense of the rest. So each of them, turned and mirrored, makes eight classes, as is the custom
    with Omniglot. The unseen digits stay as they are.
    """
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8))[:, None]
    names = [str(i) for i in range(10)]
    data = _split(pixels, bunch.target, names, bunch.target >= 5, mirrored=False)
    upright = data.train
    assert isinstance(upright.source, Tensor)
    turned = [upright.source.rot90(turns, (2, 3)) for turns in range(4)]
    every = turned + [images.flip(3) for images in turned]
    ways = [f"{90 * i}°{mirrored}" for mirrored in ("", ", mirrored") for i in range(4)]
    train = Images(
        source=torch.cat(every),
        labels=[label + 5 * way for way in range(8) for label in upright.labels],
        names=[f"{name} at {way}" for way in ways for name in upright.names],
        size=upright.size,
    )
    return Data(train, data.test, mirrored=False)


def omniglot(root: Path, download: bool = False) -> Data:
    """Handwritten characters, 28 x 28, by the authors' split: 964 to train, 659 unseen.

    `root` holds omniglot28.npz, or the authors' images_background and images_evaluation, each as
    the zip file or unpacked (alphabet/character/*.png).
    """
    packed = root / "omniglot28.npz"
    if packed.is_file():
        arrays = _npz(packed, "x", "y", "is_eval", "class_names")
        pixels = torch.from_numpy(arrays["x"])[:, None]
        return _split(pixels, arrays["y"], arrays["class_names"], arrays["is_eval"] > 0, False)

    pixels, labels, names = [], [], []
    parts = [("images_background", False), ("images_evaluation", True)]
    for part, _ in parts:
        if not (root / part).is_dir() and not (root / f"{part}.zip").is_file():
            _fetch(f"{OMNIGLOT_URL}/{part}.zip", root / f"{part}.zip", "omniglot", download)
    unseen = []
    for part, is_unseen in parts:
        classes: dict[str, int] = {}
        for name, data in tqdm(_pngs(root / part), desc=f"reading {part}", unit=" images"):
            if name not in classes:
                classes[name] = len(names)
                names.append(name)
            # The authors draw black on white in 105 x 105; the box filter keeps thin strokes.
            image = Image.open(io.BytesIO(data)).convert("L").resize((28, 28), Image.Resampling.BOX)
            pixels.append(255 - np.array(image))
            labels.append(classes[name])
            unseen.append(is_unseen)
    if not (any(unseen) and not all(unseen)):
        raise UserError(
            f"omniglot: no alphabet/character/*.png under {root / parts[any(unseen)][0]}"
        )
    stacked = torch.from_numpy(np.stack(pixels))[:, None]
    return _split(stacked, np.array(labels), names, np.array(unseen), False)


def cifar100(root: Path, download: bool = False) -> Data:
    """Photographs, 32 x 32, made a retrieval problem: classes 0-49 to train, 50-99 unseen.

    `root` holds cifar100_subset.npz, or the authors' "python version", packed or unpacked.
    Images of their training and test files are pooled.
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
            _fetch(CIFAR100_URL, archive, "cifar100", download)
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
    return _split(images, labels, names, labels >= 50, True)


PML_LOADERS: dict[str, Callable[..., Any]] = {
    "cub": pml_datasets.CUB,
    "cars196": pml_datasets.Cars196,
    "sop": pml_datasets.StanfordOnlineProducts,
    "inaturalist": pml_datasets.INaturalist2018,
}


def from_pml(name: str, root: Path, image_size: int, download: bool = False) -> Data:
    """The datasets that PML ships loaders for, with the loaders' own splits into classes.

    `root`/`name` (if there is such a folder) or `root` holds what the authors' archive unpacks to.
    """
    loader = PML_LOADERS[name]
    folder = root / name
    if download and not folder.exists():
        _fetch_with_pml(loader, folder, name)
    if not folder.is_dir():
        folder = root
    try:
        splits = [loader(root=str(folder), split=split) for split in ("train", "test")]
    except FileNotFoundError as error:
        raise UserError(
            f"{name}: {error.filename} is missing; put the dataset under {root}, or add --download"
        ) from error
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{name}: cannot make sense of the files in {folder}: {error}") from error
    train, test = (_from_files(split.paths, split.labels, image_size) for split in splits)
    return Data(train, test, mirrored=True)


def folder(root: Path, image_size: int) -> Data:
    """One directory of images a class.

    With `root`/train and `root`/test, those are the two sets of classes. Otherwise the first half
    of the directories in sorted order (the larger half, if odd) is to train, the rest is unseen.
    """
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _directories(root / "train"), _directories(root / "test")
        shared = sorted({p.name for p in train} & {p.name for p in test})
        if shared:
            raise UserError(
                f"folder: class {shared[0]} is in both train/ and test/ of {root}; "
                "the classes to test on have to be unseen"
            )
    else:
        every = _directories(root)
        half = (len(every) + 1) // 2
        train, test = every[:half], every[half:]

    def read(directories: list[Path]) -> Images:
        found = [(path, d.name) for d in directories for path in _image_files(d)]
        return _from_files([p for p, _ in found], [name for _, name in found], image_size)

    for directory in train + test:
        if not _image_files(directory):
            raise UserError(f"folder: {directory} holds no images")
    if len(train) < 2 or len(test) < 2:
        raise UserError(
            f"folder: {len(train)} classes to train and {len(test)} unseen under {root}; "
            "both need at least two directories of images"
        )
    return Data(read(train), read(test), mirrored=True)


NAMES = ["digits", "omniglot", "cifar100", *PML_LOADERS, "folder"]


def load(name: str, root: Path | None, image_size: int, download: bool = False) -> Data:
    """The dataset called `name`, checked: every class has two images, every file is there."""
    if name == "digits":
        return digits()
    if root is None:
        raise UserError(f"--dataset {name} needs --data-root DIR")
    if not root.is_dir() and not (download and name != "folder"):
        raise UserError(f"--data-root: there is no directory {root}")
    if name == "omniglot":
        data = omniglot(root, download)
    elif name == "cifar100":
        data = cifar100(root, download)
    elif name == "folder":
        data = folder(root, image_size)
    else:
        data = from_pml(name, root, image_size, download)
    for images in (data.train, data.test):
        counts = Counter(images.labels)
        lonely = [name for label, name in enumerate(images.names) if counts[label] < 2]
        if lonely:
            raise UserError(
                f"class {lonely[0]} has one image; every class needs at least two"
                + (f" ({len(lonely)} classes have one)" if len(lonely) > 1 else "")
            )
        if not isinstance(images.source, Tensor):
            missing = next((path for path in images.source if not path.is_file()), None)
            if missing:
                raise UserError(f"{name}: the image {missing} is missing")
    return data


def hold_out(images: Images) -> tuple[Images, Images]:
    """Every fifth image of each class for validation, the rest for training.

    At least two a class, because one alone has nothing to retrieve; a class of two or three images
    gives none, because training needs pairs too.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        members.setdefault(label, []).append(index)
    held: set[int] = set()
    for indices in members.values():
        if len(indices) >= 10:
            held.update(indices[4::5])
        elif len(indices) >= 4:
            held.update(indices[-2:])
    if not held:
        raise UserError("no training class has four images: nothing to hold out for validation")
    kept = [i for i in range(len(images)) if i not in held]
    return images.subset(kept), images.subset(sorted(held))


def with_label_noise(images: Images, fraction: float, seed: int) -> Images:
    """Give this fraction of the images the label of another class, each equally likely."""
    generator = np.random.default_rng(seed)
    labels, num_classes = np.array(images.labels), len(images.names)
    wrong = generator.permutation(len(labels))[: round(fraction * len(labels))]
    labels[wrong] = (labels[wrong] + generator.integers(1, num_classes, len(wrong))) % num_classes
    return replace(images, labels=labels.tolist())


def _split(
    pixels: Tensor, labels: np.ndarray, names: Iterable[str], unseen: np.ndarray, mirrored: bool
) -> Data:
    names = [str(name) for name in names]

    def part(mask: np.ndarray) -> Images:
        present, relabelled = np.unique(labels[mask], return_inverse=True)
        return Images(
            source=pixels[torch.from_numpy(mask)],
            labels=relabelled.tolist(),
            names=[names[label] for label in present],
            size=pixels.shape[-1],
        )

    return Data(part(~unseen), part(unseen), mirrored)


def _from_files(paths: Sequence[str | Path], labels: Sequence[Any], image_size: int) -> Images:
    files = [Path(path) for path in paths]
    order = {label: index for index, label in enumerate(sorted(set(labels)))}
    directory = {label: path.parent.name for label, path in zip(labels, files, strict=True)}
    shared = Counter(directory.values())  # SOP keeps many products in one directory
    names = [d if shared[d] == 1 else f"{d} {label}" for label, d in sorted(directory.items())]
    return Images(files, [order[label] for label in labels], names, image_size)


def _directories(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def _npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _pngs(part: Path) -> Iterable[tuple[str, bytes]]:
    """alphabet/character and the bytes of each drawing, from the folder or from the zip file."""
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
    """A pickle can run any code; the CIFAR files only need to build NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file")


def _cifar_pickle(folder: Path, archive: Path, name: str) -> dict[bytes, Any]:
    if folder.is_dir():
        data = (folder / name).read_bytes()
    else:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"cifar-100-python/{name}")
            data = member.read() if member else b""
    content: dict[bytes, Any] = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    return content


def _fetch(url: str, target: Path, name: str, download: bool) -> None:
    if not download:
        raise UserError(f"{name}: {target} is missing; add --download to fetch it from {url}")
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            open(partial, "wb") as file,
            tqdm(total=response.length, unit="B", unit_scale=True, desc=target.name) as bar,
        ):
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{name}: could not download {url}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _fetch_with_pml(loader: Callable[..., Any], folder: Path, name: str) -> None:
    # PML unpacks in place, so that an interrupted download would pass for a dataset.
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        loader(root=str(partial), split="train", download=True)
        partial.replace(folder)
    except (OSError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{name}: PML's loader could not download it: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(partial, ignore_errors=True)
