"""Least privilege, with real processes: which capabilities an agent keeps, that they suffice, and
that each missing one is reported by name. The watched processes belong to root, the agent to
nobody."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
import pytest

from coral.bpf.loading.object_file import object_path
from coral.bpf.probing.capabilities import BUFFERS, LISTENERS, NAMES, NAMES_OF_CODE, TRACING
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name
from tests.e2e.test_refusals import has_tried_the_kernel, refused_start
from tests.e2e.test_services import in_cgroup
from tests.openssl import openssl_program
from tests.support import (
    ROOT,
    Puppet,
    RunningAgent,
    code_and_text,
    coral,
    running_agent,
    scrape,
    wait_until,
    watching,
)

NOBODY: Final = pwd.getpwnam("nobody")
ORDINARY: Final = frozenset({*TRACING, *LISTENERS, *NAMES_OF_CODE, *BUFFERS})
ROOTS: Final = ORDINARY | {"CAP_SYS_ADMIN"}
CALLS: Final = 1000

pytestmark = pytest.mark.usefixtures("nothing_left")


@contextmanager
def nobodys_directory() -> Iterator[Path]:
    """A directory that belongs to the user nobody, who could not even enter a temporary directory
    of root's."""
    path = Path(tempfile.mkdtemp(prefix="coral-"))
    os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def directory() -> Iterator[Path]:
    with nobodys_directory() as path:
        yield path


@pytest.fixture(scope="module")
def nobodys() -> Iterator[RunningAgent]:
    """An ordinary user's agent with exactly the documented capabilities."""
    with (
        nobodys_directory() as path,
        running_agent(path, prefix=as_nobody(ORDINARY)) as agent,
    ):
        has_tried_the_kernel(agent)
        yield agent


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def as_nobody(names: frozenset[str]) -> list[str]:
    """A prefix that runs a command as an ordinary user with exactly those capabilities, as systemd
    would."""
    caps = some(names)
    return [
        *("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"),
        *(f"--bounding-set={caps}", f"--inh-caps={caps}", f"--ambient-caps={caps}"),
    ]


def some(names: frozenset[str]) -> str:
    """Those capabilities and no others, as setpriv's options take them."""
    return ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])


