"""Physical memory: a budget of pages, and address ranges that pages are mapped in."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pipelive_kv import _core, cuda_arrays
from pipelive_kv.errors import InvalidArgumentError

__all__ = ["Arena", "PagePool", "PagePoolStats", "Tensor", "open_device", "parse_bytes"]

Tensor = _core.DeviceTensor
PagePoolStats = _core.PagePoolStats

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{unit + "b": 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{unit + "ib": 1024**power for power, unit in enumerate("kmgt", start=1)},
}


def parse_bytes(value: int | str, name: str = "bytes") -> int:
    """A number of bytes from an integer or a text such as ``"40GiB"``, ``"1.5 GB"`` or ``"4096"``.

    Raises InvalidArgumentError naming ``name`` where it is neither, or not positive.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise InvalidArgumentError(
                f"{name} is {value!r}, expected bytes such as 4096 or '40GiB'"
            )
        number = int(match[1]) * unit if match[1].isdigit() else math.floor(float(match[1]) * unit)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        raise InvalidArgumentError(f"{name} is {value!r}, expected bytes such as 4096 or '40GiB'")
    if not 0 < number < 1 << 62:
        raise InvalidArgumentError(f"{name} is {value!r}, expected a positive number of bytes")
    return number


def whole(value: object, name: str, least: int = 0, most: int = (1 << 62) - 1) -> int:
    """An integer in that range; InvalidArgumentError naming ``name`` otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgumentError(f"{name} is {value!r}, expected an integer")
    number: int = value.__index__()
    if not least <= number <= most:
        raise InvalidArgumentError(f"{name} is {number}, expected {least} to {most}")
    return number


def open_device(device: str | _core.Device) -> _core.Device:
    """The device of that name: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:1"``.

    Each call makes a new device object; pools that are to share pages share a :class:`PagePool`.

    Raises InvalidArgumentError for another name or a GPU that is not there, DeviceError naming
    what is missing where GPUs cannot be used (the driver's library, a symbol of it, an ability).
    """
    if isinstance(device, _core.Device):
        return device
    if device == "cpu":
        return _core.HostDevice()
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise InvalidArgumentError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:1'")
    cuda_arrays.offer_compilers()
    return _core.CudaDevice(int(match[1] or 0))


class PagePool:
    """The only owner of a device's physical pages, within a budget. Thread-safe.

    Pages in use and pages kept for reuse together never exceed ``budget`` bytes. Several users (KV
    pools, arenas of weights) may share one pool: what one gives back, the other gets without the
    operating system in between.

    ``budget`` is bytes or a text such as ``"40GiB"``; ``page_bytes`` a power of two;
    ``prepare_ahead`` how many pages of zeros a background thread keeps ready.
    """

    def __init__(
        self,
        budget: int | str,
        *,
        page_bytes: int = 2 << 20,
        device: str | _core.Device = "cpu",
        prepare_ahead: int = 0,
    ) -> None:
        self._core = _core.PagePool(
            open_device(device),
            parse_bytes(budget, "budget"),
            whole(page_bytes, "page_bytes", 1),
            whole(prepare_ahead, "prepare_ahead"),
        )

    @property
    def core(self) -> _core.PagePool:
        """The pool as the compiled core takes it."""
        return self._core

    @property
    def device(self) -> _core.Device:
        """The device whose pages these are."""
        return self._core.device

    @property
    def budget(self) -> int:
        """Bytes that may be held at most, in whole pages."""
        return self._core.budget

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._core.page_bytes

    @property
    def held_bytes(self) -> int:
        """Physical memory held now, in use or kept for reuse."""
        return self._core.stats().held_bytes

    @property
    def used_bytes(self) -> int:
        """Physical memory in use now."""
        return self._core.stats().used_bytes

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    def stats(self) -> PagePoolStats:
        """All counters at one moment; sizes in bytes."""
        return self._core.stats()

    def trim(self, keep_bytes: int = 0) -> int:
        """Return free pages beyond ``keep_bytes`` to the operating system; the bytes returned."""
        return self._core.trim(whole(keep_bytes, "keep_bytes"))

    def prepare(self, count: int, *, timeout: float | None = None) -> None:
        """Have the background thread keep ``count`` free pages of zeros ready, within the budget.

        Returns at once; with ``timeout`` (seconds) it waits until the thread has done what it can,
        and raises DeadlineError at the deadline. Raises OverBudgetError for more than the budget.
        """
        self._core.prepare(whole(count, "count"))
        if timeout is not None:
            self._core.wait_prepared(timeout)

    def close(self) -> None:
        """Draw no more pages; pages in use return to the system when they are given back."""
        self._core.close()

    def __enter__(self) -> PagePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Arena:
    """A reserved address range and the pages mapped in it. Thread-safe.

    Addresses never change. Whoever unmaps sees to it that no tensor over the range is used any
    more: an access to unmapped addresses is a segmentation fault.

    ``reserve_bytes`` is rounded up to pages. With ``scrub`` pages that someone used before appear
    as zeros.
    """

    def __init__(self, pool: PagePool, reserve_bytes: int, *, scrub: bool = False) -> None:
        self._pool = pool
        self._core = _core.Arena(pool.core, whole(reserve_bytes, "reserve_bytes", 1), bool(scrub))

    @property
    def pool(self) -> PagePool:
        """The pool that the pages come from."""
        return self._pool

    @property
    def data_ptr(self) -> int:
        """The address of offset 0."""
        return self._core.data_ptr

    @property
    def reserved_bytes(self) -> int:
        """Bytes of addresses."""
        return self._core.reserved_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of pages mapped now."""
        return self._core.mapped_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._core.page_bytes

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    def is_mapped(self, offset: int, nbytes: int) -> bool:
        """Whether every byte of the range has a page behind it."""
        return self._core.is_mapped(whole(offset, "offset"), whole(nbytes, "nbytes"))

    def map(self, offset: int, nbytes: int) -> None:
        """Map pages at ``offset``, a multiple of the page size; ``nbytes`` is rounded up to pages.

        Raises OverBudgetError or OutOfMemoryError where the pages are not to be had, and
        InvalidArgumentError where any of them is mapped already; nothing has changed then.
        """
        self._core.map(whole(offset, "offset"), whole(nbytes, "nbytes"))

    def unmap(self, offset: int, nbytes: int) -> None:
        """Take the pages of the range away and give them back to the pool."""
        self._core.unmap(whole(offset, "offset"), whole(nbytes, "nbytes"))

    def tensor(self, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A contiguous tensor over mapped bytes; it lends itself by DLPack, without a copy.

        ``dtype`` is a name such as ``"bfloat16"`` or ``"uint8"``. The tensor keeps the address
        range alive, not the pages. Raises NotResidentError where the range is not mapped.
        """
        lengths = [whole(length, "shape") for length in shape]
        return self._core.tensor(whole(offset, "offset"), lengths, dtype)

    def write(self, offset: int, source: Any) -> None:
        """Copy a contiguous tensor or buffer in host memory to mapped bytes, and wait for it.

        Raises NotResidentError where not all of the range is mapped; nothing is written then.
        """
        self._core.write(whole(offset, "offset"), source)

    def read(self, offset: int, target: Any) -> None:
        """Copy mapped bytes into a contiguous, writable tensor or buffer in host memory.

        Raises NotResidentError where not all of the range is mapped.
        """
        self._core.read(whole(offset, "offset"), target)

    def export_page(self, offset: int) -> tuple[int, int, int]:
        """A descriptor of the page at ``offset`` for another process: (fd, offset in it, bytes).

        The descriptor belongs to the caller, who closes it.
        """
        return self._core.export_page(whole(offset, "offset"))

    def close(self) -> None:
        """Give all pages back; the addresses stay reserved until the last tensor is gone."""
        self._core.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
