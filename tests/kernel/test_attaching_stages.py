"""Programs that continue as others, and subprograms, on a program that makes exactly N calls."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral.bpf import BpfObject
from coral.bpf.attaching.elf import function_offsets
from coral.bpf.attaching.uprobes import ProcessFile, Uprobes
from tests.attaching import FUNCTION, Called, toy

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

STAGES = ("stage_0", "stage_1", "stage_2")
CALLS = 1000
SUM = 2 * sum(range(CALLS))  # of the second argument
R_BPF_64_32 = 10  # the relocation of a call
# The kernel's limit, MAX_TAIL_CALL_CNT; before 5.16 some processors did one more.
TAIL_CALLS = 33


@contextmanager
def attached(path: Path, process: Called, program: Path) -> Iterator[BpfObject]:
    with (
        toy(path, *STAGES, wanted_tgid=process.pid) as bpf_object,
        ProcessFile(process.pid, str(program)) as file,
        Uprobes() as uprobes,
    ):
        (offset,) = function_offsets(file.fd, [FUNCTION])[FUNCTION]
        uprobes.attach(1, bpf_object.program_fd(STAGES[0]), file, {offset: 0})
        yield bpf_object


def worked(bpf_object: BpfObject) -> tuple[list[int], int, int]:
    _, values = bpf_object.map("works").read()
    return values[0]["runs"].tolist(), int(values[0]["sum"]), int(values[0]["ends"])


def test_each_call_passes_through_the_stages_that_there_are(
    stages_object: Path, called: Called, programs: Path
) -> None:
    with attached(stages_object, called, programs / "called") as bpf_object:
        bpf_object.write_fd("stages", 1, bpf_object.program_fd("stage_1"))
        called.finish()
        assert worked(bpf_object) == ([CALLS, CALLS, 0], 11 * SUM, CALLS)


def test_without_its_next_stage_a_program_goes_on_itself(
    stages_object: Path, called: Called, programs: Path
) -> None:
    with attached(stages_object, called, programs / "called") as bpf_object:
        called.finish()
        assert worked(bpf_object) == ([CALLS, 0, 0], SUM, CALLS)


def test_stages_without_an_end_are_ended_by_the_kernel(
    stages_object: Path, called: Called, programs: Path
) -> None:
    with attached(stages_object, called, programs / "called") as bpf_object:
        for index, name in enumerate(STAGES):
            bpf_object.write_fd("stages", index, bpf_object.program_fd(name))
        called.finish()
        runs, total, ends = worked(bpf_object)
        assert runs[:2] == [CALLS, CALLS]
        assert runs[2] / CALLS in (TAIL_CALLS - 2, TAIL_CALLS - 1, TAIL_CALLS)
        assert (total, ends) == (11 * SUM, CALLS)


def test_the_subprogram_is_one_function_that_both_programs_call(stages_object: Path) -> None:
    """Otherwise the other tests would show nothing of subprograms."""
    symbols = subprocess.check_output(["readelf", "-sW", stages_object], text=True)
    assert len(re.findall(r"^.* FUNC +LOCAL +.* add_weighted$", symbols, re.MULTILINE)) == 1
    relocations = subprocess.check_output(["readelf", "-rW", stages_object], text=True)
    calls = re.findall(rf"^\w+ +\w+{R_BPF_64_32:08x} .* \.text$", relocations, re.MULTILINE)
    assert len(calls) == 2
