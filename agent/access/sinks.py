"""The sinks of the audit that the configuration names."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from coral.agent.access.audit_file import AuditFile
from coral.agent.config import ConfigError
from coral.agent.config_access import Audit
from coral.wire.log_writer import LogWriter


def audit_sinks(config: Audit) -> Sequence[LogWriter]:
    """The sinks, which write from now on. Raises `ConfigError` for a file that cannot be
    written."""
    sinks: list[LogWriter] = []
    if config.file:
        file = AuditFile(Path(config.file), _notice)
        try:
            file.open()
        except OSError as error:
            if error.errno != errno.ENXIO:  # a FIFO, whose reader may come later
                reason = error.strerror or str(error)
                raise ConfigError(f"audit.file: {config.file}: {reason}") from error
        sinks.append(file)
    if config.stdout:
        sinks.append(LogWriter(sys.__stdout__.fileno() if sys.__stdout__ else -1, _notice))
    return sinks


def _notice(count: int) -> str:
    return json.dumps({"event": "dropped", "lines": count}, separators=(",", ":"))
