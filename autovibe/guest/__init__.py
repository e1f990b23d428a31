"""Inside a machine, over SSH: exec, stream, push, pull, scan.

`Guests` is the pool of connections and the only door to paramiko. The modules beside it use it: `identity` makes a
cloned guest somebody of its own, `agent` runs the prompt, `scan` reads what is on the disk while nothing writes.

A guest is hostile. What comes from it is bounded in size, checked in form, and never becomes part of a command. What
goes to it is an argv, quoted in one place (`command.line`), or a `Script`, which is one argument of bash. The host key
is pinned at first contact.
"""

from autovibe.guest.command import Result, Script
from autovibe.guest.files import File, checked_path
from autovibe.guest.keys import fingerprint, generate_key
from autovibe.guest.links import Address
from autovibe.guest.pool import Guests

__all__ = ["Address", "File", "Guests", "Result", "Script", "checked_path", "fingerprint", "generate_key"]
