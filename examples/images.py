"""Image files: which files of a directory are images, and their pixels as 8-bit RGB."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# What Pillow may raise for a file that is broken, or no image, or too large.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UserError(Exception):
    """An error that the user can correct; printed in one line."""


def read_image(path: Path, size: int) -> Tensor:
    """An image file as uint8 (3, size, size): upright, and on white where it is transparent."""
    try:
        with Image.open(path) as file:
            image = to_rgb(ImageOps.exif_transpose(file)).resize((size, size))
    except READ_ERRORS as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Pillow's own conversion clips wider numbers to white or black."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return from_array(np.asarray(image).astype(np.float64) / 257)  # 65535 / 257 = 255
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        if image.mode == "F" and 0 <= pixels.min() and pixels.max() <= 1:
            return from_array(255 * pixels)
        raise ValueError(
            f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'} from"
            f" {pixels.min():g} to {pixels.max():g}: save it with 8 or 16 bits, or as floats from"
            " 0 to 1"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def from_array(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8)).convert("RGB")


def readable_suffixes() -> set[str]:
    """The suffixes of the formats that the installed Pillow reads, in lower case."""
    Image.init()
    return {s for s, name in Image.registered_extensions().items() if name in Image.OPEN} - {".pdf"}


def image_files(directory: Path, skipped: Counter[str]) -> list[Path]:
    """The images in a directory and its subdirectories. Counts the other files by suffix.

    Hidden files are no images: macOS writes ``._x.png`` beside ``x.png``.
    """
    suffixes, found = readable_suffixes(), []
    for path in sorted(directory.rglob("*")):
        if is_hidden(path.relative_to(directory)) or not path.is_file():
            continue
        if path.suffix.lower() in suffixes:
            found.append(path)
        else:
            skipped[path.suffix.lower() or path.name] += 1
    return found


def list_skipped(skipped: Counter[str]) -> str:
    files = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    return f"skipped files that are no images here: {files or 'none'}"


def directories(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.relative_to(root)))


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def printable(path: Path | str) -> str:
    """A path as text that can be drawn and written, whatever bytes its names have."""
    return os.fsencode(path).decode("utf-8", "replace")
