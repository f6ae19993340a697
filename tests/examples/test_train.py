"""train.py as a user runs it: its results and figures, resuming, and its error messages."""

import csv
import json
import subprocess
import sys

import checkpoint
import cli
import figures
import loaders
import methods
import metrics
import numpy as np
import pytest
import torch
import train
import trunks
from PIL import Image
from pytorch_metric_learning.losses import SmoothAPLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from samples import Data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pml_extras.label_noise import LabelNoiseDetector

FILES = [
    "best.pt",
    "checkpoint.pt",
    "curves.png",
    "logs",
    "map.png",
    "results.json",
    "retrieval.png",
    "similarities.png",
]
DRAWN = ("training_curves", "retrieval_board", "embedding_map", "similarity_distributions")
DRAW = {name: getattr(figures, name) for name in DRAWN}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Use a tenth of the digits and draw no figures, so that a run takes a second."""
    load_digits = loaders.digits

    def load_few_digits():
        data = load_digits()
        train_set = data.train.subset(range(0, len(data.train), 10))
        return Data(train_set, data.test.subset(range(0, 896, 8)))

    monkeypatch.setattr(loaders, "digits", load_few_digits)
    for figure in DRAW:
        monkeypatch.setattr(figures, figure, lambda path, *arguments: path.touch())


def call(out, *arguments):
    return cli.call(train.run, ["--out", str(out), *map(str, arguments)])


def run(out, *arguments, epochs=2):
    assert call(out, "--epochs", epochs, *arguments) == 0
    return json.loads((out / "results.json").read_text())


def error_line(capsys, out, *arguments):
    """The one line that an invalid command prints. It must write nothing."""
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    assert call(out, *arguments) == 2
    assert before == (sorted(out.rglob("*")) if out.exists() else None)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


def logged(out):
    """The CSV files and the TensorBoard scalars of a run."""
    tables = {path.name: path.read_text() for path in (out / "logs").glob("*.csv")}
    events = EventAccumulator(str(out / "logs" / "tensorboard")).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert tables
    assert scalars
    return tables, scalars


def assert_same_state(left, right):
    """Equal tensors, bit for bit, and equal other values."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"seconds"}:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    else:
        assert left == right


# ---- Results


def test_run_writes_results_and_figures(tmp_path, monkeypatch, capsys):
    for figure, draw in DRAW.items():
        monkeypatch.setattr(figures, figure, draw)
    results = run(tmp_path / "run", epochs=1)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    assert results["config"]["loss"] == "contextual"
    assert results["config"]["dataset"] == "digits"
    assert results["best_epoch"] == 1
    assert results["seconds"] > 0
    assert set(results["versions"]) == {"python", "torch", "pytorch_metric_learning", "pml_extras"}
    for when in ("before", "after"):
        assert set(results[when]) == set(metrics.METRICS)
        assert all(0 < value <= 1 for value in results[when].values())
    for path in (tmp_path / "run").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # not blank
    printed = capsys.readouterr().out
    for metric in ("precision_at_1", "r_precision", "mean_average_precision_at_r"):
        label, before = metrics.METRICS[metric], results["before"][metric]
        after = results["after"][metric]
        assert f"  {label:14}{before:10.3f}{after:10.3f}{after - before:+10.3f}\n" in printed
    assert printed.rstrip().endswith(str(tmp_path / "run" / "retrieval.png"))


def test_a_figure_that_fails_costs_neither_results_nor_other_figures(tmp_path, monkeypatch, capsys):
    def fail(path, *arguments):
        assert (path.parent / "results.json").is_file()
        raise UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")

    monkeypatch.setattr(figures, "retrieval_board", fail)
    results = run(tmp_path / "run", epochs=1)
    assert results["after"]["precision_at_1"] > 0
    assert (tmp_path / "run" / "map.png").is_file()
    printed = capsys.readouterr()
    assert "could not draw retrieval.png: UnicodeEncodeError: 'utf-8' codec" in printed.err
    assert printed.out.rstrip().endswith("similarities.png")


