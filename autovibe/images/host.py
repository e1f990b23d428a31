"""What the host hands to an image: the certificates it trusts beside Debian's own, and where it gets packages from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from autovibe.errors import ConfigurationError

KEYRINGS = Path("/usr/share/keyrings")

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----", re.DOTALL)


def host_ca_bundle(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The bundle the host's programs are told to trust (SSL_CERT_FILE or REQUESTS_CA_BUNDLE), else None."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if environment.get(name):
            return Path(environment[name])
    return None


def read_ca_bundle(path: Path) -> str:
    """The certificates of a PEM bundle and nothing else of it. Raises ConfigurationError when there are none."""
    try:
        found = _CERTIFICATE.findall(path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n"))
    except OSError as error:
        raise ConfigurationError(f"The CA bundle '{path}' cannot be read: {error.strerror}.") from error
    if not found:
        raise ConfigurationError(f"The CA bundle '{path}' holds no PEM certificate.")
    return "\n".join(found) + "\n"


def host_sources(suite: str, root: Path = Path("/")) -> str:
    """Package sources of `suite` in deb822 form when the host has that suite itself, else "": mmdebstrap's own choice,
    which is Debian's public mirror.
    """
    return _sources_of(suite, root / "etc/apt")


def read_sources(path: Path) -> str:
    """A deb822 sources file as it is. Raises ConfigurationError when it cannot be read or names no URIs."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The package sources '{path}' cannot be read: {error}.") from error
    if not re.search(r"^URIs:", text, re.MULTILINE | re.IGNORECASE):
        raise ConfigurationError(f"The package sources '{path}' are no deb822 file: there is no 'URIs:' in it.")
    return text


def keyring() -> Path | None:
    """The file of Debian's archive keys, None where the package debian-archive-keyring is not installed."""
    path = KEYRINGS / "debian-archive-keyring.gpg"
    return path if path.exists() else None


def _stanza(uris: str, suites: str, components: str) -> str:
    signed = f"{KEYRINGS}/debian-archive-keyring.gpg"
    return f"Types: deb\nURIs: {uris}\nSuites: {suites}\nComponents: {components}\nSigned-By: {signed}\n"


def _sources_of(suite: str, apt: Path) -> str:
    """The stanzas of the host's apt that are Debian's archive of `suite`; "" unless the suite itself is among them."""
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    found: list[tuple[str, str, str]] = []
    parts = apt / "sources.list.d"
    for path in sorted([apt / "sources.list", *parts.glob("*.list"), *parts.glob("*.sources")]):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += _deb822(text) if path.suffix == ".sources" else _one_line(text)
    kept = []
    for uris, suites, components in found:
        names = [name for name in suites.split() if name in wanted]
        remote = [uri for uri in uris.split() if re.match(r"https?://", uri)]
        if names and remote and "main" in components.split():
            kept.append((" ".join(remote), " ".join(names), "main"))
    if not any(suite in names.split() for _, names, _ in kept):
        return ""
    return "\n".join(_stanza(*each) for each in dict.fromkeys(kept))


def _deb822(text: str) -> list[tuple[str, str, str]]:
    found = []
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n\s*\n", lines):
        fields = {
            name.lower(): value.strip() for name, value in re.findall(r"^([\w-]+):((?:.|\n\s)*)", paragraph, re.M)
        }
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
            found.append((fields.get("uris", ""), fields.get("suites", ""), fields.get("components", "")))
    return found


def _one_line(text: str) -> list[tuple[str, str, str]]:
    pattern = r"^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#\n]+)"
    return [(uri, suite, components.strip()) for uri, suite, components in re.findall(pattern, text, re.MULTILINE)]
