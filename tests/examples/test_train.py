"""The main example, run as a user would: the pictures it leaves, its resume, its refusals."""

import csv
import json
import shutil

import checkpoint
import datasets
import figures
import numpy as np
import pytest
import torch
import train
from PIL import Image
from pytorch_metric_learning.losses import SmoothAPLoss

FILES = [
    "best.pt",
    "checkpoint.pt",
    "curves.png",
    "logs",
    "map.png",
    "results.json",
    "retrieval.png",
]

DRAW = {f: getattr(figures, f) for f in ("training_curves", "retrieval_board", "embedding_map")}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """A tenth of the digits, and no pictures but where they are looked at: a second a run."""
    everything = datasets.digits

    def some():
        data = everything()
        train_set = data.train.subset(range(0, len(data.train), 10))
        return datasets.Data(train_set, data.test.subset(range(0, 896, 8)), data.mirrored)

    monkeypatch.setattr(datasets, "digits", some)
    for figure in DRAW:
        monkeypatch.setattr(figures, figure, lambda path, *arguments: path.touch())


def run(out, *arguments, epochs=2):
    code = train.main(["--out", str(out), "--epochs", str(epochs), *map(str, arguments)])
    assert code == 0
    return json.loads((out / "results.json").read_text())


def refused(capsys, out, *arguments):
    """The one line that a refused command prints."""
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    assert train.main(["--out", str(out), *map(str, arguments)]) == 2
    assert before == (sorted(out.rglob("*")) if out.exists() else None)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


def assert_same_state(left, right):
    """The same tensors, bit for bit, and the same everything else."""
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


# ---- What a run leaves behind.


