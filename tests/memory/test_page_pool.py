"""The page pool: budget, reuse, preparation, and what it refuses."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv import _core
from pipelive_kv.errors import (
    ClosedError,
    DeviceError,
    InvalidArgumentError,
    OverBudgetError,
)
from pipelive_kv.memory import Arena, PagePool, open_device, parse_bytes

PAGE = 4096


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("40GiB", 40 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 2 mib ", 2 << 20),
        ("3TiB", 3 << 40),
        ("1kB", 1000),
    ],
)
def test_parse_bytes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "value", ["", "GiB", "1 parsec", "-4", "1e9", 0, -1, 1.5, True, None, 1 << 63, "99999999TiB"]
)
def test_parse_bytes_refuses(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match="budget"):
        parse_bytes(value, "budget")  # type: ignore[arg-type]


@given(st.integers(1, 1 << 40), st.sampled_from(["KiB", "MiB"]))
def test_parse_bytes_is_exact_for_whole_numbers(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * (1024 if unit == "KiB" else 1 << 20)


def test_pages_are_reused_and_returned() -> None:
    device = open_device("cpu")
    assert isinstance(device, _core.HostDevice)
    pool = PagePool("64KiB", page_bytes=PAGE, device=device)
    assert (pool.budget, pool.page_bytes, pool.device) == (16 * PAGE, PAGE, device)
    arena = Arena(pool, 16 * PAGE)
    arena.map(0, 10 * PAGE)
    assert pool.used_bytes == pool.held_bytes == 10 * PAGE
    arena.unmap(4 * PAGE, 6 * PAGE)
    assert (pool.used_bytes, pool.held_bytes) == (4 * PAGE, 10 * PAGE)
    assert device.resident_file_bytes() == 10 * PAGE
    assert pool.trim(2 * PAGE) == 4 * PAGE
    assert pool.trim() == 2 * PAGE
    assert device.resident_file_bytes() == 4 * PAGE
    other = Arena(pool, 16 * PAGE)
    with pytest.raises(OverBudgetError, match="13 more pages"):
        other.map(0, 12 * PAGE + 1)
    assert pool.used_bytes == 4 * PAGE
    stats = pool.stats()
    assert stats.peak_held_bytes == 10 * PAGE
    assert stats.pages_created == 10
    arena.close()
    pool.close()
    assert device.resident_file_bytes() == 0


def test_prepared_pages_are_ready() -> None:
    pool = PagePool(8 * PAGE, page_bytes=PAGE, prepare_ahead=3)
    pool.prepare(5, timeout=30)
    stats = pool.stats()
    assert stats.prepared_bytes == 5 * PAGE
    assert stats.held_bytes <= stats.budget_bytes
    with pytest.raises(OverBudgetError, match="count is 9"):
        pool.prepare(9)
    pool.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 100, "page_bytes": PAGE}, "at least one page"),
        ({"budget": "1MiB", "page_bytes": 5000}, "page_bytes is 5000"),
        ({"budget": "1MiB", "page_bytes": 0}, "page_bytes is 0"),
        ({"budget": "1MiB", "page_bytes": "4096"}, "page_bytes"),
        ({"budget": "1MiB", "page_bytes": PAGE, "prepare_ahead": -1}, "prepare_ahead is -1"),
        ({"budget": "1MiB", "page_bytes": PAGE, "prepare_ahead": 257}, "257"),
        ({"budget": "1MiB", "device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((InvalidArgumentError, OverBudgetError), match=message):
        PagePool(**arguments)  # type: ignore[arg-type]


def test_a_closed_pool_refuses() -> None:
    with PagePool(4 * PAGE, page_bytes=PAGE) as pool:
        arena = Arena(pool, 4 * PAGE)
    assert pool.closed
    pool.close()
    with pytest.raises(ClosedError):
        arena.map(0, PAGE)
    with pytest.raises(ClosedError):
        pool.prepare(1)


def test_device_errors_reach_python() -> None:
    device = _core.FaultDevice(_core.HostDevice())
    pool = PagePool(4 * PAGE, page_bytes=PAGE, device=device)
    arena = Arena(pool, 4 * PAGE)
    device.fail("create_pages", 1)
    with pytest.raises(DeviceError, match="injected failure of create_pages"):
        arena.map(0, PAGE)
    assert pool.used_bytes == 0
    with pytest.raises(InvalidArgumentError, match="expected one of reserve"):
        device.fail("explode", 1)
    assert device.calls("create_pages") == 1


def test_an_impossible_amount_is_a_memory_error() -> None:
    pool = PagePool("32TiB")
    arena = Arena(pool, 32 << 40)
    with pytest.raises(MemoryError, match="available"):
        arena.map(0, 32 << 40)
    assert pool.used_bytes == 0


def test_threads_share_a_pool() -> None:
    pool = PagePool(24 * PAGE, page_bytes=PAGE, prepare_ahead=4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(60):
                with Arena(pool, 8 * PAGE, scrub=True) as arena:
                    arena.map(0, 6 * PAGE)
                    values = arena.tensor(0, [6 * PAGE], "uint8").numpy()
                    assert not values.any()
                    values[:] = number + 1
                    assert pool.held_bytes <= pool.budget
                    if turn % 10 == 0:
                        pool.trim()
                    assert (values == number + 1).all()
                    del values
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.stats().peak_held_bytes <= pool.budget
    assert pool.used_bytes == 0
