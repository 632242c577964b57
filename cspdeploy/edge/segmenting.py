"""From a segmenter's class scores to the class of every pixel of the picture. Loaded for segmenters only.

Shapes: C classes, H and W of the network's input, h and w of the picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.fit import fit_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.edge.opening import OpenedArtifact

__all__ = ["UNSEEN", "class_map"]

UNSEEN = -1
"""Class of a pixel that the contract's crop keeps from the network."""


def class_map(
    logits_CHW: npt.NDArray[Any], opened: OpenedArtifact, *, size_px: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Best class of each pixel of the picture `[h, w]`: that of the pixel of the network's input it lies in.

    Args:
        logits_CHW: of the whole input, at its size or coarser.
        size_px: width and height of the picture.

    Returns:
        Indices of classes, equal scores by lower index; `UNSEEN` where the contract cuts the picture.

    Raises:
        InputError: not a map of each label, or a score is NaN.
    """
    labels = opened.labels
    if logits_CHW.ndim != 3 or (labels and len(logits_CHW) != len(labels)):
        raise InputError(
            f"{opened.model}: class scores {list(logits_CHW.shape)} and {len(labels)} labels, expected "
            f"[{len(labels) or 'C'}, H, W]",
            fix="export it again",
        )
    if np.isnan(logits_CHW).any():
        raise InputError(
            f"{opened.path}: class scores that are NaN: {opened.runtime.name} cannot compute it",
            fix=f"python -m cspdeploy.edge selftest {opened.path.parent}",
        )
    best_HW = logits_CHW.argmax(0)
    rows, columns = _places(opened.contract, size_px=size_px, map_px=(best_HW.shape[1], best_HW.shape[0]))
    found_hw = best_HW[np.clip(rows, 0, best_HW.shape[0] - 1)[:, None], np.clip(columns, 0, best_HW.shape[1] - 1)]
    found_hw[(rows < 0) | (rows >= best_HW.shape[0])] = UNSEEN
    found_hw[:, (columns < 0) | (columns >= best_HW.shape[1])] = UNSEEN
    return np.asarray(found_hw, np.int64)


def _places(
    contract: Preprocess, *, size_px: tuple[int, int], map_px: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row of the map for each row of the picture, and column for each column; beyond the map where it is cut."""
    fit = fit_image(contract, width=size_px[0], height=size_px[1])

    def along(size: int, scaled: int, offset: int, window: int, num: int) -> npt.NDArray[np.int64]:
        # Middles of pixels: a picture of the window's own size is taken pixel by pixel.
        inside = (np.arange(size) + 0.5) * (scaled / size) - offset
        return np.asarray(np.floor(inside * (num / window)), np.int64)

    rows = along(size_px[1], fit.scaled_px[1], fit.top_px, contract.height_px, map_px[1])
    return rows, along(size_px[0], fit.scaled_px[0], fit.left_px, contract.width_px, map_px[0])
