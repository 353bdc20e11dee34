"""What engines need that know their writes late, keep weights of their own, or go idle."""

from __future__ import annotations

import threading

import pytest

import pipelive_kv as pk

SPEC = pk.KVSpec(num_kv_heads=2, head_dim=8, dtype="float32", block_size=4)
PAGE = 4096
LAYERS, BLOCKS = 6, 64
WEIGHTS = 16 * PAGE
OLD, NEW = pk.Placement.from_counts([4, 2]), pk.Placement.from_counts([2, 4])


class OwnWeights:
    """Weights outside of the page pool."""

    in_pool = False

    def __init__(self, layers):
        self.held = set(layers)
        self.calls = []

    @property
    def layers(self):
        return tuple(sorted(self.held))

    def layer_bytes(self, layer):
        return WEIGHTS

    def add(self, layer):
        self.held.add(layer)

    def load(self, layer):
        self.calls.append(layer)

    def region(self, layer):
        raise AssertionError("nobody asked for it")

    def drop(self, layer):
        self.held.discard(layer)


def kv_bytes(layers, blocks):
    return layers * -(-blocks * SPEC.block_bytes // PAGE) * PAGE


class Pipeline:
    """Two stages with an engine that runs a step only when it is woken."""

    def __init__(self, folder, spare=2 * WEIGHTS):
        endpoint = pk.ControlEndpoint("tcp://127.0.0.1:*", pk.ControlKey.generate())
        self.coordinator = pk.Coordinator(endpoint, pp_size=2, record_dir=folder)
        control = self.coordinator.endpoint
        self.allocator = pk.BlockAllocator(max_blocks=BLOCKS, capacity=BLOCKS)
        self.scheduler = pk.Scheduler(OLD, allocator=self.allocator, control=control)
        self.weights, self.pools, self.stages = [], [], []
        for rank in range(2):
            layers = OLD.layers_of(rank)
            budget = len(layers) * WEIGHTS + kv_bytes(len(layers), BLOCKS) + spare
            pages = pk.PagePool(budget, page_bytes=PAGE)
            pool = pk.KVPool(
                SPEC, num_layers=LAYERS, layers=layers, max_blocks=BLOCKS, capacity=BLOCKS,
                page_pool=pages,
            )  # fmt: skip
            self.weights.append(OwnWeights(layers))
            self.pools.append(pool)
            self.stages.append(
                pk.Stage(
                    pp_rank=rank,
                    pp_size=2,
                    pool=pool,
                    placement=OLD,
                    weights=self.weights[-1],
                    control=control,
                )
            )
        self.coordinator.await_ready(timeout=20)
        self.woken, self.steps, self.ending = threading.Event(), 0, False
        self.scheduler.on_wants_step(self.woken.set)
        self.engine = threading.Thread(target=self._run)
        self.engine.start()

    def _run(self):
        while True:
            self.woken.wait()
            self.woken.clear()
            if self.ending:
                return
            while self.scheduler.wants_step:
                self.step()

    def step(self, blocks=()):
        stamp = self.scheduler.stamp()
        for stage in self.stages:
            step = stage.begin(stamp)
            step.record_blocks(list(blocks))
            stage.end(step)
        self.scheduler.retired(stamp.seq)
        self.steps += 1

    def close(self):
        self.ending = True
        self.woken.set()
        self.engine.join(timeout=20)
        self.scheduler.close()
        for stage, pool in zip(self.stages, self.pools, strict=True):
            stage.close()
            pool.close()
        self.coordinator.close()


@pytest.fixture
def make(tmp_path):
    made = []

    def start(**options):
        made.append(Pipeline(tmp_path / str(len(made)), **options))
        return made[-1]

    yield start
    for pipeline in made:
        pipeline.close()


def test_an_idle_engine_is_woken_for_the_steps_that_a_move_needs(make):
    pipeline = make()
    report = pipeline.coordinator.reconfigure(NEW, timeout=20).wait(timeout=30)
    assert pipeline.steps > 0
    assert pipeline.scheduler.placement == NEW
    assert report.step >= 0


def test_blocks_recorded_inside_of_a_step_are_in_its_log(make):
    pipeline = make()
    pipeline.step(blocks=[3, 5])
    found = pipeline.stages[0].tracker.collect()
    assert found.through_seq == 0
    assert found.ranges.tolist() == [[12, 4], [20, 4]]


def test_a_block_beyond_the_last_is_refused(make):
    pipeline = make()
    stage = pipeline.stages[0]
    step = stage.begin(pipeline.scheduler.stamp())
    with pytest.raises(pk.InvalidArgumentError):
        step.record_blocks([BLOCKS])
    stage.end(step)


def test_weights_outside_of_the_pool_count_in_the_budget(make):
    """Stage 1 goes from two layers to four: two layers of weights leave less for KV."""
    pipeline = make()
    budget = 4 * WEIGHTS + kv_bytes(2, BLOCKS)
    report = pipeline.coordinator.reconfigure(NEW, timeout=20).wait(timeout=30)
    fits = max(n for n in range(1, BLOCKS + 1) if kv_bytes(4, n) + 4 * WEIGHTS <= budget)
    assert (report.capacity_before, report.capacity_during) == (BLOCKS, fits)
    assert pipeline.weights[1].layers == NEW.layers_of(1)
    assert pipeline.weights[0].layers == NEW.layers_of(0)
    back = pipeline.coordinator.reconfigure(OLD, timeout=20).wait(timeout=30)
    assert back.capacity_after == BLOCKS


def test_a_move_whose_weights_do_not_fit_is_refused(make):
    pipeline = make(spare=0)
    with pytest.raises(pk.OverBudgetError, match="stage 1 lacks"):
        pipeline.coordinator.reconfigure(pk.Placement.from_counts([0, 6]), timeout=20).wait(
            timeout=30
        )
    assert pipeline.scheduler.placement == OLD
    assert pipeline.weights[1].layers == OLD.layers_of(1)
