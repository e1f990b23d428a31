"""The node's own TLS certificate, made once for each home; clients pin its SHA-256 fingerprint."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from autovibe.node.files import replace_durably

_DAYS = 3650


def load(home: Path, host: str) -> tuple[ssl.SSLContext, str]:
    """The server's TLS context, and the fingerprint, which is also written to `<home>/fingerprint`."""
    key_file, certificate_file = home / "key.pem", home / "cert.pem"
    if not (key_file.exists() and certificate_file.exists()):
        _make(key_file, certificate_file, host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate_file, key_file)
    digest = x509.load_pem_x509_certificate(certificate_file.read_bytes()).fingerprint(hashes.SHA256())
    fingerprint = digest.hex(":").upper()
    replace_durably(home / "fingerprint", fingerprint + "\n")
    return context, fingerprint


def _make(key_file: Path, certificate_file: Path, host: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "autovibe embedded node")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    replace_durably(key_file, private.decode())
    replace_durably(certificate_file, certificate.public_bytes(encoding).decode())


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return names if host == "localhost" else [*names, x509.DNSName(host)]
    return names if str(address) == "127.0.0.1" else [*names, x509.IPAddress(address)]
