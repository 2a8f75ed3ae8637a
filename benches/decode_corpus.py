"""Photographs for the decoding benchmark, at three sizes, cut from a Debian or a PyPI package."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "decode-corpus"

SIZES = {"500x375": (500, 375), "1024x768": (1024, 768), "2048x1536": (2048, 1536)}
BYTES = {"500x375": 78_000, "1024x768": 192_000, "2048x1536": 595_000}
"""Mean size of a file in a photographic corpus of that resolution."""


def corpus(folder: Path | None, count: int) -> dict[str, list[bytes]]:
    """The files' bytes by size; those of `folder` are sorted by their number of pixels."""
    if folder is not None:
        return _sorted_by_size(folder, count)
    files = {}
    for name in SIZES:
        paths = [CACHE / f"{name}-{i:03d}.jpg" for i in range(count)]
        if not all(path.exists() for path in paths):
            _build(name, paths)
        files[name] = [path.read_bytes() for path in paths]
    return files


def _sorted_by_size(folder: Path, count: int) -> dict[str, list[bytes]]:
    files: dict[str, list[bytes]] = {name: [] for name in SIZES}
    for path in sorted(folder.rglob("*.jp*g")):
        with Image.open(path) as image:
            pixels = image.width * image.height
        ratios = {n: abs(np.log(pixels / (w * h))) for n, (w, h) in SIZES.items()}
        files[min(ratios, key=lambda n: ratios[n])].append(path.read_bytes())
    return {name: data[:count] for name, data in files.items() if data}


def _photographs() -> list[Image.Image]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = ["apt-get", "download", "-qq", "mate-backgrounds"]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0:
            (package,) = folder.glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder / "x"], check=True)
            found = [path.read_bytes() for path in sorted(folder.rglob("nature/*.jpg"))]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "scikit-learn"]
            subprocess.run([*command, "-d", folder], check=True)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                found = [archive.read(n) for n in sorted(archive.namelist()) if n.endswith(".jpg")]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in found]


def _build(name: str, paths: list[Path]) -> None:
    """Cut the same share of each photograph at random and compress it to about the usual size."""
    CACHE.mkdir(parents=True, exist_ok=True)
    photographs = _photographs()
    rng = np.random.default_rng(0)
    width, height = SIZES[name]
    for i, path in enumerate(paths):
        photograph = photographs[i % len(photographs)]
        share = min(photograph.width / width, photograph.height / height) * rng.uniform(0.6, 1)
        w, h = int(width * share), int(height * share)
        left = int(rng.integers(0, photograph.width - w + 1))
        top = int(rng.integers(0, photograph.height - h + 1))
        cut = photograph.resize((width, height), box=(left, top, left + w, top + h))
        path.write_bytes(_compress(cut, BYTES[name]))


def _compress(image: Image.Image, target: int) -> bytes:
    """The quality in 60 to 95 whose file is nearest to `target` bytes."""
    best = b""
    for quality in range(60, 96, 5):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        data = buffer.getvalue()
        if not best or abs(len(data) - target) < abs(len(best) - target):
            best = data
    return best
