"""Metric families as text: Prometheus' format 0.0.4, or OpenMetrics 1.0.

For what the agent exposes, it says the same as prometheus-client's own encoders, in a quarter of
the time: with 200 label sets of each kind, OpenMetrics takes 65 ms in place of 245. It knows
nothing of exemplars, timestamps and native histograms. It runs in a thread, and lets others go on
after every few samples: a loop that waits for the interpreter's lock would otherwise wait 5 ms each
time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Final

from prometheus_client import Metric

from coral.wire.series import Service, le

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_SAMPLES_AT_ONCE: Final = 200
_PAUSE_S: Final = 20e-6
_IN_TEXT: Final = str.maketrans({"\\": r"\\", "\n": r"\n"})
_IN_QUOTES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def encode(families: Iterable[Metric], content_type: str) -> bytes:
    """FAMILIES in one of the two formats above. Blocks; call it in a thread."""
    lines: list[str] = []
    escaped: dict[str, str] = {}
    until_pause = _SAMPLES_AT_ONCE
    for family in families:
        lines += _header(family, openmetrics=content_type == OPENMETRICS)
        for sample in family.samples:
            until_pause -= 1
            if not until_pause:
                until_pause = _SAMPLES_AT_ONCE
                time.sleep(_PAUSE_S)
            labels = _labels(sample.labels, escaped)
            lines.append(f"{sample.name}{labels} {_value(sample.value)}\n")
    if content_type == OPENMETRICS:
        lines.append("# EOF\n")
    # A name from /proc can have lone surrogates.
    return "".join(lines).encode(errors="backslashreplace")


def _header(family: Metric, *, openmetrics: bool) -> Iterator[str]:
    name, kind = family.name, family.type
    if openmetrics:
        yield f"# HELP {name} {family.documentation.translate(_IN_QUOTES)}\n"
        yield f"# TYPE {name} {kind}\n"
        if family.unit:
            yield f"# UNIT {name} {family.unit}\n"
        return
    if kind == "counter":
        name += "_total"
    yield f"# HELP {name} {family.documentation.translate(_IN_TEXT)}\n"
    yield f"# TYPE {name} {'untyped' if kind == 'unknown' else kind}\n"


def _labels(labels: Mapping[str, str], escaped: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = []
    service = labels.get("service")
    if isinstance(service, Service):
        labels = {**labels, **service.more}
    for name, value in labels.items():
        if (text := escaped.get(value)) is None:
            text = escaped[value] = value.translate(_IN_QUOTES)
        pairs.append(f'{name}="{text}"')
    return f"{{{','.join(pairs)}}}"


def _value(value: float) -> str:
    return repr(value) if isinstance(value, int) or isfinite(value) else le(value)
