"""Batches in the background, tar shards, the index, the order of an epoch."""

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from decoding import encode, photo
from promptkd import _rust
from promptkd.data.decode import decode_images, decode_views
from promptkd.data.lists import read_parquet
from promptkd.data.shards import build_index, shard_samples, shuffled_samples
from promptkd.data.stream import Boxes, Views, stream_batches
from promptkd.errors import DataError, ImageError
from torchvision.transforms import functional as F

TARGET = _rust.Target(20, 24)


def files(count):
    return [encode(photo(40 + i, 30 + i, i), "JPEG") for i in range(count)]


def jobs_of(sources, size):
    for start in range(0, len(sources), size):
        rows = np.arange(start, min(start + size, len(sources)))
        yield Boxes(rows, [sources[r] for r in rows])


@pytest.mark.parametrize(("depth", "threads"), [(1, 1), (2, 0), (9, 3)])
def test_batches_come_in_order_and_equal_the_plain_call(depth, threads):
    sources = files(23)
    (expected,), _ = decode_images(sources, [TARGET])
    batches = list(stream_batches(jobs_of(sources, 5), [TARGET], depth=depth, threads=threads))
    assert [len(b.rows) for b in batches] == [5, 5, 5, 5, 3]
    assert np.concatenate([b.rows for b in batches]).tolist() == list(range(23))
    np.testing.assert_array_equal(np.concatenate([b.pixels[0] for b in batches]), expected)


def test_views_equal_the_plain_call():
    sources = [*files(6), photo(50, 40)]
    keys, views = np.arange(7, dtype=np.uint64), np.full(7, 2, np.uint32)
    (expected,), _ = decode_views(sources, [TARGET], seed=4, keys=keys, views=views)
    job = Views(np.arange(7), sources, 4, keys, views)
    (batch,) = stream_batches([job], [TARGET])
    np.testing.assert_array_equal(batch.pixels[0], expected)


def test_jobs_are_taken_only_as_far_ahead_as_allowed():
    taken = []

    def jobs():
        for i, job in enumerate(jobs_of(files(20), 2)):
            taken.append(i)
            yield job

    stream = stream_batches(jobs(), [TARGET], depth=3)
    next(stream)
    time.sleep(0.2)
    assert len(taken) == 4  # the one in use and three ahead
    stream.close()


def test_skipped_pictures_keep_the_rows_of_the_others():
    sources = files(6)
    sources[1], sources[4] = b"nonsense", sources[4][:200]
    batches = list(stream_batches(jobs_of(sources, 3), [TARGET], on_error="skip"))
    assert [b.rows.tolist() for b in batches] == [[0, 2], [3, 5]]
    assert [len(b.pixels[0]) for b in batches] == [2, 2]
    assert [[f[:2] for f in b.failures] for b in batches] == [
        [(1, "not_an_image")],
        [(4, "truncated")],
    ]


def test_raise_stops_at_the_first():
    sources = files(4)
    sources[2] = b""
    stream = stream_batches(jobs_of(sources, 2), [TARGET])
    next(stream)
    with pytest.raises(ImageError, match="it is empty"):
        next(stream)


@pytest.mark.parametrize(("limit", "fine", "bad"), [(3, 3, 4), (0.02, 4, 5)])
def test_the_limit_on_failures(limit, fine, bad):
    good = files(1)[0]
    for count, raises in ((fine, False), (bad, True)):
        sources = [b"x"] * count + [good] * (200 - count)
        sources = sources[::-1]  # the failures come when enough pictures were seen
        stream = stream_batches(jobs_of(sources, 50), [TARGET], on_error="skip", max_failures=limit)
        if raises:
            with pytest.raises(DataError, match="can't be read, more than"):
                list(stream)
        else:
            assert sum(len(b.failures) for b in stream) == count


def test_threads_end_when_the_iterator_is_dropped():
    before = threads_alive()
    stream = stream_batches(jobs_of(files(8) * 40, 20), [TARGET], depth=4)
    next(stream)
    assert threads_alive() > before
    del stream
    gc.collect()
    deadline = time.monotonic() + 10
    while threads_alive() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threads_alive() <= before


def threads_alive():
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads can't be counted here")
    return len(os.listdir("/proc/self/task"))


