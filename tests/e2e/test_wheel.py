"""The distribution: its contents, other packages beside it, its types, its dependencies' bounds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any, Final, NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.environment import Environment, agent_of
from tests.support import ROOT, Calls

pytestmark = pytest.mark.timeout(300)  # it installs packages

PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME: Final = PROJECT["project"]["name"]
DIST_INFO: Final = f"{NAME.replace('-', '_')}-{PROJECT['project']['version']}.dist-info"
# proto-plus installs a top-level package `proto`, google-cloud-core the namespace `google`.
GOOGLE: Final = ("proto-plus", "google-cloud-core")
USE_GOOGLE: Final = textwrap.dedent("""
    import google.cloud.client, proto
    class Point(proto.Message):
        x = proto.Field(proto.INT32, number=1)
    assert Point.deserialize(Point.serialize(Point(x=3))).x == 3
    assert google.cloud.client.ClientWithProject.SCOPE is None
""")
IMPORT_ALL: Final = textwrap.dedent("""
    import pkgutil, sys, coral
    for module in pkgutil.walk_packages(coral.__path__, "coral."):
        __import__(module.name)
    print(sum(name.startswith("coral.") for name in sys.modules))
""")
CLIENT: Final = textwrap.dedent("""
    import asyncio, sys
    from coral.client import AgentClient
    from coral.mesh.v1 import ebpf_pb2 as pb

    async def main(address: str, pid: str) -> None:
        calls, config = 0, {"pid": pid, "include": "getppid", "until_exit": "true"}
        async with AgentClient(address) as agent:
            started = await agent.start(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config=config)
            async with agent.subscribe(started.collector_id) as batches:
                print("subscribed", flush=True)
                async for batch in batches:
                    calls += sum(row.call_count for row in batch.message.syscall_stats)
        print(calls)

    asyncio.run(main(*sys.argv[1:]))
""").lstrip()
MISTAKEN: Final = textwrap.dedent("""
    from coral.client import AgentClient, AgentError
    from coral.mesh.v1 import ebpf_pb2 as pb

    async def main(agent: AgentClient) -> int:
        started = await agent.start(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS)
        return started.collector_id
""").lstrip()


class Built(NamedTuple):
    """The project as it is distributed, and the checkout that it was built from."""

    checkout: Path
    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both archives of a copy of the checkout, and the wheel of the sdist, built with the build
    requirements alone."""
    work = tmp_path_factory.mktemp("built")
    checkout = work / "checkout"
    left_out = ignore_patterns(".git", ".venv", "build", ".*_cache", ".hypothesis", "__pycache__")
    copytree(ROOT, checkout, symlinks=True, ignore=left_out)
    builder = Environment(work / "builder")
    builder.install(*PROJECT["build-system"]["requires"])
    builder.run("python", "-P", "-m", "hatchling", "build", "-t", "sdist", "-d", work, cwd=checkout)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work)
    unpacked = work / sdist.name.removesuffix(".tar.gz")
    first, second = (
        _wheel(builder, source, work / into)
        for source, into in ((checkout, "first"), (unpacked, "second"))
    )
    return Built(checkout, sdist, first, second)


def _wheel(builder: Environment, source: Path, into: Path) -> Path:
    builder.pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", into, source)
    (wheel,) = into.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """The checksum of each file in a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def test_the_wheel_contains_the_package_whole_and_nothing_else(built: Built) -> None:
    package = built.checkout / "src/coral"
    on_disk: set[str] = set()
    for directory, _, names in os.walk(package, followlinks=True):
        on_disk |= {str(Path(directory, name).relative_to(package.parent)) for name in names}
    in_wheel = {name for name in contents(built.wheel) if not name.startswith(DIST_INFO)}
    assert in_wheel == on_disk
    assert {
        "coral/bpf/programs/features/features.bpf.o",
        "coral/bpf/programs/http_latency/http_latency.bpf.o",
        "coral/bpf/programs/syscall_stats/syscall_stats.bpf.o",
        "coral/bpf/programs/tcp_metrics/tcp_metrics.bpf.o",
        "coral/cli/main.py",
        "coral/collectors/syscall_stats/syscalls.tsv",
        "coral/mesh/v1/ebpf_pb2.py",
        "coral/mesh/v1/ebpf_pb2.pyi",
        "coral/py.typed",
    } <= in_wheel
    assert "none-linux_" in built.wheel.name


def test_the_sdist_contains_sources_alone_and_builds_the_same_wheel(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {Path(name) for name in archive.getnames()}
    assert {name.parts[1] for name in names} == {
        *("agent", "bpf", "cli", "client", "collectors", "colony", "proto", "src", "views", "wire"),
        *(".gitignore", "LICENSE", "PKG-INFO", "README.md", "build_hook.py", "pyproject.toml"),
    }
    assert {name.suffix for name in names} == {
        *("", ".c", ".css", ".h", ".html", ".js", ".md", ".proto", ".py", ".toml", ".tsv", ".typed")
    }
    assert contents(built.wheel_of_sdist) == contents(built.wheel)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that tests share, because installing the dependencies takes long."""
    return Environment(tmp_path_factory.mktemp("installed") / "venv")


