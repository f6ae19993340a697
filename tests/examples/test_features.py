"""Heads on embeddings from anywhere, lists of files in CSV, packed images, and In-Shop."""

from __future__ import annotations

import csv
import io
import json

import cli
import loaders
import networks
import numpy as np
import pytest
import torch
import train
from images import UserError
from PIL import Image
from sklearn.decomposition import PCA


def embeddings(classes=8, per_class=12, width=16):
    """The last dimensions have the most noise."""
    generator = np.random.default_rng(0)
    labels = np.repeat([f"class {c}" for c in range(classes)], per_class)
    centers = generator.normal(size=(classes, width)).repeat(per_class, 0)
    noise = generator.normal(size=centers.shape) * np.linspace(0.2, 3, width)
    return (centers + noise).astype(np.float32), labels


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def run(tmp_path, file, *arguments, code=0):
    command = ["--features", file, "--out", tmp_path / "run", "--batch-size", "16"]
    command += ["--samples-per-class", "4", "--embedding-size", "8", "--epochs", "3"]
    assert cli.call(train.run, [*map(str, command), *arguments]) == code
    path = tmp_path / "run" / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_head_on_features(tmp_path, capsys):
    x, y = embeddings(classes=40)
    file = save(tmp_path / "x.npz", embeddings=x, labels=y)
    options = ["--loss", "multi_similarity", "--lr", "0.01", "--epochs", "10"]
    results = run(tmp_path, file, *options, "--rerank", "--check-labels")
    assert results["after"]["r_precision"] > results["before"]["r_precision"]
    assert set(results["re-ranked"]) == set(results["after"])
    printed = capsys.readouterr().out
    assert "features: 200 training samples of 20 classes, 40 validation samples" in printed
    assert "240 test samples of 20 unseen classes" in printed
    assert " features    before     after re-ranked    change\n" in printed
    assert "is missing" not in printed  # the trunk has nothing to train and needs no optimizer
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"curves.png", "map.png", "similarities.png", "labels.csv"} <= names
    assert not names & {"retrieval.png", "labels.png"}  # there are no pictures
    with open(tmp_path / "run" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == set(np.unique(y)[:20])
    assert all(y[int(row["sample"])] == row["label"] for row in rows)  # rows of the user's file
    assert set(results["label_issues"]) == {"count"}  # which labels are wrong is not known


@pytest.mark.parametrize(
    "loss", ["contextual", "center_contrastive_ema", "proxy_anchor", "multi_similarity"]
)
@pytest.mark.filterwarnings("ignore:num_neighbors")
def test_any_loss(tmp_path, loss):
    x, y = embeddings()
    file = save(tmp_path / "x.npz", embeddings=x.astype(np.float64), labels=y)
    results = run(tmp_path, file, "--loss", loss, "--distill", "ema")
    assert all(np.isfinite(row["loss"]) for row in results["history"][1:])


def test_the_accuracy_of_the_features(tmp_path):
    x, y = embeddings()
    file = save(tmp_path / "x.npz", embeddings=x, labels=y)
    results = run(tmp_path, file, "--loss", "triplet")
    unit = torch.nn.functional.normalize(torch.from_numpy(x[48:]))
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1).numpy()
    expected = (y[48:][nearest] == y[48:]).mean()
    assert results["features"]["precision_at_1"] == pytest.approx(expected)


def test_the_embedder_starts_with_scaled_principal_components():
    x = torch.from_numpy(embeddings()[0])
    embedder = networks.pca_embedder(x, 5)
    with torch.no_grad():
        outputs = embedder(x)
    pca = PCA(5).fit(x.numpy())
    expected = pca.transform(x.numpy()) / np.sqrt(pca.singular_values_)
    outputs, expected = np.abs(outputs.numpy()), np.abs(expected)  # the signs are arbitrary
    expected *= np.linalg.norm(outputs) / np.linalg.norm(expected)
    assert outputs == pytest.approx(expected, abs=1e-4)
    assert embedder.weight[0].norm().item() == pytest.approx(1)


def test_principal_components_of_few_samples():
    x = torch.from_numpy(embeddings()[0][:6])
    embedder = networks.pca_embedder(x, 12)
    assert torch.linalg.matrix_rank(embedder.weight) == 12
    assert embedder.weight.norm(dim=1).max() < 32
    constant = networks.pca_embedder(torch.ones(6, 4), 3)
    assert constant.weight.isfinite().all()


