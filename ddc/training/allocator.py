"""What becomes of memory that is freed on the host."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_HEAP_BLOCK = 2**25  # as much as glibc allows
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, where the C library is glibc.

    By itself it gives memory of more than a few megabytes back to the system, which clears every
    page anew when it is asked for it at the next step (docs/speed.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
