"""Sessions through the Python interface, and what is refused."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from migration_cases import (
    LAYERS,
    SECONDS,
    Running,
    channels,
    kind_of,
    make_pool,
    ranges,
    slots_of,
    views,
)

from pipelive_kv.errors import (
    CancelledError,
    ClosedError,
    CorruptError,
    DeadlineError,
    InvalidArgumentError,
    NotResidentError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.kv import KVPool
from pipelive_kv.migration import PatchReceiver, PatchSender, StopPredictor
from pipelive_kv.spec import KVSpec

EPOCH = 9
ALL = ranges((0, 64))


def fill(pool, seed=0):
    random = np.random.default_rng(seed)
    for layer in LAYERS:
        bits = pool.layer(layer).as_uint16()[: pool.capacity]
        bits[...] = random.integers(0, 1 << 16, bits.shape, dtype=np.uint16)


def same(a, b):
    return all((slots_of(a, layer) == slots_of(b, layer)).all() for layer in LAYERS)


@pytest.fixture(params=["shm", "tcp"])
def ends(request):
    return channels(request.param)


@pytest.fixture
def pools():
    source, target = make_pool(), make_pool(KVSpec(2, 8, block_size=4, order="nhd"))
    fill(source)
    with source, target:
        yield source, target


def sender_of(channel, pool, **options):
    return PatchSender(channel, pool.spec, views(pool), epoch=EPOCH, **options)


def receiver_of(channel, pool, **options):
    return PatchReceiver(channel, pool.spec, views(pool), epoch=EPOCH, **options)


def send_and_wait(sender):
    sender.send_round(0, 1, ALL, timeout=SECONDS)
    sender.wait_applied(1, SECONDS)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_whole_session(ends, pools, checksum):
    source, target = pools
    weights, place = bytes(range(256)) * 100, bytearray(25600)
    receiver = receiver_of(ends[1], target, regions={1: place})
    with Running(receiver) as running:
        sender = sender_of(ends[0], source, checksum=checksum)
        assert (sender.layers, sender.epoch, sender.slot_bytes) == (LAYERS, EPOCH, 64)
        assert receiver.applied_through == sender.applied_through == -1
        sender.send_region(1, weights, SECONDS)
        receiver.wait_region(1, SECONDS)
        assert place == weights
        stats = sender.send_round(0, 4, ALL, timeout=SECONDS)
        assert (stats.slots, stats.records, stats.messages) == (128, 2, 1)
        assert stats.bytes > 128 * 64
        sender.wait_applied(4, SECONDS)
        assert sender.verify(ALL, SECONDS)
        sender.send_round(1, 6, ranges(), timeout=SECONDS)
        receiver.wait_applied(6, SECONDS)
        sender.finish(SECONDS)
        assert running.join() is None
    assert same(source, target)
    assert receiver.stats().rounds == 2
    assert receiver.stats().bytes == 128 * 64 + len(weights)


def test_one_layer_at_a_time(ends, pools):
    source, target = pools
    receiver = receiver_of(ends[1], target)
    with Running(receiver):
        sender = sender_of(ends[0], source)
        sender.send_round(0, 4, ALL, layers=[4], timeout=SECONDS)
        receiver.wait_applied(4, SECONDS, layer=4)
        with pytest.raises(DeadlineError, match="until the deadline"):
            receiver.wait_applied(4, 0.02)
        sender.send_round(1, 4, ALL, layers=[1], timeout=SECONDS)
        receiver.wait_applied(4, SECONDS)
        with pytest.raises(InvalidArgumentError, match="layer 3"):
            sender.send_round(2, 4, ALL, layers=[3], timeout=SECONDS)
        with pytest.raises(InvalidArgumentError, match="layers is empty"):
            sender.send_round(2, 4, ALL, layers=[], timeout=SECONDS)
        with pytest.raises(InvalidArgumentError, match="not one of the moving"):
            receiver.wait_applied(4, SECONDS, layer=3)


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[0, 65]], dtype=np.uint64),
        np.array([[2**64 - 1, 2]], dtype=np.uint64),
        np.array([[-1, 2]]),
        np.array([[0.0, 2.0]]),
        np.array([1, 2, 3], dtype=np.uint64),
        np.array([[1, 2, 3]], dtype=np.uint64),
    ],
)
def test_bad_ranges_leave_the_session_alive(ends, pools, bad):
    source, target = pools
    with Running(receiver_of(ends[1], target)) as running:
        sender = sender_of(ends[0], source)
        with pytest.raises(InvalidArgumentError):
            sender.send_round(0, 1, bad, timeout=SECONDS)
        sender.send_round(0, 1, ALL.astype(np.int64), timeout=SECONDS)
        sender.finish(SECONDS)
        assert running.join() is None
    assert same(source, target)


def test_slots_that_are_not_mapped_are_skipped(ends, pools):
    source, target = pools
    with Running(receiver_of(ends[1], target)):
        sender = sender_of(ends[0], source)
        source.shrink(4, live=[0, 1])
        stats = sender.send_round(0, 1, ALL, timeout=SECONDS)
        assert (stats.slots, stats.skipped_slots) == (2 * 16, 2 * 48)
        sender.wait_applied(1, SECONDS)
        source.drop_layers([4])
        with pytest.raises(NotResidentError, match="not held"):
            sender.send_round(1, 1, ALL, timeout=SECONDS)


def test_a_target_that_never_grows_is_named():
    source, target = make_pool(), make_pool(capacity=4)
    near, far = channels()
    with Running(receiver_of(far, target), timeout=0.2) as running:
        sender = sender_of(near, source)
        with pytest.raises(NotResidentError, match=r"target gave up.*reaches to slot 63"):
            send_and_wait(sender)
        assert isinstance(running.join(), NotResidentError)


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 8), ("num_kv_heads", 4), ("head_dim", 16), ("dtype", "float16")],
)
def test_mismatch_is_refused_by_name(ends, pools, field, value):
    source, _ = pools
    fields = {"num_kv_heads": 2, "head_dim": 8, "dtype": "bfloat16", "block_size": 4}
    other = KVSpec(**{**fields, field: value})
    target = make_pool(other)
    with Running(receiver_of(ends[1], target)) as running:
        sender = sender_of(ends[0], source)
        with pytest.raises(ProtocolError, match=field):
            send_and_wait(sender)
        error = running.join()
    assert isinstance(error, ProtocolError)
    assert field in str(error)
    assert not slots_of(target, 1).any()


def test_checksum_may_be_demanded(ends, pools):
    source, target = pools
    with Running(receiver_of(ends[1], target, checksum=True)):
        sender = sender_of(ends[0], source, checksum=False)
        with pytest.raises(ProtocolError, match="checksum"):
            send_and_wait(sender)


def test_views_of_other_layers_are_refused(ends, pools):
    source, _ = pools
    with pytest.raises(InvalidArgumentError, match="the view of layer 4"):
        PatchSender(ends[0], source.spec, {1: source.layer(4)}, epoch=1)


def test_adopted_tensors_can_be_moved(ends):
    arrays = {layer: np.zeros((16, 2, 2, 4, 8), np.float32) for layer in LAYERS}
    spec = KVSpec(2, 8, dtype="float32", block_size=4)
    target = KVPool.adopt(spec, arrays)
    source = make_pool(spec)
    for layer in LAYERS:
        source.layer(layer).numpy()[...] = layer
    with Running(receiver_of(ends[1], target)):
        sender = sender_of(ends[0], source)
        sender.send_round(0, 1, ALL, timeout=SECONDS)
        sender.finish(SECONDS)
    assert all((arrays[layer] == layer).all() for layer in LAYERS)


def messages_of_a_session(source):
    """What a sender puts on the wire for a bulk, a round and a finish; nobody answers."""
    near, far = channels()
    sender = sender_of(near, source, max_message_bytes=1000)
    sender.send_round(0, 3, ALL, timeout=SECONDS)
    sender.send_round(1, 4, ranges((3, 1), (9, 5)), timeout=SECONDS)
    with pytest.raises(DeadlineError):
        sender.finish(0.01)
    messages = []
    while not messages or kind_of(messages[-1]) != "finish":
        messages.append(far.receive(SECONDS))
    return messages


def play(messages, pool, timeout=SECONDS):
    """Put messages on a receiver's channel; how its run ended."""
    near, far = channels()
    receiver = receiver_of(far, pool)
    with Running(receiver, timeout=timeout) as running:
        try:
            for message in messages:
                near.send(message, SECONDS)
        except ClosedError:
            pass  # it has given up already
        # Replies need an open channel, so it is closed when all was dealt with.
        while running.alive and receiver.stats().messages < len(messages):
            time.sleep(1e-4)
        near.close()
        return running.join()


