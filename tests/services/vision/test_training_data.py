"""The photos as training sees them: the split, augmentation and batches."""

from __future__ import annotations

import collections
import hashlib

import numpy as np
import pytest
import torch

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import (
    LABELS,
    AugmentConfig,
    AugmentedBatches,
    Photos,
    TensorBatches,
    augment,
    load_photos,
)
from services.vision.training.split import (
    SPLIT_FILE,
    difference_hash,
    group_duplicates,
    make_split,
    read_split,
    render_split,
    split_of,
    thumbnail,
)
from shared.data.locate import locate
from shared.errors import ConfigurationError


@pytest.fixture(scope="module")
def archive():
    try:
        return locate("flowers", download=False)
    except ConfigurationError as error:
        pytest.skip(error.message)


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth blobs, so that a thumbnail says something about them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    return np.kron(coarse, np.ones((height // 5, width // 6, 1), np.uint8))


PHOTOS = Photos(tuple("abcdefgh"), tuple(photo(i) for i in range(8)), np.arange(8) % 5)


@pytest.mark.data
def test_committed_split_is_what_the_program_makes(archive):
    assert render_split(make_split(archive)) == SPLIT_FILE.read_text(encoding="utf-8")


def test_split_has_the_shares_and_all_classes():
    rows = read_split()
    parts = collections.Counter(row.split for row in rows)
    assert len(rows) == len({row.file for row in rows}) == 3306
    assert parts == {"train": 2362, "val": 339, "test": 605}
    for part in parts:
        assert {row.file.split("/")[0] for row in rows if row.split == part} == set(LABELS)


def test_no_group_is_torn_apart():
    parts = collections.defaultdict(set)
    for row in read_split():
        parts[row.group].add(row.split)
        assert row.split == split_of(row.group)
    assert all(len(found) == 1 for found in parts.values())


def test_the_photo_that_has_two_labels_is_in_one_part():
    rows = [row for row in read_split() if "15922772266" in row.file]
    assert {row.file.split("/")[0] for row in rows} == {"roses", "tulips"}
    assert len({row.split for row in rows}) == 1


def test_split_of_a_name_by_hand():
    for name in ("daisy/1.jpg", "roses/2.jpg", "x"):
        share = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2**32
        assert split_of(name) == ("train" if share < 0.7 else "val" if share < 0.8 else "test")


def test_near_duplicates_are_grouped_and_others_not():
    original = photo(0)
    brighter = np.clip(original.astype(int) + 9, 0, 255).astype(np.uint8)
    noisy = np.clip(original + np.random.default_rng(0).normal(0, 4, original.shape), 0, 255).astype(np.uint8)
    photos = {"b": original, "a": brighter, "c": noisy, "d": photo(1), "e": original[:, ::-1]}
    assert group_duplicates(photos) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}


def test_hash_and_thumbnail_by_hand():
    falling = np.repeat(np.repeat(np.arange(250, -1, -1, dtype=np.uint8)[None, :, None], 64, 0), 3, 2)
    assert difference_hash(falling) == 0
    assert difference_hash(falling[:, ::-1]) == 2**64 - 1
    assert float(thumbnail(falling) @ thumbnail(falling[:, ::-1])) == pytest.approx(-1, abs=1e-3)
    assert np.isfinite(thumbnail(np.zeros((9, 9, 3), np.uint8))).all()


@pytest.mark.data
def test_photos_come_decoded_and_labelled(archive):
    photos = load_photos("val")
    assert len(photos) == 339
    assert all(name.split("/")[0] == LABELS[label] for name, label in zip(photos.names, photos.labels, strict=True))
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in photos.images)
    assert min(min(image.shape[:2]) for image in photos.images) >= 100


def test_unknown_split_is_refused():
    with pytest.raises(ConfigurationError, match="`tset` has no photos"):
        load_photos("tset")


def test_take_is_a_fixed_mixture():
    assert PHOTOS.take(3).names == PHOTOS.take(5).names[:3]
    assert PHOTOS.take(8).names != PHOTOS.names
    assert [PHOTOS.names.index(n) % 5 for n in PHOTOS.take(8).names] == PHOTOS.take(8).labels.tolist()


def test_augmentation_is_a_function_of_its_generator():
    one, again, other = (
        augment(PHOTOS.images[0], 32, np.random.default_rng(seed), AugmentConfig()) for seed in (1, 1, 2)
    )
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_augmentation_that_changes_nothing_but_the_side():
    config = AugmentConfig(min_area=1.0, max_stretch=1.0, brightness=0, contrast=0, saturation=0)
    square = photo(3, 60, 60)
    results = [augment(square, 60, np.random.default_rng(seed), config) for seed in range(12)]
    flipped = [(result == square[:, ::-1]).all() for result in results]
    kept = [(result == square).all() for result in results]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert any(flipped)
    assert any(kept)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (7, 300)])
def test_augmentation_of_any_shape(shape):
    for seed in range(20):
        result = augment(np.full((*shape, 3), 90, np.uint8), 16, np.random.default_rng(seed), AugmentConfig())
        assert result.shape == (16, 16, 3)


def batches(batch: int, seed: int = 0) -> AugmentedBatches:
    config = ClassificationPreprocessing(size=32, resize_side=32)
    return AugmentedBatches(PHOTOS, config, size_at=lambda epoch: 16 if epoch == 0 else 32, batch=batch, seed=seed)


def test_batches_do_not_depend_on_what_came_before_nor_on_their_size():
    small, large = batches(2), batches(4)
    large.batch(1, 1)
    inputs, labels = large.batch(1, 0)
    first, second = small.batch(1, 0), small.batch(1, 1)
    assert torch.equal(inputs, torch.cat([first[0], second[0]]))
    assert torch.equal(labels, torch.cat([first[1], second[1]]))


def test_batches_differ_by_epoch_and_seed_and_follow_the_size():
    assert batches(4).batch(0, 0)[0].shape == (4, 3, 16, 16)
    assert batches(4).batch(2, 0)[0].shape == (4, 3, 32, 32)
    assert not torch.equal(batches(4).batch(1, 0)[0], batches(4).batch(2, 0)[0])
    assert not torch.equal(batches(4).batch(1, 0)[0], batches(4, seed=1).batch(1, 0)[0])


def test_an_epoch_shows_every_photo_once():
    source = TensorBatches(torch.arange(8.0), torch.arange(8), batch=2, seed=0)
    seen = torch.cat([source.batch(3, step)[1] for step in range(source.steps_per_epoch)])
    assert sorted(seen.tolist()) == list(range(8))
    assert TensorBatches(torch.arange(8.0), torch.arange(8), batch=3, seed=0).steps_per_epoch == 2
