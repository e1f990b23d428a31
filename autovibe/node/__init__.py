"""The embedded node: another program, which speaks the Proxmox VE API and runs real QEMU virtual machines.

    server   HTTPS: reads requests, writes answers           messages  request_head  websocket
    api      authenticates, checks, calls, answers           auth  parameters  formats  multipart  refusal  faults
    routes   the one table of paths, verbs and parameters    options
    verbs/   a file per noun: what each route does           drives  volumes  state
    tasks    work that outlives a request                    upid  worker  recovery  console
    disks    the storages; qemu the processes; agent, cloudinit, vmconfig: what each VM has

Imports point down. Nothing here knows the Hub.
"""

from __future__ import annotations

from autovibe.node.serve import Node, run, serve

__all__ = ["Node", "run", "serve"]
