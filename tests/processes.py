"""Real processes that talk by torch.distributed, for tests."""

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
    """``function(rank, *args)`` in each of ``world_size`` processes; what each returns."""
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
    # A rank that waits in vain fails, long before anybody loses patience.
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=wait)
    try:
        result = function(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    # Not destroy_process_group, in which torch 2.5 stops for good now and then. The process ends.
    dist.barrier()
