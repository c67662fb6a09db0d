"""What a shell offers for services, columns and tables: what the colony has.

In bash: eval "$(_CORAL_COMPLETE=bash_source coral)"; zsh and fish alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import click
from click.shell_completion import CompletionItem

from coral.client import AgentError, ColonyClient, default_colony
from coral.mesh.colony.v1 import colony_pb2 as pb

_ANSWER_S: Final = 2.0  # somebody waits for the shell
_SINCE_S: Final = 86_400.0


def complete_service(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The services of the last day. Silent where no colony answers."""
    with suppress(AgentError, TimeoutError, OSError, ImportError):
        names = asyncio.run(_services(_address(ctx)))
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return []


def complete_by(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The columns of the query, after those that are given."""
    *given, last = incomplete.split(",")
    before = "".join(f"{name}," for name in given)
    names = (name for name in _columns(ctx) if name not in given)
    return [CompletionItem(before + name) for name in names if name.startswith(last)]


def complete_where(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The columns of the query."""
    found = (f"{name}=" for name in _columns(ctx))
    return [CompletionItem(text) for text in found if text.startswith(incomplete)]


def complete_table(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The tables."""
    with suppress(AgentError, TimeoutError, OSError):
        names = [table.name for table in asyncio.run(_described(_address(ctx))).tables]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return []


def _columns(ctx: click.Context) -> Sequence[str]:
    with suppress(AgentError, TimeoutError, OSError):
        for query in asyncio.run(_described(_address(ctx))).queries:
            if query.name == ctx.info_name:
                return query.columns
    return ()


def _address(ctx: click.Context) -> str:
    return ctx.params.get("address") or default_colony()


async def _described(address: str) -> pb.DescribeResponse:
    async with ColonyClient(address, timeout_s=_ANSWER_S) as colony:
        return await colony.describe()


async def _services(address: str) -> Sequence[str]:
    async with (
        ColonyClient(address, timeout_s=_ANSWER_S) as colony,
        colony.query("services", since=_SINCE_S, by=["service"]) as answer,
    ):
        table = await answer.table()
    return sorted(name for name in table.column("service").to_pylist() if name)
