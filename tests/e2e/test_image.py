"""The image: the same twice, small, without a shell, its parts listed and signed, and enough to
work with two capabilities."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import textwrap
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from coral.bpf.loading import ed25519
from coral.bpf.probing.capabilities import NAMES
from deploy.image import debian
from tests.containers import PODS, SERVICES, Built, blob, build, run
from tests.e2e.test_doctor import COLLECTORS, MODES
from tests.support import ROOT

pytestmark = pytest.mark.timeout(600)  # it builds an image, and fetches its packages

MAX_BYTES: Final = 60_000_000
PROGRAMS: Final = Path("usr/lib/coral/lib/python3.11/site-packages/coral/bpf/programs")
CORAL: Final = "/usr/bin/coral"
PYTHON: Final = "/usr/lib/coral/bin/python3"
IMPORT_ALL: Final = textwrap.dedent("""
    import pkgutil, sys, coral
    for module in pkgutil.walk_packages(coral.__path__, "coral."):
        __import__(module.name)
    print(sum(name.startswith("coral.") for name in sys.modules))
""")


class Image(NamedTuple):
    """A build, the key that it was signed with, and its files."""

    built: Built
    key: Path
    root: Path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    work = tmp_path_factory.mktemp("image")
    key = work / "key.pem"
    built = build(work / "built", key)
    return Image(built, key, built.unpack(work / "root"))


@pytest.mark.soak  # it builds a second one
def test_two_builds_make_the_same_image_and_package_to_the_byte(
    image: Image, tmp_path: Path
) -> None:
    second = build(tmp_path / "second", image.key, umask=0o077)
    assert image.built.named == second.named
    names = {path.name for path in image.built.directory.iterdir()}
    assert any(name.endswith(".deb") for name in names)
    for name in names:
        same = (second.directory / name).read_bytes()
        assert (image.built.directory / name).read_bytes() == same, name


def test_the_image_is_smaller_than_60_mb_and_has_no_shell(image: Image) -> None:
    assert image.built.archive.stat().st_size < MAX_BYTES
    programs = {path.name for path in (image.root / "usr/bin").iterdir()}
    assert programs == {"coral", "python3.11"}
    assert not list((image.root / "usr/sbin").iterdir())


def test_every_module_has_its_bytecode_whose_sources_nobody_checks(image: Image) -> None:
    compiled = [*image.root.glob("usr/lib/coral/lib/**/*.pyc")]
    flags = {int.from_bytes(path.read_bytes()[4:8], "little") for path in compiled}
    assert flags == {0b01}  # PEP 552: by hash, unchecked
    assert {path.name.partition(".")[0] for path in compiled} == {
        path.stem for path in image.root.glob("usr/lib/coral/lib/**/*.py")
    }


def test_every_file_is_roots_and_none_is_set_user_id_or_writable_by_others(image: Image) -> None:
    with tarfile.open(image.built.archive) as archive:
        manifest = json.loads(blob(archive, image.built.named["digest"]))
        file = archive.extractfile(f"blobs/{manifest['layers'][0]['digest'].replace(':', '/')}")
        with tarfile.open(fileobj=file, mode="r:gz") as layer:
            members = layer.getmembers()
    assert {(member.uid, member.gid, member.mtime) for member in members} == {(0, 0, 0)}
    loose = [it.name for it in members if it.mode & 0o6022 and not it.issym()]
    assert loose == ["tmp"]


# Bills of materials


def named(bill: Mapping[str, Any], field: str, version: str) -> dict[str, str]:
    return {part["name"]: part[version] for part in bill[field]}


def test_both_bills_list_every_debian_package_and_every_python_distribution(
    image: Image,
) -> None:
    directory = image.built.directory
    spdx = json.loads((directory / "coral.spdx.json").read_text())
    cyclonedx = json.loads((directory / "coral.cdx.json").read_text())
    listed = named(cyclonedx, "components", "version")
    assert named(spdx, "packages", "versionInfo") == listed | {
        image.built.named["name"]: image.built.named["digest"]
    }
    pinned = re.findall(
        r"^(\S+)==(\S+)", (ROOT / "deploy/image/requirements.txt").read_text(), re.MULTILINE
    )
    assert dict(pinned).items() <= listed.items()
    assert {"libc6", "libssl3", "libbpf1", "python3.11-minimal", "coral-ebpf-agent"} <= set(listed)


def test_debians_packages_are_in_it_in_the_versions_of_the_lock(image: Image) -> None:
    if not image.built.is_locked:
        pytest.skip("Debian's mirrors have newer packages by now: make image-lock")
    bill = json.loads((image.built.directory / "coral.cdx.json").read_text())
    locked = {it.name: it.version for it in debian.locked(platform.machine())}
    assert locked.items() <= named(bill, "components", "version").items()


# Signatures


def openssl_accepts(content: Path, signature: Path, public_key: Path) -> bool:
    command = ("openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public_key)
    done = subprocess.run(
        [*command, "-in", content, "-sigfile", signature], capture_output=True, check=False
    )
    return done.returncode == 0


def test_openssl_verifies_the_bills_and_refuses_a_changed_one(image: Image, tmp_path: Path) -> None:
    directory = image.built.directory
    for name in ("coral.spdx.json", "coral.cdx.json"):
        signature, key = directory / f"{name}.sig", directory / "coral.pub"
        assert openssl_accepts(directory / name, signature, key)
        changed = tmp_path / name
        changed.write_text((directory / name).read_text().replace("libc6", "libc7"))
        assert not openssl_accepts(changed, signature, key)


def test_the_images_signature_names_its_digest_as_cosign_expects(
    image: Image, tmp_path: Path
) -> None:
    with tarfile.open(image.built.directory / "coral.signature.oci.tar") as archive:
        index = archive.extractfile("index.json")
        assert index
        (entry,) = json.load(index)["manifests"]
        manifest = json.loads(blob(archive, entry["digest"]))
        (layer,) = manifest["layers"]
        payload = blob(archive, layer["digest"])
    digest = image.built.named["digest"]
    tag = f"{digest.replace(':', '-')}.sig"
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == tag
    critical = json.loads(payload)["critical"]
    assert critical["image"] == {"docker-manifest-digest": digest}
    assert critical["type"] == "cosign container image signature"
    (tmp_path / "payload").write_bytes(payload)
    signature = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])
    (tmp_path / "signature").write_bytes(signature)
    key = image.built.directory / "coral.pub"
    assert openssl_accepts(tmp_path / "payload", tmp_path / "signature", key)


def test_the_programs_are_listed_and_the_list_is_signed_by_the_key(image: Image) -> None:
    programs = image.root / PROGRAMS
    listed = (programs / "objects.sha256").read_text()
    names = [line.split("  ")[1] for line in listed.splitlines()]
    assert names == [path.name for path in sorted(programs.glob("*/*.bpf.o"))]
    key, signature = (
        base64.b64decode((programs / name).read_text())
        for name in ("objects.pub", "objects.sha256.sig")
    )
    assert ed25519.verify(signature, listed.encode(), key)


# In a container


def examined(
    root: Path, bundle: Path, *capabilities: str, pure_v2: bool = False
) -> dict[str, tuple[str, str]]:
    """`coral doctor --json` in a container: by check, how it came out and what was found."""
    done = run(root, bundle, (CORAL, "doctor", "--json"), capabilities, pure_v2=pure_v2)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    return {it["check"]: (it["status"], it["found"]) for it in checks}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("capabilities", "pure_v2"),
    [
        pytest.param(PODS, False, id="two-hybrid"),
        pytest.param(PODS, True, marks=pytest.mark.soak, id="two-cgroup v2"),
        pytest.param(SERVICES, False, marks=pytest.mark.soak, id="five-hybrid"),
        pytest.param(SERVICES, True, id="five-cgroup v2"),
    ],
)
def test_the_doctor_finds_everything_in_order_inside(
    image: Image, tmp_path: Path, capabilities: tuple[str, ...], pure_v2: bool
) -> None:
    reading = (PYTHON, "-c", "print(open('/proc/self/status').read())")
    status = run(image.root, tmp_path / "status", reading, capabilities, pure_v2=pure_v2).stdout
    (mask,) = re.findall(r"CapEff:\s+(\w+)", status)
    assert {name for bit, name in enumerate(NAMES) if int(mask, 16) >> bit & 1} == {*capabilities}
    checks = examined(image.root, tmp_path / "bundle", *capabilities, pure_v2=pure_v2)
    for name, mode in product(COLLECTORS, MODES):
        status, found = checks[f"{name}, {mode}"]
        assert status == "ok"
        assert found.startswith(f"{COLLECTORS[name]}, the first after ")
    assert checks["cpu_profile, summaries"][0] == "ok"
    assert checks["left behind"][0] == "ok"
    assert checks["cgroup2"][0] == "ok"


def test_every_module_can_be_imported_inside(image: Image, tmp_path: Path) -> None:
    done = run(image.root, tmp_path / "bundle", (PYTHON, "-P", "-c", IMPORT_ALL), ())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_there_is_no_colony_inside_which_is_said_in_a_line(image: Image, tmp_path: Path) -> None:
    done = run(image.root, tmp_path / "bundle", (CORAL, "colony"), ())
    assert done.returncode == 1
    assert done.stderr == (
        "coral: the colony needs coral.colony: pip install 'coral-ebpf-agent[colony]'\n"
    )


def test_other_programs_are_refused_by_a_line_with_the_remedy(image: Image, tmp_path: Path) -> None:
    elsewhere = {"CORAL_BPF_OBJECTS": "/tmp"}
    done = run(image.root, tmp_path / "bundle", (CORAL, "agent"), PODS, environment=elsewhere)
    assert done.returncode == 2
    assert done.stderr == (
        "coral agent: CORAL_BPF_OBJECTS is set, but this installation loads only the programs that "
        "were signed with it: unset CORAL_BPF_OBJECTS\n"
    )


@pytest.mark.usefixtures("nothing_left")
def test_a_program_that_was_changed_is_refused_and_the_others_work(
    image: Image, tmp_path: Path
) -> None:
    """A whole program, with a seal of its own that is right: only the signature tells."""
    root = tmp_path / "root"
    shutil.copytree(image.root, root, symlinks=True, copy_function=os.link)
    changed = root / PROGRAMS / "syscall_stats/syscall_stats.bpf.o"
    changed.unlink()
    shutil.copyfile(root / PROGRAMS / "tcp_metrics/tcp_metrics.bpf.o", changed)
    done = run(root, tmp_path / "bundle", (CORAL, "doctor", "--json"), PODS)
    checks = {it["check"]: it for it in json.loads(done.stdout)["checks"]}
    told = "opening syscall_stats.bpf.o: it is not the program that was signed"
    assert told in checks["syscall_stats, summaries"]["found"]
    assert checks["tcp_metrics, summaries"]["status"] == "ok"


def test_a_key_from_outside_decides_and_refuses_programs_that_it_did_not_sign(
    image: Image, tmp_path: Path
) -> None:
    own = (image.root / PROGRAMS / "objects.pub").read_text().strip()
    other = base64.b64encode(bytes(31) + b"\x01").decode()
    for key, is_ok in ((own, True), (other, False)):
        done = run(
            image.root, tmp_path / f"bundle-{is_ok}", (CORAL, "doctor", "--json"), PODS,
            environment={"CORAL_BPF_KEY": key},
        )  # fmt: skip
        assert ("is not by the key of this installation" in done.stdout) is not is_ok
        assert (done.returncode == 0) is is_ok


# The Debian package


def test_the_debian_package_unpacks_to_the_same_environment(image: Image, tmp_path: Path) -> None:
    (package,) = image.built.directory.glob("*.deb")
    root = tmp_path / "root"
    subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    for path in (image.root / "usr/lib/coral").rglob("*"):
        if path.is_file() and not path.is_symlink():
            same = root / path.relative_to(image.root)
            assert same.read_bytes() == path.read_bytes(), path
    unit = (root / "lib/systemd/system/coral-agent.service").read_text()
    assert "\nExecStart=/usr/bin/coral agent --log-format json --config /etc/coral/" in unit
    fields = ("Package", "Depends", "Version")
    told = subprocess.run(
        ["dpkg-deb", "--field", package, *fields], capture_output=True, text=True, check=True
    ).stdout
    assert "Package: coral-agent\n" in told
    assert "libbpf1" in told
