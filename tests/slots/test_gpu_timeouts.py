"""What a deadline leaves under way on a GPU is still under way: its memory stays until it is done.

All on the stand-in, which can hold a stream back and looks at run time whether memory is there.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gpu_memory import FakeGpu
from test_gpu_transports import ALL, BLOCKS, LAYERS, SPEC, connected, views

from pipelive_kv import _core
from pipelive_kv.errors import DeadlineError, PipeliveError
from pipelive_kv.kv import KVPool
from pipelive_kv.migration import PatchSender


def pool_of(fake: FakeGpu) -> KVPool:
    return fake.pool(SPEC, num_layers=6, layers=LAYERS, max_blocks=BLOCKS, capacity=BLOCKS)


def copier_of(pool: KVPool) -> Any:
    return _core.SlotCopier(SPEC.core, views(pool))


def test_layers_are_not_dropped_under_work_that_a_deadline_left_behind(fake_gpu: FakeGpu) -> None:
    with pool_of(fake_gpu) as pool:
        data = np.zeros(2 * BLOCKS * 16 * SPEC.slot_bytes, np.uint8)
        copier = copier_of(pool)
        held = fake_gpu.cuda.hold_newest_stream()
        with pytest.raises(DeadlineError):
            copier.scatter(ALL, data, timeout=0.05)
        del copier
        gc.collect()
        with ThreadPoolExecutor(1) as threads:
            dropping = threads.submit(pool.drop_layers, [1])
            # It has looked again and again whether the work is done, or it did not wait for it.
            looks = fake_gpu.cuda.count("cuEventQuery") + 100
            while not dropping.done() and fake_gpu.cuda.count("cuEventQuery") < looks:
                pass
            fake_gpu.cuda.let_go(held)
            dropping.result()
        assert fake_gpu.cuda.mistakes == ""


def test_a_copier_that_is_not_done_is_not_lent_again(fake_gpu: FakeGpu) -> None:
    with pool_of(fake_gpu) as pool:
        data = np.zeros(2 * BLOCKS * 16 * SPEC.slot_bytes, np.uint8)
        copier = copier_of(pool)
        held = fake_gpu.cuda.hold_newest_stream()
        with pytest.raises(DeadlineError):
            copier.scatter(ALL, data, timeout=0.05)
        del copier
        gc.collect()
        other = copier_of(pool)
        other.gather(ALL, data, timeout=5.0)
        del other
        fake_gpu.cuda.let_go(held)


def test_staging_is_not_unmapped_under_work_that_a_deadline_left_behind(fake_gpu: FakeGpu) -> None:
    device = fake_gpu.device
    with pool_of(fake_gpu) as source:
        with connected("p2p", device, device) as (near, far):
            sender = PatchSender(near, SPEC, views(source), epoch=1)
            held = fake_gpu.cuda.hold_newest_stream()
            with pytest.raises(PipeliveError):
                sender.send_round(0, 0, ALL, timeout=0.05)
        del sender, near, far
        gc.collect()
        unmapped = fake_gpu.cuda.count("cuMemUnmap")
        fake_gpu.cuda.let_go(held)
        assert fake_gpu.cuda.mistakes == ""
        _core.Staging(device, 2 << 20, 1)  # whoever makes staging frees what is due
        assert fake_gpu.cuda.count("cuMemUnmap") > unmapped + 1
