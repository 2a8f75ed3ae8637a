"""One's own data in every form, through both stages, the cache and the evaluation; and bad input."""

import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from promptkd import DistillConfig, Student, TeachConfig, build_cache, distill, teach
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.data.pictures import read_pictures
from promptkd.data.shards import expand
from promptkd.data.sources import labelled, unlabelled
from promptkd.doctor.data import look_at_data
from promptkd.errors import DataError, ImageError
from promptkd.stages.distill import new_student
from promptkd.stages.progress import Progress
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models
from torch.utils.data import Dataset, IterableDataset, Subset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their imports say is not about us
    import datasets
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

QUIET = Progress(quiet=True)
NUMBERS = {name: place for place, name in enumerate(CLASSES)}
Item = tuple[Path, str]


class Photos(Dataset):
    """A map-style dataset of (Pillow image, label), as torchvision's own."""

    def __init__(self, items: list[Item], form: Callable[[Image.Image], Any] = lambda i: i) -> None:
        self.items, self.form = items, form

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, name = self.items[index]
        with Image.open(path) as image:
            return self.form(image.convert("RGB")), NUMBERS[name]


@pytest.fixture(scope="module")
def items(photos: Path) -> list[Item]:
    return [(photos / n, n.split("/")[0]) for n in unlabelled(photos).names]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, items: list[Item]) -> list[str]:
    """Three shards whose samples have the same names, with labels of three kinds."""
    folder.mkdir()
    kinds: list[Callable[[str], tuple[str, str]]] = [
        lambda name: ("cls", str(NUMBERS[name])),
        lambda name: ("json", json.dumps({"label": name, "caption": "a thing"})),
        lambda name: ("txt", f"{name}\n"),
    ]
    paths = []
    for shard, kind in enumerate(kinds):
        members = []
        for number, (path, name) in enumerate(items[shard::3]):
            ending, text = kind(name)
            members += [(f"{number:03}{path.suffix}", path.read_bytes())]
            members += [(f"{number:03}.{ending}", text.encode())]
        paths.append(str(write_tar(folder / f"photos-{shard:03}.tar", members)))
    return paths


def write_parquet(path: Path, items: list[Item]) -> Path:
    """A list; its pictures lie beside it."""
    for number, (file, _) in enumerate(items):
        (path.parent / "files").mkdir(exist_ok=True)
        shutil.copyfile(file, path.parent / "files" / f"{number:03}{file.suffix}")
    paths = [f"files/{n:03}{file.suffix}" for n, (file, _) in enumerate(items)]
    table = pyarrow.table({"path": paths, "label": [name for _, name in items]})
    pyarrow.parquet.write_table(table, path)
    return path


def hugging_face(items: list[Item]) -> Any:
    columns = {"id": list(range(len(items))), "image": [str(path) for path, _ in items]}
    columns["label"] = [NUMBERS[name] for _, name in items]
    feature = datasets.ClassLabel(names=list(CLASSES))
    kinds = {"id": datasets.Value("int64"), "image": datasets.Image(), "label": feature}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


