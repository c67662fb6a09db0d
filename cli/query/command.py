"""`coral query`: questions to a colony about what its agents have seen.

Every answer says what it covers: on a terminal below its table, else on standard error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

import click

from coral.cli.common import (
    ANSWER_S,
    EXIT_ERROR,
    Duration,
    DurationType,
    echo_error,
    run,
    tls_options,
)
from coral.cli.listing import Commands
from coral.cli.page import Page
from coral.cli.query.completion import (
    complete_by,
    complete_service,
    complete_table,
    complete_where,
)
from coral.cli.query.forms import FORMS, TABLE, Output, parse_output
from coral.cli.query.show import NO_PYARROW, Asked, show
from coral.cli.query.times import MomentType, SpanType
from coral.client import ColonyClient, default_colony
from coral.views.sheet import Column, Sheet

F = TypeVar("F", bound=Callable[..., Any])

_TOP: Final = 25
_DEFAULT_BY: Final[Mapping[str, Sequence[str]]] = {
    "http": ("service", "role", "method", "route"),
    "syscalls": ("service", "syscall"),
    "tcp": ("service", "role", "remote_address", "port"),
    "profile": ("service",),
    "services": ("service", "namespace", "workload"),
}
_SERVICE_HELP: Final = (
    "SERVICE is a name, or a pattern such as 'shop-*'; without one, the answer is about all."
)
_TABLES: Final = (
    Column("TABLE", right=False),
    Column("COLUMNS", right=False, wraps=True, room=40),
)


@click.group(cls=Commands)
def query() -> None:
    """Ask a colony what its agents have seen.

    \b
    coral query services                       every service, in a line
    coral query http checkout --since 1h       its requests, by route
    coral query http checkout --against 1d     what became slower since yesterday
    coral query profile checkout -o flame.svg  where its CPU time went
    coral query sql 'SELECT ...'               whatever else

    Each answer ends with what it covers: up to when everything had arrived, what was lost, and
    which agents could not be reached.
    """


class CountType(click.ParamType[int]):
    """A number of rows."""

    name = "number"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        """The number, or a usage error."""
        if not re.fullmatch(r"[0-9]{1,9}", str(value)):
            self.fail(f"{value!r} is not accepted; give a whole number, 0 for all", param, ctx)
        return int(str(value))


def colony_options(function: F) -> F:
    """Adds --colony, and the options of `tls_options`."""
    return click.option(
        "--colony",
        "address",
        default=default_colony,
        metavar="ADDRESS",
        help="The colony: unix:PATH or HOST:PORT.  [default: CORAL_COLONY, else the local socket]",
    )(tls_options(function))


def _window_options(function: F) -> F:
    since = click.option(
        "--since",
        type=MomentType(),
        metavar="WHEN",
        help="From when: 15m, 6h or 7d ago, or 12:03, or 2026-11-27T12:03.  [default: 15m]",
    )
    until = click.option(
        "--until", type=MomentType(), metavar="WHEN", help="Until when.  [default: now]"
    )
    return since(until(function))


def _output_option(function: F) -> F:
    short = click.option("--json", "output", flag_value="json", help="The same as -o json.")
    long = click.option(
        "-o",
        "--output",
        default=TABLE,
        show_default=True,
        metavar="|".join([*FORMS, "FILE"]),
        help="A table for people, or data for programs; or a file by its suffix. With profile also "
        "svg, html, folded, pb.gz and speedscope.json.",
    )
    return long(short(function))


def _rows_options(function: F) -> F:
    top = click.option(
        "--top",
        type=CountType(),
        help=f"How many rows at most; 0: all.  [default: {_TOP} in a table, else all]",
    )
    where = click.option(
        "-w",
        "--where",
        multiple=True,
        metavar="COLUMN=VALUE",
        shell_complete=complete_where,
        help="Only such rows: agent=n1, namespace=shop, route='/users/*'.",
    )
    return where(top(function))


def _grouped(name: str, about: str) -> click.Command:
    """A named query whose rows come by columns."""

    @click.command(name, help=f"{about}\n\n{_SERVICE_HELP}")
    @click.argument("services", nargs=-1, metavar="[SERVICE]...", shell_complete=complete_service)
    @_window_options
    @click.option(
        "--by",
        multiple=True,
        metavar="COLUMNS",
        shell_complete=complete_by,
        help=f"What tells rows apart, comma-separated.  [default: {','.join(_DEFAULT_BY[name])}]",
    )
    @_rows_options
    @click.option(
        "--against",
        type=SpanType(),
        metavar="SPAN",
        help="Compare with the window that was so much earlier, such as 1h or 1d.",
    )
    @_output_option
    @colony_options
    def command(
        *,
        services: tuple[str, ...],
        since: float | datetime | None,
        until: float | datetime | None,
        by: tuple[str, ...],
        top: int | None,
        where: tuple[str, ...],
        against: float | None,
        output: str,
        address: str,
    ) -> None:
        form = parse_output(output, pictures=name == "profile")
        columns = [each.strip() for text in by for each in text.split(",") if each.strip()]
        asked = Asked(name, columns or _DEFAULT_BY[name], services, against is not None)
        wanted = {
            "since": since,
            "until": until,
            "by": columns,
            "top": _most(top, form, name),
            "services": services,
            "where": _conditions(where),
            "against_s": against,
        }
        typed = _typed(services, by=",".join(by), where=where)
        run(_ask(address, asked, form, wanted), typed)

    return command


def _listed(name: str, about: str, *, with_services: bool) -> click.Command:
    """A named query of the colony's own books."""

    @_window_options
    @_rows_options
    @_output_option
    @colony_options
    def command(
        *,
        services: tuple[str, ...] = (),
        since: float | datetime | None,
        until: float | datetime | None,
        top: int | None,
        where: tuple[str, ...],
        output: str,
        address: str,
    ) -> None:
        form = parse_output(output, pictures=False)
        wanted = {
            "since": since,
            "until": until,
            "top": top or 0,
            "services": services,
            "where": _conditions(where),
        }
        run(_ask(address, Asked(name), form, wanted), _typed(services, where=where))

    if with_services:
        argument = click.argument(
            "services", nargs=-1, metavar="[SERVICE]...", shell_complete=complete_service
        )
        command = argument(command)
        about = f"{about}\n\n{_SERVICE_HELP}"
    return click.command(name, help=about)(command)