def _decode_in_child(data, queue):
    (out,), _ = decode_images(data, [TARGET], threads=2)
    batches = list(stream_batches(jobs_of(data, 2), [TARGET]))
    queue.put((out.sum(), sum(int(b.pixels[0].sum()) for b in batches)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_works_in_child_processes(method):
    data = files(4)
    (expected,), _ = decode_images(data, [TARGET], threads=2)
    list(stream_batches(jobs_of(data, 2), [TARGET]))
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_decode_in_child, args=(data, queue))
    child.start()
    child.join(300)
    assert child.exitcode == 0
    assert queue.get() == (expected.sum(), expected.sum())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stream_does_not_cross_a_fork():
    stream = _rust.BatchStream([TARGET])
    stream.submit(files(1))
    child = os.fork()
    if child == 0:
        try:
            stream.take()
        except RuntimeError as error:
            os._exit(0 if "process" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stream.take()


ALONE = (
    "import sys, importlib.util\n"
    "spec = importlib.util.spec_from_file_location('_rust', sys.argv[1])\n"
    "_rust = importlib.util.module_from_spec(spec); spec.loader.exec_module(_rust)\n"
)
"""Loads the extension without the package, whose imports take seconds."""


def test_ctrl_c_ends_a_wait():
    code = (
        ALONE + "import numpy as np\n"
        "import io\n"
        "from PIL import Image\n"
        "b = io.BytesIO(); Image.new('RGB', (3000, 3000)).save(b, 'PNG')\n"
        "s = _rust.BatchStream([_rust.Target(9, 9)], threads=1)\n"
        "s.submit([b.getvalue()] * 2000)\n"
        "print('ready', flush=True)\n"
        "try:\n    s.take()\nexcept KeyboardInterrupt:\n    del s\n    print('stopped')\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, _rust.__file__], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "stopped\n"


def test_a_full_or_empty_stream_says_so():
    stream = _rust.BatchStream([TARGET], depth=1)
    with pytest.raises(ValueError, match="no batch was submitted"):
        stream.take()
    stream.submit(files(1))
    assert stream.pending == 1
    with pytest.raises(ValueError, match="full"):
        stream.submit(files(1))
    stream.take()
    with pytest.raises(ValueError, match="depth"):
        _rust.BatchStream([TARGET], depth=0)


def test_the_gil_is_free_while_pictures_are_decoded():
    count, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    data = [encode(photo(600, 600), "PNG")] * 20
    decode_images(data, [TARGET], threads=1)
    seen, _ = count[0], stop.set()
    thread.join()
    assert seen > 5


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 64, 64, 3)])
def test_normalised_planes_equal_torchvision(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.stack([F.normalize(F.to_tensor(p), mean, std) for p in pixels])
    for array in (pixels, np.asfortranarray(pixels)):
        planes = _rust.normalize(array, mean, std)
        np.testing.assert_array_equal(planes, expected.numpy())


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_are_read_by_index(tmp_path, form):
    data = files(3)
    long = "" if form == tarfile.USTAR_FORMAT else "long" * 40 + "/"
    names = ["a/1.jpg", f"{long}zwei.v2.JPG", "b/drei.jpeg"]
    members = [("readme.md", b"hello")]
    for name, content in zip(names, data, strict=True):
        stem = name.rpartition("/")[2].partition(".")[0]
        members += [(name, content), (name.rpartition("/")[0] + f"/{stem}.cls", b" 7\n")]
    path = tmp_path / "shard.tar"
    write_tar(path, members, format=form)
    samples = shard_samples(path)
    assert [s.name for s in samples] == ["a/1", f"{long}zwei", "b/drei"]
    assert [s.read_label() for s in samples] == [7, None if not long else 7, 7]
    (out,), _ = decode_images([s.picture for s in samples], [TARGET])
    (expected,), _ = decode_images(data, [TARGET])
    np.testing.assert_array_equal(out, expected)


def test_pictures_in_shards_go_through_pillow_too(tmp_path):
    path, picture = tmp_path / "s.tar", encode(photo(30, 20), "BMP")
    write_tar(path, [("a.bmp", picture), ("b.jpg", b"nonsense")])
    sources = [s.picture for s in shard_samples(path)]
    (out,), failures = decode_images(sources, [TARGET], on_error="skip")
    (expected,), _ = decode_images([picture], [TARGET])
    np.testing.assert_array_equal(out[0], expected[0])
    assert failures[0][:2] == (1, "not_an_image")
    assert f"'{path}' at byte" in failures[0][2]


def test_a_cut_shard_names_the_byte(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, [("a.jpg", files(1)[0]), ("b.jpg", files(2)[1])])
    content = path.read_bytes()
    first = shard_samples(path)[0].picture
    for length, said in ((700, "inside 'a.jpg' that begins at byte 512"), (300, "at byte 0")):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=said):
            shard_samples(path)
    _, failures = decode_images([first], [TARGET], on_error="skip")
    assert failures[0][1] == "truncated"
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(DataError, match="no tar archive"):
        shard_samples(path)
    path.write_bytes(content[:512] + b"\x01" * 4000)
    with pytest.raises(DataError, match=r"no tar header at byte|is truncated"):
        shard_samples(path)
    write_tar(path, [("a.md", b"x")])
    with pytest.raises(DataError, match="no pictures in this archive of 1 files"):
        shard_samples(path)


