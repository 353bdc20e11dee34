import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.demo import measure
from tests.demo import synthetic


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_covers_the_share(values, share):
    found = measure.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    below = sum(value < found for value in values)
    assert below < math.ceil(share * len(values))


def test_percentile_of_nothing():
    assert measure.percentile([], 0.5) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [([], [], -1), ([1, 2], [1, 2], -1), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([2], [1], 0)],
)
def test_first_difference(one, other, index):
    assert measure.first_difference(one, other) == index
    assert (measure.token_hash(one) == measure.token_hash(other)) == (index < 0)


def test_every_request_has_one_gap_at_every_switchover():
    recorder = synthetic.moved().recorder
    gaps = measure.gaps_of(recorder)
    for switch in recorder.switchovers:
        around = [gap for gap in gaps if gap.name == switch.name]
        assert sorted(gap.request for gap in around) == list(range(synthetic.REQUESTS))
        for gap in around:
            tokens = recorder.tokens_of(gap.request)
            [last] = [t for t in tokens if t.at == gap.end]
            before = tokens[tokens.index(last) - 1]
            assert before.seq < switch.report.step <= last.seq


def test_gap_table_counts_every_gap_once():
    recorder = synthetic.moved().recorder
    gaps = measure.gaps_of(recorder)
    table = measure.gap_table(gaps)
    total = sum(getattr(table, kind).count for kind in measure.KINDS)
    assert total == len(recorder.tokens) - synthetic.REQUESTS
    assert table.switchover.count == 2 * synthetic.REQUESTS
    assert table.noop.count == 3 * synthetic.REQUESTS
    assert table.moving.count > 0


def test_stop_and_copy_shows_its_stop_in_the_gaps():
    held = synthetic.baselines().recorder
    gaps = measure.gaps_of(held)
    found = measure.move_report(held.switchovers[0], held, gaps, measure.Gaps(6, 100, 100, 100), 0)
    assert found.gap.count == synthetic.REQUESTS
    assert found.gap.p50_ms > 400
    assert found.gap_excess_p50_ms == pytest.approx(found.gap.p50_ms - 100)


def test_a_gap_next_to_a_prompt_is_not_taken_for_a_slow_switchover():
    recorder = synthetic.moved().recorder
    switch = recorder.switchovers[1]
    first = next(i for i, step in enumerate(recorder.steps) if step.seq == switch.report.step)
    slow = recorder.steps[first]
    object.__setattr__(slow, "kind", "prefill")
    gaps = [gap for gap in measure.gaps_of(recorder) if gap.name == switch.name]
    assert all(gap.with_prefill for gap in gaps)
    assert measure.gap_table(gaps).switchover.count == 0
