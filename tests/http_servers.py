"""Real HTTP servers and clients, each with its own configuration in a directory of the test, and
what they themselves say about each request."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import psutil

from tests.support import ROOT, built, wait_until

_NGINX = ROOT / "build/nginx/nginx"
_PROGRAMS = ROOT / "tests/programs/http"
_MODULES = Path("/usr/lib/apache2/modules")


class Call(NamedTuple):
    """A request to make."""

    method: str
    path: str
    sends: int = 0  # bytes of its body
    headers: Mapping[str, str] = {}


class Exchange(NamedTuple):
    """A request as one side tells of it, after the fact."""

    method: str
    path: str
    status: int
    sent: int  # bytes of the request's body
    received: int  # and of the response's


class Logged(NamedTuple):
    """A line of a server's log; -1 where that server does not say it."""

    method: str
    path: str
    status: int
    body_bytes: int = -1
    pid: int = -1
    request_s: float = -1  # from its first byte to the end
    upstream_s: float = -1  # that of the request to an upstream, and to the head of its response
    upstream_head_s: float = -1


# What is not installed, of what these servers and clients need: guests of another architecture than
# this machine's do without.
MISSING = [
    *(
        str(name)
        for name in (_NGINX, "apache2", "node", "go", "curl", "wrk")
        if not shutil.which(name)
    ),
    *(name for name in ("uvicorn",) if not find_spec(name)),
]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


