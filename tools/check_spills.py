"""Reads the report of `ptxas -v` in a build log and fails when a kernel spills registers or uses local memory.

python tools/check_spills.py build/ptxas.log
"""

import re
import sys
from pathlib import Path

KERNEL = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>[^']+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def check_spills(log: str) -> tuple[int, list[str]]:
    """(kernels seen, one line for each that uses local memory)."""
    kernels, bad, current = 0, [], ""
    for line in log.splitlines():
        if found := KERNEL.search(line):
            kernels += 1
            current = f"{found['name']} ({found['arch']})"
        elif (found := MEMORY.search(line)) and any(int(count) for count in found.groups()):
            bad.append(f"{current}: {found[0]}")
    return kernels, bad


def main() -> int:
    kernels, bad = check_spills(Path(sys.argv[1]).read_text())
    for line in bad:
        print("local memory:", line)
    print(f"ptxas: {kernels} kernels compiled, {len(bad)} with spills or local memory")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
