#!/usr/bin/env python3
"""Train with networks of timm, torchvision and transformers, in an environment of their own.

    scripts/check_trunks.py             install everything first, which downloads gigabytes
    scripts/check_trunks.py PYTHON      with the packages of this Python

The weights are random, so this needs no hub. The photographs are noise. Each line of the output is
one training run with its time and its peak memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["torch==2.14.1", "torchvision==0.29.1", "timm", "transformers", f"{ROOT}[examples]"]
COMMON = ["--epochs", "1", "--batch-size", "8", "--samples-per-class", "2", "--loss", "triplet",
          "--random-weights", "--workers", "2", "--out", "run", "--overwrite"]  # fmt: skip
FOLDER = ["--dataset", "folder", "--data-root", "photos"]
CUB = ["--dataset", "cub", "--data-root", "cub"]
RUNS = [
    ["--trunk", "timm:resnet50", "--freeze-norm", "--schedule", "cosine"],
    ["--trunk", "timm:resnet50", "--cache", "layer4"],
    ["--trunk", "timm:resnet50", "--train-from", "layer4.2"],
    ["--trunk", "timm:convnext_atto", "--cache", "stages.3"],
    ["--trunk", "timm:efficientnet_lite0", "--cache", "blocks.5"],
    ["--trunk", "timm:vit_tiny_patch16_224", "--train-from", "blocks.10"],
    ["--trunk", "timm:vit_tiny_patch16_224", "--image-size", "160", "--amp"],
    ["--trunk", "torchvision:resnet18", "--cache", "layer4"],
    ["--trunk", "torchvision:mobilenet_v3_small", "--image-size", "96"],
    ["--trunk", "torchvision:vit_b_16", "--freeze-trunk"],
    ["--trunk", "transformers:resnet"],
    ["--trunk", "transformers:vit", "--train-from", "model.layers.1"],
    ["--protocol", "cub"],
]
ERRORS = [
    (["--trunk", "timm:resnet5"], "timm:resnet5: there is no such model"),
    (["--trunk", "torchvision:resnet5"], "torchvision:resnet5: there is no such model"),
    (
        ["--trunk", "torchvision:resnet50:V3"],
        "torchvision:resnet50:V3: there is no such model",
    ),
    (["--trunk", "timm:vit_tiny_patch16_224", "--cache", "blocks.10"], "cannot be split"),
    (["--trunk", "timm:resnet18", "--cache", "layer5"], "no block layer5"),
]
MODELS = """
import json, transformers
models = {
    "resnet": transformers.ResNetModel(transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64] * 4, depths=[1, 1, 1, 1])),
    "vit": transformers.ViTModel(transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64)),
}
for name, model in models.items():
    model.save_pretrained(name)
    size = {"resnet": {"shortest_edge": 64}, "vit": {"height": 64, "width": 64}}[name]
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    open(f"{name}/preprocessor_config.json", "w").write(json.dumps(config))
"""
PHOTOS = """
from pathlib import Path
import numpy as np
from PIL import Image
generator = np.random.default_rng(0)
lines = []
for c in range(1, 9):
    for i in range(8):
        pixels = generator.integers(0, 256, (96, 128, 3), np.uint8)
        path = Path("photos", f"class{c}", f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        label = c if c < 5 else 100 + c  # of CUB, 1 to 100 are to train
        path = Path("cub/CUB_200_2011/images", f"{label}.bird", f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        lines.append((f"{label}.bird/{i}.jpg", label))
base = Path("cub/CUB_200_2011")
(base / "images.txt").write_text("".join(f"{n} {p}\\n" for n, (p, _) in enumerate(lines, 1)))
(base / "image_class_labels.txt").write_text(
    "".join(f"{n} {c}\\n" for n, (_, c) in enumerate(lines, 1)))
"""


def create_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def train(python: Path, work: Path, arguments: list[str]) -> tuple[int, str, float, float]:
    """Run train.py. Return its exit code, its output, seconds and the peak memory in MiB."""
    data = CUB if "--protocol" in arguments else FOLDER
    command = [python, ROOT / "examples" / "train.py", *arguments, *data, *COMMON]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    return os.waitstatus_to_exitcode(status), output, seconds, usage.ru_maxrss / 1024


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        python = (
            Path(sys.argv[1]) if len(sys.argv) > 1 else create_environment(work / "environment")
        )
        for code in (MODELS, PHOTOS):
            subprocess.run([python, "-c", code], cwd=work, check=True)
        for arguments in RUNS:
            code, output, seconds, memory = train(python, work, arguments)
            title = " ".join(arguments)
            rate = re.search(r"([\d,]+) samples/s", output)
            if code or not rate:
                failures += 1
                print(f"FAILED {title}\n{output}")
            else:
                print(
                    f"{title}: {seconds:.1f} s, {rate[1]} samples/s, {memory:,.0f} MiB", flush=True
                )
        for arguments, message in ERRORS:
            code, output, *_ = train(python, work, arguments)
            *_, line = output.strip().splitlines() or [""]
            if code != 2 or message not in line:
                failures += 1
                print(f"FAILED {' '.join(arguments)}: expected {message!r} in:\n{output}")
            else:
                print(line)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
