"""`python -P -m deploy.image [image] [deb] [--machine MACHINE] [--key FILE]`: makes the image and
what belongs to it, the Debian package, or both."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from deploy.image import bill, deb, debian, environment, oci, signing
from deploy.image.elf import needed
from deploy.image.environment import PACKAGES, ROOT
from deploy.image.layer import Layer, layer

_BUILD: Final = ROOT / "build/image"
_REPOSITORY: Final = "localhost/coral-agent"


def main() -> None:
    """Parses the command line and makes what it asks for."""
    parser = argparse.ArgumentParser(prog="deploy.image", description=__doc__)
    parser.add_argument("what", nargs="+", choices=("image", "deb"), help="what to make")
    parser.add_argument(
        "--machine", default=platform.machine(), choices=oci.ARCHITECTURES,
        help="the processor that it is for (this machine's)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path,
        help="where to (build/image; for another processor build/image/MACHINE)",
    )  # fmt: skip
    parser.add_argument(
        "--newest", action="store_true",
        help="take Debian's packages in the versions that apt has now, not those in debian.lock",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, default=_BUILD / "cache", help="packages, wheels")
    parser.add_argument(
        "--key", type=Path, default=_BUILD / "keys/coral.pem",
        help="an Ed25519 private key in PEM; made if it does not exist",
    )  # fmt: skip
    parser.add_argument("--name", default=_REPOSITORY, help=f"the repository ({_REPOSITORY})")
    given = parser.parse_args()
    machine: str = given.machine
    own = _BUILD if machine == platform.machine() else _BUILD / machine
    output: Path = given.output or own
    output.mkdir(parents=True, exist_ok=True)
    key = signing.key_at(given.key)
    with tempfile.TemporaryDirectory() as work:
        wheel = environment.wheel(Path(work), machine)
        version = wheel.name.split("-")[1]
        root = Path(work, "root")
        others = environment.fetch(given.cache / "wheels" / machine, machine)
        environment.install(root, [wheel, *others], key)
        environment.compile_modules(root, PACKAGES)
        if "deb" in given.what:
            made = deb.build(root, Path(work, "deb"), version, machine, output)
            print(f"{made.name}: {made.stat().st_size / 1e6:.1f} MB")
        if "image" in given.what:
            packages = debian.fetch(given.cache, machine, newest=given.newest)
            _write(_image(root, f"{given.name}:{version}", machine, packages), output, key)


class Made(NamedTuple):
    """An image, its layer, and what that consists of."""

    image: oci.Image
    layer: Layer
    parts: Sequence[bill.Component]


def _image(root: Path, name: str, machine: str, packages: Sequence[Path]) -> Made:
    """The image NAME, for MACHINE, of our environment in ROOT and Debian's PACKAGES."""
    debian.lay_out(root)
    for package in packages:
        debian.unpack(package, root)
    if missing := debian.unresolved(root, needed):
        raise SystemExit("libraries are missing from the image:\n" + "\n".join(missing))
    environment.compile_modules(root, Path("usr/lib", debian.PYTHON))
    content = layer(root)
    labels = {
        "org.opencontainers.image.title": "coral-agent",
        "org.opencontainers.image.version": name.rpartition(":")[2],
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": "scratch",
    }
    made = oci.image(
        name, content, machine, labels,
        entrypoint=["/usr/bin/coral"], command=["agent", "--log-format", "json"],
    )  # fmt: skip
    return Made(made, content, bill.components(root, root / PACKAGES))


def _write(made: Made, output: Path, key: Path) -> None:
    """Writes the image to OUTPUT, its signature, and its signed bills of materials."""
    image, content = made.image, made.layer
    oci.write(image, output / "coral.oci.tar")
    oci.write(signing.image_signature(image, key), output / "coral.signature.oci.tar")
    (output / "coral.pub").write_text(signing.public_key(key))
    named = {"name": image.name, "digest": image.digest, "id": image.image_id}
    (output / "image.json").write_text(json.dumps(named, indent=2) + "\n")
    for form, document in (("spdx", bill.spdx), ("cdx", bill.cyclonedx)):
        text = json.dumps(document(image.name, image.digest, made.parts), indent=1) + "\n"
        (output / f"coral.{form}.json").write_text(text)
        signature = signing.signature(text.encode(), key)
        (output / f"coral.{form}.json.sig").write_bytes(signature)
    print(
        f"{image.name}\ndigest {image.digest}\nid     {image.image_id}\n"
        f"{len(content.compressed) / 1e6:.1f} MB compressed, {content.bytes_unpacked / 1e6:.1f} MB "
        f"unpacked, {len(made.parts)} packages"
    )


if __name__ == "__main__":
    main()
