"""What the configuration lets others do that its writer may not have meant."""

from __future__ import annotations

import stat
from typing import Final

from coral.agent.access.access import Access
from coral.agent.access.rpcs import Role
from coral.agent.addresses import is_unix, unix_address
from coral.agent.caller import Identity
from coral.agent.config import Config

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def warnings(config: Config, access: Access) -> list[str]:
    """A sentence for each socket that gives whoever may open it the role `admin`, and that others
    than its owner may open."""
    found = []
    for address in filter(is_unix, config.listen):
        of = unix_address(address)
        name = f"socket:{of.name}"
        if not of.mode & _OTHERS or _by_token(config, of.name):
            continue
        if access.role_of(Identity("unix", (name,))) is not Role.ADMIN:
            continue
        who = "every local user" if of.mode & stat.S_IRWXO else f"the group {of.group or 'of it'}"
        found.append(
            f"listen: unix:{of.path} has mode {of.mode:04o}, and {name} has the role admin: {who} "
            "may do everything; give it mode=0600, or another name and a lesser role"
        )
    return found


def _by_token(config: Config, name: str) -> bool:
    """Whether callers of a socket need a token too, which gives them their role then."""
    return name == "admin" and bool(config.auth.token_file)
