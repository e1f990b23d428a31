"""What may stand in a rule of the firewall: addresses, ports, protocols, ICMP types, macros. Faults are ValueErrors.

The names are facts of iptables, of IANA's registries and of Proxmox; the descriptions of the macros are our own.
"""

from __future__ import annotations

import ipaddress
import re

NAME = r"[A-Za-z][A-Za-z0-9\-\_]+"
_REFERENCE = re.compile(rf"(?:(?:dc|guest)/)?{NAME}")
_SET = re.compile(rf"\+(?:(?:dc|guest|sdn)/)?{NAME}")

PROTOCOLS = {
    "ip": 0, "icmp": 1, "igmp": 2, "ggp": 3, "ipencap": 4, "st": 5, "tcp": 6, "egp": 8, "igp": 9, "pup": 12, "udp": 17,
    "hmp": 20, "xns-idp": 22, "rdp": 27, "iso-tp4": 29, "dccp": 33, "xtp": 36, "ddp": 37, "idpr-cmtp": 38, "ipv6": 41,
    "ipv6-route": 43, "ipv6-frag": 44, "idrp": 45, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "skip": 57,
    "ipv6-icmp": 58, "icmpv6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60, "vmtp": 81, "eigrp": 88, "ospf": 89, "ax.25": 93,
    "ipip": 94, "etherip": 97, "encap": 98, "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "isis": 124,
    "sctp": 132, "fc": 133, "mobility-header": 135, "udplite": 136, "mpls-in-ip": 137, "hip": 139, "shim6": 140,
    "wesp": 141, "rohc": 142,
}  # fmt: skip
WITH_PORTS = ("tcp", "udp", "udplite", "sctp", "dccp", "6", "17", "136", "132", "33")
WITH_TYPES = ("icmp", "icmpv6", "ipv6-icmp", "1", "58")

_SERVICES = (
    "ftp", "ftp-data", "ssh", "telnet", "smtp", "time", "domain", "bootps", "bootpc", "tftp", "gopher", "finger",
    "http", "https", "kerberos", "pop3", "pop3s", "sunrpc", "auth", "nntp", "nntps", "ntp", "netbios-ns",
    "netbios-dgm", "netbios-ssn", "imap2", "imaps", "snmp", "snmp-trap", "bgp", "irc", "ldap", "ldaps",
    "microsoft-ds", "isakmp", "printer", "syslog", "submission", "submissions", "ipp", "rsync", "ftps", "ftps-data",
    "telnets", "ms-sql-s", "openvpn", "l2f", "radius", "radius-acct", "nfs", "cvspserver", "mysql", "svn",
    "postgresql", "amqp", "sip", "sip-tls", "xmpp-client", "xmpp-server", "git", "mdns", "x11", "http-alt", "webmin",
    "zabbix-agent", "zabbix-trapper", "squid", "redis", "ms-wbt-server",
)  # fmt: skip
_ICMP_TYPES = (
    "any", "echo-reply", "destination-unreachable", "network-unreachable", "host-unreachable", "protocol-unreachable",
    "port-unreachable", "fragmentation-needed", "source-route-failed", "network-unknown", "host-unknown",
    "network-prohibited", "host-prohibited", "TOS-network-unreachable", "TOS-host-unreachable",
    "communication-prohibited", "host-precedence-violation", "precedence-cutoff", "source-quench", "redirect",
    "network-redirect", "host-redirect", "TOS-network-redirect", "TOS-host-redirect", "echo-request",
    "router-advertisement", "router-solicitation", "time-exceeded", "ttl-zero-during-transit",
    "ttl-zero-during-reassembly", "parameter-problem", "ip-header-bad", "required-option-missing",
    "timestamp-request", "timestamp-reply", "address-mask-request", "address-mask-reply",
)  # fmt: skip
_ICMP6_TYPES = (
    "no-route", "beyond-scope", "address-unreachable", "failed-policy", "reject-route", "packet-too-big",
    "bad-header", "unknown-header-type", "unknown-option", "neighbor-solicitation", "neighbour-solicitation",
    "neighbor-advertisement", "neighbour-advertisement",
)  # fmt: skip
_HELPERS = ("amanda", "ftp", "irc", "netbios-ns", "pptp", "sane", "sip", "snmp", "tftp")


def address_spec(text: str) -> None:
    """Addresses, networks, one range, an alias or a set."""
    if text.startswith("+"):
        if not _SET.fullmatch(text) or len(text) > 65:
            raise ValueError(f"invalid ipset name '{text}'")
        return
    if _REFERENCE.fullmatch(text):
        return
    items = text.split(",")
    versions = {_version(item, is_alone=len(items) == 1) for item in items}
    if len(versions) > 1:
        raise ValueError(f"detected mixed ipv4/ipv6 addresses in address list '{text}'")


def is_reference(text: str) -> bool:
    """Whether an address specification is the name of an alias."""
    return _REFERENCE.fullmatch(text) is not None


def _version(text: str, *, is_alone: bool) -> int:
    first, dash, last = text.partition("-")
    try:
        if not dash:
            return ipaddress.ip_interface(text).version
        low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
    except ValueError:
        raise ValueError(f"invalid IP address: {text}") from None
    if not is_alone:
        raise ValueError("you can't use a range in a list")
    if low.version != high.version or int(low) > int(high):
        raise ValueError(f"invalid IP address: {text}")
    return low.version


def cidr(text: str) -> None:
    """An address or a network."""
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError(f"value does not look like a valid IP address or CIDR network: {text}") from None
    if not re.fullmatch(r"[0-9a-fA-F.:]+(/\d{1,3})?", text):
        raise ValueError(f"value does not look like a valid IP address or CIDR network: {text}")


