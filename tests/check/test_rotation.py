from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.check.rotation import UNKNOWN_L2_BYTES, num_sets, rotated_sets

MB = 1_000_000


@pytest.mark.parametrize(
    ("set_mb", "l2_mb", "count"),
    [
        (0.786432, 52.4288, 134),  # one image at 256 px on an H100
        (0.05, 50, 256),  # one of 64 px: as many as are allowed
        (25.2, 50, 4),  # batch 32
        (50.0, 50, 3),  # twice the cache is not more than twice the cache
        (400.0, 50, 2),  # no address repeats from one run to the next
        (0.786, 6, 16),  # a GPU of a notebook
    ],
)
def test_sets_are_together_more_than_twice_the_cache(set_mb: float, l2_mb: float, count: int) -> None:
    found = num_sets(int(set_mb * MB), l2_bytes=int(l2_mb * MB))
    assert found == count
    if found < 256:
        assert found * set_mb > 2 * l2_mb


@pytest.mark.parametrize(
    "shape", [(1, 3, 64, 64), (2, 3, 8, 8), (1, 3, 256, 256), (1, 64, 64, 3), (1, 1, 8, 8), (1, 8, 8, 1)]
)
def test_sets_differ_and_have_the_same_distribution(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = rotated_sets({"x": x}, l2_bytes=50 * MB)
    assert len(found.sets) == min(256, num_sets(x.nbytes, l2_bytes=50 * MB)) > 64
    assert np.array_equal(found.sets[0]["x"], x)
    pixels = shape[1] * shape[2] if shape[-1] <= 4 < shape[-2] else shape[2] * shape[3]
    assert len({made["x"].tobytes() for made in found.sets}) == min(len(found.sets), 2 * pixels)
    channel = shape.index(min(shape[1:]), 1)
    for made in found.sets:
        assert made["x"].shape == shape
        assert made["x"].dtype == x.dtype
        assert made["x"].flags["C_CONTIGUOUS"]
        for k in range(shape[channel]):  # every channel keeps its own values
            ours, theirs = np.take(made["x"], k, channel), np.take(x, k, channel)
            assert np.array_equal(np.sort(ours, axis=None), np.sort(theirs, axis=None))


def test_sets_do_not_share_memory() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    found = rotated_sets({"x": x}, l2_bytes=0)
    assert not any(np.shares_memory(found.sets[1]["x"], made["x"]) for made in found.sets[2:])


def test_what_is_no_image_stays_as_it_is() -> None:
    feeds = {"x": np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3), "size": np.array([[640, 480]], np.int64)}
    found = rotated_sets(feeds, l2_bytes=50 * MB)
    assert all(np.array_equal(made["size"], feeds["size"]) for made in found.sets)
    assert not np.array_equal(found.sets[3]["x"], feeds["x"])


def test_words_of_a_row() -> None:
    found = rotated_sets({"x": np.zeros((1, 3, 256, 256), np.float32)}, l2_bytes=50 * MB)
    assert found.words == "rotated: 128 sets, 101 MB"
    assert found.num_bytes == 128 * 3 * 256 * 256 * 4


def test_cache_that_cannot_be_read_is_taken_to_be_a_large_one() -> None:
    x = np.zeros((1, 3, 1024, 1024), np.float32)
    assert len(rotated_sets({"x": x}).sets) == num_sets(x.nbytes, l2_bytes=UNKNOWN_L2_BYTES) == 8
