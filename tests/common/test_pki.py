"""Certificates: what the authority signs, what it ignores, and what each end refuses; invites; private files."""

from __future__ import annotations

import datetime
import os
import stat
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common import pki
from lichen.common.errors import Code, LichenError
from lichen.common.invite import PREFIX, Invite, check_address
from lichen.common.pki import Authority
from lichen.common.private_files import read_private, write_private

NOW = time.time()
DAY = 86400.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority") / "pki")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("other") / "pki")


def issue(authority: Authority, name: str = "clinic-a", role: str = "node", days: float = 90, now: float = NOW) -> tuple[bytes, bytes]:
    key = pki.make_key()
    return key, authority.sign_csr(pki.make_csr(key, name), name, role, days, now=now)


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_authority_certificate_signs_leaves_only(authority: Authority) -> None:
    certificate = parsed(authority.ca_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    assert constraints.value.path_length == 0
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    certificate.verify_directly_issued_by(certificate)


def test_client_certificate_has_the_usual_extensions(authority: Authority) -> None:
    key, pem = issue(authority)
    certificate, ca = parsed(pem), parsed(authority.ca_pem)
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == own.digest
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert certificate.serial_number != parsed(issue(authority)[1]).serial_number
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    info = pki.check_client_certificate(key, pem, authority.ca_pem, NOW)
    assert (info.name, info.role) == ("clinic-a", "node")
    assert info.authority_key_id == own.digest.hex()
    assert info.fingerprint == certificate.fingerprint(hashes.SHA256()).hex() == pki.fingerprint(pem)
    # Backdated for slow clocks, and not for longer.
    assert DAY <= NOW - info.not_before <= 3 * DAY


def test_server_certificate_names_hosts_and_serves_only(authority: Authority) -> None:
    key, pem = authority.issue_server(["Fleet.example.org", "127.0.0.1", "[::1]"])
    names = parsed(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fleet.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert list(parsed(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    with pytest.raises(LichenError) as caught:
        pki.check_client_certificate(key, pem, authority.ca_pem, NOW)
    assert caught.value.code is Code.CERTIFICATE_INVALID


@pytest.mark.parametrize("hosts", [[], [""], ["a b"], ["-x"], ["*.example.org"], ["ä.example"]])
def test_bad_host_names_are_refused(authority: Authority, hosts: list[str]) -> None:
    with pytest.raises(LichenError) as caught:
        authority.issue_server(hosts)
    assert caught.value.code is Code.CERTIFICATE_INVALID


def test_nothing_of_a_request_but_its_key_is_taken_over(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.UniformResourceIdentifier("lichen:role:operator")]), critical=False
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = parsed(authority.sign_csr(greedy, "clinic-a", "node"))
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=clinic-a"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["lichen:role:node"]


def request_with(key: object) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


def broken_signature() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(pki.make_csr(pki.make_key(), "x")).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


REQUESTS = {
    "empty": b"",
    "garbage": b"\x00\xff" * 40,
    "a certificate": b"-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n",
    "too long": b"#" * (pki.MAX_CSR_BYTES + 1),
    "ed25519": request_with(ed25519.Ed25519PrivateKey.generate()),
    "rsa": request_with(rsa.generate_private_key(65537, 2048)),
    "p-384": request_with(ec.generate_private_key(ec.SECP384R1())),
    "broken signature": broken_signature(),
}


@pytest.mark.parametrize("request_pem", REQUESTS.values(), ids=REQUESTS.keys())
def test_bad_requests_are_refused(authority: Authority, request_pem: bytes) -> None:
    with pytest.raises(LichenError) as caught:
        authority.sign_csr(request_pem, "clinic-a", "node")
    assert caught.value.code is Code.CERTIFICATE_INVALID


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_request_give_a_numbered_error(data: bytes) -> None:
    with pytest.raises(LichenError):
        pki.csr_public_key(data)
    with pytest.raises(LichenError):
        pki.csr_public_key(b"-----BEGIN CERTIFICATE REQUEST-----\n" + data + b"\n-----END CERTIFICATE REQUEST-----\n")


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "a b", "a" * 64, "ä", "a\n", "*"])
def test_bad_names_are_refused(authority: Authority, name: str) -> None:
    with pytest.raises(LichenError) as caught:
        authority.sign_csr(pki.make_csr(pki.make_key(), "x"), name, "node")
    assert caught.value.code is Code.CERTIFICATE_INVALID


def test_client_check_gives_each_fault_its_number(authority: Authority, other: Authority) -> None:
    key, pem = issue(authority)
    operator_key, operator = issue(authority, role="operator")
    cases = [
        (Code.CERTIFICATE_MISSING, (None, None), {}),
        (Code.CERTIFICATE_MISSING, (key, b""), {}),
        (Code.CERTIFICATE_FOREIGN, issue(other), {}),
        (Code.CERTIFICATE_EXPIRED, issue(authority, days=1, now=NOW - 2 * DAY), {}),
        (Code.CLOCK_WRONG, issue(authority, now=NOW + 3 * DAY), {}),
        (Code.CERTIFICATE_INVALID, (pki.make_key(), pem), {}),
        (Code.CERTIFICATE_INVALID, (operator_key, operator), {}),
        (Code.CERTIFICATE_INVALID, (key, pem), {"role": "operator"}),
        (Code.CERTIFICATE_INVALID, (key, b"no certificate"), {}),
        (Code.CERTIFICATE_INVALID, (b"no key", pem), {}),
    ]
    for code, (key_pem, certificate_pem), more in cases:
        with pytest.raises(LichenError) as caught:
            pki.check_client_certificate(key_pem, certificate_pem, authority.ca_pem, NOW, **more)
        assert caught.value.code is code
    assert pki.check_client_certificate(operator_key, operator, authority.ca_pem, NOW, role="operator").role == "operator"


def test_an_authority_of_the_same_name_is_still_foreign(authority: Authority) -> None:
    subject = parsed(authority.ca_pem).subject
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    forged = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    leaf_key, leaf = issue(Authority(key, forged))
    with pytest.raises(LichenError) as caught:
        pki.check_client_certificate(leaf_key, leaf, authority.ca_pem, NOW)
    assert caught.value.code is Code.CERTIFICATE_FOREIGN


def test_a_node_is_no_operator(authority: Authority) -> None:
    node, operator = issue(authority)[1], issue(authority, name="alice", role="operator")[1]
    assert pki.require_operator({"x509_pem_cert": [operator]}).name == "alice"
    for context, code in (({"x509_pem_cert": [node]}, Code.CERTIFICATE_INVALID), ({}, Code.CERTIFICATE_MISSING)):
        with pytest.raises(LichenError) as caught:
            pki.require_operator(context)
        assert caught.value.code is code


def test_an_authority_signs_nothing_beyond_its_end(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path, days=2)
    end = pki.read_certificate(authority.ca_pem).not_after
    assert pki.read_certificate(issue(authority, days=1)[1]).not_after < end
    assert pki.read_certificate(issue(authority, days=90)[1]).not_after == pytest.approx(end, abs=2)
    with pytest.raises(LichenError) as caught:
        issue(authority, now=end + 1)
    assert caught.value.code is Code.CERTIFICATE_EXPIRED


def test_authority_is_kept_and_guarded(tmp_path: Path) -> None:
    home = tmp_path / "home" / "pki"
    made = Authority.create(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "ca.key").stat().st_mode) == 0o600
    key, pem = issue(Authority.load(home))
    pki.check_client_certificate(key, pem, made.ca_pem, NOW)
    with pytest.raises(LichenError) as caught:
        Authority.create(home)
    assert caught.value.code is Code.OUTPUT_EXISTS
    with pytest.raises(LichenError) as caught:
        Authority.load(tmp_path)
    assert caught.value.code is Code.HOME_MISSING
    (home / "ca.key").chmod(0o640)
    with pytest.raises(LichenError) as caught:
        Authority.load(home)
    assert caught.value.code is Code.KEY_EXPOSED
    assert "0640" in caught.value.what
    write_private(home / "ca.key", pki.make_key())
    with pytest.raises(LichenError) as caught:
        Authority.load(home)
    assert caught.value.code is Code.CERTIFICATE_INVALID


