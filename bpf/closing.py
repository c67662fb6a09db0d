"""Closing many things of which each may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coral.bpf.libbpf import BpfError


def close_all(steps: Iterable[Callable[[], object]]) -> None:
    """Calls each of STEPS, whatever the others raise; then raises that, as one `BpfError` if it is
    more than one exception."""
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001  it is raised at the end
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BpfError("; ".join(map(str, errors))) from ExceptionGroup("closing", errors)
