"""An agent whose programs are compiled by bcc, which takes a second or more of CPU time.

Where this kernel's headers are missing, bcc gets those of another: these tests only depend on how
long it compiles.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from benchmarks.kernel import headers_for_bcc
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import collectors_at_work, running_agent, start_collector

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.needs_bcc]


@pytest.mark.soak
@pytest.mark.timed
def test_the_agent_answers_others_while_bcc_compiles(tmp_path: Path) -> None:
    source, _ = headers_for_bcc(tmp_path)
    environment = {"BCC_KERNEL_SOURCE": str(source)} if source else {}
    with running_agent(tmp_path / "agent", None, "--loader", "bcc", environment=environment) as it:
        told = it.call("GetCapabilities", pb.GetCapabilitiesRequest())
        (loader,) = [step for step in told.collectors[0].steps if step.what == "loader"]
        assert loader.taken == "bcc"

        starting = threading.Thread(target=lambda: start_collector(it, pid=str(os.getpid())))
        began = time.monotonic()
        starting.start()
        waits = []
        while starting.is_alive():
            asked = time.monotonic()
            collectors_at_work(it)
            waits.append(time.monotonic() - asked)
        starting.join()
        start_s = time.monotonic() - began
        (collector_id,) = collectors_at_work(it)
        it.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))
    # If the event loop were blocked, one of these calls would take nearly as long as bcc.
    assert len(waits) > 3
    assert max(waits) < start_s / 2
