"""Small synthetic versions of each dataset, in each format that the loaders read."""

import io
import json
import os
import pickle
import tarfile
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import cli
import loaders
import numpy as np
import pytest
import torch
import train
from images import UserError
from PIL import Image
from samples import Samples, hold_out, with_label_noise
from transforms import Transform

DATA_ROOT = os.environ.get("PML_EXTRAS_DATA")  # of the real datasets


def write_image(path, color, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def write_classes(classes, root, names="class{:02}", images=6):
    """Write one directory of plain images per class. Each class has its own color."""
    for c in range(classes):
        for i in range(images):
            write_image(root / names.format(c) / f"{i}.png", (20 * c, 255 - 20 * c, 40 * i))


def call(*arguments):
    return cli.call(train.run, list(map(str, arguments)))


def train_one_epoch(tmp_path, *arguments):
    """Run train.py with batches that small datasets can fill."""
    command = ["--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "4"]
    command += ["--samples-per-class", "2", "--image-size", "16", "--loss", "contrastive"]
    assert call(*command, *arguments) == 0
    return json.loads((tmp_path / "run" / "results.json").read_text())


# ---- digits


def test_digits():
    data = loaders.digits()
    assert data.test.names == ["5", "6", "7", "8", "9"]
    assert len(data.test) == 896
    assert len(data.train) == 8 * 901
    assert len(data.train.names) == 40
    # The second view is a rotation by 90 degrees; the fifth is the first, mirrored.
    source = data.train.source
    assert torch.equal(source[901], source[0].rot90(1, (1, 2)))
    assert torch.equal(source[4 * 901], source[0].flip(2))
    image, label = data.test[0]
    assert image.shape == (1, 8, 8)
    assert (image.min(), image.max()) == (-1, 1)
    assert label == 0


# ---- folder


def test_folder_splits_the_classes_in_half(tmp_path):
    write_classes(5, tmp_path)
    data = loaders.folder(tmp_path)
    assert data.train.names == ["class00", "class01", "class02"]
    assert data.test.names == ["class03", "class04"]
    assert data.train.labels == [0] * 6 + [1] * 6 + [2] * 6
    picture = data.test.picture(0)
    assert picture.size == (12, 10)
    assert picture.getpixel((0, 0)) == (60, 195, 0)


def test_folder_with_train_and_test(tmp_path):
    write_classes(3, tmp_path / "data" / "train", "seen{}")
    write_classes(2, tmp_path / "data" / "test", "unseen{}")
    results = train_one_epoch(tmp_path, "--dataset", "folder", "--data-root", tmp_path / "data")
    assert results["config"]["image_size"] == 16
    data = loaders.folder(tmp_path / "data")
    assert (data.train.names, data.test.names) == (
        ["seen0", "seen1", "seen2"],
        ["unseen0", "unseen1"],
    )


def test_resume_is_exact_with_workers_that_mirror_images(tmp_path):
    data, logs = tmp_path / "data", []
    for c in range(6):
        for i in range(8):
            path = data / f"class{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng((c, i)).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(path)
    common = ["--dataset", "folder", "--data-root", data, "--workers", "1"]
    for out, parts in (("whole", [["2"]]), ("parts", [["1"], ["2", "--resume"]])):
        for epochs, *resume in parts:
            results = train_one_epoch(tmp_path / out, *common, "--epochs", epochs, *resume)
        logs.append(results["history"])
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]


def folder_error(capsys, tmp_path, root):
    out = tmp_path / "run"
    assert call("--dataset", "folder", "--data-root", root, "--out", out) == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_invalid_folders(tmp_path, capsys):
    root = tmp_path / "data"
    write_classes(4, root)
    for image in list((root / "class03").iterdir())[1:]:
        image.unlink()
    assert "class class03 has one sample" in folder_error(capsys, tmp_path, root)
    next((root / "class03").iterdir()).unlink()
    assert "class03 contains no images" in folder_error(capsys, tmp_path, root)
    (root / "class03").rmdir()
    assert "at least two classes each; the test set has 1" in folder_error(capsys, tmp_path, root)


def test_classes_too_small_for_validation(tmp_path, capsys):
    write_classes(4, tmp_path / "data", images=3)
    line = folder_error(capsys, tmp_path, tmp_path / "data")
    assert "fewer than two training classes have four samples" in line


def test_a_training_directory_alone(tmp_path, capsys):
    write_classes(4, tmp_path / "data" / "train")
    line = folder_error(capsys, tmp_path, tmp_path / "data")
    assert "data has train/, but no test/ or val/" in line


def test_a_broken_image_is_named_with_and_without_workers(tmp_path, capsys):
    write_classes(4, tmp_path / "data")
    (tmp_path / "data" / "class03" / "0.png").write_bytes(b"not an image")
    for workers in ("0", "1"):
        command = ["--dataset", "folder", "--data-root", str(tmp_path / "data")]
        command += ["--out", str(tmp_path / "run"), "--workers", workers]
        assert call(*command, "--samples-per-class", "2", "--batch-size", "4") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: error: cannot read the image")
        assert "0.png" in line
        assert not (tmp_path / "run").exists()


def test_flip_mirrors_some_of_the_images():
    pixels = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 1, 6)
    transform = Transform(mirror=True, random=True)
    images = Samples(pixels, [0], ["a"], transform)
    torch.manual_seed(0)
    drawn = [images[0][0] for _ in range(100)]
    plain = replace(images, transform=replace(transform, random=False))[0][0]
    mirrored = sum(torch.equal(image, plain.flip(2)) for image in drawn)
    assert sum(torch.equal(image, plain) for image in drawn) == 100 - mirrored
    assert 30 < mirrored < 70


