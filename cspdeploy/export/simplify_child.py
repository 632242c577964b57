"""The child process of `cspdeploy.export.simplify`: reads one ONNX file, writes one. Not for direct use."""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: str, target: str) -> int:
    """Simplify `source` into `target`; the parent checks the result."""
    # onnxsim imports torch where it finds it, only to export torch modules, and that is most of its start-up time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnx
    import onnxsim

    model, checked = onnxsim.simplify(onnx.load(source))
    if not checked:
        return 1
    del model.metadata_props[:]  # a log of onnxsim's own doings, thousands of names long
    beside = Path(f"{target}.part")
    beside.write_bytes(model.SerializeToString(deterministic=True))
    beside.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
