"""Models that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelive_kv.models.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Give the folder of a tiny model; each family is made once."""
    root = tmp_path_factory.mktemp("tiny")

    def get(family: str, **settings: object) -> Path:
        if settings:
            return tiny_model(family, tmp_path_factory.mktemp("own"), **settings)
        made = root / family
        return made if made.exists() else tiny_model(family, root)

    return get
