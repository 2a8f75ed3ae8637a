"""Writes the seeds of the fuzzer: small files of every kind that the decoder takes."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from decoding import encode, photo

FOLDER = Path(__file__).parent / "corpus"


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def main() -> None:
    """Write every seed."""
    FOLDER.mkdir(exist_ok=True)
    image = photo(70, 50)
    rgba = image.convert("RGBA")
    rgba.putalpha(photo(70, 50, 1).convert("L"))
    wide = np.random.default_rng(0).integers(0, 70000, (50, 70)).astype(np.uint16)
    files = {
        "420.jpg": encode(image, "JPEG", subsampling="4:2:0"),
        "422.jpg": encode(image, "JPEG", subsampling="4:2:2"),
        "444.jpg": encode(image, "JPEG", subsampling="4:4:4", quality=95),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "rgb.jpg": encode(image, "JPEG", keep_rgb=True),
        "restart.jpg": encode(image, "JPEG", restart_marker_blocks=3),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "optimised.jpg": encode(image, "JPEG", optimize=True, quality=30),
        "turned.jpg": encode(image, "JPEG", exif=exif(6)),
        "rgb.png": encode(image, "PNG"),
        "rgba.png": encode(rgba, "PNG"),
        "palette.png": encode(image.quantize(50), "PNG", bits=8),
        "bits.png": encode(image.convert("1"), "PNG"),
        "wide.png": encode(Image.fromarray(wide), "PNG"),
        "lossy.webp": encode(image, "WEBP", quality=70),
        "alpha.webp": encode(rgba, "WEBP", quality=70),
        "lossless.webp": encode(image, "WEBP", lossless=True),
    }
    for name, data in files.items():
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
