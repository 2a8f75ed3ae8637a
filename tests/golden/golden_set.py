"""A set of golden numbers on disk, with the inputs that they were made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

    @classmethod
    def open(cls, folder: Path) -> "GoldenSet":
        config = json.loads((folder / "config.json").read_text())
        return cls(folder, config, build(config))

    def expected(self, precision: str, file: str) -> dict[str, Array]:
        with np.load(self.folder / precision / f"{file}.npz", allow_pickle=False) as archive:
            return dict(archive)

    def tensors(self, group: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: torch.from_numpy(np.array(v)).to(dtype) for k, v in self.inputs[group].items()}
