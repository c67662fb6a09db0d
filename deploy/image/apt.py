"""Debian's packages on this machine's mirrors, for any suite and architecture: which versions there
are, and their files. Nothing is installed, and the state of this machine's apt is left alone."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from deploy.image.oci import ARCHITECTURES

_SOURCES: Final = "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"


class AptError(Exception):
    """A package cannot be had here; the message says why."""


class Locked(NamedTuple):
    """A package in one version, and the SHA-256 of its file."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file(self) -> str:
        """The name of its file, as apt has it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.architecture})"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of COMMAND. Raises AptError if it fails."""
    if command[0] == "apt-get":  # apt's own user may not write here
        command = (command[0], "-o", "APT::Sandbox::User=root", *command[1:])
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise AptError(f"{' '.join(map(str, command))}: {ran.stderr.strip()}")
    return ran.stdout


def options_of(state: Path, suite: str = "", architecture: str = "") -> tuple[str, ...]:
    """Options for apt to use SUITE only, or this machine's suites for ARCHITECTURE, with what it
    keeps below the directory STATE; none, for what it uses anyway. `apt-get update` with them comes
    first."""
    if not suite and not architecture:
        return ()
    state = state / (suite or architecture)
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    sources, status = state / "sources.list", state / "status"
    sources.write_text("".join(f"deb {it}\n" for it in sources_of(suite)))
    status.touch()
    return (
        *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=-"),
        *("-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"),
        *(_foreign(architecture, status) if architecture else ()),
    )


def _foreign(architecture: str, status: Path) -> tuple[str, ...]:
    """Options for ARCHITECTURE only, on a system with nothing installed."""
    return (
        *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
        *("-o", f"Dir::State::Status={status}", "-o", "Debug::NoLocking=1"),
    )


def sources_of(suite: str = "") -> Sequence[str]:
    """Where apt gets SUITE from, by this machine's mirror, or Debian's part of what this machine
    uses: `URI SUITE main`. Raises AptError."""
    listed = run("apt-get", "indextargets", "--format", _SOURCES)
    own = sorted(set(re.findall(r"^Debian (\S+ \S+ main)$", listed, re.MULTILINE)))
    mirrors = [it.split()[0] for it in own if re.search(r" (?:bookworm|stable|oldstable) ", it)]
    if not mirrors:
        raise AptError("no mirror of Debian among apt's sources to read others from")
    return [f"{mirrors[0]} {suite} main"] if suite else own


class Mirror:
    """What this machine's mirrors have for the processor MACHINE, as uname names it."""

    def __init__(self, machine: str, state: Path) -> None:
        """Other processors' lists of packages are kept below STATE, and fetched first."""
        self.architecture = ARCHITECTURES[machine]
        own = run("dpkg", "--print-architecture").strip()
        self._options: tuple[str, ...] = ()
        if self.architecture != own:
            self._options = options_of(state.absolute(), architecture=self.architecture)
            run("apt-get", *self._options, "-qq", "update")

    def newest(self, names: Sequence[str]) -> list[Locked]:
        """The packages NAMES in the versions that apt would install. Raises AptError."""
        said = run("apt-cache", *self._options, "policy", *names)
        versions = dict(re.findall(r"^(\S+):\n(?:  .*\n)*?  Candidate: (\S+)$", said, re.MULTILINE))
        absent = [name for name in names if versions.get(name, "(none)") == "(none)"]
        if absent:
            raise AptError(
                f"apt does not know {', '.join(absent)}: run `apt-get update` on Debian 12"
            )
        wanted = [f"{name}={versions[name]}" for name in names]
        shown = run("apt-cache", *self._options, "show", *wanted)
        hashes = {
            (fields["Package"], fields["Version"]): fields["SHA256"]
            for fields in map(_fields, shown.split("\n\n"))
            if "SHA256" in fields
        }
        return [
            Locked(name, versions[name], self.architecture, hashes[name, versions[name]])
            for name in names
        ]

    def fetch(self, packages: Iterable[Locked], cache: Path) -> list[Path]:
        """The files of PACKAGES in CACHE; those that are there are not fetched again. Raises
        AptError where the mirrors do not have a version any more, or another file of it."""
        cache.mkdir(parents=True, exist_ok=True)
        wanted = list(packages)
        missing = [it for it in wanted if not _is(cache / it.file, it)]
        if missing:
            self._check(missing)
            exact = [f"{it.name}={it.version}" for it in missing]
            run("apt-get", *self._options, "-qq", "download", *exact, cwd=cache)
        for it in missing:
            if not _is(cache / it.file, it):
                raise AptError(f"{it}: the mirror has another file of it than the one in the lock")
        return [cache / it.file for it in wanted]

    def _check(self, packages: Sequence[Locked]) -> None:
        """Every one of PACKAGES can be had."""
        known = self._versions([it.name for it in packages])
        gone = [
            f"{it}: apt knows {', '.join(known[it.name]) or 'no version'}"
            for it in packages
            if it.version not in known[it.name]
        ]
        if gone:
            raise AptError("\n".join(gone))

    def _versions(self, names: Sequence[str]) -> Mapping[str, list[str]]:
        """Every version of NAMES that the mirrors have."""
        found = defaultdict[str, list[str]](list)
        for line in run("apt-cache", *self._options, "madison", *names).splitlines():
            name, version, _ = (part.strip() for part in line.split("|"))
            if version not in found[name]:
                found[name].append(version)
        return found


def _fields(paragraph: str) -> dict[str, str]:
    """The fields of one line each."""
    return dict(re.findall(r"^(\S+): (.*)$", paragraph, re.MULTILINE))


def _is(file: Path, package: Locked) -> bool:
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256
