"""A weights file of any known form into a network."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import NUM_IMAGENET_CLASSES, wnid_from_devkit
from cspdeploy.nets.weights import load_weights, read_state_dict

__all__ = ["is_darknet_file", "load_file"]

_DARKNET_NAME = re.compile(r".*\.(weights|backup|conv\.\d+)")


DARKNET_FORMS = (
    "name Darknet's form of the network: csdarknet53, csresnet50, csresnext50 (with Mish csdarknet53-omega, ...), "
    "or give the .cfg that the file belongs to"
)


def is_darknet_file(path: Path) -> bool:
    """Whether the name is that of a Darknet file.

    `net.weights`; `net.backup`, in the midst of a training; `net.conv.137`, which holds the first layers.
    """
    return _DARKNET_NAME.fullmatch(path.name) is not None


def load_file(network: nn.Module, path: Path) -> None:
    """Load `path` into `network`; nothing is loaded unless everything fits.

    A Darknet file is read into the network of its cfg as it is. In a native CSP network or detector its convolutions
    are put together as that one's layout wants them, and 1000 classes of a classifier, which are ImageNet's, go from
    Darknet's order to that of sorted WordNet ids.

    Raises:
        InputError: the file cannot be read, or is that of another network.
    """
    if is_darknet_file(path):
        _load_darknet(network, path)
    else:
        load_weights(network, read_state_dict(path), source=str(path))


def _load_darknet(network: nn.Module, path: Path) -> None:
    from cspdeploy.nets.cspnet import CspNet
    from cspdeploy.nets.darknet.convert import read_darknet_into_native
    from cspdeploy.nets.darknet.network import DarknetNet
    from cspdeploy.nets.darknet.weights import read_darknet
    from cspdeploy.nets.yolov4 import YoloV4

    if isinstance(network, DarknetNet):
        read_darknet(path, network)
        return
    if isinstance(network, YoloV4):
        num_classes, order = network.num_classes, None
    elif isinstance(network, CspNet):
        num_classes = network.head.fc.out_features
        order = wnid_from_devkit() if num_classes == NUM_IMAGENET_CLASSES else None
    else:
        raise InputError(
            f"{path}: a Darknet file, and this network has no form in Darknet",
            fix="give the .cfg that the file belongs to instead of the network's name",
        )
    try:
        state = read_darknet_into_native(path, network.config, num_classes=num_classes, class_order=order)
    except InputError as error:
        if error.message.startswith(str(path)):
            raise
        raise InputError(
            f"{path}: a Darknet file, and this network is none of Darknet's: {error.message}", fix=DARKNET_FORMS
        ) from error
    load_weights(network, state, source=str(path))
