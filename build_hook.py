"""Compiles every eBPF program with clang and every .proto with grpcio-tools.

`pip install` runs it as hatchling's build hook. Objects are written beside their sources, stubs to
src/coral/mesh; the wheel contains both, git neither.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
TARGET_ARCH = {"x86_64": "x86", "aarch64": "arm64"}
# The processor that the wheel is for. Python's part and clang's are the same everywhere.
MACHINE = os.environ.get("CORAL_BUILD_MACHINE") or platform.machine()
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-sign-compare")


def clang_command(source: Path, output: Path, arch: str | None = None) -> list[str]:
    """The command that compiles one eBPF source for the wheel's processor, or for ARCH (`x86`,
    `arm64`). Raises SystemExit, naming the packages to install, if there is no clang."""
    clang = os.environ.get("CLANG") or shutil.which("clang")
    if not clang:
        raise SystemExit("clang is missing: apt-get install clang libbpf-dev (or set CLANG)")
    # Debian keeps asm/types.h in a directory that clang does not search for the bpf target.
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    return [
        clang,
        *("-target", "bpf", "-mcpu=v3", "-O2", "-g"),
        f"-D__TARGET_ARCH_{arch or TARGET_ARCH[MACHINE]}",
        *WARNINGS,
        # Line information names files relative to the project, so that the same sources give the
        # same object in any directory.
        f"-ffile-prefix-map={ROOT}=.",
        f"-I{ROOT / 'bpf'}",
        *("-idirafter", f"/usr/include/{multiarch}"),
        *("-c", str(source), "-o", str(output)),
    ]


def program_sources(root: Path = ROOT) -> list[Path]:
    """The eBPF sources of the project at ROOT, one for each object."""
    return sorted((root / "bpf/programs").glob("*/*.bpf.c"))


def build_objects() -> None:
    """Compiles each bpf/programs/NAME/NAME.bpf.c to NAME.bpf.o beside it, and seals it."""
    # By path: importing the package needs dependencies that a build environment does not have.
    sealed = runpy.run_path(str(ROOT / "bpf/loading/seal.py"))["sealed"]
    for source in program_sources():
        result = subprocess.run(
            clang_command(source, source.with_suffix(".o")),
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            hint = ""
            if "bpf/bpf_helpers.h" in result.stderr or "linux/bpf.h" in result.stderr:
                hint = "\nheaders are missing: apt-get install libbpf-dev linux-libc-dev"
            raise SystemExit(f"clang cannot compile {source.name}:\n{result.stderr}{hint}")
        output = source.with_suffix(".o")
        output.write_bytes(sealed(output.read_bytes()))


def build_stubs() -> None:
    """Generates the message classes of proto/PACKAGE/*.proto into src/PACKAGE."""
    from grpc_tools import protoc

    protos = [str(path) for path in sorted((ROOT / "proto").rglob("*.proto"))]
    well_known = Path(protoc.__file__).parent / "_proto"
    out = ROOT / "src"
    if protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            *protos,
        ]
    ):
        raise SystemExit("protoc cannot compile the .proto files, see above")
    for proto in (ROOT / "proto").rglob("*.proto"):
        package = proto.parent.relative_to(ROOT / "proto")
        while package.parent.name:  # src/coral has an __init__.py of its own
            (out / package / "__init__.py").touch()
            package = package.parent


def build_all() -> None:
    """Builds the objects and the stubs."""
    if sys.platform == "linux":  # elsewhere the agent runs, and reports that eBPF needs Linux
        build_objects()
    build_stubs()


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """The hook that hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds before hatchling collects the files. The objects are for one processor, and so is
        the wheel. An sdist has sources only."""
        if self.target_name != "wheel":
            return
        build_all()
        build_data["pure_python"] = False
        here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{here.replace(platform.machine(), MACHINE)}"