# ---- Validation split and label noise


def test_hold_out_takes_every_fifth_image_and_keeps_pairs():
    sizes = [20, 11, 9, 4, 3, 2]
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    pixels = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    images = Samples(pixels, labels, list("abcdef"))
    kept, held = hold_out(images)
    assert np.bincount(held.labels, minlength=6).tolist() == [4, 2, 2, 2, 0, 0]
    assert np.bincount(kept.labels, minlength=6).tolist() == [16, 9, 7, 2, 3, 2]
    both = torch.cat([kept.source, held.source]).flatten().tolist()
    assert sorted(both) == list(range(len(labels)))  # each image is in one part


def test_label_noise_is_symmetric_exact_and_seeded():
    labels = [0] * 3000 + [1] * 3000 + [2] * 3000 + [3] * 3000
    images = Samples(torch.zeros(12000, 1, 1, 1), labels, list("abcd"))
    noisy = with_label_noise(images, 0.3, seed=1)
    before, after = np.array(labels), np.array(noisy.labels)
    assert (before != after).sum() == 3600
    counts = np.zeros((4, 4))
    np.add.at(counts, (before, after), 1)
    wrong = counts[~np.eye(4, dtype=bool)]
    assert wrong == pytest.approx(np.full(12, 300), abs=75)  # four standard deviations
    assert noisy.labels == with_label_noise(images, 0.3, seed=1).labels
    assert noisy.labels != with_label_noise(images, 0.3, seed=2).labels
    assert with_label_noise(images, 0.0, seed=1).labels == labels


# ---- Omniglot


def characters(root, alphabet, count, drawings=4):
    for c in range(count):
        for i in range(drawings):
            image = Image.new("1", (105, 105), 1)
            image.paste(0, (10 + 15 * c, 20, 30 + 15 * c, 80))
            path = root / alphabet / f"character{c + 1:02}" / f"{c:04}_{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def zipped(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder.parent))


@pytest.mark.parametrize("form", ["folders", "zip files"])
def test_omniglot_as_published(tmp_path, form):
    characters(tmp_path / "images_background", "Futurama", 3)
    characters(tmp_path / "images_evaluation", "Tengwar", 2)
    if form == "zip files":
        for part in ("images_background", "images_evaluation"):
            zipped(tmp_path / part)
            (tmp_path / part).rename(tmp_path / f"not_{part}")
    data = loaders.omniglot(tmp_path)
    assert data.train.names == [f"Futurama/character{i:02}" for i in (1, 2, 3)]
    assert data.test.names == ["Tengwar/character01", "Tengwar/character02"]
    assert data.train.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train.source.shape == (12, 1, 28, 28)
    image = data.train.source[0, 0]
    assert image[10, 5] == 255  # ink
    assert image[0, 0] == 0
    assert image.float().mean() == pytest.approx(255 * 20 * 60 / 105**2, rel=0.02)


def test_omniglot_npz(tmp_path):
    y = np.repeat(np.arange(5), 4)
    x = np.broadcast_to((10 * y).astype(np.uint8)[:, None, None], (20, 28, 28))
    names = np.array([f"A/character{i}" for i in range(5)])
    np.savez(tmp_path / "omniglot28.npz", x=x, y=y, is_eval=y >= 3, class_names=names)
    data = loaders.omniglot(tmp_path)
    assert data.train.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.names == ["A/character3", "A/character4"]
    assert data.test.source[4].unique().tolist() == [40]


