"""Our own entropy decoder, libjpeg and every instruction set give the same pixels."""

import platform

import numpy as np
import pytest
from decoding import encode, photo, random_box
from promptkd import _rust


@pytest.fixture(autouse=True)
def _as_by_default():
    yield
    _rust.configure()


def decode_with(data, target, box, options=None, **how):
    _rust.configure(**how)
    boxes = np.array([box])
    (out,), failures = _rust.decode([data], [target], boxes=boxes, threads=1, **options or {})
    return out[0], [kind for _, kind, _ in failures]


def assert_paths_agree(data, width, height, rng, rounds):
    """Pixels of random boxes, not resized, so that nothing hides a difference."""
    for _ in range(rounds):
        box = [int(v) for v in random_box(rng, width, height)]
        target = _rust.Target(box[3] - box[1], box[2] - box[0])
        own, failed = decode_with(data, target, box)
        libjpeg, libjpeg_failed = decode_with(data, target, box, jpeg="libjpeg")
        assert failed == libjpeg_failed
        np.testing.assert_array_equal(own, libjpeg, err_msg=f"{width}x{height} {box}")


def random_jpeg(rng, largest=400):
    small = rng.integers(3) == 0
    width, height = (int(v) for v in rng.integers(1, 40 if small else largest, 2))
    options = {
        "quality": int(rng.integers(1, 101)),
        "subsampling": int(rng.integers(0, 3)),
        "optimize": bool(rng.integers(2)),
    }
    if rng.integers(2):
        options["restart_marker_blocks"] = int(rng.integers(1, 60))
    image = photo(width, height, int(rng.integers(1000)))
    if rng.integers(5) == 0:
        image = image.convert("L")
    return encode(image, "JPEG", **options), width, height


def mutated(data, rng):
    """A few bytes changed, cut or doubled."""
    bytes_ = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(2, len(bytes_)))
        match rng.integers(4):
            case 0:
                bytes_[at] = int(rng.integers(256))
            case 1:
                bytes_[at] ^= 1 << int(rng.integers(8))
            case 2:
                del bytes_[at : at + int(rng.integers(1, 20))]
            case _:
                bytes_[at:at] = bytes_[at : at + int(rng.integers(1, 20))]
    return bytes(bytes_)


@pytest.mark.parametrize("seed", range(4))
def test_paths_agree(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        assert_paths_agree(*random_jpeg(rng), rng, 4)


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "grey"])
@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_paths_agree_on_scaled_pictures(denominator, subsampling):
    rng = np.random.default_rng(denominator)
    for _ in range(12):
        width, height = (int(v) for v in rng.integers(16, 500, 2))
        image = photo(width, height, int(rng.integers(1000)))
        options = {"quality": int(rng.integers(5, 101)), "subsampling": subsampling}
        if subsampling == "grey":
            image, options = image.convert("L"), {}
        if rng.integers(2):
            options["restart_marker_blocks"] = int(rng.integers(1, 60))
        data = encode(image, "JPEG", **options)
        for _ in range(4):
            box = [int(v) for v in random_box(rng, width, height)]
            sides = [max((box[i + 2] - box[i]) // denominator, 1) for i in (1, 0)]
            how = {"scaled": True}
            own, _ = decode_with(data, _rust.Target(*sides), box, how)
            libjpeg, failed = decode_with(data, _rust.Target(*sides), box, how, jpeg="libjpeg")
            assert failed == []
            np.testing.assert_array_equal(own, libjpeg, err_msg=f"{width}x{height} {box}")


@pytest.mark.long
def test_paths_agree_on_many_files():
    rng = np.random.default_rng(99)
    for _ in range(800):
        assert_paths_agree(*random_jpeg(rng), rng, 6)


@pytest.mark.parametrize("seed", range(4))
def test_paths_agree_on_damaged_files(seed):
    """Whatever is not sound is left to libjpeg, from wherever in the file this shows."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        data, width, height = random_jpeg(rng, 150)
        assert_paths_agree(mutated(data, rng), width, height, rng, 2)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere libjpeg takes every file")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [
    {"subsampling": "4:2:0"}, {"subsampling": "4:2:2"}, {"subsampling": "4:4:4"},
    {"restart_marker_blocks": 7}, {"optimize": True},
])  # fmt: skip
def test_plain_files_take_our_own_path(options, scaled):
    # Only our own decoder can leave out the pixels.
    image, box = photo(400, 300), [0, 0, 400, 300]
    how = {"scaled": scaled}
    plain, progressive = (encode(image, "JPEG", progressive=p, **options) for p in (False, True))
    target = _rust.Target(80, 80)
    assert not decode_with(plain, target, box, how, jpeg="entropy")[0].any()
    assert decode_with(progressive, target, box, how, jpeg="entropy")[0].any()


@pytest.mark.parametrize("simd", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(simd):
    rng = np.random.default_rng(5)
    data = encode(photo(333, 250), "JPEG")
    try:
        _rust.configure(simd=simd)
    except ValueError as error:
        pytest.skip(str(error))
    for _ in range(60):
        box = [int(v) for v in random_box(rng, 333, 250)]
        height, width = (int(v) for v in rng.integers(1, 260, 2))
        target = _rust.Target(height, width, "squash", str(rng.choice(["bicubic", "bilinear"])))
        best, portable = decode_with(data, target, box), decode_with(data, target, box, simd=simd)
        np.testing.assert_array_equal(best[0], portable[0])


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="auto, libjpeg or entropy"):
        _rust.configure(jpeg="own")
    with pytest.raises(ValueError, match="portable"):
        _rust.configure(simd="sse9")
