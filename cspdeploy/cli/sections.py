"""Help in sections: options of one subject stand together under its name."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["SectionedCommand"]


class SectionedCommand(TyperCommand):
    """Lists the options of each `rich_help_panel` in a section of its own, after the others, also in plain help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options, and the options of each panel."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
