"""Why a kernel refuses something: the text, from an error and from facts given as data."""

from __future__ import annotations

import errno
import re
from dataclasses import replace

import pytest

from coral.bpf.probing import capabilities as caps
from coral.bpf.probing import features, reasons
from coral.bpf.probing.reasons import TAKES, Facts, explain, lockdown_level, options_set

EVERY_OPTION = frozenset(option for takes in TAKES.values() for option in takes.config)
MODERN = Facts(
    release="6.12.1-amd64",
    machine="x86_64",
    capabilities=caps.ALL,
    config=EVERY_OPTION,
    lockdown="none",
    seccomp=False,
    sysctls={"kernel.unprivileged_bpf_disabled": "2", "kernel.perf_event_paranoid": "3"},
)


@pytest.mark.parametrize(
    ("lacks", "name", "rules"),
    [
        ({"CAP_PERFMON"}, "tp_btf", ""),
        ({"CAP_PERFMON"}, "kprobe", " (kernel.perf_event_paranoid is 3)"),
        ({"CAP_BPF"}, "ring_buffer", " (kernel.unprivileged_bpf_disabled is 2)"),
        ({"CAP_BPF", "CAP_PERFMON"}, "raw_tp", " (kernel.unprivileged_bpf_disabled is 2)"),
        (set(), "run_time_stats", ""),
    ],
)
def test_a_missing_capability_is_named_with_the_rule_that_asks_for_it(
    lacks: set[str], name: str, rules: str
) -> None:
    lacks |= {"CAP_SYS_ADMIN"}
    needs = {need: why for need, why in TAKES[name].capabilities.items() if need in lacks}
    facts = replace(MODERN, capabilities=caps.ALL - lacks)
    assert explain(name, errno.EPERM, "", facts) == f"EPERM: {caps.missing(needs)}{rules}"


def test_a_kernel_without_cap_bpf_asks_for_cap_sys_admin() -> None:
    old = replace(MODERN, release="5.4.0-187-generic", capabilities=frozenset(), sysctls={})
    assert explain("raw_tp", errno.EPERM, "", old).startswith(
        "EPERM: CAP_SYS_ADMIN (to load programs and make maps, to attach programs that see other "
        "processes) is missing: run the agent as root, or give it CAP_SYS_ADMIN, by "
    )


def test_lockdown_is_named_where_it_is_known_to_forbid_that() -> None:
    locked = replace(MODERN, lockdown="confidentiality")
    assert explain("kprobe", errno.EPERM, "", locked) == (
        "EPERM: kernel lockdown is at confidentiality: boot with lockdown=integrity or none"
    )


@pytest.mark.parametrize(
    ("facts", "suspects"),
    [
        (MODERN, ["a security module's policy"]),
        (
            replace(MODERN, lockdown="integrity"),
            ["kernel lockdown, which is at integrity", "a security module's policy"],
        ),
        (
            replace(MODERN, lockdown=None),
            [
                "kernel lockdown (to see it: mount -t securityfs none /sys/kernel/security)",
                "a security module's policy",
            ],
        ),
        (
            replace(MODERN, seccomp=True),
            [
                "the seccomp filter around the agent (it must let bpf, perf_event_open by)",
                "a security module's policy",
            ],
        ),
    ],
)
def test_what_is_forbidden_with_every_capability_has_its_suspects_named(
    facts: Facts, suspects: list[str]
) -> None:
    text = explain("fentry", errno.EPERM, "", facts)
    opening = "EPERM: forbidden, though no capability is missing: by "
    assert text.removeprefix(opening).split(", or ") == suspects


