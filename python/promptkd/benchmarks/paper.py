"""The paper in numbers: its results, and the settings of every dataset, in one table.

Li et al., "PromptKD: Unsupervised Prompt Distillation for Vision-Language Models", CVPR 2024:
a ViT-B/16 student of a ViT-L/14 teacher, both with OpenAI's weights.  Settings are those of
the official code (commit ec244f7); accuracies are the published ones, in per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.errors import DataError

PROTOCOLS = ("base-to-novel", "cross-dataset", "few-shot")


@dataclass(frozen=True, slots=True)
class PaperResult:
    """Published accuracies in per cent; a number that was not published is None."""

    base: float | None = None
    novel: float | None = None
    harmonic_mean: float | None = None
    """2·base·novel/(base + novel), as printed: a mean over seeds, so not exactly of the means."""
    cross: float | None = None
    """Cross-dataset: the target's test split, all classes."""


@dataclass(frozen=True, slots=True)
class TeacherRecipe:
    """Stage 1 (PromptSRC) as the official configurations have it: SGD, one warm-up epoch."""

    epochs: int
    batch_size: int
    lr: float
    prompt_depth: int
    gpa_mean: float
    """Epoch of the largest weight in the average over epochs (Gaussian prompt aggregation)."""
    gpa_std: float
    shots: int = 16
    num_prompts: int = 4
    text_weight: float = 25.0
    image_weight: float = 10.0


@dataclass(frozen=True, slots=True)
class StudentRecipe:
    """Stage 2 as the official configurations have it: SGD, one warm-up epoch."""

    kd_weight: float
    """KD_WEIGHT of T²·KL_sum/(B·N): with the KL averaged over rows only, divide it by N."""
    prompt_depth: int
    epochs: int = 20
    batch_size: int = 8
    lr: float = 0.005
    temperature: float = 1.0
    num_prompts: int = 4

    def weight_per_row(self, num_classes: int) -> float:
        """KD_WEIGHT/N, the factor of T²·KL averaged over the batch: ImageNet 1, EuroSAT 100."""
        if num_classes < 1:
            raise DataError(f"KD_WEIGHT/N needs at least one class, not {num_classes}")
        return self.kd_weight / num_classes


@dataclass(frozen=True, slots=True)
class PaperDataset:
    """One dataset of the paper: names, sizes, settings that differ between datasets, results."""

    key: str
    """Short name, used on the command line and for files."""
    name: str
    """Name in the official code (Dassl's registry)."""
    title: str
    """Name in the paper's tables."""
    num_classes: int
    kd_weight: float
    """KD_WEIGHT of base-to-novel; cross-dataset uses 1000 for every target."""
    late_gpa: bool
    """Few-shot stage 1 averages around epoch 45 ± 5 of 50, not 30 ± 30."""
    result: PaperResult
    aliases: tuple[str, ...] = ()

    def student(self, protocol: str = "base-to-novel") -> StudentRecipe:
        """Stage 2 of this dataset under a protocol.

        Few-shot has no official script; it takes the settings of base-to-novel.

        Raises:
            DataError: the protocol is not one of `PROTOCOLS`.
        """
        _check_protocol(protocol)
        if protocol == "cross-dataset":
            return StudentRecipe(kd_weight=1000.0, prompt_depth=3)
        return StudentRecipe(kd_weight=self.kd_weight, prompt_depth=9)

    def teacher(self, protocol: str = "base-to-novel", *, small: bool = False) -> TeacherRecipe:
        """Stage 1 under a protocol; `small` is the ViT-B/16 setting of base-to-novel.

        The cross-dataset teacher has depth 9: the official student builds it so, whatever
        the depth 3 of PromptSRC's own cross-dataset configuration.

        Raises:
            DataError: the protocol is not one of `PROTOCOLS`.
        """
        _check_protocol(protocol)
        if protocol == "cross-dataset":
            return TeacherRecipe(20, 8, 0.005, prompt_depth=9, gpa_mean=6, gpa_std=10)
        if protocol == "few-shot":
            mean, std = (45, 5) if self.late_gpa else (30, 30)
            return TeacherRecipe(50, 8, 0.005, prompt_depth=9, gpa_mean=mean, gpa_std=std)
        batch_size, lr = (4, 0.0025) if small else (8, 0.005)
        return TeacherRecipe(20, batch_size, lr, prompt_depth=9, gpa_mean=15, gpa_std=1)


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise DataError(f"unknown protocol '{protocol}'; known are {', '.join(PROTOCOLS)}")