def test_a_run_that_failed_in_its_first_epoch_does_not_block_a_rerun(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricLossOnly, "forward_and_backward", stop)
        assert call(out, "--epochs", 1) == 130
    (out / "checkpoint.pt.part").write_bytes(b"torn")
    assert len(run(out, "--seed", 3, epochs=1)["history"]) == 2
    assert call(out, "--epochs", 1) == 2  # this one would be lost
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "checkpoint.pt.part").write_bytes(b"torn")
    run(tmp_path / "torn", epochs=1)


def test_log_has_each_epoch(tmp_path):
    history = run(tmp_path / "run", epochs=3)["history"][1:]
    tables, scalars = logged(tmp_path / "run")
    rows = list(csv.DictReader(tables["epochs.csv"].splitlines()))
    assert len(rows) == 3
    for key, value in history[0].items():
        assert [float(row[key]) for row in rows] == [row[key] for row in history]
        assert [step for step, _ in scalars[f"epochs/{key}"]] == [1, 2, 3]
        assert scalars[f"epochs/{key}"][0][1] == pytest.approx(value)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--loss", name] for name in methods.LOSSES),
        *(["--loss", "triplet", "--miner", name] for name in methods.MINERS),
        ["--loss", "contextual", "--miner", "contextual"],
        ["--loss", "contextual", "--interfere"],
        ["--loss", "center_contrastive", "--interfere", "0.2"],
        ["--loss", "contrastive", "--distill", "snapshot"],
        ["--loss", "proxy_anchor", "--distill", "ema"],
        ["--loss", "triplet", "--miner", "contextual", "--interfere", "--distill", "ema", "--amp"],
        ["--loss", "contextual", "--amp", "--label-noise", "0.3"],
    ],
    ids=" ".join,
)
def test_every_method_trains(tmp_path, arguments):
    results = run(tmp_path / "run", *arguments)
    assert len(results["history"]) == 3
    assert all(np.isfinite(row["loss"]) for row in results["history"][1:])
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    torch.manual_seed(0)
    untrained = trunks.small(1, 8).state_dict()
    trained = {k.removeprefix("module."): v for k, v in state["models"]["trunk"].items()}
    assert not torch.equal(trained["0.weight"], untrained["0.weight"])


def test_label_issues_are_reported(tmp_path, capsys):
    out = tmp_path / "run"
    results = run(out, "--loss", "contrastive", "--label-noise", "0.2", "--check-labels", epochs=3)
    issues = results["label_issues"]
    assert issues["precision"] > 0.9  # 0.2 by chance
    assert issues["recall"] > 0.7
    assert f"precision {issues['precision']:.3f}, recall" in capsys.readouterr().out
    with open(out / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["is_issue"] == "1" for row in rows) == issues["count"]
    assert (out / "labels.png").stat().st_size > 10_000
    run(out, "--overwrite", epochs=1)
    assert not (out / "labels.csv").exists()


def test_images_with_label_issues_are_dropped(tmp_path, monkeypatch):
    drawn = []

    def draw(sampler):
        indices = list(original(sampler))
        drawn.append(indices)
        return iter(indices)

    original = MPerClassSampler.__iter__
    monkeypatch.setattr(MPerClassSampler, "__iter__", draw)
    arguments = ["--loss", "ntxent", "--label-noise", "0.3", "--drop-label-issues"]
    run(tmp_path / "run", *arguments, epochs=1)
    detector = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["detector"]
    is_issue = (detector["scores"] < 1) & (detector["vote_margins"] < 0)
    issues = set(is_issue.nonzero().flatten().tolist())
    assert issues & set(drawn[-1])
    run(tmp_path / "run", *arguments, "--resume", epochs=2)
    assert len(drawn) == 2
    assert not issues & set(drawn[-1])


