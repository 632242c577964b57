"""The stages of the benchmark, in the order of what matters most, each within the seconds that are left."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cuda_budget import OUT_OF_TIME, Budget, Pace
from cuda_figures import COMPILED, EAGER, GRAPHS, TEST_IMAGES, judge, missed_rows
from cuda_latency import Group, time_group
from cuda_networks import ExportJob, Network, exports_at_once, start_export
from cuda_parity import check_agreement, check_parity
from cuda_regimes import Regime
from cuda_result import Result, Row
from cuda_sessions import Sessions
from cuda_tests import run_tests

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.datasets import FASHION_MNIST, open_dataset
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.gpu_watch import GpuSummary, GpuWatch
from cspdeploy.core.model_folder import CALIBRATION_FILE, read_calibration, read_spec
from cspdeploy.core.preprocess import preprocess

__all__ = ["PARTS", "Plan", "Run"]

ROOT = Path(__file__).parents[3]
PARTS = ("tests", "agreement", "latency", "parity", "int8", "profile")
TESTS_SHARE, TESTS_MOST_S = 0.3, 150.0
PREPARE_SHARE, PREPARE_MOST_S = 0.45, 200.0
"""Exports and compilations: torch.compile's max-autotune takes a minute and more for each network and batch."""
SECONDS_A_ROW = 3.0
"""A guess before the first group: two seconds of timing, and an opening that is shared out."""
AGREEMENT_MODEL = ROOT / "models" / "cspdarknet53"
AGREEMENT_REGIMES = ("eager-fp32-nhwc", "eager-fp16-nhwc", "ort-fp32", "ort-fp16", "ort-fp16-nhwc")
AGREEMENT_SECONDS = 60.0
INT8_NETWORK = "cspdarknet53"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be run. `groups`: a network and its baseline, or one alone, in order."""

    kind: str
    groups: tuple[tuple[str, ...], ...]
    batches: tuple[int, ...]
    regimes: tuple[Regime, ...]
    parts: tuple[str, ...]
    settings: LatencySettings
    size_px: int


class Run:
    """One call of the benchmark.

    Args:
        result: with the facts; the rest is filled in.
        save: called with the result after every stage, so that what was found is never lost.
    """

    def __init__(self, plan: Plan, result: Result, budget: Budget, save: Callable[[Result], object]) -> None:
        self._plan, self._budget, self._save = plan, budget, save
        self.result = result
        self._pace = Pace(SECONDS_A_ROW)

    def run(self) -> Result:
        """All stages. What goes wrong in one is noted, and the next begins."""
        with tempfile.TemporaryDirectory(prefix="cuda-benchmark-") as folder:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder) / "inductor"))
            if "tests" in self._plan.parts:
                with self._stage("tests"):
                    self._tests()
            if "agreement" in self._plan.parts:
                with self._stage("agreement"):
                    self._agreement(Path(folder) / "agreement")
            if {"latency", "parity", "int8"} & {*self._plan.parts}:
                self._measure(Path(folder))
        self._note()
        return self.result

    # --- stages ---

    def _tests(self) -> None:
        found, problem = run_tests(self._budget.share(TESTS_SHARE, most=TESTS_MOST_S))
        self.result = dataclasses.replace(self.result, tests=tuple(found))
        if problem:
            raise InputError(problem)

    def _measure(self, folder: Path) -> None:
        with Sessions() as sessions:
            with self._stage("exports and compilations"):
                networks = self._prepare(folder, sessions)
            with GpuWatch() as watch:
                for batch, names in [(batch, names) for batch in self._plan.batches for names in self._plan.groups]:
                    group = [networks[name] for name in names if name in networks]
                    self._group(group, names, batch, sessions)
                    self.result = dataclasses.replace(self.result, watch=describe_watch(watch.summary()))
            told = (*self.result.remarks, *watch.findings())
            self.result = dataclasses.replace(self.result, remarks=tuple(dict.fromkeys(told)))

    def _prepare(self, folder: Path, sessions: Sessions) -> dict[str, Network]:
        """Networks by the name they were given, in order; those that failed are left out, and the reason is noted."""
        seconds = self._budget.share(PREPARE_SHARE, most=PREPARE_MOST_S)
        end = self._budget.left - seconds
        networks: dict[str, Network] = {}
        waiting = list(dict.fromkeys(name for group in self._plan.groups for name in group))
        jobs: list[tuple[str, ExportJob]] = []
        try:
            int8 = self._start_int8(folder)
            while waiting or jobs:
                while waiting and len(jobs) < exports_at_once():
                    given = waiting.pop(0)
                    place = folder / Path(given).name
                    jobs.append((given, start_export(given, place, size_px=self._plan.size_px)))
                given, job = jobs.pop(0)
                try:
                    networks[given] = job.finish(self._budget.left - end)
                except CspDeployError as error:
                    self._budget.skip(f"export of {given}", error.message)
            self._compile(networks, sessions, self._budget.left - end)
            if int8 is not None:
                networks |= self._take_int8(networks, int8, self._budget.left - end)
        finally:
            for _, job in jobs:
                job.stop()
        return networks

    def _start_int8(self, folder: Path) -> ExportJob | None:
        """The trained model, where it is at hand: an INT8 file needs ranges that mean something."""
        wanted = "int8" in self._plan.parts and any(INT8_NETWORK in group for group in self._plan.groups)
        if not wanted or not AGREEMENT_MODEL.is_dir():
            return None
        return start_export(str(AGREEMENT_MODEL), folder / "int8", size_px=self._plan.size_px, int8=True)

    def _take_int8(self, networks: dict[str, Network], job: ExportJob, seconds: float) -> dict[str, Network]:
        network = networks.get(INT8_NETWORK)
        if network is None:
            job.stop()
            return {}
        try:
            made = job.finish(seconds).files["onnx-int8"]
        except (CspDeployError, KeyError) as error:
            missing = {**network.missing, "onnx-int8": str(error)}
            return {INT8_NETWORK: dataclasses.replace(network, missing=missing)}
        return {INT8_NETWORK: dataclasses.replace(network, files={**network.files, "onnx-int8": made})}

    def _compile(self, networks: dict[str, Network], sessions: Sessions, seconds: float) -> None:
        wanted = [
            (networks[name], regime, batch)
            for batch in self._plan.batches for group in self._plan.groups for name in group if name in networks
            for regime in self._plan.regimes if regime.compiled
        ]  # fmt: skip
        sessions.compile_ahead(wanted, seconds=seconds, budget=self._budget)

    def _group(self, group: Sequence[Network], names: Sequence[str], batch: int, sessions: Sessions) -> None:
        name = f"{' and '.join(Path(one).name for one in names)}, batch {batch}"
        num_rows = sum(1 + regime.with_copies for regime in self._plan.regimes) * len(group)
        if not group:
            return
        if not self._budget.allows(self._pace.need(num_rows)):
            self._budget.skip(name)
            self._add_rows([
                Row(network=network.name, batch=batch, regime=regime.name, runtime=regime.runtime, reason=OUT_OF_TIME)
                for network in group for regime in self._plan.regimes
            ])  # fmt: skip
            self._note()
            return
        started = self._budget.left
        with self._stage(name):
            if {"latency", "int8"} & {*self._plan.parts}:
                self._time(group, batch, sessions)
            if "parity" in self._plan.parts and batch == self._plan.batches[0]:
                for network in group:
                    found = tuple(check_parity(network, regime, batch, sessions) for regime in self._plan.regimes)
                    self.result = dataclasses.replace(self.result, parity=self.result.parity + found)
        for network in group:
            sessions.close_of(network, batch=batch)
        self._pace.note(started - self._budget.left, num_rows)

    def _time(self, group: Sequence[Network], batch: int, sessions: Sessions) -> None:
        found = time_group(group, self._plan.regimes, batch, sessions, settings=self._plan.settings, progress=_tell)
        self._add_rows(found.rows)
        self.result = dataclasses.replace(self.result, comparisons=self.result.comparisons + found.comparisons)
        if "profile" in self._plan.parts:
            self._profile(group, batch, found)

    def _profile(self, group: Sequence[Network], batch: int, found: Group) -> None:
        """Both sides of a figure that was missed at this batch."""
        for network in group:
            figures = [one for one in judge(self.result) if f"batch {batch}:" in one.figure]
            if missed_rows(figures, network.name):
                profiles = tuple(found.profile(network.name, regime, batch) for regime in (*GRAPHS, COMPILED, EAGER))
                self.result = dataclasses.replace(self.result, profiles=self.result.profiles + profiles)

    def _agreement(self, folder: Path) -> None:
        if not self._budget.allows(AGREEMENT_SECONDS):
            raise InputError(OUT_OF_TIME)
        spec = read_spec(AGREEMENT_MODEL)
        size_px = spec.preprocess.height_px
        network = start_export(str(AGREEMENT_MODEL), folder, size_px=size_px).finish(self._budget.left)
        network = dataclasses.replace(network, name=f"{network.name} ({size_px} px, trained)")
        stored, images = _images()
        x_NCHW = preprocess(list(stored), spec.preprocess)
        wanted = [one for one in self._plan.regimes if one.name in AGREEMENT_REGIMES]
        reference = next((one for one in self._plan.regimes if one.name == EAGER), None)
        if reference is None:
            raise InputError(f"{EAGER} is not among the regimes, and decides what is right")
        with Sessions() as sessions:
            found = check_agreement(network, wanted, reference, x_NCHW, images, sessions)
        self.result = dataclasses.replace(self.result, parity=(*self.result.parity, *found))

    # --- keeping ---

    def _add_rows(self, rows: Sequence[Row]) -> None:
        self.result = dataclasses.replace(self.result, rows=(*self.result.rows, *rows))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A stage after which the result is saved, whatever ended it."""
        _tell(f"{name} ({self._budget.left:.0f} s left)")
        try:
            with self._budget.stage(name):
                yield
        finally:
            self._note()

    def _note(self) -> None:
        self.result = dataclasses.replace(self.result, stages=tuple(self._budget.stages))
        self.result = dataclasses.replace(self.result, figures=judge(self.result))
        self._save(self.result)


def describe_watch(summary: GpuSummary) -> dict[str, str]:
    """Clocks, power and temperature while things were timed; empty without a GPU."""
    found = {
        "SM clock, MHz": summary.sm_clock_mhz, "memory clock, MHz": summary.memory_clock_mhz,
        "power, W": summary.power_w, "temperature, C": summary.temperature_c,
    }  # fmt: skip
    told = {name: ", ".join(f"{part:g}" for part in value) for name, value in found.items() if value is not None}
    return told | ({"clocks held by": ", ".join(summary.reasons)} if summary.reasons else {})


def _images() -> tuple[npt.NDArray[np.uint8], str]:
    """As stored, and what they are in words: the test images where they are installed."""
    try:
        stored = open_dataset(FASHION_MNIST, split="test").stored
    except InputError:
        stored = None
    if stored is not None:
        return stored, TEST_IMAGES
    return read_calibration(AGREEMENT_MODEL / CALIBRATION_FILE), "calibration images"


def _tell(what: str) -> None:
    sys.stderr.write(f"== {what}\n")
