"""Crops, resizing and normalization of pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transforms
from PIL import Image
from transforms import Transform


def ramp(width, height):
    """Red is the column and green the row of each pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


def test_normalization():
    picture = Image.new("RGB", (5, 3), (0, 51, 255))
    image = Transform(4, (0.5, 0.2, 0.1), (0.5, 0.25, 2.0))(picture)
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32
    assert image[:, 0, 0].tolist() == pytest.approx([-1, 0, 0.45])
    assert (image == image[:, :1, :1]).all()


def test_the_number_of_channels_is_that_of_the_mean():
    gray, color = Image.new("L", (4, 4), 255), Image.new("RGB", (4, 4), "white")
    for picture in (gray, color):
        for channels in (1, 3):
            image = Transform(None, (0.5,) * channels, (0.5,) * channels)(picture)
            assert torch.equal(image, torch.ones(channels, 4, 4))


def test_the_default_does_not_resize():
    values = torch.arange(48, dtype=torch.uint8).view(6, 8)
    image = Transform()(Image.fromarray(values.numpy()))
    assert torch.equal(image[0], values / 127.5 - 1)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (80, 80)])
def test_the_center_crop(width, height):
    pixels = Transform(30, (0.0,) * 3, (1.0,) * 3, center=0.5)(ramp(width, height)) * 255
    red, green = pixels[0, 0], pixels[1, :, 0]
    side = 0.5 * min(width, height)
    assert float(red.mean()) == pytest.approx((width - 1) / 2, abs=0.6)
    assert float(green.mean()) == pytest.approx((height - 1) / 2, abs=0.6)
    assert float(red[-1] - red[0]) == pytest.approx(side * 29 / 30, abs=1.1)
    assert float(green[-1] - green[0]) == pytest.approx(side * 29 / 30, abs=1.1)


def test_random_boxes_have_the_distribution_of_inception():
    torch.manual_seed(0)
    boxes = np.array([transforms.random_box(400, 400, 0.16) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, log_ratio = width * height / 400**2, np.log(width / height)
    assert (boxes >= 0).all()
    assert (boxes <= 400 + 1e-6).all()
    assert area.min() == pytest.approx(0.16, abs=0.01)
    small = area < 0.7  # no aspect ratio is refused up to 3/4
    assert np.quantile(area[small], [0.25, 0.5, 0.75]) == pytest.approx(
        [0.295, 0.43, 0.565], abs=0.02
    )
    assert np.abs(log_ratio).max() <= np.log(4 / 3) + 1e-9
    expected = np.log(4 / 3) * np.array([-0.5, 0, 0.5])
    assert np.quantile(log_ratio[small], [0.25, 0.5, 0.75]) == pytest.approx(expected, abs=0.02)
    left = boxes[small, 0] / (400 - width[small])
    assert np.quantile(left, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_pictures_that_no_random_box_fits_are_cropped_in_the_center():
    assert transforms.random_box(1000, 10, 1.0) == (495, 0, 505, 10)


def test_a_random_crop_is_the_crop_of_its_box():
    transform = Transform(20, (0.0,) * 3, (1.0,) * 3, min_area=0.2, random=True)
    torch.manual_seed(3)
    image = transform(ramp(100, 80))
    torch.manual_seed(3)
    left, top, right, bottom = transforms.random_box(100, 80, 0.2)
    columns, rows = 255 * image[0, 0], 255 * image[1, :, 0]
    assert float(columns.mean()) == pytest.approx((left + right - 1) / 2, abs=0.6)
    assert float(rows.mean()) == pytest.approx((top + bottom - 1) / 2, abs=0.6)


def test_views_are_the_center_crop_and_its_mirror_image():
    transform = Transform(16, (0.5,) * 3, (0.5,) * 3, center=0.8, min_area=0.16, mirror=True)
    picture = ramp(40, 50)
    expected = transform(picture)
    assert torch.equal(transform.views(picture), expected[None])  # for testing
    views = replace(transform, random=True).views(picture)
    assert torch.equal(views, torch.stack([expected, expected.flip(2)]))
    assert len(replace(transform, random=True, mirror=False).views(picture)) == 1
