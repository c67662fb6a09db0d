"""A new kind of collector takes its own files, one line in each registry, and messages in the
contract: a copy of the project gets one, and everything there knows it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import (
    ROOT,
    Puppet,
    RunningAgent,
    coral,
    running_agent,
    samples,
    scrape,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)  # the first test builds the whole project

TOY: Final = ROOT / "tests/toy"
PROTO: Final = "proto/coral/mesh/v1/ebpf.proto"
# All that a new kind touches: its own files, and a line or more in three that were there.
NEW_FILES: Final = {
    "bpf/programs/toy/toy.bpf.c",
    "collectors/toy/__init__.py",
    "collectors/toy/collector.py",
    "collectors/toy/measures.py",
    "collectors/toy/rows.py",
    "docs/collectors/toy.md",
    "views/toy/__init__.py",
}
CHANGED_FILES: Final = {PROTO, "collectors/registry.py", "views/registry.py"}
GENERATED_FILES: Final = {"docs/configuration.md", "docs/metrics.md", "docs/tables.md"}
_MADE: Final = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.bpf.o"
)

BATCH_FIELDS: Final = """
  repeated ToyCounts toy_counts = 900 [(rows) = {
    kind: "toy"
    form: ROW_FORM_SUMMARIES
  }];
  repeated ToyFork toy_forks = 901 [(rows) = {
    kind: "toy"
    form: ROW_FORM_EVENTS
  }];
  ToyCountsColumns toy_counts_columns = 902 [(rows) = {
    kind: "toy"
    form: ROW_FORM_COLUMNS
    same_as: "toy_counts"
  }];"""

# Runs in the copy. Prints the answer to each of its commands as JSON.
CLIENT: Final = textwrap.dedent("""
    import asyncio, json, sys
    from coral.client import AgentClient
    from coral.mesh.v1 import ebpf_pb2 as pb

    async def rows(agent, collector_id, **terms):
        found = []
        async with agent.subscribe(collector_id, **terms) as stream:
            async for batch in stream:
                found += rows_of(batch)
        return found

    def rows_of(batch):
        for row in batch.message.toy_counts:
            yield row.pid, row.comm, row.forks
        table, key = (batch.columns, "forks") if batch.columns else (batch.events, "child_pid")
        if len(table):
            comms = batch.strings[table["comm"]].tolist()
            yield from zip(table["pid"].tolist(), comms, table[key].tolist(), strict=True)

    async def main(address, command, argument):
        async with AgentClient(address) as agent:
            if command == "start":
                kind = pb.EBPF_COLLECTOR_KIND_TOY
                started = await agent.start(kind, config=json.loads(argument), duration_s=60)
                return started.collector_id
            if command == "stop":
                return await agent.stop(argument)
            return await rows(agent, argument, **json.loads(command))

    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
