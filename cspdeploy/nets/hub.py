"""Published checkpoints from the Hugging Face Hub: fetched by its own library, and checked before anyone reads them.

Which mirror is asked (HF_ENDPOINT), where files are kept (HF_HOME), whether the network may be used at all
(HF_HUB_OFFLINE) and how long a silent server is waited for (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT, 10 s each)
are that library's settings. A checkpoint that is in the cache is also used without a network, after the same check.

The library compares sizes, not hashes, and can wait for hours when a server asks it to. Both are mended here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import CspDeployError, InputError, MissingExtraError

__all__ = ["PINNED_SHA256", "FetchedCheckpoint", "fetch_checkpoint"]

OWNER = "timm"
CHECKPOINT_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
"""Taken where a repository has no safetensors; it is read without running any code that is in it."""

PINNED_SHA256: dict[str, str] = {}
"""SHA-256 that the file of a tag must have, whatever the hub states.

Empty: a pin must come from the publisher, and none could be read while this was written without a network. Until a tag
has one, its file is checked against the hash that the hub states, which finds a damaged file but not a dishonest hub.
To add one: the "SHA256" on the page https://huggingface.co/timm/TAG/blob/main/model.safetensors. A tag with a pin is
never fetched as anything but that file.
"""

MAX_FILE_BYTES = 4 << 30  # the largest network here has checkpoints of 0.3 GB; this bounds what a hub can make us store
# A first try and five more from the same byte on. The library counts so too, but anew whenever data arrived, also where
# the server sends the whole file again each time.
MAX_GETS = 6

_TAG = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RANGE = re.compile(r"bytes=(\d+)-")
_REFUSALS = {401, 403, 404, 410}
_WAIT_REQUESTS = {408, 429}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedCheckpoint:
    """A checkpoint in the library's cache whose hash is the stated one."""

    path: Path
    """`model.safetensors`, or `pytorch_model.bin` where the hub has only that."""
    sha256: str
    origin: str
    """Such as "hf://timm/cspdarknet53.ra_in1k@<commit>/model.safetensors"."""


def fetch_checkpoint(tag: str, *, progress: bool = False) -> FetchedCheckpoint:
    """The published checkpoint of that tag, downloaded unless the cache has it.

    Args:
        tag: name of the repository under "timm", such as "cspdarknet53.ra_in1k".
        progress: show the library's progress bar on stderr.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        InputError: no such checkpoint, the hub cannot be reached (and the cache has no copy), the connection was cut,
            or the file does not have the stated or pinned hash; such a file is removed from the cache.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extra="hub", needed_for=f"fetching checkpoint '{tag}'") from error
    if not _TAG.fullmatch(tag):
        raise InputError(f"checkpoint {tag!r}: not a name", fix="give one such as cspdarknet53.ra_in1k")
    with _one_line_errors(tag), _quiet_library(progress=progress):
        try:
            file, stated = _ask_hub(tag)
        except Exception as error:
            cached = None if _status(error) in _REFUSALS else _find_cached(tag)
            if cached is None:
                raise
            return _checked(tag, cached, stated=_stated_in_cache(cached))
        pinned = PINNED_SHA256.get(tag, stated)
        if stated != pinned:
            raise InputError(
                f"checkpoint '{tag}': the hub states SHA-256 {stated}, expected {pinned}, which is pinned",
                fix="unset HF_ENDPOINT to ask the official hub, update cspdeploy, or export with --weights FILE",
            )
        return _checked(tag, _download(tag, file), stated=stated)


def _ask_hub(tag: str) -> tuple[str, str]:
    """The file that the hub has of that tag, safetensors preferred, and the SHA-256 that the hub states for it."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return CHECKPOINT_FILE, _stated_by_hub(tag, CHECKPOINT_FILE)
    except EntryNotFoundError:  # the repository is there, the file is not
        if tag in PINNED_SHA256:
            raise
        return PICKLE_FILE, _stated_by_hub(tag, PICKLE_FILE)


def _stated_by_hub(tag: str, file: str) -> str:
    # One request without retries: the library would ask a hub that is away for minutes before it gives up.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    stated = get_hf_file_metadata(hf_hub_url(f"{OWNER}/{tag}", file))
    if not (stated.etag and _SHA256.fullmatch(stated.etag) and stated.commit_hash and stated.size):
        # Files in large-file storage have their SHA-256 as etag; others, and pages that are no hub's, do not.
        raise InputError(
            f"checkpoint '{tag}': {_hub_name()} states no SHA-256 of {file}, so it cannot be checked",
            fix="check HF_ENDPOINT and the proxy, or export with --weights FILE",
        )
    if not _COMMIT.fullmatch(stated.commit_hash) or stated.size > MAX_FILE_BYTES:
        raise InputError(
            f"checkpoint '{tag}': got {stated.size} bytes at commit '{stated.commit_hash[:40]}', "
            f"expected at most {MAX_FILE_BYTES} at a commit of 40 hexadecimal digits",
            fix="check HF_ENDPOINT, or export with --weights FILE",
        )
    return stated.etag


