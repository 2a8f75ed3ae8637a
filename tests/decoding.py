"""Pictures and references for the tests of the decoder."""

import io

import numpy as np
from PIL import Image, ImageFile

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Pillow's own encoder fails on small files with many restart markers otherwise.
ImageFile.MAXBLOCK = 1 << 22


def photo(width, height, seed=0):
    """Smooth waves with noise: something for every frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + y / 13), np.cos(x / 11 - y / 5), np.sin((x + y) / 17)]
    pixels = 128 + 100 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, kind, **options):
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def open_rgb(data):
    """What Pillow makes of the bytes of a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def pillow_view(image, box, size, interpolation="bicubic", flip=False):
    """Crop, resize to (width, height), mirror: the reference."""
    view = image.crop(tuple(box)).resize(size, FILTERS[interpolation])
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def random_box(rng, width, height):
    left, top = rng.integers(0, width), rng.integers(0, height)
    return [left, top, rng.integers(left + 1, width + 1), rng.integers(top + 1, height + 1)]
