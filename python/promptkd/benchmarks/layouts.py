"""Where each dataset lies under the data folder, its prompt template, and who reads it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from promptkd.benchmarks import readers
from promptkd.benchmarks.readers import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One dataset on disk; exactly one of `generate` and `native` is set."""

    folder: str
    """Name of its folder under the data folder."""
    template: str = "a photo of a {}."
    """The prompt of zero-shot CLIP in CoOp's code; {} is the class name."""
    expected: tuple[str, ...]
    """What has to be in `folder`, for messages."""
    split: str | None = None
    """CoOp's split file."""
    images: str = ""
    """Where the split file's paths start, relative to `folder`."""
    generate: Callable[[Path, random.Random], Parts] | None = None
    """Draws a split where the split file is missing."""
    native: Callable[[Path], Parts] | None = None
    """Reads a dataset that needs no split file."""
    scanned: bool = False
    """`native` lists folders, so every listed picture is there."""
    test_only: bool = False
    """An ImageNet variant: nothing to train on."""
    archives: tuple[str, ...] = ()
    """Other names of its archive in the Hugging Face repository, without suffix."""

    def describe(self) -> str:
        """The expected layout, one path a line."""
        paths = [*self.expected, *([self.split] if self.split else [])]
        return "\n".join(f"  {self.folder}/{p}" for p in paths)


_CALTECH = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
_EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def _imagenet_test(folder: str, images: str) -> Layout:
    return Layout(
        folder=folder,
        expected=(f"{images}/<WordNet id>/*", "classnames.txt"),
        native=readers.native_imagenet_test(images),
        scanned=True,
        test_only=True,
    )


LAYOUTS: dict[str, Layout] = {
    "imagenet": Layout(
        folder="imagenet",
        expected=("images/train/<WordNet id>/*", "images/val/<WordNet id>/*", "classnames.txt"),
        native=readers.native_imagenet,
        scanned=True,
    ),
    "caltech101": Layout(
        folder="caltech-101",
        expected=("101_ObjectCategories/<class>/*.jpg",),
        split="split_zhou_Caltech101.json",
        images="101_ObjectCategories",
        generate=readers.generate_from_folders(
            "101_ObjectCategories", ("BACKGROUND_Google", "Faces_easy"), _CALTECH
        ),
    ),
    "oxford_pets": Layout(
        folder="oxford_pets",
        template="a photo of a {}, a type of pet.",
        expected=("images/*.jpg", "annotations/trainval.txt", "annotations/test.txt"),
        split="split_zhou_OxfordPets.json",
        images="images",
        generate=readers.generate_pets,
    ),
    "stanford_cars": Layout(
        folder="stanford_cars",
        expected=(
            "cars_train/*.jpg",
            "cars_test/*.jpg",
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
        ),
        split="split_zhou_StanfordCars.json",
        generate=readers.generate_cars,
    ),
    "oxford_flowers": Layout(
        folder="oxford_flowers",
        template="a photo of a {}, a type of flower.",
        expected=("jpg/image_00001.jpg", "imagelabels.mat", "cat_to_name.json"),
        split="split_zhou_OxfordFlowers.json",
        images="jpg",
        generate=readers.generate_flowers,
        archives=("flowers102", "flowers"),
    ),
    "food101": Layout(
        folder="food-101",
        template="a photo of {}, a type of food.",
        expected=("images/<class>/*.jpg",),
        split="split_zhou_Food101.json",
        images="images",
        generate=readers.generate_from_folders("images"),
    ),
    "fgvc_aircraft": Layout(
        folder="fgvc_aircraft",
        template="a photo of a {}, a type of aircraft.",
        expected=("images/*.jpg", "variants.txt", "images_variant_{train,val,test}.txt"),
        native=readers.native_aircraft,
    ),
    "sun397": Layout(
        folder="sun397",
        expected=("SUN397/<letter>/<class>/*.jpg", "ClassName.txt", "{Training,Testing}_01.txt"),
        split="split_zhou_SUN397.json",
        images="SUN397",
        generate=readers.generate_sun,
    ),
    "dtd": Layout(
        folder="dtd",
        template="{} texture.",
        expected=("images/<class>/*.jpg",),
        split="split_zhou_DescribableTextures.json",
        images="images",
        generate=readers.generate_from_folders("images"),
    ),
    "eurosat": Layout(
        folder="eurosat",
        template="a centered satellite photo of {}.",
        expected=("2750/<class>/*.jpg",),
        split="split_zhou_EuroSAT.json",
        images="2750",
        generate=readers.generate_from_folders("2750", (), _EUROSAT),
    ),
    "ucf101": Layout(
        folder="ucf101",
        template="a photo of a person doing {}.",
        expected=(
            "UCF-101-midframes/<Class_Name>/*.jpg",
            "ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt",
        ),
        split="split_zhou_UCF101.json",
        images="UCF-101-midframes",
        generate=readers.generate_ucf,
    ),
    "imagenetv2": Layout(
        folder="imagenetv2",
        expected=("imagenetv2-matched-frequency-format-val/<0 to 999>/*", "classnames.txt"),
        native=readers.native_imagenetv2,
        scanned=True,
        test_only=True,
    ),
    "imagenet_sketch": _imagenet_test("imagenet-sketch", "images"),
    "imagenet_a": _imagenet_test("imagenet-adversarial", "imagenet-a"),
    "imagenet_r": _imagenet_test("imagenet-rendition", "imagenet-r"),
}