def test_private_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    before = os.umask(0)
    try:
        write_private(path, b"one")
        write_private(path, b"two")
    finally:
        os.umask(before)
    assert read_private(path) == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["key"]
    with pytest.raises(LichenError) as caught:
        read_private(tmp_path / "none")
    assert caught.value.code is Code.CERTIFICATE_MISSING


NAMES = st.from_regex(pki.NAME_PATTERN, fullmatch=True)
HOSTS = st.sampled_from(["127.0.0.1", "localhost", "fleet.example.org", "[::1]", "[2001:db8::7]"])
ADDRESSES = st.builds("{}:{}".format, HOSTS, st.integers(1, 65535))


@settings(max_examples=100, deadline=None)
@given(NAMES, ADDRESSES, ADDRESSES, st.binary(min_size=32, max_size=32), st.integers(0, 2**40), st.data())
def test_invites_survive_the_trip_and_no_damage_passes(
    authority: Authority, name: str, fleet: str, enrolment: str, secret: bytes, expires_at: int, data: st.DataObject
) -> None:
    invite = Invite(name, fleet, enrolment, authority.ca_pem, secret, expires_at)
    text = invite.encode()
    assert Invite.decode(text) == invite
    wrapped = "\n> ".join(text[i : i + 70] for i in range(0, len(text), 70)).replace(">", "")
    assert Invite.decode(f'  "{wrapped}"\n') == invite
    assert secret.hex() not in repr(invite)
    assert repr(secret) not in repr(invite)
    cut = data.draw(st.integers(0, len(text) - 1))
    changed = data.draw(st.integers(0, len(text) - 1))
    letter = "A" if text[changed] != "A" else "B"
    for damaged in (text[:cut], text[cut + 1 :], text[:changed] + letter + text[changed + 1 :], text + text):
        with pytest.raises(LichenError) as caught:
            Invite.decode(damaged)
        assert caught.value.code is Code.INVITE_INVALID
        assert caught.value.fix


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_as_an_invite_gives_a_numbered_error(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(LichenError) as caught:
            Invite.decode(candidate)
        assert caught.value.code is Code.INVITE_INVALID


def test_an_invite_of_a_newer_lichen_says_so() -> None:
    with pytest.raises(LichenError, match="lichen2"):
        Invite.decode("lichen2.abcdef")


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "a b:1", "::1:5", "host:1/x", "-h:1", "http://h:1"])
def test_bad_addresses_are_refused(address: str) -> None:
    with pytest.raises(LichenError) as caught:
        check_address(address)
    assert caught.value.code is Code.INVITE_INVALID
