"""A real NATS server, agents' sessions by a script, and a store that is a file of SQLite: it has
the number of every event, and survives a kill at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coral.client import Batch, Kind
from coral.client.account import Ledger
from coral.colony.bus.settings import BusSettings
from coral.colony.delivery import AgentSeen, Delivery, Ended, Gap, Session, Standing
from tests import peer
from tests.support import ROOT, wait_until

SYSCALL_STATS = Kind.of("syscall_stats")


class NatsServer:
    """nats-server with its stream in DIRECTORY, at an address of its own."""

    def __init__(self, directory: Path, most_payload: int = 1 << 20, more: str = "") -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        pid = os.getpid()
        host = f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"
        with socket.create_server((host, 0)) as free:
            self._address = (host, free.getsockname()[1])
        self.url = f"nats://{host}:{self._address[1]}"
        self._config = (
            f'listen: "{host}:{self._address[1]}"\n'
            f"max_payload: {most_payload}\n"
            f'jetstream {{ store_dir: "{directory}/stream", max_file: 1G, max_mem: 64M }}\n'
        )
        self.configure(more)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """The address that it listens on."""
        return self._address[0]

    def configure(self, more: str) -> None:
        """MORE lines of its configuration, from its next start."""
        (self._directory / "nats.conf").write_text(self._config + more)

    @property
    def pid(self) -> int:
        """That of the process."""
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Returns when it listens."""
        program = Path(sys.executable).with_name("nats-server")
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-c", self._directory / "nats.conf"], stderr=log
            )
        wait_until(self._listens, timeout_s=60)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _listens(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self._directory / "log").read_text()
        try:
            socket.create_connection(self._address, 1).close()
        except OSError:
            return False
        return True


@contextmanager
def nats_server(
    directory: Path, most_payload: int = 1 << 20, more: str = ""
) -> Iterator[NatsServer]:
    """A server that runs for the duration of the block, with MORE lines of configuration."""
    server = NatsServer(directory, most_payload, more)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def settings_for(url: str, **more: object) -> BusSettings:
    """Small ones, impatient."""
    fixed = {"max_bytes": 256 << 20, "timeout_s": 2.0, "most_retry_s": 0.2}
    return BusSettings((url,), **{**fixed, **more})  # type: ignore[arg-type]


@dataclass
class Scripted:
    """A session of an agent, of which every number has a fate; see `peer.Session`."""

    session: Session
    script: peer.Session

    @classmethod
    def make(cls, agent: str, name: str, fates: Sequence[str], batch: int = 7) -> Scripted:
        """The session NAME of AGENT."""
        session = Session(agent, name, SYSCALL_STATS, "shop", 1, {"pid": "1"}, {"k8s": "a.b *"})
        return cls(session, peer.Session(fates, batch, lost_in_kernel=5))

    @property
    def produced(self) -> int:
        """How many events there are."""
        return len(self.script.fates)

    @property
    def rows(self) -> list[int]:
        """The numbers of those that arrive."""
        return [n for n, fate in enumerate(self.script.fates, 1) if not fate]

    @property
    def lost(self) -> Counter[str]:
        """Those that do not, by stage."""
        return Counter(fate for fate in self.script.fates if fate)

    def deliveries(self, after_seq: int) -> Iterator[Delivery]:
        """What a follower makes of it when it resumes after that number."""
        ledger, before = Ledger(after_seq), Counter[str]()
        for message in self.script.messages(after_seq):
            batch = Batch.parse(message.SerializeToString())
            at = ledger.last_seq
            ledger.take(batch)
            account, end = ledger.account, batch.end
            lost = Counter(account.lost)
            yield Delivery(
                self.session, batch if batch.count else None, at, account.last_seq,
                account.produced, 1000 + account.last_seq, len(batch.wire), lost - before,
                account.lost_in_kernel, Ended(str(end.reason), "", 9) if end else None,
            )  # fmt: skip
            before = lost


class Shelf:
    """Keeps deliveries in the file PATH: a store as small as can be. Each event is a line, and a
    second line of one number is an error."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.executescript(
            """PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;
            CREATE TABLE IF NOT EXISTS rows
                (agent, session, number, UNIQUE (agent, session, number));
            CREATE TABLE IF NOT EXISTS ledger (agent, session, last_seq, produced, stored, lost,
                in_kernel, ended, UNIQUE (agent, session))"""
        )
        self.seen: list[AgentSeen] = []
        self.gaps: list[Gap] = []
        self._waiting: list[Delivery] = []
        self._standings: dict[tuple[str, str], Standing] = {}
        for line in self._database.execute("SELECT * FROM ledger").fetchall():
            agent, session, last, produced, stored, lost, in_kernel, ended = line
            self._standings[agent, session] = Standing(
                Session(agent, session, SYSCALL_STATS, "shop", 1), last, produced, stored, 0,
                json.loads(lost), json.loads(in_kernel), Ended(ended, "", 9) if ended else None,
            )  # fmt: skip

    def put(self, delivery: Delivery) -> None:
        before = self._standings.get(delivery.session.key)
        expected = before.last_seq if before else 0
        for each in self._waiting:
            if each.session.key == delivery.session.key:
                expected = each.last_seq
        assert delivery.after_seq == expected
        assert delivery.last_seq - expected == delivery.rows + sum(delivery.lost.values())
        self._waiting.append(delivery)

    async def room(self) -> None:
        await asyncio.sleep(0)

    async def stored(self) -> None:
        waiting, self._waiting = self._waiting, []
        with self._database:
            for each in waiting:
                self._write(each)

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        return self._standings.get((agent_id, collector_id))

    def standings(self) -> Sequence[Standing]:
        return tuple(self._standings.values())

    def agent_seen(self, agent: AgentSeen) -> None:
        self.seen.append(agent)

    def gap(self, gap: Gap) -> None:
        self.gaps.append(gap)

    def rows(self, agent_id: str, collector_id: str) -> list[int]:
        """The numbers of the events that are stored, in the order in which they came."""
        query = "SELECT number FROM rows WHERE agent = ? AND session = ? ORDER BY rowid"
        return [n for (n,) in self._database.execute(query, (agent_id, collector_id))]

    def _write(self, it: Delivery) -> None:
        key = it.session.key
        numbers = it.batch.events["ended_ns"].tolist() if it.batch else ()
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)", [(*key, number) for number in numbers]
        )
        before = self._standings.get(key)
        lost = Counter(before.lost if before else {}) + Counter(it.lost)
        stored = (before.stored if before else 0) + it.rows
        self._standings[key] = Standing(
            it.session, it.last_seq, it.produced, stored, it.time_ns, lost, it.lost_in_kernel,
            it.ended,
        )  # fmt: skip
        self._database.execute(
            "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, it.last_seq, it.produced, stored, json.dumps(lost),
             json.dumps(it.lost_in_kernel), it.ended.reason if it.ended else None),
        )  # fmt: skip


class Role:
    """One side of the bus in a process of its own, tests/programs/bus_side.py: `follow` or
    `store`."""

    def __init__(self, role: str, url: str, *arguments: object) -> None:
        self._command = [
            sys.executable, "-P", str(ROOT / "tests/programs/bus_side.py"), role, url,
            *map(str, arguments),
        ]  # fmt: skip
        self._process = self._start()

    def kill_and_start(self) -> None:
        """SIGKILL, and the same again."""
        self.kill()
        self._process = self._start()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @property
    def status(self) -> int | None:
        """Of its exit; None while it runs."""
        return self._process.poll()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
