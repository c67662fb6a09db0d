"""A process that computes, and how `cpu_profile` has to report it."""

from __future__ import annotations

from typing import Final

from coral.client import Batch
from coral.views.contract import Provocation
from coral.views.cpu_profile.reading import samples

_HERTZ: Final = 999
_SAMPLES: Final = 200
# Ten times what the samples need: a machine whose host gives it little time takes fewer of them.
_CPU_S: Final = 10 * _SAMPLES / _HERTZ
_COMPUTE: Final = f"""
import time
end = time.process_time() + {_CPU_S}
while time.process_time() < end:
    sum(range(1000))
"""


def _samples(batch: Batch) -> int:
    """Samples of the program itself whose stacks are there."""
    return sum(
        sampled.samples
        for sampled in samples(batch)
        if sampled.frames and not sampled.origin.in_kernel
    )


PROVOCATION: Final = Provocation(
    things="samples",
    times=_SAMPLES,
    code=_COMPUTE,
    count=_samples,
    exact=False,
    config={"frequency": str(_HERTZ), "interval": "100ms"},
)