def test_a_class_with_only_label_issues_is_kept():
    labels = torch.tensor([0, 0, 0, 1, 1])
    detector, sampler = LabelNoiseDetector(labels, num_neighbors=2), MPerClassSampler(labels, 2)
    for scores, expected in {
        (2.0, 0.5, 1.0, 0.0, 0.9): {0: [0, 2], 1: [3, 4]},  # all of class 1 are label issues
        (2.0, 2.0, 1.0, 0.0, 3.0): {0: [0, 1, 2], 1: [4]},
    }.items():
        detector.scores = torch.tensor(scores)
        detector.vote_margins = detector.scores - 1
        methods.drop_label_issues(sampler, detector)
        assert {k: v.tolist() for k, v in sampler.labels_to_indices.items()} == expected


@pytest.mark.parametrize("loss", ["center_contrastive", "proxy_anchor"])
def test_a_loss_with_parameters_trains_them(tmp_path, loss):
    run(tmp_path / "run", "--loss", loss, epochs=1)
    one = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["loss_funcs"]["metric_loss"]
    run(tmp_path / "run", "--loss", loss, "--resume", epochs=2)
    two = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["loss_funcs"]["metric_loss"]
    name = "centers" if loss == "center_contrastive" else "proxies"
    assert not torch.equal(one[name], two[name])


def test_the_best_epoch_is_kept(tmp_path):
    results = run(tmp_path / "run", epochs=4)
    rows = results["history"][1:]
    best = max(rows, key=lambda row: row[metrics.PRIMARY_METRIC])
    assert results["best_epoch"] == best["epoch"]
    state = checkpoint.load(tmp_path / "run" / "best.pt")
    trunk, embedder = trunks.small(1, 8).eval(), torch.nn.Linear(256, 64).eval()
    trunk.load_state_dict(state["models"]["trunk"])
    embedder.load_state_dict(state["models"]["embedder"])
    data = loaders.digits().test
    with torch.no_grad():
        images = torch.stack([data[i][0] for i in range(len(data))])
        embeddings = torch.nn.functional.normalize(embedder(trunk(images)))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    labels = torch.tensor(data.labels)
    precision = (labels[similarity.argmax(1)] == labels).double().mean().item()
    assert results["after"]["precision_at_1"] == pytest.approx(precision)


def test_smooth_ap_of_pml_needs_square_batches():
    """The reason for the check of `--loss smooth_ap`. If this fails, PML has fixed the bug."""
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(32, 8))
    similarity = embeddings @ embeddings.T

    def smooth_ap_loss(classes, m):
        labels, precisions = torch.arange(classes).repeat_interleave(m), []
        for i in range(classes * m):
            above = torch.sigmoid((similarity[i] - similarity[i][:, None]) / 0.01)
            above.fill_diagonal_(0)
            same = labels == labels[i]
            ranks = (1 + above[same][:, same].sum(1)) / (1 + above[same].sum(1))
            precisions.append(ranks.mean())
        return 1 - torch.stack(precisions).mean()

    labels = torch.arange(8).repeat_interleave(4)
    assert SmoothAPLoss()(embeddings, labels).item() == pytest.approx(smooth_ap_loss(4, 8).item())
    assert smooth_ap_loss(4, 8).item() != pytest.approx(smooth_ap_loss(8, 4).item(), rel=1e-3)


