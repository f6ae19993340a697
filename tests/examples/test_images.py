"""Image files come out as they are, or with an error."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import Counter

import cli
import images
import loaders
import numpy as np
import pytest
import report
import torch
import train
from images import UserError
from PIL import Image


def saved(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array, mode)
    image.save(path, **options)
    return path


def pixels(path):
    return torch.from_numpy(np.array(images.open_picture(path))).permute(2, 0, 1)


def pixel(path):
    """The color of the upper left corner."""
    return pixels(path)[:, 0, 0].tolist()


RAMP = np.arange(16).reshape(4, 4)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path, suffix):
    values = (RAMP * 4369).astype(np.uint16)  # 0 to 65,535
    path = saved(tmp_path / f"grey.{suffix}", values)
    expected = torch.from_numpy(RAMP * 17)
    assert torch.equal(pixels(path), expected.to(torch.uint8).expand(3, 4, 4))


def test_16_bit_grey_of_other_forms(tmp_path):
    values = (RAMP * 4369).astype(np.uint16)
    image = Image.fromarray(values)
    expected = torch.from_numpy(RAMP * 17).to(torch.uint8).expand(3, 4, 4)
    image.save(tmp_path / "x.pgm")
    assert torch.equal(pixels(tmp_path / "x.pgm"), expected)
    image.save(tmp_path / "x.tif", tiffinfo={262: 0})  # 0 is white
    assert torch.equal(pixels(tmp_path / "x.tif"), 255 - expected)
    image.save(tmp_path / "x.png", transparency=0)
    assert pixels(tmp_path / "x.png")[0, 0, 0] == 255
    assert torch.equal(pixels(tmp_path / "x.png")[:, 1:], expected[:, 1:])


def test_floats_from_0_to_1(tmp_path):
    path = saved(tmp_path / "float.tif", (RAMP / 15).astype(np.float32))
    expected = torch.from_numpy(RAMP * 17)
    assert torch.equal(pixels(path), expected.to(torch.uint8).expand(3, 4, 4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RAMP.astype(np.float32), "floats from 0 to 15: save it with 8 or 16 bits"),
        ((RAMP * 1000).astype(np.int32), "32-bit integers from 0 to 15000: save it with"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
    ],
    ids=["float", "int", "nan"],
)
def test_numbers_without_a_known_range_are_refused(tmp_path, array, message):
    path = saved(tmp_path / "numbers.tif", array)
    with pytest.raises(UserError, match=f"cannot read the image .*numbers.tif: .*{message}"):
        images.open_picture(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((4, 4, 3), np.uint8)
    upright[0, 0] = 255  # the upper left corner
    operations = [
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::-1],
        lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: np.rot90(x),
        lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        lambda x: np.rot90(x, -1),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(operations[orientation - 1](upright))
    path = saved(tmp_path / "turned.png", stored, exif=exif)
    assert pixel(path) == [255, 255, 255]
    assert pixels(path).sum() == 3 * 255


def test_transparent_images_are_turned_too(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    array[0, :, 3] = 255  # the upper row is black, the rest is transparent
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = saved(tmp_path / "x.png", array, exif=exif)
    assert pixels(path)[0, :, 0].tolist() == [255, 255, 255, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    hidden = Image.new("RGBA", (4, 4), (200, 10, 30, 0))
    if mode == "P":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
        image.putpalette([200, 10, 30] * 256)
    else:
        image, options = hidden.convert(mode), {}
    assert pixel(saved(tmp_path / "hidden.png", image, **options)) == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
    ],
)
def test_colors_of_other_modes(tmp_path, mode, color, expected):
    suffix = "tif" if mode == "CMYK" else "png"
    assert pixel(saved(tmp_path / f"x.{suffix}", Image.new(mode, (4, 4), color))) == expected


def test_a_decompression_bomb_is_one_clear_error(tmp_path):
    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    (tmp_path / "bomb.png").write_bytes(png + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"cannot read the image .*bomb\.png: .*pixels"):
        images.open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a\0\0"])
def test_broken_files_are_one_clear_error(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image .*x\.png"):
        images.open_picture(tmp_path / "x.png")


# ---- Directories.


def image_folder(root, classes=("a", "b", "c", "d"), count=6):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * number, 9 * i, 0)).save(root / name / f"{i}.png")
    return root


def call(tmp_path, *arguments):
    command = ["--dataset", "folder", "--data-root", str(tmp_path / "data"), "--epochs", "1"]
    command += ["--out", str(tmp_path / "run"), "--image-size", "8", "--loss", "contrastive"]
    return cli.call(train.run, [*command, "--batch-size", "4", "--samples-per-class", "2"])


def test_all_suffixes_and_subdirectories_are_read(tmp_path):
    image_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.jfif", "JPEG")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.WEBP", "WEBP")
    (tmp_path / "a" / "2024" / "may").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "2024" / "may" / "x.png")
    data = loaders.folder(tmp_path)
    assert data.train.labels == [0] * 9 + [1] * 6
    assert data.train.names == ["a", "b"]
    assert {".avif", ".jp2", ".jfif", ".jpg", ".tiff"} - images.readable_suffixes() <= {".avif"}


def test_links_to_directories_are_followed(tmp_path):
    image_folder(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    skipped = Counter()
    found = images.image_files(tmp_path / "data" / "a", skipped)
    assert len(found) == 7
    assert skipped == {".png": 1}


def test_directories_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    image_folder(tmp_path)

    def scandir(path, original=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    (tmp_path / "a" / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the directory .*closed: Permission denied"):
        loaders.folder(tmp_path)


def test_formats_that_pillow_only_recognizes_are_skipped():
    suffixes = images.readable_suffixes()
    assert not suffixes & {".h5", ".hdf", ".mpg", ".grib", ".bufr", ".wmf", ".emf", ".eps", ".pdf"}


def test_what_is_skipped_is_listed_in_one_line(tmp_path, capsys):
    image_folder(tmp_path)
    for name in ("1.heic", "2.HEIC", "notes.txt", "._0.png", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "a" / "._0.png").write_bytes(b"x")
    data = loaders.folder(tmp_path)
    assert data.train.names + data.test.names == ["a", "b", "c", "d"]
    line = "folder: skipped files that are no images here: 2 .heic, 1 .txt\n"
    assert capsys.readouterr().out == line


def test_a_directory_of_unreadable_images_names_them(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"e contains no images \(skipped .*: 1 \.heic\)"):
        loaders.folder(tmp_path)


@pytest.mark.parametrize("name", ["test", "val", "valid"])
def test_layouts_with_a_training_directory(tmp_path, name):
    image_folder(tmp_path / "train", "abc")
    image_folder(tmp_path / name, "xy")
    (tmp_path / "__MACOSX").mkdir()
    data = loaders.folder(tmp_path)
    assert (data.train.names, data.test.names) == (["a", "b", "c"], ["x", "y"])
    image_folder(tmp_path / name, "b")  # other images of a training class
    data = loaders.folder(tmp_path)
    assert (data.train.names, data.test.names) == (["a", "b", "c"], ["b", "x", "y"])
    assert "of 3 classes, of which 1 are also training classes" in report.describe_test(data)


def test_a_class_whose_name_is_not_utf_8(tmp_path, capsys):
    root = image_folder(tmp_path / "data")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    image_folder(root, [os.fsdecode(b"caf\xe9")])
    data = loaders.folder(root)
    assert "caf\ufffd" in data.train.names + data.test.names
    assert call(tmp_path, "--check-labels") == 0
    printed = capsys.readouterr()
    assert "could not draw" not in printed.err
    assert re.search(r"map +\S+map\.png", printed.out)


def test_hidden_files_are_no_images(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("._1.png", ".cache/1.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    skipped = Counter()
    assert images.image_files(tmp_path, skipped) == []
    assert not skipped
