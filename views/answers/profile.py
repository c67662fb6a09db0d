"""CPU profiles from what is stored: functions in a table, and flame graphs by the same renderers as
a tap's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.answers.contract import WARNING, AnswerView, Row, Shown
from coral.views.cpu_profile.functions import Function, Use
from coral.views.cpu_profile.names import file_name, fitted, visible
from coral.views.cpu_profile.profile import NO_STACK, UNKNOWN, Frame, Origin, Profile
from coral.views.cpu_profile.session import amount_words, lost_words, method_words, missing
from coral.views.cpu_profile.story import functions_sheet
from coral.views.sheet import Column, Sheet
from coral.views.text import format_share

_SUBJECT: Final = ("process", "end", "unwinding", "in_kernel", "stack_id")
_MOST_LINES: Final = 30
_LEAST_SAMPLES: Final = 20
_SLOWER: Final = 1.25
_NOT_KEPT: Final = "[frames not kept]"


def profile_of(shown: Shown, suffix: str = "") -> Profile:
    """The samples of an answer; those of the other window with the SUFFIX `_before`. Where rows are
    of several services, or of whatever was asked, these are processes of the profile."""
    profile = Profile()
    names = [name for name in shown.by if name not in _SUBJECT]
    several = [name for name in names if len({row[name] for row in shown.rows}) > 1]
    for row in shown.rows:
        count = row[f"count{suffix}"] or 0
        if count:
            period_ns = (row[f"cpu_ns{suffix}"] or 0) // count
            cycles = (row[f"cycles{suffix}"] or 0) // count
            profile.add(_origin(row, several), _frames(row), count, period_ns, cycles)
        profile.account(
            lost=row[f"samples_lost{suffix}"] or 0, truncated=row[f"samples_truncated{suffix}"] or 0
        )
    return profile


def sheets(shown: Shown) -> Iterator[Sheet | str]:
    """Functions, those that used most first."""
    profile = profile_of(shown)
    if shown.compared:
        before = profile_of(shown, "_before")
        yield from unseen(profile)
        yield from (f"before: {sentence}" for sentence in unseen(before))
        yield _compared(profile, before)
        return
    yield amount_words(profile, shown.seconds)
    yield from unseen(profile)
    yield ""
    yield functions_sheet(profile, _MOST_LINES)


def unseen(profile: Profile) -> Iterator[str]:
    """What could not be seen, and how stacks were found."""
    yield from lost_words(profile.lost)
    yield from missing(profile)
    yield from method_words(profile)


def _compared(now: Profile, before: Profile) -> Sheet:
    """Functions by how their share of all samples changed."""
    uses = {use.function: use for use in now.uses.ordered()}
    uses_before = {use.function: use for use in before.uses.ordered()}
    sheet = Sheet(
        (
            Column("SELF BEFORE"),
            Column("NOW"),
            Column("CHANGE"),
            Column("TOTAL NOW", spare=2),
            Column("FUNCTION", right=False, fits=True, room=24, comfort=32),
            Column("MODULE", right=False, fits=True, room=8, spare=3),
            Column("", right=False, spare=1),
        )
    )

    def shares(function: Function) -> tuple[float, float]:
        return _own(uses_before.get(function), before), _own(uses.get(function), now)

    def changed(function: Function) -> float:
        share_before, share = shares(function)
        return share - share_before

    found = sorted({*uses, *uses_before}, key=lambda it: (-abs(changed(it)), it))
    for function in found[:_MOST_LINES]:
        share_before, share = shares(function)
        verdict = _verdict(uses.get(function), uses_before.get(function), share, share_before)
        mark = " [k]" if function.kernel else ""
        sheet.add(
            format_share(share_before),
            format_share(share),
            f"{(share - share_before) * 100:+.1f}%",
            format_share(uses[function].total / now.samples) if function in uses else "0%",
            _name(function, mark),
            visible(file_name(function.module)),
            (verdict, WARNING),
        )
    return sheet


def _name(function: Function, mark: str) -> Any:  # noqa: ANN401  Content
    return lambda width: fitted(function.name, width - len(mark)) + mark


def _own(use: Use | None, profile: Profile) -> float:
    return use.own / profile.samples if use and profile.samples else 0.0


def _verdict(use: Use | None, before: Use | None, share: float, share_before: float) -> str:
    if use and not before:
        return "new" if use.total >= _LEAST_SAMPLES else ""
    if before and not use:
        return "gone" if before.total >= _LEAST_SAMPLES else ""
    if use and before and min(use.own, before.own) >= _LEAST_SAMPLES:
        if share >= share_before * _SLOWER:
            return "more"
        if share_before >= share * _SLOWER:
            return "less"
    return ""


def _origin(row: Row, several: Sequence[str]) -> Origin:
    process = row["process"] or ""
    if several:
        process = " ".join([*(str(row[name] or "-") for name in several), process]).strip()
    return Origin(
        process,
        0,
        "",
        0,
        _number(pb.CpuStackEnd, "CPU_STACK_END_", row["end"] or ""),
        _number(pb.CpuUnwinding, "CPU_UNWINDING_", row["unwinding"] or ""),
        bool(row["in_kernel"]),
    )


def _frames(row: Row) -> Sequence[Frame]:
    if row["functions"] is None:
        return (Frame(_NOT_KEPT, flags=int(pb.CPU_FRAME_FLAG_UNNAMED)),)
    if not row["functions"]:
        return (Frame(NO_STACK, flags=int(pb.CPU_FRAME_FLAG_UNNAMED)),)
    return [
        Frame(function or UNKNOWN, module, address, build_id, flags)
        for function, module, address, build_id, flags in zip(
            row["functions"],
            row["modules"],
            row["addresses"],
            row["build_ids"],
            row["flags"],
            strict=True,
        )
    ]


def _number(enum: Any, prefix: str, word: str) -> int:  # noqa: ANN401  an enum's wrapper
    found = enum.DESCRIPTOR.values_by_name.get(f"{prefix}{word.upper()}")
    return found.number if found else 0


VIEW: Final = AnswerView(sheets, "no sample was taken, so nothing of this used much CPU time")
