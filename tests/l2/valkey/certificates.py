"""Certificates for a test: an authority, a server at 127.0.0.1, a client."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


class Certificates:
    """Files in a directory: `ca.pem`, and a certificate and a key each of `server` and `client`."""

    def __init__(self, directory: Path, host: str = "127.0.0.1"):
        self.directory = directory
        self._ca_key = ec.generate_private_key(ec.SECP256R1())
        self._ca_name = _name("a test's authority")
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self._write("ca", self._ca_name, self._ca_key, basic)
        for who in ("server", "client"):
            address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
            self._write(who, _name(who), ec.generate_private_key(ec.SECP256R1()), address)

    @property
    def options(self) -> tuple[str, ...]:
        """For a server that wants to see its clients' certificates."""
        files = {"cert": "server.pem", "key": "server.key", "ca-cert": "ca.pem"}
        return tuple(
            part for kind, file in files.items() for part in (f"--tls-{kind}-file", str(self.directory / file))
        )

    @property
    def parameters(self) -> str:
        """For the URL of a client."""
        return f"ca={self.directory}/ca.pem&cert={self.directory}/client.pem&key={self.directory}/client.key"

    def _write(self, who: str, name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> None:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._ca_name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
        certificate = builder.add_extension(extension, critical=False).sign(self._ca_key, hashes.SHA256())
        (self.directory / f"{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        (self.directory / f"{who}.key").write_bytes(secret)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
