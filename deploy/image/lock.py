"""`python -P -m deploy.image.lock`: writes requirements.txt and debian.lock anew, with the newest
versions that the project allows and that apt has, and the hashes of their files for both
processors. It needs the lists of packages of Debian 12: `apt-get update`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Final

from deploy.image import debian
from deploy.image.apt import AptError, Mirror
from deploy.image.environment import REQUIREMENTS, ROOT, tags
from deploy.image.oci import ARCHITECTURES

_HEAD: Final = """\
# Made by `make image-lock`: what the image and the Debian package install, for
# x86_64 and aarch64, so that the same sources make the same image.
"""
_DEBIAN_HEAD: Final = """\
# Made by `make image-lock`: Debian's packages in the image, with the SHA-256 of
# their files, so that the same sources make the same image.
"""


def main() -> None:
    """Writes both files."""
    try:
        _lock_debian()
    except AptError as error:
        raise SystemExit(str(error)) from error
    _lock_python()


def _lock_debian() -> None:
    """Asks apt, once for each processor."""
    with tempfile.TemporaryDirectory() as state:
        found = [
            it
            for machine in ARCHITECTURES
            for it in Mirror(machine, Path(state)).newest(debian.PACKAGES)
        ]
    lines = (" ".join(it) + "\n" for it in sorted(found))
    debian.LOCK.write_text(_DEBIAN_HEAD + "".join(lines))


def _lock_python() -> None:
    """Asks pip, once for each processor, what it would install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [requirement.partition(";")[0].strip() for requirement in project["dependencies"]]
    hashes = defaultdict[str, set[str]](set)
    for machine in ARCHITECTURES:
        for pin, hashed in _resolved(wanted, machine):
            hashes[pin].add(hashed)
    lines = (
        " \\\n    ".join((pin, *(f"--hash={it}" for it in sorted(hashes[pin]))))
        for pin in sorted(hashes)
    )
    REQUIREMENTS.write_text(_HEAD + "".join(f"{line}\n" for line in lines))


def _resolved(wanted: list[str], machine: str) -> list[tuple[str, str]]:
    """What pip would install on MACHINE: `name==version`, and the hash of the wheel."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work, "report.json")
        pip = (sys.executable, "-P", "-m", "pip", "install", "--quiet", "--dry-run")
        where = ("--ignore-installed", f"--target={work}/none", f"--report={report}")
        subprocess.run([*pip, *tags(machine), *where, *wanted], check=True)
        installed = json.loads(report.read_text())["install"]
    return [
        (
            f"{_normal(it['metadata']['name'])}=={it['metadata']['version']}",
            it["download_info"]["archive_info"]["hash"].replace("=", ":"),
        )
        for it in installed
    ]


def _normal(name: str) -> str:
    """The name of a distribution as indexes write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
