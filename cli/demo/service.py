"""A small real HTTP service and a load for it, for the demonstration: two processes on loopback.

python -P -m coral.cli.demo.service serve DIRECTORY     serves the files there, prints its port
python -P -m coral.cli.demo.service load PORT SECONDS   asks for them, and for one that is not there
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

PATHS: Final = ("/index.html", "/catalogue.html", "/basket.html", "/missing.html")
_CLIENTS: Final = 3
_PAUSE_S: Final = 0.002  # a load that a person's machine can bear


class _QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        """Nothing: the demonstration has the terminal."""


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        """Says nothing of a client that is gone: the load is ended in the middle of a request."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


def serve(directory: str) -> None:
    """Serves until it is ended."""
    handler = partial(_QuietHandler, directory=directory)
    with _QuietServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def load(port: int, seconds: float) -> None:
    """Keeps a few connections busy for so long."""
    end = time.monotonic() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.monotonic() < end:
            for path in PATHS:
                connection.request("GET", path)
                connection.getresponse().read()
                time.sleep(_PAUSE_S)

    threads = [threading.Thread(target=client) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        load(int(sys.argv[2]), float(sys.argv[3]))
