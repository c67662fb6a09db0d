"""Rows of the colony's rollups, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

Row = Mapping[str, object]

PLACE = dict.fromkeys(("agent", "service", "namespace", "workload", "pod", "container"), "")
WEB = {"service": "web", "namespace": "shop", "workload": "deployment/web", "container": "app"}


def table(keys: Sequence[str], rows: Sequence[Row]) -> pa.Table:
    """ROWS of a rollup whose KEYS are not figures; texts are dictionaries, as the store's are."""
    names = dict.fromkeys([*PLACE, *keys, *(name for row in rows for name in row)])
    columns: dict[str, object] = {"time_ns": pa.array([60 * 10**9] * len(rows), pa.int64())}
    for name in names:
        values = [row.get(name, PLACE.get(name)) for row in rows]
        column = pa.array(values)
        if pa.types.is_string(column.type):
            column = column.dictionary_encode()
        elif name in keys and pa.types.is_int64(column.type):
            column = column.cast(pa.uint32())
        columns[name] = column
    return pa.table(columns)


def syscalls(*rows: Row) -> pa.Table:
    return table(("syscall", "syscall_number"), rows)


def requests(*rows: Row) -> pa.Table:
    return table(("role", "method", "status", "route", "tls", "version"), rows)


def connections(*rows: Row) -> pa.Table:
    return table(("role", "error", "end"), rows)


def peers(*rows: Row) -> pa.Table:
    return table(("role", "remote_address", "port"), rows)


def samples(*rows: Row) -> pa.Table:
    return table(("in_kernel", "process"), rows)


def of_all_kinds() -> dict[str, pa.Table]:
    """A minute of two agents and the service `web`, and of a service without pods."""
    http = {
        **WEB, "role": "server", "method": "GET", "route": "/a", "tls": False, "version": 1,
    }  # fmt: skip
    return {
        "syscall_stats_1m": syscalls(
            {
                **WEB, "agent": "a", "syscall": "read", "syscall_number": 0, "call_count": 10,
                "total_duration_ns": 3_000, "latency_e6": 3, "latency_e8": 7,
                "errors_not_found": 2,
            },
            {
                **WEB, "agent": "b", "syscall": "read", "syscall_number": 0, "call_count": 5,
                "total_duration_ns": 1_000, "latency_e6": 5, "errors_not_found": 1,
            },
            {
                "service": "cron", "agent": "a", "syscall": "read", "syscall_number": 0,
                "call_count": 1, "total_duration_ns": 2**38, "latency_e37": 1,
            },
        ),
        "http_latency_1m": requests(
            {
                **http, "status": 200, "count": 30, "sum_ns": 6 * 10**9,
                "duration_le_100000": 10, "duration_le_250000000": 15, "duration_le_inf": 5,
                "outcomes_complete": 30, "request_body_bytes": 7, "response_body_bytes": 900,
            },
            {
                **http, "status": 503, "count": 2, "sum_ns": 10**9, "duration_le_500000000": 2,
                "outcomes_complete": 2, "response_body_bytes": 4,
            },
            {
                **http, "status": 0, "count": 1, "sum_ns": 10**9, "duration_le_1000000000": 1,
                "outcomes_aborted_by_client": 1,
            },
        ),
        "tcp_metrics_1m": connections(
            {
                **WEB, "role": "client", "error": "", "end": "open", "bytes_sent": 100,
                "bytes_received": 200, "established": 4, "retransmits_fast": 3,
                "rtt_us_le_200": 6, "rtt_us_le_2000": 2, "rtt_us_delta_sum": 5_000,
            },
            {**WEB, "role": "client", "error": "ECONNREFUSED", "end": "refused", "failed": 2},
            {**WEB, "role": "listener", "syn_ack_retransmits": 5, "listen_drops": 9},
        ),
        "tcp_peers_1m": peers(
            {
                **WEB, "role": "client", "remote_address": "10.0.0.1", "port": 80,
                "bytes_sent": 1, "connections_established": 3, "failures_etimedout": 4,
                "failures_none": 3, "connect_us_le_1000": 3, "connect_us_delta_sum": 2_100,
            },
        ),
        "cpu_profile_1m": samples(
            {**WEB, "in_kernel": False, "process": "x", "cpu_ns": 1_500_000_000, "count": 3},
            {**WEB, "in_kernel": True, "process": "x", "cpu_ns": 500_000_000, "count": 1},
        ),
        "cpu_stacks": samples({"service": "ignored", "count": 1}),
    }  # fmt: skip
