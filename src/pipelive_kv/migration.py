"""The two ends of a migration session, and the estimate of when patches are small enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelive_kv import _core
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.kv import LayerView
from pipelive_kv.spec import KVSpec
from pipelive_kv.tracker import DirtyTracker
from pipelive_kv.transport import Channel

__all__ = [
    "MAX_MESSAGE_BYTES",
    "PatchReceiver",
    "PatchSender",
    "ReceiverStats",
    "RoundStats",
    "SentStep",
    "StopPredictor",
    "WriteThrough",
]

MAX_MESSAGE_BYTES = 1 << 20
"""A core's cache holds it: the target checks a message and then reads it again to scatter it."""

Ranges: TypeAlias = "npt.NDArray[np.uint64]"
"""Slot ranges as uint64 [n, 2]: the first slot and the number of slots."""


@dataclass(frozen=True)
class RoundStats:
    """What one round consisted of."""

    records: int
    messages: int
    bytes: int
    """As sent, headers and tables included."""
    slots: int
    """Summed over the layers."""
    skipped_slots: int
    """Not sent, because they are not mapped here and so not live; summed over the layers."""
    busy_seconds: float
    """Packing and sending; waiting for the rate limit or for acknowledgements is not counted."""


@dataclass(frozen=True)
class ReceiverStats:
    """What a receiver has done so far; slots are summed over the layers."""

    messages: int
    records: int
    slots: int
    """Written."""
    overtaken_slots: int
    """Not written, because newer bytes were there already."""
    dropped_slots: int
    """Not written, because a resize has taken them away since."""
    duplicates: int
    """Messages that had been applied before."""
    bytes: int
    """Written to slots and regions."""
    rounds: int
    """Completely applied, and so is every round before."""
    busy_seconds: float
    """Checking and writing, not waiting."""


