from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cspdeploy.quant import observations_cache
from cspdeploy.quant.observations_cache import ObservationsCache, default_cache_folder, observation_key

ARRAYS = {
    "/stage/conv/Conv_output_0": np.arange(6, dtype=np.int64).reshape(2, 3),
    "file": np.float32([1.5, -2.0]),
    "empty": np.zeros((0, 4), np.float64),
}
KEY = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path) -> ObservationsCache:
    return ObservationsCache(tmp_path)


def _entry(folder: Path, key: str = KEY) -> Path:
    return folder / "observations" / f"{key}.npz"


def _big(seed: int) -> dict[str, npt.NDArray[np.uint8]]:
    """10,000 bytes that do not shrink."""
    return {"a": np.random.default_rng(seed).integers(0, 256, 10_000, np.uint8)}


def test_what_was_stored_is_found(cache: ObservationsCache, tmp_path: Path) -> None:
    assert cache.load(KEY) is None
    assert cache.store(KEY, ARRAYS)
    for reader in (cache, ObservationsCache(tmp_path)):
        found = reader.load(KEY)
        assert found is not None
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert [path.name for path in (tmp_path / "observations").iterdir()] == [f"{KEY}.npz"]


def test_without_a_folder_nothing_is_kept() -> None:
    cache = ObservationsCache(None)
    assert not cache.store(KEY, ARRAYS)
    assert cache.load(KEY) is None


def test_a_key_names_all_that_an_observation_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        observation_key(b"graph", content_hash="c", observer="v1"),
        observation_key(b"other", content_hash="c", observer="v1"),
        observation_key(b"graph", content_hash="d", observer="v1"),
        observation_key(b"graph", content_hash="c", observer="v2"),
    }
    monkeypatch.setattr(observations_cache, "pillow_version", "0.0")
    keys.add(observation_key(b"graph", content_hash="c", observer="v1"))
    assert len(keys) == 5
    assert observation_key(b"graph", content_hash="c", observer="v1") in keys


@pytest.mark.parametrize("key", ["", "../../etc/passwd", KEY[:-1], KEY.upper(), KEY + "\n"])
def test_a_key_cannot_leave_the_folder(key: str, cache: ObservationsCache) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        cache.store(key, ARRAYS)
    with pytest.raises(ValueError, match="hexadecimal"):
        cache.load(key)


# --- what cannot be trusted ---


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array([{"key": KEY}], object))
    return buffer.getvalue()


def _without_header() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a0=np.zeros(3))
    return buffer.getvalue()


def _of_list() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(b"[1]", np.uint8))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not a zip", _pickled(), _without_header(), _of_list()])
def test_foreign_files_are_ignored_and_written_anew(content: bytes, cache: ObservationsCache, tmp_path: Path) -> None:
    cache.store(KEY, ARRAYS)
    _entry(tmp_path).write_bytes(content)
    assert cache.load(KEY) is None
    assert cache.store(KEY, ARRAYS)
    assert cache.load(KEY) is not None


def test_every_flipped_bit_of_the_numbers_is_seen(cache: ObservationsCache, tmp_path: Path) -> None:
    cache.store(KEY, _big(0))
    whole = _entry(tmp_path).read_bytes()
    for place in range(2000, 9000, 1000):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        _entry(tmp_path).write_bytes(bytes(damaged))
        assert cache.load(KEY) is None
    _entry(tmp_path).write_bytes(whole[: len(whole) // 2])
    assert cache.load(KEY) is None


def test_another_observation_under_this_name_is_not_taken(cache: ObservationsCache, tmp_path: Path) -> None:
    other = "cd" * 32
    cache.store(other, ARRAYS)
    _entry(tmp_path, other).rename(_entry(tmp_path))
    assert cache.load(KEY) is None


def test_what_unpacks_to_too_much_is_not_read(
    cache: ObservationsCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(KEY, {"a": np.zeros(100_000)})
    assert _entry(tmp_path).stat().st_size < 10_000
    monkeypatch.setattr(observations_cache, "MAX_ENTRY_BYTES", 100_000)
    assert cache.load(KEY) is None
    assert not cache.store(KEY, {"a": np.zeros(100_000)})


def test_python_objects_are_refused(cache: ObservationsCache) -> None:
    with pytest.raises(ValueError, match="Python objects"):
        cache.store(KEY, {"a": np.array([{}], object)})


def test_a_folder_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = ObservationsCache(tmp_path / "file")
    assert not cache.store(KEY, ARRAYS)
    assert cache.load(KEY) is None


# --- size ---


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ObservationsCache(tmp_path, max_bytes=35_000)
    keys = [f"{i:064x}" for i in range(4)]
    for i, key in enumerate(keys[:3]):
        cache.store(key, _big(i))
        _age(_entry(tmp_path, key), 100 - i)
    assert cache.load(keys[0]) is not None  # used now, so the second is the oldest

    assert cache.store(keys[3], _big(3))

    assert [_entry(tmp_path, key).is_file() for key in keys] == [True, False, True, True]


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = ObservationsCache(tmp_path, max_bytes=5_000)
    assert not cache.store(KEY, _big(0))
    assert cache.load(KEY) is None


def test_what_killed_writers_left_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    cache = ObservationsCache(tmp_path, max_bytes=15_000)
    cache.store(KEY, ARRAYS)
    folder = tmp_path / "observations"
    for name, age in ((".old.tmp", 7200.0), (".new.tmp", 10.0), ("photos.npz", 1e6)):
        (folder / name).write_bytes(bytes(20_000))
        _age(folder / name, age)
    cache.store(f"{1:064x}", _big(1))
    assert {path.name for path in folder.iterdir()} >= {".new.tmp", "photos.npz"}
    assert not (folder / ".old.tmp").exists()


# --- two processes ---

WRITER = """
import sys
from pathlib import Path
import numpy as np
from cspdeploy.quant.observations_cache import ObservationsCache
cache = ObservationsCache(Path(sys.argv[1]), max_bytes=60_000)
for i in range(20):
    key = f"{i % 8:064x}"
    cache.store(key, {"a": np.full(1000, i % 8), "b": np.random.default_rng(i).integers(0, 256, 9000, np.uint8)})
    found = cache.load(key)
    assert found is None or (found["a"] == i % 8).all()
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    left = list((tmp_path / "observations").iterdir())
    assert left
    assert not [path for path in left if path.suffix == ".tmp"]
    assert all(ObservationsCache(tmp_path).load(path.stem) is not None for path in left)


# --- place ---


def test_the_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CSPDEPLOY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_folder() == tmp_path / ".cache" / "cspdeploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == tmp_path / ".cache" / "cspdeploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "cspdeploy"
    monkeypatch.setenv("CSPDEPLOY_CACHE", str(tmp_path / "own"))
    assert default_cache_folder() == tmp_path / "own"
