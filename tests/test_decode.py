"""JPEG decoding and resizing against Pillow: bit-equal, whatever the file, the box and the size."""

import io
import pickle

import numpy as np
import pytest
from decoding import encode, open_rgb, photo, pillow_view, random_box
from PIL import Image, ImageOps
from promptkd import _rust

# width, height: tall, wide, smaller than a block, one pixel, no multiple of anything
SIZES = [(333, 250), (64, 300), (16, 16), (7, 5), (1, 1), (1, 70), (129, 2)]


def decode_one(data, target, box=None, flip=False, **options):
    boxes = None if box is None else np.array([box])
    (out,), failures = _rust.decode(
        [data], [target], boxes=boxes, flips=np.array([flip]), threads=1, **options
    )
    assert failures == []
    return out[0]


def assert_equal_boxes(data, rng, rounds):
    """Random boxes of a file, at random sizes, equal Pillow's."""
    reference = open_rgb(data)
    for _ in range(rounds):
        box = random_box(rng, *reference.size)
        width, height = (int(v) for v in rng.integers(1, 260, 2))
        interpolation = str(rng.choice(["bicubic", "bilinear"]))
        flip = bool(rng.integers(2))
        target = _rust.Target(height, width, "squash", interpolation)
        expected = pillow_view(reference, box, (width, height), interpolation, flip)
        np.testing.assert_array_equal(decode_one(data, target, box, flip), expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_random_boxes_equal_pillow(width, height, progressive, subsampling):
    rng = np.random.default_rng(width * height)
    options = {"quality": 85, "subsampling": subsampling, "progressive": progressive}
    assert_equal_boxes(encode(photo(width, height), "JPEG", **options), rng, 12)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_grey_and_cmyk_equal_pillow(width, height, mode):
    rng = np.random.default_rng(width)
    assert_equal_boxes(encode(photo(width, height).convert(mode), "JPEG"), rng, 8)


def with_factors(data, factors, width, height):
    """A file whose luma has other sampling factors with as many blocks in a unit, so that each of
    its blocks lies elsewhere."""
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 19])
    frame[5:9] = height.to_bytes(2) + width.to_bytes(2)
    frame[11] = factors
    return data[:at] + bytes(frame) + data[at + 19 :]


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize(("factors", "subsampling", "unit"), [
    (0x12, "4:2:2", (8, 16)), (0x41, "4:2:0", (32, 8)), (0x14, "4:2:0", (8, 32)),
])  # fmt: skip
def test_rare_subsampling_equals_pillow(factors, subsampling, unit, options):
    """4:4:0, 4:1:1 and 4:1:1 upright, which Pillow reads but does not write."""
    rng = np.random.default_rng(factors)
    stored = (16, 8) if subsampling == "4:2:2" else (16, 16)
    for across, down in [(9, 7), (13, 16), (1, 3), (2, 1)]:
        image = photo(across * stored[0], down * stored[1])
        data = encode(image, "JPEG", subsampling=subsampling, quality=90, **options)
        for rest in (0, 1, 5):
            width, height = across * unit[0] - rest, down * unit[1] - rest
            assert_equal_boxes(with_factors(data, factors, width, height), rng, 6)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_ycck_equals_pillow(width, height):
    data = encode(photo(width, height).convert("CMYK"), "JPEG", quality=90)
    # The last byte of Adobe's marker says how four components are stored: 2 is YCCK.
    at = data.index(b"Adobe") + 11
    assert_equal_boxes(data[:at] + b"\x02" + data[at + 1 :], np.random.default_rng(3), 8)


@pytest.mark.parametrize("options", [
    {"restart_marker_blocks": 1},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 7, "progressive": True},
    {"quality": 5},
    {"quality": 100, "optimize": True},
    {"keep_rgb": True},
])  # fmt: skip
def test_odd_encodings_equal_pillow(options):
    rng = np.random.default_rng(1)
    assert_equal_boxes(encode(photo(333, 250), "JPEG", **options), rng, 25)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_many_random_files_equal_pillow(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        width, height = (int(v) for v in rng.integers(1, 700, 2))
        options = {
            "quality": int(rng.integers(1, 101)),
            "subsampling": int(rng.integers(0, 3)),
            "progressive": bool(rng.integers(2)),
            "optimize": bool(rng.integers(2)),
        }
        if rng.integers(2):
            options["restart_marker_blocks"] = int(rng.integers(1, 50))
        assert_equal_boxes(encode(photo(width, height, seed), "JPEG", **options), rng, 6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (64, 48), (16, 16), (500, 90)])
