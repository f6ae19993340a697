"""Activations of the frozen part of a network, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from images import UserError
from samples import Samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transforms import Transform


@dataclass(frozen=True)
class CachedSamples(Samples):
    """Samples whose network inputs are activations, one per view of the image."""

    activations: np.ndarray | None = None  # float16 (N, views, ...)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.activations is not None
        views = self.activations[index]
        view = int(torch.randint(len(views), ())) if self.transform.random else 0
        return torch.from_numpy(views[view].astype(np.float32)), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Samples:
        raise NotImplementedError("take the subset before the activations are computed")


class Views(Dataset[Tensor]):
    """All views of each image."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples.transform.views(self.samples.picture(index))


def cache(
    samples: Samples, network: nn.Module, folder: Path, device: torch.device, workers: int
) -> CachedSamples:
    """The samples with the activations that `network` returns, from a file in `folder` or computed.

    The name of the file depends on the network, its weights, the images and the transform, so the
    activations of others are never used.
    """
    path = folder / f"{fingerprint(samples, network)}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        compute(samples, network.to(device).eval(), path, device, workers)
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the cached activations; delete {path}: {error}") from error
    return CachedSamples(**vars(samples), activations=values)


@torch.no_grad()
def compute(
    samples: Samples, network: nn.Module, path: Path, device: torch.device, workers: int
) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # others may compute the same
    # On a CPU, large batches leave the cache of the processor and take twice as long.
    batch_size = 4 if device.type == "cpu" else 64
    # With a generator of its own, a run draws the same random numbers with and without this.
    generator = torch.Generator()
    loader = DataLoader(Views(samples), batch_size, num_workers=workers, generator=generator)
    start, values = 0, None
    try:
        with tqdm(total=len(samples), desc="computing activations", unit=" images") as bar:
            for views in loader:
                outputs = network(views.to(device).flatten(0, 1)).unflatten(0, views.shape[:2])
                half = outputs.half().cpu()
                if not half.isfinite().all():
                    raise UserError("--cache: activations exceed float16; choose another block")
                if values is None:
                    shape = (len(samples), *half.shape[1:])
                    check_space(path.parent, 2 * math.prod(shape))
                    values = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
                values[start : start + len(half)] = half.numpy()
                start += len(half)
                bar.update(len(half))
        assert values is not None
        values.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def probe(network: nn.Module, transform: Transform) -> str:
    """Two numbers that depend on what the network computes, which its weights alone do not tell."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, len(transform.mean), transform.size, transform.size
    images = torch.randn(shape, generator=generator)
    output = network.cpu().eval()(images).double()
    return f"{output.mean():.2e} {output.abs().mean():.2e}"


def check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--cache: the activations take {size >> 20:,} MiB; {free >> 20:,} MiB are free, "
            f"in {folder}"
        )


def fingerprint(samples: Samples, network: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=12)
    transform = samples.transform
    assert isinstance(transform, Transform)
    digest.update(repr((transform, network, probe(network, transform))).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(samples.source, Tensor):
        digest.update(samples.source.numpy().tobytes())
    else:
        for file in samples.source:
            if isinstance(file, Path):
                status = file.stat()
                file = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
            digest.update(file)
    return digest.hexdigest()
