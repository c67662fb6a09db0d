"""The image as tests use it: built by the recipe of `make image`, unpacked, and run by runc with
exactly the capabilities of a profile."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support import ROOT

PODS: Final = ("CAP_BPF", "CAP_PERFMON")
SERVICES: Final = (*PODS, "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_IPC_LOCK")
CACHE: Final = ROOT / "build/image/cache"
# A cgroup v2 hierarchy alone, as on a machine that has booted with it.
_PURE_V2: Final = (
    *("unshare", "--mount", "sh", "-ec"),
    'umount --recursive /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "$@"',
    "sh",
)


@dataclass(frozen=True)
class Built:
    """What one build wrote to its directory."""

    directory: Path
    is_locked: bool = True
    """Whether Debian's packages are those of the lock; the mirrors may have newer ones by now."""

    @property
    def archive(self) -> Path:
        """The image."""
        return self.directory / "coral.oci.tar"

    @property
    def named(self) -> Mapping[str, str]:
        """Its name, digest and id."""
        said: dict[str, str] = json.loads((self.directory / "image.json").read_text())
        return said

    def unpack(self, root: Path) -> Path:
        """Its files, in the directory ROOT."""
        with tarfile.open(self.archive) as image:
            manifest = blob(image, self.named["digest"])
            (layer,) = json.loads(manifest)["layers"]
            file = image.extractfile(_path(layer["digest"]))
            with tarfile.open(fileobj=file, mode="r:gz") as files:
                files.extractall(root)
        return root


def blob(image: tarfile.TarFile, digest: str) -> bytes:
    """The blob of that digest in an archive."""
    file = image.extractfile(_path(digest))
    assert file
    return file.read()


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def build(
    directory: Path, key: Path, umask: int = 0o022, machine: str = platform.machine()
) -> Built:
    """Builds the image and the Debian package for MACHINE into DIRECTORY, signed by KEY. What apt
    and pip fetched for the last build serves the next."""
    command = [sys.executable, "-P", "-m", "deploy.image", "image", "deb", "--machine", machine]
    command += ["--output", str(directory), "--key", str(key), "--cache", str(CACHE)]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, umask=umask
        )

    done = run()
    is_locked = "make image-lock" not in done.stderr
    if not is_locked:
        done = run("--newest")
    assert done.returncode == 0, done.stderr
    return Built(directory, is_locked)


def run(
    root: Path,
    bundle: Path,
    command: Sequence[str],
    capabilities: Sequence[str],
    *,
    pure_v2: bool = False,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs COMMAND in a container with the files of ROOT, read-only, as the DaemonSet would: the
    host's processes, a network of its own, CAPABILITIES and no others."""
    bundle.mkdir()
    (bundle / "config.json").write_text(
        json.dumps(_configuration(root, command, capabilities, environment or {}))
    )
    name = f"coral-test-{os.getpid()}-{bundle.name}"
    started = [*(_PURE_V2 if pure_v2 else ()), "runc", "--root", bundle / "state"]
    return subprocess.run(
        [*started, "run", "--bundle", bundle, name],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _configuration(
    root: Path, command: Sequence[str], capabilities: Sequence[str], environment: Mapping[str, str]
) -> Mapping[str, Any]:
    variables = {"PATH": "/usr/bin", "LANG": "C.UTF-8", **environment}
    sets = ("bounding", "effective", "permitted")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(command),
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {name: list(capabilities) for name in sets},
            # Not everybody may raise the limits that runc would otherwise set.
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}],
        },
        "root": {"path": str(root), "readonly": True},
        "hostname": "node",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _tmpfs("/dev"),
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {
                "destination": "/sys/fs/cgroup",
                "type": "bind",
                "source": "/sys/fs/cgroup",
                "options": ["rbind", "ro"],
            },
            _tmpfs("/tmp"),
            _tmpfs("/run/coral"),
        ],
        "linux": {
            "namespaces": [{"type": it} for it in ("mount", "ipc", "uts", "network")],
            "resources": {},
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
        },
    }


def _tmpfs(destination: str) -> Mapping[str, Any]:
    return {
        "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"],
    }  # fmt: skip
