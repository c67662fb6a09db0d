"""What /proc says of an agent's process, and of the machine as that process sees it.

All of it is of the machine that this runs on; OSError where it may not be read.
"""

from __future__ import annotations

import re
import socket
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CAPABILITIES: Final = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_HELD: Final = {"bpf-prog": "programs", "bpf-map": "maps", "bpf_link": "links"}
_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class AgentProcess:
    """The process of an agent on this machine."""

    pid: int

    @classmethod
    def at(cls, address: str) -> AgentProcess | None:
        """The one that listens at ADDRESS; None where that cannot be told: of TCP, or from within
        a container."""
        if not address.startswith("unix:"):
            return None
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(address.removeprefix("unix:"))
            told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, _, _ = _CREDENTIALS.unpack(told)
            return cls(pid) if pid > 0 else None
        return None

    @property
    def _directory(self) -> Path:
        return Path("/proc", str(self.pid))

    def capabilities(self) -> frozenset[str]:
        """Of those that eBPF takes, the ones that it has in effect."""
        status = (self._directory / "status").read_text()
        match = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
        mask = int(match[1], 16) if match else 0
        return frozenset(name for name, bit in _CAPABILITIES.items() if mask >> bit & 1)

    def locked_memory_bytes(self) -> int | None:
        """Its limit; None where there is none."""
        limits = (self._directory / "limits").read_text()
        match = re.search(r"^Max locked memory\s+(\d+)", limits, re.MULTILINE)
        return int(match[1]) if match else None

    def mount_point(self, kind: str) -> str:
        """Where it sees the root of a file system of that kind; empty where it does not."""
        mounts = (self._directory / "mountinfo").read_text()
        match = re.search(rf"^\S+ \S+ \S+ / (\S+) .* - {kind} ", mounts, re.MULTILINE)
        return match[1] if match else ""

    def held(self) -> Counter[str]:
        """How many eBPF programs, maps and links it holds open."""
        found: Counter[str] = Counter()
        for descriptor in (self._directory / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                kind = str(descriptor.readlink()).removeprefix("anon_inode:").strip("[]")
                if kind in _HELD:
                    found[_HELD[kind]] += 1
        return found
