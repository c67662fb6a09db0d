"""Who Kubernetes says that a token belongs to, and what it lets its holder do.

Verdicts are remembered for a bounded time and in a bounded number, the negative ones too; tokens
are remembered by their digest alone. What cannot be asked is never allowed. Used from several
threads.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Generic, TypeVar

from coral.agent.caller import Identity
from coral.agent.errors import UnavailableError

GROUP: Final = "coral.io"
RESOURCE: Final = "collectors"
YES_S: Final = 60.0
NO_S: Final = 10.0
MOST_KEPT: Final = 1024
_MOST_AT_ONCE: Final = 8
_MOST_GROUPS: Final = 64
_USER: Final = "kubernetes:"
_GROUP: Final = "kubernetes-group:"
_TOKEN_REVIEW: Final = ("authentication.k8s.io/v1", "TokenReview", "tokenreviews")
_ACCESS_REVIEW: Final = ("authorization.k8s.io/v1", "SubjectAccessReview", "subjectaccessreviews")

# Sends an object to a path of the API server; returns the one that it answers. Blocks. Raises
# `UnavailableError`.
Post = Callable[[str, Mapping[str, object]], Mapping[str, Any]]
K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """The last MOST_KEPT verdicts, each until its time is up."""

    def __init__(self, most: int = MOST_KEPT, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> tuple[V] | None:
        """The verdict, in a tuple; None where there is none, or none any more."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            if found[0] <= self._clock():
                del self._kept[key]
                return None
            return (found[1],)

    def put(self, key: K, value: V, for_s: float) -> None:
        """Keeps a verdict for FOR_S seconds."""
        with self._lock:
            self._kept[key] = self._clock() + for_s, value
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)


@dataclass
class Reviews:
    """Asks by POST. AUDIENCE is the one that callers' tokens must be made for."""

    post: Post
    audience: str
    clock: Callable[[], float] = time.monotonic
    unanswered: int = 0  # how often the API server did not answer
    _users: Remembered[bytes, Identity] = field(init=False)
    # Apart: whoever sends one wrong token after the other must not push out those that are right.
    _strangers: Remembered[bytes, None] = field(init=False)
    _rights: Remembered[tuple[object, ...], bool] = field(init=False)

    def __post_init__(self) -> None:
        self._users = Remembered(clock=self.clock)
        self._strangers = Remembered(clock=self.clock)
        self._rights = Remembered(clock=self.clock)
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)

    def remembers(self, token: str) -> bool:
        """Whether `identity_of` needs to ask nobody."""
        digest = _digest(token)
        return bool(self._users.get(digest) or self._strangers.get(digest))

    def identity_of(self, token: str) -> Identity | None:
        """Whose TOKEN it is; None for one that is not valid for this audience. Blocks. Raises
        `UnavailableError`."""
        digest = _digest(token)
        if found := self._users.get(digest):
            return found[0]
        if self._strangers.get(digest):
            return None
        spec = {"token": token, "audiences": [self.audience]}
        status = self._ask(_TOKEN_REVIEW, spec)
        identity = self._identity(status)
        if identity:
            self._users.put(digest, identity, YES_S)
        else:
            self._strangers.put(digest, None, NO_S)
        return identity

    def _identity(self, status: Mapping[str, Any]) -> Identity | None:
        # A server that does not know audiences says nothing of them; then the token may be for
        # anything, and whoever gets one could use it here.
        if status.get("authenticated") is not True or self.audience not in (
            status.get("audiences") or ()
        ):
            return None
        user = status.get("user")
        name = user.get("username") if isinstance(user, Mapping) else None
        if not isinstance(user, Mapping) or not isinstance(name, str) or not name:
            return None
        groups = [group for group in user.get("groups") or () if isinstance(group, str)]
        return Identity(
            "kubernetes",
            (_USER + name, *(_GROUP + group for group in groups[:_MOST_GROUPS])),
        )

    def is_allowed(self, identity: Identity, verb: str, namespace: str) -> bool:
        """Whether the caller may VERB `collectors.coral.io` in NAMESPACE; in all of them where it
        is empty. Blocks. Raises `UnavailableError`."""
        key = (identity.names, verb, namespace)
        if found := self._rights.get(key):
            return found[0]
        status = self._ask(
            _ACCESS_REVIEW,
            {
                "user": identity.principal.removeprefix(_USER),
                "groups": [
                    name.removeprefix(_GROUP) for name in identity.names if name.startswith(_GROUP)
                ],
                "resourceAttributes": {
                    "group": GROUP,
                    "resource": RESOURCE,
                    "verb": verb,
                    "namespace": namespace,
                },
            },
        )
        allowed = status.get("allowed") is True and status.get("denied") is not True
        self._rights.put(key, allowed, YES_S if allowed else NO_S)
        return allowed

    def _ask(self, what: tuple[str, str, str], spec: Mapping[str, object]) -> Mapping[str, Any]:
        version, kind, plural = what
        if not self._places.acquire(blocking=False):
            raise UnavailableError(
                f"Kubernetes: {_MOST_AT_ONCE} earlier questions are not answered yet: try again"
            )
        try:
            answer = self.post(
                f"/apis/{version}/{plural}", {"apiVersion": version, "kind": kind, "spec": spec}
            )
        except UnavailableError:
            self.unanswered += 1
            raise
        finally:
            self._places.release()
        status = answer.get("status")
        if not isinstance(status, Mapping):
            self.unanswered += 1
            raise UnavailableError(f"Kubernetes answered the {kind} without a status")
        return status


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="replace")).digest()
