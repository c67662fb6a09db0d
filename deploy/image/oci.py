"""An image in OCI's layout, in one archive that podman, containerd, skopeo and Docker import:
blobs, each named by its digest, and an index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.image.layer import Layer, digest

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_GZIP_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_EPOCH: Final = "1970-01-01T00:00:00Z"
ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Image:
    """An image, ready to be written. `digest` is what registries know it by, `image_id` what
    container engines do."""

    name: str
    manifest: bytes
    blobs: Mapping[str, bytes]
    image_id: str

    @property
    def digest(self) -> str:
        """The digest of its manifest."""
        return digest(self.manifest)


def image(
    name: str,
    layer: Layer,
    machine: str,
    labels: Mapping[str, str],
    *,
    entrypoint: Sequence[str],
    command: Sequence[str] = (),
) -> Image:
    """The image NAME of one layer, for a MACHINE as uname says it, that runs ENTRYPOINT with the
    words of COMMAND, unless other words are given."""
    config = _json(
        {
            "architecture": ARCHITECTURES[machine],
            "os": "linux",
            "created": _EPOCH,
            "config": {
                "Entrypoint": list(entrypoint),
                "Cmd": list(command),
                "Env": ["PATH=/usr/bin", "LANG=C.UTF-8"],
                "Labels": dict(labels),
                "StopSignal": "SIGTERM",
                "User": "0:0",
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
            "history": [{"created": _EPOCH, "created_by": "make image"}],
        }
    )
    return artifact(
        name, _CONFIG, config, _GZIP_LAYER, layer.compressed, manifest_annotations=labels
    )


def artifact(
    name: str,
    config_type: str,
    config: bytes,
    content_type: str,
    content: bytes,
    *,
    annotations: Mapping[str, str] | None = None,
    manifest_annotations: Mapping[str, str] | None = None,
) -> Image:
    """One blob of content with its configuration; ANNOTATIONS belong to the content."""
    described: dict[str, object] = _descriptor(content_type, content)
    if annotations:
        described["annotations"] = dict(annotations)
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(config_type, config),
        "layers": [described],
    }
    if manifest_annotations:
        manifest["annotations"] = dict(manifest_annotations)
    encoded = _json(manifest)
    blobs = {digest(blob): blob for blob in (config, content, encoded)}
    return Image(name, encoded, blobs, digest(config))


def write(made: Image, path: Path) -> None:
    """Writes the archive. Docker before 25 reads `manifest.json`, which has the same blobs."""
    entry = {
        **_descriptor(MANIFEST, made.manifest),
        "annotations": {
            "io.containerd.image.name": made.name,
            "org.opencontainers.image.ref.name": made.name.rpartition(":")[2],
        },
    }
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [entry]}
    said = json.loads(made.manifest)
    legacy = {
        "Config": _blob(said["config"]["digest"]),
        "RepoTags": [made.name],
        "Layers": [_blob(layer["digest"]) for layer in said["layers"]],
    }
    files = {
        "index.json": _json(index),
        "manifest.json": _json([legacy]),
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        **{_blob(name): blob for name, blob in sorted(made.blobs.items())},
    }
    unfinished = path.with_name(f"{path.name}.partial")
    with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    unfinished.rename(path)


def _blob(name: str) -> str:
    return f"blobs/{name.replace(':', '/')}"


def _descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
