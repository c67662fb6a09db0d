"""The part of the image that is Debian's: the interpreter, and the libraries that it and the agent
load. Packages are unpacked, never installed, so no script of theirs runs."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from deploy.image.apt import AptError, Locked, Mirror
from deploy.image.oci import ARCHITECTURES

LOCK: Final = Path(__file__).with_name("debian.lock")
PYTHON: Final = "python3.11"

# No shell, no package manager, no certificates: whoever checks certificates names a file of them.
PACKAGES: Final = (
    "base-files",  # /etc/os-release, by which scanners know whose packages these are
    "libbpf1",
    "libbz2-1.0",
    "libc6",
    "libelf1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    f"lib{PYTHON}-minimal",
    f"lib{PYTHON}-stdlib",
    "libssl3",
    "libstdc++6",
    f"{PYTHON}-minimal",
    "zlib1g",
)

_REMEDY: Final = (
    "run `apt-get update`; where the mirrors have newer versions by now, make the lock anew by "
    "`make image-lock`, or build once with --newest"
)

# Of base-files, only what names the system.
_ONLY: Final = {"base-files": ("usr/lib/os-release", "etc/os-release", "etc/debian_version")}
_DYNLOAD: Final = f"usr/lib/{PYTHON}/lib-dynload"
_LEFT_OUT: Final = (
    "usr/share/lintian/*",
    "usr/share/locale/*",
    "usr/share/man/*",
    "usr/share/binfmts/*",
    "usr/share/applications/*",
    "usr/share/pixmaps/*",
    "usr/share/gdb/*",
    "usr/share/doc/*/changelog*",
    "usr/share/doc/*/NEWS*",
    "usr/share/doc/*/README*",
    "usr/lib/*-linux-gnu/gconv/*",  # conversions of iconv, which Python does not use
    "usr/lib/*-linux-gnu/perl*",
    f"usr/lib/{PYTHON}/sitecustomize.py",  # a link to a file of another package
    *(
        f"usr/lib/{PYTHON}/{name}"
        for name in (
            *("EXTERNALLY-MANAGED", "__phello__/*", "ensurepip/*", "idlelib/*", "lib2to3/*"),
            *("pydoc_data/*", "sqlite3/*", "test/*", "tkinter/*", "turtle*", "venv/*", "dbm/*"),
            *("curses/*", "distutils/*", "config-3.11-*", "xmlrpc/*"),
        )
    ),
    # Modules whose libraries are left out, and those of the interpreter's own tests.
    *(
        f"{_DYNLOAD}/{name}.*"
        for name in (
            *("_crypt", "_curses", "_curses_panel", "_dbm", "_sqlite3", "_uuid", "nis"),
            *("ossaudiodev", "readline", "_testbuffer", "_testcapi", "_testclinic"),
            *("_testimportmultiple",),
            *("_testinternalcapi", "_testmultiphase", "_xxtestfuzz", "xxlimited*", "_ctypes_test"),
        )
    ),
)  # fmt: skip


def locked(machine: str) -> list[Locked]:
    """The packages of LOCK for MACHINE."""
    lines = (line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    architecture = ARCHITECTURES[machine]
    return [it for it in map(Locked._make, lines) if it.architecture == architecture]


def fetch(cache: Path, machine: str, *, newest: bool = False) -> list[Path]:
    """The packages of the lock for MACHINE, or, if the NEWEST are wanted, those that apt has now;
    from CACHE or this machine's mirrors. Raises SystemExit."""
    try:
        mirror = Mirror(machine, cache / "apt")
        wanted = mirror.newest(PACKAGES) if newest else locked(machine)
        return mirror.fetch(wanted, cache / "debian")
    except AptError as error:
        raise SystemExit(f"{error}\n{_REMEDY}") from error


def unpack(package: Path, root: Path) -> None:
    """Puts what the image needs of a package into ROOT, and what the package says of itself into
    var/lib/dpkg/status.d, where scanners look for it in images without a package manager."""
    name = _field(package, "Package")
    content = _run("dpkg-deb", "--fsys-tarfile", package)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            path = _merged(member.name)
            if member.isdir() or not _is_wanted(name, path):
                continue
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                target.symlink_to(_merged_link(member.linkname))
                continue
            source = archive.extractfile(member)
            if source:  # a file, or a hard link to one
                target.write_bytes(source.read())
                target.chmod(0o755 if member.mode & 0o111 else 0o644)
    status = root / "var/lib/dpkg/status.d" / name
    status.parent.mkdir(parents=True, exist_ok=True)
    paragraph = _run("dpkg-deb", "--field", package).decode().rstrip()
    status.write_text(f"{paragraph}\nStatus: install ok unpacked\n")
    sums = _run("dpkg-deb", "--ctrl-tarfile", package)
    with tarfile.open(fileobj=io.BytesIO(sums)) as control:
        for line in _md5sums(control):
            if _is_wanted(name, _merged(line.partition("  ")[2])):
                with status.with_name(f"{name}.md5sums").open("a") as file:
                    file.write(f"{line}\n")


def _md5sums(control: tarfile.TarFile) -> Iterator[str]:
    try:
        file = control.extractfile("./md5sums")
    except KeyError:
        return
    if file:
        yield from file.read().decode().splitlines()


def _merged(path: str) -> str:
    """The path in a system whose /lib and /bin are links into /usr."""
    path = path.removeprefix("./")
    first = path.partition("/")[0]
    return f"usr/{path}" if first in {"bin", "sbin", "lib", "lib64"} else path


def _merged_link(target: str) -> str:
    """The target of a link; absolute ones into /lib become ones into /usr/lib."""
    return f"/{_merged(target[1:])}" if target.startswith("/") else target


def _is_wanted(package: str, path: str) -> bool:
    if package in _ONLY:
        return path in _ONLY[package] or path == f"usr/share/doc/{package}/copyright"
    return not any(fnmatch(path, pattern) for pattern in _LEFT_OUT)


def lay_out(root: Path) -> None:
    """The directories, links and short files of a system that no package of these contains."""
    for link in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / link).mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(f"usr/{link}")
    for directory in ("dev", "proc", "run/coral", "sys", "tmp", "var/cache/coral", "etc/coral"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/:/nonexistent\nnobody:x:65534:65534:nobody:/nonexistent:/nonexistent\n"
    )
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")


def unresolved(root: Path, needed: Callable[[Path], list[str]]) -> list[str]:
    """The shared libraries that programs and libraries in ROOT load by name and that are not there,
    each as `FILE: LIBRARY`."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in root.rglob("*.so*")}
    return [
        f"/{path.relative_to(root)}: {name}"
        for path in sorted(files)
        for name in needed(path)
        if name not in names
    ]


def _field(package: Path, name: str) -> str:
    return _run("dpkg-deb", "--field", package, name).decode().strip()


def _run(*command: str | Path, cwd: Path | None = None) -> bytes:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE).stdout
