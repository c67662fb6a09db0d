"""What the bench asks of the kernel, and what it lends to peers so that they can start here."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.tracefs import hold_tracefs, mount_source

_TRACING: Final = ("tracing", "raw_tracepoint", "tracepoint", "kprobe")  # uprobes are of the last
_GRACE_S: Final = 0.5
_CPUCLOCK_SCHED: Final = 2  # a clock's number has a pid in it (clock_getcpuclockid)
_PROCESSOR: Final = {"x86_64": "x86", "aarch64": "arm64"}
_DEBIAN_HEADERS: Final = re.compile(r"(linux-headers-[\d.]+\S*?-\d+)-(?!common)\S+")


def _bpftool(*arguments: str) -> list[dict[str, Any]]:
    result = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, check=True)
    found: list[dict[str, Any]] = json.loads(result.stdout or b"[]")
    return found


def attachments(pid: int) -> int:
    """How many programs a process has attached to tracepoints, as the kernel tells it."""
    return sum(item["pid"] == pid for item in _bpftool("perf", "list"))


def cpu_ns(pid: int) -> int:
    """The CPU time that a process has had, all its threads together."""
    return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)


def foreign_programs() -> bool:
    """Whether programs that could slow down what is measured are loaded now, while we have none.
    Ours are gone a moment after they are detached, when no CPU can be in them any more."""
    end = time.monotonic() + _GRACE_S
    while any(program["type"] in _TRACING for program in _bpftool("prog", "list")):
        if time.monotonic() > end:
            return True
        time.sleep(0.01)
    return False


@contextmanager
def tracefs() -> Iterator[str]:
    """Inside the block tracefs is mounted, if it can be; yields a remark where it was not mounted
    before. The last run that needs it unmounts it."""
    was_mounted = bool(mount_source())
    release = hold_tracefs()
    try:
        if was_mounted:
            yield ""
        elif mount_source():
            yield (
                "tracefs was not mounted, and is while this runs: bpftrace, bcc and libbpf-tools "
                "cannot attach without it, coral does not need it"
            )
        else:
            yield "tracefs cannot be mounted"
    finally:
        release()


def headers_for_bcc(directory: Path) -> tuple[Path | None, str]:
    """A kernel source tree to lend to bcc, made in DIRECTORY, and a remark; None where bcc
    finds its own, or where there is none to lend."""
    release = platform.release()
    own = (Path("/lib/modules", release, "build"), Path("/sys/kernel/kheaders.tar.xz"))
    if any(path.exists() for path in own):
        return None, ""
    for flavour in sorted(Path("/usr/src").glob("linux-headers-*"), reverse=True):
        match = _DEBIAN_HEADERS.fullmatch(flavour.name)
        if match and (common := flavour.with_name(f"{match[1]}-common")).is_dir():
            return _merged(flavour, common, directory / "kernel-source"), (
                f"there are no headers of this kernel; bcc gets {flavour.name}, "
                "without which it cannot start"
            )
    return None, "there are no kernel headers on this machine; bcc cannot start without"


def _merged(flavour: Path, common: Path, tree: Path) -> Path:
    """Debian splits a kernel's headers over two trees; bcc wants one."""
    for include in ("include", f"arch/{_PROCESSOR[platform.machine()]}/include"):
        (tree / include).mkdir(parents=True)
        for half in (common, flavour):
            for entry in (half / include).iterdir():
                (tree / include / entry.name).symlink_to(entry)
    return tree


def machine() -> dict[str, str]:
    """What was measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)", cpuinfo, re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    virtual = (
        " (virtual)" if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE) else ""
    )
    return {
        "cpus": f"{os.cpu_count()} x {model[1] if model else platform.machine()}{virtual}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory": f"{int(memory[1]) / 1024**2:.0f} GiB" if memory else "",
        "python": platform.python_version(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
