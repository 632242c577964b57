"""The variable of the environment by which NVIDIA's libraries are kept from TF32, whatever a program asks of them.

Set to 0 it overrides every setting of an engine (NVIDIA's documentation of cuBLAS and cuDNN). Knows no engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["OFF_NOTE", "TF32_VARIABLE", "is_off", "override_setting"]

TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"
OFF_NOTE = f"TF32 off by {TF32_VARIABLE}=0 of the environment, whatever was asked for"


def override_setting() -> dict[str, str]:
    """For the settings of a session on CUDA: the variable as it is set; empty where it is not."""
    value = os.environ.get(TF32_VARIABLE, "")
    return {TF32_VARIABLE: value} if value else {}


def is_off(settings: Mapping[str, str]) -> bool:
    """Whether a session with those settings computes without TF32 by that variable alone."""
    return settings.get(TF32_VARIABLE) == "0"
