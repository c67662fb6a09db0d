"""A small real HTTP service and a load for it, for the demonstration: two processes on loopback.

python -P -m coral.cli.demo.service serve DIRECTORY [PAYMENT_MS]
    serves a shop, prints its port; a payment takes that long
python -P -m coral.cli.demo.service load PORT SECONDS
    asks for its pages, and for one that is not there, looks at orders, and pays
"""

from __future__ import annotations

import fcntl
import http.client
import random
import socket
import struct
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

PAGES: Final = ("/index.html", "/catalogue.html", "/basket.html")
_MISSING: Final = "/missing.html"
_CLIENTS: Final = 3
_PAUSE_S: Final = 0.002  # a load that a person's machine can bear
_ORDER_S: Final = 0.004  # how long the shop looks for an order, and how long it takes to pay
_PAYMENT_MS: Final = 20
_ORDER_BYTES: Final = 1500
_FAILING: Final = 25  # one payment in this many

# netdevice(7): set the flags of an interface.
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


class _Shop(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    payment_s = _PAYMENT_MS / 1e3

    def do_GET(self) -> None:
        if not self.path.startswith("/orders/"):
            super().do_GET()
            return
        time.sleep(_ORDER_S)
        self._answer(200, bytes(_ORDER_BYTES))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.payment_s)
        _, _, order = self.path.rpartition("/")
        self._answer(503 if int(order) % _FAILING == 0 else 201, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Nothing: the demonstration has the terminal."""


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        """Says nothing of a client that is gone: the load is ended in the middle of a request."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


def serve(directory: str, payment_ms: float = _PAYMENT_MS) -> None:
    """Serves until it is ended; a payment takes PAYMENT_MS milliseconds."""
    _set_loopback_up()
    _Shop.payment_s = payment_ms / 1e3
    handler = partial(_Shop, directory=directory)
    with _QuietServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def _set_loopback_up() -> None:
    """In a new network namespace it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))


def load(port: int, seconds: float) -> None:
    """Keeps a few connections busy for SECONDS."""
    end = time.monotonic() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)

        def ask(method: str, path: str, body: bytes | None = None) -> None:
            connection.request(method, path, body)
            connection.getresponse().read()
            time.sleep(_PAUSE_S)

        while time.monotonic() < end:
            for page in (*PAGES, _MISSING):
                ask("GET", page)
            order = random.randrange(10_000)  # noqa: S311
            ask("GET", f"/orders/{order}?currency=EUR")
            ask("POST", f"/orders/{order}", bytes(300))

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], *map(float, sys.argv[3:]))
    else:
        load(int(sys.argv[2]), float(sys.argv[3]))