@query.command("sql")
@click.argument("statement")
@_window_options
@click.option(
    "--rows",
    type=CountType(),
    default=0,
    help="How many rows at most.  [default: the colony's limit, sql.most_rows]",
)
@click.option(
    "--deadline", type=DurationType(), help="How long it may take.  [default: the colony's limit]"
)
@_output_option
@colony_options
def sql(
    *,
    statement: str,
    since: float | datetime | None,
    until: float | datetime | None,
    rows: int,
    deadline: Duration | None,
    output: str,
    address: str,
) -> None:
    """Ask in DuckDB's SQL: one SELECT, or - to read it from standard input.

    `coral query tables` lists the tables. --since and --until say which rows they have; without
    them, all that are kept.
    """
    form = parse_output(output, pictures=False)
    text = sys.stdin.read() if statement == "-" else statement
    typed = {**_typed(()), "deadline": f"--deadline {deadline.text if deadline else ''}"}
    wanted = {"since": since, "until": until, "most_rows": rows, "deadline_s": deadline}
    run(_ask_sql(address, text, form, wanted), typed)


@query.command("tables")
@click.argument("table", required=False, shell_complete=complete_table)
@colony_options
def tables(*, table: str | None, address: str) -> None:
    """The tables that `coral query sql` reads, with their columns."""
    run(_tables(address, table))


async def _ask(address: str, asked: Asked, output: Output, wanted: Mapping[str, Any]) -> int:
    async with ColonyClient(address) as colony, colony.query(asked.name, **wanted) as answer:
        return await _shown(partial(show, answer, asked, output))


async def _ask_sql(address: str, statement: str, output: Output, wanted: Mapping[str, Any]) -> int:
    async with ColonyClient(address) as colony, colony.sql(statement, **wanted) as answer:
        return await _shown(partial(show, answer, Asked("sql"), output))


async def _shown(shows: Callable[[], Any]) -> int:
    try:
        await shows()
    except ImportError as error:
        if error.name != "pyarrow":
            raise
        echo_error(NO_PYARROW)
        return EXIT_ERROR
    except OverflowError as error:
        echo_error(f"{error}: a time beyond the years 1 to 9999; give it as text, or use -o arrow")
        return EXIT_ERROR
    return 0


async def _tables(address: str, wanted: str | None) -> int:
    async with ColonyClient(address, timeout_s=ANSWER_S) as colony:
        told = await colony.describe()
    found = [table for table in told.tables if wanted in (None, table.name)]
    if not found:
        names = ", ".join(table.name for table in told.tables)
        echo_error(f"there is no table {wanted}; there are {names}")
        return EXIT_ERROR
    sheet = Sheet(_TABLES)
    for table in found:
        if wanted:
            for column in table.columns:
                sheet.add(column.name, column.type)
        else:
            sheet.add(table.name, " ".join(column.name for column in table.columns))
    if wanted:
        sheet = Sheet((Column("COLUMN", right=False), Column("TYPE", right=False)), sheet.rows)
    Page().sheet(sheet)
    return 0


def _most(top: int | None, output: Output, name: str) -> int:
    """How many rows are asked for: a person reads a few, and a profile is one picture."""
    if top is not None:
        return top
    return _TOP if output.form == TABLE and name != "profile" else 0


def _conditions(where: Sequence[str]) -> Mapping[str, str]:
    """COLUMN=VALUE, several times. Raises a usage error."""
    found: dict[str, str] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise click.UsageError(f"--where {text}: COLUMN=VALUE is expected")
        if column in found:
            raise click.UsageError(f"--where {text}: give only one value for {column}")
        found[column] = value
    return found


def _typed(services: Sequence[str], **given: object) -> Mapping[str, str]:
    """What the user typed for each field of the request, for messages about it."""
    words = {
        "since": "--since",
        "until": "--until",
        "against": "--against",
        "by": f"--by {given.get('by') or ''}".strip(),
    }
    where = given.get("where")
    if isinstance(where, tuple) and where:
        words["where"] = " ".join(f"--where {text}" for text in where)
    if services:
        words["services"] = " ".join(services)
    return words


_ABOUT: Final = {
    "http": "HTTP requests: how many, how many failed, and how long they took, by route.",
    "syscalls": "System calls: how many, how many failed, and how long they took.",
    "tcp": "TCP by peer: connections, bytes, segments sent again, round trips.",
    "profile": "Where CPU time went, by function; with -o flame.svg as a flame graph.",
    "services": "Every service that was seen, with its requests, connections and CPU time.",
}
for _name, _text in _ABOUT.items():
    query.add_command(_grouped(_name, _text))
query.add_command(
    _listed(
        "sessions", "Sessions of collectors: where, since when, how they ended.", with_services=True
    )
)
query.add_command(
    _listed("accounts", "Where every event is: produced = stored + lost.", with_services=True)
)
query.add_command(
    _listed("agents", "Agents: which can be reached, and what runs on them.", with_services=False)
)
