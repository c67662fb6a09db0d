"""bcc as a compiler: whether it can be used here, and the instructions that it makes of our
programs.

This is the bcc of Debian and other distributions; PyPI has an unrelated package of that name. It
needs the headers of the running kernel.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from coral.bpf.libbpf import LoadError

_COMPILER: Final = Path(__file__).with_name("bcc_compiler.py")
_INCLUDED_FROM: Final = Path(__file__).resolve().parent.parent
_COMPILE_TIMEOUT_S: Final = 600  # an emulated machine may need five minutes
_TARGET_ARCH: Final = {"x86_64": "x86", "aarch64": "arm64"}
_ENV_KERNEL_SOURCE: Final = "BCC_KERNEL_SOURCE"
_KHEADERS: Final = Path("/sys/kernel/kheaders.tar.xz")  # which bcc unpacks
# Where distributions put a kernel's headers, from the root of the file system.
_HEADERS: Final = (
    "lib/modules/{release}/build",  # a link, in most distributions
    "usr/src/linux-headers-{release}",  # Debian, Ubuntu
    "usr/src/kernels/{release}",  # Fedora, RHEL
    "usr/lib/modules/{release}/build",  # Arch
)
# The packages of bcc and of the headers, by the ID (or ID_LIKE) of os-release.
_PACKAGES: Final = {
    "debian": ("python3-bpfcc", "linux-headers-{release}"),
    "ubuntu": ("python3-bpfcc", "linux-headers-{release}"),
    "fedora": ("python3-bcc", "kernel-devel-{release}"),
    "rhel": ("python3-bcc", "kernel-devel-{release}"),
    "suse": ("python3-bcc", "kernel-default-devel"),
    "arch": ("python-bcc", "linux-headers"),
    "alpine": ("py3-bcc", "linux-lts-dev"),
}


def obstacle() -> str:
    """Why bcc cannot compile programs here, and what to install; empty if it can."""
    packages = _packages()
    if not _bcc_paths():
        return f"bcc is not installed: install {packages[0]}"
    release = platform.release()
    if headers(release) is None and not _KHEADERS.exists():
        name = packages[1].format(release=release)
        return f"there are no headers of this kernel ({release}): install {name}"
    return ""


def headers(release: str, root: Path = Path("/")) -> Path | None:
    """The directory of a kernel's headers; None if there are none."""
    if named := os.environ.get(_ENV_KERNEL_SOURCE):
        return Path(named)
    candidates = (root / place.format(release=release) for place in _HEADERS)
    return next((path for path in candidates if (path / "include").is_dir()), None)


def _packages() -> tuple[str, str]:
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        system = {}
    for name in (system.get("ID", ""), *system.get("ID_LIKE", "").split()):
        if name in _PACKAGES:
            return _PACKAGES[name]
    return "your distribution's bcc for Python", "your distribution's headers of kernel {release}"


@cache
def _bcc_paths() -> tuple[str, ...]:
    """The package directories of this environment or the system that contain this bcc."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    places = (
        *sys.path,
        "/usr/lib/python3/dist-packages",
        f"/usr/lib/python{version}/site-packages",
        f"/usr/lib64/python{version}/site-packages",
    )
    # The package on PyPI has no such module.
    return tuple(place for place in places if Path(place, "bcc", "libbcc.py").is_file())


_Key = tuple[Path, tuple[str, ...], tuple[tuple[str, int], ...]]


class _Compiler:
    """The process of the compiler, of which there is one at a time: it takes 150 MB."""

    def __init__(self) -> None:
        self.turn = threading.Lock()  # of the caller whose process it is
        self.compiled: dict[_Key, Mapping[str, bytes]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False
        self._lock = threading.Lock()  # of the two above

    def run(
        self, job: str, environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end. Raises OSError, and TimeoutExpired when it was killed for that."""
        with self._lock:
            if self._is_stopped:
                raise InterruptedError(errno.EINTR, "the agent ends")
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", _COMPILER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
            )
        with process:
            try:
                output, errors = process.communicate(job, timeout_s)
            except BaseException:
                process.kill()
                raise
        if self._is_stopped:
            raise InterruptedError(errno.EINTR, "the agent ends")
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def stop(self) -> None:
        """Kills it, and lets no other begin."""
        with self._lock:
            self._is_stopped = True
            if self._process:
                self._process.kill()  # does nothing where it has ended


_compiler: Final = _Compiler()


def stop() -> None:
    """Ends the compiler if it runs, so that its caller gets a `LoadError`, and lets no other begin:
    for an agent that is told to end."""
    _compiler.stop()


def compiled(
    source: Path, functions: tuple[str, ...], numbers: tuple[tuple[str, int], ...]
) -> Mapping[str, bytes]:
    """The instructions of FUNCTIONS of one `.bpf.c`, by name, compiled once in the life of the
    process; NUMBERS are macros. Blocks for about a second, and while others compile. Raises
    `LoadError`."""
    key, known = (source, functions, numbers), _compiler.compiled
    if key not in known:
        with _compiler.turn:
            if key not in known:
                known[key] = _compile(*key)
    return known[key]


def _compile(
    source: Path, functions: tuple[str, ...], numbers: tuple[tuple[str, int], ...]
) -> Mapping[str, bytes]:
    what = f"compiling {source.name} with bcc"
    if why := obstacle():
        raise LoadError(f"{what}: {why}")
    defines = "".join(f"#define {name} {number}\n" for name, number in numbers)
    flags = [
        "-DCORAL_BCC",
        f"-D__TARGET_ARCH_{_TARGET_ARCH[platform.machine()]}",
        f"-I{source.parent}",
        f"-I{_INCLUDED_FROM}",
        "-Werror=implicit-function-declaration",  # bcc would leave a call of nothing
        "-Wno-int-conversion",  # all arguments of a raw tracepoint have 64 bits
        "-Wno-macro-redefined",
    ]
    job = {
        "text": f'{defines}#include "{source.name}"\n',
        "flags": flags,
        "functions": functions,
        "paths": _bcc_paths(),
    }
    return {name: bytes.fromhex(code) for name, code in _run(job, what).items()}


def _run(
    job: Mapping[str, object], what: str, timeout_s: float = _COMPILE_TIMEOUT_S
) -> Mapping[str, str]:
    release = platform.release()
    environment = dict(os.environ)
    found = headers(release)
    # bcc knows /lib/modules itself, and the two halves into which Debian splits the headers.
    if found and not found.is_relative_to(f"/lib/modules/{release}"):
        environment[_ENV_KERNEL_SOURCE] = str(found)
    try:
        ran = _compiler.run(json.dumps({**job, "parent": os.getpid()}), environment, timeout_s)
    except InterruptedError as error:
        raise LoadError(f"{what}: {error.strerror}") from error
    except OSError as error:
        raise LoadError(f"{what}: starting the compiler", error.errno or errno.EIO) from error
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{what}: it was not done in {timeout_s:g} s, and was killed") from error
    if ran.returncode < 0:
        killer = signal.Signals(-ran.returncode).name
        raise LoadError(
            f"{what}: the compiler was killed by {killer}; it takes 150 MB of memory",
            log=ran.stderr,
        )
    if ran.returncode:
        raise LoadError(f"{what}: it is refused", log=ran.stderr)
    try:
        instructions: Mapping[str, str] = json.loads(ran.stdout)
    except ValueError as error:
        raise LoadError(f"{what}: it answers what is no JSON", log=ran.stdout) from error
    return instructions