""")


def not_in_git(directory: str, names: list[str]) -> set[str]:
    """Of the NAMES in a directory, those that a build or a test made."""
    stubs = {"mesh"} if directory.endswith("src/coral") else set()
    return _MADE(directory, names) | stubs


def insert_at_end(text: str, opening: str, lines: str) -> str:
    """TEXT with LINES before the end of the block that OPENING begins."""
    indent = re.match(r"\s*", opening)[0]  # type: ignore[index]
    begin = text.index(f"\n{opening} {{\n") + 1
    end = text.index(f"\n{indent}}}\n", begin)
    return f"{text[:end]}\n{lines.strip(chr(10))}{text[end:]}"


def add_line(path: Path) -> None:
    """Adds the toy to a registry: the name of its folder."""
    text = path.read_text()
    assert text.count('    "tcp_metrics",\n') == 1
    path.write_text(text.replace('    "tcp_metrics",\n', '    "tcp_metrics",\n    "toy",\n'))


def add_toy(copy: Path) -> None:
    """Writes what a new kind takes into COPY, as docs/architecture.md says."""
    for source in (path for path in TOY.rglob("*") if path.is_file()):
        target = copy / str(source.relative_to(TOY)).removesuffix(".in")
        if source.name != "messages.proto":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text())
    proto = copy / PROTO
    text = proto.read_text()
    text = insert_at_end(text, "enum EbpfCollectorKind", "  EBPF_COLLECTOR_KIND_TOY = 900;")
    text = insert_at_end(text, "message EbpfEventBatch", BATCH_FIELDS)
    payload = "    ToyCounts toy_counts = 900;\n    ToyFork toy_fork = 901;"
    text = insert_at_end(text, "  oneof payload", payload)
    proto.write_text(text + (TOY / "messages.proto").read_text())
    add_line(copy / "collectors/registry.py")
    add_line(copy / "views/registry.py")


def contents(root: Path) -> Mapping[str, str]:
    """The files below ROOT that git would have, by a checksum of each."""
    found = {}
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - not_in_git(directory, folders))
        for name in set(names) - not_in_git(directory, names):
            path = Path(directory, name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = digest
    return found


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """The files that are new, and those that are not as they were."""
    assert before.keys() <= after.keys()
    new = after.keys() - before.keys()
    return new, {name for name, digest in before.items() if after[name] != digest}


class Copy:
    """A copy of the project that has the toy, built."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PYTHONPATH": str(root / "src")}

    def run(self, *command: str) -> str:
        """What a command prints, which must succeed."""
        done = subprocess.run(
            command, cwd=self.root, env={**os.environ, **self.environment}, capture_output=True,
            text=True, timeout=110, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def client(self, agent: RunningAgent, command: str, argument: str) -> Any:
        """What CLIENT answers."""
        arguments = (agent.address, command, argument)
        return json.loads(self.run(sys.executable, "-P", "-c", CLIENT, *arguments))

    @contextmanager
    def at_work(self, agent: RunningAgent, **config: str) -> Iterator[str]:
        """The toy, for the length of a block; its id."""
        collector_id = self.client(
            agent, "start", json.dumps({"follow_children": "false"} | config)
        )
        yield collector_id
        self.client(agent, "stop", collector_id)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """With the assertion that nothing but the files listed above was touched."""
    root = tmp_path_factory.mktemp("toy") / "project"
    shutil.copytree(ROOT, root, symlinks=True, ignore=not_in_git)
    made = Copy(root)
    before = contents(root)
    add_toy(root)
    with_toy = contents(root)
    assert changed(before, with_toy) == (NEW_FILES, CHANGED_FILES)
    made.run(sys.executable, "-P", "-c", "import build_hook; build_hook.build_all()")
    assert contents(root) == with_toy
    assert (root / "bpf/programs/toy/toy.bpf.o").exists()
    made.run(sys.executable, "-P", "docs/generate.py")
    assert changed(with_toy, contents(root)) == (set(), GENERATED_FILES)
    return made


@pytest.fixture(scope="module")
def agent(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    directory = tmp_path_factory.mktemp("agent")
    with running_agent(directory, environment=copy.environment) as running:
        yield running


def fork(puppet: Puppet, times: int) -> None:
    """Has it fork, and wait for each child."""
    child = "os.waitpid(os.fork() or os._exit(0), 0)"
    puppet.do(f"[{child} for _ in range({times})]")


def forks_by_pid(rows: Sequence[Sequence[Any]]) -> dict[int, int]:
    by_pid: dict[int, int] = {}
    for pid, comm, forks in rows:
        assert comm.startswith("python"), comm
        by_pid[pid] = by_pid.get(pid, 0) + forks
    return by_pid


def test_its_summaries_come_as_rows_and_as_columns_and_are_filtered(
    copy: Copy, agent: RunningAgent
) -> None:
    with Puppet() as one, Puppet() as other:
        pids = f"{one.pid},{other.pid}"
        with copy.at_work(agent, pid=pids, interval="100ms") as collector_id:
            fork(one, 7)
            fork(other, 3)
            fork(one, 2)

            def scraped() -> bool:
                return sum(samples(scrape(agent), "coral_toy_forks_total").values()) == 12

            wait_until(scraped)
        everything = {one.pid: 9, other.pid: 3}
        for terms, wanted in (
            ({}, everything),
            ({"columns": True}, everything),
            ({"pids": [one.pid]}, {one.pid: 9}),
            ({"pids": [other.pid], "columns": True}, {other.pid: 3}),
            ({"comms": ["nobody"]}, {}),
        ):
            rows = copy.client(agent, json.dumps(terms), collector_id)
            assert forks_by_pid(rows) == wanted, terms


def test_its_single_events_are_exact(copy: Copy, agent: RunningAgent) -> None:
    with Puppet() as one, Puppet() as other:
        pids = f"{one.pid},{other.pid}"
        with copy.at_work(agent, pid=pids, mode="events") as collector_id:
            fork(one, 5)
            fork(other, 4)
        rows = copy.client(agent, "{}", collector_id)
        assert sorted(pid for pid, _, _ in rows) == sorted([one.pid] * 5 + [other.pid] * 4)
        children = {child for _, _, child in rows}
        assert len(children) == 9
        filtered = copy.client(agent, json.dumps({"pids": [other.pid]}), collector_id)
        assert filtered == [row for row in rows if row[0] == other.pid]


def test_its_options_are_checked(copy: Copy, agent: RunningAgent) -> None:
    with pytest.raises(AssertionError, match=r'config\["least"\]: .*whole number from 1 to 1000'):
        copy.client(agent, "start", json.dumps({"scope": "host", "least": "0"}))


def test_the_command_line_shows_it(copy: Copy, agent: RunningAgent) -> None:
    command = (*coral("tap"), "--agent", agent.address)
    capabilities = copy.run(*coral("capabilities"), "--agent", agent.address)
    assert re.search(r"^toy +yes", capabilities, re.MULTILINE)
    code = "import os; [os.waitpid(os.fork() or os._exit(0), 0) for _ in range(6)]"
    told = copy.run(*command, "--toy", "--", sys.executable, "-P", "-c", code)
    assert re.search(r"^python\S* +6$", told.split("COMMAND")[-1], re.MULTILINE), told
    lines = copy.run(*command, "--toy", "--events", "--", sys.executable, "-P", "-c", code)
    assert len(re.findall(r"^python\S*/\d+ forked \d+$", lines, re.MULTILINE)) == 6
    assert "Children that processes fork." in copy.run(*coral("tap"), "--help")


def test_what_was_there_gets_lines_and_loses_none(copy: Copy) -> None:
    for name in CHANGED_FILES:
        before, after = ((root / name).read_text().splitlines() for root in (ROOT, copy.root))
        diff = [line[0] for line in difflib.ndiff(before, after) if line[0] in "+-"]
        assert set(diff) == {"+"}, name
        if name != PROTO:
            assert len(diff) == 1, name


def test_the_documentation_has_it(copy: Copy) -> None:
    options = (copy.root / "docs/configuration.md").read_text().split("\n## toy\n")[1]
    assert "| `least` | a whole number from 1 to 1000 | `1` |" in options
    tables = (copy.root / "docs/tables.md").read_text()
    assert "| `forks` | BIGINT | sum |" in tables.split("\n## toy_counts\n")[1]
    assert "| `child_pid` | UINTEGER |" in tables.split("\n## toy_forks\n")[1]
    assert "`coral_toy_forks_total`" in (copy.root / "docs/metrics.md").read_text()
    copy.run(sys.executable, "-P", "docs/generate.py", "--check")


def test_it_passes_the_linters_as_they_are(copy: Copy) -> None:
    new = sorted(name for name in NEW_FILES if name.endswith(".py"))
    copy.run(sys.executable, "-P", "-m", "ruff", "check", *new)
    copy.run(sys.executable, "-P", "-m", "ruff", "format", "--check", *new)
    layout = ("--dry-run", "-Werror", "bpf/programs/toy/toy.bpf.c")
    copy.run(str(Path(sys.executable).with_name("clang-format")), *layout)
