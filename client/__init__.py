"""The Python client of the contract: connect, start, subscribe, watch, stop; see docs/client.md.

It shares the generated messages and `coral.wire` with the agent, and nothing else.
"""

from coral.client.account import Account
from coral.client.address import (
    DEFAULT_ADDRESS,
    DEFAULT_COLONY,
    default_address,
    default_colony,
)
from coral.client.backoff import Retry
from coral.client.batch import Batch
from coral.client.client import AgentClient
from coral.client.colony import Answer, ColonyClient
from coral.client.coverage import Coverage, Gap, Lost, Piece
from coral.client.errors import (
    AgentError,
    ConnectionLostError,
    ContractError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    StreamLostError,
    TlsError,
    UnauthenticatedError,
    UnavailableError,
)
from coral.client.pods import PodInfo, Pods, PodSource
from coral.client.results import (
    Capabilities,
    CollectorCapability,
    CollectorInfo,
    CollectorOption,
    Collectors,
    CollectorStep,
    EndReason,
    KernelFeature,
    Kind,
    SessionEnd,
    Started,
    SubscriberInfo,
)
from coral.client.stream import Stream
from coral.client.terms import Terms
from coral.client.tls import Tls
from coral.client.watch import Change, Watch, What
from coral.wire.histogram import Buckets, Histogram

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_COLONY",
    "Account",
    "AgentClient",
    "AgentError",
    "Answer",
    "Batch",
    "Buckets",
    "Capabilities",
    "Change",
    "CollectorCapability",
    "CollectorInfo",
    "CollectorOption",
    "CollectorStep",
    "Collectors",
    "ColonyClient",
    "ConnectionLostError",
    "ContractError",
    "Coverage",
    "DeadlineExceededError",
    "EndReason",
    "FailedPreconditionError",
    "Gap",
    "Histogram",
    "InvalidArgumentError",
    "KernelFeature",
    "Kind",
    "LimitExceededError",
    "Lost",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Piece",
    "PodInfo",
    "PodSource",
    "Pods",
    "Retry",
    "SessionEnd",
    "Started",
    "Stream",
    "StreamLostError",
    "SubscriberInfo",
    "Terms",
    "Tls",
    "TlsError",
    "UnauthenticatedError",
    "UnavailableError",
    "Watch",
    "What",
    "default_address",
    "default_colony",
]
