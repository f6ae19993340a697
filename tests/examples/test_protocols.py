"""The papers' protocol, on a few images in the layout of each dataset."""

from __future__ import annotations

import json

import checkpoint
import cli
import methods
import protocols
import pytest
import report
import torch
import train
import trunks
from PIL import Image
from torch import nn


def make_cub(root):
    lines = [(c, f"{c:03}.Bird/{i}.jpg") for c in (1, 2, 100, 101, 200) for i in range(6)]
    base = root / "CUB_200_2011"
    for c, name in lines:
        path = base / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (c, 0, 0)).save(path)
    (base / "images.txt").write_text("".join(f"{n} {p}\n" for n, (_, p) in enumerate(lines, 1)))
    labels = "".join(f"{n} {c}\n" for n, (c, _) in enumerate(lines, 1))
    (base / "image_class_labels.txt").write_text(labels)


SMALL = [
    "--trunk",
    "efficientnet_lite0",
    "--image-size",
    "32",
    "--batch-size",
    "6",
    "--workers",
    "0",
]
SMALL += ["--samples-per-class", "2", "--embedding-size", "16", "--epochs", "3"]


def run(name, root, *arguments, code=0):
    command = ["--protocol", name, "--data-root", str(root), "--out", str(root / "run"), *SMALL]
    assert cli.call(train.run, [*command, *arguments]) == code
    return json.loads((root / "run" / "results.json").read_text()) if code == 0 else None


def test_settings_are_those_of_the_authors():
    args = cli.parse(["--protocol", "cars196", "--data-root", "x"])
    assert (args.dataset, args.lr, args.trunk_lr, args.weight_decay) == (
        "cars196",
        1.6e-4,
        8e-5,
        1e-4,
    )
    assert (args.epochs, args.batch_size, args.samples_per_class) == (80, 128, 4)
    assert (args.image_size, args.embedding_size) == (256, 512)
    assert (args.schedule, args.freeze_norm, args.init) == ("multistep", True, "random")
    assert [protocols.settings(n)["lr"] for n in ("cub", "sop", "inshop")] == [8e-5, 4e-5, 4e-5]
    args = cli.parse(["--protocol", "cub", "--epochs", "3", "--lr", "1", "--data-root", "x"])
    assert (args.epochs, args.lr, args.trunk_lr) == (3, 1, 4e-5)


def test_published_results_are_of_known_losses():
    for name in protocols.NAMES:
        assert protocols.PUBLISHED[name].keys() <= methods.LOSSES.keys()
        assert protocols.RECALL_AT[name][0] == 1


def test_a_run(tmp_path, capsys):
    make_cub(tmp_path)
    results = run("cub", tmp_path, "--loss", "contextual")
    printed = capsys.readouterr().out
    # All images of the training classes are used. There is no validation set, so the last epoch
    # is the result.
    assert "cub: 18 training samples of 3 classes, no validation samples" in printed
    assert results["history"][0] == {"epoch": 0}
    assert all(set(row) == {"epoch", "loss"} for row in results["history"][1:])
    assert results["best_epoch"] == 3
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    best = checkpoint.load(tmp_path / "run" / "best.pt")["models"]["trunk"]
    assert all(torch.equal(best[key], value) for key, value in saved["models"]["trunk"].items())
    expected = {"precision_at_1", "r_precision", "mean_average_precision_at_r"}
    assert set(results["after"]) == expected | {f"recall_at_{k}" for k in (1, 2, 4, 8)}
    header, _, row = (line for line in printed.splitlines() if line.startswith("| "))
    assert header.startswith("| dataset | loss | trunk | pixels | epochs | R@1 | R@2 | R@4 | R@8 |")
    recall = results["after"]["recall_at_1"]
    assert row.startswith(
        f"| cub | contextual | efficientnet_lite0 | 32 | 3 | {100 * recall:.1f} |"
    )
    assert row.endswith("| 68.7 (2210.01908, 256 pixels, 512-d, best test epoch) |")
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert min(image.size) > 300


def test_the_learning_rate_falls_in_steps(tmp_path):
    make_cub(tmp_path)
    run("cub", tmp_path)
    optimizers = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["optimizers"]
    assert optimizers["trunk_optimizer"]["param_groups"][0]["lr"] == pytest.approx(4e-5 * 0.027)
    assert optimizers["embedder_optimizer"]["param_groups"][0]["lr"] == pytest.approx(8e-5 * 0.027)


def test_queries_and_gallery_of_inshop(tmp_path):
    lines = []
    for item in range(8):
        for i in range(4):
            part = "train" if item < 4 else ("query" if i < 1 else "gallery")
            name = f"img/Dresses/id_{item:08}/0{i}_1_front.jpg"
            path = tmp_path / "Img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 30), (30 * item, 5 * i, 0)).save(path)
            lines.append(f"{name} id_{item:08} {part}")
    text = "\n".join(["32", "image_name item_id evaluation_status", *lines])
    (tmp_path / "list_eval_partition.txt").write_text(text)
    results = run("inshop", tmp_path)
    assert 0 <= results["after"]["recall_at_1"] <= results["after"]["recall_at_50"] == 1


def test_results_on_other_images_are_not_compared():
    after = {f"recall_at_{k}": 0.5 for k in (1, 2, 4, 8)}
    row = protocols.row("cars196", "contextual", "small", 160, after, 2, "only half of the images")
    assert row.endswith("best test epoch); not comparable: only half of the images |")
    assert protocols.row("cars196", "triplet", "small", 160, after, 2, "").endswith("| 50.0 | - |")


def test_another_dataset_is_refused(tmp_path, capsys):
    run("cub", tmp_path, "--dataset", "sop", code=2)
    assert "--protocol cub is for --dataset cub, not sop" in capsys.readouterr().err


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.avgpool, self.fc = (
            nn.Conv2d(3, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Identity(),
        )

    def forward(self, x):
        return self.fc(self.avgpool(self.conv(x)).flatten(1))


def test_resnets_get_the_pooling_of_the_authors():
    x = torch.randn(2, 3, 9, 9)
    for name in protocols.NAMES:
        network = ResNet()
        trunk = protocols.adapt(trunks.Trunk(network, 9, width=6), name)
        expected = network.conv(x)
        if name in ("cub", "cars196"):
            expected = nn.functional.layer_norm(expected.amax((2, 3)), (6,))
        else:
            expected = expected.mean((2, 3))
        assert torch.allclose(trunk.network(x), expected)
        assert trunk.center == pytest.approx(8 / 9)


def test_the_table_has_a_column_for_reranking(capsys):
    before = {"precision_at_1": 0.5, "recall_at_2": 0.6}
    accuracies = {"before": before, "after": before, "re-ranked": {"precision_at_1": 0.7}}
    report.print_table(accuracies)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == ["before", "after", "re-ranked", "change"]
    assert second.split() == ["precision@1", "0.500", "0.500", "0.700", "+0.000"]
    assert third.split() == ["recall@2", "0.600", "0.600", "+0.000"]
