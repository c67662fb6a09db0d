"""The manifests: valid for every Kubernetes from 1.25 on, the same by kustomize and by helm, and
with no privilege more than a profile names."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from coral.agent.config import Config, load
from tests.support import ROOT

KUBERNETES: Final = ROOT / "deploy/kubernetes"
CHART: Final = ROOT / "deploy/helm/coral"
PROGRAMS: Final = ROOT / "build/kubernetes"
OLDEST: Final = 25  # minor
PODS: Final = {"BPF", "PERFMON"}
FILES: Final = {"SYS_PTRACE", "DAC_READ_SEARCH"}
CAPABILITIES: Final = {
    "pods": PODS,
    "services": PODS | FILES,
    "old-kernel": {"SYS_ADMIN", "SYS_RESOURCE", "IPC_LOCK"} | FILES,
}
APPARMOR: Final = "container.apparmor.security.beta.kubernetes.io/agent"
# What the chart adds, so that a change of its values restarts the agents.
CHECKSUM: Final = "coral.io/config"

Manifest = dict[str, Any]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(text: str) -> dict[tuple[str, str], Manifest]:
    """Manifests, by kind and name."""
    return {(it["kind"], it["metadata"]["name"]): it for it in yaml.safe_load_all(text) if it}


def by_kustomize(profile: str) -> dict[tuple[str, str], Manifest]:
    directory = KUBERNETES / ("base" if profile == "pods" else f"profiles/{profile}")
    return parsed(run(PROGRAMS / "kubectl", "kustomize", directory))


def by_helm(*values: str) -> dict[tuple[str, str], Manifest]:
    flags = [word for value in values for word in ("--set", value)]
    helm = (PROGRAMS / "helm", "template", "coral", CHART, "--namespace", "coral")
    return parsed(run(*helm, *flags))


def container(manifests: Mapping[tuple[str, str], Manifest]) -> Manifest:
    (agent,) = manifests["DaemonSet", "coral-agent"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(agent, dict)
    return agent


def without_checksum(manifests: dict[tuple[str, str], Manifest]) -> Mapping[Any, Manifest]:
    annotations = manifests["DaemonSet", "coral-agent"]["spec"]["template"]["metadata"]
    assert re.fullmatch("[0-9a-f]{64}", annotations["annotations"].pop(CHECKSUM))
    return manifests


@pytest.mark.parametrize("profile", CAPABILITIES)
def test_the_chart_renders_what_kustomize_does(profile: str) -> None:
    by_chart = by_helm(f"profile={profile}", "createNamespace=true")
    assert without_checksum(by_chart) == by_kustomize(profile)


def test_by_default_the_chart_renders_the_base_without_the_namespace() -> None:
    base = by_kustomize("pods")
    del base["Namespace", "coral"]
    assert without_checksum(by_helm()) == base


def versions() -> list[str]:
    """Kubernetes' versions from 1.25 to the newest that there are schemas of."""
    newest = int(kubernetes_validate.latest_version().split(".")[1])
    return [f"1.{minor}" for minor in range(OLDEST, newest + 1)]


def test_there_are_schemas_from_1_25_to_the_newest() -> None:
    assert versions()[-1] >= "1.37"


@pytest.mark.parametrize("profile", CAPABILITIES)
def test_every_manifest_is_valid_and_has_no_unknown_field(profile: str) -> None:
    validate(by_kustomize_once(profile))


def test_strict_validation_would_notice_a_misspelt_field() -> None:
    (manifest,) = (it for it in by_kustomize_once("pods") if it["kind"] == "DaemonSet")
    manifest["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.30", strict=True)


def by_kustomize_once(profile: str) -> Sequence[Manifest]:
    return list(by_kustomize(profile).values())


def validate(manifests: Sequence[Manifest]) -> None:
    for version in versions():
        for manifest in manifests:
            validate_once(json.dumps(manifest), version)


