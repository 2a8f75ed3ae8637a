"""Views are a pure function of (seed, key, view): pinned, so that no change goes unseen."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from promptkd import _rust
from torchvision.transforms import RandomResizedCrop

# seed, path, view, width, height -> left, top, right, bottom, flip
VECTORS = [
    (0, "cats/1.jpg", 2, 500, 375, 45, 12, 498, 359, True),
    (0, "cats/1.jpg", 3, 500, 375, 186, 78, 412, 358, False),
    (0, "cats/1.jpg", 4, 500, 375, 58, 9, 328, 263, True),
    (0, "cats/1.jpg", 0, 500, 375, 77, 115, 285, 290, True),
    (0, "cats/1.jpg", 1, 500, 375, 25, 21, 479, 366, True),
    (1, "cats/1.jpg", 0, 500, 375, 124, 3, 458, 342, True),
    (0, "dogs/été.png", 0, 500, 375, 119, 61, 475, 374, True),
    (2**64 - 1, "x", 2**32 - 1, 4000, 3000, 991, 48, 3476, 2623, True),
    (0, "x", 0, 1, 1, 0, 0, 1, 1, True),
    (7, "a/b/c.webp", 3, 30, 2000, 0, 980, 30, 1020, True),
    (7, "a/b/c.webp", 3, 2000, 30, 980, 0, 1020, 30, True),
]  # fmt: skip


def view(seed, path, number, width, height, **options):
    keys = np.array([_rust.image_key(path)], np.uint64)
    numbers, sizes = np.array([number], np.uint32), np.array([[width, height]])
    boxes, flips = _rust.random_views(seed, keys, numbers, sizes, **options)
    return (*boxes[0].tolist(), bool(flips[0]))


@pytest.mark.parametrize("vector", VECTORS)
def test_vectors(vector):
    *arguments, left, top, right, bottom, flip = vector
    assert view(*arguments) == (left, top, right, bottom, flip)


def test_keys():
    # The first eight bytes, little endian, of BLAKE3("") and of BLAKE3("cats/1.jpg").
    assert _rust.image_key("") == int.from_bytes(bytes.fromhex("af1349b9f5f9a1a6"), "little")


def splitmix(state):
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def plain_view(seed, key, number, width, height, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """The definition in rust/src/view.rs, written again with Python's own mathematics."""
    golden = 0x9E3779B97F4A7C15
    state = splitmix(splitmix(splitmix(seed + golden) ^ key) ^ number)

    def bits(n):
        return splitmix(state + (n + 1) * golden)

    def uniform(n, low, high):
        return low + (high - low) * ((bits(n) >> 11) / 2**53)

    mirrored = uniform(0, 0, 1) < flip
    for n in range(1, 41, 4):
        area = width * height * uniform(n, *scale)
        aspect = math.exp(uniform(n + 1, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (
                (bits(n + 2) * (height - h + 1)) >> 64,
                (bits(n + 3) * (width - w + 1)) >> 64,
            )
            return left, top, left + w, top + h, mirrored
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h, mirrored


def test_the_definition_in_python():
    rng = np.random.default_rng(0)
    for _ in range(500):
        seed, key = (int(v) for v in rng.integers(0, 2**64, 2, dtype=np.uint64))
        number, width, height = int(rng.integers(0, 2**32)), *rng.integers(1, 3000, 2).tolist()
        boxes, flips = _rust.random_views(
            seed,
            np.array([key], np.uint64),
            np.array([number], np.uint32),
            np.array([[width, height]]),
        )
        expected = plain_view(seed, key, number, width, height)
        assert (*boxes[0].tolist(), bool(flips[0])) == expected


@pytest.mark.parametrize(("width", "height"), [(500, 375), (100, 400), (64, 64)])
def test_boxes_are_spread_as_torchvision_spreads_them(width, height):
    torch.manual_seed(0)
    image, count = torch.zeros(1, height, width), 4000
    theirs = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)]
    top, left, h, w = np.array(theirs, float).T
    keys, views = np.arange(count, dtype=np.uint64), np.zeros(count, np.uint32)
    boxes, flips = _rust.random_views(0, keys, views, np.tile([[width, height]], (count, 1)))
    ours = [boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]]
    for a, b, side in zip(ours, (left, top, w, h), (width, height, width, height), strict=True):
        assert abs(a.mean() - b.mean()) < 0.02 * side
        assert abs(a.std() - b.std()) < 0.02 * side
    assert abs(flips.mean() - 0.5) < 0.03


def test_the_same_in_another_process():
    # The extension alone: the package's other imports take seconds.
    code = (
        "import sys, numpy as np; from importlib.util import *;"
        "spec = spec_from_file_location('_rust', sys.argv[1]); r = module_from_spec(spec);"
        "spec.loader.exec_module(r); b, f = r.random_views(3, np.arange(50, dtype=np.uint64), "
        "np.full(50, 2, np.uint32), np.tile([[640, 480]], (50, 1))); print(b.tolist(), f.tolist())"
    )
    arguments = [sys.executable, "-c", code, _rust.__file__]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    keys, views = np.arange(50, dtype=np.uint64), np.full(50, 2, np.uint32)
    boxes, flips = _rust.random_views(3, keys, views, np.tile([[640, 480]], (50, 1)))
    assert run.stdout.strip() == f"{boxes.tolist()} {flips.tolist()}"


def test_options():
    assert view(0, "a", 0, 90, 60, scale=(1, 1), ratio=(1.5, 1.5), flip=0) == (0, 0, 90, 60, False)
    assert view(0, "a", 0, 90, 60, scale=(1, 1), ratio=(1.5, 1.5), flip=1) == (0, 0, 90, 60, True)


@pytest.mark.parametrize("options", [
    {"scale": (0.0, 1.0)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.2)},
    {"ratio": (-1.0, 1.0)}, {"ratio": (1.0, float("nan"))}, {"flip": 1.5},
])  # fmt: skip
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        view(0, "a", 0, 90, 60, **options)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2**33, 5)])
def test_impossible_sizes_are_named(size):
    with pytest.raises(ValueError, match=r"sizes\[0\]"):
        view(0, "a", 0, *size)
