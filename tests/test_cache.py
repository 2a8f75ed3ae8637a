"""The teacher cache: what it gives back, and that it is never silently wrong."""

import json
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import promptkd
import pytest
import torch
from promptkd import DistillConfig, Student, Teacher
from promptkd.cache import (
    FeatureCache,
    build_cache,
    extend_cache,
    merge_caches,
    verify_cache,
)
from promptkd.cache.layout import WHOLE
from promptkd.clip import load_clip
from promptkd.data.sources import unlabelled
from promptkd.errors import CheckpointError, DataError
from promptkd.loss import TeacherLogits, TeacherStatistics, kd_loss
from promptkd.stages.progress import Progress
from promptkd.teacher import zero_shot_teacher
from safetensors import safe_open
from tiny import CLASSES, Models, make_photos

QUIET = Progress(quiet=True)
TEMPLATES = ("a photo of a {}.",)
CONFIG = DistillConfig(
    epochs=3, min_steps=0, batch_size=8, warmup_steps=2, views=2, holdout=0.1, seed=3
)


@pytest.fixture(scope="module")
def teacher(models: Models) -> Teacher:
    return zero_shot_teacher(load_clip(models.teacher), CLASSES, TEMPLATES)


@pytest.fixture(scope="module")
def built(teacher: Teacher, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 cache of two views with the seed of CONFIG; tests don't touch it."""
    path = tmp_path_factory.mktemp("built") / "cache"
    build_cache(teacher, photos, path, views=2, seed=3, dtype="float32", content="features")
    return path


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def contents(path: Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def distilled(models: Models, photos: Path, teacher: object, cache: Path | None) -> Student:
    return promptkd.distill(
        photos, teacher=teacher, student=models.student, cache=cache, config=CONFIG, progress=QUIET
    )


def trained(student: Student) -> list[torch.Tensor]:
    return [*student.prompts.parameters(), *student.projector.state_dict().values()]


# --- the same student


def test_online_and_cached_give_the_same_bits(
    models: Models, photos: Path, teacher: Teacher, built: Path
) -> None:
    online = distilled(models, photos, teacher, None)
    cached = distilled(models, photos, teacher, built)
    assert all(torch.equal(a, b) for a, b in zip(trained(online), trained(cached), strict=True))
    assert cached.info.teacher_fingerprint == online.info.teacher_fingerprint
    assert cached.info.summary["after"] == pytest.approx(online.info.summary["after"], rel=1e-4)
    found, wanted = (s.info.summary["teacher_report"] for s in (cached, online))
    assert found == wanted


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-12)])
def test_fresh_views_and_as_many_cached_ones_agree(
    precision: str, tolerance: float, models: Models, photos: Path, tmp_path: Path
) -> None:
    """The online teacher sees batches of the training, the cached one its own."""
    guide = zero_shot_teacher(load_clip(models.teacher, precision=precision), CLASSES, TEMPLATES)
    dtype = {"fp32": "float32", "fp64": "float64"}[precision]
    build_cache(guide, photos, tmp_path / "c", views=3, seed=3, dtype=dtype, content="features")
    # AdamW would blow up rounding: the bias before BatchNorm has no gradient but that.
    config = replace(CONFIG, views=0, optimizer="sgd", precision=precision)  # type: ignore[arg-type]
    online, cached = (
        promptkd.distill(
            photos,
            teacher=guide,
            student=models.student,
            cache=path,
            config=config,
            progress=QUIET,
        )
        for path in (None, tmp_path / "c")
    )
    for mine, other in zip(trained(online), trained(cached), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_one_view_at_a_time_is_kept_in_memory(
    models: Models, photos: Path, teacher: Teacher, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    for name in ("read_ahead", "release"):
        real = getattr(FeatureCache, name)

        def watched(cache: FeatureCache, view: int, name: str = name, real: object = real) -> None:
            calls.append((name, view))
            real(cache, view)  # type: ignore[operator]

        monkeypatch.setattr(FeatureCache, name, watched)
    distilled(models, photos, teacher, built)
    assert [view for name, view in calls if name == "read_ahead"] == [0, 1, 0]
    assert [view for name, view in calls if name == "release"] == [0, 1]
    calls.clear()
    monkeypatch.setattr("promptkd.stages.cached._memory_bytes", lambda: 2 * 5000)
    distilled(models, photos, teacher, built)
    assert {name for name, _ in calls} == {"release"}


def test_distill_builds_the_cache_and_then_needs_no_teacher(
    models: Models, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Student:
        return promptkd.distill(
            photos,
            CLASSES,
            teacher=models.teacher,
            student=models.student,
            cache=tmp_path / "cache",
            config=CONFIG,
            progress=QUIET,
        )

    first = run()
    loaded: list[str] = []

    def watch(model: str, **keywords: object) -> object:
        loaded.append(model)
        return load_clip(model, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr("promptkd.stages.distill.load_clip", watch)
    second = run()
    assert loaded == [models.student]
    assert all(torch.equal(a, b) for a, b in zip(trained(first), trained(second), strict=True))


@pytest.mark.parametrize("content", ["statistics", "logits"])
def test_other_contents_give_the_same_loss(
    content: str, teacher: Teacher, photos: Path, built: Path, tmp_path: Path
) -> None:
    other = build_cache(
        teacher,
        photos,
        tmp_path / "c",
        views=1,
        seed=3,
        content=content,  # type: ignore[arg-type]
        dtype="float32",
        temperature=2.0,
    )
    rows = np.arange(9, dtype=np.int64)
    vectors = teacher.class_vectors - teacher.class_vectors.mean(dim=0)
    student = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))

    def loss(answers: torch.Tensor | TeacherStatistics | TeacherLogits) -> torch.Tensor:
        return kd_loss(
            student,
            answers,
            vectors,
            student_scale=9.0,
            teacher_scale=teacher.logit_scale if isinstance(answers, torch.Tensor) else None,
            temperature=2.0,
        )

    features = FeatureCache.open(built).answers(0, rows, torch.float32)
    torch.testing.assert_close(loss(other.answers(0, rows, torch.float32)), loss(features))


# --- what is stored


def test_rows_are_the_teachers_answers(teacher: Teacher, photos: Path, built: Path) -> None:
    from promptkd.data.loader import CropRecipe, ViewLoader, load_whole

    cache = FeatureCache.open(built)
    images = unlabelled(photos)
    loader = ViewLoader(
        images, [teacher.preprocess], CropRecipe(scale=(0.5, 1.0)), seed=3, orient=True
    )
    rows = cache.rows_of(images)
    pixels = loader.load([5, 30], 1)[0][0]
    expected = teacher.encode_image(teacher.preprocess.normalize(pixels))
    torch.testing.assert_close(cache.read("features", 1, rows[[5, 30]]), expected)
    [whole], _ = load_whole(images.paths[7:8], [teacher.preprocess], orient=True)
    expected = teacher.encode_image(teacher.preprocess.normalize(whole))
    torch.testing.assert_close(cache.read("features", WHOLE, rows[[7]]), expected)
    with safe_open(built / "view-001/shard-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("features"), cache.read("features", 1))
    out = torch.empty(2, 40)
    cache.read_into(out, "features", 1, np.array([3, 3]))
    assert torch.equal(out[0], cache.read("features", 1)[3])


def test_threads_gather_the_same_rows_and_a_forked_process_too(built: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 36, 20_000)  # 3.2 MB, enough for a helper
    expected = FeatureCache.open(built).read("features", 0)[torch.from_numpy(rows)]

    def right(threads: int) -> bool:
        found = FeatureCache.open(built, threads=threads).read("features", 0, rows)
        return bool((found.numpy() == expected.numpy()).all())

    assert all(right(threads) for threads in (1, 2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are threads is the point
        child = os.fork()
    if child == 0:
        os._exit(0 if right(2) else 1)
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for threads that it does not have")
    assert status == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_a_released_view_is_mapped_no_more(cache: Path) -> None:
    def mapped() -> list[bool]:
        text = Path("/proc/self/maps").read_text(encoding="utf-8")
        return [f"{cache}/view-{view:03}/" in text for view in range(2)]

    opened = FeatureCache.open(cache)
    first = [opened.read("features", view) for view in range(2)]
    assert mapped() == [True, True]
    opened.release(0)
    assert mapped() == [False, True]
    opened.release(0)
    assert torch.equal(opened.read("features", 0), first[0])


def test_half_precision_and_order_of_the_list(
    teacher: Teacher, photos: Path, built: Path, tmp_path: Path
) -> None:
    images = unlabelled(photos)
    mixed = images.select([7, 3, 3, 35, *range(36)])
    half = build_cache(teacher, mixed, tmp_path / "c", views=1, seed=3, content="features")
    full = FeatureCache.open(built)
    assert half.num_images == 36
    rows = half.rows_of(mixed)
    assert rows[:4].tolist() == [7, 3, 3, 35]
    torch.testing.assert_close(half.read("features", 0), full.read("features", 0).half())


def test_failed_pictures_are_marked_and_left_out(
    models: Models, photos: Path, teacher: Teacher, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(photos, tmp_path / "photos"))
    bad = copy / CLASSES[1] / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    cache = build_cache(teacher, copy, tmp_path / "c", views=2, seed=3)
    names = unlabelled(copy).names
    flags = cache.failed(0)
    assert [names[r] for r in np.flatnonzero(flags)] == [f"{CLASSES[1]}/03.jpg"]
    assert cache.read("features", 0)[torch.from_numpy(flags)].isnan().all()
    student = distilled(models, copy, teacher, tmp_path / "c")
    assert all(t.isfinite().all() for t in trained(student))
    for path in sorted(copy.rglob("*.jpg"))[:4]:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="of 36 pictures can't be read"):
        build_cache(teacher, copy, tmp_path / "d", views=1)


# --- many writers, more of everything


def test_parts_and_extensions_end_with_the_same_bytes(teacher: Teacher, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 24)
    keywords: dict[str, object] = {"seed": 1, "shard_rows": 64}
    whole = build_cache(teacher, photos, tmp_path / "whole", views=2, **keywords)  # type: ignore[arg-type]
    expected = contents(whole.path)
    for i in range(2):
        build_cache(teacher, photos, tmp_path / f"p{i}", views=2, part=(i, 2), **keywords)  # type: ignore[arg-type]
    assert len(FeatureCache.open(tmp_path / "p0").missing()) == 3
    merged = merge_caches([tmp_path / "p0", tmp_path / "p1"], tmp_path / "merged")
    assert contents(merged.path) == expected
    build_cache(teacher, photos, tmp_path / "grown", views=1, **keywords)  # type: ignore[arg-type]
    extend_cache(teacher, photos, tmp_path / "grown", views=2)
    assert contents(tmp_path / "grown") == expected
    with pytest.raises(CheckpointError, match="has 2 views already"):
        extend_cache(teacher, photos, tmp_path / "grown", views=1)


def test_new_pictures_leave_the_old_shards_alone(
    teacher: Teacher, photos: Path, cache: Path, tmp_path: Path
) -> None:
    before = contents(cache)
    more = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copy(more / CLASSES[0] / "01.jpg", more / CLASSES[0] / "00a.jpg")
    with pytest.raises(CheckpointError, match="add new ones with 'promptkd cache extend'"):
        build_cache(teacher, more, cache, views=2, seed=3, dtype="float32")
    with pytest.raises(CheckpointError, match=r"'red_thing/00a\.jpg' is not among its 36"):
        FeatureCache.open(cache).rows_of(unlabelled(more))
    grown = extend_cache(teacher, more, cache)
    after = contents(cache)
    assert all(after[name] == before[name] for name in before if name != "cache.json")
    assert grown.num_images == 37
    assert grown.rows_of(unlabelled(more)).tolist() == [*range(25), 36, *range(25, 36)]
    assert verify_cache(grown, images=more, teacher=teacher).problems == ()
    with pytest.raises(CheckpointError, match="which is not among the pictures now"):
        extend_cache(teacher, photos, cache)


# --- damage


def flipped(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << place % 8)]))


def test_any_flipped_byte_is_found(cache: Path) -> None:
    """Every byte of a shard: by `verify`, and by whoever reads all of it with checks on."""
    from promptkd import _rust

    path = cache / "view-001/shard-00000.safetensors"
    _, tensors = _rust.inspect_shard(path)
    rows = np.arange(36, dtype=np.int64)

    def read_all() -> None:
        reader = _rust.CacheReader([path], [0, 36], {})
        for name, _, shape in tensors:
            if name == "names":
                _rust.read_tensor(path, name)
                continue
            item = {"failed": 1, "features": 4}.get(name, 8)
            reader.gather(name, rows, np.empty(item * int(np.prod(shape)), dtype=np.uint8))

    read_all()
    for place in range(path.stat().st_size):
        flipped(path, place)
        with suppress(ValueError):
            assert _rust.verify_shard(path), place
        with pytest.raises(ValueError, match="damaged"):
            read_all()
        flipped(path, place)
    assert verify_cache(FeatureCache.open(cache)).problems == ()
    flipped(path, path.stat().st_size // 2)
    problems = verify_cache(FeatureCache.open(cache)).problems
    assert len(problems) == 1
    assert "view-001/shard-00000.safetensors': block 0 (rows" in problems[0]
    with pytest.raises(CheckpointError, match="damaged: block 0"):
        FeatureCache.open(cache).read("features", 1)
    FeatureCache.open(cache).read("features", 0)


def test_missing_shard_and_manifest(teacher: Teacher, photos: Path, cache: Path) -> None:
    before = contents(cache)
    manifest = cache / "cache.json"
    for text in (None, before["cache.json"][:50], b"[]", before["cache.json"].replace(b"3", b"4")):
        manifest.unlink(missing_ok=True)
        if text is not None:
            manifest.write_bytes(text)
        assert FeatureCache.open(cache).manifest.num_views == 2
        assert FeatureCache.open(cache).missing() == []
    shard = cache / "view-000/shard-00000.safetensors"
    shard.unlink()
    opened = FeatureCache.open(cache)
    assert opened.missing() == ["view-000/shard-00000.safetensors"]
    with pytest.raises(CheckpointError, match=r"view-000/shard-00000\.safetensors': there is no"):
        opened.read("features", 0)
    opened.read("features", 1)
    shutil.copy(cache / "view-001/shard-00000.safetensors", shard)
    with pytest.raises(CheckpointError, match="it belongs elsewhere: its view is 1, not 0"):
        FeatureCache.open(cache).read("features", 0)
    (cache / "teacher.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="promptkd cache build"):
        opened.teacher()
    build_cache(teacher, photos, cache, views=2, seed=3, dtype="float32")
    assert contents(cache) == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk does to the writer: no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_is_there(teacher: Teacher, photos: Path, cache: Path) -> None:
    before = contents(cache)
    (cache / "view-001/shard-00000.safetensors").unlink()
    with (
        largest_file(4096),
        pytest.raises(CheckpointError, match=r"can't be written.*stays good, and the next build"),
    ):
        build_cache(teacher, photos, cache, views=2, seed=3, dtype="float32")
    assert set(before) - set(contents(cache)) == {"view-001/shard-00000.safetensors"}
    build_cache(teacher, photos, cache, views=2, seed=3, dtype="float32")
    assert contents(cache) == before


def test_a_place_that_cannot_be_written(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    place = Path("/proc/promptkd") if os.geteuid() == 0 else tmp_path / "locked" / "cache"
    if os.geteuid() != 0:
        place.parent.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=f"cache '{place}' can't be written"):
        build_cache(teacher, photos, place, views=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else for a while")
def test_a_read_only_cache_can_be_read(models: Models, photos: Path, built: Path) -> None:
    """As a user who may not write: reading and distilling go on, building says so."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        cache = Path(shutil.copytree(built, place / "cache"))
        pictures = Path(shutil.copytree(photos, place / "photos"))
        folder = Path(models.teacher.removeprefix("local-dir:")).parent
        there = Path(shutil.copytree(folder, place / "models"))
        teacher = zero_shot_teacher(load_clip(f"local-dir:{there}/teacher"), CLASSES, TEMPLATES)
        for path in (place, *place.rglob("*")):
            path.chmod(0o555)
        before = contents(cache)
        os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=f"cache '{cache}' can't be written"):
                build_cache(teacher, pictures, cache, views=3, seed=3, dtype="float32")
            assert not FeatureCache.open(cache).read("features", 1).isnan().any()
            assert verify_cache(FeatureCache.open(cache)).problems == ()
            student = promptkd.distill(
                pictures,
                teacher=teacher,
                student=f"local-dir:{there}/student",
                cache=cache,
                config=replace(CONFIG, max_steps=2),
                progress=QUIET,
            )
        finally:
            os.seteuid(0)
        assert student.info.summary["steps"] == 2
        assert contents(cache) == before


# --- stale and foreign caches


def test_a_changed_teacher_is_refused(
    models: Models, photos: Path, teacher: Teacher, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models.teacher.removeprefix("local-dir:"), tmp_path / "model"))
    name = f"local-dir:{folder}"
    other = zero_shot_teacher(load_clip(name), CLASSES, TEMPLATES)
    build_cache(other, photos, tmp_path / "c", views=2, seed=3, dtype="float32")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1
    save_file(weights, folder / "open_clip_model.safetensors")
    changed = zero_shot_teacher(load_clip(name), CLASSES, TEMPLATES)
    message = "its teacher's image side is [0-9a-f]{8}…, not [0-9a-f]{8}…"
    before = contents(cache)
    with pytest.raises(CheckpointError, match=message):
        build_cache(changed, photos, cache, views=2, seed=3, dtype="float32")
    with pytest.raises(CheckpointError, match=message):
        distilled(models, photos, changed, cache)
    with pytest.raises(CheckpointError, match=message):
        promptkd.distill(
            photos,
            CLASSES,
            teacher=name,
            student=models.student,
            cache=tmp_path / "c",
            config=CONFIG,
            progress=QUIET,
        )
    assert contents(cache) == before
    problems = verify_cache(FeatureCache.open(cache), images=photos, teacher=changed).problems
    assert "this teacher gives other features" in problems[0]


def test_a_class_more(
    models: Models, photos: Path, teacher: Teacher, built: Path, tmp_path: Path
) -> None:
    """Features serve any class names; statistics are refused."""
    wider = zero_shot_teacher(teacher.clip, [*CLASSES, "a fourth thing"], TEMPLATES)
    student = distilled(models, photos, wider, built)
    assert student.class_names == wider.class_names
    online = distilled(models, photos, wider, None)
    assert all(torch.equal(a, b) for a, b in zip(trained(online), trained(student), strict=True))
    build_cache(teacher, photos, tmp_path / "c", views=2, seed=3, content="statistics")
    with pytest.raises(CheckpointError, match="its teacher's class vectors is"):
        distilled(models, photos, wider, tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": (0.08, 1.0)}, "was built for crop_scale"),
        ({"temperature": 2.0}, None),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, object],
    message: str | None,
    models: Models,
    photos: Path,
    teacher: Teacher,
    built: Path,
) -> None:
    config = replace(CONFIG, max_steps=2, **changes)  # type: ignore[arg-type]

    def run() -> Student:
        return promptkd.distill(
            photos,
            teacher=teacher,
            student=models.student,
            cache=built,
            config=config,
            progress=QUIET,
        )

    if message is None:
        assert run().info.summary["steps"] == 2
    else:
        with pytest.raises(CheckpointError, match=message):
            run()


def _same_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(("change", "error"), [(_same_size, DataError), (_longer, CheckpointError)])
def test_a_changed_picture_is_refused(
    change: Callable[[Path], None],
    error: type[Exception],
    models: Models,
    photos: Path,
    teacher: Teacher,
    cache: Path,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(photos, tmp_path / "photos"))
    change(copy / CLASSES[2] / "05.jpg")
    with pytest.raises(error, match=r"05\.jpg' has changed since cache"):
        distilled(models, copy, teacher, cache)
    if change is _same_size:
        problems = verify_cache(FeatureCache.open(cache), images=copy).problems
        assert problems == ("picture 'blue thing/05.jpg' has changed since the cache was built",)


def test_recipe_is_in_every_shard(built: Path) -> None:
    with safe_open(built / "view-000/shard-00000.safetensors", "np") as file:
        metadata = file.metadata()
        names = json.loads(file.get_tensor("names").tobytes())
    assert json.loads(metadata["recipe"])["seed"] == 3
    assert len(names) == 36
