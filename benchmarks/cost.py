"""What one traced system call costs the program that makes it.

The traced program measures itself. Each variant is measured right after a bare run, and both are
one pair: what the machine's mood does to the one it mostly does to the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from benchmarks import peers
from benchmarks.bench import Bench, Tap, per_call_ns
from benchmarks.empty import Empty, attached
from benchmarks.peers import Peer
from benchmarks.report import NOT_HERE, Aim, Report, Samples, times
from benchmarks.turns import measure_in_turns
from coral.client import AgentClient
from tests.support import Calls, totals

ROUNDS: Final = 11
_CALLS: Final = 1_000_000
_MOST_ADDED_NS: Final = 400.0
_MOST_OF_SYSCOUNT: Final = 0.7
_EMPTY: Final = "two empty programs"
_OURS: Final = "coral: watched"
_REFERENCE: Final = peers.LIBBPF_SYSCOUNT.name

# After the block: how many of the program's calls were seen, None where nobody counts.
Counted = Callable[[], int | None]
Watching = Callable[[Calls], AbstractAsyncContextManager[Counted]]


@dataclass
class Variant:
    """One way to watch, and what it was measured to cost."""

    name: str
    watching: Watching
    calls: int = _CALLS
    bare_ns: list[float] = field(default_factory=list)
    traced_ns: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)  # calls counted, of one made
    failure: str = ""

    @property
    def added_ns(self) -> list[float]:
        """What it adds to a call, by round."""
        return [traced - bare for traced, bare in zip(self.traced_ns, self.bare_ns, strict=True)]

    @property
    def slowdown(self) -> Samples:
        """Traced over bare, by round."""
        return Samples([t / b for t, b in zip(self.traced_ns, self.bare_ns, strict=True)])

    async def measure(self, bench: Bench) -> None:
        """One pair: bare, then watched."""
        bare_ns = await _bare(bench)
        with bench.calls(self.calls) as calls:
            async with self.watching(calls) as counted:
                traced_ns = await per_call_ns(calls, self.calls)
        self.bare_ns.append(bare_ns)
        self.traced_ns.append(traced_ns)
        if (count := counted()) is not None:
            self.seen.append(count / self.calls)


async def measure(bench: Bench) -> Report:
    """The section: everything in turn, ROUNDS times."""
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(bench.agent())
        client = await stack.enter_async_context(AgentClient(agent.address))
        variants = _variants(bench, client)
        remarks = await measure_in_turns(bench, variants, ROUNDS, lambda: _progress(variants))
    return _report(variants, remarks)


def _variants(bench: Bench, client: AgentClient) -> list[Variant]:
    return [
        Variant(_EMPTY, _empty(bench)),
        Variant(_OURS, _ours(client)),
        Variant("coral: not a target", _ours_elsewhere(bench, client)),
        *(Variant(peer.name, _peer(bench, peer), peer.calls) for peer in peers.ALL),
    ]


async def _bare(bench: Bench) -> float:
    with bench.calls(_CALLS) as calls:
        return await per_call_ns(calls, _CALLS)


def _empty(bench: Bench) -> Watching:
    @asynccontextmanager
    async def watching(_calls: Calls) -> AsyncIterator[Counted]:
        with attached(bench, Empty.AT_CALLS):
            yield lambda: None

    return watching


def _ours(client: AgentClient) -> Watching:
    @asynccontextmanager
    async def watching(calls: Calls) -> AsyncIterator[Counted]:
        async with Tap.on(client, calls.pid) as tap:
            yield lambda: totals(tap.rows)["getppid"]

    return watching


def _ours_elsewhere(bench: Bench, client: AgentClient) -> Watching:
    @asynccontextmanager
    async def watching(_calls: Calls) -> AsyncIterator[Counted]:
        with bench.calls(1) as other:
            async with Tap.on(client, other.pid) as tap:
                yield lambda: totals(tap.rows)["getppid"]

    return watching


def _peer(bench: Bench, peer: Peer) -> Watching:
    @asynccontextmanager
    async def watching(calls: Calls) -> AsyncIterator[Counted]:
        with peers.running(bench, peer, calls.pid) as one:
            yield one.calls_counted

    return watching


def _progress(variants: Sequence[Variant]) -> str:
    """The last figures of what has an aim, and of the floor."""
    shown = [v for v in variants if v.added_ns and v.name in (_EMPTY, _OURS, _REFERENCE)]
    return ", ".join(f"{v.name} {v.added_ns[-1]:+,.0f} ns" for v in shown)


def _report(variants: Sequence[Variant], remarks: Sequence[str]) -> Report:
    bare = Samples([ns for variant in variants for ns in variant.bare_ns])
    by_name = {variant.name: variant for variant in variants}
    ours, reference = by_name[_OURS], by_name[_REFERENCE]
    rows: list[tuple[str, ...]] = [("bare", bare.show(), "", "1.00 x", "", "")]
    rows += [_row(variant, reference) for variant in variants]
    aims = [Aim(f"{_OURS}, added", Samples(ours.added_ns).median, _MOST_ADDED_NS, " ns")]
    if shares := _shares(ours, reference):
        aims.append(Aim(f"{_OURS}, of what syscount adds", shares.median, _MOST_OF_SYSCOUNT, " x"))
    return Report(
        title="Cost of one traced getppid call, in ns",
        how=f"Median (middle half) of {ROUNDS} rounds, each variant right after a bare run of the "
        "same program. It measures itself; what it waited for a CPU that others had is taken off. "
        "coral: calls, errors, total, greatest, histogram; syscount: calls, total; bpftrace: "
        "calls, errors, total.",
        columns=("", "ns a call", "added ns", "of bare", "of syscount's", "calls seen"),
        rows=rows,
        aims=aims,
        remarks=remarks,
        samples={
            "bare ns": bare.values,
            **{f"{variant.name}, ns": variant.traced_ns for variant in variants},
            **{f"{variant.name}, added ns": variant.added_ns for variant in variants},
        },
    )


def _row(variant: Variant, reference: Variant) -> tuple[str, ...]:
    if not variant.traced_ns:
        return (variant.name, *[NOT_HERE] * 5)
    added, shares = Samples(variant.added_ns), _shares(variant, reference)
    return (
        variant.name,
        Samples(variant.traced_ns).show(),
        added.show(),
        times(variant.slowdown.median, 1),
        times(shares.median, 1) if shares else NOT_HERE,
        f"{Samples(variant.seen).median:.2%}" if variant.seen else "",
    )


def _shares(variant: Variant, reference: Variant) -> Samples | None:
    """What a variant adds over what the reference adds in the same round."""
    pairs = zip(variant.added_ns, reference.added_ns, strict=False)
    shares = [added / reference_added for added, reference_added in pairs if reference_added > 0]
    return Samples(shares) if shares else None
