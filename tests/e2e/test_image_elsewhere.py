"""The image elsewhere: for another processor, and in a registry, signed."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from deploy.image import signing
from deploy.image.environment import HOME
from tests.containers import blob, build
from tests.e2e.test_image import IMPORT_ALL, PROGRAMS, PYTHON
from tests.http_servers import free_port
from tests.support import ROOT, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]  # they build images

ARM64: Final = "aarch64"
QEMU: Final = ROOT / "build/qemu/qemu-aarch64-static"
REGISTRY: Final = ROOT / "build/registry/docker-registry"
COSIGN: Final = ROOT / "build/cosign/cosign"
EM_AARCH64: Final = 183  # e_machine of elf(5)
EM_BPF: Final = 247


@pytest.mark.skipif(platform.machine() == ARM64, reason="this is such a machine")
def test_the_image_for_arm64_has_nothing_of_this_machine_and_imports_everything(
    tmp_path: Path,
) -> None:
    """Python runs by QEMU's emulation of system calls, which has no bpf(2)."""
    built = build(tmp_path / "built", tmp_path / "key.pem", machine=ARM64)
    root = built.unpack(tmp_path / "root")
    with tarfile.open(built.archive) as image:
        configuration = json.loads(blob(image, built.named["id"]))
    assert configuration["architecture"] == "arm64"
    (package,) = built.directory.glob("*_arm64.deb")
    assert said("dpkg-deb", "--field", package, "Architecture") == "arm64\n"
    files = [it for it in root.rglob("*") if it.is_file() and not it.is_symlink()]
    machines = Counter(
        int.from_bytes(head[18:20], "little")
        for head in (path.read_bytes()[:20] for path in files)
        if head.startswith(b"\x7fELF")
    )
    assert set(machines) == {EM_AARCH64, EM_BPF}
    assert machines[EM_BPF] == len(list(root.glob(f"{PROGRAMS}/*/*.bpf.o")))
    for name in ("lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu/libbpf.so.1"):
        assert (root / name).exists()
    shutil.copy(QEMU, root / "qemu")
    inside = ("chroot", root, "/qemu", PYTHON, "-P")
    assert int(said(*inside, "-c", IMPORT_ALL)) > 100
    assert said(*inside, f"/{HOME}/bin/coral", "--version").startswith("coral, version ")


def test_skopeo_pushes_the_image_and_its_signature_and_cosign_verifies_them(
    tmp_path: Path,
) -> None:
    built = build(tmp_path / "built", tmp_path / "key.pem")
    digest = built.named["digest"]
    signature = f"{digest.replace(':', '-')}.sig"
    with registry(tmp_path) as address:
        to = f"docker://{address}/coral-agent"
        push = ("skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false")
        for name, tag in (("coral", "0.1.0"), ("coral.signature", signature)):
            said(*push, f"oci-archive:{built.directory / name}.oci.tar", f"{to}:{tag}")
        inspected = said("skopeo", "inspect", "--tls-verify=false", f"{to}:0.1.0")
        assert json.loads(inspected)["Digest"] == digest
        verify = (COSIGN, "verify", "--insecure-ignore-tlog=true", "--allow-insecure-registry")
        key = built.directory / "coral.pub"
        verified = json.loads(said(*verify, "--key", key, f"{address}/coral-agent:0.1.0"))
        assert verified[0]["critical"]["image"]["docker-manifest-digest"] == digest
        other = signing.key_at(tmp_path / "other.pem")
        (tmp_path / "other.pub").write_text(signing.public_key(other))
        refused = subprocess.run(
            [*verify, "--key", tmp_path / "other.pub", f"{address}/coral-agent:0.1.0"],
            capture_output=True, check=False,
        )  # fmt: skip
        assert refused.returncode != 0


@contextmanager
def registry(directory: Path) -> Iterator[str]:
    """A registry of images on loopback; yields its address."""
    port = free_port()
    configuration = directory / "registry.yml"
    configuration.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with subprocess.Popen(
        [REGISTRY, "serve", configuration], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: answers(port))
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def said(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
