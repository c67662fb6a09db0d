"""The build: what it needs, and what it generates for others to use."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Final

import pytest

import build_hook
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import ROOT

# A contract of another organisation that imports this one.
ACME: Final = """
syntax = "proto3";
package acme.v1;
import "coral/mesh/v1/ebpf.proto";
message Watched {
  string host = 1;
  coral.mesh.v1.EbpfEventBatch batch = 2;
}
"""
USE_ACME: Final = textwrap.dedent("""
    import sys
    sys.path.append(sys.argv[1])
    from acme.v1 import x_pb2
    from coral.mesh.v1 import ebpf_pb2
    batch = ebpf_pb2.EbpfEventBatch(first_seq=7, syscall_stats=[{"syscall_name": "read"}])
    read = x_pb2.Watched.FromString(x_pb2.Watched(host="a", batch=batch).SerializeToString())
    assert type(read.batch) is ebpf_pb2.EbpfEventBatch
    print(read.host, read.batch.first_seq, read.batch.syscall_stats[0].syscall_name)
""")


def test_without_clang_the_build_stops_with_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        build_hook.build_objects()
    assert stopped.value.code == (
        "clang is missing: apt-get install clang libbpf-dev (or set CLANG)"
    )


# The build itself compiles for this machine's processor.
OTHERS: Final = [
    arch for machine, arch in build_hook.TARGET_ARCH.items() if machine != platform.machine()
]


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("source", build_hook.program_sources(), ids=lambda s: s.name)
def test_every_program_compiles_for_other_processors_too(
    source: Path, arch: str, tmp_path: Path
) -> None:
    output = tmp_path / "compiled.o"
    subprocess.run(build_hook.clang_command(source, output, arch), check=True)
    assert output.read_bytes().startswith(b"\x7fELF")
    assert str(ROOT).encode() not in output.read_bytes()


def test_the_generated_messages_accept_the_lowest_protobuf_that_the_metadata_allows() -> None:
    stubs = Path(pb.__file__).read_text()
    (generated,) = re.findall(r"^# Protobuf Python Version: (\S+)$", stubs, re.MULTILINE)
    major = int(generated.partition(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # protobuf guarantees that messages work with the major version of their protoc and the next.
    assert f"protobuf>={generated},<{major + 2}" in project["dependencies"]


def test_a_contract_that_imports_ours_compiles_and_works_beside_the_installed_messages(
    tmp_path: Path,
) -> None:
    source = tmp_path / "acme/v1/x.proto"
    source.parent.mkdir(parents=True)
    source.write_text(ACME)
    protoc = (sys.executable, "-P", "-m", "grpc_tools.protoc", f"-I{tmp_path}")
    subprocess.run(
        [*protoc, f"-I{ROOT / 'proto'}", f"--python_out={tmp_path}", "acme/v1/x.proto"], check=True
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", USE_ACME, tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("a 7 read\n", "")