def status_of(pid: int) -> Iterator[dict[str, str]]:
    """/proc/PID/task/TID/status of each thread of a process, by field."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
        yield {name: " ".join(value.split()) for name, value in (ln.split(":", 1) for ln in lines)}


def names(mask: str) -> frozenset[str]:
    return frozenset(name for bit, name in enumerate(NAMES) if int(mask, 16) >> bit & 1)


def has_exactly(agent: RunningAgent, kept: frozenset[str], uid: int) -> None:
    """Asserts that every thread of the agent runs as that user with those capabilities, and can
    gain no others."""
    has_tried_the_kernel(agent)  # in a thread, so that there are several
    scrape(agent)
    threads = list(status_of(agent.process.pid))
    assert len(threads) > 2
    for status in threads:
        assert status["Uid"] == " ".join([str(uid)] * 4)
        for which in ("CapEff", "CapPrm", "CapBnd"):
            assert names(status[which]) == kept, which
        assert (names(status["CapInh"]), names(status["CapAmb"])) == (frozenset(), frozenset())
        assert status["NoNewPrivs"] == "1"
    (told,) = (line for line in agent.log() if line["event"] == "privileges")
    assert (told["uid"], told["capabilities"]) == (uid, sorted(kept))
    assert not any("were started before" in str(line["event"]) for line in agent.log())


# Capabilities that are kept


def test_roots_agent_keeps_what_it_needs(directory: Path) -> None:
    os.chown(directory, 0, 0)
    with running_agent(directory) as agent:
        has_exactly(agent, ROOTS, uid=0)
        counts_exactly(agent)


@pytest.mark.parametrize(
    ("config", "flags", "environment"),
    [
        ({"user": "nobody"}, (), {}),
        ({"user": str(NOBODY.pw_uid)}, (), {}),
        ({}, ("--user", "nobody"), {}),
        ({}, (), {"CORAL__USER": "nobody"}),
    ],
)
def test_roots_agent_becomes_a_user(
    directory: Path,
    config: Mapping[str, object],
    flags: Sequence[str],
    environment: Mapping[str, str],
) -> None:
    with running_agent(directory, config, *flags, environment=environment) as agent:
        has_exactly(agent, ORDINARY, uid=NOBODY.pw_uid)
        groups = " ".join(map(str, os.getgrouplist("nobody", NOBODY.pw_gid)))
        for status in status_of(agent.process.pid):
            assert status["Gid"] == " ".join([str(NOBODY.pw_gid)] * 4)
            assert status["Groups"] == groups
        counts_exactly(agent)


def test_an_ordinary_users_agent_keeps_what_it_was_given(directory: Path) -> None:
    with running_agent(directory, prefix=as_nobody(ORDINARY)) as agent:
        has_exactly(agent, ORDINARY, uid=NOBODY.pw_uid)


def test_an_ordinary_users_agent_gives_up_what_it_does_not_need(directory: Path) -> None:
    given = ROOTS | {"CAP_NET_ADMIN", "CAP_SYS_BOOT", "CAP_SETPCAP", "CAP_KILL"}
    config = {"policy": {"observe_only": True}}
    with running_agent(directory, config, prefix=as_nobody(given)) as agent:
        has_exactly(agent, ORDINARY, uid=NOBODY.pw_uid)


def test_a_containers_root_becomes_a_user_with_what_that_takes(directory: Path) -> None:
    given = ORDINARY | {"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"}
    prefix = ["setpriv", f"--bounding-set={some(given)}", "--inh-caps=-all"]
    with running_agent(directory, None, "--user", "nobody", prefix=prefix) as agent:
        has_exactly(agent, ORDINARY, uid=NOBODY.pw_uid)
        counts_exactly(agent)


def test_only_what_allowed_collectors_need_is_kept(directory: Path) -> None:
    config = {"policy": {"collectors": ["syscall_stats"], "observe_only": True}}
    with running_agent(directory, config, "--user", "nobody") as agent:
        kept = frozenset({*LISTENERS, *BUFFERS, *TRACING})
        assert {names(s["CapPrm"]) for s in status_of(agent.process.pid)} == {kept}


def test_an_agent_that_observes_only_has_no_cap_sys_admin_and_says_what_that_costs(
    directory: Path,
) -> None:
    os.chown(directory, 0, 0)
    with running_agent(directory, {"policy": {"observe_only": True}}) as agent:
        has_exactly(agent, ORDINARY, uid=0)
        counts_exactly(agent)
        feature = features(agent)["run_time_stats"]
        assert not feature.available
        assert feature.reason.startswith("EPERM: CAP_SYS_ADMIN (to turn the kernel's run-time")
        (warning,) = wait_until(
            lambda: [ln for ln in agent.log() if str(ln["event"]).startswith("no run time")]
        )
        assert warning["reason"] == feature.reason


# These capabilities suffice


def counts_exactly(agent: RunningAgent) -> None:
    with Puppet() as puppet, watching(agent, pid=str(puppet.pid)) as watch:
        puppet.getppid(CALLS)
        watch.read_until_calls("getppid", CALLS)


@pytest.mark.parametrize("mode", ["summaries", "events"])
@pytest.mark.parametrize("how", ["pid", "comm", "cgroup", "service", "listening"])
def test_an_ordinary_users_agent_watches_another_users_process(
    nobodys: RunningAgent, how: str, mode: str, stack: ExitStack
) -> None:
    name = f"svc{uuid.uuid4().hex[:8]}"
    puppet = named_puppet(stack, name, listens=how == "listening")
    if how in ("cgroup", "service"):
        stack.enter_context(in_cgroup(f"{name}.service", puppet.pid))
    target = {
        "pid": {"pid": str(puppet.pid)},
        "comm": {"comm": name},
        "cgroup": {"cgroup": f"/{name}.service"},
    }.get(how, {})
    service_name = "" if target else name
    config = {"mode": mode, "include": "getppid", **target}
    with watching(nobodys, 60, service_name, **config) as watch:
        puppet.getppid(CALLS)
        if mode == "summaries":
            watch.read_until_calls("getppid", CALLS)
            assert {row.pid for row in watch.rows} == {puppet.pid}
        else:
            calls: list[pb.SyscallCall] = []
            while len(calls) < CALLS:
                calls += watch.read().syscall_calls
            assert [call.pid for call in calls] == [puppet.pid] * CALLS
        assert not watch.losses


def named_puppet(stack: ExitStack, name: str, *, listens: bool) -> Puppet:
    """A process of root's with that command name, which listens on a TCP port or does not."""
    puppet = stack.enter_context(Puppet())
    puppet.do(f"open('/proc/self/comm', 'w').write({name!r})")
    if listens:
        puppet.do("import socket; s = socket.create_server(('127.0.0.1', 0))")
    return puppet


