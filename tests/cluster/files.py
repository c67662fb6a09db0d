"""What the parts of a cluster of one node read: keys, a kubeconfig, and how each is configured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Final

import yaml

ADDRESS: Final = "10.213.0.1"  # of the node, in its network namespace
SERVICE_ADDRESS: Final = "10.214.0.1"  # of the API server
SERVER: Final = f"https://{SERVICE_ADDRESS}"
TOKEN: Final = "cluster-admin-of-a-test"
PAUSE: Final = "localhost/pause:1"


def run(*command: str | Path) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def write_files(at: Path, cgroup: str, plugins: Path) -> None:
    """Writes all files into the directory AT. Pods are to be in CGROUP; PLUGINS are those of
    containerd for networks."""
    run("openssl", "genrsa", "-out", at / "accounts.key", "2048")
    run("openssl", "rsa", "-in", at / "accounts.key", "-pubout", "-out", at / "accounts.pub")
    (at / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    (at / "static").mkdir()
    (at / "cni").mkdir()
    (at / "cni/10-bridge.conflist").write_text(json.dumps(_network(at)))
    (at / "kubeconfig").write_text(yaml.safe_dump(_kubeconfig()))
    (at / "kubelet.yaml").write_text(yaml.safe_dump(_kubelet(at, cgroup)))
    (at / "containerd.toml").write_text(_containerd(at, plugins))


def _kubeconfig() -> dict[str, object]:
    named = {"name": "cluster"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [named | {"cluster": {"server": SERVER, "insecure-skip-tls-verify": True}}],
        "users": [named | {"user": {"token": TOKEN}}],
        "contexts": [named | {"context": {"cluster": "cluster", "user": "cluster"}}],
        "current-context": "cluster",
    }


def _kubelet(at: Path, cgroup: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "resolvConf": "",
        "staticPodPath": str(at / "static"),
        "fileCheckFrequency": "1s",
        "nodeStatusUpdateFrequency": "1s",
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
    }


def _network(at: Path) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "dataDir": str(at / "addresses"),
        "ranges": [[{"subnet": "10.215.0.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipam": addresses}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}


def _containerd(at: Path, plugins: Path) -> str:
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return "\n".join(
        [
            "version = 2",
            f'root = "{at}/containerd"',
            f'state = "{at}/run"',
            "oom_score = 0",
            f'[grpc]\naddress = "{at}/containerd.sock"',
            f"[{cri}]",
            f'sandbox_image = "{PAUSE}"',
            "restrict_oom_score_adj = true",  # it needs CAP_SYS_RESOURCE to lower one
            f'[{cri}.cni]\nbin_dir = "{plugins}"\nconf_dir = "{at}/cni"',
            f'[{cri}.containerd]\nsnapshotter = "{_snapshotter(at)}"',
        ]
    )


def _snapshotter(directory: Path) -> str:
    """overlayfs, or copies where it cannot be mounted (on an overlay, say)."""
    filesystem = run("stat", "--file-system", "--format=%T", directory).strip()
    return "native" if "overlay" in filesystem else "overlayfs"
