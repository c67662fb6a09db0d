"""Ids of real processes in pid namespaces, one in another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coral.agent.machine.caller_namespaces import Namespaces, translated
from coral.collectors.namespaces import (
    FIRST_CGROUP_NAMESPACE,
    namespace_of,
    obstacle,
    pid_depth,
    tgids_in,
)
from coral.collectors.options import OptionError
from coral.collectors.procfs import read, watchable, with_descendants
from tests.support import wait_until

# In a namespace: process 1 is a shell, which has a child and starts another namespace.
EXPECTED = ["cat", "cat", "sh", "unshare"]
NESTED = "exec 3<&0; cat <&3 & unshare --pid --fork cat <&3 & wait"
OBSTACLE = "from coral.collectors.namespaces import obstacle; print(obstacle())"


def ids_of(tgid: int) -> list[int]:
    (line,) = [line for line in (read(tgid, "status") or "").splitlines() if "NSpid" in line]
    return list(map(int, line.split()[1:]))


def test_a_process_has_an_id_in_each_namespace_above_its_own() -> None:
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "sh", "-c", NESTED], stdin=subprocess.PIPE
    ) as process:

        def family() -> dict[int, list[int]]:
            processes = watchable()
            found = with_descendants([process.pid], processes) - {process.pid}
            comms = sorted(processes[tgid].comm for tgid in found & processes.keys())
            return {tgid: ids_of(tgid) for tgid in found} if comms == EXPECTED else {}

        tgids = wait_until(family)
        assert sorted(map(len, tgids.values())) == [2, 2, 2, 3]
        init = next(tgid for tgid, ids in tgids.items() if ids[1:] == [1])
        inner = next(tgid for tgid, ids in tgids.items() if len(ids) == 3)
        outer, nested = namespace_of(init, "pid"), namespace_of(inner, "pid")
        assert outer
        assert nested
        assert (pid_depth(init), pid_depth(inner)) == (1, 2)
        assert tgids_in(outer, 1, {ids[1] for ids in tgids.values()}) == {
            ids[1]: tgid for tgid, ids in tgids.items()
        }
        assert tgids_in(nested, 2, {1, 2}) == {1: inner}
        assert tgids_in(outer + 1, 1, {1}) == {}
        # As the agent does it for a caller in there.
        asked, there = {"pid": f"{tgids[inner][1]}, 1", "interval": "1s"}, Namespaces(pid=outer)
        assert translated(asked, there, init) == {"pid": f"{inner},{init}", "interval": "1s"}
        with pytest.raises(OptionError, match="processes that run now: 4999 does not"):
            translated({"pid": "1,4999"}, there, init)
        with pytest.raises(OptionError, match="callers on its unix socket only"):
            translated({"pid": "1"}, there, 0)
        with pytest.raises(OptionError, match="give it by the agent's unix socket, unix:/run/"):
            translated({"pid": "1", "from_exec": "true"}, there, 0)
        with pytest.raises(OptionError, match="which the agent cannot look at: it has ended"):
            translated({"pid": "1"}, there, 1 << 22)


def test_ids_of_the_agents_own_namespace_stay_as_they_are() -> None:
    own, first = namespace_of("self", "pid"), FIRST_CGROUP_NAMESPACE
    assert own
    for config in ({"pid": f" {os.getpid()},1"}, {"cgroup": "/no/such"}, {"scope": "host"}, {}):
        for named_in in (Namespaces(), Namespaces(own, first)):
            assert translated(config, named_in, 0) == config


@pytest.mark.parametrize("value", ["", "nginx", "1,x", "-1"])
def test_what_is_no_id_is_not_looked_for(value: str) -> None:
    assert translated({"pid": value}, Namespaces(pid=7), 0) == {"pid": value}


@pytest.mark.parametrize(
    ("namespaces", "begins"),
    [
        ((), ""),
        (("--pid", "--fork", "--mount-proc"), "the agent is in a pid namespace of its own, "),
        (("--pid", "--fork"), "the agent is in a pid namespace of its own, "),
    ],
    ids=["the first", "its own", "its own, with the host's proc"],
)
def test_an_agent_outside_of_the_first_pid_namespace_cannot_tell_processes_apart(
    namespaces: tuple[str, ...], begins: str
) -> None:
    assert obstacle() == ""
    done = subprocess.run(
        ["unshare", *namespaces, sys.executable, "-P", "-c", OBSTACLE],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(begins)
    assert ("hostPID: true" in done.stdout) == bool(begins)