@pytest.mark.parametrize("mode", ["summaries", "events"])
def test_an_ordinary_users_agent_follows_another_users_connections(
    nobodys: RunningAgent, mode: str
) -> None:
    kind = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
    with Puppet() as puppet:
        puppet.do("import socket; l = socket.create_server(('127.0.0.1', 0))")
        puppet.do("c = socket.create_connection(l.getsockname()); s, _ = l.accept()")
        puppet.do("c.sendall(bytes(70)); s.recv(70)")
        with watching(nobodys, 60, "", kind, pid=str(puppet.pid), mode=mode) as watch:
            puppet.do("c.sendall(bytes(30)); s.recv(30); c.close(); s.recv(1); s.close()")
            ended: list[tuple[int, int]] = []
            while len(ended) < 2:
                batch = watch.read()
                ended += [(r.pid, r.total.bytes_sent) for r in batch.tcp_metrics if r.end]
                ended += [(r.pid, 0) for r in batch.tcp_state_changes if r.end]
            sent = 100 if mode == "summaries" else 0
            assert sorted(ended) == [(puppet.pid, 0), (puppet.pid, sent)]
            assert not watch.losses


ENCRYPTED: Final = 20  # requests


@contextmanager
def encrypting() -> Iterator[tuple[int, Callable[[], None]]]:
    """A process of root's that speaks HTTPS with itself once it is let go, by what this yields."""
    with subprocess.Popen(
        [openssl_program(), "plain", str(ENCRYPTED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()

        def let_go() -> None:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"x")
            process.stdin.flush()
            assert process.stdout.readline() == b"done\n"

        try:
            yield process.pid, let_go
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("given", "without"),
    [(ORDINARY, ""), (ROOTS, "uprobe_multi")],
    ids=["by a link for many", "by perf events"],
)
def test_these_are_enough_to_see_what_another_users_process_encrypts(
    directory: Path, given: frozenset[str], without: str
) -> None:
    environment = {"CORAL_WITHOUT": without}
    kind = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
    with (
        running_agent(directory, prefix=as_nobody(given), environment=environment) as agent,
        encrypting() as (pid, let_go),
        watching(agent, 60, "", kind, pid=str(pid), mode="events") as watch,
    ):
        assert not watch.notes
        let_go()
        found: list[pb.HttpRequest] = []
        while len(found) < 2 * ENCRYPTED:
            found += watch.read().http_requests
        assert {it.tls for it in found} == {True}
        assert not watch.losses


@pytest.mark.parametrize(
    ("missing", "without"), [("CAP_SYS_PTRACE", ""), ("CAP_SYS_ADMIN", "uprobe_multi")]
)
def test_tls_that_cannot_be_seen_for_want_of_one_is_told_with_its_name(
    directory: Path, missing: str, without: str
) -> None:
    kind = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
    environment, less = {"CORAL_WITHOUT": without}, ORDINARY - {missing}
    with (
        running_agent(directory, prefix=as_nobody(less), environment=environment) as agent,
        encrypting() as (pid, _),
        watching(agent, 60, "", kind, pid=str(pid), mode="events") as watch,
    ):
        (note,) = watch.notes
        assert " is not seen: " in note
        assert missing in note


@pytest.mark.parametrize("given", [ORDINARY, ROOTS], ids=["documented", "with CAP_SYS_ADMIN"])
def test_earlier_connections_of_other_namespaces_need_cap_sys_admin_without_iterators(
    directory: Path, given: frozenset[str]
) -> None:
    """Without that capability these connections are found when they are next used."""
    enter = "import ctypes, subprocess; ctypes.CDLL(None).unshare(0x40000000); "
    kind = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
    without = {"CORAL_WITHOUT": "iterator"}
    with (
        Puppet() as here,
        Puppet() as elsewhere,
        running_agent(directory, prefix=as_nobody(given), environment=without) as agent,
    ):
        elsewhere.do(enter + "subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)")
        for puppet in (here, elsewhere):
            puppet.do("import socket; l = socket.create_server(('127.0.0.1', 0))")
            puppet.do("c = socket.create_connection(l.getsockname()); s, _ = l.accept()")
            puppet.do("c.sendall(bytes(70)); s.recv(70)")
        answer = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
        (steps,) = (c.steps for c in answer.collectors if c.kind == kind)
        (step,) = (step for step in steps if step.what == "connections")
        assert step.taken == "sock_diag"
        pids = f"{here.pid},{elsewhere.pid}"
        sent: dict[int, set[int]] = {here.pid: set(), elsewhere.pid: set()}
        with watching(agent, 60, "", kind, pid=pids) as watch:

            def read_until_known(puppet: Puppet, total: int) -> None:
                while total not in sent[puppet.pid]:
                    for row in watch.read().tcp_metrics:
                        sent[row.pid].add(row.total.bytes_sent)

            read_until_known(here, 70)
            if given == ROOTS:
                assert "CAP_SYS_ADMIN" not in str(step)
                read_until_known(elsewhere, 70)
            else:
                assert "CAP_SYS_ADMIN (to ask for the connections of other " in str(step)
                assert not sent[elsewhere.pid]
            elsewhere.do("c.sendall(bytes(30)); s.recv(30); c.close(); s.recv(1); s.close()")
            read_until_known(elsewhere, 100)
            assert not watch.losses


def test_a_session_of_an_ordinary_user_ends_with_its_process(nobodys: RunningAgent) -> None:
    with (
        Puppet() as puppet,
        watching(nobodys, pid=str(puppet.pid), until_exit="true") as watch,
    ):
        puppet.getppid(CALLS)
        puppet.kill()
        assert watch.read_to_end().reason == pb.SessionEnd.REASON_TARGET_EXITED
        assert watch.calls_of("getppid") == CALLS


def alone(name: str) -> frozenset[str]:
    """That capability, and, if the user nobody cannot read the checkout, the one that can."""
    return frozenset({name} | (set() if nobody_reads_this() else {"CAP_DAC_READ_SEARCH"}))


def test_cap_sys_admin_alone_is_enough_as_it_was_before_linux_5_8(directory: Path) -> None:
    given = alone("CAP_SYS_ADMIN")
    with running_agent(directory, prefix=as_nobody(given)) as agent:
        has_exactly(agent, given, uid=NOBODY.pw_uid)
        counts_exactly(agent)
        assert features(agent)["run_time_stats"].available


def test_an_agent_that_observes_only_refuses_what_it_could_do_with_cap_sys_admin_alone(
    directory: Path,
) -> None:
    config = {"policy": {"observe_only": True}}
    given = alone("CAP_SYS_ADMIN")
    with running_agent(directory, config, prefix=as_nobody(given)) as agent:
        kept = {names(status["CapPrm"]) for status in status_of(agent.process.pid)}
        assert kept == {given - {"CAP_SYS_ADMIN"}}
        refuses_for_want_of(agent, ["CAP_BPF", "CAP_PERFMON"])


# One capability is missing


def features(agent: RunningAgent) -> Mapping[str, pb.KernelFeature]:
    answer = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
    return {feature.name: feature for feature in answer.features}


def refuses_for_want_of(agent: RunningAgent, missing: Sequence[str]) -> None:
    """Asserts that every answer of the agent names the capabilities MISSING for every collector,
    and that it goes on serving."""
    told = " and ".join(f"{name} ({TRACING[name]})" for name in missing)
    told += f" {'is' if len(missing) == 1 else 'are'} missing: run the agent as root, or give it "
    told += f"{' '.join(missing)}, by AmbientCapabilities= of its systemd unit or a container's "
    told += "--cap-add"
    started = agent.call(
        "StartCollector",
        pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": str(os.getpid())}
        ),
    )
    assert (started.supported, started.collector_id) == (False, "")
    assert started.error == f"syscall_stats: {told}"
    answer = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
    assert (answer.supported, list(answer.available_collectors)) == (False, [])
    kinds = {kind_name(collector.kind) for collector in answer.collectors}
    assert {(it.supported, it.reason) for it in answer.collectors} == {(False, told)}
    shown = subprocess.run(
        coral("capabilities", "--agent", agent.address),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(re.findall(rf"^(\w+) +no +{re.escape(told)} *$", shown, re.MULTILINE)) == kinds
    logged = wait_until(
        lambda: [
            (ln["kind"], ln["reason"])
            for ln in agent.log()
            if ln["event"] == "collector not possible here"
        ]
    )
    assert set(logged) == {(kind, told) for kind in kinds}


@pytest.mark.parametrize("missing", TRACING)
def test_a_collector_that_misses_one_names_it(directory: Path, missing: str) -> None:
    with running_agent(directory, prefix=as_nobody(ORDINARY - {missing})) as agent:
        refuses_for_want_of(agent, [missing])


def test_a_feature_that_misses_one_names_it(directory: Path) -> None:
    with running_agent(directory, prefix=as_nobody(ORDINARY - {"CAP_PERFMON"})) as agent:
        assert features(agent)["tp_btf"].reason.startswith("EPERM: CAP_PERFMON (to attach ")
        assert features(agent)["ring_buffer"].available


def test_large_perf_buffers_need_cap_ipc_lock(directory: Path, stack: ExitStack) -> None:
    """Perf buffers are used as on a kernel without ring buffers."""
    puppet = stack.enter_context(Puppet())
    config = {"pid": str(puppet.pid), "mode": "events", "include": "getppid", "ring": "16MiB"}
    without = {"CORAL_WITHOUT": "ring_buffer"}
    less = ORDINARY - set(BUFFERS)
    with running_agent(directory, prefix=as_nobody(less), environment=without) as agent:
        request = pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config=config
        )
        code, text = code_and_text(agent, "StartCollector", request)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert re.match(r"mapping the perf buffer of CPU \d+: EPERM \(", text)
        assert "CAP_IPC_LOCK" in text
    with (
        running_agent(directory, prefix=as_nobody(ORDINARY), environment=without) as agent,
        watching(agent, 60, **config) as watch,
    ):
        puppet.getppid(CALLS)
        calls = 0
        while calls < CALLS:
            calls += len(watch.read().syscall_calls)
        assert calls == CALLS


