"""What users write to select pods and containers, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.collectors.options import OptionError
from coral.collectors.selectors import SELECTORS, parse, parse_labels
from coral.collectors.syscall_stats.collector import SyscallStatsCollector

NO_LABELS: dict[str, str] = {}


@pytest.mark.parametrize(
    ("selector", "pod"),
    [
        ("pod:shop/web-1", ("shop", "web-1", NO_LABELS, ())),
        ("pod:shop/web.v1-2/app", ("shop", "web.v1-2", NO_LABELS, ())),
        ("namespace:shop", ("shop", "anything", NO_LABELS, ())),
        ("pods:shop?app=web", ("shop", "x", {"app": "web"}, ())),
        ("pods:shop?app==web,tier!=batch", ("shop", "x", {"app": "web"}, ())),
        ("pods:shop?app in (web, api),!canary", ("shop", "x", {"app": "api"}, ())),
        ("pods:shop?app notin (db)", ("shop", "x", NO_LABELS, ())),
        ("pods:shop?example.com/team", ("shop", "x", {"example.com/team": ""}, ())),
        ("workload:shop/deploy/web", ("shop", "x", NO_LABELS, (("deployment", "web"),))),
        ("workload:shop/StatefulSet/db", ("shop", "db-0", NO_LABELS, (("statefulset", "db"),))),
        ("workload:shop/cj/nightly", ("shop", "x", NO_LABELS, (("job", "n"),
                                                               ("cronjob", "nightly")))),
    ],
)  # fmt: skip
def test_a_selector_accepts_its_pods_and_no_others(
    selector: str, pod: tuple[str, str, dict[str, str], tuple[tuple[str, str], ...]]
) -> None:
    kind, _, text = selector.partition(":")
    found = parse(kind, text)
    namespace, name, labels, workloads = pod
    assert str(found) == selector
    assert found.accepts(namespace, name, labels, workloads)
    assert not found.accepts("bank", name, labels, workloads)
    other = {"app": "db", "canary": "", "tier": "batch"}
    assert found.accepts(namespace, "other", other, ()) == (kind == "namespace")


@pytest.mark.parametrize(
    "text",
    [
        "pod:", "pod:web", "pod:shop/", "pod:/web", "pod:shop/web/", "pod:shop/web/app/more",
        "pod:Shop/web", "pod:shop/../etc", "pod:shop/web\n", "pod:shop/we b", "pod:sh\u00f6p/web",
        "pod:shop/" + "a" * 254, "pod:" + "a" * 64 + "/web", "pod:shop/-web", "pod:shop/web_1",
        "pod:shop/web/" + "a" * 64, "pods:shop", "pods:shop?", "pods:?app=web", "pods:shop? ",
        "pods:shop?app=we/b", "pods:shop?app=", "pods:shop?app in ()", "pods:shop?=x",
        "pods:shop?app in (a", "pods:shop?app>1", "pods:shop?" + "a" * 64 + "=x",
        "pods:shop?" + ",".join(["a"] * 65), "pods:shop?app=web,,b", "pods:shop?app=\x1b[31m",
        "namespace:", "namespace:a/b", "namespace:*", "namespace:shop ", "workload:shop/web",
        "workload:shop/pod/web", "workload:shop/deploy/", "workload:shop/deploy/a/b",
        "container:", "container:abc", "container:xyz1", "container:" + "a" * 65,
        "container:containerd://", "container:../../etc",
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_what_is_accepted(text: str) -> None:
    kind, _, value = text.partition(":")
    if text in ("pods:shop?app=", "pods:shop?app in ()"):  # an empty value is one, too
        assert parse(kind, value).labels[0].values == {""}
        return
    with pytest.raises(ValueError, match=r".") as refused:
        parse(kind, value)
    assert len(str(refused.value)) < 300
    if value:
        with pytest.raises(OptionError) as error:
            SyscallStatsCollector.check({kind: value}, None)
        assert error.value.name == kind
        assert error.value.accepts == str(refused.value)


def test_a_container_is_written_as_kubectl_shows_it() -> None:
    long = "3f2a" * 16
    assert parse("container", f"containerd://{long}").container == long
    assert parse("container", "3f2a9c").container == "3f2a9c"


@given(st.sampled_from(SELECTORS), st.text(max_size=80))
def test_any_text_is_parsed_or_refused(kind: str, text: str) -> None:
    try:
        found = parse(kind, text)
    except ValueError:
        return
    assert found.kind == kind
    assert text.isprintable()


def test_all_requirements_have_to_hold() -> None:
    app, tier, canary = parse_labels("app in (a,b), tier!=x, !canary")
    assert app.values == {"a", "b"}
    assert tier.without
    assert canary == parse_labels("!canary")[0]
    assert not app.accepts({})
    assert tier.accepts({})
    assert not canary.accepts({"canary": "yes"})


def test_only_one_target_is_accepted_and_a_pod_is_whole() -> None:
    with pytest.raises(OptionError, match="pod is given too"):
        SyscallStatsCollector.check({"pod": "shop/web", "namespace": "shop"}, None)
    with pytest.raises(OptionError, match="a pod is all of its processes"):
        SyscallStatsCollector.check({"pod": "shop/web", "follow_children": "false"}, None)
