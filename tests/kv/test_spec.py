"""The specification of KV state."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.spec import KVSpec


def test_sizes() -> None:
    spec = KVSpec(num_kv_heads=8, head_dim=128)
    assert (spec.dtype, spec.block_size, spec.order) == ("bfloat16", 16, "hnd")
    assert spec.slot_bytes == 8 * 128 * 2 * 2
    assert spec.block_bytes == 16 * spec.slot_bytes


def test_is_a_value() -> None:
    spec = KVSpec(2, 64, "float16", 8, "nhd")
    assert KVSpec.from_core(spec.core) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)
    assert hash(spec) == hash(KVSpec(2, 64, "float16", 8, "nhd"))
    assert dataclasses.replace(spec, order="hnd") != spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.head_dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"num_kv_heads": 2.0}, "num_kv_heads is 2.0"),
        ({"num_kv_heads": True}, "num_kv_heads is True"),
        ({"head_dim": 5000}, "head_dim is 5000"),
        ({"head_dim": 1 << 40}, "head_dim"),
        ({"block_size": -16}, "block_size is -16"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": 16}, "dtype is 16"),
        ({"order": "dhn"}, "order is 'dhn'"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        KVSpec(**{"num_kv_heads": 2, "head_dim": 8, **arguments})  # type: ignore[arg-type]