# ---- CIFAR-100


def cifar_files(folder):
    folder.mkdir(parents=True)
    for part, images in (("train", 3), ("test", 1)):
        labels = [c for c in (0, 1, 49, 50, 99) for _ in range(images)]
        data = np.zeros((len(labels), 3072), np.uint8)
        data[:, 1024:2048] = np.array(labels)[:, None]  # the green channel
        content = {b"data": data, b"fine_labels": labels, b"coarse_labels": labels}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"fine_label_names": [b"name%d" % i for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar100_as_published(tmp_path, form):
    cifar_files(tmp_path / "cifar-100-python")
    if form == "archive":
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "cifar-100-python", "cifar-100-python")
        (tmp_path / "cifar-100-python").rename(tmp_path / "elsewhere")
    data = loaders.cifar100(tmp_path)
    assert data.train.names == ["name0", "name1", "name49"]
    assert data.test.names == ["name50", "name99"]
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    last = data.test.source[-1]
    assert last.shape == (3, 32, 32)
    assert [channel.unique().tolist() for channel in last] == [[0], [99], [0]]


def test_cifar100_npz(tmp_path):
    y = np.array([0, 0, 0, 49, 49, 50, 50, 50, 99, 99], np.uint8)
    x = np.zeros((10, 32, 32, 3), np.uint8)
    x[..., 1] = y[:, None, None]
    names = np.array([f"name{i}" for i in range(100)])
    arrays = {"train_x": x, "train_y": y, "test_x": x, "test_y": y, "class_names": names}
    np.savez(tmp_path / "cifar100_subset.npz", **arrays)
    data = loaders.cifar100(tmp_path)
    assert data.test.names == ["name50", "name99"]
    assert np.bincount(data.test.labels).tolist() == [6, 4]
    assert data.test.source[3, 1].unique().tolist() == [99]


class Malicious:
    def __reduce__(self):
        return os.system, ("echo malicious",)


def test_a_cifar_pickle_cannot_run_code(tmp_path):
    cifar_files(tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match=r"system is not allowed in a CIFAR file"):
        loaders.cifar100(tmp_path)


# ---- Datasets with loaders in PML


def make_cub(root):
    lines = [(c, f"{c:03}.Bird/{i}.jpg") for c in (1, 2, 100, 101, 200) for i in range(6)]
    base = root / "CUB_200_2011"
    for c, name in lines:
        write_image(base / "images" / name, (c, 0, 0))
    (base / "images.txt").write_text("".join(f"{n} {p}\n" for n, (_, p) in enumerate(lines, 1)))
    labels = "".join(f"{n} {c}\n" for n, (c, _) in enumerate(lines, 1))
    (base / "image_class_labels.txt").write_text(labels)


def make_cars196(root):
    root.mkdir(parents=True)
    (root / "names.csv").write_text("".join(f"Car {i}/x\n" for i in range(1, 197)))
    for part, numbers in (("train", range(4)), ("test", range(4, 6))):
        rows = [(c, f"{c}_{i}.jpg") for c in (1, 2, 98, 99, 196) for i in numbers]
        for c, name in rows:
            write_image(root / "car_data" / "car_data" / part / f"Car {c}-x" / name, (c, 0, 0))
        annotations = "".join(f"{name},1,2,3,4,{c}\n" for c, name in rows)
        (root / f"anno_{part}.csv").write_text(annotations)