def cidr_or_alias(text: str) -> None:
    if not _REFERENCE.fullmatch(text):
        cidr(text)


def port_spec(text: str) -> None:
    """Numbers, names and ranges (`80,443`, `8000:8010`, `ssh`)."""
    for item in text.split(","):
        numbers = item.split(":")
        if all(re.fullmatch(r"[0-9]{1,6}", number) for number in numbers) and len(numbers) <= 2:
            for number in numbers:
                if int(number) > 65535:
                    raise ValueError(f"invalid port '{number}'")
            if int(numbers[0]) > int(numbers[-1]):
                raise ValueError(f"invalid port range '{item}'")
        elif item not in _SERVICES:
            raise ValueError(f"invalid port '{item}'")


def destination_port_spec(text: str) -> None:
    """The same, or the ICMP type that old rules have there."""
    if text not in _ICMP_TYPES and text not in _ICMP6_TYPES:
        port_spec(text)


def protocol(text: str) -> None:
    if text and text not in PROTOCOLS and text not in map(str, PROTOCOLS.values()):
        raise ValueError(f"unknown protocol '{text}'")


def icmp_type(text: str) -> None:
    if re.fullmatch(r"[0-9]{1,3}(/[0-9]{1,3})?", text) and all(int(number) < 256 for number in text.split("/")):
        return
    if text not in _ICMP_TYPES and text not in _ICMP6_TYPES:
        raise ValueError(f"invalid icmp-type '{text}'")


def interface(text: str) -> None:
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]{1,20}([:.]\d+)?", text):
        raise ValueError(f"invalid network interface name '{text}'")


def conntrack_helpers(text: str) -> None:
    for item in filter(None, re.split(r"[,;\s]+", text)):
        if item not in _HELPERS:
            raise ValueError(f"unknown conntrack helper '{item}'")


MACROS = {
    "Amanda": "Amanda backups", "Auth": "Identification of users (ident)", "BGP": "Border gateways",
    "BitTorrent": "BitTorrent up to version 3.1", "BitTorrent32": "BitTorrent from version 3.2",
    "Ceph": "Ceph storage: monitors, managers, OSDs", "CVS": "CVS pserver", "DCC": "Distributed checksums against spam",
    "DHCPfwd": "DHCP through a relay", "DHCPv6": "DHCP for IPv6", "DNS": "Names, over UDP and TCP",
    "Distcc": "Distributed compiler", "FTP": "File transfer", "Finger": "Who is logged in", "GNUnet": "GNUnet",
    "GRE": "Generic routing encapsulation", "Git": "Git's own protocol", "HKP": "Key servers", "HTTP": "Web",
    "HTTPS": "Web over TLS", "ICPV2": "Caches that ask each other", "ICQ": "ICQ and AIM", "IMAP": "Mailboxes",
    "IMAPS": "Mailboxes over TLS", "IPIP": "IP in IP", "IPsec": "IPsec: key exchange and ESP",
    "IPsecah": "IPsec: key exchange and AH", "IPsecnat": "IPsec through address translation", "IRC": "Relay chat",
    "Jetdirect": "Printers of HP", "L2TP": "Layer two tunnels", "LDAP": "Directories", "LDAPS": "Directories over TLS",
    "MDNS": "Names by multicast", "MSNP": "Microsoft's notifications", "MSSQL": "Microsoft SQL Server",
    "Mail": "Mail: SMTP, SMTP over TLS and submission", "Munin": "Munin monitoring", "MySQL": "MySQL and MariaDB",
    "NNTP": "News", "NNTPS": "News over TLS", "NTP": "Time", "NeighborDiscovery": "Neighbours and routers in IPv6",
    "OSPF": "Shortest paths between routers", "OpenVPN": "OpenVPN", "PBS": "Proxmox Backup Server",
    "PCA": "Symantec's pcAnywhere", "PMG": "Web interface of Proxmox Mail Gateway", "POP3": "Fetching mail",
    "POP3S": "Fetching mail over TLS", "PPtP": "Point-to-point tunnels", "Ping": "ICMP echo requests",
    "PostgreSQL": "PostgreSQL", "Printer": "Line printers", "RDP": "Remote desktops of Microsoft", "RIP": "Routes",
    "RNDC": "Control of BIND", "Razor": "Razor against spam", "Rdate": "Time, in an old way", "Rsync": "rsync",
    "SANE": "Scanners", "SMB": "Files and printers of Microsoft", "SMBswat": "Samba's administration",
    "SMTP": "Mail", "SMTPS": "Mail over TLS", "SNMP": "Management of devices", "SPAMD": "SpamAssassin",
    "SPICEproxy": "Proxmox's proxy for SPICE", "SSH": "Secure shell", "SVN": "Subversion",
    "SixXS": "Tunnels of SixXS", "Squid": "Squid's proxy", "Submission": "Handing in mail",
    "Syslog": "Logs of other machines", "TFTP": "Trivial file transfer", "Telnet": "Telnet",
    "Telnets": "Telnet over TLS", "Time": "Time, as in RFC 868", "Trcrt": "Traceroute, at most 30 hops",
    "VNC": "Screens :0 to :99 of VNC", "VNCL": "VNC servers that call a listening viewer", "VXLAN": "VXLAN tunnels",
    "Web": "Web with and without TLS", "Webcache": "Proxies on port 8080", "Webmin": "Webmin", "Whois": "Whois",
}  # fmt: skip


def macro_name(text: str) -> str:
    """A macro's name as it is written. Raises ValueError."""
    for name in MACROS:
        if name.lower() == text.lower():
            return name
    raise ValueError(f"unknown macro '{text}'")
