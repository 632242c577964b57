"""The command that gets something from elsewhere: pull."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspdeploy.cli.render import print_json, print_renderable

if TYPE_CHECKING:
    from cspdeploy.pipeline.pull import PullReport

__all__ = ["register"]

MODELS = Path("models")


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(pull)


def pull(
    *,
    checkpoint: Annotated[
        str, typer.Argument(help="Tag of a published checkpoint (cspdarknet53.ra_in1k), or a network that has one.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name of the model folder; the tag by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder of that name.")] = False,
    models: Annotated[Path, typer.Option("--models", help="Folder of model folders.")] = MODELS,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> int:
    """Fetch a published checkpoint from the Hugging Face Hub, check it and write models/<name>/."""
    from cspdeploy.pipeline.pull import pull_checkpoint

    command = shlex.join(["cspdeploy", *(word for word in sys.argv[1:] if word != "--overwrite")])
    report = pull_checkpoint(
        checkpoint, models=models, folder_name=name, overwrite=overwrite, command=command, progress=True
    )
    if json_:
        print_json(report)
    else:
        print_renderable(_told(report, models))
    return 0


def _told(report: PullReport, models: Path) -> str:
    spec = report.spec
    accuracy, contract = spec.provenance.accuracy, spec.preprocess
    published = (
        f"; published: top-1 {100 * accuracy.top1:.2f} %, top-5 {100 * accuracy.top5:.2f} % on {accuracy.dataset} "
        f"at {contract.height_px} px"
        if accuracy
        else ""
    )
    elsewhere = [] if models == MODELS else ["--models", str(models)]
    export = shlex.join(["cspdeploy", "export", spec.name, *elsewhere, "--calib", "DIR"])
    return (
        f"{report.folder}: {report.tag}, {report.num_bytes / 1e6:.1f} MB, {spec.provenance.licence}{published}\n"
        f"next, with a folder of real images: {export}"
    )
