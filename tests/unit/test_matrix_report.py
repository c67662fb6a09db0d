"""What the matrix makes of the reports of pytest, which are real here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.matrix.report import Outcome, failures, outcome, table
from tests.matrix.rows import Row
from tests.support import ROOT

ROW = Row("6.1")
TESTS = """
from pathlib import Path
def test_passes(): pass
def test_fails_once(tmp_path_factory):
    first = Path(__file__).with_name("first")
    before = first.exists()
    first.touch()
    assert before, "only once"
def test_fails():
    assert 1 == 2
"""


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    """Where results may be: below the project."""
    directory = ROOT / "build" / tmp_path.name
    directory.mkdir(parents=True, exist_ok=True)
    yield directory
    shutil.rmtree(directory)


def run(directory: Path, name: str, *arguments: str) -> int:
    """Runs the tests that ARGUMENTS name, with the report NAME.xml in DIRECTORY; exit status."""
    command = [sys.executable, "-P", "-m", "pytest", "-c", "/dev/null", f"--rootdir={directory}"]
    options = ["-p", "no:cacheprovider", f"--junit-xml={directory / name}.xml"]
    return subprocess.run(
        [*command, *options, *arguments],
        check=False,
        capture_output=True,
        cwd=directory,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    ).returncode


def outcome_of(directory: Path, tests: str) -> Outcome:
    """Of a row with TESTS, those that fail run again as in a guest."""
    (directory / "test_it.py").write_text(tests)
    first = outcome_of_run(directory, "0", "test_it.py")
    if not first.failed:
        return first
    return first.with_second_tries(outcome_of_run(directory, "1", *first.failed).cases)


def outcome_of_run(directory: Path, name: str, *arguments: str) -> Outcome:
    status = run(directory, name, *arguments)
    return outcome(ROW, "6.1.0", directory / name, status, seconds=1.0)


def test_what_fails_is_read_last_and_what_passes_when_run_again_is_named(results: Path) -> None:
    found = outcome_of(results, TESTS)
    assert not found.ok
    assert [(case.name, case.state, case.again) for case in found.cases] == [
        ("test_passes", "passed", False),
        ("test_fails_once", "passed", True),
        ("test_fails", "failed", False),
    ]
    text = failures([found])
    assert "assert 1 == 2" in text
    *_, again, failed = text.splitlines()
    assert again.startswith("PASSED AGAIN 6.1.0 core, best: test_fails_once: AssertionError: only")
    assert failed == "FAILED 6.1.0 core, best: test_fails: assert 1 == 2"
    assert "passed when run again: AssertionError: only once (test_fails_once)" in table([found])
    only_once = replace(found, cases=found.cases[:2])
    assert only_once.ok


def test_where_all_pass_there_is_nothing_to_read(results: Path) -> None:
    found = outcome_of(results, "def test_passes(): pass\n")
    assert (found.ok, failures([found])) == (True, "")
