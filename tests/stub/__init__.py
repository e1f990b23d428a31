"""The stub node: the embedded node's real API, tasks and configuration, with guests that are local sshds.

What stands in is the hardware: a disk is a directory tree, and a running VM is an sshd on the VM's forward address
whose every command runs in bubblewrap on that tree. So a spawn takes a second instead of a minute, while every call
the Hub makes, and every file it places, scans or finds in a branch, is real. Nothing of this is part of the product.
"""
