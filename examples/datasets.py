"""One function per dataset. Each returns the images of the training classes and the images of the
test classes, which do not overlap."""

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
from images import UserError, directories, image_files, list_skipped, printable, read_image
from PIL import Image
from pytorch_metric_learning import datasets as pml_datasets
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, int]]):
    """Labeled images, in memory or in files. `labels` are indices into `names`."""

    source: Tensor | Sequence[Path]  # uint8 (N, channels, height, width), or a file per image
    labels: list[int]
    names: list[str]
    size: int  # height and width in pixels
    flip: bool = False  # mirror each image with probability 0.5

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
        return read_image(self.source[index], self.size)

    def subset(self, indices: Sequence[int]) -> Images:
        labels = [self.labels[i] for i in indices]
        if isinstance(self.source, Tensor):
            return replace(self, source=self.source[torch.tensor(indices)], labels=labels)
        return replace(self, source=[self.source[i] for i in indices], labels=labels)


@dataclass(frozen=True)
class Data:
    train: Images
    test: Images  # of classes that are not in `train`
    mirrored: bool  # whether mirroring an image keeps its class


def digits() -> Data:
    """scikit-learn's scanned digits, 8 x 8: 0-4 to train, 5-9 to test. Needs no files.

    Five classes are too few to learn features that generalize to other digits. So the rotations by
    multiples of 90 degrees and their mirror images are classes of their own, as is usual with
    Omniglot: eight classes per digit. The test digits are not transformed.
    """
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8))[:, None]
    names = [str(i) for i in range(10)]
    data = _split(pixels, bunch.target, names, bunch.target >= 5, mirrored=False)
    original = data.train
    assert isinstance(original.source, Tensor)
    rotated = [original.source.rot90(turns, (2, 3)) for turns in range(4)]
    transformed = rotated + [images.flip(3) for images in rotated]
    views = [f"{90 * i}°{mirrored}" for mirrored in ("", ", mirrored") for i in range(4)]
    train = Images(
        source=torch.cat(transformed),
        labels=[label + 5 * view for view in range(8) for label in original.labels],
        names=[f"{name} at {view}" for view in views for name in original.names],
        size=original.size,
    )
    return Data(train, data.test, mirrored=False)


def omniglot(root: Path, download: bool = False) -> Data:
    """Handwritten characters, 28 x 28, with the authors' split: 964 to train, 659 to test.

    `root` contains omniglot28.npz, or the authors' images_background and images_evaluation, each as
    a zip file or unpacked (alphabet/character/*.png).
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
    return _split(stacked, np.array(labels), names, np.array(is_test), False)


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
    """The datasets for which PML has loaders, with the loaders' split into classes.

    `root`/`name` (if that directory exists) or `root` contains the unpacked archive of the authors.
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
        raise UserError(f"{name}: cannot read the files in {folder}: {error}") from error
    train, test = (_from_files(split.paths, split.labels, image_size) for split in splits)
    return Data(train, test, mirrored=True)


def folder(root: Path, image_size: int) -> Data:
    """A dataset with one directory of images per class. Subdirectories belong to the class.

    If `root` contains `train` and `test` (or `val`), these contain the training and test classes.
    Otherwise the first half of the directories in sorted order (rounded up) is to train and the
    rest to test.
    """
    held_out = next((n for n in ("test", "val", "valid", "validation") if (root / n).is_dir()), "")
    if (root / "train").is_dir() and held_out:
        train, test = directories(root / "train"), directories(root / held_out)
        shared = sorted({p.name for p in train} & {p.name for p in test})
        if shared:
            raise UserError(
                f"folder: class {shared[0]} is in both train/ and {held_out}/ of {root}; the test "
                "classes must not be in the training set: put the directories of all classes into "
                "one directory, whose second half is then the test set"
            )
    else:
        classes = directories(root)
        half = (len(classes) + 1) // 2
        train, test = classes[:half], classes[half:]

    skipped: Counter[str] = Counter()
    files = {directory: image_files(directory, skipped) for directory in train + test}
    for directory, found in files.items():
        if not found:
            raise UserError(f"folder: {directory} contains no images ({list_skipped(skipped)})")
    if len(train) < 2 or len(test) < 2:
        raise UserError(
            f"folder: {len(train)} classes to train and {len(test)} to test under {root}; "
            "each needs at least two directories of images"
        )
    if skipped:
        print(f"folder: {list_skipped(skipped)}")

    def read(classes: list[Path]) -> Images:
        paths = [path for directory in classes for path in files[directory]]
        labels = [label for label, directory in enumerate(classes) for _ in files[directory]]
        return Images(paths, labels, [printable(d.name) for d in classes], image_size)

    return Data(read(train), read(test), mirrored=True)


