"""A teacher for all sweeps of this folder, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweep.small import train_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """Weights of a teacher that knows the digits."""
    return train_teacher(tmp_path_factory.mktemp("teacher") / "run")
