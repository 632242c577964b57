"""The command that hands a bundle over: package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cspdeploy.cli.render import print_json, print_renderable, progress_bar

if TYPE_CHECKING:
    from cspdeploy.core.archive import Entry
    from cspdeploy.pipeline.package import PackageReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(package)


def package(
    *,
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: model.zip, or model.pyz for a program that runs.")
    ],
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            "--artifact", help="Kind to pack; may be repeated. onnx and onnx-int8 by default; 'all' for all of them."
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            "--sign", metavar="KEY", help="Sign it with this Ed25519 private key (PEM): all but timings.json."
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", metavar="FILE|TEXT", help="Licence of the weights: a file, or its name.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is not a package.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Pack a bundle into one file for a device: a zip, or a Python program that needs only numpy and onnxruntime.

    python model.pyz photo.jpg · python model.pyz selftest · python -m cspdeploy.edge selftest model.zip --key key.pub

    A key: openssl genpkey -algorithm ed25519 -out key.pem; its public half, for the devices:
    openssl pkey -in key.pem -pubout -out key.pub
    """
    from cspdeploy.pipeline.package import PackageRequest, package_bundle

    request = PackageRequest(
        bundle=bundle, output=output, artifacts=tuple(artifact or ()), sign=sign, licence=licence, overwrite=overwrite
    )
    with progress_bar("package") as progress:
        report = package_bundle(request, progress=progress)
    if json_:
        print_json(report)
        return 0
    print_renderable(_table(report))
    print_renderable(_told(report))
    return 0


def _table(report: PackageReport) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("packed", justify="right")
    code = [file for file in report.files if file.name.startswith(("cspdeploy/", "__main__.py"))]
    rows = [(file.name, file.num_bytes, file.packed_bytes) for file in report.files if file not in code]
    if code:
        rows.append((f"the program, {len(code)} files", *_sums(code)))
    rows.append(("all", *_sums(report.files)))
    for name, num_bytes, packed_bytes in rows:
        table.add_row(name, f"{num_bytes:,}", f"{packed_bytes:,}")
    return table


def _sums(files: list[Entry] | tuple[Entry, ...]) -> tuple[int, int]:
    return sum(file.num_bytes for file in files), sum(file.packed_bytes for file in files)


def _told(report: PackageReport) -> str:
    signed = f"signed with key {report.key[:16]}" if report.key else "not signed"
    trained = "\nUNTRAINED: random weights, no answer means anything" if report.untrained else ""
    key = " --key key.pub" if report.key else ""
    run = (
        f"python {report.file} IMAGE... | selftest | --help"
        if report.kind == "pyz"
        else f"python -m cspdeploy.edge selftest {report.file}{key}"
    )
    notes = "".join(f"\nnote: {note}" for note in report.notes)
    return (
        f"{report.file}: {report.model}, {report.num_bytes / 1e6:.1f} MB, {signed}, sha256 {report.sha256}"
        f"{trained}{notes}\nnext: {run}"
    )
