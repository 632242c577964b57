"""What an export did, step by step."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.core.types import Manifest
from cspdeploy.report.int8 import int8_lines
from cspdeploy.report.tables import UNTRAINED, format_bytes

__all__ = ["render_steps"]

_STYLES = {"warning": "yellow", "error": "red"}
"""Of findings about the calibration images, which are called by their severity."""


def render_steps(folder: str, manifest: Manifest) -> RenderableType:
    """A line an artifact and a line a step, each step once."""
    lines = [Text(f"{folder}: {len(manifest.artifacts)} artifacts", style="bold")]
    shown: set[str] = set()
    for artifact in manifest.artifacts:
        lines.append(Text(f"  {artifact.file}  {format_bytes(artifact.num_bytes)}"))
        for step in artifact.steps:
            if step.name not in shown:
                style = "yellow" if step.outcome == "kept" else "dim"
                lines.append(Text(f"    {step.name}: {step.detail}", style=style))
                if step.name == "int8":
                    lines += [Text(f"      {name}: {text}", style=_STYLES.get(name, "dim"))
                              for name, text in int8_lines(step.facts)]  # fmt: skip
                shown.add(step.name)
    assumed = str(manifest.options.get("labels", ""))
    if "assumed" in assumed:
        lines.append(Text(f"labels: {assumed}", style="yellow"))
    if manifest.spec.provenance.untrained:
        lines.append(Text(UNTRAINED, style="bold yellow"))
    return Group(*lines)
