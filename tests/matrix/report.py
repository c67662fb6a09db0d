"""The outcome of each row, from pytest's junit file, and the table of all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple
from xml.etree import ElementTree

from tests.matrix.rows import Row
from tests.support import ROOT

_RUNTIME: Final = "runtime"
_BEST: Final = "best"
_HEAD: Final = ("kernel", "collector", "loader", "rung", "passed", "failed", "skipped", "notes")
_NAMES_A_NOTE: Final = 3
_LINES_A_FAILURE: Final = 30
_PYTEST_OK: Final = (0, 1)
_TIMED_OUT: Final = (124, 137)


class Case(NamedTuple):
    """One test: its module, its collector, its name, `passed`, `failed` or `skipped`, and the
    reason; the rung that it was forced onto, or empty; its measurements by name; and what pytest
    tells of its failure. With `again` it failed at first, and passed when it was run once more, in
    a guest that had just booted: it is named all the same."""

    module: str
    collector: str
    name: str
    state: str
    reason: str
    rung: str
    measured: Mapping[str, int]
    told: str = ""
    again: bool = False

    @property
    def argument(self) -> str:
        """What pytest calls it."""
        return f"{self.module.replace('.', '/')}.py::{self.name}"


@dataclass(frozen=True)
class Outcome:
    """The cases of a row; `problem` is why some or all are missing, or empty."""

    row: Row
    release: str
    cases: tuple[Case, ...]
    problem: str
    seconds: float
    excused: bool = False

    @property
    def ok(self) -> bool:
        """Whether tests ran and none failed."""
        failed = any(case.state == "failed" for case in self.cases)
        return self.excused or not (self.problem or failed)

    @property
    def failed(self) -> tuple[str, ...]:
        """Arguments of pytest, for the tests that failed."""
        return tuple(case.argument for case in self.cases if case.state == "failed")

    def with_second_tries(self, tries: Sequence[Case]) -> Outcome:
        """The same, in which cases that failed have passed if they did so in TRIES."""
        passed = {case.argument for case in tries if case.state == "passed"}
        cases = (
            case._replace(state="passed", again=True)
            if case.state == "failed" and case.argument in passed
            else case
            for case in self.cases
        )
        return replace(self, cases=tuple(cases))

    def __str__(self) -> str:
        states = Counter(case.state for case in self.cases)
        said = ", ".join(f"{states[state]} {state}" for state in ("passed", "failed", "skipped"))
        row = self.row
        return (
            f"{row.kernel} {row.loader}, {row.rung}: {said}"
            + (f"; {self.problem}" if self.problem else "")
            + f" ({self.seconds:.0f} s)"
        )


def outcome(row: Row, release: str, result: Path, status: int, *, seconds: float) -> Outcome:
    """The outcome from RESULT.xml and RESULT.log of pytest, whose exit status is STATUS."""
    log = result.with_suffix(".log").relative_to(ROOT)
    cases = _read(result.with_suffix(".xml"))
    problem = ""
    if status in _TIMED_OUT:
        problem = f"stopped for taking too long, see {log}"
    elif status not in _PYTEST_OK:
        problem = f"pytest ended with {status}, see {log}"
    elif all(case.state == "skipped" for case in cases):
        problem = f"no test ran, see {log}"
    return Outcome(row, release, cases, problem, seconds)


def _read(junit: Path) -> tuple[Case, ...]:
    """Its cases; none if it is missing or was not written whole."""
    try:
        return tuple(_cases(junit))
    except (OSError, ElementTree.ParseError):
        return ()


def _cases(junit: Path) -> Iterable[Case]:
    for case in ElementTree.parse(junit).iter("testcase"):
        state, reason, told = "passed", "", ""
        for child in case:
            if child.tag in ("failure", "error"):
                state, reason, told = "failed", child.get("message", ""), child.text or ""
            elif child.tag == "skipped":
                state, reason = "skipped", child.get("message", "")
        module, name = case.get("classname", ""), case.get("name", "")
        measured = {
            it.get("name", ""): int(it.get("value", "0"))
            for it in case.iter("property")
            if it.get("value", "").isdigit()
        }
        rung = _rung(module, name)
        yield Case(module, _collector(module), name, state, reason, rung, measured, told)


def _rung(module: str, name: str) -> str:
    """The rung that a test of `tests.kernel.test_COLLECTOR_rungs` forces."""
    match = re.search(r"\[(.*)\]$", name)
    return match[1] if match and module.endswith("_rungs") else ""


def _collector(module: str) -> str:
    """The collector that a module `tests.kernel.test_NAME...` tests; NAME is in collectors/."""
    stem = module.rpartition(".")[2].removeprefix("test_")
    names = [path.parent.name for path in (ROOT / "collectors").glob("*/collector.py")]
    return max((name for name in names if stem.startswith(name)), key=len, default=_RUNTIME)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each row and collector, as Markdown with aligned columns."""
    lines = [_HEAD, *(line for outcome in outcomes for line in _lines(outcome))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD) - 1)]
    rendered = [_rendered(line, widths) for line in lines]
    return "\n".join([rendered[0], "|".join(["", *("---" for _ in _HEAD), ""]), *rendered[1:], ""])


