"""Stacks unwound step by step, from registers and memory that the tests make up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from coral.collectors.unwinding.rules import (
    ARM64,
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    FLAGS,
    X86_64,
    Cfa,
    Machine,
    Rows,
    Rule,
    Saved,
    cfa,
    no_rule,
    saved,
)
from coral.collectors.unwinding.space import Region, Space
from coral.collectors.unwinding.stacks import (
    End,
    Frame,
    Samples,
    Stacks,
    Unwinding,
    from_frame_pointers,
)
from coral.collectors.unwinding.walk import unwind

CODE = 0x5000_0000  # where the file is mapped; its virtual addresses begin at 0
STACK = 0x7000_0000
JIT = 0x6000_0000
SP, FP, IP = X86_64.stack_pointer, X86_64.frame_pointer, X86_64.instruction_pointer


def rule(
    how: int, offset: int = 0, *, flags: int = 0, machine: Machine = X86_64, **registers: int
) -> list[int]:
    """A rule; REGISTERS are those of r3, r6 and so on, and of the return address, `ra`, which
    x86-64 has at CFA - 8 unless something else is said."""
    row = no_rule(machine)
    row[CFA], row[CFA_OFFSET], row[FLAGS] = how, offset, flags
    if machine is X86_64:
        registers.setdefault("ra", saved(Saved.AT_CFA, offset=-8))
    for name, code in registers.items():
        number = machine.return_address if name == "ra" else int(name[1:])
        row[FIRST_REGISTER + machine.tracked.index(number)] = code
    found: list[int] = row.tolist()
    return found


def by_sp(offset: int, **registers: int) -> list[int]:
    return rule(cfa(Cfa.REGISTER, SP), offset, flags=0, machine=X86_64, **registers)


def table(*rules: list[int], machine: Machine = X86_64) -> Rows:
    """Functions of 0x100 bytes each, from the virtual address 0x1000 on, with one rule each."""
    start = np.array([0, *(0x1000 + 0x100 * n for n in range(len(rules) + 1))], np.uint64)
    which = np.array([0, *range(1, len(rules) + 1), 0], np.uint16)
    return Rows(start, which, np.array([no_rule(machine).tolist(), *rules]), len(rules), 0)


OUTERMOST = by_sp(8, ra=saved(Saved.UNDEFINED))


def function(n: int, at: int = 0x10) -> int:
    """An address in the function with the nth rule."""
    return CODE + 0x1000 + 0x100 * n + at


@dataclass
class Thread:
    """A sample in the making."""

    registers: dict[int, int]
    words: list[int]
    base: int = STACK
    memory: int = 0


@dataclass
class Scene:
    """A process, and samples of it."""

    rows: Rows
    machine: Machine = X86_64
    jit: Cfa = Cfa.ANONYMOUS
    threads: list[Thread] = field(default_factory=list)

    def space(self) -> Space:
        space = Space(self.machine)
        space.put("process", self.regions())
        return space

    def regions(self) -> list[Region]:
        return [
            Region(CODE, CODE + 0x10000, CODE, self.rows),
            Region(JIT, JIT + 0x10000, 0, None, self.jit),
        ]

    def unwind(self, *threads: Thread, most: int = 1024) -> Stacks:
        return unwind(samples_of(threads, self.machine), self.space(), most)


def samples_of(threads: tuple[Thread, ...], machine: Machine = X86_64) -> Samples:
    registers = np.zeros((len(threads), machine.registers), np.uint64)
    for n, thread in enumerate(threads):
        for register, value in thread.registers.items():
            registers[n, register] = value
    count = np.array([len(thread.words) for thread in threads], np.int64)
    words = [word for thread in threads for word in thread.words]
    return Samples(
        np.array([thread.memory for thread in threads], np.int64),
        registers,
        np.array(words, np.uint64),
        np.cumsum(count) - count,
        count,
        np.array([thread.base for thread in threads], np.uint64),
    )


def thread(ip: int, *words: int, sp: int = STACK, **others: int) -> Thread:
    registers = {int(name[1:]): value for name, value in others.items()}
    return Thread({IP: ip, SP: sp, **registers}, list(words))


PLAIN = Scene(table(by_sp(8), by_sp(16), by_sp(24, r6=saved(Saved.AT_CFA, offset=-16)), OUTERMOST))


def test_a_stack_is_followed_to_the_outermost_function() -> None:
    words = [function(1), 1, function(2), 2, 3, function(3)]
    stacks = PLAIN.unwind(thread(function(0), *words))
    assert stacks.stack(0) == [function(0), function(1), function(2), function(3)]
    assert stacks.flags.tolist() == [Frame.EXACT, 0, 0, 0]
    assert stacks.ends.tolist() == [End.BOTTOM]
    assert stacks.unwinding.tolist() == [Unwinding.EH_FRAME]


def test_a_call_that_does_not_return_belongs_to_the_caller() -> None:
    # The return address is the first of the next function.
    stacks = PLAIN.unwind(thread(function(0), function(2, 0), 7, function(3)))
    assert stacks.stack(0) == [function(0), function(2, 0), function(3)]


def test_samples_of_many_depths_are_unwound_at_once() -> None:
    threads = [
        thread(function(0), *[function(0)] * depth, function(3)) for depth in (5, 0, 300, 1, 40)
    ]
    stacks = PLAIN.unwind(*threads)
    assert stacks.lengths.tolist() == [7, 2, 302, 3, 42]
    assert (stacks.ends == End.BOTTOM).all()
    assert stacks.stack(2) == [*[function(0)] * 301, function(3)]
    assert stacks.offsets.tolist() == [0, 7, 9, 311, 314, 356]


def test_one_address_means_other_functions_in_other_processes() -> None:
    space = Space(X86_64)
    space.put("one", PLAIN.regions())
    other = table(by_sp(16), OUTERMOST, by_sp(8), by_sp(8))
    space.put("two", [Region(CODE, CODE + 0x10000, CODE, other)])
    one = thread(function(0), function(3), 0, 0)
    two = thread(function(0), 0, function(1), 0)
    two.memory = space.slot("two")
    stacks = unwind(samples_of((one, two, one)), space)
    assert stacks.stack(0) == [function(0), function(3)]
    assert stacks.stack(1) == [function(0), function(1)]
    assert stacks.stack(2) == stacks.stack(0)
    assert (stacks.ends == End.BOTTOM).all()


def test_a_file_that_is_mapped_twice_is_kept_once() -> None:
    space = Space(X86_64)
    space.put("one", PLAIN.regions())
    size = space.row_bytes
    space.put("two", [Region(CODE + 0x100000, CODE + 0x110000, CODE + 0x100000, PLAIN.rows)])
    assert space.row_bytes == size
    moved = thread(function(0) + 0x100000, function(3) + 0x100000)
    moved.memory = space.slot("two")
    assert unwind(samples_of((moved,)), space).ends.tolist() == [End.BOTTOM]
    space.keep_only({"one"})
    assert len(space) == 1
    assert "two" not in space


def test_memories_that_come_one_by_one_are_as_those_that_come_together() -> None:
    """What was made of the earlier ones is kept, and made again for one that has changed."""
    tables = [table(by_sp(size), OUTERMOST) for size in (8, 16, 24)]
    regions = [[Region(CODE, CODE + 0x10000, CODE, rows)] for rows in tables]
    grown, whole = Space(X86_64), Space(X86_64)
    for number in (0, 1, 2, 1, 0):
        grown.put(number, regions[(number + 1) % 3])
        grown.index()
        grown.put(number, regions[number])
        grown.index()
    for number in range(3):
        whole.put(number, regions[number])
    one, other = grown.index(), whole.index()
    key = np.array(
        [n << 48 | at for n in range(3) for at in (0, CODE - 1, function(0), function(1))]
    )
    found = [index.rules[index.rule_at(key.astype(np.uint64))].tolist() for index in (one, other)]
    assert found[0] == found[1]
    assert len(np.unique(found[0], axis=0)) == 5  # outside, three rules and the outermost
    grown.keep_only({2})
    assert grown.tables == 1
    key = np.array([grown.slot(2) << 48 | function(0)], np.uint64)
    index = grown.index()
    assert index.rules[index.rule_at(key)].tolist() == [found[1][10]]


def test_more_frames_than_wanted_are_cut_and_marked() -> None:
    stacks = PLAIN.unwind(thread(function(0), *[function(0)] * 50), most=10)
    assert stacks.lengths.tolist() == [10]
    assert stacks.ends.tolist() == [End.TOO_MANY_FRAMES]


def test_a_stack_that_goes_on_above_the_copy_is_cut() -> None:
    stacks = PLAIN.unwind(thread(function(0), function(1)), thread(function(0)))
    assert stacks.lengths.tolist() == [2, 1]
    assert stacks.ends.tolist() == [End.COPY_TOO_SHORT] * 2


def test_nothing_is_above_the_copy_of_a_whole_stack() -> None:
    """Code without a table and without frame pointers, which has other things in that register."""
    above = thread(JIT + 0x10, *[0] * 8, r6=STACK + 0x200)
    cut = thread(function(0), function(1))
    samples = samples_of((above, above, cut, cut), X86_64)
    samples = replace(samples, is_whole=np.array([False, True, False, True]))
    stacks = unwind(samples, PLAIN.space())
    assert stacks.ends.tolist() == [
        End.COPY_TOO_SHORT,
        End.NO_UNWIND_INFO,
        End.COPY_TOO_SHORT,
        End.ERROR,
    ]


def test_a_return_address_that_is_no_code_is_an_error_and_not_shown() -> None:
    stacks = PLAIN.unwind(
        thread(function(0), 0x1234),
        thread(function(0), 0xFFFF_8000_0000_0000),
        thread(0x99, function(3)),
    )
    assert [stacks.stack(n) for n in range(3)] == [[function(0)], [function(0)], [0x99]]
    assert stacks.ends.tolist() == [End.ERROR] * 3
    assert stacks.unmapped.tolist() == [0x1233, 0xFFFF_7FFF_FFFF_FFFF, 0x99]


def test_a_stack_that_does_not_grow_is_an_error() -> None:
    scene = Scene(table(rule(cfa(Cfa.REGISTER, FP), 0), OUTERMOST))
    stacks = scene.unwind(thread(function(0), function(1), function(1), r6=STACK))
    assert stacks.ends.tolist() == [End.ERROR]


@pytest.mark.parametrize("offset", range(8))
def test_stack_pointers_need_not_be_aligned(offset: int) -> None:
    content = bytes(offset) + b"".join(
        word.to_bytes(8, "little") for word in (function(1), 5, function(3))
    )
    content += bytes(-len(content) % 8)
    words = np.frombuffer(content, np.uint64).tolist()
    stacks = PLAIN.unwind(thread(function(0), *words, sp=STACK + offset))
    assert stacks.stack(0) == [function(0), function(1), function(3)]


def test_the_frame_pointer_is_restored() -> None:
    scene = Scene(
        table(
            by_sp(16, r6=saved(Saved.AT_CFA, offset=-16)),
            rule(cfa(Cfa.REGISTER, FP), 16),
            OUTERMOST,
        )
    )
    stacks = scene.unwind(thread(function(0), STACK + 24, function(1), 0, 0, function(2), r6=0xBAD))
    assert stacks.stack(0) == [function(0), function(1), function(2)]


def test_a_linkers_stub_has_pushed_a_word_from_its_boundary_on() -> None:
    scene = Scene(table(rule(cfa(Cfa.PLT), 11), OUTERMOST))
    stacks = scene.unwind(
        thread(function(0, 0x26), function(1)), thread(function(0, 0x2B), 3, function(1))
    )
    assert stacks.stack(0) == [function(0, 0x26), function(1)]
    assert stacks.stack(1) == [function(0, 0x2B), function(1)]


def test_the_caller_of_a_signal_handler_is_what_was_interrupted() -> None:
    handler_return = rule(cfa(Cfa.DEREFERENCED, SP), 160, flags=Rule.SIGNAL)
    scene = Scene(table(by_sp(8), handler_return, rule(cfa(Cfa.REGISTER, 10), 8), OUTERMOST))
    saved_registers = [0] * 40
    context = STACK + 8  # the handler has returned to the second function
    interrupted_sp = STACK + 8 * 30
    for register, place in ((10, 7), (SP, 20), (IP, 21)):
        saved_registers[place] = {10: interrupted_sp, SP: interrupted_sp, IP: function(2, 0)}[
            register
        ]
    words = [function(1), *saved_registers]
    words[(interrupted_sp - STACK) // 8] = function(3)
    assert context == STACK + 8
    stacks = scene.unwind(thread(function(0), *words))
    assert stacks.stack(0) == [function(0), function(1), function(2, 0), function(3)]
    assert stacks.flags.tolist() == [Frame.EXACT, Frame.SIGNAL, Frame.EXACT, 0]
    assert stacks.ends.tolist() == [End.BOTTOM]


def test_a_signal_on_a_stack_of_its_own_hides_the_other_stack() -> None:
    handler_return = rule(cfa(Cfa.DEREFERENCED, SP), 160, flags=Rule.SIGNAL)
    scene = Scene(table(by_sp(8), handler_return, by_sp(8)))
    context = [0] * 30
    context[20], context[21] = 0x7FFF_0000_0000, function(2)
    stacks = scene.unwind(thread(function(0), function(1), *context))
    assert stacks.stack(0) == [function(0), function(1), function(2)]
    assert stacks.ends.tolist() == [End.COPY_TOO_SHORT]


def test_a_frame_by_another_register_is_found_where_the_register_is_known() -> None:
    scene = Scene(table(rule(cfa(Cfa.REGISTER, 10), 0), by_sp(8), OUTERMOST))
    words = [0, 0, function(2), 0]
    known = thread(function(0), *words, r10=STACK + 24)
    unknown = thread(function(1), function(0), *words, r10=STACK + 24)
    stacks = scene.unwind(known, unknown)
    assert stacks.stack(0) == [function(0), function(2)]
    assert stacks.stack(1) == [function(1), function(0)]
    assert stacks.ends.tolist() == [End.BOTTOM, End.NO_UNWIND_INFO]


def test_registers_that_calls_preserve_are_followed_to_a_frame_that_needs_them() -> None:
    scene = Scene(
        table(
            by_sp(16, r3=saved(Saved.AT_CFA, offset=-16)),
            by_sp(8),
            rule(cfa(Cfa.REGISTER, 3), 8),
            OUTERMOST,
        )
    )
    words = [STACK + 48, function(1), function(2), 0, 0, 0, function(3)]
    stacks = scene.unwind(thread(function(0), *words, r3=0xBAD), thread(function(1), function(3)))
    assert stacks.stack(0) == [function(0), function(1), function(2), function(3)]
    assert stacks.stack(1) == [function(1), function(3)]
    assert (stacks.ends == End.BOTTOM).all()


def test_code_without_a_table_is_followed_by_frame_pointers_and_marked() -> None:
    words = [9, STACK + 40, JIT + 0x20, 9, 9, STACK + 56, function(0), function(3)]
    scene = PLAIN
    stacks = scene.unwind(thread(JIT + 0x10, *words, r6=STACK + 8))
    assert stacks.stack(0) == [JIT + 0x10, JIT + 0x20, function(0), function(3)]
    assert stacks.flags.tolist() == [Frame.EXACT, Frame.GUESS, Frame.GUESS, 0]
    assert stacks.ends.tolist() == [End.BOTTOM]


def test_a_chain_of_frame_pointers_ends_at_zero() -> None:
    words = [STACK + 16, JIT + 0x20, 0, 0]
    stacks = PLAIN.unwind(thread(JIT + 0x10, *words, r6=STACK), thread(JIT + 0x10, *words, r6=0))
    assert stacks.lengths.tolist() == [2, 1]
    assert stacks.ends.tolist() == [End.BOTTOM] * 2
    assert stacks.unwinding.tolist() == [Unwinding.FRAME_POINTERS] * 2


@pytest.mark.parametrize("frame_pointer", [1, 0x1234, STACK - 8, STACK + 4, 2**63, 2**64 - 1])
def test_a_frame_pointer_that_cannot_be_one_ends_the_stack(frame_pointer: int) -> None:
    stacks = PLAIN.unwind(thread(JIT + 0x10, *[JIT + 0x20] * 8, r6=frame_pointer))
    assert stacks.lengths.tolist() == [1]
    assert stacks.ends[0] in (End.NO_UNWIND_INFO, End.COPY_TOO_SHORT)


@pytest.mark.parametrize(("kind", "flag"), [(Cfa.ANONYMOUS, Frame.GUESS), (Cfa.TRAMPOLINE, 0)])
def test_cpythons_trampolines_have_frames_of_two_words(kind: Cfa, flag: Frame) -> None:
    scene = Scene(PLAIN.rows, jit=kind)
    # What is in the frame pointer is no frame pointer.
    stacks = scene.unwind(thread(function(0), JIT + 0x10, 77, function(0), function(3), r6=3))
    assert stacks.stack(0) == [function(0), JIT + 0x10, function(0), function(3)]
    assert stacks.flags.tolist() == [Frame.EXACT, 0, flag, 0]


def test_on_arm64_a_leaf_function_has_its_return_address_in_a_register() -> None:
    pair = {"r29": saved(Saved.AT_CFA, offset=-32), "ra": saved(Saved.AT_CFA, offset=-24)}
    rows = table(
        rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64),
        rule(cfa(Cfa.REGISTER, 31), 32, machine=ARM64, **pair),
        rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64, ra=saved(Saved.UNDEFINED)),
        machine=ARM64,
    )
    scene = Scene(rows, ARM64)
    signed = 0x0042_0000_0000_0000  # a pointer authentication code
    leaf = Thread(
        {32: function(0), 31: STACK, 30: function(1) | signed},
        [STACK + 64, function(2) | signed, 0, 0],
    )
    stacks = scene.unwind(leaf)
    assert stacks.stack(0) == [function(0), function(1), function(2)]
    assert stacks.ends.tolist() == [End.BOTTOM]


def test_on_arm64_a_leaf_function_that_is_not_the_first_has_no_caller() -> None:
    rows = table(rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64), machine=ARM64)
    scene = Scene(rows, ARM64)
    stacks = scene.unwind(Thread({32: function(0), 31: STACK, 30: function(0)}, [0]))
    assert stacks.lengths.tolist() == [2]
    assert stacks.ends.tolist() == [End.NO_UNWIND_INFO]


def test_on_arm64_a_signal_handlers_return_has_all_registers_on_the_stack() -> None:
    rows = table(
        rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64),  # the handler, a leaf function
        rule(cfa(Cfa.REGISTER, 29), 0, flags=Rule.SIGNAL, machine=ARM64),
        rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64),  # interrupted, a leaf function too
        rule(cfa(Cfa.REGISTER, 31), 0, machine=ARM64, ra=saved(Saved.UNDEFINED)),
        machine=ARM64,
    )
    frame = [0] * 80
    registers = 312 // 8
    frame[registers + 30] = function(3)
    frame[registers + 31] = STACK + 8 * 75
    frame[registers + 32] = function(2)
    handler = Thread({32: function(0), 31: STACK, 30: function(1)}, frame)
    stacks = Scene(rows, ARM64).unwind(handler)
    assert stacks.stack(0) == [function(0), function(1), function(2), function(3)]
    assert stacks.flags.tolist() == [Frame.EXACT, Frame.SIGNAL, Frame.EXACT, 0]
    assert stacks.ends.tolist() == [End.BOTTOM]


def test_no_samples_have_no_stacks() -> None:
    stacks = PLAIN.unwind()
    assert len(stacks) == 0
    assert stacks.offsets.tolist() == [0]


def test_whatever_registers_and_stacks_hold_every_stack_ends() -> None:
    chance = random.Random(1)
    rules = [
        by_sp(8), by_sp(16, r6=saved(Saved.AT_CFA, offset=-16)), rule(cfa(Cfa.REGISTER, FP), 16),
        rule(cfa(Cfa.DEREFERENCED, SP), (8 << 32) - 8), rule(cfa(Cfa.PLT), 11),
        rule(cfa(Cfa.REGISTER, 3), 8), rule(cfa(Cfa.UNKNOWN)),
        rule(cfa(Cfa.DEREFERENCED, SP), 160, flags=Rule.SIGNAL),
        by_sp(8, ra=saved(Saved.IN_REGISTER, register=2)),
        by_sp(8, ra=saved(Saved.AT_REGISTER, register=31, offset=2**31)),
        by_sp(8, r6=saved(Saved.UNKNOWN), r3=saved(Saved.IS_CFA, offset=-(2**31))), OUTERMOST,
    ]  # fmt: skip
    scene = Scene(table(*rules))
    likely = [
        *(function(n) for n in range(len(rules))), JIT + 5, STACK, STACK + 8, STACK + 16, 0, 1,
        2**63, 2**64 - 1, 2**48, 2**47,
    ]  # fmt: skip
    threads = [
        Thread(
            {n: chance.choice(likely) for n in range(17)} | {SP: STACK + chance.randrange(-8, 24)},
            [chance.choice(likely) for _ in range(chance.choice([0, 1, 5, 40]))],
            base=chance.choice([STACK, STACK, STACK - 128, 0, 2**64 - 8]),
        )
        for _ in range(3000)
    ]
    stacks = scene.unwind(*threads, most=64)
    assert len(stacks) == 3000
    assert ((stacks.ends >= End.BOTTOM) & (stacks.ends <= End.TOO_MANY_FRAMES)).all()
    assert (stacks.lengths >= 1).all()
    assert stacks.lengths.sum() == len(stacks.addresses)
    # A stack does not depend on what is unwound beside it.
    for n in range(0, 3000, 100):
        alone = scene.unwind(threads[n], most=64)
        assert alone.stack(0) == stacks.stack(n)
        assert alone.ends[0] == stacks.ends[n]


def test_damaged_places_of_copies_are_read_as_if_nothing_was_copied() -> None:
    samples = samples_of((thread(function(0), function(3)),) * 3)
    wrong = Samples(
        samples.memory, samples.registers, samples.words, np.array([-5, 2**40, 0]),
        np.array([2**40, 5, -1]), samples.base,
    )  # fmt: skip
    stacks = unwind(wrong, PLAIN.space())
    assert (stacks.lengths >= 1).all()


def test_stacks_by_frame_pointers_come_in_the_same_form() -> None:
    addresses = np.array([1, 2, 3, 4, 5], np.uint64)
    stacks = from_frame_pointers(addresses, np.array([3, 0, 2]), 3)
    assert [stacks.stack(n) for n in range(3)] == [[1, 2, 3], [], [4, 5]]
    assert stacks.flags.tolist() == [Frame.EXACT, 4, 4, Frame.EXACT, 4]
    assert stacks.ends.tolist() == [
        End.TOO_MANY_FRAMES, End.FRAME_POINTERS, End.FRAME_POINTERS,
    ]  # fmt: skip
