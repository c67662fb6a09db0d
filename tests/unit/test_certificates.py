"""Names in certificates, as the agent takes them from what Python's ssl says."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from coral.agent.serving.certificates import certificate_of, names_of, rfc4514

CN = (("commonName", "colony"),)
O = (("organizationName", "shop"),)  # noqa: E741  as in RFC 4514


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ((O, CN), "CN=colony,O=shop"),
        ((), ""),
        ((((*O, *CN)),), "O=shop+CN=colony"),
        (((("commonName", ' a,b+c"d\\e<f>;g '),),), r"CN=\ a\,b\+c\"d\\e\<f\>\;g\ "),
        (((("commonName", "#1 b"),),), r"CN=\#1 b"),
        (((("commonName", "a\nb\0é"),),), r"CN=a\0ab\00é"),
        (((("emailAddress", "a@b.example"),),), "emailAddress=a@b.example"),
    ],
)
def test_a_subject_is_written_as_in_rfc_4514(name: Any, text: str) -> None:
    assert rfc4514(name) == text


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://td",
        "spiffe://cluster.local/ns/shop/sa/checkout",
        "spiffe://td/a.b/..c",
    ],
)
def test_a_spiffe_id_is_a_name(uri: str) -> None:
    assert names_of({"subjectAltName": (("URI", uri),)}) == (uri,)


@pytest.mark.parametrize(
    "uri",
    [
        "https://td/ns", "spiffe://TD/ns", "spiffe://td/", "spiffe://td//a", "spiffe://td/../a",
        "spiffe://td/a/.", "spiffe://td/a?b", "spiffe://td:1/a", "spiffe://", "spiffe://td/a\n",
        "spiffe://td/" + "a" * 2048,
    ],
)  # fmt: skip
def test_what_is_no_spiffe_id_is_no_name(uri: str) -> None:
    assert names_of({"subjectAltName": (("URI", uri),)}) == ()


def test_two_uris_are_no_spiffe_id() -> None:
    both = {"subjectAltName": (("URI", "spiffe://td/a"), ("URI", "spiffe://td/b"))}
    assert names_of(both) == ()


def test_host_names_are_names_but_for_patterns_and_what_cannot_be_one() -> None:
    hosts = ("Colony.Example", "*.example", "a b", "colony.example", "x\0.example")
    found = {"subject": (O, CN), "subjectAltName": tuple(("DNS", host) for host in hosts)}
    assert names_of(found) == ("subject:CN=colony,O=shop", "dns:colony.example")


def test_a_certificate_says_who_signed_it_and_until_when() -> None:
    found = {
        "subject": (CN,), "issuer": (O,), "serialNumber": "0A1B",
        "notAfter": "Nov 27 05:00:00 2026 GMT",
    }  # fmt: skip
    chain = [b"leaf", b"between", b"root"]
    certificate = certificate_of(found, "TLSv1.3", chain)
    assert (certificate.subject, certificate.issuer) == ("CN=colony", "O=shop")
    assert (certificate.serial, certificate.not_after_s) == ("0A1B", 1795755600.0)
    assert certificate.chain == {hashlib.sha256(each).digest() for each in chain}
