"""What a session of `cpu_profile` has sampled: distinct stacks, each with its number of samples.

It knows neither batches nor files: `reading` fills it, and the modules of the file formats read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.functions import Function, Uses
from coral.views.cpu_profile.names import file_name
from coral.views.text import format_amount, format_ns

# A profile of five minutes on a machine of two CPUs has at most 60,000 samples.
MOST_STACKS: Final = 200_000
MOST_FRAMES: Final = 500_000

_FLAG_KERNEL: Final = int(pb.CPU_FRAME_FLAG_KERNEL)
_FLAG_GUESS: Final = int(pb.CPU_FRAME_FLAG_GUESS)
_FLAG_UNNAMED: Final = int(pb.CPU_FRAME_FLAG_UNNAMED)

CUT: Final = "[cut]"
NO_STACK: Final = "[no stack]"
NOT_KEPT: Final = "[not kept]"
UNKNOWN: Final = "[unknown]"

# What follows the frames of such a stack outwards is not known.
_CUT_ENDS: Final = frozenset(
    {
        pb.CPU_STACK_END_NO_UNWIND_INFO,
        pb.CPU_STACK_END_COPY_TOO_SHORT,
        pb.CPU_STACK_END_ERROR,
        pb.CPU_STACK_END_TOO_MANY_FRAMES,
        pb.CPU_STACK_END_PROCESS_GONE,
    }
)
_END_WORDS: Final = {
    pb.CPU_STACK_END_BOTTOM: "whole",
    pb.CPU_STACK_END_NO_UNWIND_INFO: "no unwind information",
    pb.CPU_STACK_END_COPY_TOO_SHORT: "copy too short",
    pb.CPU_STACK_END_ERROR: "not a stack",
    pb.CPU_STACK_END_TOO_MANY_FRAMES: "too many frames",
    pb.CPU_STACK_END_PROCESS_GONE: "process gone",
    pb.CPU_STACK_END_FRAME_POINTERS: "end of the frame pointers",
    pb.CPU_STACK_END_NO_USER_STACK: "kernel thread",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stack. `address` is as the file's own symbols count it; `build_id` is in
    hexadecimal digits; `flags` are bits of pb.CpuFrameFlag."""

    function: str
    module: str = ""
    address: int = 0
    build_id: str = ""
    flags: int = 0

    @property
    def kernel(self) -> bool:
        """Whether it is the kernel's."""
        return bool(self.flags & _FLAG_KERNEL)

    @property
    def guessed(self) -> bool:
        """Whether it was taken by guess, not found by rule."""
        return bool(self.flags & _FLAG_GUESS)

    @property
    def unnamed(self) -> bool:
        """Whether `function` is no name, but a module and an address."""
        return bool(self.flags & _FLAG_UNNAMED)

    @property
    def key(self) -> Function:
        """The function that it belongs to."""
        return Function(self.function, self.module, self.kernel, self.unnamed)

    @property
    def group(self) -> Function:
        """The same, or of a frame without a name all that have none in its module: the addresses in
        one function differ from sample to sample."""
        if not (self.unnamed and self.module):
            return self.key
        name = self.module if self.module.startswith("[") else f"[{file_name(self.module)}]"
        return Function(name, self.module, self.kernel, unnamed=True)


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose samples a stack has, and how its frames were found: pb.CpuStackEnd, pb.CpuUnwinding."""

    process: str
    tgid: int
    thread: str
    tid: int
    end: int = pb.CPU_STACK_END_BOTTOM
    unwinding: int = pb.CPU_UNWINDING_UNSPECIFIED
    in_kernel: bool = False

    @property
    def cut(self) -> bool:
        """Whether callers are missing at the outer end."""
        return self.end in _CUT_ENDS


_NOBODY: Final = Origin("", 0, "", 0)


class Sampled(NamedTuple):
    """A distinct stack, the outermost frame first, and how often it was met."""

    origin: Origin
    frames: Sequence[Frame]
    samples: int


class Profile:
    """Distinct stacks, in bounded memory."""

    def __init__(self, most_stacks: int = MOST_STACKS, most_frames: int = MOST_FRAMES) -> None:
        self.samples = 0
        self.lost = 0  # in the kernel
        self.truncated = 0  # samples whose user stack was copied in part
        self.period_ns = 0  # what one sample stands for: time
        self.period_cycles = 0  # or cycles of a CPU, which are no time
        self.cpu_ns = 0  # what the samples stand for
        self.cycles = 0
        self.ends: Counter[int] = Counter()  # samples by pb.CpuStackEnd
        self.methods: Counter[int] = Counter()  # those with a user stack, by pb.CpuUnwinding
        self.guessed = 0  # samples with at least one frame by guess
        self.in_kernel = 0
        self.not_kept = 0  # samples whose stacks came after all that there is room for
        self.uses = Uses()
        self._most_stacks = most_stacks
        self._most_frames = most_frames
        self._frames: list[Frame] = []
        self._groups: list[Function] = []  # of the frames
        self._numbers: dict[Frame, int] = {}
        self._counts: dict[tuple[Origin, tuple[int, ...]], int] = {}
        self._nothing = (self._new(Frame(NOT_KEPT, flags=_FLAG_UNNAMED)),)

    def __bool__(self) -> bool:
        return bool(self.samples)

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def period(self) -> int:
        """What one sample stands for, in the unit of `in_cycles`."""
        return self.period_cycles if self.in_cycles else self.period_ns

    @property
    def in_cycles(self) -> bool:
        """Whether samples stand for cycles of CPUs, and not for CPU time."""
        return bool(self.period_cycles) and not self.period_ns

    def amount(self, samples: int) -> str:
        """What SAMPLES stand for: `1.20s`, `3.1G cycles`."""
        if self.in_cycles:
            return f"{format_amount(samples * self.period_cycles)} cycles"
        return format_ns(samples * self.period_ns)

    def account(self, *, lost: int, truncated: int) -> None:
        """Notes what an interval says of its samples as a whole."""
        self.lost += lost
        self.truncated += truncated

    def add(
        self,
        origin: Origin,
        frames: Sequence[Frame],
        count: int,
        period_ns: int,
        period_cycles: int = 0,
    ) -> None:
        """Adds COUNT samples of a stack, the outermost frame first, each for PERIOD_NS of CPU time,
        or for PERIOD_CYCLES."""
        self.samples += count
        self.cpu_ns += count * period_ns
        self.cycles += count * period_cycles
        self.period_ns = period_ns or self.period_ns
        self.period_cycles = period_cycles or self.period_cycles
        self.ends[origin.end] += count
        if origin.unwinding:
            self.methods[origin.unwinding] += count
        self.in_kernel += count * origin.in_kernel
        numbers = self._known(frames or (Frame(NO_STACK, flags=_FLAG_UNNAMED),))
        groups = [self._groups[number] for number in numbers]
        self.uses.add(groups, groups[-1], count)
        if guesses := [frame.group for frame in frames if frame.guessed]:
            self.guessed += count
            self.uses.add_guessed(guesses, count)
        key = origin, numbers
        if key not in self._counts and len(self._counts) >= self._most_stacks:
            numbers = self._nothing
        if numbers is self._nothing:
            self.not_kept += count
            key = _NOBODY, numbers
        self._counts[key] = self._counts.get(key, 0) + count

    def merge(self, more: Profile) -> None:
        """Adds another profile."""
        for origin, frames, count in more.stacks():
            self.add(origin, frames, count, 0)
        self.cpu_ns += more.cpu_ns
        self.cycles += more.cycles
        self.period_ns = more.period_ns or self.period_ns
        self.period_cycles = more.period_cycles or self.period_cycles
        self.account(lost=more.lost, truncated=more.truncated)

    def stacks(self) -> Iterator[Sampled]:
        """Each distinct stack, in the order in which they were met first."""
        for (origin, ids), count in self._counts.items():
            yield Sampled(origin, [self._frames[number] for number in ids], count)

    @property
    def cut(self) -> int:
        """Samples whose stacks have callers missing."""
        return sum(count for end, count in self.ends.items() if end in _CUT_ENDS)

    @property
    def unknown_ends(self) -> int:
        """Samples whose stacks may have callers missing: the frame pointers ended there."""
        return self.ends[pb.CPU_STACK_END_FRAME_POINTERS]

    @property
    def cut_words(self) -> str:
        """Why stacks are cut, the most frequent first: `12 copy too short, 3 process gone`."""
        cut = ((end, count) for end, count in self.ends.most_common() if end in _CUT_ENDS)
        return ", ".join(f"{count:,} {end_words(end)}" for end, count in cut)

    @property
    def processes(self) -> list[str]:
        """The names of all processes, in order."""
        return sorted({origin.process for origin, _ in self._counts})

    def _known(self, frames: Sequence[Frame]) -> tuple[int, ...]:
        """The numbers of FRAMES; that of nothing where there is no room for one that is new."""
        numbers = []
        for frame in frames:
            number = self._numbers.get(frame)
            if number is None:
                if len(self._frames) >= self._most_frames:
                    return self._nothing
                number = self._new(frame)
            numbers.append(number)
        return tuple(numbers)

    def _new(self, frame: Frame) -> int:
        number = self._numbers[frame] = len(self._frames)
        self._frames.append(frame)
        self._groups.append(frame.group)
        return number


def end_words(end: int) -> str:
    """Why the frames of a stack end where they do."""
    return _END_WORDS.get(end, "not told")  # type: ignore[call-overload,no-any-return]