def test_run_leaves_results_and_pictures(tmp_path, monkeypatch, capsys):
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
        assert set(results[when]) == set(figures.METRICS)
        assert all(0 < value <= 1 for value in results[when].values())
    for path in results["figures"].values():
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something was drawn
    printed = capsys.readouterr().out
    for metric in ("precision_at_1", "r_precision", "mean_average_precision_at_r"):
        label, before = figures.METRICS[metric], results["before"][metric]
        after = results["after"][metric]
        assert f"  {label:14}{before:8.3f}{after:8.3f}{after - before:+9.3f}\n" in printed
    assert printed.rstrip().endswith(results["figures"]["map"])
    assert list((tmp_path / "run" / "logs" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--loss", name] for name in train.LOSSES),
        *(["--loss", "triplet", "--miner", name] for name in train.MINERS),
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
    untrained = train.build_trunk(1, 8).state_dict()
    trained = {k.removeprefix("module."): v for k, v in state["models"]["trunk"].items()}
    assert not torch.equal(trained["0.weight"], untrained["0.weight"])


def test_labels_are_checked(tmp_path, capsys):
    out = tmp_path / "run"
    results = run(out, "--loss", "contrastive", "--label-noise", "0.2", "--check-labels", epochs=3)
    found = results["labels"]
    assert found["precision"] > 0.9  # and chance is 0.2
    assert found["recall"] > 0.7
    assert f"precision {found['precision']:.3f}, recall" in capsys.readouterr().out
    with open(out / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["is_issue"] == "1" for row in rows) == found["distrusted"]
    assert (out / "labels.png").stat().st_size > 10_000
    run(out, "--overwrite", epochs=1)
    assert not (out / "labels.csv").exists()


def test_distrusted_labels_are_left_out(tmp_path, monkeypatch):
    drawn = []

    def draw(sampler):
        indices = list(original(sampler))
        drawn.append(indices)
        return iter(indices)

    original = train.MPerClassSampler.__iter__
    monkeypatch.setattr(train.MPerClassSampler, "__iter__", draw)
    arguments = ["--loss", "ntxent", "--label-noise", "0.3", "--leave-out"]
    run(tmp_path / "run", *arguments, epochs=1)
    trust = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["trust"]
    distrusted = set((trust["scores"] < 1).nonzero().flatten().tolist())
    assert distrusted & set(drawn[-1])
    run(tmp_path / "run", *arguments, "--resume", epochs=2)
    assert len(drawn) == 2
    assert not distrusted & set(drawn[-1])


def test_a_class_of_distrusted_labels_keeps_them():
    labels = torch.tensor([0, 0, 0, 1, 1])
    trust, sampler = (
        train.LabelNoiseDetector(labels, num_neighbors=2),
        train.MPerClassSampler(labels, 2),
    )
    for support, expected in {
        (2.0, 0.5, 1.0, 0.0, 0.9): {0: [0, 2], 1: [3, 4]},  # a class with none left keeps all
        (2.0, 2.0, 1.0, 0.0, 3.0): {0: [0, 1, 2], 1: [4]},
    }.items():
        trust.scores = torch.tensor(support)
        train.leave_out(sampler, trust)
        assert {k: v.tolist() for k, v in sampler.labels_to_indices.items()} == expected


@pytest.mark.parametrize("loss", ["center_contrastive", "proxy_anchor"])
def test_a_loss_with_parameters_trains_them(tmp_path, loss):
    run(tmp_path / "run", "--loss", loss, epochs=1)
    one = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["loss_funcs"]["metric_loss"]
    run(tmp_path / "run", "--loss", loss, "--resume", epochs=2)
    two = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["loss_funcs"]["metric_loss"]
    bank = "centers" if loss == "center_contrastive" else "proxies"
    assert not torch.equal(one[bank], two[bank])


def test_the_best_epoch_is_kept(tmp_path):
    results = run(tmp_path / "run", epochs=4)
    rows = results["history"][1:]
    best = max(rows, key=lambda row: row[train.PRIMARY])
    assert results["best_epoch"] == best["epoch"]
    state = checkpoint.load(tmp_path / "run" / "best.pt")
    trunk, embedder = train.build_trunk(1, 8).eval(), train.build_embedder(64).eval()
    trunk.load_state_dict(state["models"]["trunk"])
    embedder.load_state_dict(state["models"]["embedder"])
    data = datasets.digits().test
    with torch.no_grad():
        images = torch.stack([data[i][0] for i in range(len(data))])
        embeddings = torch.nn.functional.normalize(embedder(trunk(images)))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    labels = torch.tensor(data.labels)
    precision = (labels[similarity.argmax(1)] == labels).double().mean().item()
    assert results["after"]["precision_at_1"] == pytest.approx(precision)


def test_amp_hands_float32_to_the_loss():
    network = train.Bfloat16(torch.nn.Linear(8, 4))
    embeddings = network(torch.randn(3, 8))
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, embeddings.bfloat16().float())  # computed in bfloat16


def test_smooth_ap_of_pml_needs_square_batches():
    """Why `--loss smooth_ap` refuses other batches; if this fails, PML has mended it."""
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


# ---- The same seed, the same run; stopped and resumed, the same run.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss", "contextual"],
        ["--loss", "proxy_anchor", "--label-noise", "0.2"],
        ["--loss", "contrastive", "--label-noise", "0.2", "--check-labels"],
        ["--loss", "ntxent", "--label-noise", "0.2", "--leave-out"],
        ["--loss", "center_contrastive_average", "--amp"],
        ["--loss", "contrastive", "--distill", "snapshot"],
        ["--loss", "triplet", "--distill", "ema", "--interfere", "--miner", "contextual"],
    ],
    ids=" ".join,
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, arguments):
    whole = run(tmp_path / "whole", *arguments, epochs=3)

    def stop_in_epoch(epoch):
        """As if the machine had gone in the middle of this epoch."""

        def forward_and_backward(trainer):
            if trainer.epoch == epoch and trainer.iteration == 1:
                raise KeyboardInterrupt
            original(trainer)

        original = train.MetricLossOnly.forward_and_backward
        monkeypatch.setattr(train.MetricLossOnly, "forward_and_backward", forward_and_backward)
        command = ["--out", str(tmp_path / "parts"), "--epochs", "3", *arguments]
        resume = ["--resume"] if (tmp_path / "parts").exists() else []
        assert train.main([*command, *resume]) == 130
        monkeypatch.setattr(train.MetricLossOnly, "forward_and_backward", original)
        torch.manual_seed(99)  # a new process starts from some other state
        np.random.seed(99)

    stop_in_epoch(1)
    stop_in_epoch(2)
    stop_in_epoch(3)
    parts = run(tmp_path / "parts", *arguments, "--resume", epochs=3)
    left, right = (
        checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")
    )
    assert_same_state(left, right)
    for key in ("before", "after", "best_epoch", "history", "labels"):
        assert whole.get(key) == parts.get(key)
    for name in (
        "loss_histories.csv",
        "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_VAL_vs_self.csv",
    ):
        whole_log, parts_log = (
            (tmp_path / d / "logs" / name).read_text() for d in ("whole", "parts")
        )
        assert whole_log == parts_log


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "parts", epochs=1)
    parts = run(tmp_path / "parts", "--resume", epochs=3)
    assert whole["history"] == parts["history"]


