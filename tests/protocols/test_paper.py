"""The paper's table: complete, consistent with its own means, and with the official settings."""

from statistics import mean

import pytest
from promptkd.benchmarks import PAPER, PAPER_MEAN, find
from promptkd.benchmarks.layouts import LAYOUTS

ELEVEN = list(PAPER)[:11]
TARGETS = ELEVEN[1:]


def test_published_means_are_those_of_the_rows() -> None:
    """The printed mean of every column, within the rounding of two digits."""
    results = [PAPER[key].result for key in ELEVEN]
    assert mean(r.base or 0.0 for r in results) == pytest.approx(PAPER_MEAN.base, abs=0.006)
    assert mean(r.novel or 0.0 for r in results) == pytest.approx(PAPER_MEAN.novel, abs=0.006)
    cross = [PAPER[key].result.cross for key in TARGETS]
    assert mean(c or 0.0 for c in cross) == pytest.approx(PAPER_MEAN.cross, abs=0.006)
    off = []
    for row in (*results, PAPER_MEAN):
        assert row.base is not None
        assert row.novel is not None
        harmonic = 2 * row.base * row.novel / (row.base + row.novel)
        if harmonic != pytest.approx(row.harmonic_mean, abs=0.06):
            off.append(row)
    assert off == [PAPER["ucf101"].result]  # as printed in the paper


def test_every_dataset_has_a_layout_and_no_name_means_two() -> None:
    assert list(PAPER) == list(LAYOUTS)
    names = [
        name.lower()
        for row in PAPER.values()
        for name in {n.lower() for n in (row.key, row.name, row.title, *row.aliases)}
    ]
    assert len(names) == len(set(names))
    for row in PAPER.values():
        assert all(find(f" {n.upper()} ") is row for n in (row.key, row.name, row.title))
    assert [k for k, v in LAYOUTS.items() if v.test_only] == list(PAPER)[11:]
    assert all((v.generate is None) != (v.native is None) for v in LAYOUTS.values())
    assert all((v.generate is None) == (v.split is None) for v in LAYOUTS.values())
    assert PAPER["imagenet"].result.cross is None
    assert all(PAPER[key].result.base is None for key in list(PAPER)[11:])


@pytest.mark.parametrize(
    ("key", "base_to_novel", "per_row"),
    [("imagenet", 1000, 1.0), ("dtd", 200, 200 / 47), ("pets", 1000, 1000 / 37),
     ("eurosat", 1000, 100.0), ("flowers", 200, 200 / 102), ("aircraft", 200, 2.0)],
)  # fmt: skip
def test_kd_weight(key: str, base_to_novel: float, per_row: float) -> None:
    row = find(key)
    recipe = row.student()
    assert (recipe.kd_weight, recipe.prompt_depth) == (base_to_novel, 9)
    assert recipe.weight_per_row(row.num_classes) == pytest.approx(per_row)
    cross = row.student("cross-dataset")
    assert (cross.kd_weight, cross.prompt_depth) == (1000, 3)
    assert row.student("few-shot") == recipe


def test_teacher_settings() -> None:
    """(epochs, batch, lr, GPA mean and deviation) as the official configurations have them."""

    def settings(key: str, protocol: str, small: bool = False) -> tuple[float, ...]:
        t = find(key).teacher(protocol, small=small)
        return (t.epochs, t.batch_size, t.lr, t.gpa_mean, t.gpa_std)

    assert settings("dtd", "base-to-novel") == (20, 8, 0.005, 15, 1)
    assert settings("dtd", "base-to-novel", small=True) == (20, 4, 0.0025, 15, 1)
    assert settings("imagenet", "cross-dataset") == (20, 8, 0.005, 6, 10)
    late = [k for k in ELEVEN if settings(k, "few-shot") == (50, 8, 0.005, 45, 5)]
    assert late == ["stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat"]
    early = [k for k in ELEVEN if settings(k, "few-shot") == (50, 8, 0.005, 30, 30)]
    assert sorted(early + late) == sorted(ELEVEN)
