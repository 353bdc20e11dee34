"""The write log of one stage: which slots were written and have not been copied yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from pipelive_kv import _core
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.memory import open_device

if TYPE_CHECKING:
    import numpy.typing as npt


class SupportsDLPack(Protocol):
    """A tensor of any library that speaks DLPack; it must lie in host memory here."""

    def __dlpack__(self) -> Any:
        """Return the tensor's capsule."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the kind and the number of the tensor's device."""


Integers: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | SupportsDLPack"
"""One-dimensional integers; a contiguous int64 array or tensor is read without a copy."""

Ranges: TypeAlias = "npt.NDArray[np.uint64]"
"""Slot ranges as uint64 [n, 2]: the first slot and the number of slots.

A *normal* array is sorted, and its ranges are not empty, do not overlap and do not touch.
"""


@dataclass(frozen=True)
class Collected:
    """What one collect took out of a tracker."""

    ranges: Ranges
    """Normal ranges of the slots written."""
    through_seq: int
    """Every write of every step up to this one was collected; -1 before step 0."""
    num_slots: int
    """Slots in `ranges`."""
    generation: int
    """Strictly rises with every collect of a tracker, whether or not `through_seq` does."""
    open_externals: int
    """External writes recorded and not sealed, hence not in here; none recorded under a hold."""


class DirtyTracker:
    """The write log of one stage: which slots were written and have not been copied yet.

    Steps are opened in the order of their numbers, without gaps; several may be open at a time,
    from several threads, and they may be sealed in any order. Only the longest prefix of sealed
    steps is collected, so `Collected.through_seq` is exact. Writers that are not steps record their
    slots for a token and seal the token; the last collect of a migration must see no open external.

    A writer that failed half-way is sealed all the same: its slots are then copied once too often.
    Memory is bounded whether or not anyone collects. Thread-safe; a call that raises leaves the
    tracker as it was.

    On a GPU the slots need not be known to the host: with a ``device``, a step is opened with
    `open`, then `mark`; its first layer's ``append(..., marks=tracker)`` marks the slots in the
    launch that writes them, and ``seal(seq, stream=...)`` seals the step once the GPU has done what
    the stream was given by then. Both kinds of steps may be mixed.

    Args:
        num_slots: slots are numbered 0 to num_slots - 1; at most 2**36.
        next_seq: the number of the first step.
        device: a GPU that marks slots itself ("cuda", "cuda:1", or a pool's device); None: none.
        marked_steps: how many marked steps may be in flight at a time, 1 to 61. Each takes
            num_slots / 8 bytes of the GPU's memory.

    Raises:
        InvalidArgumentError: an argument is out of range.
        OutOfMemoryError: there is no memory for the marks (num_slots / 4 bytes of the host's).
        DeviceError: the GPU cannot be used.
    """

    __slots__ = ("_core", "_marks")

    def __init__(
        self,
        num_slots: int,
        *,
        next_seq: int = 0,
        device: str | _core.Device | None = None,
        marked_steps: int = 8,
    ) -> None:
        self._marks = _device_marks(device, num_slots, marked_steps)
        self._core = _core.DirtyTracker(num_slots, next_seq, self._marks)

    @property
    def core(self) -> _core.DirtyTracker:
        """What the core's other layers take."""
        return self._core

    def open(self, seq: int) -> None:
        """Begin the log of step `seq`.

        Raises:
            InvalidArgumentError: `seq` is not `next_seq`.
            BusyError: 65,536 steps are logged because one of them was never sealed.
        """
        self._core.open(seq)

    def record(self, seq: int, slots: Integers) -> None:
        """Add slots to the open step `seq`: any order, repeats allowed, -1 (a padded row) skipped.

        Raises:
            InvalidArgumentError: the step is not open, or a slot (named) is out of range.
        """
        self._core.record(seq, slots)

    def record_ranges(self, seq: int, ranges: Ranges) -> None:
        """Add slot ranges, in any order, to the open step `seq`; raises as `record` does."""
        self._core.record_ranges(seq, ranges)

    def record_blocks(self, seq: int, ids: Integers, block_size: int) -> None:
        """Add all slots of the blocks `ids` to the open step `seq`; raises as `record` does."""
        self._core.record_blocks(seq, ids, block_size)

    def mark(self, seq: int, stream: Any) -> None:
        """Let appends that ``stream`` is given from now on mark slots for the open step `seq`.

        Call it in the order of the steps, outside of a graph's capture; a captured append marks for
        the step that replays it. Steps of several streams must not overlap on the GPU.

        Args:
            seq: the step; once per step.
            stream: the stream of the step's appends, of torch or cupy or its handle (1: CUDA's
                default stream). There is no default: an append without a stream takes its library's
                current one, and marks of appends in any other stream than this may be lost.

        Raises:
            TypeError: ``stream`` is None.
            InvalidArgumentError: the step is not open, or the tracker has no device.
            BusyError: as many marked steps as there may be are in flight, or the stream is being
                captured.
        """
        self._core.mark(seq, stream)

    @property
    def marks(self) -> _core.DeviceMarks:
        """What `append` takes; raises InvalidArgumentError where the tracker has no device."""
        if self._marks is None:
            raise InvalidArgumentError("marks of a tracker that was made without a device")
        return self._marks

    def seal(self, seq: int, *, stream: Any = None) -> None:
        """Say that the device has completed the open step `seq`.

        With a ``stream`` (of torch or cupy, or its handle): that it has once it has done what the
        stream was given so far. That is looked for whenever the tracker is asked something.

        Raises:
            InvalidArgumentError: the step was not opened, or is sealed already; or a stream is
                given to a tracker without a device.
            BusyError: the stream is being captured into a CUDA graph.
        """
        if stream is None:
            self._core.seal(seq)
        else:
            self._core.seal_after(seq, stream)

    def wait_sealed(self, seq: int, timeout: float) -> None:
        """Wait until every step up to `seq` is sealed.

        Raises:
            DeadlineError: one was not completed within ``timeout`` seconds.
            DeviceError: what the GPU was given has failed.
        """
        self._core.wait_sealed(seq, timeout)

    def record_external(self, slots: Integers) -> int:
        """Begin a log outside the steps and return its token, which is never given twice.

        Raises:
            InvalidArgumentError: a slot (named) is out of range.
            BusyError: 65,536 external writes are logged because they were never sealed.
        """
        token: int = self._core.record_external(slots)
        return token

    def record_external_ranges(self, ranges: Ranges) -> int:
        """Begin a log of slot ranges outside the steps, as `record_external` does."""
        token: int = self._core.record_external_ranges(ranges)
        return token

    def record_external_blocks(self, ids: Integers, block_size: int) -> int:
        """Begin a log of whole blocks outside the steps, as `record_external` does."""
        token: int = self._core.record_external_blocks(ids, block_size)
        return token

    def seal_external(self, token: int) -> None:
        """Say that the external writes of `token` are complete; the token is used up.

        Raises:
            InvalidArgumentError: the token was never given, is used up, or fell to a reset.
        """
        self._core.seal_external(token)

    def collect(self) -> Collected:
        """Take the sealed writes since the last collect; concurrent collects take turns."""
        return Collected(*self._core.collect())

    def restore(self, ranges: Ranges) -> None:
        """Put ranges back that were collected but could not be sent.

        Raises:
            InvalidArgumentError: a range (named) is not within the slots.
        """
        self._core.restore(ranges)

    def hold_from(self, seq: int) -> None:
        """Hold back what steps from `seq` on, and externals recorded from now on, write.

        Collects go on for the steps before, and `pending_slots` counts no other. For a switchover,
        after which the target and not this stage writes the layers that moved.

        Raises:
            InvalidArgumentError: step `seq` is sealed and may be collected already.
            BusyError: the steps from another number on are held.
        """
        self._core.hold_from(seq)

    def release_hold(self) -> None:
        """Let the held steps and externals be collected; without a hold, do nothing."""
        self._core.release_hold()

    def reset(self, next_seq: int) -> None:
        """Forget every step, external, mark and hold; the next step to open is `next_seq`.

        Raises:
            InvalidArgumentError: `next_seq` is negative.
        """
        self._core.reset(next_seq)

    @property
    def num_slots(self) -> int:
        """The number of slots."""
        value: int = self._core.num_slots
        return value

    @property
    def next_seq(self) -> int:
        """The number that the next `open` must give."""
        value: int = self._core.next_seq
        return value

    @property
    def sealed_through(self) -> int:
        """Every step up to this one is sealed; one less than the first step's number at first."""
        value: int = self._core.sealed_through
        return value

    @property
    def pending_slots(self) -> int:
        """Slots that a collect would take now."""
        value: int = self._core.pending_slots
        return value

    @property
    def open_steps(self) -> int:
        """Steps opened and not sealed."""
        value: int = self._core.open_steps
        return value

    @property
    def open_externals(self) -> int:
        """External writes recorded and not sealed."""
        value: int = self._core.open_externals
        return value

    @property
    def memory_bytes(self) -> int:
        """Bytes held by marks and logs."""
        value: int = self._core.memory_bytes
        return value


def _device_marks(
    device: str | _core.Device | None, num_slots: int, steps: int
) -> _core.DeviceMarks | None:
    if device is None:
        return None
    opened = open_device(device)
    if not isinstance(opened, _core.CudaDevice):
        raise InvalidArgumentError(f"device is {opened.name!r}, expected a GPU or None")
    return _core.DeviceMarks(opened, num_slots, steps)


def merge_ranges(ranges: Ranges) -> Ranges:
    """Return the same slots as normal ranges; `ranges` may overlap, in any order.

    Raises:
        InvalidArgumentError: a range (named) passes 2**64.
    """
    merged: Ranges = _core.merge_ranges(ranges)
    return merged


def ranges_of_blocks(ids: Integers, block_size: int) -> Ranges:
    """Return the slots of the blocks `ids`, in any order with repeats, as normal ranges.

    Raises:
        InvalidArgumentError: an id (named) is negative, or the block size is 0.
    """
    ranges: Ranges = _core.ranges_of_blocks(ids, block_size)
    return ranges


def intersect_ranges(a: Ranges, b: Ranges) -> Ranges:
    """Return the slots that are in both, as normal ranges.

    Raises:
        InvalidArgumentError: an argument is not normal; its first offender is named.
    """
    both: Ranges = _core.intersect_ranges(a, b)
    return both


def blocks_touched(ranges: Ranges, block_size: int) -> npt.NDArray[np.int64]:
    """Return the ids of the blocks that hold any of the slots: int64 [n], ascending, each once.

    Raises:
        InvalidArgumentError: `ranges` is not normal, or the block size is 0.
    """
    ids: npt.NDArray[np.int64] = _core.blocks_touched(ranges, block_size)
    return ids
