"""Ids of real processes in pid namespaces, one in another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coral.agent.machine.caller_pids import translated
from coral.collectors.namespaces import (
    PidNamespace,
    obstacle,
    own_pid_namespace,
    pid_namespace_of,
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
        outer, nested = pid_namespace_of(init), pid_namespace_of(inner)
        assert outer
        assert nested
        assert (outer.depth, nested.depth) == (1, 2)
        assert tgids_in(outer, {ids[1] for ids in tgids.values()}) == {
            ids[1]: tgid for tgid, ids in tgids.items()
        }
        assert tgids_in(nested, {1, 2}) == {1: inner}
        assert tgids_in(PidNamespace(outer.inode + 1, 1), {1}) == {}
        # As the agent does it for a caller in there.
        asked = {"pid": f"{tgids[inner][1]}, 1", "interval": "1s"}
        assert translated(asked, outer.inode, init) == {"pid": f"{inner},{init}", "interval": "1s"}
        with pytest.raises(OptionError, match="processes that run now: 4999 does not"):
            translated({"pid": "1,4999"}, outer.inode, init)
        with pytest.raises(OptionError, match="callers on its unix socket only"):
            translated({"pid": "1"}, outer.inode, 0)
        with pytest.raises(OptionError, match="which the agent cannot look at: it has ended"):
            translated({"pid": "1"}, outer.inode, 1 << 22)


def test_ids_of_the_agents_own_namespace_stay_as_they_are() -> None:
    config = {"pid": str(os.getpid())}
    assert translated(config, 0, 0) is config
    assert translated(config, own_pid_namespace(), 0) is config


@pytest.mark.parametrize("value", ["", "nginx", "1,x", "-1"])
def test_what_is_no_id_is_not_looked_for(value: str) -> None:
    assert translated({"pid": value}, 7, 0) == {"pid": value}


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
