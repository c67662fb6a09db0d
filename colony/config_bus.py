"""The keys `bus.…` of the colony's configuration."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from coral.colony.bus.settings import SECRETS, BusSettings
from coral.colony.config_units import ByteCount, Duration
from coral.wire.settings.words import shown

_DEFAULTS: Final = BusSettings(())
_SCHEMES: Final = ("nats://", "tls://")


class Bus(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """NATS JetStream between colonies that follow agents and colonies that store."""

    mode: Annotated[
        Literal["off", "publish", "store"],
        Meta(
            description="`off`: follow agents and store; `publish`: follow agents and publish what "
            "they see; `store`: store what others publish, and answer questions"
        ),
    ] = "off"
    servers: Annotated[
        tuple[str, ...], Meta(description="servers, each `nats://HOST:PORT` or `tls://HOST:PORT`")
    ] = ()
    stream: Annotated[str, Meta(description="the stream, which is made where it is not there")] = (
        _DEFAULTS.stream
    )
    prefix: Annotated[str, Meta(description="what its subjects begin with")] = _DEFAULTS.prefix
    max_age: Annotated[
        Duration, Meta(description="how long a stream that is made keeps what is published")
    ] = Duration(_DEFAULTS.max_age_s)
    max_bytes: Annotated[ByteCount, Meta(description="how much a stream that is made keeps")] = (
        ByteCount(_DEFAULTS.max_bytes)
    )
    replicas: Annotated[
        int, Meta(ge=1, le=5, description="how many servers keep a stream that is made")
    ] = _DEFAULTS.replicas
    user: Annotated[str, Meta(description="the name of a user of the servers")] = ""
    password_file: Annotated[str, Meta(description="a file with its password")] = ""
    token_file: Annotated[str, Meta(description="a file with a token for the servers")] = ""
    nkey_file: Annotated[str, Meta(description="a file with the seed of a user's nkey")] = ""
    credentials_file: Annotated[
        str, Meta(description="a file with a user's JWT and seed, as `nsc` makes it")
    ] = ""
    ca_file: Annotated[
        str,
        Meta(description="the authorities of servers' certificates, in PEM; empty: this machine's"),
    ] = ""
    certificate_file: Annotated[
        str, Meta(description="a PEM file with the certificate that the colony shows to servers")
    ] = ""
    key_file: Annotated[str, Meta(description="a PEM file with its key")] = ""
    reader: Annotated[
        str,
        Meta(
            description="the name under which a colony that stores reads: those of one name share "
            "the agents by `shard`, those of another get everything once more"
        ),
    ] = _DEFAULTS.reader
    shard: Annotated[
        int, Meta(ge=0, le=63, description="which part of the agents it stores, from 0")
    ] = _DEFAULTS.shard
    shards: Annotated[int, Meta(ge=1, le=64, description="how many parts there are")] = (
        _DEFAULTS.shards
    )
    queue: Annotated[
        ByteCount,
        Meta(description="how much may wait to be published, before agents are read no further"),
    ] = ByteCount(_DEFAULTS.queue_bytes)

    def as_settings(self) -> BusSettings:
        """For the bus."""
        return BusSettings(
            servers=self.servers,
            stream=self.stream,
            prefix=self.prefix,
            max_age_s=self.max_age,
            max_bytes=self.max_bytes,
            replicas=self.replicas,
            user=self.user,
            password_file=self.password_file,
            token_file=self.token_file,
            nkey_file=self.nkey_file,
            credentials_file=self.credentials_file,
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            key_file=self.key_file,
            reader=self.reader,
            shard=self.shard,
            shards=self.shards,
            queue_bytes=self.queue,
        )


def problem(bus: Bus) -> str:
    """What is not accepted of these keys, or nothing."""
    if bus.mode != "off" and not bus.servers:
        return f"bus.servers: bus.mode is {bus.mode}; give at least one server"
    for index, server in enumerate(bus.servers):
        if not server.startswith(_SCHEMES):
            accepts = "give nats://HOST:PORT or tls://HOST:PORT"
            return f"bus.servers[{index}]: {shown(server)} is not accepted; {accepts}"
    if words := _problem_of_secrets(bus):
        return words
    if bus.shard >= bus.shards:
        return (
            f"bus.shard: {bus.shard} is not accepted; give a number below bus.shards, {bus.shards}"
        )
    return ""


def _problem_of_secrets(bus: Bus) -> str:
    if bool(bus.certificate_file) != bool(bus.key_file):
        lacking = "key_file" if bus.certificate_file else "certificate_file"
        return f"bus.{lacking}: give it too: a certificate and its key belong together"
    if bool(bus.user) != bool(bus.password_file):
        lacking = "password_file" if bus.user else "user"
        return f"bus.{lacking}: give it too: a user and its password belong together"
    given = [f"bus.{key}" for key in SECRETS if getattr(bus, key)]
    if len(given) > 1:
        return f"{given[1]}: give one of {' and '.join(given)}: a connection has one user"
    return ""
