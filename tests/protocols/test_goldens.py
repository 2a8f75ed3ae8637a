"""Every golden run: lists, few-shot samples, splits, classes, prompts equal the official code's.

Keys are taken out of a golden as they are compared; one that is left at the end fails the test.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import make_tree
import numpy as np
import pytest
import torch
from goldens import Item
from PIL import Image
from promptkd import benchmarks
from promptkd.benchmarks import BenchmarkDataset, ProtocolLists, Sample, readers
from promptkd.benchmarks.dataset import CONTEXT
from promptkd.errors import DataError

PROTOCOLS = {
    "standard": "standard",
    "promptkd_base2novel": "base-to-novel",
    "promptkd_cross": "cross-dataset",
}
CLASSES = {"all": "all", "base": "base", "new": "novel", "ignored": "all"}


def named(
    data: BenchmarkDataset, samples: tuple[Sample, ...] | None, names: tuple[str, ...]
) -> list[Item] | None:
    """Samples in the form of the goldens."""
    if samples is None:
        return None
    top = f"{data.root}/"
    return [Item(s.path.removeprefix(top), s.label, names[s.label]) for s in samples]


def lists(data: BenchmarkDataset, got: ProtocolLists, protocol: str) -> dict[str, Any]:
    """The three lists; the novel test of base-to-novel counts its labels from 0 again."""
    names = novel = got.class_names
    if protocol == "promptkd_base2novel" and not data.test_only:
        novel = names[math.ceil(len(names) / 2) :]
    return {
        "train_x": named(data, got.train, names),
        "val": named(data, got.val, names),
        "test": named(data, got.test, novel),
    }


def check_run(case: Any, run: dict[str, Any], data: BenchmarkDataset, used: set[str]) -> None:
    """One run: takes every key out of `run`, and notes the pooled lists it used."""
    protocol, shots, seed = run.pop("protocol"), run.pop("num_shots"), run.pop("seed")
    first = run.pop("start", None) == "first" and shots > 0
    subsample = run.pop("subsample")
    got = data.protocol(
        PROTOCOLS[protocol],
        shots=shots,
        seed=seed,
        classes=CLASSES[subsample],
        first_start=first,
    )
    for key, value in lists(data, got, protocol).items():
        list_id = run.pop(key)
        assert value == goldens.items(case, list_id), f"{protocol} {shots=} {seed=} {key}"
        used.add(str(list_id))
    classes_id = run.pop("classes")
    used.add(classes_id)
    classes = dict(case["classes"][classes_id])
    assert list(got.class_names) == classes.pop("classnames")
    assert len(got.class_names) == classes.pop("num_classes")
    assert [[i, name] for i, name in enumerate(got.class_names)] == classes.pop("lab2cname")
    assert not classes
    if "fewshot_cache" in run:
        cache = run.pop("fewshot_cache")
        sample = data.few_shot(shots, seed, first_start=first)
        assert ("val" in cache) == bool(sample.val)
        for key in list(cache):
            list_id = cache.pop(key)
            value = named(data, getattr(sample, key), data.class_names)
            assert value == goldens.items(case, list_id), f"sample {shots=} {seed=} {key}"
            used.add(list_id)
    assert not run, f"not compared: {sorted(run)}"


def check_generated(case: Any, data: BenchmarkDataset, seed: str, used: set[str]) -> None:
    """The split that the official code writes when it finds none."""
    split = case["generated_split"].pop(seed)
    for key in ("train", "val", "test"):
        list_id = split.pop(key)
        assert named(data, getattr(data, key), data.class_names) == goldens.items(case, list_id)
        used.add(list_id)
    assert hashlib.sha256(data.split_json().encode()).hexdigest() == split.pop("json_sha256")
    assert not split


def check_case(case_name: str, case: Any, root: Path, name: str) -> None:
    """All runs of a case; with an absent split, of the start that draws it and of later ones."""
    used: set[str] = {"None"}
    runs = case.pop("runs")
    assert runs
    if case_name != "split_absent":
        data = benchmarks.load(name, root)
        for run in runs:
            check_run(case, run, data, used)
    else:
        seeds = sorted(case["generated_split"])
        first = {s: benchmarks.load(name, root, split_seed=int(s)) for s in seeds}
        split_file = root / first["1"].layout.folder / str(first["1"].layout.split)
        for seed, data in first.items():
            check_generated(case, data, seed, used)
            split_file.write_text(data.split_json(), encoding="utf-8")
            second = benchmarks.load(name, root, split_seed=int(seed))
            split_file.unlink()
            assert (data.split_seed, second.split_seed) == (int(seed), None)
            assert [second.train, second.val, second.test] == [data.train, data.val, data.test]
            for run in (r for r in runs if str(r.get("seed")) == seed):
                check_run(case, run, data if run["start"] == "first" else second, used)
        assert not case.pop("generated_split")
    assert all(not run for run in runs)
    assert set(case.pop("lists")) | set(case.pop("classes")) <= used, "a list nobody compared"
    case.pop("images")
    assert not case, f"not compared: {sorted(case)}"


def check_order(golden: Any, case_name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversed folder listings change nothing, whether or not they changed the official code."""
    listed = []

    def reversed_scandir(path: Any) -> list[Any]:
        listed.append(path)
        return sorted(os.scandir(path), key=lambda e: e.name, reverse=True)

    seed = 1 if case_name == "split_absent" else None
    before = benchmarks.load(golden["dataset"], root, split_seed=seed)
    with monkeypatch.context() as patch:
        fake = type("Os", (), {"scandir": staticmethod(reversed_scandir)})
        patch.setattr(readers, "os", fake)
        after = benchmarks.load(golden["dataset"], root, split_seed=seed)
    assert after == before
    official = golden["depends_on_directory_order"].pop(case_name, None)
    assert official is not None
    assert listed or not official, "the official code listed folders here, this reader did not"


