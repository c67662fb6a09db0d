"""Which capabilities are kept, and which are reported missing: set arithmetic, for kernels other
than this one too."""

from __future__ import annotations

import pytest

from coral.agent.machine.privileges import refusal, to_keep
from coral.bpf.probing.capabilities import ALL, NAMES, TRACING, lacking, missing, number, required
from coral.collectors.registry import COLLECTORS
from tests.support import ROOT

BEFORE_5_8 = ALL - {"CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE"}
ALWAYS = {"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_IPC_LOCK"}
NEEDS = [collector.needs() for collector in COLLECTORS.values()]
WANTS = [collector.wants() for collector in COLLECTORS.values()]


def test_numbers_are_the_kernels() -> None:
    # linux/capability.h
    assert (number("CAP_DAC_READ_SEARCH"), number("CAP_SYS_PTRACE")) == (2, 19)
    assert (number("CAP_SYS_ADMIN"), number("CAP_SYS_RESOURCE")) == (21, 24)
    assert (number("CAP_PERFMON"), number("CAP_BPF"), len(NAMES)) == (38, 39, 41)


def test_an_ordinary_user_keeps_what_collectors_need_and_what_finds_services() -> None:
    kept = to_keep(NEEDS, ALL, ordinary_user=True)
    assert kept == {"CAP_BPF", "CAP_PERFMON", *ALWAYS}


def test_otherwise_the_right_to_statistics_is_kept_unless_it_is_to_observe_only() -> None:
    kept = to_keep(NEEDS, ALL, ordinary_user=True)
    assert to_keep(NEEDS, ALL) == kept | {"CAP_SYS_ADMIN"}
    assert to_keep(NEEDS, ALL, observe_only=True) == kept


def test_what_names_functions_is_kept_and_its_absence_refuses_nothing() -> None:
    kept = to_keep([*NEEDS, *WANTS], ALL, ordinary_user=True)
    assert kept == {
        "CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG", "CAP_CHECKPOINT_RESTORE", *ALWAYS,
    }  # fmt: skip
    for needs in NEEDS:
        assert refusal(needs, frozenset({"CAP_BPF", "CAP_PERFMON"}), ALL) == ""


def test_before_linux_5_8_an_ordinary_users_collectors_need_cap_sys_admin() -> None:
    kept = to_keep(NEEDS, BEFORE_5_8, ordinary_user=True)
    assert kept == {"CAP_SYS_ADMIN", *ALWAYS}
    assert refusal(TRACING, kept, BEFORE_5_8) == ""
    told = refusal(TRACING, frozenset(ALWAYS), BEFORE_5_8)
    assert told.startswith(
        "CAP_SYS_ADMIN (to load programs and make maps, to attach programs that see other "
        "processes) is missing: "
    )


def test_before_linux_5_8_an_agent_that_observes_only_refuses_them() -> None:
    kept = to_keep(NEEDS, BEFORE_5_8, observe_only=True)
    assert kept == ALWAYS
    # Not even if it has never dropped the capability, as when it is used as a library.
    for has in (kept, BEFORE_5_8):
        assert refusal(TRACING, has, BEFORE_5_8, observe_only=True) == (
            "policy.observe_only: on this kernel it needs CAP_SYS_ADMIN (to load programs and make "
            "maps, to attach programs that see other processes), which this agent does not keep"
        )


def test_a_collector_that_states_a_need_of_its_own_has_it_kept_and_missed() -> None:
    needs = {**TRACING, "CAP_NET_ADMIN": "to attach to a cgroup's sockets"}
    assert "CAP_NET_ADMIN" in to_keep([*NEEDS, needs], ALL, ordinary_user=True)
    told = refusal(needs, frozenset(TRACING), ALL)
    assert told.startswith("CAP_NET_ADMIN (to attach to a cgroup's sockets) is missing: ")
    assert refusal(needs, frozenset(needs), ALL, observe_only=True) == ""


@pytest.mark.parametrize("one", TRACING)
def test_the_missing_one_is_named_with_the_remedy(one: str) -> None:
    assert refusal(TRACING, ALL - {one, "CAP_SYS_ADMIN"}, ALL) == (
        f"{one} ({TRACING[one]}) is missing: run the agent as root, or give it {one}, by "
        "AmbientCapabilities= of its systemd unit or a container's --cap-add"
    )


def test_cap_sys_admin_replaces_both() -> None:
    assert lacking(required(TRACING, ALL), frozenset({"CAP_SYS_ADMIN"})) == {}
    assert missing(TRACING).count(" and ") == 2
    assert "are missing: run the agent as root, or give it CAP_BPF CAP_PERFMON, by" in missing(
        TRACING
    )


def test_the_systemd_unit_gives_exactly_what_is_kept() -> None:
    unit = (ROOT / "deploy/systemd/coral-agent.service").read_text()
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    kept = to_keep([*NEEDS, *WANTS], ALL, ordinary_user=True)
    assert set(lines["AmbientCapabilities"].split()) == kept
    assert lines["CapabilityBoundingSet"] == lines["AmbientCapabilities"]


def test_the_documentation_has_each_one_that_is_kept() -> None:
    page = (ROOT / "docs/privileges.md").read_text()
    assert {name for name in NAMES if f"| `{name}` |" in page} == to_keep([*NEEDS, *WANTS], ALL)
