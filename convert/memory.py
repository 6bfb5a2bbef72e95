"""How much memory of its own this process uses (mapped files and page cache are not its own)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["anonymous_memory"]

STATUS = Path("/proc/self/status")


def anonymous_memory() -> int:
    """`RssAnon` of this process in bytes; 0 where the system does not tell (it is Linux's)."""
    if not STATUS.exists():
        return 0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024
