"""Freed memory goes back to the system from a process that holds much, and only from one."""

import subprocess
import sys

SCRIPT = """
import sys, psutil
from infra.process import memory

def held():
    return psutil.Process().memory_info().rss >> 20

memory.HELD_BYTES = int(sys.argv[1]) << 20
blocks = [bytearray(100_000) for _ in range(4000)]  # small enough for the heap, which ends in use
last = blocks.pop()
before = held()
blocks.clear()
memory.give_back_memory()
print(before - held())
"""


def given_back_mib(held_mib: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(held_mib)], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


def test_memory_goes_back_where_much_is_held() -> None:
    assert given_back_mib(held_mib=100) > 300
    assert given_back_mib(held_mib=100_000) < 50
