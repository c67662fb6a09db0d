"""What the colony and a worker say to each other: a letter, a length, and so many bytes.

The colony: `Q` the question, `T` the tables, with descriptors of the hot rows. The worker: `R` it
is ready, `N` the tables that the statement needs, then `A` parts of the answer and `D` its end;
`E`, at any time, an error in words.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

HEAD: Final = struct.Struct("<cI")
MOST_BYTES: Final = 64 << 20
READY: Final = b"R"
QUESTION: Final = b"Q"
NEEDS: Final = b"N"
TABLES: Final = b"T"
PART: Final = b"A"
DONE: Final = b"D"
ERROR: Final = b"E"


def frame(letter: bytes, content: bytes = b"") -> bytes:
    """One message."""
    return HEAD.pack(letter, len(content)) + content


def packed(data: object) -> bytes:
    """Plain data as the content of a message."""
    return json.dumps(data).encode()


def unpacked(content: bytes) -> Any:  # noqa: ANN401  of json
    """The data that `packed` made CONTENT of."""
    return json.loads(content)
