"""Audit of calibration images: ranges are only as good as the images that they were read from.

Shapes: N images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.core.calibration_audit import CalibrationAudit, CalibrationFinding, ChannelStatistics
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.calibration import CalibrationSet, SetTraits
from cspdeploy.quant.image_traits import CONSTANT_LEVELS, ImageTraits

__all__ = ["audit_calibration"]

Floats = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]
Severity = Literal["error", "warning", "note"]

REAL_IMAGES = "give --calib DIR, a folder of real images such as the model will meet"

MIN_IMAGES = 32
"""CSPDarknet53 on Fashion-MNIST, largest values behind each activation, 500 test images: of all pairs of an image and
a tensor 11.6 % exceed what 8 images gave, 5.5 % with 16, 2.7 % with 32, 1.3 % with 64, 0.7 % with 128, 0.1 % with 512.
"""
COMMON = 0.25
"""Share of the images from which on a finding about single ones becomes a warning about the set."""
HALF = 0.5
"""Of the images for what refuses a set; of an image's area for what its ratio costs."""
ENLARGED = 2.0
"""From this factor on three of four pixels are made up, and the finest structures of real input are missing."""
MAX_DISTANCE = 0.5
"""Earth mover's distance to the seen pixels, in their standard deviations.

Measured: other images of the same kind up to 0.05 (8 images: 0.08), 0.45 for one class of ten of Fashion-MNIST, 0.44
between crops of two sets of five photographs. For a model of Fashion-MNIST: photographs 0.57 to 0.71, cut-outs on
black, which are much like it, 0.45 to 0.53. The reverse 0.76 to 1.08, inverted images 0.67 to 1.24, half as bright ones
0.37 to 1.3, rendered letters and diagrams 0.75 and more. The distance of the means alone misses lost contrast: 0.25 for
half as bright photographs, whose distance here is 0.56.
"""
MIN_TINT = 0.05
"""Difference between the tints (a channel's mean less the mean of all three, in [0, 1]) of two sets, from which on
swapped channels are thought of. Photographs and cut-outs among each other: up to 0.04; swapped: 0.10 and more."""
SWAP_GAIN = 0.5
"""Swapping must bring the tints that much nearer. Swapped photographs: 0.3 and less of the difference is left; grey
images, where swapping does nothing: 1."""
MAX_NAMES = 3


