"""An HTTPS server that speaks the two reviews of a Kubernetes API server, TokenReview and
SubjectAccessReview, as authentication.k8s.io/v1 and authorization.k8s.io/v1 describe them."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

AGENTS_TOKEN = "the agent's own token".replace(" ", "-").replace("'", "")
AUDIENCE = "coral.io"
_REVIEWS = {
    "/apis/authentication.k8s.io/v1/tokenreviews": ("authentication.k8s.io/v1", "TokenReview"),
    "/apis/authorization.k8s.io/v1/subjectaccessreviews": (
        "authorization.k8s.io/v1",
        "SubjectAccessReview",
    ),
}


@dataclass
class Cluster:
    """What a cluster knows, and what it was asked.

    `users` are the user of each token, with its groups, and the audience that it was made for.
    `rights` are (user or group, verb, namespace) of `collectors.coral.io`, with "" for all
    namespaces.
    """

    url: str = ""
    ca: Path = Path()
    token_file: Path = Path()
    users: dict[str, tuple[str, tuple[str, ...], str]] = field(default_factory=dict)
    rights: set[tuple[str, str, str]] = field(default_factory=set)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""
    """What it answers with instead: `500`, `text`, `empty`, `huge`, `silent`, `deep`."""
    agents_token: str = AGENTS_TOKEN
    resumed: threading.Event = field(default_factory=threading.Event)

    def config(self) -> dict[str, object]:
        """What an agent needs to know of it, for `auth.kubernetes`."""
        return {
            "server": self.url, "ca_file": str(self.ca), "token_file": str(self.token_file),
            "audience": AUDIENCE,
        }  # fmt: skip

    def questions(self, kind: str) -> int:
        """How often it was asked for a review of that kind."""
        return sum(asked == kind for asked, _ in self.asked)

    def review(self, kind: str, spec: Any) -> dict[str, object]:
        """The status of a review."""
        if kind == "TokenReview":
            known = self.users.get(spec["token"])
            if not known or known[2] not in spec["audiences"]:
                return {"authenticated": False, "error": "invalid bearer token"}
            name, groups, audience = known
            user = {"username": name, "uid": "u", "groups": list(groups)}
            return {"authenticated": True, "user": user, "audiences": [audience]}
        wanted = spec["resourceAttributes"]
        assert (wanted["group"], wanted["resource"]) == ("coral.io", "collectors")
        subjects = (spec["user"], *spec["groups"])
        allowed = any(
            (subject, wanted["verb"], namespace) in self.rights
            for subject in subjects
            for namespace in (wanted["namespace"], "")
        )
        return {"allowed": allowed}


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {cluster.agents_token}":
                self._answer(401, b'{"kind":"Status","code":401}')
                return
            version, kind = _REVIEWS[self.path]
            assert (body["apiVersion"], body["kind"]) == (version, kind)
            cluster.asked.append((kind, body["spec"]))
            if cluster.broken:
                self._break()
                return
            answer = {**body, "status": cluster.review(kind, body["spec"])}
            self._answer(201, json.dumps(answer).encode())

        def _break(self) -> None:
            if cluster.broken == "silent":
                cluster.resumed.wait()
            bodies = {
                "text": b"it works",
                "empty": b"{}",
                "huge": b" " * (2 << 20),
                "deep": b"[" * 100_000,
            }
            status = 500 if cluster.broken == "500" else 201
            self._answer(status, bodies.get(cluster.broken, b"{}"))

        def _answer(self, status: int, body: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the agent has waited long enough
                pass

        def log_message(self, *_arguments: object) -> None:
            pass

    return Handler


def authority(directory: Path, name: str = "ca") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key, made by openssl."""
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """The server, on loopback, for the duration of the block."""
    directory.mkdir(exist_ok=True)
    cluster = Cluster()
    cluster.ca, key = authority(directory)
    cluster.token_file = directory / "token"
    cluster.token_file.write_text(AGENTS_TOKEN + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cluster))
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cluster.ca, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    cluster.url = f"https://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield cluster
    finally:
        cluster.resumed.set()
        server.shutdown()
        thread.join()
        server.server_close()
