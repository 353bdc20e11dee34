"""Helpers for tests of memory."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)


def accessible(address: int) -> bool:
    """Whether the byte can be read, asked of the kernel so that nothing faults."""
    read_end, write_end = os.pipe()
    try:
        return int(_LIBC.write(write_end, ctypes.c_void_p(address), 1)) == 1
    finally:
        os.close(read_end)
        os.close(write_end)