# ---- Reproducibility and resuming


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss", "contextual"],
        ["--loss", "proxy_anchor", "--label-noise", "0.2"],
        ["--loss", "contrastive", "--label-noise", "0.2", "--check-labels"],
        ["--loss", "ntxent", "--label-noise", "0.2", "--drop-label-issues"],
        ["--loss", "center_contrastive_ema", "--amp"],
        ["--loss", "contrastive", "--distill", "snapshot"],
        ["--loss", "triplet", "--distill", "ema", "--interfere", "--miner", "contextual"],
    ],
    ids=" ".join,
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, arguments):
    whole = run(tmp_path / "whole", *arguments, epochs=3)

    def stop_in_epoch(epoch):
        """Stop the run in the middle of this epoch."""

        def forward_and_backward(trainer):
            if trainer.epoch == epoch and trainer.iteration == 1:
                raise KeyboardInterrupt
            original(trainer)

        original = MetricLossOnly.forward_and_backward
        monkeypatch.setattr(MetricLossOnly, "forward_and_backward", forward_and_backward)
        resume = ["--resume"] if (tmp_path / "parts").exists() else []
        assert call(tmp_path / "parts", "--epochs", 3, *arguments, *resume) == 130
        monkeypatch.setattr(MetricLossOnly, "forward_and_backward", original)
        torch.manual_seed(99)  # a new process starts from another state
        np.random.seed(99)

    stop_in_epoch(1)
    stop_in_epoch(2)
    stop_in_epoch(3)
    parts = run(tmp_path / "parts", *arguments, "--resume", epochs=3)
    left, right = (
        checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")
    )
    assert_same_state(left, right)
    for key in ("before", "after", "best_epoch", "history", "label_issues"):
        assert whole.get(key) == parts.get(key)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_a_finished_run_continues_with_more_epochs(tmp_path):
    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "parts", epochs=1)
    parts = run(tmp_path / "parts", "--resume", epochs=3)
    assert whole["history"] == parts["history"]


@pytest.mark.parametrize("saves", [False, True], ids=["before saving", "after saving"])
def test_log_is_complete_if_stopped_at_the_checkpoint(tmp_path, monkeypatch, saves):
    run(tmp_path / "whole", epochs=2)
    original = checkpoint.save

    def stop_in_second_epoch(path, content):
        if saves or content["epoch"] < 2:
            original(path, content)
        if content["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop_in_second_epoch)
    assert call(tmp_path / "parts", "--epochs", 2) == 130
    monkeypatch.setattr(checkpoint, "save", original)
    run(tmp_path / "parts", "--resume", epochs=2)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    one, two = (run(tmp_path / name, "--seed", 5, epochs=1) for name in ("one", "two"))
    other = run(tmp_path / "other", "--seed", 6, epochs=1)
    assert one["history"] == two["history"]
    assert one["history"] != other["history"]


def test_overwrite_starts_a_new_run(tmp_path):
    run(tmp_path / "run", "--loss", "triplet", epochs=2)
    results = run(tmp_path / "run", "--overwrite", epochs=1)
    assert len(results["history"]) == 2
    assert results["config"]["loss"] == "contextual"


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1}


