"""Images as files with preprocessing in their graph take them. Shapes: N images, H height, W width."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cspdeploy.core.preprocess import load_image, resize_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Artifact, Frontend

__all__ = ["in_order", "pixel_change", "pixels_for"]


def pixels_for(frontend: Frontend, stored: npt.NDArray[np.uint8], contract: Preprocess) -> npt.NDArray[np.uint8]:
    """Stored images, `[N, h, w]` or `[N, h, w, 3]`, as `[N, H, W, 3]`: resized, unless the graph does that."""
    images = (load_image(image) for image in stored)
    found = [np.asarray(image) if frontend.resize else resize_image(image, contract) for image in images]
    return in_order(np.stack(found), frontend)


def in_order(images_NHWC: npt.NDArray[np.uint8], frontend: Frontend) -> npt.NDArray[np.uint8]:
    """RGB images in the frontend's order."""
    return np.ascontiguousarray(images_NHWC[..., ::-1]) if frontend.channel_order == "bgr" else images_NHWC


def pixel_change(artifact: Artifact) -> float:
    """Relative L2 that its own resize moves the outputs by, as its steps say. What is no such number counts as none."""
    steps = artifact.steps if artifact.frontend is not None and artifact.frontend.resize else ()
    found = [step.facts.get("output_change") for step in steps]
    return max((float(one) for one in found if isinstance(one, int | float) and 0 <= one < math.inf), default=0.0)
