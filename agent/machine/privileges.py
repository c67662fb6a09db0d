"""Least privilege: at start the agent permanently drops every capability that it does not need, and
becomes an ordinary user if configured to.

Capabilities belong to threads, so call `settle` before any thread is started. `to_keep` decides
what is kept, from sets alone. docs/privileges.md says what each capability is for.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final

import structlog

from coral.agent.addresses import is_unix, unix_address
from coral.agent.config import Config, ConfigError
from coral.bpf.probing import capabilities as caps

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.privileges")

# From linux/prctl.h and linux/capability.h.
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522


def to_keep(
    needs: Iterable[Mapping[str, str]],
    known: frozenset[str],
    *,
    observe_only: bool = False,
    ordinary_user: bool = False,
) -> frozenset[str]:
    """The capabilities to keep if the process holds them.

    They are those that collectors NEED or want on a kernel that has the capabilities KNOWN, those
    that find the processes of a service, and those for perf buffers. CAP_SYS_ADMIN is kept for the
    run-time statistics too, unless the agent becomes an ORDINARY_USER. With OBSERVE_ONLY it is
    never kept.
    """
    kept = {*caps.LISTENERS, *caps.BUFFERS}
    for need in needs:
        kept |= set(caps.required(need, known))
    if not ordinary_user:
        kept |= caps.STATISTICS.keys()
    if observe_only:
        kept.discard("CAP_SYS_ADMIN")
    return frozenset(kept)


def refusal(
    needs: Mapping[str, str],
    has: frozenset[str],
    known: frozenset[str],
    *,
    observe_only: bool = False,
) -> str:
    """Why a collector that NEEDS these capabilities cannot run in a process that HAS those, on a
    kernel that has the capabilities KNOWN. Empty if it can."""
    needed = caps.required(needs, known)
    if observe_only and "CAP_SYS_ADMIN" in needed:
        return (
            f"policy.observe_only: on this kernel it needs CAP_SYS_ADMIN "
            f"({needed['CAP_SYS_ADMIN']}), which this agent does not keep"
        )
    lacking = caps.lacking(needed, has)
    return caps.missing(lacking) if lacking else ""


def settle(config: Config, needs: Iterable[Mapping[str, str]]) -> frozenset[str]:
    """Drops what the agent does not need, for this thread and all threads that it starts, and
    becomes `config.user`. Returns what is kept. Raises `ConfigError` if that fails."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    held = caps.held("CapPrm")
    user = _user(config.user, held)
    keep = held & to_keep(
        needs,
        caps.of_kernel(),
        observe_only=config.policy.observe_only,
        ordinary_user=user is not None and user.pw_uid != 0,
    )
    # Before Linux 5.11, maps count against this limit; without capabilities it cannot be raised.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    try:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _drop_bounds(keep, held)
        if user and user.pw_uid != os.geteuid():
            _make_socket_directories(config, user)
            _become(user, _groups_of_sockets(config))
        elif "CAP_SETGID" in held and (groups := _groups_of_sockets(config)):
            os.setgroups([*os.getgroups(), *groups])
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        _set_capabilities(keep)
    except OSError as error:
        raise ConfigError(f"privileges cannot be given up: {error}") from error
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  a count, no paths
    if threads > 1:
        log.warning(
            "threads that libraries have started keep their capabilities", count=threads - 1
        )
    return keep


def _user(name: str, held: frozenset[str]) -> pwd.struct_passwd | None:
    """The user with that name or number, if a process with the capabilities HELD can become it.
    Raises `ConfigError`."""
    if not name:
        return None
    try:
        user = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise ConfigError(f"user: this machine has no user {name!r}") from None
    if user.pw_uid != os.geteuid() and not held >= {"CAP_SETUID", "CAP_SETGID"}:
        raise ConfigError(
            f"user: to become {user.pw_name!r} takes root; this is user {os.geteuid()}"
        )
    return user


def _make_socket_directories(config: Config, user: pwd.struct_passwd) -> None:
    """Makes the directories of sockets that do not exist: under /run, only root can."""
    for address in config.listen:
        if not is_unix(address):
            continue
        directory = unix_address(address).path.parent
        if not directory.exists():
            try:
                directory.mkdir(mode=0o755, parents=True)
                os.chown(directory, user.pw_uid, user.pw_gid)
            except OSError as error:
                raise ConfigError(f"listen: {address}: {error}") from error


def _groups_of_sockets(config: Config) -> list[int]:
    """The groups that sockets are to be given to: without CAP_CHOWN, only a member may do that.
    Raises `ConfigError`."""
    try:
        gids = {unix_address(address).gid for address in config.listen if is_unix(address)}
    except ValueError as error:
        raise ConfigError(f"listen: {error}") from error
    return sorted(gids - {-1})


def _become(user: pwd.struct_passwd, groups: list[int]) -> None:
    """Changes to USER, also a member of GROUPS, in all threads; this thread keeps its permitted
    capabilities."""
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.initgroups(user.pw_name, user.pw_gid)
    if groups:
        os.setgroups([*os.getgroups(), *groups])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    _prctl(_PR_SET_KEEPCAPS, 0)
    # Otherwise this process's files in /proc would belong to root.
    _prctl(_PR_SET_DUMPABLE, 1)


def _drop_bounds(keep: frozenset[str], held: frozenset[str]) -> None:
    """Drops all but KEEP from the bounding set, so that no program that this process executes can
    have them. That needs CAP_SETPCAP; without it, no_new_privs alone has the same effect."""
    if "CAP_SETPCAP" not in held:
        return
    for number in range(64):
        if number < len(caps.NAMES) and caps.NAMES[number] in keep:
            continue
        try:
            if _prctl(_PR_CAPBSET_READ, number):
                _prctl(_PR_CAPBSET_DROP, number)
        except OSError:
            return  # the kernel has no more capabilities


def _set_capabilities(keep: frozenset[str]) -> None:
    """Makes KEEP the effective and permitted capabilities; none are inheritable."""
    mask = sum(1 << caps.number(name) for name in keep)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # struct __user_cap_data_struct[2]: effective, permitted, inheritable, of 32 bits each
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _checked("capset", ctypes.byref(header), ctypes.byref(data))


def _prctl(option: int, argument: int = 0) -> int:
    return _checked("prctl", option, *map(ctypes.c_ulong, (argument, 0, 0, 0)))


def _checked(name: str, *arguments: object) -> int:
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
