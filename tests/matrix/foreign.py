"""The root file system of a guest of another architecture than this machine's, with the project in
it: Debian packages and Python wheels of that architecture, unpacked; nothing is installed here.

No scripts of packages run; this module does what tests need of their work.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from build_hook import clang_command, program_sources
from tests.matrix.apt import options_of, run
from tests.support import ROOT

# Without bcc, whose compilation under emulation takes about as long as the agent waits for it.
_PACKAGES: Final = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "mount", "util-linux"),
    *("python3", "clang", "libbpf1", "libbpf-dev", "linux-libc-dev"),
    *("gcc", "libc6-dev", "bpftool", "procps", "busybox-static"),
    *("iproute2", "nftables", "kmod"),
)
_PROJECT: Final = "coral-ebpf-agent"
# Imports of tests/kernel besides the project's own dependencies.
_TEST_WHEELS: Final = ("hatchling", "psutil", "pytest", "pytest-asyncio", "pytest-timeout")
_GLIBC_MINORS: Final = range(17, 37)  # that of Debian 12 is 2.36
_LEFT_OUT: Final = (".*", "build", "dist", "__pycache__", "*.bpf.o")


def unpack_root(root: Path, architecture: str) -> None:
    """Makes ROOT of Debian packages for ARCHITECTURE, including their dependencies."""
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    options = options_of(architecture=architecture)
    run("apt-get", *options, "-qq", "update")
    fetch = ("--yes", "--no-install-recommends", "--download-only")
    archives = root.with_name("archives")
    (archives / "partial").mkdir(parents=True)
    cache = ("-o", f"Dir::Cache::Archives={archives}")
    print(f"# unpacking Debian for {architecture}", flush=True)
    run("apt-get", *options, *cache, "-qq", *fetch, "install", *_PACKAGES)
    into = 'dpkg-deb --fsys-tarfile "$1" | tar --extract --keep-directory-symlink -C "$2"'
    for package in sorted(archives.glob("*.deb")):
        run("bash", "-o", "pipefail", "-c", into, "bash", package, root)
    shutil.rmtree(archives)
    (root / "usr/bin/cc").symlink_to("gcc")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)


def install_wheels(root: Path, machine: str) -> None:
    """Puts the imports of the project and its tests into ROOT, for MACHINE, in the versions
    installed here; does nothing if they are already there."""
    python = (root / "usr/bin/python3").readlink().name
    target = root / "usr/local/lib" / python / "dist-packages"
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pip = (sys.executable, "-P", "-m", "pip", "--disable-pip-version-check")
    text = run(*pip, "freeze", "--exclude", _PROJECT)
    versions = root.with_name("versions.txt")
    if versions.exists() and versions.read_text() == text:
        return
    shutil.rmtree(target, ignore_errors=True)
    versions.unlink(missing_ok=True)
    unfinished = versions.with_suffix(".unfinished")
    unfinished.write_text(text)
    print(f"# unpacking wheels for {machine}", flush=True)
    run(
        *(*pip, "install", "--quiet", "--target", target, "--constraint", unfinished),
        *("--only-binary", ":all:", "--python-version", python.removeprefix("python")),
        *("--platform", f"manylinux2014_{machine}"),
        *(it for n in _GLIBC_MINORS for it in ("--platform", f"manylinux_2_{n}_{machine}")),
        *(*needed, *_TEST_WHEELS),
    )
    unfinished.rename(versions)


def lay_out_project(directory: Path, target: str) -> None:
    """Copies the project as it is now, with its eBPF objects compiled for TARGET. Programs that run
    in DIRECTORY find it installed."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    for source in program_sources(directory):
        run(*clang_command(source, source.with_suffix(".o"), target))
    project = distribution(_PROJECT)
    installed = directory / "src" / f"{_PROJECT.replace('-', '_')}-{project.version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(project.read_text("METADATA") or "")
