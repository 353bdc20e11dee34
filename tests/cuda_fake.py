"""The stand-in for libcuda that the C++ build makes, for tests without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from pipelive_kv import _core, cuda_arrays

ROOT = Path(__file__).resolve().parents[1]
POISON = 0xA5


def fake_driver_path() -> Path:
    """The newest one built beside the other stand-ins; the test is skipped where there is none."""
    built = sorted(
        (
            path
            for path in ROOT.glob("build/*/cuda/libpipelive_fake_driver.so")
            if path.with_name("libpipelive_fake_nccl.so").exists()  # not beside some targets alone
        ),
        key=lambda path: path.stat().st_mtime,
    )
    if not built:
        pytest.skip("the fake CUDA driver is not built (cmake -DPIPELIVE_BUILD_TESTS=ON)")
    return built[-1]


class FakeNvrtc:
    """A fresh stand-in for NVRTC, which compiles for every GPU and is the one that is asked.

    What it makes is kept in ``$XDG_CACHE_HOME`` as anything else that is compiled: a test sets that
    to a folder of its own.
    """

    def __init__(self) -> None:
        self.path = str(fake_driver_path().with_name("libpipelive_fake_nvrtc.so"))
        self.library = ctypes.CDLL(self.path)
        self.library.fake_nvrtc_compiled.restype = ctypes.c_char_p
        self.library.fake_nvrtc_reset()
        # Of the oldest CUDA, so that no driver is too old for it.
        self.library.fake_nvrtc_version(1, 0)
        cuda_arrays.offer_compilers()  # before ours: this is done once
        _core.set_nvrtc_libraries([self.path])

    @property
    def compiled(self) -> list[str]:
        """The names of the files that were compiled."""
        lines: str = self.library.fake_nvrtc_compiled().decode()
        return [line.split()[0] for line in lines.splitlines()]

    def close(self) -> None:
        """Let the process look for the real ones again."""
        _core.set_nvrtc_libraries(cuda_arrays.nvrtc_libraries())


class FakeCuda:
    """A fresh fake driver; ``device()`` opens CUDA devices on it."""

    def __init__(self, *, page_bytes: int = 2 << 20, devices: int = 1) -> None:
        self.path = str(fake_driver_path())
        self.library = ctypes.CDLL(self.path)
        for name in ("fake_driver_mistakes", "fake_driver_calls"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.fake_driver_count.restype = ctypes.c_uint64
        self.library.fake_driver_new_stream.restype = ctypes.c_uint64
        self.library.fake_driver_reset()
        self.library.fake_driver_granularity(ctypes.c_uint64(page_bytes))
        self.library.fake_driver_devices(devices)

    def device(self, ordinal: int = 0) -> _core.CudaDevice:
        return _core.CudaDevice(ordinal, self.path)

    def new_stream(self) -> int:
        """A handle; the stream is there until the next fresh driver."""
        return int(self.library.fake_driver_new_stream())

    def hold_newest_stream(self) -> ctypes.c_void_p:
        """Hold back what is given to the stream that was made last, until :meth:`let_go`."""
        self.library.fake_driver_newest_stream.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(self.library.fake_driver_newest_stream())
        self.library.fake_driver_hold(stream, 1)
        return stream

    def let_go(self, stream: ctypes.c_void_p) -> None:
        """Do the work that was held back, and what comes."""
        self.library.fake_driver_hold(stream, 0)

    def fail(self, call: str, result: int) -> None:
        self.library.fake_driver_fail(call.encode(), result)

    def count(self, call: str) -> int:
        return int(self.library.fake_driver_count(call.encode()))

    @property
    def held(self) -> int:
        return int(self.library.fake_driver_held())

    @property
    def mistakes(self) -> str:
        return self.library.fake_driver_mistakes().decode()

    def read(self, address: int, nbytes: int) -> bytes:
        """Device memory is the host's here; only of mapped addresses."""
        return ctypes.string_at(address, nbytes)
