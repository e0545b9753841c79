"""What glibc does with memory that was freed; elsewhere these do nothing."""

from __future__ import annotations

import ctypes
from contextlib import suppress

ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def few_heaps() -> None:
    """Let all threads share two heaps, before there are threads: each thread's own would keep what it once took for a
    huge prompt, and threads of readers come and go."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 2)


def give_back() -> None:
    """Let the system have what was freed. glibc keeps what a model was loaded and an adapter merged through, which may
    be as much again as the models take."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
