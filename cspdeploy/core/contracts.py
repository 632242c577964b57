"""Preprocessing contracts that have a name, for networks that do not bring their own.

A contract is never guessed: the same network gives plausible nonsense on images that were prepared in another way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cspdeploy.core.codec import from_json
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.model_folder import read_json
from cspdeploy.core.spec import Preprocess

__all__ = ["CONTRACTS", "IMAGENET_MEAN", "IMAGENET_STD", "find_contract"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ANY_PX = 1  # replaced by the network's own size

CONTRACTS: dict[str, Preprocess] = {
    # torchvision's evaluation of its ImageNet classifiers: 256 px for an input of 224, then the centre.
    "imagenet": Preprocess(
        height_px=_ANY_PX, width_px=_ANY_PX, resize="crop", crop_pct=0.875, interpolation="bilinear",
        channel_order="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    ),
    # The whole image, its ratio not kept, as values in [0, 1].
    "unit": Preprocess(
        height_px=_ANY_PX, width_px=_ANY_PX, resize="stretch", crop_pct=1.0, interpolation="bilinear",
        channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    ),
    # Darknet's classifiers: the centre of the image, as values in [0, 1].
    "darknet": Preprocess(
        height_px=_ANY_PX, width_px=_ANY_PX, resize="crop", crop_pct=1.0, interpolation="bilinear",
        channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    ),
}  # fmt: skip
CHOICES = f"{', '.join(CONTRACTS)}, or a JSON file"


def find_contract(given: str, *, size_px: tuple[int, int] | None) -> Preprocess:
    """The contract of that name, or of that JSON file: a contract, or any file with one under "preprocess".

    Args:
        given: one of `CONTRACTS`, or a path.
        size_px: height and width of the network's input, or None where it leaves them free.

    Raises:
        InputError: no such name or file, a field that is wrong, or another size than the network's.
    """
    if given in CONTRACTS:
        if size_px is None:
            raise InputError(
                f"--preprocess {given}: the input's height and width are free, expected a size",
                fix="--preprocess FILE.json, which holds height_px and width_px; export also takes --size HxW",
            )
        return CONTRACTS[given].with_size(*size_px)
    path = Path(given)
    if not path.is_file():
        near = did_you_mean(given, CONTRACTS)
        raise InputError(f"--preprocess {given}: neither a file nor one of {', '.join(CONTRACTS)}",
                         fix=f"{near}--preprocess imagenet, or a JSON file such as a model's spec.json")  # fmt: skip
    contract = _read(path)
    own = (contract.height_px, contract.width_px)
    if size_px not in (None, own):
        height_px, width_px = size_px or own
        raise InputError(
            f"{path}: is for {own[0]}x{own[1]} px, the network's input has {height_px}x{width_px} px",
            fix=f"set height_px to {height_px} and width_px to {width_px} in {path}",
        )
    return contract


def _read(path: Path) -> Preprocess:
    data: Any = read_json(path)
    inner = "preprocess" in data or "spec" in data
    for key in ("spec", "preprocess"):  # manifest.json holds a spec, which holds a contract; spec.json is the spec
        data = data[key] if isinstance(data, dict) and key in data else data
    try:
        return from_json(Preprocess, data, where="$.preprocess" if inner else "$")
    except InputError as error:
        raise InputError(f"{path}: {error.message}", fix=f"mend it, or --preprocess {' | '.join(CONTRACTS)}") from error