def _rendered(line: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)]
    return "| " + " | ".join([*padded, line[-1]]) + " |"


def _lines(outcome: Outcome) -> Iterable[tuple[str, ...]]:
    row = outcome.row
    kernel = outcome.release or row.kernel
    if outcome.problem or not outcome.cases:
        yield (kernel, "-", row.loader, row.rung, "-", "-", "-", outcome.problem)
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in sorted(outcome.cases, key=lambda case: case.collector):
        groups.setdefault((case.collector, _on(row, case)), []).append(case)
    for (collector, rung), cases in groups.items():
        states = Counter(case.state for case in cases)
        counts = (str(states[state]) for state in ("passed", "failed", "skipped"))
        yield (kernel, collector, row.loader, rung, *counts, _notes(cases))


def _on(row: Row, case: Case) -> str:
    """The rung of a case: that of its row, unless it was forced onto a lower one."""
    if case.rung in ("", _BEST):
        return row.rung
    return case.rung if row.rung == _BEST else f"{row.rung}, {case.rung}"


def instructions(outcomes: Sequence[Outcome]) -> str:
    """The maximum number of instructions that the verifier processed for each program, by kernel
    and loader, as Markdown."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        for case in outcome.cases:
            where = f"{outcome.release}, {outcome.row.loader}"
            for program, count in case.measured.items():
                most = found.setdefault(program, {})
                most[where] = max(count, most.get(where, 0))
    columns = list(dict.fromkeys(where for most in found.values() for where in most))
    lines = [["kind: program, mode", *columns], ["---", *("--:" for _ in columns)]]
    for program, most in sorted(found.items()):
        lines.append([program, *(f"{most[c]:,}" if most.get(c) else "" for c in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def failures(outcomes: Sequence[Outcome]) -> str:
    """The end of what pytest tells of each failure, and then every problem and failure in a line:
    what is read where only the last lines of a log are kept. Empty if there are none."""
    texts, lines = [], []
    for outcome in outcomes:
        row = outcome.row
        where = f"{outcome.release or row.kernel} {row.loader}, {row.rung}"
        if outcome.problem and not outcome.excused:
            lines.append(f"FAILED {where}: {outcome.problem}\n")
        for case in outcome.cases:
            if case.told:
                end = "\n".join(case.told.splitlines()[-_LINES_A_FAILURE:])
                texts.append(f"\n{where}: {case.name}\n{end}\n")
                what = "PASSED AGAIN" if case.again else "FAILED"
                lines.append(f"{what} {where}: {case.name}: {_first_line(case.reason)}\n")
    return "".join([*texts, "\n" if texts else "", *lines])


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _notes(cases: Sequence[Case]) -> str:
    names: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case.state != "passed" or case.again:
            state = "passed when run again" if case.again else case.state
            names.setdefault((state, _first_line(case.reason)), []).append(case.name)
    notes = [
        f"{state}: {reason} ({len(tests) if state == 'skipped' else _few(tests)})"
        for (state, reason), tests in names.items()
    ]
    return "; ".join(notes).replace("|", r"\|")


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_A_NOTE
    return ", ".join(names[:_NAMES_A_NOTE]) + (f" and {more} more" if more > 0 else "")
