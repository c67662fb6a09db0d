"""deploy/image/requirements.txt pins every dependency, in a version that the project allows."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_dependency_is_pinned_with_hashes_to_a_version_that_the_project_allows() -> None:
    text = (ROOT / "deploy/image/requirements.txt").read_text()
    pins = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(pins) == len(re.findall("==", text))
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