@pytest.mark.parametrize("missing", LISTENERS)
def test_a_service_not_found_for_lack_of_one_names_it(
    directory: Path, missing: str, stack: ExitStack
) -> None:
    if missing == "CAP_DAC_READ_SEARCH" and not nobody_reads_this():
        pytest.skip("nobody may not read this checkout, and then it takes CAP_DAC_READ_SEARCH")
    name = f"svc{uuid.uuid4().hex[:8]}"
    named_puppet(stack, name, listens=True)
    request = pb.StartEbpfCollectorRequest(
        kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, service_name=name
    )
    with running_agent(directory, prefix=as_nobody(ORDINARY - {missing})) as agent:
        told = f"{missing} ({LISTENERS[missing]}) is missing: run the agent as root, or give it "
        code, text = code_and_text(agent, "StartCollector", request)
        assert code is grpc.StatusCode.NOT_FOUND
        assert f"Other users' listening commands were not seen: {told}{missing}, by " in text
        assert not features(agent)["others_listeners"].available
        assert features(agent)["others_listeners"].reason.startswith(told)
        counts_exactly(agent)  # everything else works


def nobody_reads_this() -> bool:
    test = [
        *as_nobody(frozenset()),
        "test",
        "-r",
        str(object_path("features")),
    ]
    return subprocess.run(test, check=False).returncode == 0