@dataclass
class Server(ABC):
    """A server of the files below `site`, at work in `directory`."""

    site: Path
    directory: Path
    port: int = field(default_factory=free_port)

    # The method by which it takes a body, if it does.
    takes: ClassVar[str] = ""
    # How many processes it has beside its first.
    workers: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.output = self.directory / "output"
        self.environment: dict[str, str] = {}

    @property
    @abstractmethod
    def command(self) -> Sequence[object]:
        """How to start it."""

    def log(self) -> list[Logged]:
        """What it has logged so far."""
        text, _, _ = self._log_path.read_text().rpartition("\n")  # but for a line being written
        return [self._line(words) for line in text.splitlines() if (words := self._words(line))]

    def _words(self, line: str) -> Sequence[str]:
        """The fields in a line of output; none if it is about no request."""
        return line.split()

    def _line(self, words: Sequence[str]) -> Logged:
        """A line by its fields."""
        method, path, status, *more = words
        numbers = [int(word) for word in more[:2]]
        times = [-1 if word == "-" else float(word) for word in more[2:]]
        return Logged(method, path, int(status), *numbers, *times)

    @property
    def _log_path(self) -> Path:
        return self.output

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        main = psutil.Process(self.pid)
        return [main.pid, *(child.pid for child in main.children(recursive=True))]

    @contextmanager
    def running(self) -> Iterator[None]:
        """It serves for the duration of the block."""
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, self.command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "SITE": str(self.site),
                    "PYTHONUNBUFFERED": "1",
                    **self.environment,
                },
                start_new_session=True,  # Apache ends its whole process group
            )
        self.pid = process.pid
        try:
            wait_until(lambda: self._serves(process), 20)
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

    def _serves(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.output.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return len(self.pids) > self.workers
        return False


class Nginx(Server):
    """nginx with two workers."""

    takes = "PUT"
    workers = 2
    logs = True
    upstreams = ""  # blocks of its configuration
    locations = ""

    @property
    def command(self) -> Sequence[object]:
        self._write_configuration()
        prefix = f"{self.directory}/"
        return (_NGINX, "-p", prefix, "-c", self.directory / "nginx.conf", "-e", "stderr")

    def _write_configuration(self) -> None:
        places = "\n".join(
            f"{name}_temp_path {self.directory}/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        owner = "user root;" if os.geteuid() == 0 else ""
        log = f"{self.directory}/access.log fields" if self.logs else "off"
        configuration = f"""
            daemon off; worker_processes {self.workers}; pid {self.directory}/nginx.pid; {owner}
            error_log stderr crit;
            events {{ worker_connections 512; }}
            http {{
                log_format fields '$request_method $uri $status $body_bytes_sent $pid '
                    '$request_time $upstream_response_time $upstream_header_time';
                access_log {log};
                sendfile on; tcp_nodelay on; keepalive_requests 1000000; client_max_body_size 200m;
                {places}
                {self.upstreams}
                server {{
                    listen 127.0.0.1:{self.port}; root {self.site};
                    location / {{ dav_methods PUT; }}
                    location /said/ {{ return 200 "twenty bytes of text"; }}
                    {self.locations}
                }}
            }}"""
        (self.directory / "nginx.conf").write_text(configuration)

    @property
    def _log_path(self) -> Path:
        return self.directory / "access.log"


class Apache(Server):
    """Apache httpd with processes that each serve one connection at a time."""

    takes = "POST"
    workers = 2

    @property
    def command(self) -> Sequence[object]:
        owner = "User #65534\nGroup #65534" if os.geteuid() == 0 else ""
        log = self.directory / "access.log"
        (self.directory / "apache.conf").write_text(
            f"""
            ServerRoot {self.directory}
            ServerName localhost
            Listen 127.0.0.1:{self.port}
            PidFile {self.directory}/apache.pid
            DefaultRuntimeDir {self.directory}
            ErrorLog /dev/stderr
            LoadModule mpm_prefork_module {_MODULES}/mod_mpm_prefork.so
            LoadModule authz_core_module {_MODULES}/mod_authz_core.so
            StartServers {self.workers}
            MinSpareServers 1
            MaxSpareServers {self.workers}
            MaxRequestWorkers 4
            DocumentRoot {self.site}
            LogFormat "%m %U %>s %B %P" fields
            CustomLog {log} fields
            {owner}"""
        )
        return ("apache2", "-f", self.directory / "apache.conf", "-DFOREGROUND")

    @property
    def _log_path(self) -> Path:
        return self.directory / "access.log"


class PythonServer(Server):
    """`http.server`."""

    @property
    def command(self) -> Sequence[object]:
        protocol = ("--protocol", "HTTP/1.1", "--bind", "127.0.0.1")
        return (sys.executable, "-P", "-m", "http.server", *protocol, "-d", self.site, self.port)

    def _words(self, line: str) -> Sequence[str]:
        found = re.search(r'"(\w+) (\S+) HTTP/1.1" (\d+) -', line)
        return found.groups() if found else ()


class Uvicorn(Server):
    """uvicorn, with the application of tests/programs/http/app.py."""

    takes = "POST"

    @property
    def command(self) -> Sequence[object]:
        place = ("--host", "127.0.0.1", "--port", self.port, "--app-dir", _PROGRAMS)
        plain = ("--http", "h11", "--no-use-colors", "--lifespan", "off")
        return (sys.executable, "-P", "-m", "uvicorn", "app:app", *place, *plain)

    def _words(self, line: str) -> Sequence[str]:
        found = re.search(r'"(\w+) (\S+) HTTP/1.1" (\d+) ', line)
        return found.groups() if found else ()


class Node(Server):
    """Node's own server."""

    takes = "POST"

    @property
    def command(self) -> Sequence[object]:
        return ("node", _PROGRAMS / "app.mjs", self.port, self.site)

    def _words(self, line: str) -> Sequence[str]:
        return () if line.startswith("waits ") else line.split()

    def lets_wait(self, path: str) -> bool:
        """Whether a request to PATH has come that waits for its answer."""
        return f"waits {path}\n" in self.output.read_text()


class Go(Server):
    """Go's own server."""

    takes = "POST"

    @property
    def command(self) -> Sequence[object]:
        source = _PROGRAMS / "app.go"
        return (
            built("app.go", [source], lambda out: ["go", "build", "-o", out, source]),
            self.port,
        )


def certificate(directory: Path) -> Path:
    """A new certificate of localhost with its key, in one file of DIRECTORY."""
    both = directory / "both.pem"
    key = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -days 2"
    command = ["openssl", "req", *key.split(), "-keyout", "key", "-out", "certificate"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    both.write_bytes((directory / "certificate").read_bytes() + (directory / "key").read_bytes())
    return both


SERVERS: Mapping[str, Callable[[Path, Path], Server]] = {
    "nginx": Nginx,
    "apache": Apache,
    "http.server": PythonServer,
    "uvicorn": Uvicorn,
    "node": Node,
    "go": Go,
}


def _curl(port: int, calls: Sequence[Call]) -> list[object]:
    command: list[object] = ["curl", "--silent"]
    for number, call in enumerate(calls):
        command += ["--next"] if number else []
        command += ["--output", "/dev/null", "--write-out", "%{http_code} %{size_download}\n"]
        command += ["--head"] if call.method == "HEAD" else ["--request", call.method]
        for name, value in call.headers.items():
            command += ["--header", f"{name}: {value}"]
        if call.sends:
            command += ["--data-binary", "x" * call.sends]
        command += [f"http://127.0.0.1:{port}{call.path}"]
    return command


def _script(*interpreter: object) -> Callable[[int, Sequence[Call]], list[object]]:
    return lambda port, calls: [*interpreter, port, json.dumps(calls)]


# How to start the clients. Each makes the calls one after the other, on one connection where that
# is kept, and writes the status and the bytes of the body of each response in a line.
CLIENTS: Mapping[str, Callable[[int, Sequence[Call]], list[object]]] = {
    "curl": _curl,
    "http.client": _script(sys.executable, "-P", _PROGRAMS / "calls.py"),
    "node": _script("node", _PROGRAMS / "calls.mjs"),
}


def exchanges(calls: Sequence[Call], output: str) -> list[Exchange]:
    """CALLS with what a client wrote about them."""
    lines = [map(int, line.split()) for line in output.splitlines()]
    return [
        Exchange(call.method, call.path, status, call.sends, received)
        for call, (status, received) in zip(calls, lines, strict=True)
    ]


class Client:
    """A program that waits until it is let go."""

    def __init__(self, command: Sequence[object]) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", 'read -r _; exec "$@"', "sh", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid

    def go(self) -> None:
        """Lets it begin."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def finish(self, status: int = 0) -> str:
        """Waits for its end with STATUS; what it wrote."""
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == status, output
        return output.decode()

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def run(self) -> str:
        """Lets it begin, and waits for its end; what it wrote."""
        self.go()
        return self.finish()

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        with self._process:
            pass


@contextmanager
def client(command: Sequence[object]) -> Iterator[Client]:
    """A program that waits until it is let go; it ends with the block."""
    program = Client(command)
    try:
        yield program
    finally:
        program.kill()
