"""Draft folders that somebody else has made, by the thousand: each loads and serves correctly, or is refused.

    python benchmarks/hostile_folders.py --cases 2000 --seed 0

The changes and what is asked of them are those of tests/hostile.py, which the tests run a hundred of.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is not installed

from tests.hostile import main

if __name__ == "__main__":
    sys.exit(main())
