"""sharded_centers.py in one process, and under torchrun as a user runs it."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import sharded_centers
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

SMALL = ["--people", "97", "--batch-size", "30", "--steps", "2"]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run it in this process, with the environment of torchrun. Return what it prints."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))

    def run(out, *arguments):
        monkeypatch.setattr(sys, "argv", ["", "--out", str(out), *SMALL, *arguments])
        try:
            sharded_centers.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return capsys.readouterr().out

    return run


def run_torchrun(out, processes, *arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc-per-node={processes}", sharded_centers.__file__, "--out", str(out)]
    done = subprocess.run(
        [*torchrun, *script, *SMALL, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(printed):
    found = re.findall(r"step +(\d+)  loss ([\d.]+)\n", printed)
    return {int(step): float(loss) for step, loss in found}


def test_resuming_with_more_processes_gives_the_same_losses(tmp_path, run_here):
    printed = run_here(tmp_path / "one")
    assert printed.startswith("1 processes; the first holds 97 of 97 centers\nstep     0  accuracy")
    assert printed.endswith(f"saved {tmp_path}/one/step-000002\n")
    assert list(losses(printed)) == [1, 2]
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    one = run_here(tmp_path / "one", "--resume")
    two = run_torchrun(tmp_path / "two", 2, "--resume")
    assert two.startswith("2 processes; the first holds 49 of 97 centers\nresuming from ")
    assert list(losses(two)) == [3, 4]
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)
    assert two.endswith(f"saved {tmp_path}/two/step-000004\n")


def test_resuming_without_a_checkpoint(tmp_path, run_here, capsys):
    with pytest.raises(SystemExit):
        run_here(tmp_path, "--resume")
    assert f"there is no checkpoint in {tmp_path}" in capsys.readouterr().err
