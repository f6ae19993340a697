"""Downloads that leave nothing behind when they fail."""

from __future__ import annotations

import shutil
import socket
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from images import UserError
from tqdm import tqdm


def fetch(url: str, target: Path, name: str, download: bool) -> None:
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


def fetch_with_pml(loader: Callable[..., Any], folder: Path, name: str) -> None:
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
