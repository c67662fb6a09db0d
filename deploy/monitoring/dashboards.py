"""Writes Grafana dashboards, as JSON to import or to provision: one for each kind of collector, and
one for the agents themselves.

python -P deploy/monitoring/dashboards.py DIRECTORY

Each dashboard asks a data source of type Prometheus, and can be narrowed to agents and services.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import bargauge, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import (
    HeatmapCalculationOptions,
    ReduceDataOptions,
    VizLegendOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from coral.collectors.registry import COLLECTORS
from coral.wire.kinds import kind_name

Panel = timeseries.Panel | heatmap.Panel | bargauge.Panel | stat.Panel | table.Panel

_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_TAG: Final = "coral"
_COLUMNS: Final = 24  # of Grafana's grid
_ROW: Final = 8
_AGENTS: Final = 'instance=~"$instance"'
_OF_SERVICE: Final = f'{_AGENTS},service=~"$service"'
_WINDOW: Final = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the legend of its series."""

    expression: str
    legend: str


# Expressions.


def rate(metric: str, by: str = "", where: str = _OF_SERVICE) -> str:
    """How much a counter grows a second, added up BY labels."""
    grouped = f"by ({by}) " if by else ""
    return f"sum {grouped}(rate({metric}{{{where}}}{_WINDOW}))"


def quantile(q: float, histogram: str, by: str = "", where: str = _OF_SERVICE) -> str:
    """A quantile of a histogram over the window, by labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', labels, where)})"


def _quantiles(histogram: str, where: str = _OF_SERVICE) -> list[Query]:
    return [Query(quantile(q, histogram, "", where), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]


def share(part: str, whole: str) -> str:
    """The ratio of two rates; 0, not nothing, where there is no WHOLE."""
    return f"({part}) / clamp_min({whole}, 1e-9)"


# Panels.


def lines(title: str, text: str, unit: str, *queries: Query, width: int = 12) -> Panel:
    """Series over time, with their last and greatest values beside them."""
    legend = (
        VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    panel = timeseries.Panel().title(title).description(text).unit(unit).min(0).legend(legend)
    panel = panel.fill_opacity(8).span(width).height(_ROW).datasource(_SOURCE)
    for target in _targets(queries):
        panel = panel.with_target(target)
    return panel


def times(title: str, text: str, histogram: str, width: int = 12) -> Panel:
    """A histogram as a heat map: how many of what duration, over time."""
    target = prometheus.Dataquery().expr(rate(f"{histogram}_bucket", "le")).legend_format("{{le}}")
    target = target.ref_id("A").format(PromQueryFormat.HEATMAP)
    panel = heatmap.Panel().title(title).description(text).span(width).height(_ROW)
    return (
        panel.calculate(False)
        .calculation(HeatmapCalculationOptions())
        .datasource(_SOURCE)
        .with_target(target)
    )


def bars(title: str, text: str, unit: str, query: Query, width: int = 12) -> Panel:
    """The present values as bars, the greatest first."""
    panel = bargauge.Panel().title(title).description(text).unit(unit).min(0)
    panel = panel.span(width).height(_ROW).datasource(_SOURCE)
    panel = panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    (target,) = _targets((query,))
    return panel.with_target(target.instant())


def number(title: str, text: str, unit: str, expression: str, width: int = 4) -> Panel:
    """One present value."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(_SOURCE)
    (target,) = _targets((Query(expression, ""),))
    return panel.span(width).height(_ROW // 2).with_target(target.instant())


def sheet(title: str, text: str, expression: str, width: int = _COLUMNS) -> Panel:
    """The labels of series, a row each."""
    panel = table.Panel().title(title).description(text).span(width).height(_ROW)
    (target,) = _targets((Query(expression, ""),))
    target = target.format(PromQueryFormat.TABLE).instant()
    return panel.datasource(_SOURCE).with_target(target)


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + place))
        for place, query in enumerate(queries)
    ]


# What each dashboard shows.


