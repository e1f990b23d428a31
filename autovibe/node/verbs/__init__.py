"""The verbs of the API, a file per noun: `verb(state, call)` answers the `data` of one route, or raises a Refusal.

A verb that returns a UPID has done its checks; what it leaves to the task is a task error when it goes wrong. Which
check stands on which side is Proxmox's, and clients rely on it.
"""
