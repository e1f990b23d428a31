"""autovibe: AI agents in virtual machines on your own Proxmox VE cluster."""

__version__ = "0.1.0"
