"""The pods of this node, from the kubelet or from the API server, which have one form for them.

The API server is only ever asked for the pods of this node (`fieldSelector=spec.nodeName=...`): a
cluster's agents that each list all pods starve it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from coral.agent.machine.pods.facts import Container, Facts, Pod
from coral.agent.machine.pods.http_json import ACCOUNT, GoneError, Hold, Server
from coral.agent.machine.pods.source import SourceError
from coral.agent.machine.pods.workloads import by_labels, by_owner

_PAGE: Final = 500
_WATCH_S: Final = 300  # after which the server ends a watch
_IDLE_S: Final = 330.0
_LEAST_PAUSE_S: Final = 1.0
_MOST_PAUSE_S: Final = 60.0
_STATUSES: Final = ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")


class Kubelet:
    """The kubelet's list of its pods: GET /pods."""

    name = "kubelet"

    def __init__(self, server: Server) -> None:
        self._server = server
        self.about = ""

    def fetch(self) -> Facts:
        """See `Source`."""
        facts = facts_of(self._server.get("/pods").get("items") or ())
        self.about = f"at {self._server.url}"
        return facts

    def close(self) -> None:
        """See `Source`."""


class Api:
    """The API server's list of the pods of NODE."""

    name = "api"

    def __init__(self, server: Server, node: str) -> None:
        self.server = server
        self._selected = {"fieldSelector": f"spec.nodeName={node}"}
        self.node = node
        self.about = ""
        self.version = ""  # of what `fetch` has returned

    def fetch(self) -> Facts:
        """See `Source`."""
        items: list[Mapping[str, Any]] = []
        more = ""
        while True:
            query = {**self._selected, "limit": _PAGE, **({"continue": more} if more else {})}
            page = self.server.get(f"/api/v1/pods?{urlencode(query)}")
            items += page.get("items") or ()
            told = page.get("metadata") or {}
            self.version, more = str(told.get("resourceVersion", "")), told.get("continue", "")
            if not more:
                break
        self.about = f"at {self.server.url}, pods of node {self.node}"
        return facts_of(items, with_mirrors=True)

    def changes(self, hold: Hold) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What changes after `version`, which moves on: a word such as ADDED, and the pod."""
        query = {
            **self._selected,
            "watch": 1,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": _WATCH_S,
            "resourceVersion": self.version,
        }
        path = f"/api/v1/pods?{urlencode(query, quote_via=quote)}"
        for event in self.server.lines(path, _IDLE_S, hold):
            what, item = event.get("type"), event.get("object") or {}
            if what == "ERROR":
                raise GoneError(f"{self.server.url}: {item.get('message', 'the watch failed')}")
            self.version = str((item.get("metadata") or {}).get("resourceVersion", self.version))
            if what != "BOOKMARK":
                yield str(what), item

    def close(self) -> None:
        """See `Source`."""


class ApiWatch:
    """Follows the API server in a thread of its own. REPLACE is called with all facts, CHANGED with
    each change, FAILED with why there are none for a while."""

    def __init__(
        self,
        api: Api,
        replace: Callable[[Facts], None],
        changed: Callable[[str, Pod, list[Container]], None],
        failed: Callable[[str], None],
    ) -> None:
        self._api, self._replace, self._changed, self._failed = api, replace, changed, failed
        self._stopping = threading.Event()
        self._hold = Hold()
        self._thread = threading.Thread(target=self._run, name="coral-api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it; does not wait for the server."""
        self._stopping.set()
        self._hold.let_go()

    def _run(self) -> None:
        pause_s = _LEAST_PAUSE_S
        while not self._stopping.is_set():
            try:
                self._replace(self._api.fetch())
                while not self._stopping.is_set():
                    for what, item in self._api.changes(self._hold):
                        pause_s = _LEAST_PAUSE_S
                        pod, containers = pod_of(item, with_mirrors=True)
                        self._changed(what, pod, containers)
            except GoneError:
                self._stopping.wait(_LEAST_PAUSE_S)
                continue  # list them again
            except (SourceError, AttributeError, TypeError, KeyError) as error:
                if not self._stopping.is_set():
                    self._failed(str(error))
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)


def server_in_cluster(environment: Mapping[str, str] = os.environ) -> Server:
    """The API server that Kubernetes tells its pods of. Raises `SourceError`."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host:
        raise SourceError(
            "this agent does not run in a pod, which knows its API server: name it in "
            "kubernetes.api, with kubernetes.token_file"
        )
    if not (ACCOUNT / "token").exists():
        raise SourceError(
            f"there is no token in {ACCOUNT}: give the pod a ServiceAccount that may get, list and "
            "watch pods, and automountServiceAccountToken: true"
        )
    host = f"[{host}]" if ":" in host else host
    url = f"https://{host}:{port or 443}"
    return Server(url, str(ACCOUNT / "token"), str(ACCOUNT / "ca.crt"))


def node_name(configured: str, environment: Mapping[str, str] = os.environ) -> str:
    """The name of this node, as the configuration or the downward API says. Raises
    `SourceError`."""
    if name := configured or environment.get("NODE_NAME", ""):
        return name
    raise SourceError(
        "the node's name is not known: set kubernetes.node, or NODE_NAME from spec.nodeName"
    )


def readable(path: str) -> str:
    """PATH if there is a file, else an empty text."""
    return path if path and Path(path).exists() else ""


def facts_of(items: Iterable[Mapping[str, Any]], *, with_mirrors: bool = False) -> Facts:
    """The pods of a list, in the form of the API (core/v1 Pod); WITH MIRRORS of static ones."""
    pods, containers = [], []
    for item in items:
        pod, its = pod_of(item, with_mirrors=with_mirrors)
        pods.append(pod)
        containers += its
    return Facts(tuple(pods), tuple(containers))


def pod_of(item: Mapping[str, Any], *, with_mirrors: bool = False) -> tuple[Pod, list[Container]]:
    """One pod, and those of its containers that have an id."""
    told, status = item.get("metadata") or {}, item.get("status") or {}
    labels = _texts(told.get("labels"))
    name = str(told.get("name", ""))
    owner: Mapping[str, Any] = next(
        (one for one in told.get("ownerReferences") or () if one.get("controller")), {}
    )
    workloads = by_owner(str(owner.get("kind", "")), str(owner.get("name", "")), labels)
    pod = Pod.of(
        str(told.get("uid", "")),
        str(told.get("namespace", "")),
        name,
        labels=labels,
        annotations=_texts(told.get("annotations")),
        workloads=workloads if owner else by_labels(name, labels),
        # Kubelets make mirrors their node's.
        may_mirror=with_mirrors and owner.get("kind") == "Node",
    )
    containers = [
        Container(str(each.get("containerID", "")).rpartition("//")[2], pod.uid, str(each["name"]))
        for kind in _STATUSES
        for each in status.get(kind) or ()
        if each.get("containerID") and each.get("name")
    ]
    return pod, containers


def _texts(labels: object) -> dict[str, str]:
    if not isinstance(labels, Mapping):
        return {}
    return {str(key): str(text) for key, text in labels.items()}
