"""Writing, opening and gathering rows of the teacher cache, beside other ways to keep an array.

    python benches/bench_cache.py                         # 1,000,000 rows x 768 half: 12 GB of disk
    python benches/bench_cache.py --rows 50000 --peers memmap lmdb

All sides hold the same rows and are called in turn in one run. Slow peers get fewer rows, which
the table says. Cold means that the files' pages were dropped (posix_fadvise) before; with
read-ahead ours are brought in by a thread, as distilling does it, and LMDB's by its own option.
Memory is that of a fresh process that has opened the files and gathered. `pytest
benches/bench_cache.py --benchmark-only` measures our gather alone.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import CLOCKS, Row, report, status_bytes, typical
from numpy.typing import NDArray
from promptkd import _rust
from promptkd.cache import FeatureCache
from promptkd.cache.build import SHARD_ROWS
from promptkd.cache.layout import Manifest, Segment
from promptkd.cache.recipe import Content, Recipe

Rows = NDArray[np.int64]
Half = NDArray[np.float16]
Gather = Callable[[Rows, Half], None]

BATCH = 4096
SLOW_ROWS = 10_000
OURS = "promptkd"
TWO = "promptkd 2 threads"


def write_answers(folder: Path, content: Content, parts: dict[str, NDArray[Any]]) -> None:
    """Write a cache of one view that holds these rows, float16 or float32."""
    first = next(iter(parts.values()))
    recipe = Recipe(
        content=content,
        dtype=str(first.dtype),
        teacher="0" * 32,
        seed=0,
        scale=(0.5, 1.0),
        ratio=(0.75, 1.33),
        flip=0.5,
        orient=True,
    )
    segment = Segment(len(first), "0" * 32)
    manifest = Manifest(recipe, 1, min(SHARD_ROWS, len(first)), (segment,))
    manifest.write(folder)
    for unit in manifest.units(0):
        path = folder / unit.name
        path.parent.mkdir(exist_ok=True)
        entries = []
        for name, rows in parts.items():
            part = rows[unit.first : unit.first + unit.rows]
            kind, flat = f"F{8 * part.itemsize}", part.reshape(-1).view(np.uint8)
            entries.append((name, kind, list(part.shape), flat))
        metadata = list(manifest.metadata(unit).items())
        _rust.write_shard(path, path.with_suffix(".tmp"), metadata, entries)


class Store:
    """One way to keep rows in files; `limit` is how many rows a slow one gets."""

    limit: int | None = None

    def __init__(self, folder: Path, width: int) -> None:
        self.path, self.width = folder / self.name(), width

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()

    def write(self, data: Half) -> None:
        raise NotImplementedError

    def open(self) -> Gather:
        """Open anew; rows are copied into the buffer that is given."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files, so that their pages can be dropped."""

    def files(self) -> list[Path]:
        return [p for p in [self.path, *self.path.rglob("*")] if p.is_file()]

    def drop(self) -> None:
        """Close, and have the system forget the files' pages."""
        self.close()
        for path in self.files():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


class PromptKD(Store):
    threads = 1
    cache: FeatureCache | None = None

    def write(self, data: Half) -> None:
        write_answers(self.path, "features", {"features": data})

    def open(self) -> Gather:
        self.cache = cache = FeatureCache.open(self.path, threads=self.threads)
        return lambda rows, out: cache.read_into(torch.from_numpy(out), "features", 0, rows)

    def close(self) -> None:
        self.cache = None


class ReadAhead(PromptKD):
    """The same files, brought into memory in order while the first rows are gathered."""

    thread: threading.Thread | None = None

    @classmethod
    def name(cls) -> str:
        return PromptKD.name()

    def open(self) -> Gather:
        gather = super().open()
        assert self.cache is not None
        self.thread = threading.Thread(target=self.cache.read_ahead, args=(0,))
        self.thread.start()
        return gather

    def close(self) -> None:
        if self.thread is not None:
            self.thread.join()
        super().close()


class Memmap(Store):
    def write(self, data: Half) -> None:
        with self.path.open("wb") as file:
            data.tofile(file)
            os.fsync(file.fileno())

    def open(self) -> Gather:
        array = np.memmap(self.path, np.float16, "r").reshape(-1, self.width)
        return lambda rows, out: np.take(array, rows, axis=0, out=out, mode="clip")


class SafeTensors(Store):
    def write(self, data: Half) -> None:
        from safetensors.numpy import save_file

        save_file({"rows": data}, self.path)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def open(self) -> Gather:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            array = file.get_tensor("rows")

        def gather(rows: Rows, out: Half) -> None:
            torch.index_select(array, 0, torch.from_numpy(rows), out=torch.from_numpy(out))

        return gather