@cache  # profiles have most manifests in common, and to validate one takes long
def validate_once(manifest: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


# Privileges


@pytest.mark.parametrize(("profile", "capabilities"), CAPABILITIES.items())
def test_a_profile_adds_its_capabilities_and_no_other_privilege(
    profile: str, capabilities: set[str]
) -> None:
    manifests = by_kustomize(profile)
    pod = manifests["DaemonSet", "coral-agent"]["spec"]["template"]
    assert (pod["spec"]["hostPID"], pod["spec"]["hostNetwork"]) == (True, False)
    assert not pod["spec"].get("hostIPC")
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert container(manifests)["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {
            "drop": ["ALL"],
            "add": container(manifests)["securityContext"]["capabilities"]["add"],
        },
    }
    assert set(container(manifests)["securityContext"]["capabilities"]["add"]) == capabilities
    unconfined = pod["metadata"]["annotations"].get(APPARMOR)
    assert unconfined == (None if profile == "pods" else "unconfined")
    host = [it["hostPath"]["path"] for it in pod["spec"]["volumes"] if "hostPath" in it]
    assert host == ["/sys/fs/cgroup"]
    (mount,) = (m for m in container(manifests)["volumeMounts"] if m["name"] == "cgroups")
    assert mount["readOnly"] is True


@pytest.mark.parametrize(
    "path", [*KUBERNETES.rglob("daemonset.yaml"), CHART / "templates/daemonset.yaml"], ids=str
)
def test_a_comment_above_each_capability_says_what_it_is_for(path: Path) -> None:
    lines = [line.strip() for line in path.read_text().splitlines()]
    names = PODS | FILES | CAPABILITIES["old-kernel"]
    found = [i for i, line in enumerate(lines) if line.removeprefix("- ") in names]
    assert found
    for i in found:
        assert lines[i - 1].startswith("# "), lines[i]


def test_no_role_is_bound_and_no_token_is_mounted() -> None:
    manifests = by_kustomize("pods")
    assert not {kind for kind, _ in manifests if "Role" in kind}
    account = manifests["ServiceAccount", "coral-agent"]
    assert account["automountServiceAccountToken"] is False


