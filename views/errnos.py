"""The names of errors, and which of them are no failure."""

from __future__ import annotations

import errno
from typing import Final

MAX_ERRNO: Final = 4095

# Several names have one number; these are the ones that `man` and strace use. The kernel's own,
# from 512 up (include/linux/errno.h), never reach the program: a signal interrupted the call.
_NAMES: Final = {
    **errno.errorcode,
    errno.EAGAIN: "EAGAIN",
    errno.EDEADLK: "EDEADLK",
    errno.EOPNOTSUPP: "EOPNOTSUPP",
    512: "ERESTARTSYS",
    513: "ERESTARTNOINTR",
    514: "ERESTARTNOHAND",
    515: "ENOIOCTLCMD",
    516: "ERESTART_RESTARTBLOCK",
    524: "ENOTSUPP",
}
# A call that only has to be made again, or whose outcome comes later.
_NO_FAILURES: Final = frozenset({"EAGAIN", "EINPROGRESS", "EALREADY", "EINTR"})
# A wait that may end by its time running out, and says so with ETIMEDOUT.
_TIMED_WAITS: Final = frozenset(
    {
        *("futex", "futex_time64", "futex_wait", "futex_waitv", "mq_timedreceive", "mq_timedsend"),
        *("mq_timedreceive_time64", "mq_timedsend_time64"),
    }
)


def errno_name(number: int) -> str:
    """`ECONNREFUSED` and its like; `errno 4000` where there is no name, empty for 0."""
    return _NAMES.get(number, f"errno {number}") if number else ""


def is_errno(return_value: int) -> bool:
    """Whether a system call that returned RETURN_VALUE failed."""
    return -MAX_ERRNO <= return_value < 0


def is_failure(syscall: str, error: str) -> bool:
    """Whether an ERROR of SYSCALL, by its name, means that something went wrong."""
    if error in _NO_FAILURES or error.startswith("ERESTART"):
        return False
    return not (error == "ETIMEDOUT" and syscall in _TIMED_WAITS)


def is_failure_class(syscall: str, name: str) -> bool:
    """The same of a class of errors in a summary, such as "not_found"."""
    return name not in ("again", "interrupted") and not _is_timeout(syscall, name)


def class_words(syscall: str, name: str) -> str:
    """A class of errors in words: `not found`."""
    return "timed out" if _is_timeout(syscall, name) else name.replace("_", " ")


def _is_timeout(syscall: str, name: str) -> bool:
    return name == "connection" and syscall in _TIMED_WAITS
