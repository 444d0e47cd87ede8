"""All benchmarks, one after the other: python -m benchmarks.run_all [--folder FOLDER] [--only NAMES]

Takes about half an hour, on a machine that does nothing else. Leaves in the folder the figures of each as
NAME.json, what each printed as NAME.txt, table.md and chart.png. Ends with an error when one of them did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.chart import write_chart

ROOT = Path(__file__).parents[1]
BENCHMARKS = (
    "engine",
    "speculative",
    "gateway",
    "routing",
    "embedding",
    "constraints",
    "start_up",
    "threads",
    "flash_attention",
    "kv_layout",
    "memory",
    "sampling",
)


def run(name: str, folder: Path) -> bool:
    """Whether it ended without an error."""
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(folder / f"{name}.json")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (folder / f"{name}.txt").write_text(done.stdout)
    print(done.stdout, flush=True)
    if done.returncode:
        print(f"{name} ended with exit code {done.returncode}.\n", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="All benchmarks, one after the other.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/benchmarks", help="default: %(default)s")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="default: %(default)s")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    succeeded = [run(name, folder) for name in names]
    table = write_chart(folder)
    (folder / "table.md").write_text(table)
    print(table, end="")
    return int(not all(succeeded))


if __name__ == "__main__":
    sys.exit(main())
