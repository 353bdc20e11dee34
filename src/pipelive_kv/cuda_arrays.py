"""What operations on a GPU need of the library that an array is of: torch or cupy.

Neither is imported unless an array of it is given, and none is needed for arrays of the host.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelive_kv import _core
from pipelive_kv.errors import InvalidArgumentError

CUDA = 2  # DLPack's number for the kind of device


class GpuArrays(Protocol):
    """Makes arrays beside the one it was made for, in the order of one stream."""

    handle: int
    """The stream, as a CUDA handle."""

    stream: Any
    """What to name the stream by to the core, which keeps an object for as long as it may ask."""

    def in_stream(self) -> contextlib.AbstractContextManager[Any]:
        """While entered, what is made belongs to the stream, and arrays of its device are lent."""

    def empty(self, shape: tuple[int, ...], dtype: str | None) -> Any:
        """Make an array; None: of the same dtype."""

    def scratch(self, nbytes: int) -> Any:
        """Make an array of bytes."""

    def copy_of(self, values: Any) -> Any:
        """Copy an array of the host, or a list of integers (as int64).

        The array may be changed as soon as this returns, even if its memory is pinned.
        """


def of(array: Any, stream: Any = None) -> GpuArrays | None:
    """Return what makes arrays beside ``array``; None where it lies in host memory.

    Args:
        array: any object.
        stream: of torch or cupy, or a handle; None: the current stream of the array's library.

    Raises:
        InvalidArgumentError: ``stream`` is nothing of that kind.
        TypeError: the array is on a GPU, and neither of torch nor of cupy.
    """
    if not on_gpu(array):
        return None
    offer_compilers()
    module = type(array).__module__.partition(".")[0]
    if hasattr(array, "new_empty"):  # torch, and subclasses of its tensors
        return _Torch(array, stream)
    if module == "cupy":
        return _Cupy(array, stream)
    raise TypeError(
        f"query is a {type(array).__module__}.{type(array).__qualname__} on a GPU, expected a "
        "torch or a cupy array"
    )


def on_gpu(array: Any) -> bool:
    """Tell whether an array says that it lies on a CUDA device."""
    is_cuda = getattr(array, "is_cuda", None)
    if is_cuda is not None:
        return bool(is_cuda)
    where = getattr(array, "__dlpack_device__", None)
    return where is not None and int(where()[0]) == CUDA


class Queue(NamedTuple):
    """Where the core puts work on arrays of a GPU that it borrows itself."""

    stream: Any
    """Of the call, or of the library; None: CUDA's default stream."""
    ordered: bool
    """Whether the arrays' own library orders them in that stream, so that nobody need ask it to."""
    device: contextlib.AbstractContextManager[Any]
    """To be entered around the call: torch lends tensors of its current device alone."""


def queue_of(stream: Any, array: Any, *others: Any) -> Queue:
    """Choose the queue for arrays, of which the first one's library counts."""
    if not on_gpu(array):
        return Queue(stream, False, contextlib.nullcontext())
    if hasattr(array, "new_empty"):
        tensor = _Torch(array, None)
        if stream is not None:
            return Queue(stream, False, tensor.in_stream())
        ordered = all(hasattr(other, "new_empty") for other in others)
        return Queue(tensor.stream, ordered, tensor.in_stream())
    if stream is None and type(array).__module__.partition(".")[0] == "cupy":
        stream = _Cupy(array, None).stream
    return Queue(stream, False, contextlib.nullcontext())


def device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """Return what to enter while an array is lent: torch lends those of its current device alone."""
    if not on_gpu(array) or not hasattr(array, "new_empty"):
        return contextlib.nullcontext()
    import torch  # noqa: PLC0415  the caller has it

    context: contextlib.AbstractContextManager[Any] = torch.cuda.device(array.device)
    return context


