"""Histograms, names, error classes, damaged BTF, units on the screen."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from coral.agent.machine.resolve import container_names
from coral.bpf.loading.btf import Btf
from coral.client import Histogram
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats import table as syscall_table
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.text import bar, format_ns

LONG_ID = "0123456789abcdef" * 4
POD_UID = "12345678-1234-1234-1234-123456789abc"


def histogram(counts: list[int], max_ns: int) -> Histogram:
    made = Histogram()
    made.add(pb.Log2Histogram(first_exponent=6, slots=32, counts=counts), max_ns)
    return made


def test_a_quantile_lies_in_its_slot_and_never_above_the_greatest_value() -> None:
    made = histogram([0, 90, 0, 10], 600)  # 90 in [128, 256), 10 in [512, 1024)
    assert made.count == 100
    assert 128 <= made.quantile_ns(0.5) < 256
    assert made.quantile_ns(0.5) == pytest.approx(128 + 128 * 50 / 90)
    assert made.quantile_ns(0.95) == 600
    assert made.quantile_ns(1) == 600
    assert Histogram().quantile_ns(0.5) == 0


def test_histograms_add_up() -> None:
    made = histogram([1, 2], 200)
    made.add(pb.Log2Histogram(first_exponent=6, slots=32, counts=[1, 0, 5]), 400)
    assert made.counts[:3].tolist() == [2, 2, 5]
    assert made.max_ns == 400


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's headers are Linux's")
def test_the_table_agrees_with_the_kernels_headers() -> None:
    out = subprocess.run(
        ["cc", "-E", "-dM", "-"],
        input="#include <asm/unistd.h>\n", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    defined = dict(re.findall(r"#define __NR_(\w+) (\d+)", out))
    assert len(defined) > 250
    table = syscall_table.numbers()
    assert {name: table[name] for name in defined} == {n: int(v) for n, v in defined.items()}


def test_numbers_without_a_name_are_shown_as_numbers() -> None:
    assert syscall_table.name_of(syscall_table.numbers()["read"]) == "read"
    assert syscall_table.name_of(999) == "syscall_999"
    assert syscall_table.name_of(1024) == syscall_table.name_of(4096 + 1024) == "unknown"
    assert syscall_table.name_of(4096 + 998) == "compat_998"


def test_calls_of_32_bit_programs_have_their_own_numbers() -> None:
    for machine, number in (("i386", 20), ("arm", 20)):
        assert syscall_table.numbers(machine)["getpid"] == number
    for number in syscall_table.numbers_of("getpid"):
        assert syscall_table.name_of(number) == "getpid"
    assert len(syscall_table.numbers_of("getpid")) == 2


def test_both_processors_have_the_calls_that_the_programs_treat_apart() -> None:
    x86, arm = syscall_table.numbers("x86_64"), syscall_table.numbers("aarch64")
    names = ("exit", "exit_group", "execve", "execveat")
    assert [x86[n] for n in names] == [60, 231, 59, 322]
    assert [arm[n] for n in names] == [93, 94, 221, 281]
    assert len(set(arm.values())) == len(arm)


def test_each_errno_has_one_class_and_the_kernels_own_are_interrupts() -> None:
    table = errno_class.table()
    every = [value for values in errno_class.CLASSES.values() for value in values]
    assert len(every) == len(set(every))
    assert errno_class.NAMES[table[errno.ENOENT]] == "not_found"
    assert errno_class.NAMES[table[errno.EACCES]] == "permission"
    assert errno_class.NAMES[table[512]] == "interrupted"
    assert errno_class.NAMES[table[errno.EXDEV]] == "other"


@pytest.mark.parametrize(
    ("component", "names"),
    [
        (f"docker-{LONG_ID}.scope", [LONG_ID, LONG_ID[:12]]),
        (f"cri-containerd-{LONG_ID}.scope", [LONG_ID, LONG_ID[:12]]),
        (LONG_ID, [LONG_ID, LONG_ID[:12]]),
        (f"pod{POD_UID}", [POD_UID]),
        (f"kubepods-burstable-pod{POD_UID.replace('-', '_')}.slice", [POD_UID]),
        ("checkout", ["checkout"]),
        ("nginx.service", []),
    ],
)
def test_containers_and_pods_are_found_in_a_cgroups_name(component: str, names: list[str]) -> None:
    assert list(container_names(component)) == names


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0ns"), (870, "870ns"), (4210, "4.21µs"), (12_500_000, "12.5ms"), (1.2e9, "1.20s")],
)
def test_times_have_three_digits_and_a_unit(ns: float, text: str) -> None:
    assert format_ns(ns) == text


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(1, 20) == "█" * 20
    assert bar(0, 20) == ""
    assert bar(0.5, 20) == "█" * 10
    assert bar(1 / 16, 2) == "▏"


def test_damaged_btf_is_refused() -> None:
    with pytest.raises(ValueError, match="truncated"):
        Btf(b"\x9f\xeb")
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 100, 100, 10)
    with pytest.raises(ValueError, match="damaged or truncated"):
        Btf(header)
    with pytest.raises(ValueError, match="damaged or truncated"):
        Btf(np.zeros(64, np.uint8).tobytes())
