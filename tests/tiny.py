"""Tiny models and pictures that tests train on in seconds."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

CLASSES = ("red_thing", "green thing", "blue thing")
COLOURS = ((200, 40, 40), (40, 180, 60), (50, 60, 210))


@dataclass(frozen=True)
class Models:
    """Names of models that `load_clip` takes."""

    teacher: str
    student: str


def model_cfg(image_size: int, width: int, embed: int, layers: int = 3) -> dict[str, Any]:
    return {
        "embed_dim": embed,
        "vision_cfg": {
            "image_size": image_size,
            "layers": layers,
            "width": width,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 3,
        },
        "quick_gelu": False,
    }


def save_model(folder: Path, cfg: dict[str, Any], seed: int, **preprocess: Any) -> Path:
    """A model with random weights as a folder in open_clip's layout."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**copy.deepcopy(cfg))
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
    config = {"model_cfg": cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def make_models(folder: Path) -> Models:
    teacher = save_model(
        folder / "teacher", model_cfg(64, 48, 40), 1, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]
    )
    student = save_model(
        folder / "student",
        model_cfg(48, 32, 24),
        2,
        mean=[0.1, 0.2, 0.3],
        std=[0.5, 0.5, 0.5],
        interpolation="bilinear",
        resize_mode="squash",
    )
    return Models(f"local-dir:{teacher}", f"local-dir:{student}")


def make_photos(folder: Path, per_class: int = 12) -> Path:
    """Noisy pictures of one colour a class, of various sizes, JPEG and PNG."""
    rng = np.random.default_rng(0)
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            size = (int(rng.integers(40, 120)), int(rng.integers(40, 120)), 3)
            pixels = np.clip(rng.normal(colour, 30, size), 0, 255).astype(np.uint8)
            suffix = "jpg" if number % 2 else "png"
            Image.fromarray(pixels).save(folder / name / f"{number:02}.{suffix}")
    return folder
