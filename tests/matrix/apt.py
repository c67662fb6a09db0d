"""Debian packages for guests: other suites and architectures than this machine's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deploy.image import apt
from tests.support import ROOT

KERNELS_DIRECTORY: Final = ROOT / "build/kernels"


class KernelMissingError(Exception):
    """A kernel is not available here; the message says why."""


def options_of(suite: str = "", architecture: str = "") -> tuple[str, ...]:
    """Options for apt to use SUITE only, or this machine's suites for ARCHITECTURE; none, for what
    it uses anyway."""
    try:
        return apt.options_of(KERNELS_DIRECTORY / "apt", suite, architecture)
    except apt.AptError as error:
        raise KernelMissingError(str(error)) from error


def dependencies(options: Sequence[str], package: str) -> list[str]:
    """The packages that PACKAGE depends on."""
    out = run("apt-cache", *options, "depends", "--important", package)
    return re.findall(r"^\s+Depends: (\S+)$", out, re.MULTILINE)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of COMMAND. Raises KernelMissingError if it fails."""
    try:
        return apt.run(*command, cwd=cwd)
    except apt.AptError as error:
        raise KernelMissingError(str(error)) from error
