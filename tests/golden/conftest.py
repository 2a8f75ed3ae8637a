"""`pytest tests/golden --golden-dir DIR` runs another set of the same form."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe import Array, build
from torch import Tensor

DEFAULT_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True)
class GoldenSet:
    """Expected numbers of the official code and the inputs that they were made from."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, dict[str, Array]]

    def expected(self, precision: str, file: str) -> dict[str, Array]:
        with np.load(self.folder / precision / f"{file}.npz", allow_pickle=False) as archive:
            return dict(archive)

    def tensors(self, group: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: torch.from_numpy(np.array(v)).to(dtype) for k, v in self.inputs[group].items()}


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    folder = Path(request.config.getoption("golden_dir", default=None) or DEFAULT_DIR)
    config = json.loads((folder / "config.json").read_text())
    return GoldenSet(folder, config, build(config))


@pytest.fixture(params=["fp64", "fp32"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """The float32 goldens were made on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
