"""What ``import wsss_pipeline`` costs over bare Python, in milliseconds; 50 is the limit.

    python benchmarks/import_time.py [STATEMENT]

Medians of 15 starts each, taken in turns, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def milliseconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    statement = sys.argv[1] if len(sys.argv) > 1 else "import wsss_pipeline"
    pairs = [(milliseconds("pass"), milliseconds(statement)) for _ in range(15)]
    bare, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{statement}: {whole - bare:.1f} ms over the {bare:.1f} ms of bare Python")