@pytest.mark.parametrize(
    "split",
    [
        np.array(["train", "test"] * 48),
        np.arange(96) % 2,
        np.arange(96) % 2 == 1,
        np.array(["Train", "VAL"] * 48),
    ],
    ids=["words", "numbers", "bool", "capitals"],
)
def test_a_split_of_the_user(tmp_path, split, capsys):
    x, y = embeddings()
    data = loaders.features(save(tmp_path / "x.npz", embeddings=x, labels=y, split=split))
    assert torch.equal(data.train.source, torch.from_numpy(x[::2]))
    assert torch.equal(data.test.source, torch.from_numpy(x[1::2]))
    assert data.test.names == [f"class {c}" for c in range(8)]
    run(tmp_path, tmp_path / "x.npz", "--loss", "triplet")
    printed = capsys.readouterr().out
    assert "48 test samples of 8 classes, of which 8 are also training classes" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels is not a file in the archive"),
        ({"embeddings": np.zeros(96)}, r"must be numbers \(n, width\), not float64 \(96,\)"),
        ({"embeddings": np.full((96, 2), "x")}, r"must be numbers \(n, width\), not <U1"),
        ({"labels": np.zeros(95)}, r"labels must be \(96,\), not \(95,\)"),
        ({"split": np.zeros(5)}, r"split must be \(96,\), not \(5,\)"),
        ({"split": np.array(["train", "dev"] * 48)}, "the split 'dev' is not train or test"),
        ({"split": np.zeros(96, int)}, "need at least two classes each; the test set has 0"),
        ({"labels": np.full(96, np.nan)}, "the label at row 0 is NaN"),
        ({"embeddings": np.ones((96, 2), complex)}, "must be numbers .*, not complex128"),
        ({"embeddings": np.full((96, 2), 1e300)}, "the embedding at row 0 is not finite"),
        ({"labels": np.arange(96)}, "class 0 has one sample"),
    ],
    ids=[
        "missing",
        "1-D",
        "text",
        "labels",
        "split",
        "words",
        "empty",
        "nan",
        "complex",
        "huge",
        "singletons",
    ],
)
def test_invalid_feature_files(tmp_path, capsys, change, message):
    x, y = embeddings()
    arrays = {"embeddings": x, "labels": y, **change}
    file = save(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(UserError, match=message):
        loaders.load("features", file)
    run(tmp_path, file, code=2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_other_invalid_feature_files(tmp_path):
    x, y = embeddings()
    x[7, 3] = np.nan
    with pytest.raises(UserError, match="the embedding at row 7 is not finite"):
        loaders.features(save(tmp_path / "nan.npz", embeddings=x, labels=y))
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match=r"cannot read .*x\.npy"):
        loaders.features(tmp_path / "x.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"cannot read .*text\.npz"):
        loaders.features(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"there is no file .*absent\.npz"):
        loaders.load("features", tmp_path / "absent.npz")
    code = np.array([{"pickled": "object"}] * 2, dtype=object)
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        loaders.features(save(tmp_path / "object.npz", embeddings=x[:2], labels=code))


def test_arguments_for_images_are_refused(tmp_path, capsys):
    for flag in (
        ["--cache", "x"],
        ["--image-size", "32"],
        ["--protocol", "cub"],
        ["--trunk", "timm:resnet50"],
        ["--freeze-norm"],
        ["--trunk-lr", "1"],
    ):
        assert cli.call(train.run, ["--features", str(tmp_path / "x.npz"), *flag]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{flag[0]} is for images; --features has no images" in line


def test_an_embedding_larger_than_the_features(tmp_path, capsys):
    x, y = embeddings()
    run(
        tmp_path, save(tmp_path / "x.npz", embeddings=x, labels=y), "--embedding-size", "17", code=2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "--embedding-size 17: --init pca needs at least as many features; the trunk has 16" in line
    )


@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.longdouble, np.int8])
def test_all_kinds_of_numbers(tmp_path, dtype):
    x, y = embeddings()
    x = np.round(10 * x).astype(dtype)
    data = loaders.features(save(tmp_path / "x.npz", embeddings=x, labels=y.astype("S")))
    assert data.train.source.dtype == torch.float32
    assert np.array_equal(data.train.source.numpy(), x[:48].astype(np.float32))
    assert data.train.names == [f"class {c}" for c in range(4)]


def test_a_run_cannot_be_resumed_with_other_data(tmp_path, capsys):
    x, y = embeddings()
    run(tmp_path, save(tmp_path / "x.npz", embeddings=x, labels=y), "--loss", "triplet")
    for name, arrays in {"a": {"embeddings": x + 1, "labels": y}, "b": {"labels": y[::-1]}}.items():
        file = save(tmp_path / f"{name}.npz", **{"embeddings": x, **arrays})
        run(tmp_path, file, "--loss", "triplet", "--resume", code=2)
        assert "the run was started with other training samples" in capsys.readouterr().err


# ---- CSV


def images(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (10 * number, 0, 0)).save(root / name)


def test_csv(tmp_path):
    names = [f"photos/{i}.png" for i in range(16)]
    images(tmp_path, names)
    lines = ["label,path,split,comment"]
    lines += [
        f"bird {i % 4}{' ' * (i % 2)}, {n},{'test' if i % 4 > 1 else 'train'},"
        for i, n in enumerate(names)
    ]
    (tmp_path / "list.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    data = loaders.load("folder", tmp_path / "list.csv")
    assert (data.train.names, data.test.names) == (["bird 0", "bird 1"], ["bird 2", "bird 3"])
    assert data.train.source[0] == tmp_path / "photos" / "0.png"
    assert data.test.picture(0).getpixel((0, 0)) == (20, 0, 0)
    (tmp_path / "nosplit.csv").write_text(
        "path,label\n" + "".join(f"{n},{i % 4}\n" for i, n in enumerate(names))
    )
    data = loaders.load("folder", tmp_path / "nosplit.csv")
    assert (data.train.names, data.test.names) == (["0", "1"], ["2", "3"])
    (tmp_path / "photos" / "3.png").unlink()
    with pytest.raises(UserError, match=r"the image .*3\.png is missing"):
        loaders.load("folder", tmp_path / "nosplit.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty or not text"),
        ("path,label\n", "needs a header with the columns path, label .*; it has no rows"),
        ("file,class\na.png,b\n", "it has file, class"),
        ("path,label,split\na.png,b,dev\n", "the split 'dev' is not train or test"),
        ("path,label\na.png\n", "row 1 .* has no label"),
    ],
)
def test_invalid_csv(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        loaders.load("folder", tmp_path / "x.csv")


# ---- Packed images


def test_packed_images(tmp_path):
    files = []
    for number in range(12):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(file, "PNG")
        files.append(file.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "y": np.arange(12) % 4,
        "is_test": (np.arange(12) % 4 > 1).astype(np.uint8),
    }
    np.savez(tmp_path / "cars196_crop160.npz", **arrays, class_names=np.array(list("abcd")))
    data = loaders.load("cars196", tmp_path)
    assert (data.train.names, data.test.names) == (["a", "b"], ["c", "d"])
    assert data.test.picture(0).getpixel((0, 0)) == (40, 0, 0)
    assert (data.mirrored, data.cropped) == (True, True)
    assert "only the official training images" in data.note
    np.savez(tmp_path / "cub200_2010_crop160.npz", **arrays)
    data = loaders.load("cub", tmp_path)
    assert data.train.names == ["0", "1"]
    assert "first edition" in data.note
    for change in (
        {"y": arrays["y"][:-1]},
        {"y": arrays["y"] - 1},
        {"y": arrays["y"] / 2},
        {"offset": arrays["offset"][:-1]},
        {"offset": arrays["offset"] + 1},
        {"offset": arrays["offset"][::-1]},
        {"is_test": arrays["is_test"][:-2]},
        {"jpeg": arrays["jpeg"][:-1]},
        {"jpeg": arrays["jpeg"].astype(np.int32)},
        {"class_names": np.array(["a", "b"])},
    ):
        np.savez(tmp_path / "cub200_2010_crop160.npz", **{**arrays, **change})
        with pytest.raises(UserError, match="do not have the shapes and values of a packed file"):
            loaders.load("cub", tmp_path)


# ---- In-Shop


def test_inshop(tmp_path):
    rows, root = [], tmp_path / "inshop"
    for item in range(8):
        for i in range(4):
            part = "train" if item < 4 else ("query" if i < 2 else "gallery")
            name = f"img/WOMEN/Dresses/id_{item:08}/0{i}_1_front.jpg"
            images(root / "Img", [name])
            rows.append(f"{name}   id_{item:08}   {part}")
    text = "\n".join(["32", "image_name item_id evaluation_status", *rows]) + "\n"
    (root / "Eval").mkdir()
    (root / "Eval" / "list_eval_partition.txt").write_text(text)
    data = loaders.load("inshop", tmp_path)
    assert data.train.names == [f"id_{item:08}" for item in range(4)]
    assert data.test.is_query == [True, True, False, False] * 4
    assert len(loaders.load("inshop", root).test) == 16
    (root / "Eval" / "list_eval_partition.txt").write_text("1\n\na.jpg\n")
    with pytest.raises(UserError, match="does not have the lines"):
        loaders.load("inshop", root)
    with pytest.raises(UserError, match=r"list_eval_partition\.txt is missing"):
        loaders.load("inshop", tmp_path / "inshop" / "Img")
