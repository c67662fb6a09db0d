"""nginx with one worker on a CPU of its own, wrk on the others, and what a request costs nginx.

What else runs on the machine moves requests a second; it hardly moves nginx's CPU time a request.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import kernel
from benchmarks.bench import Bench, BenchError
from tests import http_servers

_CONNECTIONS: Final = 8
_TRIES: Final = 3
_PATH: Final = "/said/"  # returns 20 bytes
_REQUESTS: Final = re.compile(r"^ *(\d+) requests in ", re.MULTILINE)
_PER_SECOND: Final = re.compile(r"^Requests/sec: *([\d.]+)", re.MULTILINE)
_FAILED: Final = re.compile(
    r"^ *(?:Socket errors: (?!connect 0, read 0, write 0)|Non-2xx).*", re.MULTILINE
)

_LIBSSL: Final = re.compile(r"=> (/\S*libssl\.so\S*) ")

# wrk has no rate: each of these connections waits so long after each response.
_PACED_CONNECTIONS: Final = 60
_PAUSE_MS: Final = 2
_PACED_SCRIPT: Final = f"function delay() return {_PAUSE_MS} end\n"


class Load(NamedTuple):
    """What wrk got of nginx, and the CPU time of nginx for it, user and system together."""

    requests: int
    per_second: float
    cpu_us: float  # a request


class _OneWorker(http_servers.Nginx):
    workers = 1
    logs = False


@dataclass(frozen=True)
class Nginx:
    """nginx at work. `pid` is its worker's, `libssl` the library that it alone has."""

    pid: int
    url: str
    libssl: Path | None
    _wrk: Sequence[str]  # as far as it is the same for all loads
    _script: str

    async def load(self, seconds: int) -> Load:
        """Requests at full speed, one after another on each of a few kept connections."""
        return await self._run("-c", str(_CONNECTIONS), "-d", f"{seconds}s")

    async def paced(self, seconds: int) -> Load:
        """About 20,000 requests a second."""
        paced = ("-c", str(_PACED_CONNECTIONS), "-s", self._script)
        return await self._run(*paced, "-d", f"{seconds}s")

    async def _run(self, *options: str) -> Load:
        for _ in range(_TRIES):
            if load := await self._try(*options):
                return load
        raise BenchError(f"nginx has answered no request in {_TRIES} loads")

    async def _try(self, *options: str) -> Load | None:
        """A load; None if the machine was so busy that there was not one response."""
        before_ns = kernel.cpu_ns(self.pid)
        process = await asyncio.create_subprocess_exec(
            *self._wrk, *options, self.url, stdout=asyncio.subprocess.PIPE
        )
        try:
            out, _ = await process.communicate()
        except BaseException:
            process.kill()
            raise
        cpu_ns, text = kernel.cpu_ns(self.pid) - before_ns, out.decode()
        requests, per_second = _REQUESTS.search(text), _PER_SECOND.search(text)
        failed = _FAILED.search(text)
        if failed or not (requests and per_second):
            raise BenchError(f"wrk: {failed[0].strip() if failed else text}")
        made = int(requests[1])
        return Load(made, float(per_second[1]), cpu_ns / made / 1e3) if made else None


@contextmanager
def serving(bench: Bench, *, tls: bool = False) -> Iterator[Nginx]:
    """nginx that answers each request with 20 bytes and logs nothing, over TLS if it is to. It has
    the last CPU, and wrk the others."""
    if missing := [name for name in http_servers.MISSING if name.endswith(("nginx", "wrk"))]:
        raise BenchError(f"missing: {', '.join(missing)}; `make bench` installs them")
    *others, own = sorted(os.sched_getaffinity(0))
    directory = bench.directory / ("nginx-tls" if tls else "nginx")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (script := directory / "paced.lua").write_text(_PACED_SCRIPT)
    server = _OneWorker(directory, directory)
    port, libssl = server.port, None
    if tls:
        libssl = _own_libssl(server.command[0], directory)
        server.environment["LD_LIBRARY_PATH"] = str(directory)
        port, pem = http_servers.free_port(), http_servers.certificate(directory)
        server.upstreams = f"""
            ssl_certificate {pem}; ssl_certificate_key {pem};
            server {{
                listen 127.0.0.1:{port} ssl;
                location {_PATH} {{ return 200 "twenty bytes of text"; }}
            }}"""
    cpus = ",".join(map(str, others or [own]))
    with server.running():
        worker = server.pids[-1]
        os.sched_setaffinity(worker, {own})
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}{_PATH}"
        yield Nginx(worker, url, libssl, ("taskset", "-c", cpus, "wrk", "-t1"), str(script))


def _own_libssl(program: object, directory: Path) -> Path:
    """A copy of PROGRAM's libssl, so that nobody else enters what is attached there: not wrk, and
    no other program of this machine."""
    listed = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True)
    found = _LIBSSL.search(listed.stdout)
    if not found:
        raise BenchError(f"{program} has no libssl")
    return Path(shutil.copy(found[1], directory))
