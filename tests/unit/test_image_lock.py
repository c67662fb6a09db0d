"""What the image is made from is pinned: every Python dependency, in a version that the project
allows, and every Debian package, for both processors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.image import debian
from deploy.image.apt import AptError, Locked, Mirror
from deploy.image.oci import ARCHITECTURES
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_dependency_is_pinned_with_hashes_to_a_version_that_the_project_allows() -> None:
    text = (ROOT / "deploy/image/requirements.txt").read_text()
    pins = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(pins) == len(re.findall("==", text))
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_debian_package_is_locked_with_the_hash_of_its_file(machine: str) -> None:
    locked = debian.locked(machine)
    assert sorted(it.name for it in locked) == sorted(debian.PACKAGES)
    assert {it.architecture for it in locked} == {ARCHITECTURES[machine]}
    assert all(re.fullmatch("[0-9a-f]{64}", it.sha256) for it in locked)


# A mirror of this machine alone


PACKAGE = "coral-test-locked"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a mirror, which is the only one that apt knows."""
    pool = tmp_path / "pool"
    pool.mkdir()
    configuration = tmp_path / "apt.conf"
    for part in ("lists/partial", "cache/archives/partial"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "status").touch()
    sources = tmp_path / "sources.list"
    sources.write_text(f"deb [trusted=yes] file:{pool} ./\n")
    paths = {
        "Dir::Etc::SourceList": sources, "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": tmp_path / "lists", "Dir::Cache": tmp_path / "cache",
        "Dir::State::Status": tmp_path / "status", "APT::Sandbox::User": "root",
    }  # fmt: skip
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in paths.items()))
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    return pool


def offer(pool: Path, *versions: str) -> None:
    """Puts VERSIONS of the package, each always the same file, into the mirror in POOL, and nothing
    else."""
    at_a_time = os.environ | {"SOURCE_DATE_EPOCH": "0"}
    for file in pool.iterdir():
        file.unlink()
    for version in versions:
        tree = pool.with_name("tree")
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {PACKAGE}\nVersion: {version}\nArchitecture: {own()}\n"
            "Maintainer: nobody <nobody@localhost>\nDescription: for a test\n"
        )
        build = ("dpkg-deb", "--root-owner-group", "--build", tree, pool)
        subprocess.run(build, check=True, capture_output=True, env=at_a_time)
        shutil.rmtree(tree)
    paragraphs = [f"{control(file)}\n" for file in sorted(pool.glob("*.deb"))]
    (pool / "Packages").write_text("\n".join(paragraphs))
    subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True)


def control(file: Path) -> str:
    """The paragraph of FILE in a mirror's list."""
    fields = said("dpkg-deb", "--field", file)
    sum_ = said("sha256sum", file).split()[0]
    return f"{fields}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {sum_}"


def said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def own() -> str:
    return said("dpkg", "--print-architecture").strip()


def newest(state: Path) -> tuple[Mirror, Sequence[Locked]]:
    machine = next(it for it, name in ARCHITECTURES.items() if name == own())
    found = Mirror(machine, state)
    return found, found.newest([PACKAGE])


def test_a_locked_version_is_fetched_though_there_is_a_newer_one(
    mirror: Path, tmp_path: Path
) -> None:
    offer(mirror, "1:2.0-1")
    _, locked = newest(tmp_path)
    assert locked[0].version == "1:2.0-1"
    offer(mirror, "1:2.0-1", "1:2.0-2")
    now, latest = newest(tmp_path)
    assert latest[0].version == "1:2.0-2"
    (fetched,) = now.fetch(locked, tmp_path / "fetched")
    assert said("dpkg-deb", "--field", fetched, "Version") == "1:2.0-1\n"
    offer(mirror, "1:2.0-2")
    assert newest(tmp_path)[0].fetch(locked, tmp_path / "fetched") == [fetched]  # from the cache


def test_a_version_that_is_gone_or_has_another_file_is_refused_by_its_name(
    mirror: Path, tmp_path: Path
) -> None:
    offer(mirror, "1.0")
    _, locked = newest(tmp_path)
    offer(mirror, "1.1", "1.2")
    with pytest.raises(AptError, match=rf"{PACKAGE} 1.0 \({own()}\): apt knows 1.2, 1.1$"):
        newest(tmp_path)[0].fetch(locked, tmp_path / "fetched")
    now, (latest, *_) = newest(tmp_path)
    with pytest.raises(AptError, match="the mirror has another file of it than the one in the loc"):
        now.fetch([latest._replace(sha256=locked[0].sha256)], tmp_path / "fetched")
    with pytest.raises(AptError, match="apt does not know coral-test-none: run `apt-get update`"):
        now.newest(["coral-test-none"])
