"""How sessions were set and what they gave again and again, in the words of every report."""

from __future__ import annotations

from cspdeploy.core.results import ParityRow, Repeats
from cspdeploy.runtimes.tf32 import OFF_NOTE, is_off

__all__ = ["half_words", "repeats_words", "session_lines", "settings_words", "tf32_words"]


def settings_words(row: ParityRow) -> str:
    """What the engine says that the session was opened with; empty where it does not tell."""
    return ", ".join(f"{name} {value}" for name, value in row.settings.items())


def repeats_words(repeats: Repeats | None) -> str:
    """Whether one input gave the same output each time; empty where nobody looked."""
    if repeats is None:
        return ""
    if not repeats.num_different:
        return f"{repeats.num_runs} runs of one input give the same bits"
    words = f"{repeats.num_different} of {repeats.num_runs} runs of one input differ in their bits from the first, "
    if repeats.first_bad_run:
        return f"{words}run {repeats.first_bad_run} in numbers that are none"
    return f"{words}by a relative L2 of {repeats.max_rel_l2:.1e} at most"


def tf32_words(row: ParityRow) -> str:
    """The drift of the timed session; empty where it was the judged one."""
    if row.tf32_rel_l2 is None:
        return ""
    if is_off(row.settings):
        return f"{OFF_NOTE}: timed with a relative L2 of {row.tf32_rel_l2:.1e}"
    return f"timed with TF32 on, where its relative L2 is {row.tf32_rel_l2:.1e}; judged with TF32 off"


def half_words(row: ParityRow) -> str:
    """Of an FP16 file that was computed in FP16: how far that is from rounding every node's result, and no more."""
    if row.rounding_rel_l2 is None:
        return ""
    words = f"relative L2 {row.rounding_rel_l2:.1e} from the same file with every node's result rounded to FP16"
    return words if row.rel_l2 is None else f"{words}, {row.rel_l2:.1e} from the original"


def session_lines(row: ParityRow) -> list[str]:
    """A sentence for each thing that is known of the session."""
    settings = settings_words(row)
    device = (
        "" if row.events_p50_ms is None else f"median between events on the GPU's stream {row.events_p50_ms:.3g} ms"
    )
    found = [f"set: {settings}" if settings else "", repeats_words(row.repeats), tf32_words(row), half_words(row)]
    return [line for line in (*found, device) if line]
