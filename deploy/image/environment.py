"""The part that is ours, the same in the image and in the Debian package: /usr/lib/coral, a virtual
environment of Debian's interpreter with the wheel, its dependencies and its signed programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from deploy.image import signing
from deploy.image.debian import PYTHON

ROOT: Final = Path(__file__).resolve().parents[2]
REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
HOME: Final = Path("usr/lib/coral")
_GLIBC: Final = ("2_28", "2_27", "2_17")  # minor versions of the platforms that wheels name
PACKAGES: Final = HOME / "lib" / PYTHON / "site-packages"

# What agents never read: types and headers for compilers, tests, sources of extension modules.
# numpy.libs stays as it is: its libraries do not load once they are stripped.
_LEFT_OUT: Final = (
    *("*.pyi", "*.pyx", "*.pxd", "*.c", "*.cpp", "*.h", "*.a", "*/py.typed", "*/tests/*"),
    *("numpy/f2py/*", "numpy/_pyinstaller/*", "numpy/_core/include/*", "numpy/conftest.py"),
    *("*.dist-info/RECORD", "*.dist-info/sboms/*"),
    "coral/colony/*",  # it runs elsewhere, and needs what no agent has
)
_LAUNCHER: Final = """\
#!/usr/lib/coral/bin/python3 -P
from coral.cli.main import main

main()
"""
# In a process of its own: which strings a module's constants share depends on what ran before.
_COMPILE: Final = """\
import compileall, py_compile, sys
done = compileall.compile_dir(
    sys.argv[1], quiet=2, force=True, maxlevels=20, stripdir=sys.argv[2], prependdir="/",
    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
)
sys.exit(not done)
"""


def wheel(work: Path, machine: str) -> Path:
    """The wheel of this checkout for MACHINE, built from a copy: a build in place would exchange
    the programs that an agent of this checkout may be loading."""
    copy = work / "checkout"
    unneeded = (
        ".*",
        "build",
        "dist",
        "tests",
        "benchmarks",
        "docs",
        "deploy",
        "__pycache__",
        "*.bpf.o",
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*unneeded))
    shutil.rmtree(copy / "src/coral/mesh", ignore_errors=True)
    command = (sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(work))
    subprocess.run(
        command, cwd=copy, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # The first time that a zip can say.
        env=_environment(SOURCE_DATE_EPOCH="315532800", CORAL_BUILD_MACHINE=machine),
    )  # fmt: skip
    shutil.rmtree(copy)
    (built,) = work.glob("*.whl")
    return built


def tags(machine: str) -> tuple[str, ...]:
    """Options for pip to choose wheels for Debian 12 on MACHINE, whatever this machine is."""
    platforms = (f"--platform=manylinux_{version}_{machine}" for version in _GLIBC)
    for_it = ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp")
    return (*for_it, *platforms, f"--platform=manylinux2014_{machine}")


def fetch(cache: Path, machine: str) -> list[Path]:
    """The wheels of requirements.txt for MACHINE in CACHE, each checked against its hash."""
    pip = (sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    exact = ("--no-deps", "--require-hashes", "--requirement", str(REQUIREMENTS))
    # What the cache has needs no network.
    found = (*tags(machine), "--find-links", str(cache), "--dest", str(cache))
    cache.mkdir(parents=True, exist_ok=True)
    offline = subprocess.run(
        [*pip, *exact, *found, "--no-index"], check=False, capture_output=True, text=True
    )
    if offline.returncode:
        subprocess.run([*pip, *exact, *found], check=True)
    pins = [line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return [_wheel_of(pin, cache) for pin in pins]


def _wheel_of(pin: str, cache: Path) -> Path:
    name, _, version = pin.partition("==")
    (found,) = (
        path
        for path in sorted(cache.glob("*.whl"))
        if path.name.lower().startswith(f"{name.replace('-', '_')}-{version}-")
    )
    return found


def install(root: Path, wheels: Sequence[Path], key: Path) -> None:
    """Makes ROOT/usr/lib/coral of WHEELS, and signs its programs with KEY."""
    packages = root / PACKAGES
    packages.mkdir(parents=True)
    for one in wheels:
        with zipfile.ZipFile(one) as archive:
            for info in archive.infolist():
                name = info.filename
                if info.is_dir() or any(fnmatch(name, pattern) for pattern in _LEFT_OUT):
                    continue
                if ".data/" in name:
                    continue  # scripts and manual pages of other projects
                target = packages / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(info))
                target.chmod(0o755 if ".so" in target.suffixes else 0o644)
    home = root / HOME
    (home / "bin").mkdir()
    for name in ("python", "python3"):
        (home / "bin" / name).symlink_to(f"/usr/bin/{PYTHON}")
    (home / "pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
    )
    launcher = home / "bin/coral"
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)
    (root / "usr/bin").mkdir(exist_ok=True)
    (root / "usr/bin/coral").symlink_to("../lib/coral/bin/coral")
    signing.sign_programs(packages / "coral/bpf/programs", key)


def compile_modules(root: Path, directory: Path) -> None:
    """Compiles the modules in DIRECTORY of ROOT, with a hash that nobody checks: the interpreter
    need not look at the sources, and no file's time decides. Raises CalledProcessError."""
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(f"only {PYTHON} compiles for {PYTHON}; this is {sys.version}")
    command = (sys.executable, "-P", "-c", _COMPILE, root / directory, root)
    subprocess.run(command, check=True, env=_environment(PYTHONHASHSEED="0"))


def _environment(**changes: str) -> dict[str, str]:
    """The environment, without what configures Python, and with CHANGES."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return plain | changes
