"""Signatures by openssl's command, with an Ed25519 key: of the programs that the agent loads, of
the image as cosign signs it, and of files."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from deploy.image.layer import digest
from deploy.image.oci import Image, artifact

_RAW_KEY_BYTES: Final = 32  # at the end of the key's DER form, RFC 8410
_SIMPLE_SIGNING: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_SIGNATURE: Final = "dev.cosignproject.cosign/signature"


def key_at(path: Path) -> Path:
    """The private key at PATH, which is made if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = path.with_name(f"{path.name}.partial")
        _openssl("genpkey", "-algorithm", "ed25519", "-out", str(unfinished))
        unfinished.chmod(0o600)
        unfinished.rename(path)
    return path


def public_key(key: Path) -> str:
    """The public half of KEY, in PEM."""
    return _openssl("pkey", "-in", str(key), "-pubout").decode()


def raw_public_key(key: Path) -> bytes:
    """The public half of KEY, as the 32 bytes of RFC 8032."""
    return _openssl("pkey", "-in", str(key), "-pubout", "-outform", "DER")[-_RAW_KEY_BYTES:]


def signature(content: bytes, key: Path) -> bytes:
    """The 64 bytes of KEY's signature of CONTENT. The same content always has the same."""
    with tempfile.NamedTemporaryFile() as file:  # openssl needs to know the length
        file.write(content)
        file.flush()
        return _openssl("pkeyutl", "-sign", "-rawin", "-inkey", str(key), "-in", file.name)


def sign_programs(directory: Path, key: Path) -> None:
    """Writes the list of the compiled programs below DIRECTORY with their SHA-256, its signature,
    and the public key. coral/bpf/loading/signed.py reads all three."""
    objects = sorted(directory.glob("*/*.bpf.o"))
    lines = [f"{hashlib.sha256(it.read_bytes()).hexdigest()}  {it.name}\n" for it in objects]
    listed = "".join(lines).encode()
    (directory / "objects.sha256").write_bytes(listed)
    (directory / "objects.sha256.sig").write_text(_base64(signature(listed, key)) + "\n")
    (directory / "objects.pub").write_text(_base64(raw_public_key(key)) + "\n")


def image_signature(image: Image, key: Path) -> Image:
    """What `cosign sign --key` would push beside IMAGE: `cosign verify --key` accepts it in any
    registry to which both are copied."""
    repository = image.name.rpartition(":")[0]
    payload = json.dumps(
        {
            "critical": {
                "identity": {"docker-reference": repository},
                "image": {"docker-manifest-digest": image.digest},
                "type": "cosign container image signature",
            },
            "optional": None,
        },
        separators=(",", ":"),
    ).encode()
    config = json.dumps(
        {
            "architecture": "",
            "config": {},
            "created": "0001-01-01T00:00:00Z",
            "history": [{"created": "0001-01-01T00:00:00Z"}],
            "os": "",
            "rootfs": {"diff_ids": [digest(payload)], "type": "layers"},
        },
        separators=(",", ":"),
    ).encode()
    return artifact(
        f"{repository}:{image.digest.replace(':', '-')}.sig",
        _CONFIG,
        config,
        _SIMPLE_SIGNING,
        payload,
        annotations={_SIGNATURE: _base64(signature(payload, key))},
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _openssl(*arguments: str) -> bytes:
    return subprocess.run(["openssl", *arguments], check=True, stdout=subprocess.PIPE).stdout