# ---- Errors: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "magic"], "invalid choice: 'magic'"),
        (["--epochs", "0"], "--epochs: 0 is not at least 1"),
        (["--epochs", "ten"], "--epochs: invalid int value: 'ten'"),
        (["--label-noise", "1"], "--label-noise: 1 is not at least 0 and below 1"),
        (["--interfere", "0.5"], "--interfere: 0.5 is not at least 0 and below 0.5"),
        (["--device", "cuda:99"], "--device cuda:99:"),
        (["--device", "abacus"], "--device abacus:"),
        (["--batch-size", "30", "--samples-per-class", "4"], "30 is not a multiple of"),
        (["--batch-size", "4", "--samples-per-class", "4"], "holds 1 class of 4 images"),
        (
            ["--batch-size", "400", "--samples-per-class", "4"],
            "takes 100 classes; there are 40",
        ),
        (["--batch-size", "640", "--samples-per-class", "16"], "more than the 5"),
        (
            ["--loss", "smooth_ap", "--batch-size", "32", "--samples-per-class", "4"],
            "--batch-size 16",
        ),
        (["--dataset", "cub"], "--dataset cub needs --data-root DIR, or PML_EXTRAS_DATA"),
        (["--dataset", "cub", "--data-root", "/no/such/place"], "no directory /no/such/place"),
        (["--image-size", "32"], "--image-size: digits has a fixed size"),
        (["--download"], "nothing to download for --dataset digits"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--cache", ""], "--cache: the name of the block is empty"),
        (["--freeze-trunk", "--train-from", "3"], "exclude each other"),
        (["--warmup", "20"], "--warmup 20 is not below --epochs 20"),
        (["--cache-dir", train.__file__], "--cache-dir: /"),
        (["--loss-options", "pos_margin"], "pos_margin is not NAME=VALUE"),
        (["--loss-options", "num_classes=3"], "num_classes follows from the other arguments"),
        (["--loss-options", "margin=0.1"], "--loss-options: TypeError: "),
        (["--loss-options", "pos_margin=high"], "--loss-options: "),
        (
            ["--loss", "ntxent", "--loss-options", "temperature=0"],
            "the loss of a random batch is nan",
        ),
        (["--resume"], "there is no run in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments(tmp_path, capsys, arguments, message):
    assert message in error_line(capsys, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, epochs=1)
    assert "--resume, --overwrite or another" in error_line(capsys, out)
    assert "--loss contextual, not triplet" in error_line(
        capsys, out, "--resume", "--loss", "triplet"
    )
    assert "--seed 0, not 1" in error_line(capsys, out, "--resume", "--seed", 1)
    run(out, "--resume", epochs=2)
    assert "the run has done 2" in error_line(capsys, out, "--resume", "--epochs", 1)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "report.txt").write_text("text")
    assert "is not empty" in error_line(capsys, tmp_path / "documents", "--overwrite")
    assert "is a file" in error_line(capsys, tmp_path / "documents" / "report.txt", "--overwrite")


def test_distillation_cannot_change_its_schedule(tmp_path, capsys):
    run(tmp_path / "run", "--distill", "ema", epochs=1)
    line = error_line(capsys, tmp_path / "run", "--distill", "ema", "--resume", "--epochs", 2)
    assert "--epochs 1, not 2" in line


def test_values_of_loss_options():
    values = {"1": 1, "0.5": 0.5, "false": False, "True": True, "None": None, "cosine": "cosine"}
    for text, value in values.items():
        args = cli.parse(["--loss-options", f"x={text}", "y=2"])
        assert args.loss_options == {"x": value, "y": 2}
        assert type(args.loss_options["x"]) is type(value)


def test_loss_options_reach_the_loss(tmp_path):
    one = run(tmp_path / "one", "--loss", "triplet", epochs=1)
    two = run(tmp_path / "two", "--loss", "triplet", "--loss-options", "margin=0.2", epochs=1)
    other = run(tmp_path / "other", "--loss", "triplet", "--loss-options", "margin=0.5", epochs=1)
    assert one["history"] == two["history"]
    assert one["history"] != other["history"]


def test_a_checkpoint_of_another_program(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    torch.save({"epoch": 3}, tmp_path / "run" / "checkpoint.pt")
    line = error_line(capsys, tmp_path / "run", "--resume")
    assert "checkpoint.pt is not a checkpoint of this script" in line


def test_a_broken_checkpoint(tmp_path, capsys):
    run(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "cannot read" in error_line(capsys, tmp_path / "run", "--resume", "--epochs", 1)


def test_data_root_from_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PML_EXTRAS_DATA", "/no/such/place")
    line = error_line(capsys, tmp_path / "run", "--dataset", "cub")
    assert "there is no directory /no/such/place (--data-root or PML_EXTRAS_DATA)" in line


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """In a process of its own: no progress bars or warnings in an error output that is a file."""
    command = [sys.executable, train.__file__, "--out", tmp_path / "run"]
    done = subprocess.run(
        [*command, "--lr", "1e30", "--loss", "triplet"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the loss became nan in epoch 1; try a lower --lr" in line