class PatchSender:
    """The source's end: packs slot ranges of the moving layers and sends them, round by round.

    One thread sends. :meth:`wait_applied`, :attr:`applied_through`, :meth:`set_rate_limit` and
    :meth:`cancel` may be called from others. An error inside a round, and a refusal by the target,
    end the session: every later call raises the same error.

    Args:
        channel: a connection to the target; this end owns it from now on.
        spec: the shape of the moving layers; must be the target's, except for ``order``.
        layers: the moving layers' views, by layer.
        epoch: of the reconfiguration; the target refuses messages of any other.
        max_message_bytes: the largest message, payload included; a shared-memory ring or the
            channel's staging may bound it further. None: 1 MiB, or what the channel takes in device
            memory beside a message.
        rate_limit: bytes per second, or None.
        checksum: whether every message carries a CRC32C of all of its bytes.

    Raises InvalidArgumentError.
    """

    def __init__(
        self,
        channel: Channel,
        spec: KVSpec,
        layers: Mapping[int, LayerView],
        *,
        epoch: int,
        max_message_bytes: int | None = None,
        rate_limit: float | None = None,
        checksum: bool = True,
    ) -> None:
        self._channel = channel
        self._layers = tuple(sorted(layers))
        self._slot_bytes = spec.slot_bytes
        self._epoch = epoch
        self._core = _core.PatchSender(
            channel.core,
            spec.core,
            dict(layers),
            epoch,
            max_message_bytes or _message_bytes(channel, rate_limit),
            0.0 if rate_limit is None else rate_limit,
            checksum,
        )

    @property
    def core(self) -> _core.PatchSender:
        """What the core's other classes take."""
        return self._core

    @property
    def channel(self) -> Channel:
        """The connection."""
        return self._channel

    @property
    def layers(self) -> tuple[int, ...]:
        """The moving layers, ascending."""
        return self._layers

    @property
    def epoch(self) -> int:
        """Of the reconfiguration."""
        return self._epoch

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one layer, as it travels."""
        return self._slot_bytes

    def send_round(
        self,
        round: int,
        through_seq: int,
        ranges: Ranges,
        *,
        layers: Iterable[int] | None = None,
        timeout: float,
    ) -> RoundStats:
        """Send ``ranges`` (uint64 [n, 2]) of ``layers`` (None: all) and the round's end.

        ``round`` names it in errors. ``through_seq`` (-1 or more, never less than before) says that
        every write of steps up to it has been sent with this round, for these layers. Returns when
        all is handed over, not when it is applied.

        Raises DeadlineError, ClosedError, CancelledError, NotResidentError where a layer is not
        held, InvalidArgumentError for ranges outside the pool (the session goes on), and what the
        target raised if it gave up.
        """
        wanted: list[int] = []
        if layers is not None:
            wanted = sorted(layers)
            if not wanted:
                raise InvalidArgumentError("layers is empty, expected None or one layer at least")
        stats = self._core.send_round(round, through_seq, _ranges(ranges), wanted, timeout)
        return RoundStats(*stats)

    def wait_applied(self, through_seq: int, timeout: float) -> None:
        """Wait until the target has applied all writes of steps up to ``through_seq``.

        Raises DeadlineError (the session goes on), ClosedError, CancelledError, or what the target
        raised if it gave up.
        """
        self._core.wait_applied(through_seq, timeout)

    @property
    def applied_through(self) -> int:
        """The target's last word on that, -1 at first; does not wait."""
        seq: int = self._core.applied_through()
        return seq

    @property
    def failed(self) -> bool:
        """Whether nothing can be sent any more, since something went wrong or it was cancelled."""
        failed: bool = self._core.failed()
        return failed

    def verify(self, ranges: Ranges, timeout: float) -> bool:
        """Compare digests of ``ranges`` with the target's, layer by layer; True where all agree.

        Nobody may write to them meanwhile, on either side. Raises CorruptError naming the layer.
        """
        self._core.verify(_ranges(ranges), timeout)
        return True

    def send_region(self, region_id: int, buffer: Any, timeout: float) -> None:
        """Send all bytes of ``buffer`` to a region of the same size that the target registered."""
        self._core.send_region(region_id, buffer, timeout)

    def finish(self, timeout: float) -> None:
        """Say that nothing more comes; wait until the target confirms that all is applied."""
        self._core.finish(timeout)

    def set_rate_limit(self, bytes_per_second: float | None) -> None:
        """Change the cap, also under a round that waits for it; None lifts it."""
        self._core.set_rate_limit(0.0 if bytes_per_second is None else bytes_per_second)

    def cancel(self) -> None:
        """Nothing is sent any more when this has returned; the target sees the channel closed."""
        self._core.cancel()


@dataclass(frozen=True)
class SentStep:
    """One step's writes, sent at its end; where the sender was behind, those of several steps."""

    round: int
    through_seq: int
    """The last step in it."""
    slots: int
    """Of one layer."""
    records: int
    """To all targets."""
    bytes: int
    """To all targets, as sent."""
    start_ns: int
    """On the monotonic clock: the step was found sealed."""
    end_ns: int
    """Handed to the channels; for the last one of all: applied."""
    busy_seconds: float
    """Packing and sending."""
    lag_steps: int
    """Steps that were sealed meanwhile."""


