"""Work in the background."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

_log: Final = logging.getLogger(__name__)


class Keeper:
    """Runs what need not be waited for, one after another, in a thread that ends when there is
    nothing left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_running = False

    def submit(self, job: Callable[..., None], *arguments: Any) -> bool:
        """Runs JOB soon; whether there is a thread for it."""
        with self._lock:
            self._jobs.append(partial(job, *arguments))
            if self._is_running:
                return True
            try:
                threading.Thread(target=self._run, daemon=True).start()
                self._is_running = True
            except RuntimeError:  # no thread can be started: it was not needed
                self._jobs.pop()
            return self._is_running

    @property
    def is_idle(self) -> bool:
        """Whether all is done."""
        return not self._is_running

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._is_running = False
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:  # noqa: BLE001  the next job has nothing to do with it
                _log.exception("in the background of the hubs")


KEEPER: Final = Keeper()
