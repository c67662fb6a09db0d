"""The part of the agent's configuration that is about Kubernetes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from coral.agent.config_units import Duration


class Kubernetes(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the agent learns the names of pods and containers."""

    cri: Annotated[
        str,
        Meta(
            description="the container runtime's socket: `auto` looks for one of containerd, "
            "CRI-O, k3s and cri-dockerd; a path; or `off`. The agent only lists pods and containers"
        ),
    ] = "auto"
    kubelet: Annotated[
        str,
        Meta(
            description="the kubelet's address, for its list of pods, such as "
            "`http://127.0.0.1:10255` or `https://127.0.0.1:10250`; empty: it is not asked"
        ),
    ] = ""
    api: Annotated[
        str,
        Meta(
            description="the API server, for the pods of this node alone: `auto` in a pod with a "
            "ServiceAccount that may list and watch pods; an address; or `off`"
        ),
    ] = "auto"
    node: Annotated[
        str, Meta(description="the name of this node in Kubernetes; empty: that in `NODE_NAME`")
    ] = ""
    token_file: Annotated[
        str,
        Meta(
            description="a file with the token for `api` and `kubelet`, which is sent by `https` "
            "alone; empty: that of the pod's ServiceAccount, if there is one"
        ),
    ] = ""
    ca_file: Annotated[
        str,
        Meta(
            description="the certificates that `api` and `kubelet` are checked against; empty: "
            "those of the pod's ServiceAccount, else the system's"
        ),
    ] = ""
    stale_after: Annotated[
        Duration,
        Meta(
            description="for how long what a source said still counts once it does not answer any "
            "more: later, requests for pods are refused unless another source answers"
        ),
    ] = Duration(300)
    pod_label: Annotated[
        bool,
        Meta(
            description="give metrics of pods the label `pod`, too: a series for each pod, which "
            "is many where pods come and go"
        ),
    ] = False
