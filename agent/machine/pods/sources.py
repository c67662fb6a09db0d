"""The sources of names that the configuration asks for."""

from __future__ import annotations

from typing import Final

from coral.agent.config_kubernetes import Kubernetes
from coral.agent.machine.pods.api import Api, Kubelet, node_name, readable, server_in_cluster
from coral.agent.machine.pods.cri import Cri
from coral.agent.machine.pods.http_json import ACCOUNT, Server
from coral.agent.machine.pods.source import Source, SourceError

_OFF: Final = "off"
_AUTO: Final = "auto"


def sources_of(config: Kubernetes) -> tuple[dict[str, Source], dict[str, str]]:
    """The sources that CONFIG asks for, and why the others are not used."""
    sources: dict[str, Source] = {}
    missing: dict[str, str] = {}
    token = config.token_file or readable(str(ACCOUNT / "token"))
    authority = config.ca_file or readable(str(ACCOUNT / "ca.crt"))
    if config.cri == _OFF:
        missing["cri"] = "kubernetes.cri is off"
    else:
        sources["cri"] = Cri("" if config.cri == _AUTO else config.cri.removeprefix("unix:"))
    if config.kubelet:
        sources["kubelet"] = Kubelet(Server(config.kubelet, token, authority))
    else:
        missing["kubelet"] = "kubernetes.kubelet is not set, such as https://127.0.0.1:10250"
    try:
        if config.api == _OFF:
            raise SourceError("kubernetes.api is off")
        if config.api == _AUTO:
            server = server_in_cluster()
        else:
            server = Server(config.api, token, authority)
        sources["api"] = Api(server, node_name(config.node))
    except SourceError as error:
        missing["api"] = str(error)
    return sources, missing
