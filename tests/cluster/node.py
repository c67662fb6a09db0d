"""One node with a control plane: etcd, the API server, its controllers, the scheduler, containerd
and the kubelet, each a process that this one starts and ends.

They share a network namespace of their own. Of the machine, only that namespace, one directory, and
the cgroups of the pods change, and all of them are removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import yaml

from deploy.image import oci
from deploy.image.layer import layer
from tests.support import ROOT, wait_until

NODE: Final = "node-a"
ADDRESS: Final = "10.213.0.1"  # of the node, in its network namespace
TOKEN: Final = "cluster-admin-of-a-test"
_SERVER: Final = f"https://{ADDRESS}:6443"
_PAUSE: Final = "localhost/pause:1"
_TOOLS: Final = ROOT / "build/kubernetes"
_START_S: Final = 300.0  # a busy machine
_LOGS: Final = Path("/var/log/pods")  # the kubelet writes them nowhere else
_PAUSE_SOURCE: Final = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


class Output:
    """What a process has printed so far, as lines of JSON."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines."""
        size = os.fstat(self._file.fileno()).st_size
        whole, _, _ = os.pread(self._file.fileno(), size, 0).decode().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


class Cluster:
    """A running cluster of one node. `built` has Kubernetes' programs, `unpacked` Debian's."""

    def __init__(self, directory: Path, built: Path, unpacked: Path) -> None:
        self.directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self._built, self._unpacked = built, unpacked
        self._name = f"coral-{os.getpid()}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._others_logs = set(_LOGS.glob("*"))

    def start(self) -> None:
        """Starts everything; returns once the node is ready."""
        self._make_network()
        self._write_files()
        self._start("etcd", self._unpacked / "usr/bin/etcd", *self._etcd())
        self._start("apiserver", self._built / "kube-apiserver", *self._apiserver())
        wait_until(lambda: self.try_kubectl("get", "--raw", "/readyz"), _START_S)
        client = f"--kubeconfig={self.kubeconfig}"
        keys = f"--service-account-private-key-file={self.directory}/accounts.key"
        self._start("controllers", self._built / "kube-controller-manager", client, keys)
        self._start("scheduler", self._built / "kube-scheduler", client)
        containerd = self._unpacked / "usr/bin/containerd"
        self._start("containerd", containerd, "--config", self.directory / "containerd.toml")
        wait_until((self.directory / "containerd.sock").is_socket, _START_S)
        pause = self._pause_image()
        wait_until(lambda: self._can_import(pause), _START_S)
        self._start("kubelet", self._built / "kubelet", *self._kubelet())
        wait_until(lambda: self.try_kubectl("get", "node", NODE), _START_S)
        self.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", f"--timeout={_START_S:g}s")

    def _make_network(self) -> None:
        run("ip", "netns", "add", self._name)
        for command in (
            ("link", "set", "lo", "up"),
            ("link", "add", "node", "type", "veth", "peer", "name", "nobody"),
            ("link", "set", "nobody", "up"),
            ("address", "add", f"{ADDRESS}/24", "dev", "node"),
            ("link", "set", "node", "up"),
            ("route", "add", "default", "dev", "node"),  # the kubelet looks for one
        ):
            run("ip", "-n", self._name, *command)

    def _start(self, name: str, *command: str | Path) -> None:
        """Starts one of the parts. `ip netns exec` would hide the mounts of the cgroups."""
        path = f"{self._unpacked}/usr/bin:{os.environ['PATH']}"  # containerd's shim
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    ["nsenter", f"--net=/run/netns/{self._name}", *command],
                    stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0,
                    env={**os.environ, "PATH": path},
                )
            )  # fmt: skip

    def _etcd(self) -> list[str]:
        clients, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        return [
            *(f"--data-dir={self.directory}/etcd", "--unsafe-no-fsync"),
            *(f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}"),
            *(f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}"),
            f"--initial-cluster=default={peers}",
        ]  # fmt: skip

    def _apiserver(self) -> list[str]:
        at = self.directory
        return [
            *("--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range=10.214.0.0/24"),
            *(f"--advertise-address={ADDRESS}", f"--bind-address={ADDRESS}", "--secure-port=6443"),
            *(f"--cert-dir={at}/apiserver", f"--token-auth-file={at}/tokens.csv"),
            *("--authorization-mode=RBAC", "--allow-privileged=true", "--profiling=false"),
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={_SERVER}",
            f"--service-account-key-file={at}/accounts.pub",
            f"--service-account-signing-key-file={at}/accounts.key",
        ]  # fmt: skip

    def _kubelet(self) -> list[str]:
        at = self.directory
        return [
            *(f"--kubeconfig={self.kubeconfig}", f"--config={at}/kubelet.yaml"),
            *(f"--hostname-override={NODE}", f"--node-ip={ADDRESS}", f"--root-dir={at}/kubelet"),
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{at}/containerd.sock",
            f"--cert-dir={at}/kubelet-certificates",
        ]  # fmt: skip

    def _write_files(self) -> None:
        at = self.directory
        run("openssl", "genrsa", "-out", at / "accounts.key", "2048")
        run("openssl", "rsa", "-in", at / "accounts.key", "-pubout", "-out", at / "accounts.pub")
        (at / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
        named = {"name": "cluster"}
        files: dict[str, object] = {
            "kubeconfig": {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [
                    named | {"cluster": {"server": _SERVER, "insecure-skip-tls-verify": True}}
                ],
                "users": [named | {"user": {"token": TOKEN}}],
                "contexts": [named | {"context": {"cluster": "cluster", "user": "cluster"}}],
                "current-context": "cluster",
            },
            "kubelet.yaml": {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
                "authorization": {"mode": "AlwaysAllow"},
                "cgroupDriver": "cgroupfs",
                "cgroupRoot": "/",
                "cgroupsPerQOS": False,
                "enforceNodeAllocatable": [],
                "failSwapOn": False,
                "makeIPTablesUtilChains": False,
                "resolvConf": "",
                "staticPodPath": str(at / "static"),
                "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%"},
                "imageGCHighThresholdPercent": 100,
            },
            "cni/10-bridge.conflist": {
                "cniVersion": "0.4.0",
                "name": "pods",
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": "pods",
                        "isGateway": True,
                        "ipam": {
                            "type": "host-local",
                            "dataDir": str(at / "addresses"),
                            "ranges": [[{"subnet": "10.215.0.0/24"}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                        },
                    }
                ],
            },
        }
        for name, content in files.items():
            path = at / name
            path.parent.mkdir(exist_ok=True)
            path.write_text((json.dumps if "cni" in name else yaml.safe_dump)(content))
        (at / "static").mkdir()
        (at / "containerd.toml").write_text(self._containerd())

    def _containerd(self) -> str:
        at = self.directory
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return "\n".join(
            [
                "version = 2",
                f'root = "{at}/containerd"',
                f'state = "{at}/run"',
                "oom_score = 0",
                f'[grpc]\naddress = "{at}/containerd.sock"',
                f"[{cri}]",
                f'sandbox_image = "{_PAUSE}"',
                "restrict_oom_score_adj = true",  # it needs CAP_SYS_RESOURCE to lower one
                f'[{cri}.cni]\nbin_dir = "{self._unpacked}/usr/lib/cni"\nconf_dir = "{at}/cni"',
                f'[{cri}.containerd]\nsnapshotter = "{_snapshotter(at)}"',
            ]
        )

    def _pause_image(self) -> Path:
        """An image of the one program that every pod starts with."""
        root = self.directory / "pause"
        root.mkdir(exist_ok=True)
        source = self.directory / "pause.c"
        source.write_text(_PAUSE_SOURCE)
        run("cc", "-static", "-Os", "-o", root / "pause", source)
        path = self.directory / "pause.tar"
        oci.write(
            oci.image(_PAUSE, layer(root), os.uname().machine, {}, entrypoint=["/pause"]), path
        )
        return path

    def _can_import(self, archive: Path) -> bool:
        ctr = (self._unpacked / "usr/bin/ctr", "--address", self.directory / "containerd.sock")
        command = ("--namespace", "k8s.io", "images", "import", archive)
        return subprocess.run([*ctr, *command], check=False, capture_output=True).returncode == 0

    def load(self, archive: Path) -> None:
        """Gives the node an image."""
        assert self._can_import(archive), (self.directory / "containerd.log").read_text()[-2000:]

    def try_kubectl(self, *arguments: str | Path) -> str:
        """What kubectl prints; nothing, if it fails."""
        done = self._kubectl(*arguments)
        return done.stdout if done.returncode == 0 else ""

    def kubectl(self, *arguments: str | Path, said: str | None = None) -> str:
        """What kubectl prints, given SAID on its input."""
        done = self._kubectl(*arguments, said=said)
        assert done.returncode == 0, f"{arguments}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def _kubectl(
        self, *arguments: str | Path, said: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        inside = ("nsenter", f"--net=/run/netns/{self._name}", _TOOLS / "kubectl")
        return subprocess.run(
            [*inside, f"--kubeconfig={self.kubeconfig}", *arguments],
            input=said, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def helm(self, *arguments: str | Path) -> str:
        """What helm prints."""
        inside = ("nsenter", f"--net=/run/netns/{self._name}", _TOOLS / "helm")
        return run(*inside, f"--kubeconfig={self.kubeconfig}", *arguments)

    @contextmanager
    def begin(self, *arguments: str | Path) -> Iterator[Output]:
        """kubectl, for the duration of the block."""
        inside = ("nsenter", f"--net=/run/netns/{self._name}", _TOOLS / "kubectl")
        with tempfile.TemporaryFile(dir=self.directory) as out:
            process = subprocess.Popen(
                [*inside, f"--kubeconfig={self.kubeconfig}", *arguments], stdout=out
            )
            try:
                yield Output(out)
            finally:
                process.terminate()
                process.wait()

    def get(self, *arguments: str) -> Any:
        """What kubectl gets, as data."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def stop(self) -> None:
        """Ends every process of the cluster and removes what it made."""
        with suppress(AssertionError):
            # The pods first: their processes are not this one's children.
            self._remove_pods()
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (mounted := line.split()[1]).startswith(f"{self.directory}/"):
                subprocess.run(["umount", "--lazy", mounted], check=False)
        subprocess.run(["ip", "netns", "delete", self._name], check=False)
        for logs in set(_LOGS.glob("*")) - self._others_logs:
            shutil.rmtree(logs, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_pods(self) -> None:
        for path in (self.directory / "static").glob("*"):
            path.unlink()
        everything = ("daemonsets,deployments,pods", "--all", "--all-namespaces", "--timeout=60s")
        self._kubectl("delete", *everything)
        wait_until(lambda: not self._shims(), 60)

    def _shims(self) -> list[str]:
        """The containers that still run."""
        return [
            str(it) for it in (self.directory / "run").glob("io.containerd.runtime.v2.task/*/*")
        ]


def _snapshotter(directory: Path) -> str:
    """overlayfs, or copies where it cannot be mounted (on an overlay, say)."""
    filesystem = run("stat", "--file-system", "--format=%T", directory).strip()
    return "native" if "overlay" in filesystem else "overlayfs"


def run(*command: str | Path) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def unpacked(cache: Path, packages: Sequence[str]) -> Path:
    """Debian's PACKAGES, unpacked below CACHE: installed they would start services of their own."""
    target = cache / "unpacked"
    if not target.exists():
        work = Path(tempfile.mkdtemp(dir=cache))
        apt = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download")
        subprocess.run([*apt, *packages], cwd=work, check=True)
        for package in work.glob("*.deb"):
            run("dpkg-deb", "--extract", package, work / "root")
        (work / "root").rename(target)
        shutil.rmtree(work)
    return target


@contextmanager
def cluster(cache: Path) -> Iterator[Cluster]:
    """A cluster for the duration of the block, from the programs in CACHE, which are built if they
    are not there."""
    kubernetes = cache / "kubernetes"
    kubernetes.mkdir(parents=True, exist_ok=True)
    command = ("nice", "-n", "19", ROOT / "tests/cluster/kubernetes", kubernetes)
    subprocess.run(command, check=True)
    programs = unpacked(cache, ("containerd", "containernetworking-plugins", "etcd-server"))
    # Short: sockets' paths have at most 107 bytes.
    running = Cluster(Path(tempfile.mkdtemp(prefix="cc-", dir=cache)), kubernetes / "bin", programs)
    try:
        running.start()
        yield running
    finally:
        running.stop()
