"""Registers and stacks of sampled threads, copied by a program, against a recursion that marks its
frames."""

from __future__ import annotations

import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.bpf.attaching.sampling import sample_with
from tests.attaching import toy

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

PROGRAM = "copy_stack"
MARK = 0xC0FFEE << 40
FRAME_MARKS = 32
MOST_BYTES = 16 << 10
STACKS = 64
PAGE = resource.getpagesize()


class Sampled:
    """What was sampled of one run of tests/programs/deep.c, and what /proc said of it."""

    def __init__(
        self, path: Path, program: Path, *arguments: str, most_bytes: int = MOST_BYTES
    ) -> None:
        process = subprocess.Popen(
            [program / "deep", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"SECRET": "coral" * 100},
        )
        options = {"wanted_tgid": process.pid, "most_bytes": most_bytes}
        with process, toy(path, PROGRAM, **options) as bpf_object:
            # Still reading its input, when nothing samples it: what /proc says stays true.
            self.pid = process.pid
            self.maps = Path(f"/proc/{process.pid}/maps").read_text()
            stat = Path(f"/proc/{process.pid}/stat").read_text()
            self.start_stack = int(stat.rpartition(")")[2].split()[25])
            with sample_with(bpf_object.program_fd(PROGRAM), 499):
                process.communicate("x")
            taken = int(bpf_object.read_variable("taken"))
            self.stacks = bpf_object.map("stacks").read()[1][:taken]
        assert process.returncode == 0

    def below(self, depth: int, *files: str) -> NDArray[Any]:
        """The stacks that were sampled in the code of FILES when all calls were made: those of its
        start and its end may contain what is left of others' frames."""
        code = [one for name in files for one in self.code(name)]
        whole = np.array(
            [
                any(ip_of(stack) in one for one in code)
                and marks_of(stack)[:FRAME_MARKS] == [MARK] * FRAME_MARKS
                for stack in self.stacks
            ]
        )
        assert whole.sum() > 0.5 * len(self.stacks) > 7
        for stack in self.stacks[whole]:
            expected = [MARK + left for left in range(depth) for _ in range(FRAME_MARKS)]
            assert marks_of(stack) == expected[: len(marks_of(stack))]
        found: NDArray[Any] = self.stacks[whole]
        return found

    def code(self, name: str) -> list[range]:
        """Where the code of a file is mapped."""
        lines = re.findall(rf"^(\w+)-(\w+) r-xp .*/{name}$", self.maps, re.MULTILINE)
        return [range(int(start, 16), int(end, 16)) for start, end in lines]


def marks_of(stack: Any) -> list[int]:
    words = stack["copied"][: stack["bytes"] // 8 * 8].view(np.uint64)
    return [word for word in words.tolist() if word >> 40 == MARK >> 40]


def sp_of(stack: Any) -> int:
    return int(stack["registers"]["sp"])


def ip_of(stack: Any) -> int:
    registers = stack["registers"]
    return int(registers["ip" if "ip" in registers.dtype.names else "pc"])


def test_the_whole_stack_of_the_first_thread_is_copied_and_no_more(
    attaching_object: Path, programs: Path
) -> None:
    sampled = Sampled(attaching_object, programs, "20", "120000000")
    for stack in sampled.below(20, "deep"):
        assert len(marks_of(stack)) == 20 * FRAME_MARKS
        assert stack["bytes"] == sampled.start_stack - sp_of(stack)
        assert b"coral" not in stack["copied"].tobytes()  # its environment lies behind
        assert stack["tid"] == sampled.pid


def test_the_whole_stack_of_another_thread_is_copied(
    attaching_object: Path, programs: Path
) -> None:
    sampled = Sampled(attaching_object, programs, "20", "120000000", "thread")
    for stack in sampled.below(20, "deep"):
        assert len(marks_of(stack)) == 20 * FRAME_MARKS
        assert stack["tid"] != sampled.pid
        assert stack["bytes"] < 20 * FRAME_MARKS * 8 + 4096  # not up to the end of the room


def test_a_stack_with_nothing_behind_it_is_copied_up_to_its_end(
    attaching_object: Path, programs: Path
) -> None:
    """As coroutines have them: nothing tells where it ends but that reading fails."""
    sampled = Sampled(attaching_object, programs, "20", "120000000", "context")
    for stack in sampled.below(20, "deep"):
        assert len(marks_of(stack)) == 20 * FRAME_MARKS
        assert (sp_of(stack) + int(stack["bytes"])) % PAGE == 0
        assert stack["bytes"] < 20 * FRAME_MARKS * 8 + 4096


def test_a_stack_deeper_than_the_room_is_copied_as_far_as_that(
    attaching_object: Path, programs: Path
) -> None:
    sampled = Sampled(attaching_object, programs, "200", "120000000")
    for stack in sampled.below(200, "deep"):
        assert stack["bytes"] == MOST_BYTES
        assert len(marks_of(stack)) > MOST_BYTES // 8 * 0.8


def test_a_limit_is_held(attaching_object: Path, programs: Path) -> None:
    sampled = Sampled(attaching_object, programs, "200", "120000000", most_bytes=5000)
    assert {int(stack["bytes"]) for stack in sampled.below(200, "deep")} == {5000}


@pytest.mark.pace
def test_registers_are_those_of_user_space_while_the_kernel_works(
    attaching_object: Path, programs: Path
) -> None:
    sampled = Sampled(attaching_object, programs, "20", "2000", "kernel")
    stacks = sampled.below(20, r"libc\.so\.6", "deep")
    in_kernel = [stack for stack in stacks if int(stack["interrupted_ip"]) >> 63]
    assert len(in_kernel) > 0.5 * len(stacks)
    (libc,) = sampled.code(r"libc\.so\.6")
    for stack in in_kernel:
        assert ip_of(stack) in libc  # behind the instruction that called the kernel
        assert len(marks_of(stack)) == 20 * FRAME_MARKS