def audit_calibration(
    images: CalibrationSet, *, seen: CalibrationSet | None = None, refuse: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> CalibrationAudit:  # fmt: skip
    """Look at all images in one pass.

    Args:
        images: the set.
        seen: images that the model is known to have met, under the same contract: those of its folder's
            `calibration.npz`, or the golden images of its bundle.
        refuse: raise where no shipped artifact may be made from the set; with False the report says so instead.

    Raises:
        InputError: an image cannot be read; or, unless `refuse` is False, the set is blank or random, or the contract
            gives values that are no float32 numbers.
    """
    traits = images.traits(progress=progress)
    same = seen is not None and seen.content_hash == images.content_hash
    reference = None if seen is None or same else seen.traits()
    audit = _measure(images, traits, reference)
    found = [*_find_fatal(audit), *_find_single(images, traits, audit), *_find_shapes(images, audit)]
    if reference is not None:
        found += _find_shift(audit, traits, reference)
    audit = dataclasses.replace(audit, findings=tuple(found))
    if refuse and audit.errors:
        raise InputError(f"{audit.origin}: {audit.errors[0].text}", fix=audit.errors[0].fix)
    return audit


def _measure(images: CalibrationSet, traits: SetTraits, seen: SetTraits | None) -> CalibrationAudit:
    contract, order = images.contract, np.arange(len(images))
    low, high = _after_preprocessing(0, contract), _after_preprocessing(255, contract)
    return CalibrationAudit(
        origin=images.origin,
        content_sha256=images.content_hash,
        contract=contract,
        num_images=len(images),
        num_copies=int((traits.exact != order).sum()),
        num_near_copies=int(((traits.group != order) & (traits.exact == order)).sum()),
        num_constant=sum(image.constant for image in traits.images),
        num_noise=sum(image.is_noise or image.lacks_coarse_structure for image in traits.images),
        num_sizes=len({(image.width_px, image.height_px) for image in traits.images}),
        num_reshaped=sum(_ratio_kept(image, contract) < HALF for image in traits.images),
        num_enlarged=sum(_enlargement(image, contract) > ENLARGED for image in traits.images),
        num_ignored_files=images.ignored.total(),
        allowed_low=_three(low),
        allowed_high=_three(high),
        channels=_statistics(traits, contract),
        seen=None if seen is None else _statistics(seen, contract),
        seen_distance=None if seen is None else _distance(traits.histogram_RGB, seen.histogram_RGB),
    )


def _ratio_kept(image: ImageTraits, contract: Preprocess) -> float:
    """Share that is left of the image (crop), of its longer side's detail (stretch) or of the canvas (letterbox)."""
    ratio = (image.width_px / image.height_px) / (contract.width_px / contract.height_px)
    return min(ratio, 1 / ratio)


def _enlargement(image: ImageTraits, contract: Preprocess) -> float:
    across, down = contract.width_px / image.width_px, contract.height_px / image.height_px
    return min(across, down) if contract.resize == "letterbox" else max(across, down)


def _statistics(traits: SetTraits, contract: Preprocess) -> ChannelStatistics:
    histogram = traits.histogram_RGB[::-1] if contract.channel_order == "bgr" else traits.histogram_RGB
    mean, std = _moments(histogram)
    occurring = [np.flatnonzero(row) for row in histogram]
    return ChannelStatistics(
        mean=_three((mean - np.asarray(contract.mean)) / np.asarray(contract.std)),
        std=_three(std / np.asarray(contract.std)),
        low=_three(_after_preprocessing(np.asarray([values[0] for values in occurring]), contract)),
        high=_three(_after_preprocessing(np.asarray([values[-1] for values in occurring]), contract)),
        black_share=float(histogram[:, 0].sum() / histogram.sum()),
        white_share=float(histogram[:, 255].sum() / histogram.sum()),
        grey_share=_grey_share(traits),
    )


def _grey_share(traits: SetTraits) -> float:
    return sum(image.grey for image in traits.images) / len(traits.images)


def _moments(histogram: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, in units of [0, 1]."""
    shares, values = histogram / histogram.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    return mean, np.sqrt((shares * np.square(values - mean[:, None])).sum(axis=1))


def _after_preprocessing(level: int | npt.NDArray[np.int64], contract: Preprocess) -> Floats:
    """What the contract makes of a byte, `[3]` in its order of channels."""
    return (level / 255 - np.asarray(contract.mean, np.float64)) / np.asarray(contract.std, np.float64)


def _distance(histogram: npt.NDArray[np.int64], seen: npt.NDArray[np.int64]) -> float | None:
    """Earth mover's distance in standard deviations of the seen pixels; the channel where it is largest."""
    _, std = _moments(seen)
    if std.min() == 0:
        return None
    ours, theirs = (np.cumsum(counts / counts.sum(axis=1, keepdims=True), axis=1) for counts in (histogram, seen))
    return float((np.abs(ours - theirs).sum(axis=1) / 255 / std).max())


def _three(values: Floats) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _find_fatal(audit: CalibrationAudit) -> Iterator[CalibrationFinding]:
    bounds = np.abs([*audit.allowed_low, *audit.allowed_high])
    if bounds.max() > np.finfo(np.float32).max:
        yield _finding("error", f"the contract gives values up to {bounds.max():.1e}, expected float32 numbers",
                       fix=f"mend mean {audit.contract.mean} and std {audit.contract.std} of the model")  # fmt: skip
    if audit.num_constant == audit.num_images:
        yield _finding("error", f"images of one colour: all {audit.num_images}, expected images whose values span more "
                       f"than {CONSTANT_LEVELS} of 255", fix=REAL_IMAGES)  # fmt: skip


def _find_single(images: CalibrationSet, traits: SetTraits, audit: CalibrationAudit) -> Iterator[CalibrationFinding]:
    """Images that bring nothing, or that are no images."""
    num, distinct = audit.num_images, audit.num_distinct
    if distinct < MIN_IMAGES:
        others = "" if distinct == num else f" different (of {num})"
        yield _finding("warning", f"{distinct}{others} images, expected at least {MIN_IMAGES}: ranges that few images "
                       "give are too narrow, and later images are clipped", fix="give 128 to 512 images")  # fmt: skip
    if images.split().shared:
        yield _finding("note", "too few different images to hold any out: repairs are judged on the images that "
                       "they were made from")  # fmt: skip
    if audit.num_copies:
        yield _finding(_weight(audit.num_copies, num), f"copies of other images: {audit.num_copies} of {num}",
                       fix="remove the copies")  # fmt: skip
    if audit.num_near_copies:
        yield _finding(_weight(audit.num_near_copies, num), "images that show what another shows: "
                       f"{audit.num_near_copies} of {num}", fix="keep one of each burst")  # fmt: skip
    constant = [i for i, image in enumerate(traits.images) if image.constant]
    if 0 < len(constant) < num:
        yield _finding("warning", f"images of one colour: {len(constant)} of {num} ({_names(images, constant)})",
                       fix="remove them")  # fmt: skip
    yield from _find_noise(images, traits)


def _find_noise(images: CalibrationSet, traits: SetTraits) -> Iterator[CalibrationFinding]:
    num_real = sum(not image.constant for image in traits.images)
    noise = [i for i, image in enumerate(traits.images) if image.is_noise]
    coarse = [i for i, image in enumerate(traits.images) if image.lacks_coarse_structure and not image.is_noise]
    if noise and len(noise) >= HALF * num_real:
        yield _finding("error", f"noise: {len(noise)} of {len(images)} images; random data is refused for a shipped "
                       "artifact, its ranges are not those of real images", fix=REAL_IMAGES)  # fmt: skip
    elif noise:
        yield _finding("warning", f"noise: {len(noise)} of {len(images)} images ({_names(images, noise)})",
                       fix="remove them")  # fmt: skip
    if coarse:
        text = f"{len(coarse)} of {len(images)} images ({_names(images, coarse)})"
        yield _finding(_weight(len(coarse), num_real), f"enlarged noise, or texture without any larger shape: {text}",
                       fix=REAL_IMAGES)  # fmt: skip


def _find_shapes(images: CalibrationSet, audit: CalibrationAudit) -> Iterator[CalibrationFinding]:
    num, contract = audit.num_images, audit.contract
    size = f"{contract.width_px}x{contract.height_px}"
    if audit.num_ignored_files:
        kinds = ", ".join(f"{count} {kind}" for kind, count in images.ignored.most_common(MAX_NAMES))
        yield _finding("note", f"other files, ignored: {audit.num_ignored_files} ({kinds})")
    if audit.num_sizes > 1:
        yield _finding("note", f"images of {audit.num_sizes} sizes, all brought to {size}")
    if audit.num_reshaped:
        loss = {"crop": "lose more than half to the crop", "stretch": "are squeezed more than twofold",
                "letterbox": "leave more than half of the input grey"}[contract.resize]  # fmt: skip
        yield _finding(_weight(audit.num_reshaped, num), f"images that {loss}, so far is their ratio from that of "
                       f"{size}: {audit.num_reshaped} of {num}", fix="give images as they are used")  # fmt: skip
    if audit.num_enlarged:
        yield _finding("note", f"images enlarged more than twofold to {size}, and so smoother than others of that "
                       f"size: {audit.num_enlarged} of {num}")  # fmt: skip


def _find_shift(audit: CalibrationAudit, ours: SetTraits, seen: SetTraits) -> Iterator[CalibrationFinding]:
    """Images of another kind than those that the model knows."""
    if audit.seen is not None and audit.seen_distance is not None and audit.seen_distance > MAX_DISTANCE:
        got, expected = (
            f"mean {' '.join(f'{value:.2f}' for value in channels.mean)}, "
            f"std {' '.join(f'{value:.2f}' for value in channels.std)}, "
            f"{channels.black_share:.0%} black, {channels.white_share:.0%} white"
            for channels in (audit.channels, audit.seen)
        )
        yield _finding("warning", f"not such images as the model saw: {got}, expected about {expected}",
                       fix="check that they are real input, neither scaled nor inverted before")  # fmt: skip
    if _looks_swapped(ours, seen):
        yield _finding("warning", "red and blue fit the images that the model saw only after they are swapped",
                       fix="store the images as RGB (OpenCV holds BGR), or mend the model's channel_order")  # fmt: skip
    grey, seen_grey = _grey_share(ours), _grey_share(seen)
    if max(grey, seen_grey) == 1 and min(grey, seen_grey) < HALF:
        kinds = ("without colour", "in colour") if grey == 1 else ("in colour", "without colour")
        yield _finding("warning", f"most images are {kinds[0]}, those that the model saw are {kinds[1]}",
                       fix="give images as the model will meet them")  # fmt: skip


def _looks_swapped(ours: SetTraits, seen: SetTraits) -> bool:
    means = [_moments(traits.histogram_RGB)[0] for traits in (ours, seen)]
    tint, seen_tint = (mean - mean.mean() for mean in means)
    as_is, swapped = np.abs(tint - seen_tint).max(), np.abs(tint[::-1] - seen_tint).max()
    return bool(as_is > MIN_TINT and swapped < SWAP_GAIN * as_is)


def _weight(count: int, total: int) -> Severity:
    return "warning" if count >= COMMON * total else "note"


def _names(images: CalibrationSet, indices: Sequence[int]) -> str:
    shown = ", ".join(images.name(i) for i in indices[:MAX_NAMES])
    return shown if len(indices) <= MAX_NAMES else f"{shown} and {len(indices) - MAX_NAMES} others"


def _finding(severity: Severity, text: str, *, fix: str = "") -> CalibrationFinding:
    return CalibrationFinding(severity=severity, text=text, fix=fix)