class WriteThrough:
    """The source's last mode before a switchover: each step's slots go out when it is sealed.

    :meth:`run` sends in its caller's thread, without Python: sealing a step in the tracker wakes
    it, and nobody waits for the targets in between. It is over when all writes of steps up to the
    one that :meth:`end_after` names are applied at every target. The other methods may be called
    from any thread. The senders send nothing else meanwhile.

    Args:
        tracker: the source's write log.
        senders: one per target.
        sent_through: steps up to this one were sent before.
        first_round: the number of the next round, for errors and reports.
        keep_ranges: remember what is sent, for a verification.
        message_timeout: seconds that one message, or the last acknowledgement, may take.

    Raises InvalidArgumentError where there is no sender.
    """

    def __init__(
        self,
        tracker: DirtyTracker,
        senders: Sequence[PatchSender],
        *,
        sent_through: int,
        first_round: int,
        keep_ranges: bool = False,
        message_timeout: float = 60.0,
    ) -> None:
        self._core = _core.WriteThrough(
            tracker.core,
            [sender.core for sender in senders],
            sent_through,
            first_round,
            keep_ranges,
            message_timeout,
        )

    def run(self, timeout: float) -> bool:
        """Send until the last step is applied; False where ``timeout`` seconds passed before.

        After False it may be called again. Raises CancelledError after :meth:`cancel`, and what
        the senders raise.
        """
        over: bool = self._core.run(timeout)
        return over

    def resume(self, place: int, sender: PatchSender, rounds_applied: int) -> None:
        """Go on over a new connection to the target of number ``place`` after :meth:`run` raised.

        ``rounds_applied`` is how many whole rounds of the connection before the target has applied;
        what came after them is sent again, and nothing else. Raises InvalidArgumentError for
        numbers that cannot be, and what ``sender`` raises; then it may be called once more, with
        another one.
        """
        self._core.resume(place, sender.core, rounds_applied)

    def end_after(self, seq: int) -> None:
        """Step ``seq`` is the last to send; what later ones write the tracker holds back."""
        self._core.end_after(seq)

    def cancel(self) -> None:
        """Let :meth:`run` end; a sender that waits for its target has to be cancelled as well."""
        self._core.cancel()

    @property
    def sent_through(self) -> int:
        """The last step that is sent."""
        seq: int = self._core.sent_through()
        return seq

    @property
    def bytes_sent(self) -> int:
        """To all targets."""
        count: int = self._core.bytes_sent()
        return count

    def sent(self, first: int = 0) -> tuple[SentStep, ...]:
        """The rounds from number ``first`` on, the last 1024 at most."""
        return tuple(SentStep(*step) for step in self._core.sent(first))

    @property
    def ranges(self) -> Ranges:
        """All slots sent, as sorted ranges; none without ``keep_ranges``."""
        ranges: Ranges = self._core.ranges()
        return ranges


class PatchReceiver:
    """The target's end: checks what arrives, and writes it under the rules of epoch and generation.

    :meth:`run` is the only thing that writes, in its caller's thread. Memory that is not mapped is
    never touched: a resize of the pool waits for a message that is just being written.

    Args:
        channel: a connection to the source; this end owns it from now on.
        spec: the shape of the moving layers; must be the source's, except for ``order``.
        layers: the moving layers' views, by layer.
        epoch: of the reconfiguration; messages of any other are refused.
        regions: writable buffers for raw bytes (weights), by id.
        checksum: whether checksums are demanded (True) or refused (False); None takes what the
            source does.

    Raises InvalidArgumentError.
    """

    def __init__(
        self,
        channel: Channel,
        spec: KVSpec,
        layers: Mapping[int, LayerView],
        *,
        epoch: int,
        regions: Mapping[int, Any] | None = None,
        checksum: bool | None = None,
    ) -> None:
        self._channel = channel
        self._layers = tuple(sorted(layers))
        self._epoch = epoch
        self._core = _core.PatchReceiver(
            channel.core, spec.core, dict(layers), epoch, dict(regions or {}), checksum
        )

    @property
    def channel(self) -> Channel:
        """The connection."""
        return self._channel

    @property
    def layers(self) -> tuple[int, ...]:
        """The moving layers, ascending."""
        return self._layers

    @property
    def epoch(self) -> int:
        """Of the reconfiguration."""
        return self._epoch

    def run(self, timeout: float, *, rounds: int | None = None) -> bool:
        """Receive and apply until the source has finished, or until so many rounds are applied.

        True where the source has finished. After False it is called again, from any thread: so the
        bulk, which is the first round, can be left to a thread that takes its time.

        Whatever it raises ends the session: the source is told why, the channel is closed, and
        waiters raise the same. ProtocolError: the source sent what it must not; CorruptError: a
        checksum does not agree; NotResidentError: slots that were not mapped until the deadline;
        ClosedError: the source has gone; CancelledError; DeadlineError. InvalidArgumentError, which
        ends nothing: another call is under way, the source has finished, ``rounds`` is below 1.
        """
        if rounds is not None and rounds < 1:
            raise InvalidArgumentError(f"rounds is {rounds}, expected None or 1 or more")
        finished: bool = self._core.run(timeout, rounds)
        return finished

    @property
    def applied_through(self) -> int:
        """All writes of steps up to this one are applied, to every layer; -1 at first."""
        seq: int = self._core.applied_through()
        return seq

    def wait_applied(self, seq: int, timeout: float, *, layer: int | None = None) -> None:
        """The gate: wait until all writes of steps up to ``seq`` are applied.

        ``layer`` waits for that layer only. Raises DeadlineError, or what ended :meth:`run`.
        """
        self._core.wait_applied(seq, timeout, layer)

    @property
    def rounds_applied(self) -> int:
        """Rounds that are applied with all before them; final once :meth:`run` has ended."""
        count: int = self._core.rounds_applied()
        return count

    def wait_region(self, region_id: int, timeout: float) -> None:
        """Wait until all bytes of a region are there; raises as :meth:`wait_applied` does."""
        self._core.wait_region(region_id, timeout)

    def set_capacity(self, blocks: int, resize_seq: int = -1) -> None:
        """Tell of a resize: ids ``[0, blocks)`` are usable from step ``resize_seq`` on.

        What rounds of before that step say about slots beyond is dropped, since the resize has
        moved what was live there; what later rounds say waits for the pool to grow, until the
        deadline of :meth:`run`.
        """
        self._core.set_capacity(blocks, resize_seq)

    def stats(self) -> ReceiverStats:
        """Counters so far."""
        return ReceiverStats(**self._core.stats())

    def cancel(self) -> None:
        """Nothing is written any more when this has returned; the source sees it closed."""
        self._core.cancel()


