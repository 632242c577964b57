from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import imagenet_labels
from cspdeploy.nets.cspnet import CspNet, CspNetConfig, StageConfig, StemConfig
from cspdeploy.nets.darknet.form import native_to_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.nets.densenet import DenseNet
from cspdeploy.nets.loading import DARKNET_FORMS, load_file
from cspdeploy.nets.registry import find_network


def _config(slope: float = 0.1) -> CspNetConfig:
    """One stage of CSPDarknet, as Darknet has it."""
    stage = StageConfig(
        kind="csp", block="dark", depth=1, out_chs=16, stride=2, groups=1, expand_ratio=1.0, block_ratio=0.5,
        bottle_ratio=1.0, cross_linear=False, down_growth=True, avg_down=False, se_ratio=0.0,
    )  # fmt: skip
    stem = StemConfig(out_chs=(8,), kernel=3, stride=1, pool="none", padding=None)
    return CspNetConfig(stem=stem, stages=(stage,), activation="leaky_relu", leaky_slope=slope)


def _darknet(num_classes: int, randomise_norms: Callable[[nn.Module], None], path: Path) -> DarknetNet:
    """The Darknet network of `_config`, and its weights in `path`."""
    torch.manual_seed(0)
    network = DarknetNet(native_to_cfg(_config(), num_classes=num_classes)).eval()
    randomise_norms(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    write_darknet(path, network)
    return network


def test_darknet_file_into_its_own_network(tmp_path: Path, randomise_norms: Callable[[nn.Module], None]) -> None:
    network = _darknet(7, randomise_norms, tmp_path / "a.weights")
    torch.manual_seed(1)
    other = DarknetNet(network.config).eval()
    load_file(other, tmp_path / "a.weights")
    x_NCHW = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(other(x_NCHW), network(x_NCHW))


def test_darknet_file_into_a_native_network(tmp_path: Path, randomise_norms: Callable[[nn.Module], None]) -> None:
    network = _darknet(7, randomise_norms, tmp_path / "a.weights")
    native = CspNet(_config(), num_classes=7).eval()
    load_file(native, tmp_path / "a.weights")
    x_NCHW = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(native(x_NCHW), network(x_NCHW), rtol=1e-5, atol=1e-5)


def test_imagenet_classes_are_put_into_the_order_of_wordnet_ids(
    tmp_path: Path, randomise_norms: Callable[[nn.Module], None]
) -> None:
    """Each class keeps its logit under its name, and hardly one keeps its place."""
    network = _darknet(1000, randomise_norms, tmp_path / "a.weights")
    native = CspNet(_config(), num_classes=1000).eval()
    load_file(native, tmp_path / "a.weights")
    x_NCHW = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        theirs = dict(zip(imagenet_labels("devkit"), network(x_NCHW)[0].tolist(), strict=True))
        ours = dict(zip(imagenet_labels("wnid"), native(x_NCHW)[0].tolist(), strict=True))
    assert all(np.isclose(ours[label], theirs[label], rtol=1e-4, atol=1e-4) for label in theirs)
    assert list(ours) != list(theirs)


def test_other_slope_is_refused_since_the_weights_cannot_tell(
    tmp_path: Path, randomise_norms: Callable[[nn.Module], None]
) -> None:
    _darknet(7, randomise_norms, tmp_path / "a.weights")
    with pytest.raises(InputError, match=r"a\.weights: .*leaky_slope: got 0\.01, expected 0\.1") as caught:
        load_file(CspNet(_config(slope=0.01), num_classes=7), tmp_path / "a.weights")
    assert "csdarknet53" in caught.value.fix


def test_forms_that_an_error_names_are_networks() -> None:
    for name in ("csdarknet53", "csresnet50", "csresnext50", "csdarknet53-omega"):
        assert name in DARKNET_FORMS
        assert find_network(name).config.leaky_slope in (0.0, 0.1)  # type: ignore[union-attr]


def test_a_backup_of_a_training_is_a_darknet_file(tmp_path: Path, randomise_norms: Callable[[nn.Module], None]) -> None:
    network = _darknet(7, randomise_norms, tmp_path / "net.backup")
    load_file(DarknetNet(network.config), tmp_path / "net.backup")


def test_network_without_a_darknet_form(tmp_path: Path, randomise_norms: Callable[[nn.Module], None]) -> None:
    _darknet(7, randomise_norms, tmp_path / "a.weights")
    peleenet = find_network("peleenet").config
    with torch.device("meta"):
        network = DenseNet(peleenet, num_classes=7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no form in Darknet") as caught:
        load_file(network, tmp_path / "a.weights")
    assert ".cfg" in caught.value.fix


def test_nothing_is_loaded_from_a_file_of_other_length(
    tmp_path: Path, randomise_norms: Callable[[nn.Module], None]
) -> None:
    _darknet(7, randomise_norms, tmp_path / "a.weights")
    path = tmp_path / "a.weights"
    path.write_bytes(path.read_bytes()[:-4])
    native = CspNet(_config(), num_classes=7)
    before = [value.clone() for value in native.state_dict().values()]
    with pytest.raises(InputError):
        load_file(native, path)
    assert all(torch.equal(a, b) for a, b in zip(before, native.state_dict().values(), strict=True))