class LMDB(Store):
    readahead = False

    def write(self, data: Half) -> None:
        import lmdb

        with (
            lmdb.open(str(self.path), map_size=3 * data.nbytes + (1 << 24)) as store,
            store.begin(write=True) as txn,
        ):
            pairs = ((row.to_bytes(8, "big"), data[row].tobytes()) for row in range(len(data)))
            txn.cursor().putmulti(pairs, append=True)

    def open(self) -> Gather:
        import lmdb

        self.store = lmdb.open(str(self.path), readonly=True, lock=False, readahead=self.readahead)

        def gather(rows: Rows, out: Half) -> None:
            with self.store.begin(buffers=True) as txn:
                for place, row in enumerate(rows.tolist()):
                    out[place] = np.frombuffer(txn.get(row.to_bytes(8, "big")), np.float16)

        return gather

    def close(self) -> None:
        self.store.close()


class LMDBReadAhead(LMDB):
    """The same file, read as LMDB does unless told otherwise."""

    readahead = True

    @classmethod
    def name(cls) -> str:
        return LMDB.name()


class HDF5(Store):
    limit = SLOW_ROWS

    def write(self, data: Half) -> None:
        import h5py

        with h5py.File(self.path, "w") as file:
            file.create_dataset("rows", data=data)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def open(self) -> Gather:
        import h5py

        self.file = h5py.File(self.path, "r")
        array = self.file["rows"]

        def gather(rows: Rows, out: Half) -> None:
            for place, row in enumerate(rows.tolist()):
                array.read_direct(out, np.s_[row : row + 1], np.s_[place : place + 1])

        return gather

    def close(self) -> None:
        self.file.close()


class PtFiles(Store):
    """One .pt file a row."""

    limit = SLOW_ROWS

    def write(self, data: Half) -> None:
        self.path.mkdir()
        for row, values in enumerate(data):
            torch.save(torch.from_numpy(values.copy()), self.path / f"{row}.pt")

    def open(self) -> Gather:
        def gather(rows: Rows, out: Half) -> None:
            for place, row in enumerate(rows.tolist()):
                out[place] = torch.load(self.path / f"{row}.pt", weights_only=True).numpy()

        return gather


PEERS: dict[str, type[Store]] = {s.name(): s for s in (Memmap, SafeTensors, LMDB, HDF5, PtFiles)}
# Other ways to open the same files, which differ only where these are not in memory yet.
AHEAD = {OURS: (f"{OURS}, read ahead", ReadAhead), "lmdb": ("lmdb, read ahead", LMDBReadAhead)}
MODULES = {"lmdb": "lmdb", "hdf5": "h5py"}


def batches(rows: Rows) -> Iterator[Rows]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


