"""`coral pods`: the pods of the agent's node, by the names that `coral tap` takes."""

from __future__ import annotations

import click

from coral.cli.common import ANSWER_S, agent_option, as_dict, echo_data, output_option, run
from coral.cli.page import Page, yes
from coral.client import AgentClient, PodSource
from coral.views.sheet import Column, Sheet

_PODS = (
    Column("NAMESPACE", right=False),
    Column("POD", right=False),
    Column("WORKLOAD", right=False),
    Column("SERVICE", right=False, spare=1),
    Column("CONTAINERS", right=False, wraps=True, room=20, spare=2),
)
_SOURCES = (
    Column("PODS ARE KNOWN BY", right=False),
    Column("HERE", right=False),
    Column("WHICH, OR WHY NOT", right=False, wraps=True, room=30),
)


@click.command()
@click.argument("namespace", required=False)
@agent_option
@output_option
def pods(*, namespace: str | None, address: str, output: str) -> None:
    """The pods of the agent's node, of one NAMESPACE or of all, and what they are known by."""
    run(_pods(address, output, namespace or ""))


async def _pods(address: str, output: str, namespace: str) -> int:
    async with AgentClient(address, timeout_s=ANSWER_S) as agent:
        answer = await agent.pods(namespace)
    if output != "table":
        echo_data(as_dict(answer), output)
        return 0
    page = Page()
    sheet = Sheet(_PODS)
    for pod in answer.pods:
        told = pod.attributes
        kind, name = told.get("k8s.workload.kind", ""), told.get("k8s.workload.name", "")
        sheet.add(
            pod.namespace,
            pod.name,
            f"{kind}/{name}" if kind else "",
            told.get("service.name", ""),
            ", ".join(pod.containers.values()),
        )
    if answer.pods:
        page.sheet(sheet)
    else:
        page.text(f"no pod of {namespace} is known here" if namespace else "no pod is known here")
    page.text("")
    page.sheet(sources_sheet(answer.sources))
    return 0


def sources_sheet(sources: tuple[PodSource, ...]) -> Sheet:
    """What tells of pods, as a table."""
    sheet = Sheet(_SOURCES)
    for source in sources:
        sheet.add(source.name, yes(source.used), source.detail)
    return sheet
