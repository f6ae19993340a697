"""The papers' own protocol, on a few images in the layout of each dataset."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from datasets import Images, UserError
from PIL import Image

from benchmarks.evidence import protocol, records, run


def picture(path, label, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(label).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)


def cub(root):
    base, lines = root / "CUB_200_2011", []
    for c in (1, 2, 50, 100, 101, 150, 200):  # classes 1 to 100 are to train
        for i in range(6):
            lines.append((c, f"{c:03}.Bird/{i}.jpg"))
            picture(base / "images" / lines[-1][1], c)
    (base / "images.txt").write_text("".join(f"{n} {p}\n" for n, (_, p) in enumerate(lines, 1)))
    numbers = "".join(f"{n} {c}\n" for n, (c, _) in enumerate(lines, 1))
    (base / "image_class_labels.txt").write_text(numbers)


def cars196(root):
    (root / "names.csv").write_text("".join(f"Car {i}/x\n" for i in range(1, 197)))
    # The protocol pools the authors' parts. Classes 1 to 98 are to train.
    for part, numbers in (("train", range(4)), ("test", range(4, 6))):
        rows = [(c, f"{c}_{i}.jpg") for c in (1, 2, 97, 98, 99, 196) for i in numbers]
        for c, name in rows:
            picture(root / "car_data" / "car_data" / part / f"Car {c}-x" / name, c)
        lines = "".join(f"{name},1,2,3,4,{c}\n" for c, name in rows)
        (root / f"anno_{part}.csv").write_text(lines)


def sop(root):
    base = root / "Stanford_Online_Products"
    for part, classes in (("train", (1, 2, 3, 4)), ("test", (11, 12))):
        lines = ["image_id class_id super_class_id path"]
        for c in classes:
            for i in range(6):
                picture(base / "bicycle_final" / f"{c}_{i}.JPG", c)
                lines.append(f"{len(lines)} {c} 1 bicycle_final/{c}_{i}.JPG")
        (base / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")


LAYOUTS = {"cub": cub, "cars196": cars196, "sop": sop}
SMALL = ["--image-size", "16", "--batch-size", "8", "--epochs", "1", "--embedding-size", "8"]
SMALL += ["--workers", "0"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_prints_a_row_with_the_published_value(name, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"nets_of_{name}.py").write_text(
        "import torch\n"
        "def tiny():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),\n"
        "                               torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())\n"
    )
    LAYOUTS[name](tmp_path)
    results = tmp_path / "protocol.jsonl"
    command = ["--protocol", name, "--data-root", str(tmp_path), "--results", str(results)]
    command += [*SMALL, "--backbone", f"nets_of_{name}:tiny", "--method", "center_contrastive"]
    assert run.main(command) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    published = {"cub": "73.45", "cars196": "91.02", "sop": "83.1"}[name]
    assert row.startswith(f"| {name} | CCL | nets_of_{name}:tiny | 16 | ")
    assert f"{published} (2308.00458, ResNet-50)" in row
    (line,) = records.read(results)
    # All images of a class are equal, and those of two classes differ.
    assert line["test"]["precision_at_1"] == 1
    assert run.main([*command, "--seeds", "2"]) == 0  # the first seed is done
    assert [r["seed"] for r in records.read(results)] == [0, 1]
    assert "torchvision" not in sys.modules


def test_errors_name_the_problem(tmp_path, capsys):
    sop(tmp_path)
    command = ["--protocol", "sop", "--data-root", str(tmp_path), *SMALL]
    command += ["--results", str(tmp_path / "x.jsonl")]
    for more, message in (
        (["--backbone", "no_such_module:net"], "no_such_module"),
        (["--backbone", "torch.nn:Flatten", "--method", "triplet"], "triplet needs margin"),
        (["--batch-size", "64"], "there are 24 images"),
        (["--data-root", str(tmp_path / "none")], "no directory"),
    ):
        assert run.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"must be \(N, features\), got \(1, 3, 16, 16\)"):
        protocol.build("torch.nn:Identity", 16, 8)


def test_published_numbers_are_of_declared_methods():
    assert protocol.PUBLISHED.keys() <= protocol.METHODS.keys()
    for method, hparams in protocol.HPARAMS.items():
        assert protocol.METHODS[method].space.keys() <= hparams.keys()
    line = {"protocol": "cub", "method": "contextual", "backbone": "small", "image_size": 256}
    line["test"] = {"precision_at_1": 0.5, "map_at_r": 0.25}
    row = protocol.rows([line])[-1]
    assert "| 50.0 | 25.0 | 68.7 (256 pixels, 2210.01908, ResNet-50, 512-d); 71.9 (224" in row


def test_crops(tmp_path):
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (32, 64, 3))
    Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / "wide.png")
    images = Images([tmp_path / "wide.png"], [7], ["class"], 28)  # scaled to 32 x 64, its size
    center, label = protocol.Crops(images, random=False)[0]
    assert label == 7
    assert center.shape == (3, 28, 28)
    pixels = center[0] * protocol.STD[0] + protocol.MEAN[0]
    assert torch.allclose(pixels[0], torch.arange(18, 46) * 4 / 255, atol=1e-5)
    torch.manual_seed(0)
    crops = [protocol.Crops(images, random=True)[0][0] for _ in range(40)]
    steps = [float(crop[0, 0, 1] - crop[0, 0, 0]) for crop in crops]
    assert 8 < sum(step < 0 for step in steps) < 32  # about half are mirrored
    lefts = {round(float(min(crop[0, 0, 0], crop[0, 0, -1])), 3) for crop in crops}
    assert len(lefts) > 15
    broken = Images([tmp_path / "absent.png"], [0], ["class"], 28)
    with pytest.raises(UserError, match="cannot read the image"):
        protocol.Crops(broken, random=False)[0]