@pytest.fixture
def installed(built: Built, environment: Environment) -> Environment:
    """An environment with the wheel and the newest versions of its dependencies."""
    environment.install(built.wheel)
    return environment


def with_the_colony(wheel: Path) -> str:
    """WHEEL with what a colony needs on top."""
    return f"{wheel}[colony]"


def use_ours(environment: Environment) -> None:
    """Imports every module and runs the command."""
    modules = len([n for n in environment.files() if n.suffix == ".py" and "coral" in n.parts])
    assert int(environment.run_code(IMPORT_ALL)) == modules - 1
    assert environment.run("coral", "--help").startswith("Usage: coral ")


def ours(environment: Environment) -> list[Path]:
    """The paths in an environment that carry the project's name."""
    return list(environment.directory.rglob("*coral*"))


def test_a_strictly_typed_client_is_checked_against_the_wheel(
    installed: Environment, tmp_path: Path
) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "mypy", "--strict", "--python-executable"),
            *(installed.python, "--config-file=", "--cache-dir=cache", "client.py", "mistaken.py"),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    error, summary = done.stdout.splitlines()
    assert error.startswith('mistaken.py:6: error: Incompatible return value type (got "str", ')
    assert summary == "Found 1 error in 1 file (checked 2 source files)"


@pytest.mark.soak
def test_the_wheel_and_googles_packages_come_and_go_in_either_order(
    built: Built, installed: Environment
) -> None:
    installed.install(with_the_colony(built.wheel))
    use_ours(installed)
    installed.install(*GOOGLE)
    use_ours(installed)
    installed.run_code(USE_GOOGLE)

    installed.uninstall(NAME)
    assert ours(installed) == []
    installed.run_code(USE_GOOGLE)

    before = installed.files()
    installed.install(built.wheel)
    new = installed.files() - before
    packages = {path for path in new if path.is_relative_to(installed.packages)}
    assert {path.relative_to(installed.packages).parts[0] for path in packages} == {
        *("coral", DIST_INFO)
    }
    assert new - packages == {installed.directory / "bin/coral"}
    use_ours(installed)
    installed.run_code(USE_GOOGLE)

    installed.uninstall(*GOOGLE)
    use_ours(installed)
    installed.uninstall(NAME)
    assert ours(installed) == []


def lowest(requirement: str) -> str:
    """A constraint to the lowest version that REQUIREMENT allows."""
    parsed = Requirement(requirement)
    (version,) = [bound.version for bound in parsed.specifier if bound.operator == ">="]
    return f"{parsed.name}=={version}"


@pytest.mark.soak
@pytest.mark.usefixtures("nothing_left")
def test_the_lowest_versions_that_the_metadata_allows_work(
    built: Built, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    constraints = tmp_path / "lowest.txt"
    extra = PROJECT["project"]["optional-dependencies"]["colony"]
    required = [*PROJECT["project"]["dependencies"], *extra]
    constraints.write_text("\n".join(map(lowest, required)))
    oldest = Environment(tmp_path / "venv")
    oldest.install(with_the_colony(built.wheel), constraints=constraints)
    use_ours(oldest)
    running = calls("getppid", 100_000)
    strict = oldest.variables() | {"PYTHONWARNINGS": "error"}
    with agent_of(oldest.directory / "bin/coral", tmp_path, environment=strict) as address:
        client = subprocess.Popen(
            [oldest.python, "-P", "-c", CLIENT, address, str(running.pid)],
            env=strict, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert client.stdout
        assert client.stdout.readline() == "subscribed\n"
        running.go()
        running.finish()
        assert client.communicate(timeout=60)[0] == "100000\n"
        assert client.returncode == 0
