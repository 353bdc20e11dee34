"""Numbers on a GPU, real or not, for the tests of this folder."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.cuda_fake import FakeCuda, FakeNvrtc

from pipelive_kv import _core
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.spec import KVSpec

Bits = npt.NDArray[np.uint16]
PAGE = 2 << 20


class Gpu(ABC):
    """One GPU and a pool of its pages."""

    def __init__(self, device: _core.Device) -> None:
        self.device = device
        self.pages = PagePool(256 << 20, page_bytes=PAGE, device=device)

    @abstractmethod
    def put(self, array: npt.NDArray[Any], dtype: str) -> Any:
        """A tensor on the GPU with the bits of ``array``."""

    @abstractmethod
    def bytes_of(self, address: int, nbytes: int) -> bytes:
        """What lies at an address of the GPU, once all work is done."""

    @abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address of the GPU."""

    @property
    @abstractmethod
    def stream(self) -> Any:
        """A stream that is not the default one."""

    @property
    def named_stream(self) -> Any:
        """The stream that calls given `stream` go to, where one must be named."""
        return 1 if self.stream is None else self.stream

    def pool(self, spec: KVSpec, **options: Any) -> KVPool:
        return KVPool(spec, page_pool=self.pages, **options)

    def layer(self, pool: KVPool, layer: int) -> Bits:
        """A layer's bits as [block, head, 2, token, dim], copied."""
        view = pool.layer(layer)
        span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        held = span - (view.shape[0] - pool.capacity) * view.strides[0]
        flat = np.frombuffer(self.bytes_of(view.data_ptr, 2 * held), dtype=np.uint16)
        shape = (pool.capacity, *view.shape[1:])
        strides = tuple(2 * s for s in view.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides).copy()

    def fill(self, pool: KVPool, layer: int, seed: int) -> None:
        """Random bits in every block of a layer whose blocks are packed (stack 1)."""
        view = pool.layer(layer)
        count = pool.capacity * view.strides[0]
        bits = np.random.default_rng(seed).integers(0, 1 << 16, count, dtype=np.uint16)
        self.write(view.data_ptr, bits.tobytes())


class FakeGpu(Gpu):
    """The stand-in: its memory is the host's.

    Its driver is older than CUDA 13, so that where the build's kernels come from there, NVRTC's
    stand-in is asked; where the build has none, too.
    """

    def __init__(self) -> None:
        self.cuda = FakeCuda(page_bytes=PAGE)
        self.cuda.library.fake_driver_slot_kernels()
        self.nvrtc = FakeNvrtc()
        super().__init__(self.cuda.device())
        self._arenas: list[Arena] = []

    def put(self, array: npt.NDArray[Any], dtype: str) -> Any:
        nbytes = -(-max(1, array.nbytes) // PAGE) * PAGE
        arena = Arena(self.pages, nbytes)
        arena.map(0, nbytes)
        self._arenas.append(arena)
        tensor = arena.tensor(0, list(array.shape), dtype)
        self.write(tensor.data_ptr, np.ascontiguousarray(array).tobytes())
        return tensor

    def bytes_of(self, address: int, nbytes: int) -> bytes:
        return self.cuda.read(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    @property
    def stream(self) -> Any:
        return None

    def close(self) -> None:
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()
        self.nvrtc.close()


class RealGpu(Gpu):
    """A GPU through torch."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.cuda.init()
        super().__init__(_core.CudaDevice(0))
        self._stream = torch.cuda.Stream()
        self._kept: list[Any] = []

    def put(self, array: npt.NDArray[Any], dtype: str) -> Any:
        bits = self.torch.from_numpy(np.ascontiguousarray(array)).cuda()
        tensor = bits.view(getattr(self.torch, dtype))
        self._kept.append(tensor)  # work of another stream may read it for a while
        return tensor

    def _memory(self, address: int, nbytes: int) -> Any:
        class Memory:
            __cuda_array_interface__ = {  # noqa: RUF012
                "data": (address, False),
                "shape": (nbytes,),
                "typestr": "|u1",
                "version": 3,
            }

        return self.torch.as_tensor(Memory(), device="cuda")

    def bytes_of(self, address: int, nbytes: int) -> bytes:
        self.torch.cuda.synchronize()
        found: bytes = self._memory(address, nbytes).cpu().numpy().tobytes()
        return found

    def write(self, address: int, data: bytes) -> None:
        source = self.torch.frombuffer(bytearray(data), dtype=self.torch.uint8)
        self._memory(address, len(data)).copy_(source)
        self.torch.cuda.synchronize()

    @property
    def stream(self) -> Any:
        return self._stream
