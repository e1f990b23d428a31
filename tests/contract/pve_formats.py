"""What the named formats of Proxmox's API accept and refuse, as samples: the node's own checks are held against them.

A list format takes the samples of its items, alone and joined; `{name: (accepted, refused)}`.
"""

from __future__ import annotations

Samples = tuple[tuple[str, ...], tuple[str, ...]]

_UUID = "8385ad02-ec97-47e1-a008-7563e6fa777a"
_IDS: Samples = (("a1", "Lab.1_x-y", "9lives"), ("", "a b", "a/b", "a:b", "ä", "a,b;c"))
_NAMES: Samples = (("s1", "before-update", "A_b-9"), ("", "a", "1a", "-a", "a b", "a.b", "a/b", "../a", "sä"))
_STORAGES: Samples = (
    ("local", "local-lvm", "a1", "s.t_u-v9"),
    ("", "l", "1local", "local-", "lo cal", "lo/cal", "../a"),
)
_NODES: Samples = (("pve", "pve-1", "1pve", "a"), ("", "-pve", "pve-", "p_e", "p.e", "p/e", "pvé"))
_USERS: Samples = (
    ("root@pam", "joe@pve", "joe.doe+x@ldap-1"),
    ("", "root", "@pam", "root@", "ro ot@pam", "a:b@pam", "root@p", "root@1pam", "a/b@pve"),
)
_V4: Samples = (("10.0.0.1", "255.255.255.255"), ("", "10.0.0", "10.0.0.256", "10.0.0.1/24", "::1", "host"))
_V6: Samples = (("::1", "fe80::1"), ("", "10.0.0.1", "fe80::1/64", "g::1", "host"))
_CIDR4: Samples = (("10.0.0.0/8", "10.0.0.1/24"), ("", "10.0.0.1", "10.0.0.1/33", "fe80::1/64"))
_CIDR6: Samples = (("fe80::1/64", "2001:db8::/32"), ("", "fe80::1", "fe80::1/129", "10.0.0.1/24"))
_DNS: Samples = (("web", "web.example.org", "a-b.c1"), ("", "-web", "web-", "w_b", "we b", "web..org", "wäb", "a;b"))
_ADDRESS: Samples = (
    ("10.0.0.1", "fe80::1", "dns.example.org"),
    ("", "10.0.0.1/24", "a b", "-a", "a_b"),
)
_IFACES: Samples = (("vmbr0", "eth0", "eth0.100", "bond0", "net0"), ("", "a b", "eth0/1", "-eth", "e;th", "0eth"))
_VOLUMES: Samples = (
    ("local:iso/t.iso", "local:100/vm-100-disk-0.qcow2", "local-lvm:vm-100-disk-0"),
    ("", "iso/t.iso", ":iso/t.iso", "local:", "1local:iso/t.iso"),
)
_CONTENTS: Samples = (
    ("images", "iso", "vztmpl", "backup", "snippets", "rootdir", "import"),
    ("", "isos", "disk", "../iso"),
)
_STARTUP: Samples = (("order=1", "1", "order=2,up=30,down=60", "up=5"), ("order=a", "x=1", "order=1;up=1", "up=-1"))
_TAGS: Samples = (("web", "a_b", "9a", "a+b.c-d"), ("-a", "a b!", "ä", "a/b"))
_SPECS: Samples = (("22", "80,443", "8000:8010", "ssh"), ("99999999", "8010:8000", "1:2:3", "no such name", "22;23"))
_FW_ADDRESSES: Samples = (
    ("10.0.0.1", "10.0.0.0/8", "10.0.0.1-10.0.0.9", "10.0.0.1,10.0.0.2", "fe80::/64", "+set1", "alias1", "dc/alias1"),
    ("10.0.0.256", "10.0.0.1;drop", "10.0.0.1,fe80::1", "a b", "10.0.0.9-10.0.0.1"),
)
_PRIVILEGES: Samples = (("VM.Audit", "Sys.Modify", "VM.GuestAgent.FileRead"), ("VM.Nope", "VM", "root", "VM.Monitor"))
_ACME: Samples = (("example.org", "*.lab.example.org", "a-b.c"), ("", "-a", "a_b", "a b", "a..b", "*a.b", "a;b"))

