"""What the bench writes down."""

from __future__ import annotations

from benchmarks.report import Aim, Report, Samples, page


def test_a_page_has_the_command_the_machine_and_every_table() -> None:
    long = "It says how it was measured. " * 8
    report = Report(
        title="Cost",
        how=long,
        columns=("", "ns", "seen"),
        rows=[("bare", "7", ""), ("a|b", Samples([1.0, 2.0, 4.0]).show(1), "100 %")],
        aims=[Aim("lost", 4.0, 3.0, " %"), Aim("added", 1.0, 2.0, " ns")],
        remarks=["one remark"],
    )
    machine = {"cpus": "2", "memory": "", "load": "0.10"}
    text = page({"cost": report, "other": report}, machine, "run --page it")
    assert text.startswith("# Benchmarks: cost, other\n\n```\nrun --page it\n```\n\n")
    assert "The machine: cpus 2; load 0.10." in text.replace("\n", " ")
    assert text.count("## Cost\n") == 2
    table = "|  | ns | seen |\n| --- | ---: | ---: |\n| bare | 7 |  |\n"
    assert table + "| a\\|b | 2.0 (1.5 to 3.0) | 100 % |\n" in text
    assert "* lost: 4 %, aim 3 %: NOT MET\n* added: 1 ns, aim 2 ns: met\n" in text
    assert text.endswith("* one remark\n")
    assert all(len(line) <= 115 for line in text.splitlines())
