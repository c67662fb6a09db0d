"""What came of each row, from pytest's junit file; and the one table of all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from xml.etree import ElementTree

from tests.matrix.rows import Row
from tests.support import ROOT

_RUNTIME: Final = "runtime"
_BEST: Final = "best"
_HEAD: Final = ("kernel", "collector", "loader", "rung", "passed", "failed", "skipped", "notes")
_NAMES_A_NOTE: Final = 3
_PYTEST_OK: Final = (0, 1)
_TIMED_OUT: Final = (124, 137)


class Case(NamedTuple):
    """One test: whose, its name, `passed`, `failed` or `skipped`, and why; the rung that it was
    forced onto, or empty; and what it measured, by name."""

    collector: str
    name: str
    state: str
    reason: str
    rung: str
    measured: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """A row's cases; `problem` is why there are none or not all, or empty."""

    row: Row
    release: str
    cases: tuple[Case, ...]
    problem: str
    seconds: float
    excused: bool = False

    @property
    def ok(self) -> bool:
        """Whether something ran and nothing failed."""
        failed = any(case.state == "failed" for case in self.cases)
        return self.excused or not (self.problem or failed)

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
    """What pytest left as RESULT.xml and RESULT.log, having ended with STATUS."""
    log = result.with_suffix(".log").relative_to(ROOT)
    try:
        cases = tuple(_cases(result.with_suffix(".xml")))
    except (OSError, ElementTree.ParseError):
        cases = ()
    problem = ""
    if status in _TIMED_OUT:
        problem = f"stopped for taking too long, see {log}"
    elif status not in _PYTEST_OK:
        problem = f"pytest ended with {status}, see {log}"
    elif all(case.state == "skipped" for case in cases):
        problem = f"no test ran, see {log}"
    return Outcome(row, release, cases, problem, seconds)


def _cases(junit: Path) -> Iterable[Case]:
    for case in ElementTree.parse(junit).iter("testcase"):
        state, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                state, reason = "failed", child.get("message", "")
            elif child.tag == "skipped":
                state, reason = "skipped", child.get("message", "")
        module, name = case.get("classname", ""), case.get("name", "")
        measured = {
            it.get("name", ""): int(it.get("value", "0"))
            for it in case.iter("property")
            if it.get("value", "").isdigit()
        }
        yield Case(_collector(module), name, state, reason, _rung(module, name), measured)


def _rung(module: str, name: str) -> str:
    """The rung that a test of `tests.kernel.test_COLLECTOR_rungs` is told to take."""
    match = re.search(r"\[(.*)\]$", name)
    return match[1] if match and module.endswith("_rungs") else ""


def _collector(module: str) -> str:
    """The collector that a test module is of: `tests.kernel.test_NAME...`, NAME in collectors/."""
    stem = module.rpartition(".")[2].removeprefix("test_")
    names = [path.parent.name for path in (ROOT / "collectors").glob("*/collector.py")]
    return max((name for name in names if stem.startswith(name)), key=len, default=_RUNTIME)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each row and collector, as Markdown that is aligned for the eye too."""
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
    """The rung of a case: its row's, unless it was forced onto a lower one."""
    if case.rung in ("", _BEST):
        return row.rung
    return case.rung if row.rung == _BEST else f"{row.rung}, {case.rung}"


def instructions(outcomes: Sequence[Outcome]) -> str:
    """Of each program the most instructions that the verifier went through, by kernel and loader,
    as Markdown."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        for case in outcome.cases:
            where = f"{outcome.release}, {outcome.row.loader}"
            for program, count in case.measured.items():
                most = found.setdefault(program, {})
                most[where] = max(count, most.get(where, 0))
    columns = list(dict.fromkeys(where for most in found.values() for where in most))
    lines = [["program, mode", *columns], ["---", *("--:" for _ in columns)]]
    for program, most in sorted(found.items()):
        lines.append([program, *(f"{most[c]:,}" if most.get(c) else "" for c in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _notes(cases: Sequence[Case]) -> str:
    names: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case.state != "passed":
            names.setdefault((case.state, case.reason.partition("\n")[0]), []).append(case.name)
    notes = [
        f"{state}: {reason} ({_few(tests) if state == 'failed' else len(tests)})"
        for (state, reason), tests in names.items()
    ]
    return "; ".join(notes).replace("|", r"\|")


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_A_NOTE
    return ", ".join(names[:_NAMES_A_NOTE]) + (f" and {more} more" if more > 0 else "")
