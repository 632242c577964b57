"""Classifies every image that is put into a folder, or finds the objects in it, and prints one line of JSON for each.

A line is {"image", "untrained", "predictions": [{"label", "index", "probability"}]}, of a detector {"image",
"untrained", "boxes": [{"label", "index", "score", "left", "top", "right", "bottom"}]} in pixels of the picture, or
{"image", "error"} for a file that is no image. The folder is looked at again and again, not watched: network file
systems report no changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cspdeploy.core.errors import CspDeployError, InputError

if TYPE_CHECKING:
    from cspdeploy.edge import Predictor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})

Stamp = tuple[int, int]
"""Time of the last change and size: a file with another one is another image."""


class Folder:
    """Tells which images of a folder are new since it was last asked.

    Args:
        wait_for_rest: give a file only when it has not changed since the look before, so that none is read while it is
            still being copied.
    """

    def __init__(self, path: Path, *, wait_for_rest: bool) -> None:
        self._path, self._wait_for_rest = path, wait_for_rest
        self._done: dict[str, Stamp] = {}
        self._growing: dict[str, Stamp] = {}

    def new_images(self) -> Iterator[Path]:
        """Images that were not there before, or were others, by name.

        Raises:
            InputError: the folder cannot be read.
        """
        there = self._list()
        # Those that are gone are forgotten: the same name may come again, and memory must not grow with the years.
        self._done = {name: stamp for name, stamp in self._done.items() if name in there}
        for name, stamp in sorted(there.items()):
            if self._done.get(name) == stamp:
                continue
            if self._wait_for_rest and self._growing.get(name) != stamp:
                continue
            self._done[name] = stamp
            yield self._path / name
        self._growing = there

    def _list(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    # Hidden files are those that another program is still writing.
                    if entry.name[0] == "." or Path(entry.name).suffix.lower() not in SUFFIXES or not entry.is_file():
                        continue
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # taken away since
                        continue
                    found[entry.name] = (status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}", fix="name a folder that can be read") from error
        return found


def answer(predictor: Predictor, path: Path, *, top: int) -> dict[str, object]:
    """One line of the output."""
    try:
        found = predictor(path, top=top)
    except InputError as error:  # a broken image is no reason to end
        return {"image": path.name, "error": error.message}
    return {
        "image": path.name,
        "untrained": predictor.untrained,
        "boxes" if predictor.task == "detect" else "predictions": [dataclasses.asdict(one) for one in found],
    }


def watch(predictor: Predictor, options: argparse.Namespace, *, stop: threading.Event) -> None:
    """Until `stop`, or once through the folder."""
    folder = Folder(options.images, wait_for_rest=not options.once)
    while not stop.is_set():
        for path in folder.new_images():
            sys.stdout.write(json.dumps(answer(predictor, path, top=options.top), ensure_ascii=False) + "\n")
            sys.stdout.flush()
            if stop.is_set():
                return
        if options.once:
            return
        stop.wait(options.interval)


def read_options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description="Classes of every image that is put into a folder, or boxes.")
    parser.add_argument("images", type=Path, help="the folder")
    parser.add_argument("--bundle", required=True, help="what cspdeploy export has written")
    parser.add_argument("--artifact", default="onnx", help="kind of artifact (default: %(default)s)")
    parser.add_argument("--runtime", default="ort-cpu", help="engine and device (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0: all cores (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes a line, of a classifier (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="take what is there, then end")
    return parser.parse_args()


def main() -> int:
    """Exit 0: ended as asked; 1: a file of the bundle was changed; 2: bad input; 3: the engine is missing."""
    options = read_options()
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    # Before the model is opened: process 1 of a container has no default action, and would not be stopped until then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        from cspdeploy.edge import Predictor

        predictor = Predictor.open(
            options.bundle, artifact=options.artifact, runtime=options.runtime, num_threads=options.threads
        )
        watch(predictor, options, stop=stop)
    except CspDeployError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"fix: {error.fix}\n" if error.fix else ""))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