def test_resize_modes_equal_open_clip(size, interpolation):
    from open_clip.transform import image_transform

    for width, height in [(333, 250), (250, 333), (64, 64), (60, 300), (30, 31)]:
        data = encode(photo(width, height), "JPEG")
        for mode in ("squash", "shortest", "longest"):
            if mode == "shortest" and size[0] != size[1] and interpolation == "bilinear":
                continue  # open_clip takes bicubic here, whatever it was told
            transform = image_transform(
                size, False, resize_mode=mode, interpolation=interpolation, fill_color=7
            )
            steps = [t for t in transform.transforms if type(t).__name__ != "Normalize"]
            tensor = open_rgb(data)
            for step in steps:
                tensor = step(tensor)
            expected = (tensor.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
            target = _rust.Target(*size, mode, interpolation, 7)
            np.testing.assert_array_equal(decode_one(data, target), expected)


def test_several_targets_of_one_decode():
    data, box = encode(photo(333, 250), "JPEG"), [10, 20, 300, 217]
    targets = [_rust.Target(224, 224), _rust.Target(48, 64, "longest", "bilinear", 9)]
    both, failures = _rust.decode([data] * 3, targets, boxes=np.array([box] * 3), threads=2)
    assert failures == []
    for target, out in zip(targets, both, strict=True):
        assert out.shape == (3, target.height, target.width, 3)
        for row in out:
            np.testing.assert_array_equal(row, decode_one(data, target, box))


def test_a_flip_mirrors_the_padding_too():
    data = encode(photo(60, 301), "JPEG")
    target = _rust.Target(64, 64, "longest", fill=5)
    plain, flipped = decode_one(data, target), decode_one(data, target, flip=True)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_exif_transpose(orientation):
    image = photo(120, 75)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", exif=exif)
    stored = open_rgb(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    sizes, _ = _rust.image_sizes([data], orient=True)
    assert tuple(sizes[0]) == upright.size
    rng, target = np.random.default_rng(orientation), _rust.Target(40, 50)
    for _ in range(10):
        box = random_box(rng, *upright.size)
        out = decode_one(data, target, box, orient=True)
        np.testing.assert_array_equal(out, pillow_view(upright, box, (50, 40)))
    whole = decode_one(data, target)
    np.testing.assert_array_equal(whole, pillow_view(stored, (0, 0, 120, 75), (50, 40)))


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    files = [encode(photo(90 + i, 70 + i, i), "JPEG") for i in range(23)]
    files[5] = b"nonsense"
    boxes = np.array([random_box(rng, 90, 70) for _ in files])
    results = [
        _rust.decode(files, [_rust.Target(32, 32)], boxes=boxes, threads=t) for t in (1, 2, 7, 0)
    ]
    for (out,), failures in results:
        np.testing.assert_array_equal(out, results[0][0][0])
        assert [f[:2] for f in failures] == [(5, "not_an_image")]
        assert not out[5].any()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 200), (224, 224), (517, 333)])
def test_resize_of_pixels_equals_pillow(width, height):
    image = photo(width, height)
    rng = np.random.default_rng(0)
    for _ in range(10):
        box = [int(v) for v in random_box(rng, width, height)]
        w, h = (int(v) for v in rng.integers(1, 300, 2))
        for pixels in (np.asarray(image), np.asfortranarray(np.asarray(image))):
            (out,) = _rust.resize(pixels, [_rust.Target(h, w)], box=box, flip=True)
            np.testing.assert_array_equal(out, pillow_view(image, box, (w, h), flip=True))


def test_scaled_decoding_is_close():
    image = photo(200, 150).resize((1600, 1200))
    data, target = encode(image, "JPEG", quality=95), _rust.Target(128, 128)
    for box in ([0, 0, 1600, 1200], [3, 5, 1200, 1177], [101, 99, 700, 801]):
        exact, scaled = decode_one(data, target, box), decode_one(data, target, box, scaled=True)
        error = np.abs(exact.astype(int) - scaled)
        assert 0 < error.mean() < 1.5, error.mean()
        mirrored = decode_one(data, target, box, flip=True, scaled=True)
        assert np.abs(mirrored[:, ::-1].astype(int) - scaled).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_of_rotated_pictures(orientation):
    """The grid's rest pixels lie at the stored edges, whichever way the picture is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(100, 75).resize((813, 611))
    data = encode(image, "JPEG", quality=95, exif=exif)
    target, box = _rust.Target(64, 64), [31, 45, 590, 607]
    exact = decode_one(data, target, box, orient=True)
    scaled = decode_one(data, target, box, orient=True, scaled=True)
    assert 0 < np.abs(exact.astype(int) - scaled).mean() < 1.5


@pytest.mark.parametrize("arguments", [
    {"boxes": np.zeros((2, 4), np.int64)},
    {"boxes": np.zeros((1, 3), np.int64)},
    {"flips": np.zeros(2, bool)},
])  # fmt: skip
def test_wrong_shapes_are_refused(arguments):
    with pytest.raises(ValueError, match=r"boxes|flips"):
        _rust.decode([b""], [_rust.Target(2, 2)], **arguments)


@pytest.mark.parametrize("box", [
    [0, 0, 11, 5], [-1, 0, 5, 5], [5, 5, 5, 8], [0, 0, 1, 2**62], [3, 0, 2, 5],
])  # fmt: skip
def test_boxes_outside_the_picture_are_failures(box):
    data = encode(photo(10, 10), "JPEG")
    _, failures = _rust.decode([data], [_rust.Target(2, 2)], boxes=np.array([box]))
    assert failures[0][1] == "corrupt"
    assert "does not lie in 10 x 10" in failures[0][2]


@pytest.mark.parametrize("arguments", [
    (0, 5), (5, 0), (1 << 15, 5), (5, 5, "stretch"), (5, 5, "squash", "nearest"),
])  # fmt: skip
def test_impossible_targets_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        _rust.Target(*arguments)


def test_targets_compare_and_pickle():
    target = _rust.Target(3, 4, "longest", "bilinear", 5)
    assert target == pickle.loads(pickle.dumps(target))  # noqa: S301
    assert target != _rust.Target(3, 4)
    assert repr(target) == "Target(3, 4, 'longest', 'bilinear', 5)"
