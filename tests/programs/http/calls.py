"""Makes requests on one connection, by `http.client`, and prints what came of them.

    calls.py PORT REQUESTS

REQUESTS are JSON: a list of [method, path, body bytes, headers]. A body is sent in chunks if the
headers say so. Writes the status and the bytes of the body of each response in a line.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator


def main() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    for method, path, length, headers in json.loads(sys.argv[2]):
        body: bytes | Iterator[bytes] | None = bytes(length) if length else None
        if "Transfer-Encoding" in headers:
            body = iter([bytes(length // 2), bytes(length - length // 2)])
        connection.request(
            method, path, body, headers, encode_chunked="Transfer-Encoding" in headers
        )
        response = connection.getresponse()
        print(response.status, len(response.read()))


main()
