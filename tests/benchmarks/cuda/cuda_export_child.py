"""Child process of the CUDA benchmark: `GIVEN FOLDER SIZE float|int8` exports one network. Not for direct use.

A network of the registry gets seeded random weights: time does not depend on them in FP32, and in FP16 every node
whose values fit is in FP16 either way. Its images are those that models/cspdarknet53 brings.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.model_folder import CALIBRATION_FILE, WEIGHTS_FILE, read_calibration, write_calibration, write_spec
from cspdeploy.nets.registry import find_network, is_network, spec_of
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.weights import make_untrained

READY = "ready"
"""As `cuda_networks` has it."""
IMAGES = Path(__file__).parents[3] / "models" / "cspdarknet53" / CALIBRATION_FILE
NUM_IMAGES = 64
"""The export takes half of them to prove itself on, and half to find the ranges of FP16."""
INT8_IMAGES = 32
"""How good INT8's ranges are is judged elsewhere; here the file must be what the engine gets to see."""
INT8_OPSET = 17
"""The newest that the target `tensorrt` takes."""


def make_folder(given: str, models: Path) -> Path:
    """A model folder below `models`."""
    if not is_network(given):
        return Path(shutil.copytree(given, models / Path(given).name))
    folder = models / given
    folder.mkdir(parents=True)
    spec, model = make_untrained(spec_of(find_network(given)))
    write_safetensors(folder / WEIGHTS_FILE, model, dtype=torch.float32)
    write_spec(folder, spec)
    write_calibration(folder / CALIBRATION_FILE, read_calibration(IMAGES)[:NUM_IMAGES])
    return folder


def main() -> int:
    given, work, size, what = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    try:
        folder = make_folder(given, work / "models")
        (work / READY).touch()
        int8 = Int8Request(calibration="minmax", max_images=INT8_IMAGES) if what == "int8" else None
        request = ExportRequest(
            model=str(folder.resolve()), models=folder.parent, output=work / "exported", size_px=(size, size),
            fp16=int8 is None, dynamic_batch=True, int8=int8, target="tensorrt" if int8 else None,
            opset=INT8_OPSET if int8 else None,
        )  # fmt: skip
        report = export_bundle(request)
    except CspDeployError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if int8 is not None and report.refused_int8:
        sys.stderr.write(f"{report.refused_int8}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
