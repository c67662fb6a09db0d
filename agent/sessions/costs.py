"""What one session costs: CPU time by cause, in all and over the last seconds. Loop-free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from coral.agent.machine.program_stats import ProgramUse

CPU_WINDOW_S: Final = 10.0
# gRPC sends messages from callbacks and threads that serve all calls. What these use is in
# proportion to what a call itself uses on the loop; docs/limits.md has the figures.
_GRPC_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time by cause, in seconds; or a share of one CPU by cause, in percent."""

    programs: float = 0.0  # in the kernel, at the expense of the processes that run them
    reading: float = 0.0  # draining, making rows, numbering, encoding
    subscribers: float = 0.0  # filtering, making and sending messages

    @property
    def total(self) -> float:
        """The sum."""
        return self.programs + self.reading + self.subscribers

    def __add__(self, other: CpuUse) -> CpuUse:
        return CpuUse(
            self.programs + other.programs,
            self.reading + other.reading,
            self.subscribers + other.subscribers,
        )

    def since(self, earlier: CpuUse, seconds: float) -> CpuUse:
        """The percentage of one CPU that was used in the last SECONDS."""
        scale = 100 / seconds
        return CpuUse(
            (self.programs - earlier.programs) * scale,
            (self.reading - earlier.reading) * scale,
            (self.subscribers - earlier.subscribers) * scale,
        )


class Costs:
    """The CPU time that one session has caused since its programs were attached. Its start is not
    charged: it does not go on."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, at_s: float) -> None:
        """Counts from now on, the time AT_S by the monotonic clock."""
        self.programs = ProgramUse(at_s)
        self._reading_ns = 0
        self._subscribers_ns = 0
        self._samples: deque[tuple[float, CpuUse]] = deque([(at_s, CpuUse())])
        self.recent = CpuUse()  # what `sample` returned last

    def charge_reading(self, cpu_ns: int) -> None:
        """Adds what the session itself used, on the event loop or in a thread."""
        self._reading_ns += cpu_ns

    def charge_subscriber(self, cpu_ns: int) -> None:
        """Adds what a call that streams to a subscriber used on the event loop."""
        self._subscribers_ns += round(cpu_ns * (1 + _GRPC_SHARE))

    def charge_offering(self, cpu_ns: int) -> None:
        """Moves to the subscribers what the session used to see which rows they want."""
        self._reading_ns -= cpu_ns
        self._subscribers_ns += cpu_ns

    @property
    def used(self) -> CpuUse:
        """So far, in seconds."""
        return CpuUse(self.programs.seconds, self._reading_ns / 1e9, self._subscribers_ns / 1e9)

    def recent_by_cause(self) -> str:
        """The use that `sample` returned last, in words."""
        programs = f"{self.recent.programs:.1f} by its programs"
        if not self.programs.is_known:
            programs = "its programs are not counted"
        return (
            f"{programs}, {self.recent.reading:.1f} by reading, {self.recent.subscribers:.1f} by "
            "its subscribers"
        )

    def sample(self, at_s: float) -> CpuUse:
        """The percentage of one CPU that was used in the CPU_WINDOW_S before AT_S. The time before
        the session counts as unused: the mean of a young session says how much it has used, not how
        much it is going to use."""
        self._samples.append((at_s, self.used))
        while len(self._samples) > 1 and self._samples[1][0] <= at_s - CPU_WINDOW_S:
            self._samples.popleft()
        first_at_s, first = self._samples[0]
        self.recent = self.used.since(first, max(at_s - first_at_s, CPU_WINDOW_S))
        return self.recent