@pytest.mark.parametrize(
    ("name", "release", "machine", "since"),
    [
        ("ring_buffer", "5.4.0-187-generic", "x86_64", "5.8"),
        ("task_storage", "5.10.0-30-amd64", "x86_64", "5.13"),
        ("elements_on_demand", "5.15.0", "x86_64", "6.1"),
        ("fentry", "6.1.0-18-arm64", "aarch64", "6.4"),
        ("raw_tp", "4.9", "x86_64", "4.17"),
    ],
)
def test_an_older_kernel_is_told_which_one_has_it(
    name: str, release: str, machine: str, since: str
) -> None:
    facts = replace(MODERN, release=release, machine=machine, config=None)
    assert explain(name, errno.EINVAL, "", facts) == (
        f"EINVAL: Linux {since} has it, and this is {release}: run a newer kernel"
    )


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EOPNOTSUPP, 524])
def test_an_option_that_the_kernel_was_built_without_is_named(error: int) -> None:
    facts = replace(MODERN, config=EVERY_OPTION - {"CONFIG_KPROBES", "CONFIG_KPROBE_EVENTS"})
    code = errno.errorcode.get(error, "524")
    assert explain("kprobe", error, "failed to create kprobe", facts) == (
        f"{code}: this kernel is built without CONFIG_KPROBES, CONFIG_KPROBE_EVENTS: run one that "
        "has them"
    )


def test_a_configuration_that_cannot_be_read_is_said_to_be_so() -> None:
    assert explain("btf", errno.ENOENT, "", replace(MODERN, config=None)) == (
        "ENOENT: this kernel, whose configuration cannot be read, may be without one of "
        "CONFIG_DEBUG_INFO_BTF"
    )


def test_what_a_feature_takes_has_the_names_of_the_kernel() -> None:
    for name, takes in TAKES.items():
        assert all(re.fullmatch(r"CONFIG_[A-Z0-9_]+", option) for option in takes.config), name
        assert takes.capabilities.keys() <= caps.ALL, name
        for facts in (
            replace(MODERN, config=frozenset()),
            replace(MODERN, config=None),
            replace(MODERN, capabilities=frozenset()),
            replace(MODERN, release="2.6.32"),
        ):
            for error in (errno.EPERM, errno.EOPNOTSUPP):
                said = explain(name, error, "", facts)
                names = re.findall(r"\b(?:CONFIG|CAP)_\w+(?:\.\w+)*", said)
                assert {*names} <= {*EVERY_OPTION, *caps.ALL}, said


def test_task_storage_is_that_of_tracing_programs() -> None:
    """Linux 5.11 has the map, but only for programs of security modules."""
    facts = replace(MODERN, release="5.12.0")
    assert explain("task_storage", errno.EINVAL, "", facts) == (
        "EINVAL: Linux 5.13 has it, and this is 5.12.0: run a newer kernel"
    )


def test_what_nothing_explains_is_told_in_the_kernels_words() -> None:
    said = "libbpf: prog 'coral_p_kprobe': failed to create kprobe"
    assert explain("kprobe", errno.ENOENT, said, MODERN) == f"ENOENT: {said}"
    assert explain("kprobe", errno.ENOMEM, "", MODERN) == "ENOMEM: Cannot allocate memory"
    assert explain("not in the table", errno.EBUSY, "", MODERN).startswith("EBUSY: ")


def test_lockdown_is_at_the_level_in_brackets() -> None:
    assert lockdown_level("none [integrity] confidentiality\n") == "integrity"
    assert lockdown_level("") is None


def test_of_a_configuration_the_options_that_are_set_are_taken() -> None:
    lines = [
        "CONFIG_BPF_SYSCALL=y\n",
        "# CONFIG_KPROBES is not set\n",
        "CONFIG_DEBUG_INFO_BTF=y\n",
        "CONFIG_DEBUG_INFO_BTF_MODULES=y\n",
        'CONFIG_LOCALVERSION="y"\n',
        "CONFIG_EVENT_TRACING=n\n",
    ]
    assert options_set(lines) == {"CONFIG_BPF_SYSCALL", "CONFIG_DEBUG_INFO_BTF"}


def test_everything_that_is_probed_is_in_the_table() -> None:
    assert {*features.HOOKS, *features.ITERATORS, *features.MAPS} <= TAKES.keys()


def test_the_facts_of_this_machine_can_be_read() -> None:
    found = reasons.facts()
    assert found.release
    assert found.config is None or found.config <= EVERY_OPTION
    assert found.lockdown in (None, "none", "integrity", "confidentiality")
