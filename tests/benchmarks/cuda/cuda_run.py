"""The stages of the benchmark, in the order of what matters most, each within the seconds that are left."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cuda_budget import OUT_OF_TIME, Budget, Pace
from cuda_figures import COMPILED, EAGER, GRAPHS, REFERENCE, judge, missed_rows, unjudged
from cuda_latency import Group, time_group
from cuda_networks import Network
from cuda_parity import check_agreement, check_parity
from cuda_plan import (
    AGREEMENT_MODEL,
    Job,
    Plan,
    agreement_images,
    describe_watch,
    num_rows,
    title_of,
    unmeasured,
)  # fmt: skip
from cuda_prepare import Preparation, with_int8
from cuda_regimes import Regime
from cuda_result import Parity, Result, Row
from cuda_sessions import Sessions
from cuda_tests import run_tests

from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.gpu_watch import GpuWatch
from cspdeploy.core.model_folder import read_spec
from cspdeploy.core.preprocess import preprocess

__all__ = ["PARTS", "Plan", "Run"]

PARTS = ("tests", "agreement", "latency", "parity", "int8", "profile")
TESTS_SHARE, TESTS_MOST_S = 0.9, 150.0
TESTS_S = 75.0
"""Left for the tests by what is timed before them."""
PREPARE_SHARE, PREPARE_MOST_S = 0.4, 170.0
"""Exports and compilations: torch.compile's max-autotune takes a minute and more for each network and batch."""
SECONDS_A_ROW = 3.0
"""A guess before the first group: two seconds of timing, and an opening that is shared out."""
PARITY_SECONDS = 10.0
"""Left for the numbers of one network: a dozen sessions, opened side by side, and ten runs in each."""
AGREEMENT_REGIMES = ("eager-fp32-nhwc", "eager-fp16-nhwc", "ort-fp32", "ort-fp16", "ort-fp16-nhwc")
AGREEMENT_SECONDS = 60.0
INT8_NETWORK = "cspdarknet53"
AGREEMENT_EXPORT, INT8_EXPORT = "(agreement)", "(int8)"


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
            if {"agreement", "latency", "parity", "int8"} & {*self._plan.parts}:
                self._measure(Path(folder))
            elif "tests" in self._plan.parts:
                self._tests()
        self._note()
        lost = unjudged(self.result.figures)
        _tell(f"{len(self.result.figures) - len(lost)} of {len(self.result.figures)} figures are measured")
        for figure in lost:
            _tell(f"not judged: {figure.figure}: {figure.detail}")
        return self.result

    # --- stages ---

    def _tests(self) -> None:
        with self._stage("tests"):
            found, problem = run_tests(self._budget.share(TESTS_SHARE, most=TESTS_MOST_S))
            self.result = dataclasses.replace(self.result, tests=tuple(found))
            if problem:
                raise InputError(problem)

    def _measure(self, folder: Path) -> None:
        end = self._budget.left - self._budget.share(PREPARE_SHARE, most=PREPARE_MOST_S)
        with Sessions() as sessions:
            with Preparation(folder, sessions, self._budget, size_px=self._plan.size_px, end=end) as ahead:
                networks = self._prepare(ahead, sessions, end)
            first = [(batch, names) for names in self._plan.groups for batch in self._plan.first_batches]
            rest = [
                (batch, names) for batch in self._plan.batches if batch not in self._plan.first_batches
                for names in self._plan.groups
            ]  # fmt: skip
            wanted = bool({"latency", "int8"} & {*self._plan.parts})
            with_tests = "tests" in self._plan.parts
            left = self._time_all(first, networks, sessions, keep_s=TESTS_S if with_tests else 0.0) if wanted else []
            if with_tests:
                self._tests()
            if wanted:
                for batch, names in self._time_all([*left, *rest], networks, sessions, later=True):
                    self._leave_out(names, networks, batch)

    def _prepare(self, ahead: Preparation, sessions: Sessions, end: float) -> dict[str, Network]:
        """Networks by the name they were given, in order; those that failed are left out, and the reason is noted.

        What decides numbers alone is measured while others compile: it needs no quiet.
        """
        names = tuple(dict.fromkeys(name for group in self._plan.groups for name in group))
        parity, compiled = "parity" in self._plan.parts, [one for one in self._plan.regimes if one.compiled]
        wanted = {"latency", "parity", "int8"} & {*self._plan.parts}
        with self._stage("exports"):
            self._begin(ahead, names if wanted else ())
            networks = self._take(ahead, names if wanted else ())
        if parity:
            first = {networks[name].name for name in self._plan.groups[0] if name in networks}  # timed next
            with self._stage("parity"):
                for network in networks.values():
                    self._parity(network, [one for one in self._plan.regimes if not one.compiled], sessions)
                    if network.name not in first:
                        sessions.release(network)
        if "agreement" in self._plan.parts:
            with self._stage("agreement"):
                self._agreement(ahead)
        if compiled and networks:
            with self._stage("compilations"):
                sessions.wait_compiled(self._budget.left - end)
            for network in networks.values() if parity else ():
                self._parity(network, compiled, sessions)
        if INT8_EXPORT in ahead.begun and INT8_NETWORK in networks:
            networks[INT8_NETWORK] = with_int8(networks[INT8_NETWORK], ahead, INT8_EXPORT)
        return networks

    def _begin(self, ahead: Preparation, names: Sequence[str]) -> None:
        for name in names:
            ahead.export(name, name)
        if "agreement" in self._plan.parts and AGREEMENT_MODEL.is_dir():
            spec = read_spec(AGREEMENT_MODEL)
            ahead.export(AGREEMENT_EXPORT, str(AGREEMENT_MODEL), size_px=spec.preprocess.height_px)
        # An INT8 file needs ranges that mean something: the trained model's, where it is at hand.
        if "int8" in self._plan.parts and INT8_NETWORK in names and AGREEMENT_MODEL.is_dir():
            ahead.export(INT8_EXPORT, str(AGREEMENT_MODEL), int8=True)
        for name in names:
            ahead.compile(name, self._plan.regimes, self._plan.first_batches)

    def _take(self, ahead: Preparation, names: Sequence[str]) -> dict[str, Network]:
        networks: dict[str, Network] = {}
        for name in names:
            try:
                networks[name] = ahead.take(name)
            except CspDeployError as error:
                self._budget.skip(f"export of {name}", error.message)
                for batch in self._plan.batches:
                    self._add_rows(unmeasured(name, batch, self._plan.regimes, error.message))
        return networks

    def _parity(self, network: Network, regimes: Sequence[Regime], sessions: Sessions) -> None:
        batch = self._plan.batches[0]
        if self._budget.allows(PARITY_SECONDS):
            for regime in regimes:
                sessions.start(network, regime, batch)  # side by side
            found = tuple(check_parity(network, regime, batch, sessions) for regime in regimes)
        else:
            found = tuple(Parity(network=network.name, regime=one.name, limit=one.limit, reason=OUT_OF_TIME)
                          for one in regimes)  # fmt: skip
        self.result = dataclasses.replace(self.result, parity=self.result.parity + found)

    def _time_all(
        self, jobs: Sequence[Job], networks: dict[str, Network], sessions: Sessions, *, keep_s: float = 0.0,
        later: bool = False,
    ) -> list[Job]:  # fmt: skip
        """Time one group after the other, as long as there is time for it; those that are left.

        Args:
            keep_s: seconds that are left for what comes after.
        """
        left: list[Job] = []
        if not jobs:
            return left
        with GpuWatch() as watch:
            for index, (batch, names) in enumerate(jobs):
                group = [networks[name] for name in names if name in networks]
                rows_to_come = sum(len(others) * num_rows(self._plan.needed(one)) for one, others in jobs[index + 1 :])
                regimes = self._affordable(len(group), batch, keep_s=keep_s, rows_to_come=rows_to_come)
                if group and regimes:
                    self._group(group, names, batch, regimes, sessions)
                    found = describe_watch(watch.summary())
                    found = {f"{name} (later rows)": value for name, value in found.items()} if later else found
                    self.result = dataclasses.replace(self.result, watch=self.result.watch | found)
                elif group:
                    left.append((batch, names))
                if index + 1 == len(jobs) or jobs[index + 1][1] != names:
                    for network in group:
                        sessions.release(network)
        told = (*self.result.remarks, *watch.findings())
        self.result = dataclasses.replace(self.result, remarks=tuple(dict.fromkeys(told)))
        return left

    def _affordable(
        self, num_networks: int, batch: int, *, keep_s: float, rows_to_come: int
    ) -> tuple[Regime, ...]:  # fmt: skip
        """All regimes, if that leaves time for what figures need of the groups to come; else what figures need of this
        one; else none."""
        left = self._budget.left - keep_s
        every, needed = self._plan.possible(batch), self._plan.needed(batch)
        if self._pace.need(num_networks * num_rows(every) + rows_to_come) <= left:
            return every
        return needed if self._pace.need(num_networks * num_rows(needed)) <= left else ()

    def _leave_out(self, names: Sequence[str], networks: dict[str, Network], batch: int) -> None:
        self._budget.skip(title_of(names, batch))
        for name in names:
            if name in networks:
                self._add_rows(unmeasured(networks[name].name, batch, self._plan.regimes, OUT_OF_TIME))

    def _group(
        self, group: Sequence[Network], names: Sequence[str], batch: int, regimes: Sequence[Regime], sessions: Sessions
    ) -> None:
        started = self._budget.left
        with self._stage(title_of(names, batch)):
            self._time(group, batch, regimes, sessions)
            timed = {one.name for one in regimes}
            without = [one for one in self._plan.regimes if one.name not in timed]
            for network in group:
                self._add_rows(unmeasured(network.name, batch, without, OUT_OF_TIME))
        for network in group:
            sessions.close_of(network, batch=batch)
        self._pace.note(started - self._budget.left, num_rows(regimes) * len(group))

    def _time(self, group: Sequence[Network], batch: int, regimes: Sequence[Regime], sessions: Sessions) -> None:
        found = time_group(group, regimes, batch, sessions, settings=self._plan.settings, progress=_tell)
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

    def _agreement(self, ahead: Preparation) -> None:
        if not self._budget.allows(AGREEMENT_SECONDS):
            raise InputError(OUT_OF_TIME)
        if AGREEMENT_EXPORT not in ahead.begun:
            raise InputError(f"{AGREEMENT_MODEL} is missing")
        spec = read_spec(AGREEMENT_MODEL)
        network = ahead.take(AGREEMENT_EXPORT)
        network = dataclasses.replace(network, name=f"{network.name} ({spec.preprocess.height_px} px, trained)")
        stored, images = agreement_images()
        x_NCHW = preprocess(list(stored), spec.preprocess)
        wanted = [one for one in self._plan.regimes if one.name in AGREEMENT_REGIMES]
        reference = next((one for one in self._plan.regimes if one.name == REFERENCE), None)
        if reference is None:
            raise InputError(f"{REFERENCE} is not among the regimes, and decides what is right")
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


def _tell(what: str) -> None:
    sys.stderr.write(f"== {what}\n")