def test_shuffled_shards_lose_and_repeat_nothing(tmp_path):
    paths = []
    for shard in range(7):
        paths.append(tmp_path / f"{shard}.tar")
        write_tar(paths[-1], [(f"{shard}/{i}.jpg", b"x") for i in range(30)])
    everything = sorted(f"{s}/{i}" for s in range(7) for i in range(30))

    def order(epoch, rank=0, world=1):
        how = {"seed": 1, "epoch": epoch, "rank": rank, "world": world, "window": 40}
        return [s.name for s in shuffled_samples(paths, **how)]

    assert sorted(order(0)) == everything
    assert order(0) == order(0) != order(1)
    assert sorted(name for r in range(3) for name in order(0, r, 3)) == everything


def test_epochs_over_ranks_lose_and_repeat_nothing():
    for rows, world in [(1000, 1), (1001, 4), (3, 5)]:
        parts = [
            _rust.epoch_rows(rows, seed=3, epoch=2, start=0, count=rows, rank=r, world=world)
            for r in range(world)
        ]
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    whole = _rust.epoch_rows(1000, seed=3, epoch=2, start=0, count=1000)
    resumed = _rust.epoch_rows(1000, seed=3, epoch=2, start=600, count=1000)
    assert whole[600:].tolist() == resumed.tolist()
    assert whole[:8].tolist() == PINNED
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _rust.epoch_rows(10, seed=0, epoch=0, start=0, count=1, rank=2, world=2)


PINNED = [749, 705, 245, 302, 441, 934, 23, 247]


def test_the_index_gives_back_its_names(tmp_path):
    names = [f"katze/{i}é.jpg" for i in range(200_000)] + ["", os.fsdecode(b"\xff.png")]
    path = tmp_path / "names.index"
    assert build_index(path, iter(names)) == len(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["names.index"]
    index = _rust.Index(path)
    assert len(index) == len(names)
    rows = np.array([0, 199_999, 77, 200_000, 200_001], np.uint64)
    assert index.names(rows) == [names[r] for r in rows.tolist()]
    assert index.keys(rows).tolist() == [_rust.image_key(names[r]) for r in rows.tolist()]
    with pytest.raises(ValueError, match="row 200002 of 200002"):
        index.names(np.array([len(names)], np.uint64))


def test_damaged_indices_are_named(tmp_path):
    path = tmp_path / "names.index"
    with pytest.raises(OSError, match=r"names\.index"):
        _rust.Index(path)
    build_index(path, ["a", "bc"])
    content = path.read_bytes()
    for damaged, said in (
        (content[:-1], "it was cut"),
        (b"", "no index"),
        (b"X" + content[1:], "no index"),
        (content[:8] + b"\x02" + content[9:], "version 2"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"names\.index.*{said}"):
            _rust.Index(path)
    path.write_bytes(content[:-8] + b"\xff" * 8)
    with pytest.raises(ValueError, match="row 1 is damaged"):
        _rust.Index(path).names(np.array([1], np.uint64))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_hundred_million_names_need_little_memory(tmp_path):
    count = 100_000_000
    build_index(tmp_path / "big", (f"{i:08d}" for i in range(count)))
    code = (
        ALONE + "import re, time\n"
        "t = time.perf_counter()\n"
        "index = _rust.Index(sys.argv[2])\n"
        "n = len(index)\n"
        "rows = _rust.epoch_rows(n, seed=0, epoch=0, start=0, count=256)\n"
        "names = index.names(rows)\n"
        "started = time.perf_counter() - t\n"
        "for start in range(0, n // 2, n // 50):\n"
        "    rows = _rust.epoch_rows(n, seed=0, epoch=1, start=start, count=1000, rank=1, world=2)\n"
        "    assert [int(x) for x in index.names(rows)] == rows.tolist()\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(n, started, peak)\n"
    )
    arguments = [sys.executable, "-c", code, _rust.__file__, str(tmp_path / "big")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    number, started, peak_kib = run.stdout.split()
    assert int(number) == count
    assert float(started) < 1
    assert int(peak_kib) < 200 * 1024


def test_parquet_lists(tmp_path):
    path = tmp_path / "list.parquet"
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        with pytest.raises(DataError, match="install pyarrow"):
            read_parquet(path)
        return
    parquet.write_table(pyarrow.table({"path": ["a.jpg", "b/c.png"], "label": ["cat", None]}), path)
    expected = [("a.jpg", "cat"), ("b/c.png", None)]
    assert read_parquet(path) == expected
    with pytest.raises(DataError, match="no column 'file' among path, label"):
        read_parquet(path, "file")
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        read_parquet(path)