class StopPredictor:
    """Predicts how long it would stop a stage to send what is pending, from rounds observed.

    ``fixed + bytes / bandwidth + records * record_cost``, all in seconds and bytes. The bandwidth
    is a decayed ratio of bytes to busy time, so a small round, which is mostly overhead, hardly
    moves it.

    Args:
        fixed_seconds: one message there, its acknowledgement back, and the switch.
        record_seconds: what a record costs beyond its bytes.
        decay: weight of the rounds before the last, 0 to below 1.
        initial_bytes_per_second: assumed before anything was observed.

    Raises InvalidArgumentError.
    """

    def __init__(
        self,
        *,
        fixed_seconds: float = 1e-3,
        record_seconds: float = 0.5e-6,
        decay: float = 0.7,
        initial_bytes_per_second: float = 0.5e9,
    ) -> None:
        self._core = _core.BandwidthEstimate(
            fixed_seconds, record_seconds, decay, initial_bytes_per_second
        )

    def observe(self, *, bytes: int, records: int, seconds: float) -> None:
        """One round: what it carried, and the seconds it was busy (no waiting)."""
        self._core.observe(bytes, records, seconds)

    def predict(self, *, bytes: int, records: int) -> float:
        """Seconds until that much is sent and applied."""
        seconds: float = self._core.predict(bytes, records)
        return seconds

    @property
    def bytes_per_second(self) -> float:
        """The bandwidth as estimated so far."""
        rate: float = self._core.bytes_per_second
        return rate


def _ranges(ranges: Ranges) -> Ranges:
    array = np.ascontiguousarray(ranges)
    if array.dtype != np.uint64:
        if array.size and (array.dtype.kind not in "iu" or array.min() < 0):
            raise InvalidArgumentError(
                f"ranges hold {array.dtype} from {array.min()}, expected uint64"
            )
        array = array.astype(np.uint64)
    if array.ndim != 2 or array.shape[1] != 2:
        if array.size:
            raise InvalidArgumentError(f"ranges have shape {array.shape}, expected (n, 2)")
        array = array.reshape(0, 2)
    return array


def _message_bytes(channel: Channel, rate_limit: float | None) -> int:
    """The largest message where none was named; under a rate limit it is the size of a burst."""
    if rate_limit is not None:
        return MAX_MESSAGE_BYTES
    return max(MAX_MESSAGE_BYTES, channel.max_bulk_bytes)