def check_prompts(data: BenchmarkDataset, prompts: dict[str, Any]) -> None:
    """The texts of zero-shot CLIP and of PromptKD, and the rows that each half scores on."""
    middle = math.ceil(len(data.class_names) / 2)
    assert data.prompts() == prompts.pop("zeroshot")
    assert data.prompts(f"{CONTEXT} {{}}.") == prompts.pop("promptkd")
    assert prompts.pop("promptkd_ctx_init") == CONTEXT
    assert prompts.pop("promptkd_n_base") == middle
    assert prompts.pop("promptkd_n_novel") == len(data.class_names) - middle
    # Rows scored with val and with test in the cross-dataset protocol: all of them.
    assert prompts.pop("cross_rows") == [len(data.class_names)] * 2
    if not data.test_only:
        assert len(data.base().class_names) == middle
        assert data.base().class_names + data.novel().class_names == data.class_names
    assert not prompts


def check_pictures(root: Path, pictures: list[Any]) -> None:
    """The odd pictures load as RGB with the recorded colours (JPEG encoders differ a little)."""
    for picture in pictures:
        with Image.open(root / picture.pop("path")) as image:
            assert image.format == picture.pop("format")
            assert image.mode == picture.pop("mode")
            assert list(image.size) == picture.pop("size")
            rgb = image.convert("RGB")
        assert rgb.mode == picture.pop("mode_after")
        mean = np.asarray(rgb, dtype=float).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, picture.pop("mean_rgb"), atol=3)
        assert not picture


