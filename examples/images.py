"""Image files: which files of a directory are images, and their pixels as 8-bit RGB."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageFile, ImageOps

# What Pillow may raise for a file that is broken, or no image, or too large.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 262, 0


class UserError(Exception):
    """An error that the user can correct; printed in one line."""


def open_picture(file: Path | bytes) -> Image.Image:
    """An image file or its content in RGB: upright, and on white where it is transparent."""
    name = f"of {len(file)} bytes" if isinstance(file, bytes) else file
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except READ_ERRORS as error:
        raise UserError(f"cannot read the image {name}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Pillow's own conversion clips wider numbers to white or black."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.float64)
        if image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO:
            pixels = 65535 - pixels
        pixels[pixels == image.info.get("transparency")] = 65535
        return from_array(pixels / 257)  # 65535 / 257 = 255
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
    """The suffixes of the image formats that the installed Pillow reads, in lower case."""
    Image.init()
    # Pillow knows more formats than it reads without another program: EPS, and those of stubs.
    readers = {
        name: reader for name, (reader, _) in Image.OPEN.items() if name not in ("EPS", "MPEG")
    }
    return {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in readers and not is_stub(readers[name])
    }


def is_stub(reader: object) -> bool:
    return isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)


def image_files(directory: Path, skipped: Counter[str]) -> list[Path]:
    """The images in a directory and its subdirectories. Counts the other files by suffix.

    Hidden files are no images: macOS writes ``._x.png`` beside ``x.png``. Links to directories are
    followed, but none twice.
    """
    suffixes, found, visited = readable_suffixes(), [], set()
    for folder, subfolders, names in os.walk(directory, onerror=refuse, followlinks=True):
        visited.add(os.path.realpath(folder))
        subfolders[:] = [
            name
            for name in subfolders
            if not is_hidden(Path(name)) and os.path.realpath(Path(folder, name)) not in visited
        ]
        for name in names:
            path = Path(folder, name)
            if is_hidden(Path(name)):
                continue
            if path.suffix.lower() in suffixes and path.is_file():
                found.append(path)
            else:
                skipped[path.suffix.lower() or path.name] += 1
    return sorted(found)


def refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the directory {error.filename}: {error.strerror}") from error


def list_skipped(skipped: Counter[str]) -> str:
    files = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    return f"skipped files that are no images here: {files or 'none'}"


def directories(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(Path(p.name)))
    except OSError as error:
        refuse(error)


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def printable(path: Path | str) -> str:
    """A path as text that can be drawn and written, whatever bytes its names have."""
    return os.fsencode(path).decode("utf-8", "replace")
