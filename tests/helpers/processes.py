"""Runs a function in several processes that communicate through torch.distributed."""

from __future__ import annotations

import os
import socket
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_processes(function, folder: Path, *args, world_size: int = 2) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` processes; return the results by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process,
        (function, str(folder), port, world_size, *args),
        nprocs=world_size,
        start_method="fork",
    )
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    errors = [result for result in results if isinstance(result, str)]
    assert not errors, errors[0]
    return results


def _process(rank: int, function, folder: str, port: int, world_size: int, *args) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # A deadlock fails after a minute instead of the default half hour.
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    try:
        result = function(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    # No destroy_process_group: it sometimes hangs with torch 2.5, and the process ends anyway.
    dist.barrier()