@pytest.mark.parametrize("hidepid", ["1", "2"])
def test_processes_that_proc_hides_need_cap_sys_ptrace(
    directory: Path, hidepid: str, stack: ExitStack
) -> None:
    hiding = f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", hiding, "sh"]
    puppet = stack.enter_context(Puppet())
    with running_agent(directory, prefix=[*prefix, *as_nobody(ORDINARY)]) as agent:
        counts_exactly(agent)
    less = ORDINARY - {"CAP_SYS_PTRACE"}
    with running_agent(directory, prefix=[*prefix, *as_nobody(less)]) as agent:
        request = pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": str(puppet.pid)}
        )
        assert code_and_text(agent, "StartCollector", request) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            (
                f"config[\"pid\"]: '{puppet.pid}' is not accepted; give the ids of processes that "
                f"the agent may see: /proc hides {puppet.pid} from it (hidepid), and "
                "CAP_SYS_PTRACE is missing"
            ),
        )


# Becoming a user


def test_an_unknown_user_is_refused(tmp_path: Path) -> None:
    for name in ("no-such-user", "4294967296"):
        assert refused_start(tmp_path, "--user", name) == (
            f"coral agent: user: this machine has no user {name!r}"
        )


def test_an_ordinary_user_cannot_become_another(directory: Path) -> None:
    process = subprocess.run(
        [
            *as_nobody(ORDINARY),
            *coral("agent", "--user", "daemon", "--listen", f"unix:{directory}/a/b"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stderr) == (
        2,
        f"coral agent: user: to become 'daemon' takes root; this is user {NOBODY.pw_uid}\n",
    )
    assert list(directory.iterdir()) == []


def test_what_only_root_can_do_or_read_comes_before_the_switch(directory: Path) -> None:
    os.chown(directory, 0, 0)
    directory.chmod(0o755)
    token = directory / "token"
    token.write_text("secret of this test\n")
    token.chmod(0o600)
    socket = directory / "run/coral/agent.sock"
    config = {"auth": {"token_file": str(token)}, "listen": [f"unix:{socket}"]}
    with running_agent(directory, config, "--user", "nobody") as agent:
        agent.address = f"unix:{socket}"
        assert socket.parent.owner() == socket.owner() == "nobody"
        assert directory.owner() == socket.parent.parent.owner() == "root"
        authorized = [("authorization", "Bearer secret of this test")]
        agent.call("ListCollectors", pb.ListCollectorsRequest(), authorized)
        code, _ = code_and_text(agent, "ListCollectors", pb.ListCollectorsRequest())
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert agent.stop() == 0
    assert not socket.exists()


def test_an_existing_directory_keeps_its_owner(directory: Path) -> None:
    os.chown(directory, 0, 0)
    directory.chmod(0o755)
    socket = directory / "agent.sock"
    told = refused_start(directory, "--user", "nobody", "--listen", f"unix:{socket}")
    assert told.endswith(
        f"coral agent: listen: unix:{socket}: user {NOBODY.pw_uid} may not write {socket}.lock: "
        f"give it {directory} and what is in it"
    )
    assert directory.owner() == "root"
