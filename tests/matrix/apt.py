"""Debian's packages, for other suites and processors than this machine's, without touching the
state of its apt: the mirrors are its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.support import ROOT

KERNELS_DIRECTORY: Final = ROOT / "build/kernels"
_SOURCES: Final = "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"


class KernelMissingError(Exception):
    """A kernel that cannot be had here, and why."""


def options_of(suite: str = "", architecture: str = "") -> tuple[str, ...]:
    """What has apt know SUITE alone, or what this machine's own suites have for ARCHITECTURE;
    nothing, where it is to know what it does anyway."""
    if not suite and not architecture:
        return ()
    state = KERNELS_DIRECTORY / "apt" / (suite or architecture)
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    sources, status = state / "sources.list", state / "status"
    sources.write_text("".join(f"deb {it}\n" for it in _sources(suite)))
    status.touch()
    return (
        *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=-"),
        *("-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"),
        *(_foreign(architecture, status) if architecture else ()),
    )


def _foreign(architecture: str, status: Path) -> tuple[str, ...]:
    """What makes ARCHITECTURE the only one, of a system that has nothing installed yet."""
    return (
        *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
        *("-o", f"Dir::State::Status={status}", "-o", "Debug::NoLocking=1"),
    )


def _sources(suite: str) -> Sequence[str]:
    listed = run("apt-get", "indextargets", "--format", _SOURCES)
    own = sorted(set(re.findall(r"^Debian (\S+ \S+ main)$", listed, re.MULTILINE)))
    mirrors = [it.split()[0] for it in own if re.search(r" (?:bookworm|stable|oldstable) ", it)]
    if not mirrors:
        raise KernelMissingError("no mirror of Debian among apt's sources to read others from")
    return [f"{mirrors[0]} {suite} main"] if suite else own


def dependencies(options: Sequence[str], package: str) -> list[str]:
    """The packages that PACKAGE depends on."""
    out = run("apt-cache", *options, "depends", "--important", package)
    return re.findall(r"^\s+Depends: (\S+)$", out, re.MULTILINE)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What COMMAND prints. Raises KernelMissingError where it fails."""
    if command[0] == "apt-get":  # apt's own user may not write where we are
        command = (command[0], "-o", "APT::Sandbox::User=root", *command[1:])
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise KernelMissingError(f"{' '.join(map(str, command))}: {ran.stderr.strip()}")
    return ran.stdout
