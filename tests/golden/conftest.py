"""`pytest tests/golden --golden-dir DIR` runs another set of the same form."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_set import DEFAULT_DIR, GoldenSet


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    return GoldenSet.open(Path(request.config.getoption("golden_dir") or DEFAULT_DIR))


@pytest.fixture(params=["fp64", "fp32"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The float32 goldens were made on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