def speed(
    gather: Gather, rows: Rows, buffer: Half, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Rows/s of gathering batch after batch into one buffer."""
    begun = clock()
    for part in batches(rows):
        gather(part, buffer[: len(part)])
    return len(rows) / (clock() - begun)


def sample(num_rows: int, count: int, seed: int, *, ordered: bool) -> Rows:
    """Rows of one pass: a run of them, or some at random."""
    count = min(count, num_rows)
    if ordered:
        first = np.random.default_rng(seed).integers(num_rows - count + 1)
        return np.arange(first, first + count, dtype=np.int64)
    return np.random.default_rng(seed).permutation(num_rows)[:count].astype(np.int64)


class Bench:
    """The stores of one run, and what was measured of each."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        bits = np.random.default_rng(0).integers(0, 0x7C00, (args.rows, args.width), np.uint16)
        self.data: Half = bits.view(np.float16)
        self.buffer: Half = np.zeros((BATCH, args.width), dtype=np.float16)
        self.absent: list[str] = []
        self.stores: dict[str, Store] = {OURS: PromptKD(folder, args.width)}
        for name in args.peers:
            try:
                __import__(MODULES.get(name, "numpy"))
            except ImportError:
                self.absent.append(name)
                continue
            self.stores[name] = PEERS[name](folder, args.width)
        self.found: dict[str, dict[str, float]] = {name: {} for name in self.stores}
        # numpy's fancy indexing into an array in memory, and our gather with a second thread
        self.found |= {"array": {}, TWO: {}}

    def rows_of(self, name: str) -> int:
        limit = self.stores[name].limit if name in self.stores else None
        return min(self.args.rows, limit or self.args.rows)

    def write(self) -> None:
        for name, store in self.stores.items():
            part = self.data[: self.rows_of(name)]
            begun = time.perf_counter()
            store.write(part)
            self.found[name]["write rows/s"] = len(part) / (time.perf_counter() - begun)
            print(f"{name}: written", flush=True)

    def open_times(self) -> None:
        """Milliseconds to open and gather one row; the files' pages are there."""
        one, out = np.zeros(1, dtype=np.int64), self.buffer[:1]
        for name, store in self.stores.items():
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                store.open()(one, out)
                taken.append(1000 * (time.perf_counter() - begun))
                store.close()
            self.found[name]["open ms"] = typical(taken)

    def warm(self) -> None:
        """Rows/s with all pages in memory, all sides in turn."""
        gathers = {name: store.open() for name, store in self.stores.items()}
        two = PromptKD(self.folder, self.args.width)
        two.threads = 2
        gathers |= {TWO: two.open(), "array": self._index}
        for name, gather in gathers.items():
            speed(gather, np.arange(self.rows_of(name), dtype=np.int64), self.buffer)
            out = self.buffer[:64]
            rows = sample(self.rows_of(name), 64, 9, ordered=False)
            gather(rows, out)
            if not np.array_equal(out.view(np.uint16), self.data[rows].view(np.uint16)):
                raise AssertionError(f"{name} gives other rows than were written")
        if self.args.clock == "cpu":  # the processor's time says nothing of two threads
            del gathers[TWO]
        for kind in ("random", "in order"):
            taken: dict[str, list[float]] = {name: [] for name in gathers}
            for turn in range(self.args.rounds):
                for name, gather in gathers.items():
                    rows = self._sample(name, turn, kind)
                    clock = CLOCKS[self.args.clock]
                    taken[name].append(speed(gather, rows, self.buffer, clock))
            for name, values in taken.items():
                self.found[name][f"{kind} warm rows/s"] = statistics.median(values)
        for store in [*self.stores.values(), two]:
            store.close()

    def cold(self) -> None:
        """Rows/s from the disk, checksums compared on ours; each side's files dropped before."""
        stores = dict(self.stores)
        for name, (label, variant) in AHEAD.items():
            if name in self.stores:
                stores[label] = variant(self.folder, self.args.width)
                self.found[label] = {}
        for kind in ("random", "in order"):
            for name, store in stores.items():
                taken = []
                for turn in range(self.args.cold_rounds):
                    with suppress(AttributeError):  # not open yet
                        store.drop()
                    rows = self._sample(name, 100 + turn, kind)
                    taken.append(speed(store.open(), rows, self.buffer))
                    store.close()
                self.found[name][f"{kind} cold rows/s"] = statistics.median(taken)

    def memory(self) -> None:
        """Resident MB of a fresh process after opening and a random pass: its own, and of files."""
        for name, store in self.stores.items():
            task = [name, str(self.folder), str(self.args.width), str(self.rows_of(name))]
            command = [sys.executable, __file__, "--in-child", *task]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            self.found[name] |= json.loads(text)
            store.close()

    def memcpy(self) -> float:
        """GB/s of copying 256 MB, one thread."""
        source = np.ones(1 << 28, dtype=np.uint8)
        target = np.zeros_like(source)
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            np.copyto(target, source)
            taken.append(len(source) / (time.perf_counter() - begun) / 1e9)
        return statistics.median(taken)

    def _index(self, rows: Rows, out: Half) -> None:
        self.data[rows]

    def _sample(self, name: str, turn: int, kind: str) -> Rows:
        slow = self.rows_of(name) < self.args.rows
        count = 2 * BATCH if slow else self.args.sample
        return sample(self.rows_of(name), count, turn, ordered=kind == "in order")


def in_child(name: str, folder: str, width: str, num_rows: str) -> None:
    """Print how much memory a reader takes."""
    stores = {OURS: PromptKD, **PEERS}
    store = stores[name](Path(folder), int(width))
    buffer = np.zeros((BATCH, int(width)), dtype=np.float16)
    before = {kind: status_bytes(kind) for kind in ("RssAnon", "RssFile")}

    def grown(kind: str) -> float:
        return (status_bytes(kind) - before[kind]) / 1e6

    gather = store.open()
    speed(gather, sample(int(num_rows), 20 * BATCH, 0, ordered=False), buffer)
    found = {"own MB": grown("RssAnon"), "files MB": grown("RssFile")}
    if isinstance(store, PromptKD) and store.cache is not None:
        store.cache.release(0)
        found["files MB, released"] = grown("RssFile")
    print(json.dumps(found))


def judge(bench: Bench) -> list[Row]:
    """The rows with targets."""
    found = bench.found
    ours, two, array = found[OURS], found[TWO], found["array"]
    key = "random warm rows/s"
    rows = [
        Row("random, warm, 1 thread (numpy array in memory)", ours[key], array[key], "rows/s", 0.7),
        Row("opening (20 ms allowed)", ours["open ms"], 20.0, "ms", 1.0),
    ]
    wall = bench.args.clock == "wall"
    if wall:
        name = "random, warm, 2 threads (ours, 1 thread)"
        rows.append(Row(name, two[key], ours[key], "rows/s", 1.6))
    for name, (label, _) in AHEAD.items():
        for kind in ("random", "in order") if name in bench.stores else ():
            what = f"{kind} cold rows/s"
            ahead = found[AHEAD[OURS][0]][what]
            rows.append(
                Row(f"{kind} cold, read ahead ({name})", ahead, found[name][what], "rows/s")
            )
            if name != OURS:
                theirs = found[label][what]
                rows.append(Row(f"{kind} cold, read ahead ({label})", ahead, theirs, "rows/s"))
    for name in bench.stores:
        if name == OURS:
            continue
        theirs = found[name]
        if wall:
            label = f"random, warm, 2 threads ({name})"
            rows.append(Row(label, two[key], theirs[key], "rows/s", 3.0))
        for what in ("random warm", "random cold", "in order warm", "in order cold", "write"):
            kind = f"{what} rows/s"
            rows.append(Row(f"{what} ({name})", ours[kind], theirs[kind], "rows/s"))
    return rows


def table(bench: Bench, memcpy: float) -> str:
    """All that was measured, in Markdown."""
    speeds = [
        "write rows/s",
        "random warm rows/s",
        "in order warm rows/s",
        "random cold rows/s",
        "in order cold rows/s",
    ]
    heads = ["", "rows", *speeds, "random warm GB/s (of memcpy)", "open ms", "own + files MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    row_bytes = 2 * bench.args.width
    for name, values in bench.found.items():
        cells = [f"{values[s]:,.0f}" if s in values else "" for s in speeds]
        rate = values.get("random warm rows/s", 0.0) * row_bytes / 1e9
        cells.append(f"{rate:.2f} ({rate / memcpy:.0%})" if rate else "")
        cells.append(f"{values['open ms']:.1f}" if "open ms" in values else "")
        memory = f"{values['own MB']:.0f} + {values['files MB']:.0f}" if "own MB" in values else ""
        if "files MB, released" in values:
            memory += f" ({values['files MB, released']:.0f} after release)"
        name_of = "numpy array in memory" if name == "array" else name
        lines.append(f"| {name_of} | {bench.rows_of(name):,} | {' | '.join([*cells, memory])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sample", type=int, default=200_000, help="rows gathered in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: warm gathers by one thread on a busy machine",
    )
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary one")
    parser.add_argument("--output", type=Path, help="default: results/cache.json")
    parser.add_argument("--in-child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_child:
        in_child(*args.in_child)
        return
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-cache-", dir=args.folder))
    try:
        bench = Bench(args, folder)
        bench.write()
        bench.open_times()
        bench.warm()
        bench.memory()
        bench.cold()
        memcpy = bench.memcpy()
    finally:
        shutil.rmtree(folder)
    if bench.absent:
        print(f"not installed (pip install --group bench): {', '.join(bench.absent)}")
    shown = table(bench, memcpy)
    print(f"memcpy: {memcpy:.1f} GB/s\n\n{shown}\n")
    more = {
        "memcpy_gb_s": memcpy,
        "num_rows": args.rows,
        "clock": args.clock,
        "stores": bench.found,
    }
    print(report("cache", judge(bench), output=args.output, **more, absent=bench.absent))


@pytest.mark.parametrize("threads", [1, 2])
def test_gather(benchmark: Any, threads: int, tmp_path: Path) -> None:
    """4096 random rows of 100,000 x 768 half."""
    store = PromptKD(tmp_path, 768)
    store.threads = threads
    store.write(np.zeros((100_000, 768), dtype=np.float16))
    gather, out = store.open(), np.zeros((BATCH, 768), dtype=np.float16)
    rows = sample(100_000, BATCH, 0, ordered=False)
    benchmark.group = "gather"
    benchmark(gather, rows, out)


if __name__ == "__main__":
    main()
