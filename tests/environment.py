"""Installed programs: virtual environments that tests make, and the agent of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support import wait_until

# Asserts that every file recorded by the installed distributions exists.
_WHOLE = """
from importlib.metadata import distributions
missing = [str(f) for d in distributions() for f in d.files or () if not f.locate().exists()]
assert not missing, missing
"""


class Environment:
    """A virtual environment at DIRECTORY with only what the test installs. It has no pip of its
    own: this interpreter's pip installs into it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin/python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = directory / "lib" / version / "site-packages"
        venv = (sys.executable, "-P", "-m", "venv", "--without-pip", directory)
        subprocess.run(venv, check=True)

    def pip(self, command: str, *arguments: str | Path, cwd: Path | None = None) -> None:
        """Runs a pip command on the environment, in CWD."""
        pip = (sys.executable, "-P", "-m", "pip", "--python", self.python)
        quiet = ("--quiet", "--disable-pip-version-check")
        subprocess.run([*pip, command, *quiet, *arguments], check=True, cwd=cwd)

    def install(self, *requirements: str | Path, constraints: Path | None = None) -> None:
        """Installs REQUIREMENTS and what they require, within CONSTRAINTS."""
        within = ("--constraint", constraints) if constraints else ()
        self.pip("install", "--no-compile", *within, *requirements)

    def uninstall(self, *names: str) -> None:
        """Removes distributions, and asserts that the files of all others are still there."""
        self.pip("uninstall", "--yes", *names)
        self.run_code(_WHOLE)

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Runs one of the environment's programs; returns its standard output."""
        program, *arguments = command
        done = subprocess.run(
            [self.directory / "bin" / program, *arguments],
            cwd=cwd, env=self.variables(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_code(self, code: str, *arguments: str) -> str:
        """Runs Python code in it; returns its standard output."""
        return self.run("python", "-P", "-c", code, *arguments)

    def variables(self) -> dict[str, str]:
        """The environment variables for its programs, without those that configure Python."""
        return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def files(self) -> set[Path]:
        """Every file in it except compiled modules."""
        return {
            path
            for path in self.directory.rglob("*")
            if "__pycache__" not in path.parts and not path.is_dir()
        }


@contextmanager
def agent_of(
    program: Path,
    directory: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Runs the agent of PROGRAM, an installed `coral`, for the duration of the block; yields its
    address. Its socket and log are in DIRECTORY. It must exit with status 0."""
    socket, log_path = directory / "agent.sock", directory / "agent.log"
    command = (program, "agent", "--listen", f"unix:{socket}", "--metrics", "127.0.0.1:0")
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stderr=log)
    try:
        wait_until(lambda: socket.is_socket() or process.poll() is not None, timeout_s=60)
        assert process.poll() is None, log_path.read_text()
        yield f"unix:{socket}"
        process.terminate()
        assert process.wait(60) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()