def compare(
    golden_folder: Path, golden_name: str, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the golden of one dataset says; its keys are used up on the way."""
    entry = goldens.read(golden_folder, "manifest.json")["datasets"][golden_name]
    golden = goldens.read(golden_folder, entry["file"])
    assert golden["cases"]
    splits = {"split_present": "present", "split_absent": "absent", "native": "present"}
    roots = {c: tree(golden["tree_seed"], golden_name, splits[c]) for c in golden["cases"]}
    before = {case: make_tree.tree_digest(str(root)) for case, root in roots.items()}
    present = tree(golden.pop("tree_seed"), golden_name, "present")
    data = benchmarks.load(golden_name, present)
    assert golden.pop("test_only") == data.test_only
    digest = make_tree.tree_digest(str(present / golden["folder"]))
    recorded = golden.pop("tree")
    assert digest["files"] == recorded.pop("files")
    assert digest["paths_sha256"] == recorded.pop("paths_sha256")
    # Another JPEG encoder may change the bytes, as the recorder's notes say; never the names.
    assert len(recorded.pop("bytes_sha256")) == len(digest["bytes_sha256"])
    assert not recorded
    for case_name, root in roots.items():
        check_order(golden, case_name, root, monkeypatch)
        check_case(case_name, golden["cases"].pop(case_name), root, golden_name)
    assert not golden.pop("cases")
    assert not golden.pop("depends_on_directory_order")
    check_prompts(data, golden.pop("prompts"))
    check_pictures(present, golden.pop("pictures"))
    assert golden.pop("template") == data.template
    assert golden.pop("folder") == data.layout.folder
    assert golden.pop("dataset") == data.paper.name == golden_name
    assert not golden, f"not compared: {sorted(golden)}"
    assert {c: make_tree.tree_digest(str(r)) for c, r in roots.items()} == before, "written to"


def test_golden(
    golden_folder: Path, golden_name: str, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(golden_folder, golden_name, tree, monkeypatch)


def first_case(golden: Any) -> Any:
    return golden["cases"]["split_absent"]


def first_run(golden: Any) -> Any:
    """A few-shot run, with the sample that the official code cached."""
    return next(r for r in first_case(golden)["runs"] if "fewshot_cache" in r)


def swap(pool: list[Any]) -> None:
    pool[0], pool[1] = pool[1], pool[0]


TAMPERINGS: dict[str, Callable[[Any], Any]] = {
    "key of the golden": lambda g: g.update(news=1),
    "key of a case": lambda g: first_case(g).update(news=1),
    "key of a run": lambda g: first_run(g).update(news=1),
    "key of a sample": lambda g: first_run(g)["fewshot_cache"].update(test="L0"),
    "key of the classes": lambda g: first_case(g)["classes"]["C0"].update(news=1),
    "key of a split": lambda g: first_case(g)["generated_split"]["1"].update(news=1),
    "key of the prompts": lambda g: g["prompts"].update(news=1),
    "key of the tree": lambda g: g["tree"].update(news=1),
    "key of a picture": lambda g: g["pictures"][0].update(news=1),
    "unused list": lambda g: first_case(g)["lists"].update(L999=[[0], [0]]),
    "unused classes": lambda g: first_case(g)["classes"].update(C999={}),
    "a further case": lambda g: g["cases"].update(native={"runs": []}),
    "order of a list": lambda g: swap(first_case(g)["lists"][first_run(g)["train_x"]][0]),
    "a label": lambda g: first_case(g)["lists"]["L1"][1].__setitem__(0, 1),
    "a class name": lambda g: swap(first_case(g)["classes"]["C1"]["classnames"]),
    "a sample": lambda g: first_run(g)["fewshot_cache"].update(val="L0"),
    "a written split": lambda g: first_case(g)["generated_split"]["2"].update(json_sha256="0"),
    "a prompt": lambda g: swap(g["prompts"]["zeroshot"]),
    "the template": lambda g: g.update(template="a photo of {}."),
    "a colour": lambda g: g["pictures"][0]["mean_rgb"].__setitem__(1, 300),
    "a tree": lambda g: g["tree"].update(paths_sha256="0"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_golden_fails(
    what: str, tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong or not compared is noticed: the tests above can fail, for every key."""
    source, name = goldens.COMMITTED[0], "EuroSAT"
    manifest = goldens.read(source, "manifest.json")
    golden = goldens.read(source, manifest["datasets"][name]["file"])
    TAMPERINGS[what](golden)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / manifest["datasets"][name]["file"]).write_text(json.dumps(golden))
    with pytest.raises(AssertionError):
        compare(tmp_path, name, tree, monkeypatch)


def check_random_facts(facts: dict[str, Any], data: BenchmarkDataset) -> None:
    """What the official sampling depends on, and ours with it."""
    state = random.getstate()
    first = data.few_shot(4, 1)
    assert random.getstate() == state, "the global stream was used"
    assert (data.few_shot(4, 1) == first) == facts.pop("same_seed_same_result")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        np.random.seed(7)
        assert (data.few_shot(4, 1) == first) == facts.pop("other_numpy_and_torch_seed_no_effect")
    assert facts.pop("random_only")
    assert (data.few_shot(4, 2) != first) == facts.pop("without_python_random_seed_differs")
    # The official code takes seed 0 for "no seed"; here it is a seed, and -1 is refused.
    assert facts.pop("cache_file_for_seed_argument_0") == ["shot_4-seed_-1.pkl"]
    assert data.few_shot(4, 0) == data.few_shot(4, 0) != first
    with pytest.raises(DataError, match="seed 0 or more"):
        data.few_shot(4, -1)
    assert not facts


def test_manifest(golden_folder: Path, tree: Any) -> None:
    manifest = goldens.read(golden_folder, "manifest.json")
    assert manifest.pop("schema") == "promptkd-dataset-goldens/1"
    tree_seed = manifest.pop("tree_seed")
    seeds, shots = manifest.pop("protocol_seeds"), manifest.pop("num_shots")
    trainable = None
    for name, entry in manifest.pop("datasets").items():
        golden = goldens.read(golden_folder, entry.pop("file"))
        assert (golden["dataset"], golden["tree_seed"]) == (name, tree_seed)
        for key in ("folder", "tree", "depends_on_directory_order"):
            assert entry.pop(key) == golden[key]
        assert entry.pop("cases") == {c: len(v["runs"]) for c, v in golden["cases"].items()}
        assert not entry
        for case in golden["cases"].values():
            assert sorted({r["seed"] for r in case["runs"]}) == seeds
            assert sorted({r["num_shots"] for r in case["runs"]}) == shots
        if not golden["test_only"]:
            trainable = name
    assert trainable is not None
    data = benchmarks.load(trainable, tree(tree_seed, trainable, "present"))
    if "rng_facts" in manifest:
        check_random_facts(manifest.pop("rng_facts"), data)
    assert manifest.pop("listdir_order") == "sorted"
    assert manifest.pop("official_commit").startswith("ec244f7")
    assert manifest.pop("versions")["python"]
    assert not manifest, f"not compared: {sorted(manifest)}"