def _download(tag: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _bounded_requests():
        return Path(hf_hub_download(f"{OWNER}/{tag}", file))


def _find_cached(tag: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(f"{OWNER}/{tag}", file) for file in (CHECKPOINT_FILE, PICKLE_FILE))
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _stated_in_cache(path: Path) -> str:
    # The cache names a file by the etag it had and links to it; on file systems without links that name is lost.
    name = path.readlink().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else ""


def _checked(tag: str, path: Path, *, stated: str) -> FetchedCheckpoint:
    expected = PINNED_SHA256.get(tag, stated)
    if not expected:
        raise InputError(
            f"checkpoint '{tag}': {path} is in the cache without the hash that the hub states for it",
            fix="go online, or export with --weights FILE",
        )
    sha256 = file_sha256(path)
    if sha256 != expected:
        whose = "which is pinned" if tag in PINNED_SHA256 else "which the hub states"
        again = "the file was removed from the cache, run this again" if _discard(path) else f"delete {path}"
        raise InputError(
            f"checkpoint '{tag}': the file has SHA-256 {sha256}, expected {expected}, {whose}",
            fix=f"{again}, or export with --weights FILE",
        )
    origin = f"hf://{OWNER}/{tag}@{path.parent.name}/{path.name}"
    return FetchedCheckpoint(path=path, sha256=sha256, origin=origin)


def _discard(path: Path) -> bool:
    """Remove a cached file with everything it links to inside the cache, where it would be found again."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).resolve()
    link: Path | None = path
    try:
        while link is not None and link.parent.resolve().is_relative_to(cache):
            target = link.parent / link.readlink() if link.is_symlink() else None
            link.unlink(missing_ok=True)
            link = target
    except OSError:
        return False
    return True


@contextmanager
def _one_line_errors(tag: str) -> Iterator[None]:
    try:
        yield
    except CspDeployError:
        raise
    except Exception as error:  # the errors of the library and of its two transports have no base class in common
        raise _input_error(tag, error) from error


def _input_error(tag: str, error: Exception) -> InputError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    instead = "export with --weights FILE"
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            f"checkpoint '{tag}': not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
            fix=f"{instead}, or unset HF_HUB_OFFLINE and go online",
        )
    if status in _REFUSALS:
        return InputError(
            f"checkpoint '{tag}': {_hub_name()} has no such file for you (HTTP {status})",
            fix=f"check the name, {instead}, or set HF_TOKEN if the model is a private one",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(
            f"checkpoint '{tag}': the cache cannot be used ({_first_line(error)})",
            fix="set HF_HOME to a folder with room that you may write to, or export with --weights FILE",
        )
    reason = f"HTTP {status}" if status is not None else _first_line(error)
    return InputError(f"checkpoint '{tag}': not fetched from {_hub_name()} ({reason})", fix=f"{instead}, or go online")


def _status(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _hub_name() -> str:
    from huggingface_hub.constants import ENDPOINT

    return urlsplit(ENDPOINT).netloc.rpartition("@")[2] or ENDPOINT  # a mirror's address may hold a password


@contextmanager
def _quiet_library(*, progress: bool) -> Iterator[None]:
    """Without the library's warnings at every retry, since the error says it all; and without its bar if not asked."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as library_log
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity = library_log.get_verbosity()
    # A value of HF_HUB_DISABLE_PROGRESS_BARS is the user's word and stands above ours.
    hide_bar = not progress and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if verbosity == logging.WARNING:  # the default; whoever set another level wants to read the log
        library_log.set_verbosity_error()
    if hide_bar:
        disable_progress_bars()
    try:
        yield
    finally:
        library_log.set_verbosity(verbosity)
        if hide_bar:
            enable_progress_bars()


@contextmanager
def _bounded_requests() -> Iterator[None]:
    """Give up where the library does not: endless restarts of a download, and waits as long as a server asks for."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    gets, furthest = 0, 0

    def on_request(request: Any) -> None:
        nonlocal gets, furthest
        if request.method != "GET":
            return
        resumed = _RANGE.match(request.headers.get("Range", ""))
        start = int(resumed[1]) if resumed else 0
        gets, furthest = (1, start) if start > furthest else (gets + 1, furthest)
        if gets > MAX_GETS:
            raise ConnectionError(f"the download was cut or sent elsewhere {MAX_GETS} times without getting further")

    def on_response(response: Any) -> None:
        if response.status_code in _WAIT_REQUESTS:
            raise ConnectionError(f"HTTP {response.status_code}, asked to wait")

    session.event_hooks = {
        "request": [*hooks["request"], on_request],
        "response": [*hooks["response"], on_response],
    }
    try:
        yield
    finally:
        session.event_hooks = hooks
