"""The hub library, its cache and all of the code are the real ones; the network stands in a row of the registry."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.pipeline.pull import pull_checkpoint
from tests.pipeline.stand_in_hub import CHUNK_BYTES, TAG, Hub, Pull, Server


@pytest.fixture
def state(tiny_config: CspNetConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The published weights. From here on the registry builds the small network under the checkpoint's name."""
    row = dataclasses.replace(NETWORKS["cspdarknet53"], config=tiny_config)
    monkeypatch.setitem(NETWORKS, "cspdarknet53", row)
    torch.manual_seed(3)
    return build(spec_of(row)).state_dict()


@pytest.fixture
def hub(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub library, with an empty cache, asks this one."""
    library = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    stand_in = Hub(body=save(state))
    server = Server(stand_in)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "*")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "DOWNLOAD_CHUNK_SIZE": CHUNK_BYTES,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's waits between tries
    library.close_session()
    yield stand_in
    library.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    constants = pytest.importorskip("huggingface_hub.constants")
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def pulled(hub: Hub, models: Path) -> Pull:
    """`pulled(overwrite=True)`: a pull of the tag into `models`."""
    return lambda name=TAG, **options: pull_checkpoint(name, **({"models": models} | options))
