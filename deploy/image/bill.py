"""The bill of materials of an image, as SPDX 2.3 and CycloneDX 1.5: every Debian package by its
paragraph in var/lib/dpkg/status.d, every Python distribution by its METADATA."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from email import message_from_bytes, message_from_string
from email.message import Message
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

_EPOCH: Final = "1970-01-01T00:00:00Z"
_DEBIAN: Final = "debian-12"


class Component(NamedTuple):
    """One package of an image."""

    name: str
    version: str
    purl: str
    licence: str
    supplier: str


def components(root: Path, packages: Path) -> list[Component]:
    """What ROOT consists of: Debian's packages, and Python's in the directory PACKAGES."""
    status = (root / "var/lib/dpkg/status.d").glob("*")
    debian = (
        _of_debian(message_from_string(path.read_text()))
        for path in status
        if path.suffix != ".md5sums"
    )
    python = (_of_python(message_from_bytes(p.read_bytes())) for p in packages.glob("*/METADATA"))
    return sorted((*debian, *python), key=lambda it: it.purl)


def _of_debian(said: Message) -> Component:
    name, version, architecture = said["Package"], said["Version"], said["Architecture"]
    purl = f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}&distro={_DEBIAN}"
    return Component(name, version, purl, "", said["Maintainer"])


def _of_python(said: Message) -> Component:
    name = re.sub(r"[-_.]+", "-", said["Name"]).lower()
    licence = said["License-Expression"] or ""
    return Component(name, said["Version"], f"pkg:pypi/{name}@{said['Version']}", licence, "")


def spdx(name: str, digest: str, parts: Iterable[Component]) -> Mapping[str, object]:
    """The bill of the image NAME with DIGEST as an SPDX document."""
    listed = list(parts)
    packages: list[dict[str, object]] = [
        {
            "SPDXID": _spdx_id(part),
            "name": part.name,
            "versionInfo": part.version,
            "supplier": f"Organization: {part.supplier}" if part.supplier else "NOASSERTION",
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": part.licence or "NOASSERTION",
            "copyrightText": "NOASSERTION",
            "externalRefs": [
                {
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": part.purl,
                }
            ],
        }
        for part in listed
    ]
    image = {
        "SPDXID": "SPDXRef-image",
        "name": name,
        "versionInfo": digest,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "primaryPackagePurpose": "CONTAINER",
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    }
    relations = [("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-image")]
    relations += [("SPDXRef-image", "CONTAINS", _spdx_id(part)) for part in listed]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"https://spdx.org/spdxdocs/{name}-{_uuid(digest)}",
        "creationInfo": {"created": _EPOCH, "creators": ["Tool: coral-make-image"]},
        "packages": [image, *packages],
        "relationships": [
            {"spdxElementId": one, "relationshipType": how, "relatedSpdxElement": other}
            for one, how, other in relations
        ],
    }


def _uuid(digest: str) -> uuid.UUID:
    """The same for the same image."""
    return uuid.uuid5(uuid.NAMESPACE_OID, digest)


def _spdx_id(part: Component) -> str:
    return f"SPDXRef-{hashlib.sha256(part.purl.encode()).hexdigest()[:16]}"


def cyclonedx(name: str, digest: str, parts: Iterable[Component]) -> Mapping[str, object]:
    """The bill of the image NAME with DIGEST as a CycloneDX document."""

    def described(part: Component) -> dict[str, object]:
        said: dict[str, object] = {
            "type": "library",
            "bom-ref": part.purl,
            "name": part.name,
            "version": part.version,
            "purl": part.purl,
        }
        if part.licence:
            said["licenses"] = [{"expression": part.licence}]
        if part.supplier:
            said["supplier"] = {"name": part.supplier}
        return said

    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{_uuid(digest)}",
        "version": 1,
        "metadata": {
            "timestamp": _EPOCH,
            "component": {"type": "container", "bom-ref": digest, "name": name, "version": digest},
        },
        "components": [described(part) for part in parts],
    }
