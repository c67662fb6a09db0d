"""What a section hands back, how it is shown, and how it is written down. Knows no section."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

NOT_HERE = "-"
_PAGE_WIDTH = 115


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in one unit."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The middle one: a disturbed sample does not move it."""
        return statistics.median(self.values)

    def show(self, digits: int = 0) -> str:
        """The median, and where the middle half of the samples lies."""
        if len(self.values) < 2:
            return f"{self.median:,.{digits}f}"
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return f"{self.median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


@dataclass(frozen=True)
class Aim:
    """A figure that the design sets a limit to."""

    what: str
    value: float
    at_most: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.value <= self.at_most

    def __str__(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        return (
            f"{self.what}: {self.value:.3g}{self.unit}, aim {self.at_most:g}{self.unit}: {verdict}"
        )


@dataclass(frozen=True)
class Report:
    """One table. `samples` are the raw figures behind it, by name, the unit in the name."""

    title: str
    how: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    aims: Sequence[Aim] = ()
    remarks: Sequence[str] = ()
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "aims": [{**asdict(aim), "met": aim.met} for aim in self.aims]}


def show(report: Report, console: Console) -> None:
    """Prints one report."""
    console.print()
    console.print(Text(report.title, "bold"))
    console.print(Text(report.how, "dim"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(report.columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in report.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for aim in report.aims:
        console.print(Text(str(aim), "green" if aim.met else "bold red"))
    for remark in report.remarks:
        console.print(Text(f"note: {remark}"))


def page(reports: Mapping[str, Report], machine: Mapping[str, str], command: str) -> str:
    """REPORTS by section, as a page of docs/ that was made by COMMAND on MACHINE."""
    measured_on = "; ".join(f"{what} {value}" for what, value in machine.items() if value)
    parts = [
        f"# Benchmarks: {', '.join(reports)}",
        f"```\n{command}\n```",
        _wrapped(
            "This command has made this page. [Benchmarks](benchmarks.md) has the other sections. "
            f"The machine: {measured_on}."
        ),
    ]
    for report in reports.values():
        parts += [f"## {report.title}", _wrapped(report.how), _table(report.columns, report.rows)]
        if report.aims:
            parts.append("\n".join(f"* {aim}" for aim in report.aims))
        if report.remarks:
            parts.append("\n".join(_wrapped(f"* {remark}", "  ") for remark in report.remarks))
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, _PAGE_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: the first column to the left, the others to the right."""
    alignment = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, alignment, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def not_measured(reasons: Mapping[str, str]) -> tuple[str, ...]:
    """A remark for each peer that could not be measured, by name with the reason."""
    return tuple(f"{name} cannot be measured here: {why}" for name, why in reasons.items())


def times(value: float, reference: float) -> str:
    """VALUE as a multiple of REFERENCE."""
    ratio = value / reference
    return f"{ratio:,.0f} x" if ratio >= 100 else f"{ratio:.2f} x"
