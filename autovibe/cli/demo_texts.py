"""What the demo's machines are told to do."""

PROMPT = r"""#!/bin/bash
# A small project: a module, its tests, a commit. It needs no network.
set -euo pipefail
export PYTHONDONTWRITEBYTECODE=1
mkdir -p /workspace/hello && cd /workspace/hello
git init --quiet --initial-branch=main
git config user.name 'autovibe demo' && git config user.email demo@autovibe.invalid

cat > greeting.py <<'PYTHON'
def greeting(name: str) -> str:
    return f"Hello, {name}!"
PYTHON

cat > test_greeting.py <<'PYTHON'
import unittest

from greeting import greeting


class GreetingTest(unittest.TestCase):
    def test_greets_by_name(self) -> None:
        self.assertEqual(greeting("Proxmox"), "Hello, Proxmox!")


if __name__ == "__main__":
    unittest.main()
PYTHON

echo 'To do: a farewell.' > TODO
python3 -m unittest
git add --all
git commit --quiet --message 'A greeting, tested'
git log --oneline
"""

CHANGES = r"""
set -euo pipefail
export PYTHONDONTWRITEBYTECODE=1
cd /workspace/hello
cat >> greeting.py <<'PYTHON'


def farewell(name: str) -> str:
    return f"Goodbye, {name}."
PYTHON
echo 'The farewell is written.' > CHANGES
rm TODO
chmod +x test_greeting.py
python3 -c 'from greeting import farewell; print(farewell("Proxmox"))'
"""

PROOF = r"""
set -euo pipefail
export PYTHONDONTWRITEBYTECODE=1
cd /workspace/hello
test -f TODO
test ! -e CHANGES
! grep --quiet farewell greeting.py
test -z "$(git status --porcelain)"
python3 -m unittest 2>&1 | tail -n 1
"""

EXPECTED = {
    "/workspace/hello/CHANGES": "added",
    "/workspace/hello/TODO": "deleted",
    "/workspace/hello/greeting.py": "modified",
    "/workspace/hello/test_greeting.py": "modified",
}
"""What the diff of the two checkpoints must name."""