def test_a_recorded_session_can_be_played(pools):
    source, target = pools
    assert play(messages_of_a_session(source), target) is None
    assert same(source, target)


def test_a_session_of_an_earlier_epoch_cannot_be_replayed(pools):
    source, target = pools
    messages = messages_of_a_session(source)
    near, far = channels()
    receiver = PatchReceiver(far, target.spec, views(target), epoch=EPOCH + 1)
    with Running(receiver) as running:
        with contextlib.suppress(ClosedError):  # it may have given up at the first one
            for message in messages[:2]:
                near.send(message, SECONDS)
        error = running.join()
    assert isinstance(error, ProtocolError)
    assert f"epoch {EPOCH}, expected {EPOCH + 1}" in str(error)
    assert not slots_of(target, 1).any()


@given(data=st.data())
def test_changed_sessions_never_end_well_with_wrong_bytes(data):
    """One message of a session is lost, cut, doubled, moved or changed in one bit."""
    source, target = make_pool(), make_pool()
    with source, target:
        fill(source)
        messages = messages_of_a_session(source)
        place = data.draw(st.integers(0, len(messages) - 1), label="message")
        message = messages[place]
        match data.draw(st.sampled_from(["drop", "cut", "double", "move", "flip"])):
            case "drop":
                del messages[place]
            case "cut":
                messages[place] = message[: data.draw(st.integers(1, len(message) - 1))]
            case "double":
                messages.insert(data.draw(st.integers(place, len(messages) - 1)), message)
            case "move":
                del messages[place]
                messages.insert(data.draw(st.integers(0, len(messages))), message)
            case "flip":
                bit = data.draw(st.integers(0, 8 * len(message) - 1))
                changed = bytearray(message)
                changed[bit // 8] ^= 1 << bit % 8
                messages[place] = bytes(changed)
        error = play(messages, target)
        if error is None:
            assert same(source, target)
        else:
            assert isinstance(error, ProtocolError | CorruptError | ClosedError)


def test_a_flipped_bit_is_a_corrupt_error(pools):
    source, target = pools
    messages = messages_of_a_session(source)
    changed = bytearray(messages[1])
    changed[-1] ^= 1
    messages[1] = bytes(changed)
    error = play(messages, target)
    assert isinstance(error, CorruptError)
    assert "CRC32C" in str(error)
    assert not slots_of(target, 1).any()


@given(garbage=st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=5))
def test_garbage_is_refused(garbage):
    with make_pool() as target:
        error = play(garbage, target)
        assert isinstance(error, ProtocolError | CorruptError)
        assert not slots_of(target, 1).any()


