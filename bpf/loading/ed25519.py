"""Verification of Ed25519 signatures (RFC 8032, section 5.1.7), which Python's library lacks.

It works on public values only, so it need not take the same time for all of them. One verification
takes some milliseconds. It signs nothing: the build does that, with openssl.
"""

from __future__ import annotations

import hashlib
from typing import Final

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

# The field, the order of the base point, and the curve -x² + y² = 1 + d x² y².
_P: Final = 2**255 - 19
_ORDER: Final = 2**252 + 27742317777372353535851937790883648493
_D: Final = -121665 * pow(121666, -1, _P) % _P
_ROOT_OF_MINUS_1: Final = pow(2, (_P - 1) // 4, _P)

# A point in extended coordinates: x = X/Z, y = Y/Z, x y = T/Z.
_Point = tuple[int, int, int, int]
_NEUTRAL: Final[_Point] = (0, 1, 1, 0)


def verify(signature: bytes, message: bytes, public_key: bytes) -> bool:
    """Whether SIGNATURE (64 bytes) of MESSAGE was made with the private half of PUBLIC_KEY (32
    bytes)."""
    if len(signature) != SIGNATURE_BYTES or len(public_key) != KEY_BYTES:
        return False
    key, nonce = _decoded(public_key), _decoded(signature[:KEY_BYTES])
    scalar = int.from_bytes(signature[KEY_BYTES:], "little")
    if key is None or nonce is None or scalar >= _ORDER:
        return False
    hashed = hashlib.sha512(signature[:KEY_BYTES] + public_key + message).digest()
    challenge = int.from_bytes(hashed, "little") % _ORDER
    # The signature's equation, S B = R + k A.
    return _equal(_times(scalar, _BASE), _sum(nonce, _times(challenge, key)))


def _decoded(encoded: bytes) -> _Point | None:
    """The point of 32 bytes: y, and the lowest bit of x at the top (RFC 8032, 5.1.3)."""
    value = int.from_bytes(encoded, "little")
    y, is_odd = value & ((1 << 255) - 1), value >> 255
    if y >= _P:
        return None
    numerator, denominator = (y * y - 1) % _P, (_D * y * y + 1) % _P
    x_squared = numerator * pow(denominator, -1, _P) % _P
    # p is 5 modulo 8: the root is this power, or that times a root of -1.
    x = pow(x_squared, (_P + 3) // 8, _P)
    if (x * x - x_squared) % _P:
        x = x * _ROOT_OF_MINUS_1 % _P
    if (x * x - x_squared) % _P or (x == 0 and is_odd):
        return None
    if x & 1 != is_odd:
        x = _P - x
    return x, y, 1, x * y % _P


def _sum(one: _Point, other: _Point) -> _Point:
    """The sum of two points (RFC 8032, 5.1.4); the formula holds for equal ones as well."""
    (x1, y1, z1, t1), (x2, y2, z2, t2) = one, other
    a, b = (y1 - x1) * (y2 - x2) % _P, (y1 + x1) * (y2 + x2) % _P
    c, d = 2 * _D * t1 * t2 % _P, 2 * z1 * z2 % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _times(scalar: int, point: _Point) -> _Point:
    result = _NEUTRAL
    for bit in f"{scalar:b}":
        result = _sum(result, result)
        if bit == "1":
            result = _sum(result, point)
    return result


def _equal(one: _Point, other: _Point) -> bool:
    (x1, y1, z1, _), (x2, y2, z2, _) = one, other
    return (x1 * z2 - x2 * z1) % _P == 0 and (y1 * z2 - y2 * z1) % _P == 0


def _base() -> _Point:
    """The base point: y = 4/5, x even."""
    point = _decoded((4 * pow(5, -1, _P) % _P).to_bytes(KEY_BYTES, "little"))
    assert point is not None  # noqa: S101  it is a constant of the curve
    return point


_BASE: Final = _base()