def test_the_namespace_allows_what_the_pod_security_standards_would_not() -> None:
    labels = by_kustomize("pods")["Namespace", "coral"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


# Operation


def test_never_two_agents_on_a_node_and_one_on_each() -> None:
    spec = by_kustomize("pods")["DaemonSet", "coral-agent"]["spec"]
    assert spec["updateStrategy"]["rollingUpdate"]["maxSurge"] == 0
    assert spec["template"]["spec"]["tolerations"] == [{"operator": "Exists"}]
    assert spec["template"]["spec"]["priorityClassName"] == "coral-agent"


def test_the_probes_ask_over_http_on_the_port_of_health() -> None:
    agent = container(by_kustomize("pods"))
    ports = {port["name"]: port["containerPort"] for port in agent["ports"]}
    assert ports == {"metrics": 9464, "health": 9465}
    for probe, path in (("startup", "healthz"), ("liveness", "healthz"), ("readiness", "readyz")):
        assert agent[f"{probe}Probe"]["httpGet"] == {"path": f"/{path}", "port": "health"}
    config = yaml.safe_load(by_kustomize("pods")["ConfigMap", "coral-agent"]["data"]["agent.yaml"])
    assert config["health"] == "0.0.0.0:9465"
    assert config["metrics"] == "0.0.0.0:9464"


def test_the_agent_has_the_nodes_name_and_a_limit_of_memory_alone() -> None:
    agent = container(by_kustomize("pods"))
    (name,) = agent["env"]
    assert name == {
        "name": "CORAL__AGENT_ID",
        "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
    }
    assert agent["resources"]["limits"] == {"memory": "1Gi"}


@pytest.mark.skipif("health" not in Config.__struct_fields__, reason="no key `health` yet")
def test_the_agent_accepts_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(by_kustomize("pods")["ConfigMap", "coral-agent"]["data"]["agent.yaml"])
    assert load(path, flags={}).metrics == "0.0.0.0:9464"


# Values of the chart


def test_values_may_only_be_those_that_the_schema_knows() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    for section in (values, *(it for it in values.values() if isinstance(it, dict))):
        is_open = section in (values["config"], values["podLabels"], values["podAnnotations"])
        section["misspelt"] = "x"
        if section is not values["nodeSelector"] and not is_open:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(values, schema)
        del section["misspelt"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("profil=pods", "profil"),
        ("profile=root", "profile"),
        ("image.digest=sha256:12", "digest"),
        ("bpfKey=short", "bpfKey"),
        ("config.metrics=0.0.0.0:1", "config"),
        ("maxUnavailable=0", "maxUnavailable"),
        ("resources.limits.memory=null", "limits"),
        ("serviceAccount.nodes=true", "nodes"),
        ("grpc.tlsSecret=No_Secret", "tlsSecret"),
        ("grpc.port=1", "port"),
    ],
)
def test_helm_refuses_a_wrong_value_by_its_name(value: str, said: str) -> None:
    helm = (PROGRAMS / "helm", "template", "coral", CHART, "--set", value)
    done = subprocess.run(helm, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert said in done.stderr


def test_values_reach_the_manifests() -> None:
    digest = f"sha256:{'0' * 64}"
    manifests = by_helm(
        "image.repository=registry.example/coral", f"image.digest={digest}",
        "podMonitor.enabled=true", "serviceAccount.token=true", "networkPolicy.enabled=false",
        "config.limits.memory=256MiB", f"bpfKey={'A' * 43}=", "priorityClass.create=false",
        "priorityClass.name=system-node-critical",
    )  # fmt: skip
    assert container(manifests)["image"] == f"registry.example/coral@{digest}"
    assert {"name": "CORAL_BPF_KEY", "value": f"{'A' * 43}="} in container(manifests)["env"]
    config = yaml.safe_load(manifests["ConfigMap", "coral-agent"]["data"]["agent.yaml"])
    assert (config["limits"], config["health"]) == ({"memory": "256MiB"}, "0.0.0.0:9465")
    pod = manifests["DaemonSet", "coral-agent"]["spec"]["template"]["spec"]
    assert (pod["automountServiceAccountToken"], pod["priorityClassName"]) == (
        True,
        "system-node-critical",
    )
    kinds = {kind for kind, _ in manifests}
    assert kinds == {"ServiceAccount", "ConfigMap", "DaemonSet", "PodMonitor"}
    monitor = parsed(run(PROGRAMS / "kubectl", "kustomize", KUBERNETES / "podmonitor"))
    assert manifests["PodMonitor", "coral-agent"] == monitor["PodMonitor", "coral-agent"]


ACCESS: Final = (
    "serviceAccount.pods=true",
    "serviceAccount.reviews=true",
    "grpc.tlsSecret=coral-tls",
    "grpc.from.matchLabels.team=shop",
)


def test_the_chart_with_access_for_teams_is_valid_and_has_no_unknown_field() -> None:
    validate([*by_helm(*ACCESS).values()])


def test_names_of_pods_need_a_right_a_token_and_the_nodes_name() -> None:
    manifests = by_helm("serviceAccount.pods=true")
    assert manifests["ClusterRole", "coral-agent-pods"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    ]
    assert ("ClusterRoleBinding", "coral-agent-reviews") not in manifests
    assert bound(manifests, "coral-agent-pods") == "coral-agent-pods"
    assert container(manifests)["env"][1] == {
        "name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
    }  # fmt: skip
    assert has_a_token_and_a_way_to_use_it(manifests)


def test_reviews_need_the_right_to_ask_for_them() -> None:
    manifests = by_helm("serviceAccount.reviews=true")
    assert not {name for kind, name in manifests if kind == "ClusterRole"}
    assert bound(manifests, "coral-agent-reviews") == "system:auth-delegator"
    assert has_a_token_and_a_way_to_use_it(manifests)


def bound(manifests: Mapping[tuple[str, str], Manifest], binding: str) -> str:
    """The ClusterRole that a binding gives the agent's account, and nobody else."""
    found = manifests["ClusterRoleBinding", binding]
    account = {"kind": "ServiceAccount", "name": "coral-agent", "namespace": "coral"}
    assert found["subjects"] == [account]
    return str(found["roleRef"]["name"])


def has_a_token_and_a_way_to_use_it(manifests: Mapping[tuple[str, str], Manifest]) -> bool:
    pod = manifests["DaemonSet", "coral-agent"]["spec"]["template"]["spec"]
    account = manifests["ServiceAccount", "coral-agent"]
    (rule,) = manifests["NetworkPolicy", "coral-agent"]["spec"]["egress"]
    ports = {it["port"] for it in rule["ports"]}
    mounted = (pod["automountServiceAccountToken"], account["automountServiceAccountToken"])
    return (mounted, ports) == ((True, True), {443, 6443})


def test_a_secret_for_tls_makes_the_agent_listen_beyond_its_pod(tmp_path: Path) -> None:
    manifests = by_helm(*ACCESS, "config.auth.kubernetes.server=https://kubernetes.default.svc")
    path = tmp_path / "agent.yaml"
    path.write_text(manifests["ConfigMap", "coral-agent"]["data"]["agent.yaml"])
    config = load(path, flags={})
    assert list(config.listen) == ["unix:/run/coral/agent.sock", "0.0.0.0:9001"]
    assert config.tls.client_certificates == "none"
    agent = container(manifests)
    assert {"name": "grpc", "containerPort": 9001, "protocol": "TCP"} in agent["ports"]
    (mount,) = (it for it in agent["volumeMounts"] if it["name"] == "tls")
    assert (mount["mountPath"], mount["readOnly"]) == ("/etc/coral-tls", True)
    for file in (config.tls.certificate, config.tls.key):
        assert Path(file).parent == Path(mount["mountPath"])
    volumes = manifests["DaemonSet", "coral-agent"]["spec"]["template"]["spec"]["volumes"]
    (secret,) = (it["secret"] for it in volumes if it["name"] == "tls")
    assert secret == {"secretName": "coral-tls", "defaultMode": 0o400}
    rules = manifests["NetworkPolicy", "coral-agent"]["spec"]["ingress"]
    (rule,) = (it for it in rules if it["ports"][0]["port"] == 9001)
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"team": "shop"}}}]


