"""`export --embed-preprocess` on the command line: what is refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cspdeploy.cli.frontend_options import frontend_request
from cspdeploy.core.types import Frontend

Refuse = Callable[..., str]


@pytest.mark.parametrize("option", [("--bgr",), ("--embed-resize",), ("--embed-topk", 5)])
def test_option_of_the_image_without_it(
    refuse: Refuse, tiny_models: Path, tmp_path: Path, option: tuple[object, ...]
) -> None:
    lines = refuse("export", "tiny", "--models", tiny_models, "-o", tmp_path, *option)
    assert lines.startswith(f"error: {' '.join(map(str, option))}: is of files with preprocessing in the graph")
    assert "fix: add --embed-preprocess" in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--embed-topk", 99), "error: --embed-topk 99: tiny has 10 classes"),
        (("--embed-resize", "--opset", 17), "error: --embed-resize: bilinear as Pillow does it needs opset 18"),
        (("--embed-topk", 2, "--features"), "error: --embed-topk: is of classes, --features gives none"),
    ],
)
def test_what_does_not_go_together(
    refuse: Refuse, tiny_models: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    lines = refuse("export", "tiny", "--models", tiny_models, "-o", tmp_path, "--embed-preprocess", *options)
    assert lines.startswith(message)
    assert not (tmp_path / "tiny").exists()


def test_what_is_asked_for() -> None:
    assert frontend_request(preprocess=False, bgr=False, resize=False, top_k=None) is None
    asked = frontend_request(preprocess=True, bgr=True, resize=True, top_k=3)
    assert asked == Frontend(channel_order="bgr", resize=True, top_k=3)