FORMS: dict[str, Callable[[Path, list[Item]], Any]] = {
    "parquet": lambda place, items: write_parquet(place / "list.parquet", items),
    "shards": lambda place, items: write_shards(place / "shards", items),
    "pattern": lambda place, items: (
        write_shards(place / "shards", items) and f"{place}/shards/*-{{000..002}}.tar"
    ),
    "folder of shards": lambda place, items: Path(write_shards(place / "s", items)[0]).parent,
    "hugging face": lambda _, items: hugging_face(items),
    "its parts": lambda _, items: datasets.DatasetDict(
        {"train": hugging_face(items), "validation": hugging_face(items[:5]),
         "test": hugging_face(items)}
    ),
    "image folder": lambda _, items: ImageFolder(items[0][0].parents[1], transform=ToTensor()),
    "map style": lambda _, items: Photos(items),
    "subset": lambda _, items: Subset(Photos(items[::-1]), list(range(len(items)))[::-1]),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(models: Models, photos: Path) -> Student:
    """A student of the folder, which all forms are measured with."""
    teacher = teach(photos, CLASSES, model=models.teacher, config=TEACH, progress=QUIET)
    return distill(
        photos, teacher=teacher, student=models.student, config=DISTILL, progress=QUIET
    )  # fmt: skip


TEACH = TeachConfig(max_steps=2, shots=2, templates=("a photo of a {}.",))
DISTILL = DistillConfig(epochs=2, min_steps=0, batch_size=12, views=2)


@pytest.mark.parametrize("form", FORMS)
def test_through_both_stages(
    form: str,
    models: Models,
    photos: Path,
    items: list[Item],
    reference: Student,
    tmp_path: Path,
) -> None:
    """The same pictures and labels as in the folder, and every verb that takes them."""
    source = FORMS[form](tmp_path, items)
    found = labelled(source, CLASSES)
    assert found.labels is not None
    assert len(set(found.names)) == len(items)
    assert sorted(CLASSES[y] for y in found.labels) == sorted(name for _, name in items)
    # Per class and calibration too: pictures and labels belong together, pixel for pixel.
    assert reference.evaluate(source) == reference.evaluate(photos)

    teacher = teach(source, CLASSES, model=models.teacher, config=TEACH, progress=QUIET)
    cache = build_cache(teacher, source, tmp_path / "cache", views=2, seed=1)
    assert cache.manifest.num_images == len(items)
    student = distill(
        source,
        teacher=teacher,
        student=models.student,
        cache=tmp_path / "cache",
        validation=source if form == "subset" else None,
        output=tmp_path / "student",
        config=DISTILL,
        progress=QUIET,
    )
    assert student.info.summary["num_images"] == len(items) - 2
    assert student.info.summary["unreadable"] == []
    assert student.evaluate(source).num_images == len(items)
    report = look_at_data(unlabelled(source), 48, labelled=found, test=unlabelled(photos))
    assert report.corrupt == ()
    assert report.median_side == look_at_data(unlabelled(photos), 48).median_side


def test_views_of_a_picture_are_the_same_live_and_from_the_cache(
    models: Models, items: list[Item], tmp_path: Path
) -> None:
    """Rows of a dataset, fetched by the teacher, the cache and the student."""
    source = Photos(items)
    teacher = teach(source, CLASSES, model=models.teacher, config=TEACH, progress=QUIET)
    students = [
        distill(source, teacher=teacher, student=models.student, config=DISTILL, progress=QUIET,
                cache=cache)
        for cache in (None, tmp_path / "cache")
    ]  # fmt: skip
    live, cached = (student.logits([path for path, _ in items]) for student in students)
    assert torch.allclose(live, cached, atol=5e-2)


def test_by_command(
    models: Models,
    items: list[Item],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(tmp_path / "shards", items)
    write_parquet(tmp_path / "list.parquet", items)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    shards, table = f"{tmp_path}/shards/*.tar", str(tmp_path / "list.parquet")
    common = ["--max-steps", "2", "--quiet", "--json"]
    teaching = ["--shots", "2", "--templates", "a photo of a {}.", "--model", models.teacher]
    pupil = ["--student", models.student, "--batch-size", "12", "--include-backbone"]
    calls = [
        ["teach", shards, "--classes", f"{tmp_path}/names.txt", "--output", f"{tmp_path}/t",
         *teaching, *common],
        ["cache", "build", shards, "--teacher", f"{tmp_path}/t", "--output", f"{tmp_path}/c",
         "--views", "1", "--quiet"],
        ["distill", shards, "--teacher", f"{tmp_path}/t", "--cache", f"{tmp_path}/c",
         "--output", f"{tmp_path}/s", *pupil, *common],
        ["distill", table, "--teacher", models.teacher, "--labelled", table,
         "--output", f"{tmp_path}/s2", "--teach.max-steps", "2", "--teach.shots", "2",
         "--teach.templates", "a photo of a {}.", *pupil, *common],
        ["evaluate", f"{tmp_path}/s", table, "--json"],
        ["evaluate", f"{tmp_path}/s2", shards, "--json"],
    ]  # fmt: skip
    for call in calls:
        code, shown = main(call), capsys.readouterr()
        assert code == 0 or "less than before distilling" in shown.err, shown.err
    assert json.loads(shown.out)["num_images"] == len(items)


def test_predicting_takes_shards_lists_and_patterns(
    items: list[Item],
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same answers as for the files, each picture under a name of its own."""
    shards = write_shards(tmp_path / "shards", items)
    table = write_parquet(tmp_path / "list.parquet", items)
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path, _ in items))
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    student = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    folder = str(student.eval().save(tmp_path / "student", include_backbone=True))
    files = [str(path) for path, _ in items]
    expected = {found.path: found.labels for found in student.iter_predict(files)}
    in_shards = [file for shard in range(3) for file in files[shard::3]]
    copies = sorted(str(path) for path in (tmp_path / "files").iterdir())
    cases: list[tuple[list[str], list[str]]] = [
        (shards, in_shards),
        ([f"{tmp_path}/shards/photos-{{000..002}}.tar"], in_shards),
        ([f"{tmp_path}/shards/*.tar"], in_shards),
        ([f"{tmp_path}/shards"], in_shards),
        ([str(table)], files),
        ([str(tmp_path / "list.txt"), shards[0], files[3]], [*files, *files[::3], files[3]]),
        ([f"{tmp_path}/files/*"], [files[int(Path(copy).stem)] for copy in copies]),
    ]
    for places, truth in cases:
        output = str(tmp_path / "p.jsonl")
        assert main(["predict", folder, *places, "--output", output]) == 0, capsys.readouterr().err
        rows = [json.loads(line) for line in Path(output).read_text().splitlines()]
        assert [tuple(row["labels"]) for row in rows] == [expected[file] for file in truth]
        if len(places) == 1:
            assert len({row["path"] for row in rows}) == len(items)
    one = student.predict(shards[0])
    assert isinstance(one, list)
    assert one[1].path == f"{shards[0]}/001"
    assert student.logits(shards[0]).shape == (len(items[::3]), len(CLASSES))
    capsys.readouterr()
    for places, message in (
        ([f"{tmp_path}/none/*.tar"], "no file has a name like"),
        ([f"{tmp_path}/none.tar"], "none.tar"),
        ([f"{tmp_path}/none.jpg"], "none.jpg"),
    ):
        assert main(["predict", folder, *places]) == 1
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- numbers and names
def test_numbers_are_places_in_the_class_names(items: list[Item], tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    rows = [f"{file},{NUMBERS[name]}" for file, name in items]
    path.write_text("\n".join(["path,label", *rows]))
    by_number = labelled(path, CLASSES)
    assert by_number.labels is not None
    assert by_number.labels.tolist() == [NUMBERS[name] for _, name in items]
    assert labelled(path).class_names == ("0", "1", "2"), "without names they are the names"
    with pytest.raises(DataError, match=r"is 2, but there are 2 class names, from 0"):
        labelled(path, CLASSES[:2])
    shard = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    with pytest.raises(DataError, match="are numbers; give the class names"):
        labelled(shard)


def test_names_of_a_dataset_come_with_it(items: list[Item]) -> None:
    assert labelled(hugging_face(items)).class_names == CLASSES
    folder = ImageFolder(items[0][0].parents[1])
    assert labelled(folder).class_names == tuple(sorted(CLASSES))
    assert labelled(folder).names == labelled(items[0][0].parents[1]).names
    other = (*reversed(CLASSES), "another")
    found = labelled(hugging_face(items), other)
    assert found.labels is not None
    assert [other[y] for y in found.labels] == [name for _, name in items]
    with pytest.raises(DataError, match="not among the 1 class names: 'blue thing'"):
        labelled(folder, ["red thing"])
    texts = hugging_face(items).cast_column("label", datasets.Value("string"))
    assert labelled(texts, CLASSES).labels is not None


def test_lists_of_datasets_are_told_apart(items: list[Item]) -> None:
    one, two = hugging_face(items[:5]), hugging_face(items[5:10])
    assert unlabelled(one).names == unlabelled(two).names
    assert unlabelled(one).digest() != unlabelled(two).digest()
    assert unlabelled(one).select([1]).origin == unlabelled(one).origin


def test_files_of_a_dataset_keep_their_bytes(items: list[Item]) -> None:
    """The JPEG itself reaches the decoder, not its pixels; formats set by the user don't matter."""
    source = hugging_face(items[:3]).with_format("torch")
    files, _, reasons = read_pictures(unlabelled(source).paths)
    assert files == [path.read_bytes() for path, _ in items[:3]]
    assert reasons == {}


def test_patterns(tmp_path: Path) -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{b,a}/x{1..2}.tar") == ["b/x1.tar", "b/x2.tar", "a/x1.tar", "a/x2.tar"]
    for name in ("2.jpg", "1.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert unlabelled(f"{tmp_path}/*.jpg").names == ("1.jpg", "2.jpg")


# ---------------------------------------------------------------- bad input
def bad(source: Any, message: str, *, labels: bool = False) -> None:
    with pytest.raises(DataError, match=message):
        labelled(source, CLASSES) if labels else unlabelled(source)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"

    def write(**columns: list[Any]) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    write(file=["a.jpg"], label=["x"])
    bad(path, r"list\.parquet': no column 'path' among file, label")
    write(path=["gone.jpg"])
    bad(path, r"gone\.jpg' is in the list but is no file \(row 0 of '.*list\.parquet'\)")
    write(path=["list.parquet", None])
    bad(path, r"row 1 of '.*list\.parquet' has no path")
    write(path=["list.parquet"])
    bad(path, r"list\.parquet' gives no label for 'list\.parquet'", labels=True)
    write(path=["list.parquet"], label=["oak"])
    bad(path, r"labels that are not among the 3 class names: 'oak'", labels=True)
    path.write_bytes(path.read_bytes()[:-30])
    bad(path, r"list\.parquet': it can't be read as Parquet")


def test_bad_shards(tmp_path: Path, items: list[Item]) -> None:
    shards = write_shards(tmp_path / "shards", items)
    whole = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(whole[: len(whole) // 2])
    bad(shards, r"photos-001\.tar'.*at byte \d+")
    bad(tmp_path / "shards" / "*.tar", r"photos-001\.tar'.*at byte \d+", labels=True)
    bad([*shards[:1], str(tmp_path / "gone.tar")], r"gone\.tar': there is no such file")
    bad(tmp_path / "gone.tar", r"gone\.tar' is neither a folder of pictures, .* nor tar shards")
    bad(tmp_path / "gone-*.tar", "no file has a name like '.*gone-")
    bad(write_tar(tmp_path / "a.tar", [("a.md", b"x")]), r"a\.tar': no pictures in this archive")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    bad(tmp_path / "a.tar.gz", r"a\.tar\.gz' is compressed; unpack it to \.tar")

    picture = ("1.jpg", items[1][0].read_bytes())
    cases: list[tuple[list[tuple[str, bytes]], str]] = [
        ([], r"a\.tar': no label beside the picture '1' at byte 512; expected 1\.cls"),
        ([("1.cls", b" ")], r"label of '1' in '.*a\.tar' at byte \d+ can't be read: it is empty"),
        ([("1.json", b"{")], r"label of '1' in '.*a\.tar' at byte \d+ can't be read: Expecting"),
        ([("1.json", b"{}")], r"label of '1' in '.*a\.tar' at byte \d+ .* expected {\"label\""),
        ([("1.txt", b"\xff")], r"label of '1' in '.*a\.tar' at byte \d+ .* can't decode"),
        ([("1.cls", b"3")], r"label of 'a\.tar/1' in '.*a\.tar' is 3, but there are 3 class names"),
    ]
    for others, message in cases:
        bad(write_tar(tmp_path / "a.tar", [picture, *others]), message, labels=True)


def test_a_picture_that_is_damaged_in_its_shard(
    reference: Student, tmp_path: Path, items: list[Item]
) -> None:
    """The error names the archive and the byte; so does one about an archive cut afterwards."""
    members = [("1.jpg", items[1][0].read_bytes()), ("1.cls", b"0"), ("2.jpg", b"no picture")]
    path = write_tar(tmp_path / "a.tar", [*members, ("2.cls", b"1")])
    with pytest.raises(ImageError, match=r"a\.tar' at byte \d+: it is not an image"):
        reference.evaluate(path)
    found = unlabelled(path)
    path.write_bytes(path.read_bytes()[:700])
    reasons = read_pictures(found.paths)[2]
    assert set(reasons) == {0, 1}
    assert all("a.tar' at byte" in reason for reason in reasons.values())
    assert "the archive has 700 bytes" in reasons[0]


def test_bad_datasets(items: list[Item], reference: Student) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from ()

    bad(Stream(), "a Stream is a stream without numbered rows")
    bad(hugging_face(items).to_iterable_dataset(), "is a stream without numbered rows")
    bad(
        datasets.DatasetDict({"a": hugging_face(items)}), r"parts a, none of them train or training"
    )
    bad(hugging_face(items).remove_columns("image"), r"0 columns of pictures .* among id, label")
    bad(hugging_face(items).remove_columns("label"), "no column 'label'", labels=True)
    unlabelled_row = hugging_face(items[:1]).cast_column("label", datasets.Value("int64"))
    unlabelled_row = unlabelled_row.map(lambda _: {"label": -1})
    bad(unlabelled_row, r"the label of '00000000' in the dataset given is -1", labels=True)
    bad(Photos(items, ToTensor()), "row 0 of the dataset is of type Tensor, not a picture")
    bad([Image.new("RGB", (8, 8))], "must hold paths, not Image")
    bad([items[0][0]], r"must hold \(path, class name\) pairs, not", labels=True)
    bad(3, "not int")

    with Image.open(items[4][0]) as image:
        broken_size = image.size

    def fail(image: Image.Image) -> Image.Image:
        if image.size == broken_size:
            raise OSError("the disk is gone")
        return image

    broken = Photos(items, fail)
    bad(broken, "row 4 of the dataset can't be had: the disk is gone", labels=True)
    broken.targets = np.array([NUMBERS[name] for _, name in items])  # now no row is read for it
    with pytest.raises(ImageError, match="row 4 of the dataset can't be had: the disk is gone"):
        reference.evaluate(broken)
    grey = Photos(items, lambda image: np.asarray(image)[:, :, 0])
    assert reference.evaluate(grey).num_images == len(items)
