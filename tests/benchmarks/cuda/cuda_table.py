"""The same in Markdown: what a reader wants to see, in the order in which it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cuda_figures import unjudged
from cuda_regimes import REGIMES
from cuda_result import Figure, Parity, Profile, Result, Row

__all__ = ["markdown"]

NO_CUDA = "**Measured on a CPU, to prove that the benchmark runs: no figure here is one of CUDA.**"
_FACTS = (
    "gpu", "gpu_driver", "gpu_compute_capability", "gpu_memory", "gpu_clocks", "gpu_power", "gpu_power_limit",
    "gpu_temperature", "gpu_modes", "cpu", "cpus", "python", "torch", "torch_cuda", "torch_cudnn", "triton",
    "onnxruntime-gpu", "onnxruntime", "onnx", "onnxsim", "cspdeploy",
)  # fmt: skip


def markdown(result: Result) -> str:
    """The whole page."""
    parts = [f"# Benchmark at {result.size_px}x{result.size_px}", *([NO_CUDA] if result.kind == "cpu" else [])]
    parts.append("\n".join(f"    {command}" for command in result.commands))
    facts = [(name, result.facts[name]) for name in _FACTS if name in result.facts]
    parts.append(_table(("fact", "value"), facts))
    if result.watch:
        parts += ["## The GPU while it was timed", _table(("what", "minimum, median, maximum"), result.watch.items())]
    if result.remarks:
        parts += ["## Remarks", "\n".join(f"- {one}" for one in result.remarks)]
    if result.figures:
        figures = [(one.figure, f"**{one.verdict}**", one.detail) for one in result.figures]
        parts += ["## Figures", _judged(result.figures), _table(("figure", "verdict", "measured"), figures)]
    if result.rows:
        parts += ["## Latency", _LATENCY_NOTE, *_latency(result)]
    if result.parity:
        parts += ["## Parity", _PARITY_NOTE, _parity(result.parity)]
    if any(row.regime == "ort-int8" and row.operators for row in result.rows):
        parts += ["## INT8 on ONNX Runtime's CUDA provider", _int8(result.rows)]
    for profile in result.profiles:
        parts += _profile(profile)
    if result.tests:
        tests = [(one.name, one.outcome, one.detail) for one in result.tests]
        parts += ["## Tests", _table(("test", "outcome", "detail"), tests)]
    stages = [(one.name, one.outcome, f"{one.seconds:.1f}", one.reason) for one in result.stages]
    parts += ["## Stages", _table(("stage", "outcome", "s", "why"), stages)]
    return "\n\n".join(parts) + "\n"


_LATENCY_NOTE = (
    "Median of one call by the host's clock with its 95 % interval; `between events` on the stream, gaps between "
    "kernels in it. Every row keeps its inputs and outputs on the device (I/O binding) and takes turns with other "
    "inputs, together larger than the L2 cache, but the rows `with copies`. `vs eager` is the ratio of times within "
    "the same rounds: below 1 is faster than the first row."
)
_PARITY_NOTE = (
    "Against the network in FP64. A row without a limit shows the drift of a speed setting. `differ` counts runs on "
    "the same input whose bits are not those of the first run."
)


def _judged(figures: Sequence[Figure]) -> str:
    lost = unjudged(figures)
    if not lost:
        return f"All {len(figures)} were measured."
    return f"{len(lost)} of {len(figures)} could not be judged: they are `not measured`, with the reason beside them."


def _latency(result: Result) -> Iterable[str]:
    titles = {one.name: one.title for one in REGIMES[result.kind]}
    ratios = {
        (one.subject, one.batch): one for one in result.comparisons
        if one.against == f"{one.subject.partition('/')[0]}/{REGIMES[result.kind][0].name}"
    }  # fmt: skip
    groups = dict.fromkeys((row.network, row.batch) for row in result.rows)
    for network, batch in groups:
        rows = [row for row in result.rows if (row.network, row.batch) == (network, batch)]
        lines = []
        for row in rows:
            title = titles.get(row.regime, row.regime) + (", with copies" if row.copies else "")
            if row.p50_ms is None:
                lines.append((title, "not measured", "", "", "", row.reason.removeprefix("not measured: ")))
                continue
            ratio = ratios.get((f"{network}/{row.regime}" + ("+copies" if row.copies else ""), batch))
            lines.append((
                title, f"{row.p50_ms:.3f} ({row.ci_low_ms:.3f} to {row.ci_high_ms:.3f})",
                "" if row.events_p50_ms is None else f"{row.events_p50_ms:.3f}", f"{1e3 * batch / row.p50_ms:.0f}",
                "" if ratio is None else f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", _notes(row),
            ))  # fmt: skip
        yield f"### {network}, batch {batch}"
        yield _table(("regime", "ms", "between events ms", "images/s", "vs eager", "notes"), lines)


def _notes(row: Row) -> str:
    notes = []
    if len(row.placement) > 1:
        notes.append("nodes: " + ", ".join(f"{count} {name}" for name, count in row.placement.items()))
    if row.num_copies:
        notes.append(f"{row.num_copies} copies between devices")
    if not row.stable:
        notes.append("had not settled")
    return "; ".join(notes)


def _parity(parity: Sequence[Parity]) -> str:
    lines = []
    for one in parity:
        if one.rel_l2 is None:
            lines.append((one.network, one.regime, "not measured", "", "", "", one.reason))
            continue
        agreement = "" if one.top1_agreement is None else f"{100 * one.top1_agreement:.2f} %"
        bad = f"; not finite from run {one.first_bad_run}" if one.first_bad_run else ""
        lines.append(
            (
                one.network,
                one.regime,
                f"{one.rel_l2:.1e}",
                "" if one.limit is None else f"{one.limit:g}",
                agreement,
                f"{one.num_different} of {one.num_runs}{bad}",
                f"{one.num_images} {one.images}",
            )
        )
    return _table(("network", "regime", "rel_l2", "limit", "top-1", "differ", "images"), lines)


def _int8(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.regime == "ort-int8" and row.operators:
            lines += [(row.network, name, str(count)) for name, count in row.operators.items()]
            break  # the same at every batch
    return _table(("network", "operator on provider", "nodes"), lines)


def _profile(profile: Profile) -> list[str]:
    title = f"## Kernels of {profile.network}, {profile.regime}, batch {profile.batch}"
    if profile.reason:
        return [title, profile.reason]
    kernels = [(f"`{one.name}`", f"{one.ms:.4f}", f"{one.num_calls:g}") for one in profile.kernels]
    busy = "" if profile.busy_ms is None else f"All kernels: {profile.busy_ms:.3f} ms a run. "
    return [title, f"{busy}The longest:", _table(("kernel", "ms", "calls"), kernels)]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
