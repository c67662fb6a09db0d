"""An answer on the screen, or as data."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from coral.cli.page import Page
from coral.cli.query.forms import ARROW, CSV, JSON, TABLE, Output, csv_text, json_lines
from coral.client import Answer, Coverage
from coral.views.answers.contract import TIME, Shown
from coral.views.answers.coverage import coverage_line, source_line, span
from coral.views.answers.registry import ANSWER_VIEWS
from coral.wire.text import safe

if TYPE_CHECKING:
    import pyarrow as pa

NO_PYARROW: Final = (
    "this needs pyarrow, which is not installed: pip install 'coral-ebpf-agent[colony]'"
)
_PLACES: Final = ("service", "namespace", "workload")


@dataclass(frozen=True)
class Asked:
    """What was asked: the name of the query, what its rows come by, and of which services."""

    name: str
    by: Sequence[str] = ()
    services: Sequence[str] = ()
    compared: bool = False


async def show(answer: Answer, asked: Asked, output: Output) -> None:
    """Reads ANSWER, and writes it. Data go to standard output, or a file, alone; then the line
    about the coverage goes to standard error. Raises `AgentError`, OSError, ImportError."""
    if output.form == ARROW:
        content = b"".join([part async for part in answer.parts()])
        output.write(content + _END_OF_STREAM)
        _echo_coverage(answer.coverage, output)
        return
    table = await answer.table()
    coverage = answer.coverage
    if output.form in (JSON, CSV):
        rows = _plain(table).to_pylist()
        data = json_lines(rows) if output.form == JSON else csv_text(table.column_names, rows)
        output.write(data)
        _echo_coverage(coverage, output)
    elif output.form == TABLE:
        _print(_shown(table, asked, coverage), asked, coverage)
    else:
        output.write(_picture(_shown(table, asked, coverage), asked, coverage, output.form))
        _echo_coverage(coverage, output)


# The end of a stream of the IPC format: a continuation mark and a length of 0.
_END_OF_STREAM: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def _print(shown: Shown, asked: Asked, coverage: Coverage) -> None:
    page = Page()
    view = ANSWER_VIEWS[asked.name]
    if not shown.rows:
        # Where nothing was collected, that there was nothing is more than anybody knows.
        nothing = view.nothing if coverage.complete_to_ns is not None else "no rows"
        page.text(f"{nothing}, {span(coverage.from_ns, coverage.to_ns)}")
    first = True
    for part in view.sheets(shown) if shown.rows else ():
        if isinstance(part, str):
            page.text(part)
        else:
            if not first:
                page.text("")
            page.sheet(part)
        first = isinstance(part, str)
    page.text("")
    page.text(coverage_line(coverage), "" if coverage.is_whole else "yellow")
    if asked.name != "sql" and shown.rows:
        page.text(source_line(coverage), "dim")
    for note in coverage.notes:
        page.text(note, "dim")


def _echo_coverage(coverage: Coverage, output: Output) -> None:
    if output.path:
        click.echo(f"written to {safe(str(output.path))}", err=True)
    for line in (coverage_line(coverage), *coverage.notes):
        click.echo(f"coral: {safe(line)}", err=True)


def _shown(table: pa.Table, asked: Asked, coverage: Coverage) -> Shown:
    """A table as plain data. A large profile becomes millions of objects, none of which is garbage:
    looking through them again and again would take longer than the rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        rows = _plain(table).to_pylist()
    finally:
        if was:
            gc.enable()
    return Shown(
        rows=rows,
        by=_by(asked, rows),
        seconds=_seconds(table, coverage),
        bounds=_bounds(table),
        compared=asked.compared,
        cut=coverage.cut,
        now_ns=coverage.as_of_ns,
    )


def _plain(table: pa.Table) -> pa.Table:
    """TABLE, in which times in nanoseconds, which Python has not, are texts."""
    import pyarrow as pa  # noqa: PLC0415  what a table is of

    for at, field in enumerate(table.schema):
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", "") == "ns":
            table = table.set_column(at, field.name, table.column(at).cast(pa.string()))
    return table


def _seconds(table: pa.Table, coverage: Coverage) -> float:
    """Over how long the figures of a row are."""
    if TIME in table.column_names:
        return int((table.schema.field(TIME).metadata or {}).get(b"step_ns", 0)) / 1e9
    return (coverage.to_ns - coverage.from_ns) / 1e9


def _by(asked: Asked, rows: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """What rows come by, without places that are the same in all or were asked for."""
    if asked.name == "services":
        return [name for name in asked.by if name == "service" or _differ(name, rows)]
    exact = len(asked.services) == 1 and "*" not in asked.services[0]
    return [
        name
        for name in asked.by
        if name not in _PLACES or (_differ(name, rows) and not (exact and name == "service"))
    ]


def _differ(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row[name] for row in rows}) > 1


def _bounds(table: pa.Table) -> Mapping[str, Sequence[int]]:
    found = {}
    for field in table.schema:
        text = (field.metadata or {}).get(b"bounds", b"").decode()
        if text:
            found[field.name] = [int(each) for each in text.split(",")]
    return found


def _picture(shown: Shown, asked: Asked, coverage: Coverage, suffix: str) -> bytes:
    """A flame graph, or a profile for another program."""
    from coral.views.answers.profile import profile_of  # noqa: PLC0415  only these need it
    from coral.views.cpu_profile.files import RENDERERS  # noqa: PLC0415
    from coral.views.cpu_profile.session import Facts  # noqa: PLC0415

    profile = profile_of(shown)
    facts = Facts(
        target=", ".join(asked.services) or "all services",
        began_ns=coverage.from_ns,
        seconds=shown.seconds,
        end=coverage_line(coverage),
        lost_samples=profile.lost,
    )
    rendered = RENDERERS[suffix](profile, facts)
    return rendered.encode() if isinstance(rendered, str) else rendered
