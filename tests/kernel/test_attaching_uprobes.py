"""Uprobes against a program that says how often it called its function, and with what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from coral.bpf import AttachError, BpfObject, probe
from coral.bpf.attaching.elf import function_offsets
from coral.bpf.attaching.uprobes import ProcessFile, Uprobes
from tests.attaching import FUNCTION, Called, toy
from tests.support import ROOT, built, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

ENTERED, LEFT = "function_entered", "function_left"


def watching(path: Path, tgid: int, *, many: bool = False) -> BpfObject:
    options = {"wanted_tgid": tgid}
    if many:
        return BpfObject(
            path, programs=(), walks=(ENTERED, LEFT), options=options, many_places=True
        )
    return toy(path, ENTERED, LEFT, **options)


@pytest.fixture(params=[False, True], ids=["each", "many"])
def many(request: pytest.FixtureRequest) -> bool:
    """Whether programs are attached by a link for many places."""
    if request.param and not (feature := probe()["uprobe_multi"]).available:
        pytest.skip(feature.reason)
    return bool(request.param)


def counted(bpf_object: BpfObject) -> dict[str, object]:
    _, values = bpf_object.map("calls").read()
    return {name: values[name][0].tolist() for name in values.dtype.names or ()}


def attach_both(
    uprobes: Uprobes, user: object, bpf_object: BpfObject, pid: int, path: str
) -> ProcessFile:
    with ProcessFile(pid, path) as file:
        (offset,) = function_offsets(file.fd, [FUNCTION])[FUNCTION]
        uprobes.attach(user, bpf_object.program_fd(ENTERED), file, {offset: 0})
        uprobes.attach(user, bpf_object.program_fd(LEFT), file, {offset: 0}, at_return=True)
    return file


@pytest.fixture
def attached(
    attaching_object: Path, called: Called, programs: Path, many: bool
) -> Iterator[tuple[BpfObject, Uprobes]]:
    """Programs at both ends of the function of `called`, for the user 1."""
    with (
        watching(attaching_object, called.pid, many=many) as bpf_object,
        Uprobes(many=many) as uprobes,
    ):
        attach_both(uprobes, 1, bpf_object, called.pid, str(programs / "called"))
        yield bpf_object, uprobes


def test_every_call_is_counted_with_its_arguments_and_its_result(
    attached: tuple[BpfObject, Uprobes], called: Called
) -> None:
    bpf_object, uprobes = attached
    assert len(uprobes) == 2
    total = called.finish()
    ones = sum(range(1000))
    assert counted(bpf_object) == {
        "entered": 1000,
        "left": 1000,
        "arguments": [ones, 2 * ones, 3 * ones, 2**64 - ones, 7000, 0],
        "returned": total,
        "pointed_to": 5 * sum(i for i in range(1000) if i % 10),
        "unreadable": 100,
    }


def test_a_file_of_several_processes_is_attached_once_and_detached_with_the_last(
    attaching_object: Path, programs: Path
) -> None:
    path = programs / "called"
    with ExitStack() as stack:
        processes = [Called(path, "100") for _ in range(3)]
        for process in processes:
            stack.callback(process.kill)
        bpf_object = stack.enter_context(watching(attaching_object, processes[2].pid))
        uprobes = stack.enter_context(Uprobes())
        for process in processes:
            attach_both(uprobes, process.pid, bpf_object, process.pid, str(path))
        assert len(uprobes) == 2
        attach_both(uprobes, processes[0].pid, bpf_object, processes[0].pid, str(path))
        uprobes.release(processes[0].pid)
        uprobes.release("never a user")
        assert len(uprobes) == 2
        processes[2].finish()
        assert counted(bpf_object)["entered"] == counted(bpf_object)["left"] == 100  # not 300
        uprobes.release(processes[1].pid)
        uprobes.release(processes[2].pid)
        assert len(uprobes) == 0


def test_nothing_is_counted_once_its_last_user_is_gone(
    attached: tuple[BpfObject, Uprobes], called: Called
) -> None:
    bpf_object, uprobes = attached
    uprobes.release(1)
    called.finish()
    assert counted(bpf_object)["entered"] == counted(bpf_object)["left"] == 0


@pytest.fixture(scope="module")
def static_program() -> Path:
    """`called` as a container of one file may have it: without libraries."""
    source = ROOT / "tests/programs/called.c"
    return built("called.static", [source], lambda out: ["cc", "-O2", "-static", source, "-o", out])


def test_a_file_in_a_mount_namespace_is_found_through_the_processs_root(
    attaching_object: Path, static_program: Path, tmp_path: Path
) -> None:
    """Its path means nothing outside; a link in it, absolute, stays inside."""
    inside = tmp_path / "root"
    (inside / "bin").mkdir(parents=True)
    script = (
        f"mount -t tmpfs coral-test {inside} && mkdir {inside}/bin && "
        f"cp {static_program} {inside}/bin/prog && ln -s /bin/prog {inside}/link && "
        f"exec chroot {inside} /bin/prog 500"
    )
    process = Called("unshare", "--mount", "sh", "-ec", script)
    try:
        wait_until(partial(runs_prog, process.pid))
        assert not (inside / "bin/prog").exists()
        with watching(attaching_object, process.pid) as bpf_object, Uprobes() as uprobes:
            file = attach_both(uprobes, 1, bpf_object, process.pid, "/bin/prog")
            link = attach_both(uprobes, 1, bpf_object, process.pid, "/link")
            assert (file.device, file.inode) == (link.device, link.inode)
            assert len(uprobes) == 2
            process.finish()
            assert counted(bpf_object)["entered"] == counted(bpf_object)["left"] == 500
    finally:
        process.kill()


def test_containers_of_one_image_share_what_is_attached(
    attaching_object: Path, static_program: Path, tmp_path: Path
) -> None:
    """Each has a mount of its own over the same files, with a device number of its own; the third
    one has changed its copy."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    image.mkdir()
    mounted.mkdir()
    (image / "prog").write_bytes(static_program.read_bytes())
    (image / "prog").chmod(0o755)
    script = (
        f"mount -t tmpfs coral-test {mounted}; cd {mounted}; mkdir upper work root; "
        f"mount -t overlay coral-test -o lowerdir={image},upperdir=upper,workdir=work root; "
        "cd root; {change}; exec chroot . /prog 100"
    )
    with ExitStack() as stack:
        processes = [
            Called("unshare", "--mount", "sh", "-ec", script.replace("{change}", change))
            for change in (":", ":", "chmod 0555 prog")
        ]
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            wait_until(partial(runs_prog, process.pid))
        watchers = [
            stack.enter_context(watching(attaching_object, process.pid)) for process in processes
        ]
        uprobes = stack.enter_context(Uprobes())
        files = [
            attach_both(uprobes, process.pid, watcher, process.pid, "/prog")
            for process in processes
            for watcher in watchers
        ]
        assert len({file.device for file in files}) == 3
        assert len(uprobes) == 2 * len(watchers) * 2  # two files, entered and left
        for process, watcher in zip(processes, watchers, strict=True):
            process.finish()
            assert counted(watcher)["entered"] == counted(watcher)["left"] == 100


