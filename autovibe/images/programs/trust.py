"""Run inside an image while it is built: trust those certificates of the host that Debian does not trust by itself.

`trust.py PEM` removes the file when it is done. Programs that bring a bundle of their own are told of the system's by
the environment of sessions and services.
"""

import base64
import hashlib
import pathlib
import re
import subprocess
import sys

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
)


def certificates(path: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each certificate of a PEM file -> its base64 body."""
    bodies = re.findall("-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", path.read_text(), re.DOTALL)
    return {hashlib.sha256(base64.b64decode(body)).hexdigest(): body for body in bodies}


def main() -> None:
    given = pathlib.Path(sys.argv[1])
    known = certificates(pathlib.Path(BUNDLE))
    extra = {digest: body for digest, body in certificates(given).items() if digest not in known}
    given.unlink()
    if not extra:
        return
    for digest, body in extra.items():
        target = pathlib.Path(f"/usr/local/share/ca-certificates/autovibe-{digest[:16]}.crt")
        target.write_text(f"-----BEGIN CERTIFICATE-----{body}-----END CERTIFICATE-----\n")
    subprocess.run(["update-ca-certificates"], check=True)
    with pathlib.Path("/etc/environment").open("a") as environment:
        environment.writelines(f"{name}={BUNDLE}\n" for name in VARIABLES)
    directory = pathlib.Path("/etc/systemd/system.conf.d")
    directory.mkdir(exist_ok=True)
    pairs = " ".join(f"{name}={BUNDLE}" for name in VARIABLES)
    (directory / "autovibe-trust.conf").write_text(f"[Manager]\nDefaultEnvironment={pairs}\n")


main()
