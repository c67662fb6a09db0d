"""Leases of collectors, as agents have them unless their configuration says otherwise."""

from __future__ import annotations

from typing import Final

MAX_LEASE_S: Final = 300.0
"""`limits.max_duration` by default: what a colony asks for that does not know an agent's own."""