FORMATS: dict[str, Samples] = {
    "CIDR": ((*_CIDR4[0], *_CIDR6[0]), ("", "10.0.0.1", "10.0.0.1/33", "x")),
    "CIDRv4": _CIDR4,
    "CIDRv6": _CIDR6,
    "IPorCIDR": ((*_V4[0], *_CIDR4[0], *_V6[0], *_CIDR6[0]), ("10.0.0.1/33", "host", "alias1")),
    "IPorCIDRorAlias": ((*_V4[0], *_CIDR4[0], *_CIDR6[0], "alias1", "dc/alias1"), ("10.0.0.1/33", "1alias", "a b")),
    "address": _ADDRESS,
    "address-list": ((*_ADDRESS[0], "10.0.0.1 fe80::1", ""), ("10.0.0.1/24", "-a", "a_b", "10.0.0.256")),
    "disk-size": (("1G", "512M", "1.5T", "100", "4K"), ("1X", "-1G", "G", "1 G", "one")),
    "dns-name": _DNS,
    "dns-name-list": _DNS,
    "email-opt": (("", "a@example.org", "a.b+c@sub.example.org"), ("a", "a@", "@b", "a b@example.org")),
    "ip": ((*_V4[0], *_V6[0]), ("", "10.0.0.1/24", "host", "10.0.0.256")),
    "ipv4": _V4,
    "ipv4mask": (("255.255.255.0", "255.0.0.0"), ("", "255.255.0.255", "24", "10.0.0.1")),
    "ipv6": _V6,
    "mac-addr": (
        ("BC:24:11:5A:FD:7F", "bc:24:11:5a:fd:7f"),
        ("", "BC:24:11:5A:FD", "01:24:11:5A:FD:7F", "BC-24-11-5A-FD-7F"),
    ),
    "mac-prefix": (("BC:24:11", "bc:24"), ("", "01:24:11", "BC:24:11:5A:FD:7F:00", "BC2411")),
    "pve-acme-alias": _ACME,
    "pve-acme-domain": _ACME,
    "pve-acme-domain-list": (("lab.example.org;*.example.org", "example.org,a.example.org"), ("-a", "a_b", "a..b")),
    "pve-bridge-id": (("vmbr0", "a", "lan_1.2"), ("", "a/b", "a b", "averyverylongname")),
    "pve-configid": _NAMES,
    "pve-configid-list": (_NAMES[0], tuple(text for text in _NAMES[1] if text)),
    "pve-cpuset": (("0", "0-3", "0,2,4-7"), ("a", "0;1", "-1", "1-", "")),
    "pve-dir-override-list": (("iso=isos", "iso=/isos,images=disks/vm"), ("iso", "nope=x", "iso=../x", "=x")),
    "pve-fw-addr-spec": _FW_ADDRESSES,
    "pve-fw-conntrack-helper": (("ftp", "ftp,sip", "tftp"), ("nope", "ftp;nope")),
    "pve-fw-dport-spec": _SPECS,
    "pve-fw-icmp-type-spec": (("echo-request", "8", "any"), ("nope", "300", "a b")),
    "pve-fw-protocol-spec": (("tcp", "udp", "icmp", "6"), ("nope", "tcp;udp", "300")),
    "pve-fw-sport-spec": _SPECS,
    "pve-groupid": _IDS,
    "pve-groupid-list": (_IDS[0], ("a/b", "a:b", "ä")),
    "pve-ha-resource-or-vm-id": (("vm:100", "ct:101", "100"), ("", "vm:", ":1", "VM:100", "vm 100", "10 0")),
    "pve-hotplug-features": (
        ("0", "1", "network,disk,usb", "cpu", "memory;network", "cloudinit"),
        ("2", "all", "network,x"),
    ),
    "pve-iface": _IFACES,
    "pve-iface-list": (_IFACES[0], ("eth0/1", "-eth", "0eth")),
    "pve-node": _NODES,
    "pve-node-list": (_NODES[0], ("-pve", "p_e", "p.e", "p/e", "pvé")),
    "pve-node-location": (
        ("latitude=48.2,longitude=16.37", "name=Lab 1,latitude=-90,longitude=180"),
        (
            "", "Lab 1", "latitude=48.2", "latitude=91,longitude=0", "latitude=a,longitude=0",
            "latitude=1,longitude=2,x=1",
        ),
    ),
    "pve-poolid": (("lab1", "lab/sub", "a/b/c", "9.x_y-z"), ("", "a b", "a//b", "/a", "a/", "a/b/c/d", "ä", "a;b")),
    "pve-priv-list": _PRIVILEGES,
    "pve-qm-boot": (
        ("order=scsi0", "order=scsi0;net0;ide2", "cdn", "legacy=cdn", "order="),
        ("order=x9", "order=scsi0,net0", "zzz"),
    ),
    "pve-qm-bootdisk": (("scsi0", "virtio15"), ("net0", "scsi", "")),
    "pve-qm-cicustom": (
        ("user=local:snippets/u.yml", "meta=local:snippets/m,network=local:snippets/n"),
        ("user=", "local:snippets/u", "x=local:a"),
    ),
    "pve-qemu-sev-fmt": (("std", "type=snp,no-debug=1", "es,kernel-hashes=0"), ("tdx", "no-debug=1", "std,x=1")),
    "pve-qemu-tdx-fmt": (("tdx", "type=tdx,attestation=1"), ("snp", "attestation=1", "tdx,x=1")),
    "pve-qm-hostpci": (
        ("01:00.0", "0000:01:00.0,pcie=1", "host=01:00", "mapping=gpu", "01:00.0;01:00.1,x-vga=1"),
        ("x", "01:00.0,nope=1", "pcie=2,host=01:00.0", "01:00.0,romfile=../x"),
    ),
    "pve-qm-ide": (
        ("none,media=cdrom", "local:iso/t.iso,media=cdrom", "local:1", "file=local:1", "cdrom"),
        ("local:iso/t.iso,media=floppy", "local:1,nope=1", "media=cdrom", "local:1,local:2", "local:1,aio=fast"),
    ),
    "pve-qm-ipconfig": (
        (
            "ip=dhcp", "ip=10.0.0.1/24,gw=10.0.0.254", "ip6=auto", "ip6=dhcp", "ip6=fe80::1/64,gw6=fe80::2",
            "ip=10.0.0.1/24,ip6=auto",
        ),
        (
            "ip=10.0.0.1", "ip=auto", "10.0.0.1/24", "ip=dhcp,x=1", "ip6=fe80::1", "gw=10.0.0.254",
            "ip=10.0.0.1/24,gw=fe80::1",
        ),
    ),
    "pve-qm-rng": (
        ("/dev/urandom", "source=/dev/random,max_bytes=1024,period=1000"),
        ("/dev/sda", "max_bytes=-1,source=/dev/urandom", "x=1"),
    ),
    "pve-qm-smbios1": (
        (f"uuid={_UUID}", f"uuid={_UUID},manufacturer=QUI=,base64=1", "serial=abc"),
        ("uuid=x", "nope=1", _UUID),
    ),
    "pve-qm-watchdog": (
        ("i6300esb", "model=ib700,action=reset", "i6300esb,action=none"),
        ("x", "i6300esb,action=jump", "action=reset,x=1"),
    ),
    "pve-realm": (("pam", "pve", "ldap-1.x_y"), ("", "p", "1pam", "p m", "p/m", "p@m")),
    "pve-roleid": _IDS,
    "pve-roleid-list": (_IDS[0], ("a/b", "a:b", "ä")),
    "pve-startup-order": _STARTUP,
    "pve-storage-content": _CONTENTS,
    "pve-storage-content-list": (_CONTENTS[0], _CONTENTS[1][1:]),
    "pve-storage-id": _STORAGES,
    "pve-storage-id-list": (_STORAGES[0], tuple(text for text in _STORAGES[1] if text.strip() and " " not in text)),
    "pve-storage-options": (("vers=4.2,soft", "noatime"), ("a b", "")),
    "pve-storage-portal-dns": (
        ("10.0.0.1", "10.0.0.1:3260", "san.example.org:3260"),
        ("", "a b", "san:x", "10.0.0.1/24"),
    ),
    "pve-storage-portal-dns-list": (("10.0.0.1,10.0.0.2:6789", "mon.example.org"), ("san:x", "10.0.0.1/24")),
    "pve-storage-server": (("10.0.0.1", "fe80::1", "nas.example.org"), ("", "a b", "nas:/x", "10.0.0.1/24")),
    "pve-storage-vgname": (("pve", "vg-0.a_b"), ("", "v g", "-vg", "vg-", "vg/x")),
    "pve-storage-zfs-blocksize": (("8k", "4096", "16K"), ("", "8x", "k", "8 k")),
    "pve-storage-path": (("/var/lib/vz", "/mnt/a b", "/srv/x.y_z-1"), ("", "var/lib", "../x", "x")),
    "pve-tag-list": _TAGS,
    "pve-task-status-type-list": (("ok", "error", "warning", "unknown"), ("fine", "OK!")),
    "pve-tokenid-list": (("root@pam!t1", "joe@pve!ci"), ("root@pam", "root!t1", "root@pam!", "t1")),
    "pve-userid": _USERS,
    "pve-userid-list": (_USERS[0], ("root", "@pam", "root@", "a:b@pam")),
    "pve-vm-cpu-conf": (
        ("host", "qemu64", "cputype=host,flags=+aes;-pcid", "x86-64-v2-AES", "host,hidden=1"),
        ("a b", "host,nope", ""),
    ),
    "pve-vmid": (("100", "999999999"), ("99", "0", "-1", "abc", "1000000000", "1e3", "")),
    "pve-vmid-list": (("100", "301"), ("99", "abc", "-1", "1000000000")),
    "pve-volume-id": _VOLUMES,
    "pve-volume-id-or-absolute-path": (_VOLUMES[0], ("", "iso/t.iso", "local:", "../x")),
    "pve-volume-id-or-qm-path": (
        (*_VOLUMES[0], "none", "cdrom", "local:32", "local:cloudinit"),
        ("", "local:", "../x"),
    ),
    "prune-backups": (("keep-all=1", "keep-last=3,keep-daily=7"), ("keep-some=1", "3", "keep-last=x")),
    "storage-pair-list": (("local", "local:local-lvm", "1"), ("1local", "a:b:c")),
    "urlencoded": (("ssh-ed25519%20AAAA", "a.b~c", ""), ("a b", "a+b/c", "a=b", "ä")),
}  # fmt: skip