def test_logs_hold_each_epoch_once_after_a_stop_between_log_and_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "whole", epochs=2)
    original = checkpoint.save

    def stop_before_second_epoch_is_saved(path, state):
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        original(path, state)

    monkeypatch.setattr(checkpoint, "save", stop_before_second_epoch_is_saved)
    assert train.main(["--out", str(tmp_path / "parts"), "--epochs", "2"]) == 130
    monkeypatch.setattr(checkpoint, "save", original)
    run(tmp_path / "parts", "--resume", epochs=2)
    for log in (tmp_path / "whole" / "logs").glob("*.csv"):
        assert log.read_text() == (tmp_path / "parts" / "logs" / log.name).read_text()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    one, two = (run(tmp_path / name, "--seed", 5, epochs=1) for name in ("one", "two"))
    other = run(tmp_path / "other", "--seed", 6, epochs=1)
    assert one["history"] == two["history"]
    assert one["history"] != other["history"]


def test_overwrite_starts_afresh(tmp_path):
    run(tmp_path / "run", "--loss", "triplet", epochs=2)
    results = run(tmp_path / "run", "--overwrite", epochs=1)
    assert len(results["history"]) == 2
    assert results["config"]["loss"] == "contextual"


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1}


# ---- Refusals: one line, exit code 2, nothing written.


@pytest.mark.parametrize(
    ("arguments", "says"),
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
        (["--batch-size", "400", "--samples-per-class", "4"], "takes 100 classes; there are 40"),
        (["--batch-size", "640", "--samples-per-class", "16"], "more than the 5"),
        (
            ["--loss", "smooth_ap", "--batch-size", "32", "--samples-per-class", "4"],
            "--batch-size 16",
        ),
        (["--dataset", "cub"], "--dataset cub needs --data-root DIR"),
        (["--dataset", "cub", "--data-root", "/no/such/place"], "no directory /no/such/place"),
        (["--image-size", "32"], "--image-size is for image files"),
        (["--download"], "nothing to fetch for --dataset digits"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--resume"], "there is no run in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(tmp_path, capsys, arguments, says):
    assert says in refused(capsys, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_in_use_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, epochs=1)
    assert "--resume, --overwrite or another" in refused(capsys, out)
    assert "--loss contextual, not triplet" in refused(capsys, out, "--resume", "--loss", "triplet")
    assert "--seed 0, not 1" in refused(capsys, out, "--resume", "--seed", 1)
    run(out, "--resume", epochs=2)
    assert "it has done 2" in refused(capsys, out, "--resume", "--epochs", 1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    assert "is not empty" in refused(capsys, tmp_path / "thesis", "--overwrite")
    assert "is a file" in refused(capsys, tmp_path / "thesis" / "chapter1.tex", "--overwrite")


def test_distillation_cannot_change_its_schedule(tmp_path, capsys):
    run(tmp_path / "run", "--distill", "ema", epochs=1)
    line = refused(capsys, tmp_path / "run", "--distill", "ema", "--resume", "--epochs", 2)
    assert "--epochs 1, not 2" in line


def test_a_broken_checkpoint_is_refused(tmp_path, capsys):
    run(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "cannot read" in refused(capsys, tmp_path / "run", "--resume", "--epochs", 1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path / "run"), "--lr", "1e30", "--loss", "triplet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the loss became nan in epoch 1; try a lower --lr" in line
    shutil.rmtree(tmp_path / "run")
