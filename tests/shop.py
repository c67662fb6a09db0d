"""A small HTTP server and a client for it, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.network import number
from tests.support import Puppet

WAIT_S: Final = 0.05
BODY_BYTES: Final = 2000
_SERVE: Final = f"""
import http.server, threading, time

class Shop(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/slow"):
            time.sleep({WAIT_S})
        statuses = {{"/missing": 404, "/bad": 503, "/same": 304}}
        self.answer(statuses.get(self.path, 200), bytes({BODY_BYTES}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, b"ok")

    def answer(self, status, body):
        self.send_response(status)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path.startswith("/late"):
            time.sleep({WAIT_S})
        if status != 304:
            self.wfile.write(body)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""
_VISIT: Final = """
import http.client

def visit(port, *requests):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for method, path, sent in requests:
        connection.request(method, path, bytes(sent) if sent else None)
        connection.getresponse().read()
    connection.close()
"""


@contextmanager
def shop() -> Iterator[Puppet]:
    """The server. `/slow` waits for WAIT_S before the first byte of its response, `/late` between
    the head and the body; bodies have BODY_BYTES."""
    with Puppet() as puppet:
        puppet.do(f"exec({_SERVE!r})")
        yield puppet


@contextmanager
def visitor() -> Iterator[Puppet]:
    """The client."""
    with Puppet() as puppet:
        puppet.do(f"exec({_VISIT!r})")
        yield puppet


def port_of(server: Puppet) -> int:
    """Where the server listens."""
    return number(server, "server.server_port")


def visit(client: Puppet, server: Puppet, *requests: tuple[str, str, int]) -> None:
    """Makes these requests, by method, path and bytes of the body, one after the other on one
    connection."""
    client.do(f"visit({port_of(server)}, *{requests!r})")
