"""A process that computes, and how `cpu_profile` has to report it."""

from __future__ import annotations

from typing import Final

from coral.client import Batch
from coral.views.contract import Provocation
from coral.views.cpu_profile.reading import samples

_HERTZ: Final = 999
_CPU_S: Final = 0.25
_SHARE: Final = 0.8  # of the samples that this amounts to: CPU time and wall clock differ
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
    times=round(_HERTZ * _CPU_S * _SHARE),
    code=_COMPUTE,
    count=_samples,
    exact=False,
    config={"frequency": str(_HERTZ), "interval": "100ms"},
)
