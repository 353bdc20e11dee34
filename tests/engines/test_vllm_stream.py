"""Where a vLLM worker's layers are built on a GPU, with torch's part of it replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipelive_kv.engines.vllm.layers import _stream_of_its_own


def test_layers_are_built_in_a_stream_that_alone_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            done.append(("made on", device))

        def synchronize(self) -> None:
            done.append("waited for")

    @contextlib.contextmanager
    def entered(what: Any) -> Iterator[None]:
        done.append("in" if isinstance(what, Stream) else ("device", what))
        yield
        done.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "device", entered)
    device = torch.device("cuda", 1)
    with _stream_of_its_own(device):
        done.append("built")
    assert done == [
        ("made on", device),
        ("device", device),
        "in",
        "built",
        "waited for",
        "out",
        "out",
    ]
    done.clear()
    with _stream_of_its_own(torch.device("cpu")):
        pass
    assert done == []