def syscall_stats() -> list[Panel]:
    """System calls."""
    calls, seconds = "coral_syscall_calls_total", "coral_syscall_duration_seconds"
    errors = "coral_syscall_errors_total"
    return [
        lines(
            "Calls", "System calls that ended, by service.", "ops",
            Query(rate(calls, "service"), "{{service}}"),
        ),
        lines(
            "Failed calls", "By class of errno; some programs expect many, such as `again`.", "ops",
            Query(rate(errors, "class"), "{{class}}"),
        ),
        bars(
            "Most time", "Seconds spent in system calls, for each second of the clock: 1 is one "
            "thread that is always in this call. Waiting counts.", "none",
            Query(f"topk(12, {rate(f'{seconds}_sum', 'syscall')})", "{{syscall}}"),
        ),
        bars(
            "Most calls", "System calls a second.", "ops",
            Query(f"topk(12, {rate(calls, 'syscall')})", "{{syscall}}"),
        ),
        lines(
            "Slowest calls", "The 99th percentile of the calls that take longest.", "s",
            Query(f"topk(8, {quantile(0.99, seconds, 'syscall')} >= 0)", "{{syscall}}"),
        ),
        bars(
            "Highest share of failures", "Failed calls in all calls of a name.", "percentunit",
            Query(
                f"topk(12, {share(rate(errors, 'syscall'), rate(calls, 'syscall'))})",
                "{{syscall}}",
            ),
        ),
        times("Durations", "All system calls.", seconds, _COLUMNS),
    ]  # fmt: skip


def tcp_metrics() -> list[Panel]:
    """TCP connections."""
    prefix = "system_network_tcp"
    return [
        lines(
            "Payload", "Bytes, each once however often it was sent.", "Bps",
            Query(rate(f"{prefix}_io_bytes_total", "service, direction"),
                  "{{service}} {{direction}}"),
        ),
        lines(
            "Connections", "Attempts to connect that ended; `error_type` is empty for those that "
            "succeeded.", "ops",
            Query(rate(f"{prefix}_connections_total", "role, error_type"),
                  "{{role}} {{error_type}}"),
        ),
        lines(
            "Round trips", "One for each acknowledgement of something new.", "s",
            *_quantiles(f"{prefix}_rtt_duration_seconds"),
        ),
        lines(
            "Handshakes", "From a client's first SYN to the connection.", "s",
            *_quantiles(f"{prefix}_handshake_duration_seconds"),
        ),
        lines(
            "Segments sent again", "By what made the kernel do it.", "ops",
            Query(rate(f"{prefix}_retransmits_total", "type"), "{{type}}"),
        ),
        lines(
            "Resets and full backlogs", "Attempts that a full backlog dropped are lost time for "
            "clients, who try again after a second.", "ops",
            Query(rate(f"{prefix}_resets_total", "direction"), "reset {{direction}}"),
            Query(rate(f"{prefix}_listen_drops_total", "service"), "dropped by {{service}}"),
        ),
        times("Round trips by duration", "All services.", f"{prefix}_rtt_duration_seconds"),
        lines(
            "Age of connections at their end", "", "s",
            *_quantiles(f"{prefix}_connection_duration_seconds"),
        ),
    ]  # fmt: skip


def http_latency() -> list[Panel]:
    """HTTP requests."""
    panels: list[Panel] = []
    for role in ("server", "client"):
        seconds = f"http_{role}_request_duration_seconds"
        failed = f'{_OF_SERVICE},error_type!=""'
        side = "answered" if role == "server" else "made"
        panels += [
            lines(
                f"Requests {side}", "By service and status.", "reqps",
                Query(rate(f"{seconds}_count", "service, http_response_status_code"),
                      "{{service}} {{http_response_status_code}}"),
            ),
            lines(
                f"Failed requests {side}", "Their share: statuses of 500 and more, and requests "
                "without a response.", "percentunit",
                Query(
                    share(
                        f"{rate(f'{seconds}_count', 'service', failed)} or "
                        f"0 * {rate(f'{seconds}_count', 'service')}",
                        rate(f"{seconds}_count", "service"),
                    ),
                    "{{service}}",
                ),
            ),
            lines(
                f"Duration of requests {side}", "From the first byte of a request to the last of "
                "its response.", "s", *_quantiles(seconds),
            ),
            bars(
                f"Slowest routes {side}", "The 99th percentile.", "s",
                Query(
                    f"topk(12, {quantile(0.99, seconds, 'http_request_method, http_route')} >= 0)",
                    "{{http_request_method}} {{http_route}}",
                ),
            ),
            times(f"Durations of requests {side}", "All services and routes.", seconds),
            lines(
                f"Bodies of requests {side}", "Payload, without the framing of chunks.", "Bps",
                Query(rate(f"http_{role}_request_body_size_bytes_sum"), "requests"),
                Query(rate(f"http_{role}_response_body_size_bytes_sum"), "responses"),
            ),
        ]  # fmt: skip
    unread = lines(
        "Connections that could not be read", "By reason: HTTP/2 and other protocols, joined in "
        "the middle, and so on. What they carried is missing above.", "ops",
        Query(rate("coral_http_unread_total", "service, reason"), "{{service}} {{reason}}"),
        width=_COLUMNS,
    )  # fmt: skip
    return [*panels, unread]


