"""Process ids as callers in containers know them, translated to those that the agent knows.

The kernel vouches for the process at the other end of a unix socket, and so for its pid namespace.
Nobody vouches for a namespace's number that comes by TCP: it may be another machine's.
"""

from __future__ import annotations

from collections.abc import Mapping

from coral.collectors.namespaces import own_pid_namespace, pid_namespace_of, tgids_in
from coral.collectors.options import OptionError

_REMEDY = "start coral with hostPID: true or `docker run --pid=host`, or give the host's id"


def translated(config: Mapping[str, str], namespace: int, caller: int) -> Mapping[str, str]:
    """CONFIG with the ids in `pid`, which count in the pid namespace with the inode NAMESPACE (0:
    this agent's), as this agent's. CALLER is the id of the calling process, 0 where it is not
    known. Looks at every process. Raises `OptionError`."""
    value = config.get("pid", "")
    texts = [text.strip() for text in value.split(",") if text.strip()]
    if namespace in (0, own_pid_namespace()):
        return config
    if not texts or not all(text.isdecimal() for text in texts):
        return config  # it is refused with all other options
    if not caller:
        raise _refusal(
            value,
            f"which is not the agent's ({namespace}): it translates ids for callers on its unix "
            "socket only",
        )
    known = pid_namespace_of(caller)
    if not known:
        raise _refusal(
            value, "which the agent cannot look at: it has ended, or CAP_SYS_PTRACE is missing"
        )
    if known.inode != namespace:
        raise _refusal(
            value,
            f"and the request names another one ({namespace}) than that of the process at the "
            f"other end of the socket ({known.inode})",
        )
    tgids = tgids_in(known, set(map(int, texts)))
    for text in texts:
        if int(text) not in tgids:
            raise OptionError(
                "pid", value, f"the ids of processes that run now: {int(text)} does not"
            )
    return {**config, "pid": ",".join(str(tgids[int(text)]) for text in texts)}


def _refusal(value: str, why: str) -> OptionError:
    return OptionError(
        "pid",
        value,
        "the ids that the processes have in the agent's pid namespace: the caller is in one of its "
        f"own, {why}; {_REMEDY}",
    )
