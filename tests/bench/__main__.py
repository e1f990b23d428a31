"""`python -m tests.bench [WORD …]`: run every bench_*.py (or those whose name holds a word), a line a figure.

The status is 0 also when a figure falls short: a benchmark informs, it is no timed test.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path


def main(words: list[str]) -> int:
    """1 when a benchmark could not be run at all."""
    status = 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if words and not any(word in path.stem for word in words):
            continue
        try:
            for figure in importlib.import_module(f"tests.bench.{path.stem}").figures():
                print(figure, flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{path.stem}: not measured", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