def test_agents_with_tls_have_a_service_that_names_each_of_their_addresses() -> None:
    assert ("Service", "coral-agent") not in by_helm()
    manifests = by_helm("grpc.tlsSecret=coral-tls")
    spec = manifests["Service", "coral-agent"]["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    pod = manifests["DaemonSet", "coral-agent"]["spec"]["template"]
    assert spec["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = spec["ports"]
    assert port == {"name": "grpc", "port": 9001, "targetPort": "grpc", "protocol": "TCP"}


def test_a_colony_may_look_up_the_agents_addresses_and_nothing_else() -> None:
    manifests = parsed(run(PROGRAMS / "kubectl", "kustomize", KUBERNETES / "colony"))
    validate([*manifests.values()])
    assert {kind for kind, _ in manifests} == {"ServiceAccount", "Role", "RoleBinding"}
    assert manifests["Role", "coral-colony"]["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"],
         "verbs": ["list", "watch"]}
    ]  # fmt: skip
    binding = manifests["RoleBinding", "coral-colony"]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", "coral-colony")
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "coral-colony", "namespace": "coral"}


def test_clients_certificates_are_verified_where_the_values_name_their_authority() -> None:
    authority = "config.tls.client_ca=/etc/coral-tls/ca.crt"
    manifests = by_helm("grpc.tlsSecret=coral-tls", authority)
    config = yaml.safe_load(manifests["ConfigMap", "coral-agent"]["data"]["agent.yaml"])
    assert config["tls"] == {
        "certificate": "/etc/coral-tls/tls.crt",
        "client_ca": "/etc/coral-tls/ca.crt",
        "key": "/etc/coral-tls/tls.key",
    }


def test_the_podmonitor_names_the_job_of_the_rules_and_keeps_the_labels_of_pods() -> None:
    monitors = parsed(run(PROGRAMS / "kubectl", "kustomize", KUBERNETES / "podmonitor"))
    (endpoint,) = monitors["PodMonitor", "coral-agent"]["spec"]["podMetricsEndpoints"]
    rules = (ROOT / "deploy/monitoring/rules/coral.rules.yml").read_text()
    assert set(re.findall(r'job="(.*?)"', rules)) == {"coral"}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "coral"}]
    assert endpoint["honorLabels"] is True


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    said = run(PROGRAMS / "helm", "lint", "--strict", CHART)
    assert "1 chart(s) linted, 0 chart(s) failed" in said