def make_sop(root):
    base = root / "Stanford_Online_Products"
    for part, classes in (("train", (1, 2, 3)), ("test", (11, 12))):
        lines = ["image_id class_id super_class_id path"]
        for c in classes:
            for i in range(6):
                write_image(base / "bicycle_final" / f"{c}_{i}.JPG", (c, 0, 0))
                lines.append(f"{len(lines)} {c} 1 bicycle_final/{c}_{i}.JPG")
        (base / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")


def make_inaturalist(root):
    (root / "Inat_dataset_splits").mkdir(parents=True)
    images, annotations = [], []
    for part, classes in (("train", (10, 11, 12)), ("test", (20, 21))):
        names = [f"train_val2018/Birds/{c}/{i}.jpg" for c in classes for i in range(6)]
        for name in names:
            write_image(root / name, (int(name.split("/")[2]), 0, 0))
            images.append({"file_name": name, "id": len(images)})
            label = int(name.split("/")[2])
            annotations.append({"image_id": len(annotations), "category_id": label})
        split = root / "Inat_dataset_splits" / f"Inaturalist_{part}_set1.txt"
        split.write_text("\n".join(names) + "\n")
    everything = {"images": images, "annotations": annotations}
    (root / "train2018.json").write_text(json.dumps(everything))
    (root / "val2018.json").write_text(json.dumps({"images": [], "annotations": []}))


MAKERS = {
    "cub": make_cub,
    "cars196": make_cars196,
    "sop": make_sop,
    "inaturalist": make_inaturalist,
}


@pytest.mark.parametrize("name", MAKERS)
def test_pml_datasets(tmp_path, name):
    root = tmp_path / "data" / name  # in a directory of its name
    MAKERS[name](root)
    data = loaders.load(name, tmp_path / "data")
    assert np.bincount(data.train.labels).tolist() == [6, 6, 6]
    assert np.bincount(data.test.labels).tolist() == [6, 6]
    assert len(set(data.train.names + data.test.names)) == 5
    again = loaders.load(name, root)  # or directly in the root
    assert again.train.source == data.train.source
    results = train_one_epoch(tmp_path, "--dataset", name, "--data-root", tmp_path / "data")
    assert results["after"]["precision_at_1"] >= 0


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_image_is_named(tmp_path, name):
    MAKERS[name](tmp_path / "data")
    missing = sorted(p for p in (tmp_path / "data").rglob("*") if p.suffix.lower() == ".jpg")[-1]
    missing.unlink()
    with pytest.raises(UserError, match=rf"the image .*{missing.name} is missing"):
        loaders.load(name, tmp_path / "data")


# ---- Downloads, without a network

ARCHIVES = ["omniglot", "cifar100"]


@pytest.mark.parametrize("name", [*ARCHIVES, *MAKERS])
def test_a_missing_dataset_suggests_download(tmp_path, name):
    with pytest.raises(UserError, match=r"is missing; .*--download"):
        loaders.load(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*ARCHIVES, *MAKERS])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"could not download.*no route to host"):
        loaders.load(name, tmp_path, download=True)
    assert not list(tmp_path.iterdir())


class Response(io.BytesIO):
    @property
    def length(self):
        return len(self.getvalue())


@pytest.mark.parametrize("name", ["omniglot", "cub"])
def test_a_download(tmp_path, monkeypatch, name):
    source, root = tmp_path / "source", tmp_path / "root"
    archives = {}
    if name == "omniglot":
        for part, count in (("images_background", 3), ("images_evaluation", 2)):
            characters(source / part, "A", count)
            zipped(source / part)
            archives[f"{part}.zip"] = (source / f"{part}.zip").read_bytes()
    else:
        make_cub(source)
        with tarfile.open(source / "cub.tgz", "w:gz") as tar:
            tar.add(source / "CUB_200_2011", "CUB_200_2011")
        archives["CUB_200_2011.tgz"] = (source / "cub.tgz").read_bytes()

    def urlopen(request, **kwargs):
        url = getattr(request, "full_url", request)
        return Response(archives[url.split("/")[-1]])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    data = loaders.load(name, root, download=True)
    assert len(data.train.names) == 3
    monkeypatch.undo()
    assert len(loaders.load(name, root).test.names) == 2  # without a download


# ---- Real data


@pytest.mark.parametrize(
    ("name", "file", "train_images", "train_classes", "test_images", "test_classes"),
    [
        ("cars196", "cars196_crop160.npz", 4052, 98, 4092, 98),
        ("cub", "cub200_2010_crop160.npz", 2990, 100, 3043, 100),
        ("omniglot", "omniglot28.npz", 19280, 964, 13180, 659),
        ("cifar100", "cifar100_subset.npz", 10000, 50, 10000, 50),
    ],
)
@pytest.mark.skipif(not DATA_ROOT, reason="PML_EXTRAS_DATA does not name a directory of datasets")
def test_real_data(name, file, train_images, train_classes, test_images, test_classes):
    if not Path(DATA_ROOT, file).is_file():
        pytest.skip(f"there is no {Path(DATA_ROOT, file)}")
    data = loaders.load(name, Path(DATA_ROOT))
    assert (len(data.train), len(data.train.names)) == (train_images, train_classes)
    assert (len(data.test), len(data.test.names)) == (test_images, test_classes)
    assert 0 < np.mean(data.train.picture(0)) < 255
    assert not set(data.train.names) & set(data.test.names)
