"""Preprocessing: hand-computable pictures, a naive oracle, and odd shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from services.vision.preprocess import ClassificationPreprocessing, normalise, preprocess, resize_and_crop
from shared.errors import ConfigurationError

SMALL = ClassificationPreprocessing(size=4, resize_side=4)


def test_one_colour_by_hand():
    rgb = np.full((9, 17, 3), (127, 255, 0), np.uint8)

    tensor = preprocess(rgb, SMALL)

    assert tensor.shape == (3, 4, 4)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_allclose(tensor[:, 0, 0], [0.0, 1.0, -127 / 128])


def test_right_size_is_left_alone():
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(resize_and_crop(rgb, SMALL), rgb)
    np.testing.assert_allclose(preprocess(rgb, SMALL), (rgb.transpose(2, 0, 1) - 127.0) / 128.0)


def test_shrinking_averages_whole_blocks():
    rgb = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    blocks = rgb.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    assert np.abs(resize_and_crop(rgb, SMALL) - blocks).max() <= 0.5 + 1e-6  # rounding to a byte


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_middle_is_kept(shape):
    rgb = np.zeros((*shape, 3), np.uint8)
    middle = (slice(0, 8), slice(6, 14)) if shape[0] == 8 else (slice(6, 14), slice(0, 8))
    rgb[middle] = 200
    assert (resize_and_crop(rgb, SMALL) == 200).all()


def test_margin_is_cut_when_the_resize_side_is_larger():
    config = ClassificationPreprocessing(size=4, resize_side=8)
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[2:6, 2:6] = 200
    assert (resize_and_crop(rgb, config) == 200).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (3, 5000), (225, 224), (4000, 3)])
def test_any_shape(shape):
    rgb = np.full((*shape, 3), 77, np.uint8)
    tensor = preprocess(rgb, ClassificationPreprocessing())
    assert tensor.shape == (3, 224, 224)
    np.testing.assert_allclose(tensor, (77 - 127) / 128)


def test_agrees_with_pillow_on_a_smooth_picture():
    y, x = np.mgrid[0:300, 0:400]
    rgb = np.stack([x * 255 / 400, y * 255 / 300, (x + y) * 255 / 700], axis=-1).astype(np.uint8)
    ours = resize_and_crop(rgb, ClassificationPreprocessing())
    theirs = Image.fromarray(rgb).crop((50, 0, 350, 300)).resize((224, 224), Image.Resampling.BOX)
    # a box filter rounds its window to whole pixels, ours weighs the edges: a gradient shifts by less than a pixel
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 2


def test_a_view_that_is_not_contiguous():
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    mirrored = rgb[:, ::-1]
    np.testing.assert_array_equal(preprocess(mirrored, SMALL), preprocess(mirrored.copy(), SMALL))


def test_normalise_does_not_change_its_input():
    rgb = np.full((2, 2, 3), 5, np.uint8)
    normalise(rgb, SMALL)
    assert (rgb == 5).all()


def test_normalise_is_the_arithmetic_to_the_last_bit():
    config = ClassificationPreprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    rgb = np.random.default_rng(3).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    by_hand = (rgb.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    np.testing.assert_array_equal(normalise(rgb[:, ::-1], config), by_hand[:, ::-1].transpose(2, 0, 1))


def test_parameters_survive_the_manifest():
    config = ClassificationPreprocessing(size=160, resize_side=184, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert ClassificationPreprocessing.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": 300}, {"std": [1.0, 0.0, 1.0]}, {"mean": [1.0]}, {"policy": "stretch"}, {"colour": "BGR"}],
)
def test_wrong_parameters_are_refused(change):
    with pytest.raises(ConfigurationError):
        ClassificationPreprocessing.from_dict(ClassificationPreprocessing().to_dict() | change)


def test_missing_parameter_is_named():
    raw = ClassificationPreprocessing().to_dict()
    del raw["mean"]
    with pytest.raises(ConfigurationError, match="mean"):
        ClassificationPreprocessing.from_dict(raw)
