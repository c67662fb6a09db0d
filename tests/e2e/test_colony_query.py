"""`coral query` against a real colony that follows a real agent: numbers that nobody here wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from coral.cli.main import main
from tests.colony_process import RunningColony, running_colony
from tests.shop import shop, visit, visitor
from tests.support import INSECURE, ROOT, Puppet, coral, running_agent, wait_until

pytestmark = pytest.mark.kernel
CALLS = 1234
SERVED = 7
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Asked:
    """A colony with everything in it, and how it is asked: from this process, which is quicker."""

    colony: RunningColony
    address: str

    def query(self, *arguments: object, status: int = 0, width: int = 0) -> Result:
        env = {"CORAL_COLONY": self.address, "COLUMNS": str(width) if width else None}
        words = ["query", *map(str, arguments)]
        done = CliRunner(env=env).invoke(main, words, prog_name="coral")
        assert done.exit_code == status, (done.stderr, done.exception)
        return done

    def rows(self, *arguments: object) -> list[dict[str, Any]]:
        lines = self.query(*arguments, "-o", "json").stdout.splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """The calls, requests and samples of processes that do a known number of these."""
    directory = tmp_path_factory.mktemp("query")
    config = {"auth": INSECURE, "limits": {"cpu_percent": 1000, "concurrent_collectors": 5}}
    with (
        Puppet() as puppet,
        shop() as server,
        running_agent(directory / "agent", config, "--listen", "127.0.0.1:0") as agent,
    ):
        pid = {"pid": str(puppet.pid)}
        kinds = (
            ("syscall_stats", {**pid, "include": "getppid", "interval": "1s"}, "caller"),
            ("cpu_profile", {**pid, "interval": "1s"}, "caller"),
            ("http_latency", {"pid": str(server.pid), "interval": "1s"}, "shop"),
        )
        collect = [
            {"kind": kind, "config": options, "service": service}
            for kind, options, service in kinds
        ]
        given = {"agents": {"addresses": [agent.address]}, "collect": collect}
        with running_colony(directory / "colony", given) as colony:
            asked = Asked(colony, f"unix:{directory}/colony/colony.sock")
            wait_until(lambda: colony.total("coral_colony_sessions") == len(kinds), timeout_s=60)
            puppet.do(f"for _ in range({CALLS}): os.getppid()")
            puppet.do("sum(number * number for number in range(15_000_000))")
            with visitor() as client:
                visit(client, server, *[("GET", "/users/7", 0)] * SERVED, ("GET", "/bad", 0))
            _wait_for(asked)
            yield asked


def _wait_for(asked: Asked) -> None:
    def there() -> bool:
        calls = asked.rows("syscalls", "--by", "service")
        served = asked.rows("http", "--by", "service")
        samples = asked.rows("profile", "--by", "service")
        return bool(
            sum(row["calls"] for row in calls) >= CALLS
            and sum(row["count"] for row in served) >= SERVED + 1
            and sum(row["count"] for row in samples) > LEAST_SAMPLES
        )

    wait_until(there, timeout_s=60)


def test_calls_and_requests_are_counted_exactly(asked: Asked) -> None:
    (calls,) = asked.rows("syscalls", "caller")
    assert (calls["syscall"], calls["calls"], calls["errors"]) == ("getppid", CALLS, 0)
    assert sum(calls["histogram"]) == CALLS
    by_route = {row["route"]: row for row in asked.rows("http", "shop")}
    assert by_route["/users/{id}"]["count"] == SERVED
    assert (by_route["/bad"]["errors"], by_route["/bad"]["status_5xx"]) == (1, 1)


def test_rows_by_time_have_their_own_rates(asked: Asked) -> None:
    rows = asked.rows("http", "shop", "--by", "time")
    assert sum(row["count"] for row in rows) == SERVED + 1
    text = asked.query("http", "shop", "--by", "time", "--since", "2m", width=80).stdout
    assert re.search(r"^TIME +REQ/S", text, re.MULTILINE), text


def test_tables_say_what_they_cover(asked: Asked) -> None:
    text = asked.query("http", "shop", width=80).stdout
    assert "8 requests" in text
    assert re.search(r"← GET /users/\{id\} +", text)
    assert re.search(r"^complete to \d\d:\d\d:\d\d$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80
    services = asked.query("services", width=80).stdout
    assert services.startswith("SERVICE ")
    assert {line.split()[0] for line in services.splitlines()[1:3]} == {"caller", "shop"}
    accounts = asked.query("accounts").stdout
    assert re.search(r"([\d,]+) produced = \1 stored \+ 0 lost", accounts)
    assert " yes " in asked.query("agents").stdout
    assert asked.query("sessions").stdout.count("at work") == 3


def test_data_are_for_machines(asked: Asked, tmp_path: Path) -> None:
    done = asked.query("syscalls", "caller", "-o", "csv")
    (row,) = csv.DictReader(io.StringIO(done.stdout, newline=""))
    assert (row["syscall"], row["calls"]) == ("getppid", str(CALLS))
    assert re.search(r"^coral: complete to \d\d:\d\d:\d\d$", done.stderr, re.MULTILINE)
    table = pa.ipc.open_stream(
        asked.query("syscalls", "caller", "-o", "arrow").stdout_bytes
    ).read_all()
    assert table.column("calls").to_pylist() == [CALLS]
    asked.query("syscalls", "caller", "-o", tmp_path / "calls.json")
    assert json.loads((tmp_path / "calls.json").read_text())["calls"] == CALLS


def test_a_flame_graph_of_what_is_stored(asked: Asked, tmp_path: Path) -> None:
    svg = asked.query("profile", "caller", "-o", "svg").stdout
    assert svg.startswith("<?xml")
    assert "CPU profile of caller" in svg
    asked.query("profile", "caller", "-o", tmp_path / "flame.html")
    assert "<html" in (tmp_path / "flame.html").read_text()

    def counted() -> bool:
        """The last samples may come between two questions."""
        folded = asked.query("profile", "caller", "-o", "folded").stdout
        samples = sum(int(line.rpartition(" ")[2]) for line in folded.splitlines())
        rows = asked.rows("profile", "caller")
        return bool(samples == sum(row["count"] for row in rows) > LEAST_SAMPLES)

    wait_until(counted)
    assert re.search(r"SELF +TOTAL", asked.query("profile", "caller").stdout)


def test_windows_are_compared(asked: Asked) -> None:
    (row,) = asked.rows("syscalls", "caller", "--since", "10m", "--against", "1h")
    assert (row["verdict"], row["calls"], row["calls_before"]) == ("new", CALLS, None)
    assert "new" in asked.query("http", "shop", "--against", "1h").stdout
    asked.query("profile", "caller", "--against", "1h")


def test_sql_sees_the_hot_rows(asked: Asked) -> None:
    sql = "SELECT sum(call_count)::INT AS calls FROM syscall_stats WHERE syscall = 'getppid'"
    assert asked.rows("sql", sql) == [{"calls": CALLS}]
    (row,) = asked.rows("sql", "SELECT make_timestamp_ns(max(time_ns)) AS at FROM syscall_stats")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row["at"])
    sql = "SELECT kind, stored FROM ledger ORDER BY kind"
    assert [row["kind"] for row in asked.rows("sql", sql)] == [
        "cpu_profile",
        "http_latency",
        "syscall_stats",
    ]


def test_wrong_questions_are_answered_in_the_users_words(asked: Asked) -> None:
    for arguments, status, why in (
        (("http", "shpo"), 1, "coral: no such service: 'shpo'; did you mean shop?"),
        (("http", "--by", "rout"), 2, "coral: --by rout: no such column: 'rout'; did you mean rou"),
        (("http", "--where", "status=abc"), 2, "--where status=abc: give status as a whole number"),
        (
            ("tcp", "--where", "role=foo"),
            2,
            "--where role=foo: give role as one of client, serv",
        ),
        (("sql", "COPY x TO '/tmp/y'"), 2, "coral: sql: give one SELECT statement"),
        (("sql", "SELECT * FROM http"), 2, "coral: sql: no such table: 'http'; did you mean http_"),
        (("tables", "nothing"), 1, "coral: there is no table nothing; there are agents"),
        (("http", "--since", "2100-01-01"), 2, "'2100-01-01': it is in the future"),
        (("http", "-o", "svg"), 2, "pictures are of profiles"),
    ):
        assert why in asked.query(*arguments, status=status).stderr
    done = asked.query("http", "--colony", "unix:/nowhere/colony.sock", status=1)
    assert "no colony answers at unix:/nowhere/colony.sock" in done.stderr


def test_the_command_itself(asked: Asked) -> None:
    env = {**os.environ, "CORAL_COLONY": asked.address}
    command = coral("query", "syscalls", "caller", "-o", "arrow")
    done = subprocess.run(command, capture_output=True, env=env, cwd=ROOT, check=True)
    table = pa.ipc.open_stream(done.stdout).read_all()
    assert table.column("calls").to_pylist() == [CALLS]
    assert re.fullmatch(rb"coral: complete to \d\d:\d\d:\d\d\n", done.stderr)


def test_a_shell_completes_what_the_colony_has(asked: Asked) -> None:
    def completed(*words: str) -> list[str]:
        env = {
            "CORAL_COLONY": asked.address,
            "_CORAL_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("coral", "query", *words)),
            "COMP_CWORD": str(len(words) + 1),
        }
        done = CliRunner(env=env).invoke(main, [], prog_name="coral")
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("http", "s") == ["shop"]
    assert completed("http", "--by", "service,ro") == ["service,role", "service,route"]
    assert completed("http", "--where", "me") == ["method="]
    assert "http_latency_1m" in completed("tables", "http_l")


def test_collecting_on_every_agent(asked: Asked) -> None:
    def coral_collect(*arguments: str) -> Result:
        env = {"CORAL_COLONY": asked.address}
        return CliRunner(env=env).invoke(main, ["collect", *arguments], prog_name="coral")

    here = f"pid={os.getpid()}"
    done = coral_collect("tcp_metrics", "tests", "-d", "60s", "-c", here)
    assert done.exit_code == 0, done.stderr
    _, line, _, hint = done.stdout.splitlines()
    assert hint == "`coral query tcp tests` shows what they see"
    agent, collector, _ = line.split(maxsplit=2)

    def followed() -> bool:
        rows = asked.rows("sessions", "--where", f"session={collector}")
        return [(row["agent"], row["service"]) for row in rows] == [(agent, "tests")]

    wait_until(followed, timeout_s=30)
    done = coral_collect("tcp_metrics", "-c", here, "--on", "nobody")
    assert done.exit_code == 1
    assert "agent 'nobody' is not known" in done.stdout
    done = coral_collect("tcp_metrics", "-c", "pid=999999999")
    assert done.exit_code == 1
    assert "-c pid=999999999: give process ids" in done.stdout
