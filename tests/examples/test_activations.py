"""Cached activations: the same training as without a cache, and no activations of others."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import activations
import checkpoint
import cli
import numpy as np
import pytest
import torch
import train
import trunks
from images import UserError
from PIL import Image
from samples import Samples
from torch import nn
from transforms import Transform

CPU = torch.device("cpu")


def jpegs(count=12):
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


@pytest.fixture
def samples():
    transform = Transform(16, (0.5,) * 3, (0.5,) * 3, 0.9, 0.16, mirror=True, random=True)
    return Samples(jpegs(), [0, 1] * 6, ["a", "b"], transform)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def cached(samples, tmp_path, net=None, workers=0):
    return activations.cache(samples, net or network(), tmp_path, CPU, workers)


def test_activations_are_those_of_the_network(samples, tmp_path):
    result = cached(samples, tmp_path)
    assert (len(result), result.labels, result.names) == (12, samples.labels, ["a", "b"])
    assert result.activations.shape == (12, 2, 4, 14, 14)
    assert result.activations.dtype == np.float16
    plain = replace(samples, transform=replace(samples.transform, random=False))
    testing = replace(result, transform=plain.transform)
    for index in (0, 7):
        with torch.no_grad():
            image = plain[index][0]
            expected, mirrored = network()(torch.stack([image, image.flip(2)]))
        activation, label = testing[index]
        assert activation.dtype == torch.float32
        assert torch.allclose(activation, expected, atol=2e-3)
        assert label == samples.labels[index]
        drawn = [result[index][0] for _ in range(40)]
        is_mirrored = [torch.allclose(x, mirrored, atol=2e-3) for x in drawn]
        assert 5 < sum(is_mirrored) < 35
        assert all(
            flipped or torch.equal(x, activation)
            for x, flipped in zip(drawn, is_mirrored, strict=True)
        )


def test_test_samples_have_one_view(samples, tmp_path):
    testing = replace(samples, transform=replace(samples.transform, random=False))
    assert cached(testing, tmp_path).activations.shape[1] == 1


def test_activations_are_computed_once(samples, tmp_path, monkeypatch):
    first = cached(samples, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(activations, "compute", None)  # a second call would fail
    again = cached(samples, tmp_path)
    assert np.array_equal(first.activations, again.activations)


def test_other_networks_images_and_sizes_have_other_activations(samples, tmp_path):
    transform, files = samples.transform, samples.source
    other_weights = network()
    other_weights[1].running_mean += 0.1
    variants = [
        (samples, network()),
        (samples, network(1)),
        (samples, other_weights),
        (samples, nn.Sequential(*network()[:2], nn.ReLU6()).eval()),
        (replace(samples, transform=replace(transform, size=12)), network()),
        (replace(samples, transform=replace(transform, mean=(0.4,) * 3)), network()),
        (replace(samples, transform=replace(transform, mirror=False)), network()),
        (replace(samples, source=[files[1], files[0], *files[2:]]), network()),
        (samples.subset(range(6)), network()),
    ]
    for number, (variant, net) in enumerate(variants, 1):
        cached(variant, tmp_path, net)
        assert len(list(tmp_path.iterdir())) == number
    relabeled = replace(samples, labels=[1, 0] * 6)
    assert cached(relabeled, tmp_path).labels == [1, 0] * 6
    assert len(list(tmp_path.iterdir())) == len(variants)  # labels do not matter


class Scaled(nn.Module):
    factor = 1.0

    def forward(self, x):
        return self.factor * x


def test_a_changed_function_is_noticed(samples, monkeypatch):
    before = activations.fingerprint(samples, Scaled())
    assert activations.fingerprint(samples, Scaled()) == before
    monkeypatch.setattr(Scaled, "factor", -1.0)
    assert activations.fingerprint(samples, Scaled()) != before


def test_a_changed_image_file_is_noticed(samples, tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(12)]
    for path, content in zip(paths, samples.source, strict=True):
        path.write_bytes(content)
    files = replace(samples, source=paths)
    before = activations.fingerprint(files, network())
    paths[3].write_bytes(samples.source[4])
    assert activations.fingerprint(files, network()) != before


def test_workers_give_the_same_activations(samples, tmp_path):
    one = cached(samples, tmp_path / "one").activations
    assert np.array_equal(one, cached(samples, tmp_path / "two", workers=2).activations)


def test_an_interrupted_computation_leaves_no_cache(samples, tmp_path):
    broken = replace(samples, source=[*samples.source[:-1], b"not an image"])
    with pytest.raises(UserError, match="cannot read the image of 12 bytes"):
        cached(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_torn_file_is_one_clear_error(samples, tmp_path):
    cached(samples, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"cannot read the cached activations; delete {path}"):
        cached(samples, tmp_path)


def test_activations_beyond_float16(samples, tmp_path):
    class Huge(nn.Module):
        def forward(self, x):
            return 1e6 * x

    with pytest.raises(UserError, match="activations exceed float16; choose another block"):
        cached(samples, tmp_path, Huge())


def test_a_full_disk(samples, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=3 << 20)
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda _: usage)
    activations.check_space(tmp_path, 3 << 20)
    with pytest.raises(UserError, match="the activations take 4 MiB; 3 MiB are free"):
        activations.check_space(tmp_path, 4 << 20)


# ---- In train.py


@pytest.fixture
def folder(tmp_path):
    for c in range(6):
        for i in range(8):
            path = tmp_path / "data" / f"class{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng((c, i)).integers(0, 120, (24, 24, 3), np.uint8)
            Image.fromarray(noise + np.uint8(20 * c)).save(path)
    return tmp_path / "data"


def run(folder, out, *arguments, code=0):
    command = ["--dataset", "folder", "--data-root", folder, "--trunk", "efficientnet_lite0"]
    command += ["--image-size", "32", "--epochs", "2", "--loss", "triplet", "--workers", "0"]
    command += ["--batch-size", "6", "--samples-per-class", "2", "--embedding-size", "8"]
    command += ["--cache-dir", folder.parent / "cache", "--freeze-norm", "--overwrite"]
    assert cli.call(train.run, [*map(str, command), "--out", str(out), *arguments]) == code
    return out.exists() and json.loads((out / "results.json").read_text())


def trunk_weights(out):
    return checkpoint.load(out / "best.pt")["models"]["trunk"]


def test_training_from_a_cache_changes_only_the_last_blocks(folder, tmp_path):
    out = tmp_path / "run"
    results = run(folder, out, "--cache", "blocks.14", "--rerank")
    assert set(results["re-ranked"]) == set(results["after"])
    pretrained = trunks.build("efficientnet_lite0", 3, 32).network.state_dict()
    trained = trunk_weights(out)
    assert trained.keys() == pretrained.keys()
    changed = {key for key in trained if not torch.equal(trained[key], pretrained[key])}
    assert changed
    assert all(key.startswith(("blocks.14", "blocks.15", "head")) for key in changed)
    assert not any("running" in key or "num_batches" in key for key in changed)
    # The weights are those of the whole network.
    network = trunks.build("efficientnet_lite0", 3, 32, random_weights=True).network
    network.load_state_dict(trained)
    again = run(folder, tmp_path / "again", "--cache", "blocks.14")
    assert again["history"] == results["history"]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # to train, validate and test


def test_the_cache_and_the_whole_network_agree_before_training(folder, tmp_path):
    with_cache = run(folder, tmp_path / "one", "--cache", "head", "--epochs", "1")
    without = run(folder, tmp_path / "two", "--train-from", "head", "--epochs", "1")
    assert with_cache["before"] == without["before"]


def test_train_from_leaves_the_first_blocks(folder, tmp_path):
    out = tmp_path / "run"
    run(folder, out, "--train-from", "blocks.15", "--amp")
    pretrained = trunks.build("efficientnet_lite0", 3, 32).network.state_dict()
    changed = {k for k, v in trunk_weights(out).items() if not torch.equal(v, pretrained[k])}
    assert changed
    assert all(key.startswith(("blocks.15", "head")) for key in changed)


def test_freeze_trunk_trains_the_embedder(folder, tmp_path):
    out = tmp_path / "run"
    results = run(folder, out, "--freeze-trunk")
    pretrained = trunks.build("efficientnet_lite0", 3, 32).network.state_dict()
    assert all(torch.equal(value, pretrained[key]) for key, value in trunk_weights(out).items())
    assert results["history"][1]["loss"] > 0


def test_frozen_statistics(folder, tmp_path):
    """Without --freeze-norm, batch normalization follows the batches; frozen blocks do not."""
    out = tmp_path / "run"
    command = ["--dataset", "folder", "--data-root", folder, "--trunk", "efficientnet_lite0"]
    command += ["--image-size", "32", "--epochs", "1", "--loss", "triplet", "--workers", "0"]
    command += ["--batch-size", "6", "--samples-per-class", "2", "--train-from", "head"]
    assert cli.call(train.run, [*map(str, command), "--out", str(out)]) == 0
    pretrained = trunks.build("efficientnet_lite0", 3, 32).network.state_dict()
    moved = {k for k, v in trunk_weights(out).items() if not torch.equal(v, pretrained[k])}
    assert "head.1.running_mean" in moved
    assert all(key.startswith("head") for key in moved)


def test_resuming_from_a_cache_is_exact(folder, tmp_path):
    options = ["--cache", "blocks.15", "--schedule", "cosine", "--warmup", "1", "--epochs", "3"]
    whole = run(folder, tmp_path / "whole", *options)
    original = checkpoint.save_run

    def stop(path, state, *arguments):
        original(path, state, *arguments)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_run", stop)
        command = ["--dataset", "folder", "--data-root", folder, "--trunk", "efficientnet_lite0"]
        command += ["--image-size", "32", "--loss", "triplet", "--workers", "0"]
        command += ["--batch-size", "6", "--samples-per-class", "2", "--embedding-size", "8"]
        command += ["--cache-dir", folder.parent / "cache", "--freeze-norm", *options]
        command = [*map(str, command), "--out", str(tmp_path / "parts")]
        assert cli.call(train.run, command) == 130
    assert cli.call(train.run, [*command, "--resume"]) == 0
    parts = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert parts["history"] == whole["history"]
    assert parts["after"] == whole["after"]


def test_a_block_that_does_not_exist(folder, tmp_path, capsys):
    run(folder, tmp_path / "run", "--cache", "layer4", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the network has no block layer4: layer4 is none of stem, blocks, head" in line