def where_prog_lies(pid: int) -> str:
    """Where its code is mapped; empty while an exec has not mapped it yet."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next((it.split()[0] for it in maps if " r-xp " in it and "prog" in it), "")


def runs_prog(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name == "prog"
    return False


def test_a_deleted_or_replaced_file_is_still_the_one_that_was_opened(
    attaching_object: Path, static_program: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "prog"
    copy.write_bytes(static_program.read_bytes())
    copy.chmod(0o755)
    process = Called(copy, "200")
    try:
        with (
            watching(attaching_object, process.pid) as bpf_object,
            Uprobes() as uprobes,
            ProcessFile(process.pid, str(copy)) as file,
        ):
            copy.unlink()
            copy.write_bytes(b"something else")
            (offset,) = function_offsets(file.fd, [FUNCTION])[FUNCTION]
            uprobes.attach(1, bpf_object.program_fd(ENTERED), file, {offset: 0})
            process.finish()
            assert counted(bpf_object)["entered"] == 200
    finally:
        process.kill()


def test_a_replaced_file_is_found_by_where_it_is_mapped(
    attaching_object: Path, static_program: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "prog"
    copy.write_bytes(static_program.read_bytes())
    copy.chmod(0o755)
    process = Called(copy, "200")
    try:
        wait_until(partial(runs_prog, process.pid))
        copy.unlink()
        copy.write_bytes(b"something else")
        where = wait_until(partial(where_prog_lies, process.pid))
        with (
            watching(attaching_object, process.pid) as bpf_object,
            Uprobes() as uprobes,
            ProcessFile.mapped(process.pid, where) as file,
        ):
            (offset,) = function_offsets(file.fd, [FUNCTION])[FUNCTION]
            uprobes.attach(1, bpf_object.program_fd(ENTERED), file, {offset: 0})
            process.finish()
            assert counted(bpf_object)["entered"] == 200
        with pytest.raises(FileNotFoundError):
            ProcessFile.mapped(os.getpid(), "0-1000")
    finally:
        process.kill()


def test_what_cannot_be_attached_is_told_and_leaves_nothing(
    attaching_object: Path, programs: Path, many: bool
) -> None:
    with (
        watching(attaching_object, 1, many=many) as bpf_object,
        Uprobes(many=many) as uprobes,
        ProcessFile(os.getpid(), str(programs / "called")) as file,
    ):
        with pytest.raises(
            AttachError, match=r"a uprobe at offset 0xfffffff( by a perf event)?: EINVAL"
        ):
            uprobes.attach(1, bpf_object.program_fd(ENTERED), file, {0xFFFFFFF: 0})
        with pytest.raises(
            AttachError, match=r"a uprobe at offset 0x1000( by a perf event)?: EINVAL"
        ):
            uprobes.attach(1, file.fd, file, {0x1000: 0})
        assert len(uprobes) == 0
    with pytest.raises(OSError, match="not a regular file"):
        ProcessFile(os.getpid(), "/dev/null")
    with pytest.raises(FileNotFoundError):
        ProcessFile(os.getpid(), "/no/such/file")
