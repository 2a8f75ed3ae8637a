"""Other formats, and everything that can be wrong with a file."""

import io
import os
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from decoding import encode, open_rgb, photo, pillow_view, random_box
from PIL import Image, ImageFile
from promptkd import _rust
from promptkd.data.decode import decode_images, decode_views
from promptkd.errors import ImageError

TARGET = _rust.Target(40, 50)


def assert_equals_pillow(data, rounds=5):
    reference = open_rgb(data)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        box = random_box(rng, *reference.size)
        (out,), failures = _rust.decode([data], [TARGET], boxes=np.array([box]))
        assert failures == []
        np.testing.assert_array_equal(out[0], pillow_view(reference, box, (50, 40)))


def png(width, height, bits, colour, rows, *extra, interlace=0):
    """A PNG file of raw rows, as Pillow itself can't write them all."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(61, 47), (1, 1), (9, 130)])
def test_png_modes_equal_pillow(width, height, mode):
    image = photo(width, height)
    if mode == "I;16":
        values = np.random.default_rng(0).integers(0, 600, (height, width)).astype(np.uint16)
        image = Image.fromarray(values)
    elif mode == "P":
        image = image.quantize(200)
    else:
        image = image.convert(mode)
    if "A" in mode:
        image.putalpha(photo(width, height, 1).convert("L"))
    assert_equals_pillow(encode(image, "PNG"))


@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_bit_depths_equal_pillow(bits, colour):
    allowed = {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour, (8, 16))
    if bits not in allowed:
        pytest.skip("PNG has no such kind")
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rng = np.random.default_rng(bits + colour)
    width, height = 37, 29
    rows = rng.integers(0, 256, (height, (width * samples * bits + 7) // 8)).astype(np.uint8)
    palette = rng.integers(0, 256, 3 << min(bits, 8)).astype(np.uint8).tobytes()
    extra = [(b"PLTE", palette)] if colour == 3 else []
    assert_equals_pillow(png(width, height, bits, colour, rows, *extra))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_png_transparency_is_dropped_as_in_pillow():
    rows = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = np.random.default_rng(0).integers(0, 256, 192).astype(np.uint8).tobytes()
    extra = [(b"PLTE", palette), (b"tRNS", bytes(range(60)))]
    assert_equals_pillow(png(8, 8, 8, 3, rows, *extra))
    assert_equals_pillow(png(8, 8, 8, 0, rows, (b"tRNS", b"\0\x07")))


def test_png_index_outside_its_palette_equals_pillow():
    rows = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = np.random.default_rng(0).integers(0, 256, 30).astype(np.uint8).tobytes()
    assert_equals_pillow(png(8, 8, 8, 3, rows, (b"PLTE", palette)))


def test_interlaced_png_equals_pillow():
    # Adam7 of a 5 x 3 picture: the passes' rows, as the standard lists them.
    rng = np.random.default_rng(0)
    passes = [(1, 1), (1, 1), (2, 0), (1, 1), (3, 1), (2, 2), (5, 1)]
    rows = [rng.integers(0, 256, 3 * w).astype(np.uint8) for w, h in passes for _ in range(h)]
    assert_equals_pillow(png(5, 3, 8, 2, rows, interlace=1))


@pytest.mark.parametrize("options", [
    {"lossless": True}, {"quality": 80}, {"quality": 20, "method": 0},
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(("width", "height"), [(61, 47), (16, 16), (1, 1), (2, 131)])
def test_webp_equals_pillow(width, height, mode, options):
    image = photo(width, height)
    if mode == "RGBA":
        image.putalpha(photo(width, height, 1).convert("L"))
    assert_equals_pillow(encode(image, "WEBP", **options))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_the_rest_goes_through_pillow(kind, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    image = photo(61, 47)
    try:
        image.save(path, kind)
    except OSError as error:
        pytest.skip(f"this Pillow can't write {kind}: {error}")
    with Image.open(path) as file:
        reference = file.convert("RGB")
    box = [3, 4, *(side - 2 for side in reference.size)]
    boxes, flips = np.array([box, box]), np.array([True, False])
    (out,), failures = decode_images([path, path], [TARGET], boxes=boxes, flips=flips)
    assert failures == []
    np.testing.assert_array_equal(out[0], pillow_view(reference, box, (50, 40), flip=True))
    np.testing.assert_array_equal(out[1], pillow_view(reference, box, (50, 40)))


def test_views_are_the_same_through_pillow_and_in_memory(tmp_path):
    image = photo(61, 47)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.bmp"),
        image,
        (tmp_path / "a.png").read_bytes(),
    ]
    keys, views = np.full(4, 77, np.uint64), np.full(4, 3, np.uint32)
    (out,), _ = decode_views(sources, [TARGET], seed=5, keys=keys, views=views)
    assert len(np.unique(out.reshape(4, -1), axis=0)) == 1
    sizes = np.array([[61, 47]])
    (box,), (flip,) = _rust.random_views(5, keys[:1], views[:1], sizes)
    np.testing.assert_array_equal(out[0], pillow_view(image, box.tolist(), (50, 40), flip=flip))


def test_pillow_images_are_oriented_when_asked():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(photo(61, 47), "JPEG", exif=exif)))
    (out,), _ = decode_images([image], [_rust.Target(61, 47)], orient=True)
    np.testing.assert_array_equal(out[0], np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def broken_files(folder):
    """Bad files by name, with the kind of error that each is."""
    jpeg, image = encode(photo(120, 90), "JPEG"), encode(photo(120, 90), "PNG")
    huge = jpeg.replace(struct.pack(">HH", 90, 120), struct.pack(">HH", 65000, 65000), 1)
    twelve = bytearray(jpeg)
    twelve[jpeg.index(b"\xff\xc0") + 4] = 12
    files = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is no picture at all", "not_an_image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header.jpg": (jpeg[:30], "truncated"),
        "huge.jpg": (huge, "too_large"),
        "twelve.jpg": (bytes(twelve), "unsupported"),
        "noscan.jpg": (b"\xff\xd8\xff\xd9", "corrupt"),
        "cut.png": (image[: len(image) // 2], "truncated"),
        "flipped.png": (image[:60] + bytes([image[60] ^ 255]) + image[61:], "corrupt"),
        "bomb.png": (png(100_000, 100_000, 8, 2, []), "too_large"),
        "thin.png": (png(13_000, 13_000, 8, 2, []), "truncated"),
        "cut.webp": (encode(photo(120, 90), "WEBP")[:200], "truncated"),
        "cut.bmp": (encode(photo(120, 90), "BMP")[:2000], "truncated"),
    }
    for name, (content, kind) in files.items():
        (folder / name).write_bytes(content)
        yield folder / name, kind
    yield folder / "nowhere.jpg", "missing"
    yield folder, "unreadable"
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.jpg")
        yield folder / "pipe.jpg", "unreadable"
    if sys.platform == "linux":
        yield Path("/proc/self/mem"), "unreadable"  # a file whose first byte can't be read


def test_every_failure_has_its_kind_and_names_the_file(tmp_path):
    good = tmp_path / "good.jpg"
    photo(30, 30).save(good)
    expected = dict(broken_files(tmp_path))
    sources = [good, *expected, good]
    (out,), failures = decode_images(sources, [TARGET], on_error="skip")
    assert {sources[row]: kind for row, kind, _ in failures} == expected
    for row, _, message in failures:
        assert str(sources[row]) in message
        assert not out[row].any()
    assert out[0].any()
    assert np.array_equal(out[0], out[-1])


def test_a_file_without_permission_is_unreadable(tmp_path):
    path = tmp_path / "secret.png"
    photo(9, 9).save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ImageError, match=r"secret\.png': it can't be read"):
        decode_images([path], [TARGET])


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """Each time a picture, or a failure that names the file."""
    path, stop = tmp_path / "a.jpg", threading.Event()
    contents = [encode(photo(300, 200, i), kind) for i, kind in enumerate(("JPEG", "PNG"))]
    contents += [contents[0][:5000], b""]

    def rewrite():
        while not stop.is_set():
            for content in contents:
                path.write_bytes(content)

    path.write_bytes(contents[0])
    thread = threading.Thread(target=rewrite)
    thread.start()
    kinds = set()
    try:
        for _ in range(60):
            _, failures = decode_images([path] * 8, [TARGET], threads=2, on_error="skip")
            kinds |= {kind for _, kind, _ in failures}
            assert all(f"'{path}': " in message for _, _, message in failures)
    finally:
        stop.set()
        thread.join()
    assert kinds
    assert kinds <= {"empty", "truncated", "corrupt", "not_an_image"}


def test_raise_names_the_first_and_counts_the_rest(tmp_path):
    sources = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    with pytest.raises(ImageError, match=r"a\.jpg'.*no such file.*\(and 1 more\)"):
        decode_images(sources, [TARGET])


def test_bytes_are_named_by_their_place():
    with pytest.raises(ImageError, match=r"image 1 \(bytes\): it is not an image"):
        decode_images([encode(photo(9, 9), "PNG"), b"nonsense"], [TARGET])


@pytest.mark.parametrize(("brand", "plugin"), [(b"heic", "pillow-heif")])
def test_a_missing_plugin_is_named(brand, plugin):
    with pytest.raises(ImageError, match=plugin):
        decode_images([b"\0\0\0\x18ftyp" + brand + bytes(40)], [TARGET])


def test_a_truncated_jpeg_fails_whichever_box_is_asked():
    """As in Pillow: also where the box lies before the cut."""
    data = encode(photo(300, 300), "JPEG")
    cut = data[: len(data) * 3 // 4]
    for box in ([0, 0, 20, 20], [0, 0, 300, 300], [100, 280, 300, 300]):
        _, failures = _rust.decode([cut], [TARGET], boxes=np.array([box]))
        assert [f[1] for f in failures] == ["truncated"]


def test_a_jpeg_without_its_end_marker_is_refused_as_pillow_refuses_it():
    data = encode(photo(120, 90), "JPEG")
    assert data[-2:] == b"\xff\xd9"
    with pytest.raises(OSError, match="truncated"):
        open_rgb(data[:-2])
    with pytest.raises(ImageError, match="truncated"):
        decode_images([data[:-2]], [TARGET])


@pytest.fixture
def load_truncated():
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.mark.parametrize("options", [
    {}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"progressive": True},
    {"progressive": True, "subsampling": "4:4:4"}, {"restart_marker_blocks": 3},
    {"mode": "L"}, {"mode": "L", "progressive": True}, {"mode": "CMYK"},
])  # fmt: skip
@pytest.mark.usefixtures("load_truncated")
def test_cut_jpegs_are_filled_as_pillow_fills_them(options):
    options = dict(options)
    data = encode(photo(203, 155).convert(options.pop("mode", "RGB")), "JPEG", **options)
    scan = data.index(b"\xff\xda")
    rng = np.random.default_rng(len(data))
    cuts = [scan + 16, len(data) - 1, len(data) - 2, *rng.integers(scan + 14, len(data), 25)]
    for cut in cuts:
        reference = open_rgb(data[:cut])
        for box in ([0, 0, 203, 155], random_box(rng, 203, 155)):
            target = _rust.Target(int(box[3] - box[1]), int(box[2] - box[0]))
            (out,), failures = _rust.decode(
                [data[:cut]], [target], boxes=np.array([box]), truncated=True
            )
            assert failures == []
            np.testing.assert_array_equal(out[0], np.asarray(reference.crop(tuple(box))))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_progressive_jpeg_that_lacks_scans_equals_pillow(mode):
    data = encode(photo(203, 155).convert(mode), "JPEG", progressive=True)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    tables = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc4"]
    for count in range(1, len(scans)):
        # Each scan has its own Huffman table before it.
        end = next((t for t in tables if scans[count - 1] < t < scans[count]), scans[count])
        assert_equals_pillow(data[:end] + b"\xff\xd9")


def test_a_jpeg_cut_in_its_header_fails_whatever_is_allowed():
    data = encode(photo(203, 155), "JPEG")
    for cut in (3, 30, data.index(b"\xff\xda") + 5):
        _, failures = decode_images([data[:cut]], [TARGET], truncated=True, on_error="skip")
        assert [f[1] for f in failures] == ["truncated"]


def test_the_pixel_limit_is_exact():
    for data in (encode(photo(30, 20), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")):
        assert decode_images([data], [TARGET], max_pixels=600)[1] == []
        with pytest.raises(ImageError, match=r"30 x 20 pixels, more than the limit of 599"):
            decode_images([data], [TARGET], max_pixels=599)


def test_sizes_come_from_headers(tmp_path):
    for kind in ("JPEG", "PNG", "WEBP"):
        sizes, failures = _rust.image_sizes([encode(photo(30, 20), kind), b""])
        assert sizes.tolist() == [[30, 20], [0, 0]]
        assert [f[:2] for f in failures] == [(1, "empty")]


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.png")
    photo(9, 9).save(path)
    assert decode_images([path], [TARGET])[1] == []
    assert _rust.image_key(path) == _rust.image_key(path) != _rust.image_key(path[:-1])
