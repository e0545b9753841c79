"""What the machine offers: memory and cores, as this process may use them."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Main memory in bytes, or the container's limit where that is less."""
    if sys.platform == "win32":
        return _windows()[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, *(_number(Path(limit), total) for limit in _GROUP_LIMITS))


def available_bytes() -> int:
    """Bytes of main memory that a new program could take now; all of it where the system does not say."""
    if sys.platform == "win32":
        return _windows()[1]
    total = memory_bytes()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return total
    available = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), total
    )
    return min(total, available)


def cores() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(path: Path, otherwise: int) -> int:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return otherwise
    return int(text) if text.isdigit() else otherwise


def _windows() -> tuple[int, int]:
    """Total and available bytes from GlobalMemoryStatusEx (its second field is a percentage)."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status[1]), int(status[2])
