"""The Debian package: the environment, and the unit that runs the agent in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from deploy.image.environment import ROOT
from deploy.image.oci import ARCHITECTURES

_UNIT: Final = ROOT / "deploy/systemd/coral-agent.service"
_CONTROL: Final = """\
Package: coral-agent
Version: {version}
Architecture: {architecture}
Maintainer: The Coral maintainers <coral@localhost>
Depends: python3.11, libbpf1 (>= 1:1.1), libstdc++6, libgcc-s1
Installed-Size: {kib}
Section: admin
Priority: optional
Description: eBPF collectors that run on request and stream over gRPC
 The agent loads signed eBPF programs into the kernel, for a limited time, and streams
 what they see: system calls, TCP connections, HTTP requests, CPU profiles.
"""
_CONFIGURATION: Final = "# See coral-agent's docs/configuration.md; each key has a default.\n"
# Installing does not start it: what may load programs into the kernel is started by a person.
_POSTINST: Final = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
	systemctl --system daemon-reload >/dev/null || true
	[ -z "$2" ] || systemctl try-restart coral-agent.service >/dev/null || true
fi
"""
_PRERM: Final = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
	systemctl --no-reload disable --now coral-agent.service >/dev/null || true
fi
"""
# What the agent keeps is in /var/cache/private, as its user is made anew at each start.
_POSTRM: Final = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
	systemctl --system daemon-reload >/dev/null || true
fi
if [ "$1" = purge ]; then
	rm -rf /var/cache/private/coral /var/cache/coral
fi
"""


def unit() -> str:
    """The unit as the package installs it: the agent is /usr/bin/coral, with its configuration."""
    lines = _UNIT.read_text().splitlines()
    return (
        "\n".join(
            "ExecStart=/usr/bin/coral agent --log-format json --config /etc/coral/agent.yaml"
            if line.startswith("ExecStart=")
            else line
            for line in lines
            if not line.startswith("# To install:")
        )
        + "\n"
    )


def build(environment: Path, root: Path, version: str, machine: str, output: Path) -> Path:
    """Makes the package of the tree ENVIRONMENT, which is for MACHINE, in OUTPUT, by way of a copy
    in ROOT: the same bytes for the same files."""
    shutil.copytree(environment, root, symlinks=True)
    for path, content in (
        (root / "lib/systemd/system/coral-agent.service", unit()),
        (root / "etc/coral/agent.yaml", _CONFIGURATION),
        (root / "usr/share/doc/coral-agent/copyright", (ROOT / "LICENSE").read_text()),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o111 else 0o644)
    control = root / "DEBIAN"
    control.mkdir()
    control.chmod(0o755)
    architecture = ARCHITECTURES[machine]
    kib = sum(path.stat().st_size + 1023 >> 10 for path in files)
    for name, content in (
        ("control", _CONTROL.format(version=version, architecture=architecture, kib=kib)),
        ("conffiles", "/etc/coral/agent.yaml\n"),
        ("md5sums", "".join(f"{_md5(path)}  {path.relative_to(root)}\n" for path in files)),
        ("postinst", _POSTINST),
        ("prerm", _PRERM),
        ("postrm", _POSTRM),
    ):
        (control / name).write_text(content)
        (control / name).chmod(0o755 if content.startswith("#!") else 0o644)
    made = output / f"coral-agent_{version}_{architecture}.deb"
    command = ("dpkg-deb", "--root-owner-group", "-Zzstd", "--build", str(root), str(made))
    variables = os.environ | {"SOURCE_DATE_EPOCH": "0"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    return made


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
