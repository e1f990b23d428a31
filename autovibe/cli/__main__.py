"""`python -m autovibe.cli`: how one of its words starts another in a process of its own."""

from autovibe.cli import main

main()
