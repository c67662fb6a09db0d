"""Errors by class: about 130 errno values in eight groups, each with a remedy of its own.

Programs look up the class of an errno in a table, which is written from here.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_ERRNO: Final = 4095

# include/linux/errno.h: internal to the kernel, which turns them into EINTR or repeats the call.
_RESTARTS: Final = (512, 513, 514, 516)

CLASSES: Final[dict[str, tuple[int, ...]]] = {
    "other": (),
    "not_found": (
        errno.ENOENT, errno.ESRCH, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.ECHILD,
        errno.ENODATA, errno.ENOTCONN,
    ),
    "permission": (errno.EPERM, errno.EACCES, errno.EROFS),
    "again": (errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY, errno.EBUSY),
    "interrupted": (errno.EINTR, *_RESTARTS),
    "invalid": (
        errno.EINVAL, errno.EBADF, errno.EFAULT, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP,
        errno.ENOTSOCK, errno.ENAMETOOLONG, errno.ERANGE, errno.EISDIR, errno.ESPIPE, errno.E2BIG,
    ),
    "exhausted": (
        errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.ENOBUFS,
        errno.EFBIG, errno.EMLINK,
    ),
    "connection": (
        errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT,
        errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRINUSE, errno.EADDRNOTAVAIL,
    ),
}  # fmt: skip
NAMES: Final = tuple(CLASSES)


def table() -> NDArray[np.uint8]:
    """The class of each errno, of shape (4096,): an index into `NAMES`."""
    classes = np.zeros(MAX_ERRNO + 1, np.uint8)
    for index, values in enumerate(CLASSES.values()):
        classes[list(values)] = index
    return classes