def cpu_profile() -> list[Panel]:
    """CPU time by function."""
    functions = rate("coral_profile_function_cpu_seconds_total", "function")
    return [
        lines(
            "CPU time", "CPUs in use, by service.", "none",
            Query(rate("coral_profile_cpu_seconds_total", "service"), "{{service}}"),
        ),
        bars(
            "Functions", "CPUs in use by a function itself, without those it calls.", "none",
            Query(f"topk(15, {functions})", "{{function}}"),
        ),
        lines(
            "Samples", "Taken, lost for want of room, and with a stack too long to copy whole.",
            "ops",
            *(Query(rate(f"coral_profile_samples_{what}_total"), what)
              for what in ("taken", "lost", "truncated")),
        ),
        lines(
            "How stacks were found", "Frames found by frame pointers alone can miss callers.",
            "ops",
            Query(rate("coral_profile_samples_unwound_total", "method"), "{{method}}"),
        ),
        lines(
            "Caches", "Memory of symbols, names and unwind tables.", "bytes",
            Query(f"sum by (cache) (coral_profile_cache_bytes{{{_AGENTS}}})", "{{cache}}"),
            width=_COLUMNS,
        ),
    ]  # fmt: skip


def agents() -> list[Panel]:
    """The agents themselves: what they do, what it costs, what they lose."""
    own = "coral_agent"
    lost = rate(f"{own}_events_lost_total", where=_AGENTS)
    produced = rate(f"{own}_events_total", where=_AGENTS)
    up = f"count({own}_build_info{{{_AGENTS}}})"
    return [
        number("Agents", "That answer to Prometheus.", "none", up),
        number("Sessions", "At work.", "none", f"sum({own}_sessions_active{{{_AGENTS}}})"),
        number("Subscribers", "To sessions.", "none", f"sum({own}_subscribers{{{_AGENTS}}})"),
        number("Rows", "Of summaries, and single events, a second.", "cps", produced),
        number("Lost", "Events a second, by all stages.", "cps", lost),
        number(
            "Continuous collectors down", "Of the configuration.", "none",
            f"(count({own}_continuous_up{{{_AGENTS}}} == 0) or vector(0))",
        ),
        lines(
            "CPU time", "What sessions caused, by what used it; the limit is "
            "`limits.cpu_percent` of each agent.", "percentunit",
            Query(rate(f"{own}_cpu_seconds_total", "instance, cause", _AGENTS),
                  "{{instance}} {{cause}}"),
            Query(f"min({own}_cpu_limit_ratio{{{_AGENTS}}})", "lowest limit"),
        ),
        lines(
            "Memory", "Of the process, and what the kernel charges for maps.", "bytes",
            Query(
                f"process_resident_memory_bytes{{{_AGENTS}}} "
                f"and on (instance) {own}_build_info{{{_AGENTS}}}", "{{instance}} process",
            ),
            Query(f"{own}_memory_bytes{{{_AGENTS}}}", "{{instance}} maps and buffers"),
            Query(f"min({own}_memory_limit_bytes{{{_AGENTS}}})", "lowest limit"),
        ),
        lines(
            "Events lost", "By stage: kernel stages are lost to everybody, the others to one "
            "subscriber.", "cps",
            Query(rate(f"{own}_events_lost_total", "stage", _AGENTS), "{{stage}}"),
        ),
        lines(
            "Sessions that ended", "By reason.", "ops",
            Query(rate(f"{own}_sessions_ended_total", "kind, reason", _AGENTS),
                  "{{kind}} {{reason}}"),
        ),
        lines(
            "Time of programs in the kernel", "Estimated from samples of the kernel's statistics.",
            "percentunit",
            Query(f"topk(10, {rate(f'{own}_program_run_seconds_total', 'program', _AGENTS)})",
                  "{{program}}"),
        ),
        lines(
            "Connections refused, closed or slowed", "gRPC connections, by limit or reason.", "ops",
            Query(rate(f"{own}_connections_refused_total", "limit", _AGENTS), "refused: {{limit}}"),
            Query(rate(f"{own}_connections_closed_total", "reason", _AGENTS), "closed: {{reason}}"),
            Query(rate(f"{own}_connections_throttled_total", "listener", _AGENTS),
                  "slowed: {{listener}}"),
            Query(rate(f"{own}_calls_refused_total", "limit", _AGENTS), "calls: {{limit}}"),
        ),
        lines(
            "Continuous collectors", "1 while every one of the kind and service is at work.",
            "none",
            Query(f"min by (instance, kind, service) ({own}_continuous_up{{{_AGENTS}}})",
                  "{{instance}} {{kind}} {{service}}"),
        ),
        lines(
            "Log lines dropped", "Nobody read the agent's log, or not in time.", "ops",
            Query(rate(f"{own}_log_lines_dropped_total", "instance", _AGENTS), "{{instance}}"),
        ),
        sheet("Versions", "Of the agents and of what they run on.",
              f"{own}_build_info{{{_AGENTS}}}"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Board:
    """A dashboard: a metric that has every agent, or service, of its variables, and its panels."""

    title: str
    metric: str
    panels: Callable[[], list[Panel]]


_AGENTS_BOARD: Final = Board("Coral / Agents", "coral_agent_build_info", agents)
BOARDS: Final = {
    "agents": _AGENTS_BOARD,
    "syscall_stats": Board("Coral / System calls", "coral_syscall_calls_total", syscall_stats),
    "tcp_metrics": Board("Coral / TCP", "system_network_tcp_io_bytes_total", tcp_metrics),
    "http_latency": Board(
        "Coral / HTTP", '{__name__=~"http_(server|client)_request_duration_seconds_count"}',
        http_latency,
    ),
    "cpu_profile": Board("Coral / CPU profiles", "coral_profile_cpu_seconds_total", cpu_profile),
}  # fmt: skip


def dashboard(name: str, board: Board) -> Dashboard:
    """A dashboard with its variables."""
    source = DatasourceVariable("datasource").label("Data source").type("prometheus")
    made = Dashboard(board.title).uid(f"coral-{name.replace('_', '-')}").tags([_TAG])
    made = made.refresh("30s").time("now-1h", "now").with_variable(source)
    others = DashboardLink("Coral").type(DashboardLinkType.DASHBOARDS).tags([_TAG])
    made = made.link(others.as_dropdown(True).keep_time(True))
    instances = f"label_values({board.metric}, instance)"
    made = made.with_variable(_variable("instance", "Agent", instances))
    if board is not _AGENTS_BOARD:
        narrowed = _narrowed(board.metric)
        made = made.with_variable(
            _variable("service", "Service", f"label_values({narrowed}, service)")
        )
    for panel in board.panels():
        made = made.with_panel(panel)
    return made


def _narrowed(metric: str) -> str:
    return f"{metric[:-1]},{_AGENTS}}}" if metric.endswith("}") else f"{metric}{{{_AGENTS}}}"


def _variable(name: str, label: str, query: str) -> QueryVariable:
    everything = VariableOption(text="All", value="$__all")
    variable = QueryVariable(name).label(label).datasource(_SOURCE).query(query).multi(True)
    variable = variable.include_all(True).all_value(".*").current(everything)
    return variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def main() -> None:
    """Writes the dashboards."""
    if len(sys.argv) != 2:  # noqa: PLR2004  the program and a directory
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    if missing := {kind_name(kind) for kind in COLLECTORS} - BOARDS.keys():
        print(f"no dashboard for: {', '.join(sorted(missing))}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    for name, board in BOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(dashboard(name, board).build())
        (directory / f"coral-{name.replace('_', '-')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