# Published base, novel, harmonic mean (base-to-novel) and target accuracy (cross-dataset).
_RESULTS = {
    "imagenet": PaperResult(80.83, 74.66, 77.62),  # the source of cross-dataset, no target
    "caltech101": PaperResult(98.91, 96.65, 97.77, 93.61),
    "oxford_pets": PaperResult(96.30, 98.01, 97.15, 91.59),
    "stanford_cars": PaperResult(82.80, 83.37, 83.13, 73.93),
    "oxford_flowers": PaperResult(99.42, 82.62, 90.24, 75.33),
    "food101": PaperResult(92.43, 93.68, 93.05, 88.84),
    "fgvc_aircraft": PaperResult(49.12, 41.81, 45.17, 26.24),
    "sun397": PaperResult(83.69, 81.54, 82.60, 68.57),
    "dtd": PaperResult(85.84, 71.37, 77.94, 55.08),
    "eurosat": PaperResult(97.54, 82.08, 89.14, 63.74),
    "ucf101": PaperResult(89.71, 82.27, 86.10, 76.39),  # 86.10 as printed; the means give 85.83
}

PAPER_MEAN = PaperResult(86.96, 80.73, 83.73, 71.33)
"""Published means: over 11 datasets (base, novel, harmonic mean), over 10 targets (cross)."""

# fmt: off
_DATASETS: tuple[tuple[str, str, str, int, float, bool, tuple[str, ...]], ...] = (
    # key, official name, title in the paper, classes, KD_WEIGHT, late_gpa, other names
    ("imagenet", "ImageNet", "ImageNet", 1000, 1000, False, ()),
    ("caltech101", "Caltech101", "Caltech101", 100, 1000, False, ("caltech-101",)),
    ("oxford_pets", "OxfordPets", "OxfordPets", 37, 1000, False, ("pets",)),
    ("stanford_cars", "StanfordCars", "StanfordCars", 196, 1000, True, ("cars",)),
    ("oxford_flowers", "OxfordFlowers", "Flowers102", 102, 200, True, ("flowers",)),
    ("food101", "Food101", "Food101", 101, 1000, False, ("food-101",)),
    ("fgvc_aircraft", "FGVCAircraft", "FGVCAircraft", 100, 200, True, ("aircraft",)),
    ("sun397", "SUN397", "SUN397", 397, 1000, False, ()),
    ("dtd", "DescribableTextures", "DTD", 47, 200, True, ()),
    ("eurosat", "EuroSAT", "EuroSAT", 10, 1000, True, ()),
    ("ucf101", "UCF101", "UCF101", 101, 1000, False, ()),
    # Test sets over ImageNet's classes: the paper distils no student on them.
    ("imagenetv2", "ImageNetV2", "ImageNet-V2", 1000, 1000, False, ("imagenet_v2",)),
    ("imagenet_sketch", "ImageNetSketch", "ImageNet-Sketch", 1000, 1000, False, ()),
    ("imagenet_a", "ImageNetA", "ImageNet-A", 200, 1000, False, ("imagenet-adversarial",)),
    ("imagenet_r", "ImageNetR", "ImageNet-R", 200, 1000, False, ("imagenet-rendition",)),
)
# fmt: on

PAPER: dict[str, PaperDataset] = {
    key: PaperDataset(
        key, name, title, classes, weight, late, _RESULTS.get(key, PaperResult()), aliases
    )
    for key, name, title, classes, weight, late, aliases in _DATASETS
}
"""Every dataset by its key; the first 11 are the paper's, the last 4 the ImageNet variants."""


def find(dataset: str) -> PaperDataset:
    """The row of a dataset by key, official name, title or alias, in any case.

    Raises:
        DataError: no dataset has that name.
    """
    wanted = dataset.strip().lower()
    for row in PAPER.values():
        if wanted in {n.lower() for n in (row.key, row.name, row.title, *row.aliases)}:
            return row
    raise DataError(f"unknown dataset '{dataset}'; known are {', '.join(PAPER)}")