ROOT_VARIABLE = "PML_EXTRAS_DATA"
NAMES = ["digits", "omniglot", "cifar100", *PML_LOADERS, "folder"]


def load(name: str, root: Path | None, image_size: int, download: bool = False) -> Data:
    """Load a dataset, and check that every file exists and every class has at least two images."""
    if name == "digits":
        return digits()
    if root is None:
        raise UserError(
            f"--dataset {name} needs --data-root DIR, or {ROOT_VARIABLE}=DIR in the environment"
        )
    if not root.is_dir() and not (download and name != "folder"):
        raise UserError(f"there is no directory {root} (--data-root or {ROOT_VARIABLE})")
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
        too_small = [name for label, name in enumerate(images.names) if counts[label] < 2]
        if too_small:
            raise UserError(
                f"class {too_small[0]} has one image; every class needs at least two"
                + (f" ({len(too_small)} classes have one)" if len(too_small) > 1 else "")
            )
        if not isinstance(images.source, Tensor):
            missing = next((path for path in images.source if not path.is_file()), None)
            if missing:
                raise UserError(f"{name}: the image {missing} is missing")
    return data


def hold_out(images: Images) -> tuple[Images, Images]:
    """Split into training and validation images: every fifth image of each class is held out.

    At least two images per class are held out, because one image has nothing to retrieve. A class
    of two or three images has none held out, because training needs pairs too.
    """
    indices_by_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        indices_by_class.setdefault(label, []).append(index)
    held_out: set[int] = set()
    for indices in indices_by_class.values():
        if len(indices) >= 10:
            held_out.update(indices[4::5])
        elif len(indices) >= 4:
            held_out.update(indices[-2:])
    if not held_out:
        raise UserError("no training class has four images: nothing to hold out for validation")
    kept = [i for i in range(len(images)) if i not in held_out]
    return images.subset(kept), images.subset(sorted(held_out))


def with_label_noise(images: Images, fraction: float, seed: int) -> Images:
    """Replace this fraction of the labels by another class, drawn uniformly."""
    generator = np.random.default_rng(seed)
    labels, num_classes = np.array(images.labels), len(images.names)
    wrong = generator.permutation(len(labels))[: round(fraction * len(labels))]
    labels[wrong] = (labels[wrong] + generator.integers(1, num_classes, len(wrong))) % num_classes
    return replace(images, labels=labels.tolist())


def _split(
    pixels: Tensor, labels: np.ndarray, names: Iterable[str], is_test: np.ndarray, mirrored: bool
) -> Data:
    names = [str(name) for name in names]

    def part(mask: np.ndarray) -> Images:
        present, relabeled = np.unique(labels[mask], return_inverse=True)
        return Images(
            source=pixels[torch.from_numpy(mask)],
            labels=relabeled.tolist(),
            names=[names[label] for label in present],
            size=pixels.shape[-1],
        )

    return Data(part(~is_test), part(is_test), mirrored)


def _from_files(paths: Sequence[str | Path], labels: Sequence[Any], image_size: int) -> Images:
    files = [Path(path) for path in paths]
    order = {label: index for index, label in enumerate(sorted(set(labels)))}
    directory = {label: path.parent.name for label, path in zip(labels, files, strict=True)}
    shared = Counter(directory.values())  # SOP has many products per directory
    names = [d if shared[d] == 1 else f"{d} {label}" for label, d in sorted(directory.items())]
    return Images(files, [order[label] for label in labels], names, image_size)


def _npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
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
    # PML unpacks in place. An interrupted download must not look like a complete dataset.
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
