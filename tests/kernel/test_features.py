"""What the kernel is found to support, by processes that may do more or less."""

from __future__ import annotations

import json
import subprocess
import sys

from coral.bpf import probe

PROBE = """\
import json
from coral.bpf import probe
features = probe()
print(json.dumps({"obstacle": features.obstacle, **{f.name: f.reason for f in features.features}}))
"""
PERFMON = "EPERM: CAP_PERFMON (to attach programs that see other processes) is missing"


def probed_without(*capabilities: str) -> dict[str, str]:
    """The reasons of a process without CAPABILITIES; empty for what it can use."""
    off = ",".join(f"-{name}" for name in capabilities)
    command = ["setpriv", f"--bounding-set={off}", f"--inh-caps={off}"]
    done = subprocess.run(
        [*command, sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, check=True
    )
    reasons: dict[str, str] = json.loads(done.stdout)
    return reasons


def test_task_storage_is_what_a_program_can_use_and_not_only_a_map() -> None:
    here = probe()
    reasons = probed_without("perfmon", "sys_admin")
    assert reasons["obstacle"] == ""
    # It may make maps of all kinds.
    for name in ("ring_buffer", "percpu_hash"):
        assert reasons[name] == here[name].reason
    # But load no program that would use this one.
    for name in ("raw_tp", "task_storage", "session_maps"):
        if here[name].available:
            assert reasons[name].startswith(PERFMON)