def stream_handle(stream: Any) -> int:
    """Return the handle of a stream of torch or cupy, or of an int."""
    for value in (stream, getattr(stream, "cuda_stream", None), getattr(stream, "ptr", None)):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    raise InvalidArgumentError(
        f"stream is {stream!r}, expected a CUDA stream of torch or cupy, or its handle"
    )


class _Torch:
    def __init__(self, like: Any, stream: Any) -> None:
        import torch  # noqa: PLC0415  the caller has it

        self._torch = torch
        self._like = like
        self._stream: Any = None
        if stream is None:
            # torch never destroys its streams.
            self.handle = int(torch.cuda.current_stream(like.device).cuda_stream)
            self.stream = self.handle
            return
        self.handle = stream_handle(stream)
        self.stream = stream
        if isinstance(stream, torch.cuda.Stream):
            self._stream = stream
        elif self.handle <= 1:
            self._stream = torch.cuda.default_stream(like.device)
        else:
            external: Any = torch.cuda.ExternalStream
            self._stream = external(self.handle, device=like.device)

    def in_stream(self) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any]
        if self._stream is None:
            context = self._torch.cuda.device(self._like.device)
        else:
            context = self._torch.cuda.stream(self._stream)
        return context

    def empty(self, shape: tuple[int, ...], dtype: str | None) -> Any:
        return self._like.new_empty(
            shape, dtype=self._like.dtype if dtype is None else getattr(self._torch, dtype)
        )

    def scratch(self, nbytes: int) -> Any:
        return self._like.new_empty(nbytes, dtype=self._torch.uint8)

    def copy_of(self, values: Any) -> Any:
        if isinstance(values, list):
            return self._torch.tensor(values, dtype=self._torch.int64, device=self._like.device)
        host = self._torch.as_tensor(values)
        if host.is_pinned():
            # The GPU reads pinned memory when the stream comes to it, and the caller may write into
            # its own once this returns; torch keeps ours until it has been read.
            host = self._torch.empty_like(host, pin_memory=True).copy_(host)
        return host.to(self._like.device, non_blocking=True)


class _Cupy:
    def __init__(self, like: Any, stream: Any) -> None:
        import cupy  # noqa: PLC0415  the caller has it

        self._cupy = cupy
        self._like = like
        self._stream: Any = None
        if stream is None:
            self.stream = cupy.cuda.get_current_stream()
            self.handle = int(self.stream.ptr)
            return
        self.handle = stream_handle(stream)
        self.stream = stream
        is_stream = isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream))
        self._stream = stream if is_stream else cupy.cuda.ExternalStream(self.handle)

    @contextlib.contextmanager
    def in_stream(self) -> Any:
        with self._like.device, self._stream or contextlib.nullcontext():
            yield

    def empty(self, shape: tuple[int, ...], dtype: str | None) -> Any:
        return self._cupy.empty(shape, dtype=dtype or self._like.dtype)

    def scratch(self, nbytes: int) -> Any:
        return self._cupy.empty(nbytes, dtype="uint8")

    def copy_of(self, values: Any) -> Any:
        if isinstance(values, list):
            return self._cupy.asarray(values, dtype="int64")
        import numpy as np  # noqa: PLC0415

        return self._cupy.asarray(np.from_dlpack(values))


@functools.cache
def offer_compilers() -> None:
    """Tell the core which NVRTC libraries there are in this environment's packages."""
    _core.set_nvrtc_libraries(nvrtc_libraries())


def nvrtc_libraries() -> list[str]:
    """Return the paths of NVRTC in NVIDIA's packages, which torch installs, newest first."""
    found: list[Path] = []
    spec = importlib.util.find_spec("nvidia") if "nvidia" not in sys.modules else None
    roots = (
        list(getattr(sys.modules.get("nvidia"), "__path__", []))
        if spec is None
        else list(spec.submodule_search_locations or [])
    )
    for root in roots:
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
            found += [path for path in Path(root).glob(pattern) if ".alt." not in path.name]
    found.sort(key=lambda path: int(path.name.rpartition(".")[2]), reverse=True)
    return [str(path) for path in found]