def test_cancel_wakes_everybody(ends, pools):
    source, target = pools
    receiver, sender = receiver_of(ends[1], target), sender_of(ends[0], source)
    outcomes = []

    def wait(waiting):
        try:
            waiting(100, SECONDS)
        except PipeliveError as error:
            outcomes.append(type(error))

    with Running(receiver) as running:
        threads = [
            threading.Thread(target=wait, args=[end.wait_applied]) for end in (receiver, sender)
        ]
        for thread in threads:
            thread.start()
        receiver.cancel()
        for thread in threads:
            thread.join(SECONDS)
        assert isinstance(running.join(), CancelledError)
    assert sorted(t.__name__ for t in outcomes) == ["CancelledError", "ClosedError"]
    with pytest.raises(CancelledError):
        receiver.run(SECONDS)


def test_run_is_over_when_the_source_has_finished(ends, pools):
    source, target = pools
    receiver = receiver_of(ends[1], target)
    with Running(receiver) as running:
        sender_of(ends[0], source).finish(SECONDS)
        assert running.join() is None
    with pytest.raises(InvalidArgumentError, match="after the source had finished"):
        receiver.run(SECONDS)
    with pytest.raises(ClosedError, match="finished before step 7"):
        receiver.wait_applied(7, SECONDS)


def test_rounds_to_run_are_checked(ends, pools):
    receiver = receiver_of(ends[1], pools[1])
    with pytest.raises(InvalidArgumentError, match="rounds is 0, expected None or 1 or more"):
        receiver.run(SECONDS, rounds=0)
    sender = sender_of(ends[0], pools[0])
    with ThreadPoolExecutor(1) as other:
        bulk = other.submit(receiver.run, SECONDS, rounds=1)
        sender.send_round(0, 5, np.array([[0, 4]], dtype=np.uint64), timeout=SECONDS)
        assert bulk.result(SECONDS) is False
        rest = other.submit(receiver.run, SECONDS)
        sender.finish(SECONDS)
        assert rest.result(SECONDS) is True
    assert receiver.applied_through == 5


def test_stop_predictor():
    predictor = StopPredictor(fixed_seconds=0.001, record_seconds=0, initial_bytes_per_second=1e9)
    assert predictor.predict(bytes=0, records=0) == pytest.approx(0.001)
    assert predictor.predict(bytes=10**6, records=9) == pytest.approx(0.002)
    for _ in range(20):
        predictor.observe(bytes=4 * 10**6, records=10, seconds=0.002)
    assert predictor.bytes_per_second == pytest.approx(2e9)
    with pytest.raises(InvalidArgumentError, match="busy_seconds"):
        predictor.observe(bytes=1, records=1, seconds=float("nan"))
    with pytest.raises(InvalidArgumentError, match="decay"):
        StopPredictor(decay=1.0)
