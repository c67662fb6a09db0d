"""A server of HTTP over TLS, which says what it has answered and to whom.

    tls.py HOW CERTIFICATE

HOW it uses OpenSSL: `threads`, each on its socket; `asyncio`, which passes encrypted bytes on
itself; `crossed`, likewise, but it receives from two connections before it decrypts what came on
either. Writes its port, then a line for each request: method, path, status and the client's port.
The path says what to answer: `/after/0.1/x` after a tenth of a second, `/to-close/x` with a body
that ends with the connection, which stays open for a while, `/much/x` with 20 MB in one call.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import sys
import threading
import time


def words_of(head: bytes) -> list[str]:
    return head.decode().split(" ")[:2]


def wait_of(path: str) -> float:
    return float(path.split("/")[2]) if path.startswith("/after/") else 0


def response(path: str) -> bytes:
    if path.startswith("/to-close/"):
        return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall there is"
    if path.startswith("/much/"):
        return b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + bytes(20_000_000)
    status = 404 if "missing" in path else 200
    return b"HTTP/1.1 %d Said\r\nContent-Length: 5\r\n\r\nhello" % status


def say(method: str, path: str, answer: bytes, port: int) -> None:
    sys.stdout.write(f"{method} {path} {answer[9:12].decode()} {port}\n")
    sys.stdout.flush()


class Requests:
    """Cuts what comes into requests, of which only POST has a body, of 1000 bytes."""

    def __init__(self) -> None:
        self.left = b""

    def take(self, data: bytes) -> list[list[str]]:
        self.left += data
        found = []
        while b"\r\n\r\n" in self.left:
            head, _, rest = self.left.partition(b"\r\n\r\n")
            body = 1000 if head.startswith(b"POST") else 0
            if len(rest) < body:
                break
            self.left = rest[body:]
            found.append(words_of(head))
        return found


def serve(raw: socket.socket, port: int, context: ssl.SSLContext) -> None:
    requests = Requests()
    with raw, context.wrap_socket(raw, server_side=True) as it:
        while data := it.recv(65536):
            for method, path in requests.take(data):
                time.sleep(wait_of(path))
                answer = response(path)
                say(method, path, answer, port)
                it.sendall(answer)
                if path.startswith("/to-close/"):
                    rest = it.unwrap()  # says that no more comes
                    time.sleep(1)
                    rest.close()
                    return


def threads(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        raw, (_, port) = listener.accept()
        threading.Thread(target=serve, args=(raw, port, context), daemon=True).start()


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    port = writer.get_extra_info("peername")[1]
    requests = Requests()
    while data := await reader.read(65536):
        for method, path in requests.take(data):
            await asyncio.sleep(wait_of(path))
            answer = response(path)
            say(method, path, answer, port)
            writer.write(answer)
            await writer.drain()
    writer.close()


async def by_asyncio(listener: socket.socket, context: ssl.SSLContext) -> None:
    server = await asyncio.start_server(answer_all, sock=listener, ssl=context)
    await server.serve_forever()


class Side:
    """One connection of `crossed`."""

    def __init__(self, raw: socket.socket, port: int, context: ssl.SSLContext) -> None:
        self.raw, self.port, self.requests = raw, port, Requests()
        self.come, self.gone = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.come, self.gone, server_side=True)
        self.is_open = False

    def flush(self) -> None:
        if data := self.gone.read():
            self.raw.sendall(data)

    def shake_hands(self) -> None:
        while not self.is_open:
            try:
                self.tls.do_handshake()
                self.is_open = True
            except ssl.SSLWantReadError:
                self.flush()
                self.come.write(self.raw.recv(65536))
            self.flush()

    def answer(self) -> None:
        data = b""
        while True:
            try:
                data += self.tls.read(65536)
            except ssl.SSLWantReadError:
                break
        for method, path in self.requests.take(data):
            answer = response(path)
            say(method, path, answer, self.port)
            self.tls.write(answer)
            self.flush()


def crossed(listener: socket.socket, context: ssl.SSLContext) -> None:
    sides = [Side(raw, peer[1], context) for raw, peer in (listener.accept(), listener.accept())]
    for side in sides:
        side.shake_hands()
    while True:
        waiting = {side.raw: side for side in sides}
        came = []
        while waiting:  # until both have sent something
            readable = select.select(list(waiting), [], [])[0]
            came += [(waiting.pop(raw), raw.recv(65536)) for raw in readable]
        if not all(data for _, data in came):
            return
        for side, data in came:
            side.come.write(data)
        for side, _ in came:  # the one that was received last is the last here
            side.answer()


def main() -> None:
    how, certificate = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    if how == "asyncio":
        asyncio.run(by_asyncio(listener, context))
    elif how == "crossed":
        crossed(listener, context)
    else:
        threads(listener, context)


main()
