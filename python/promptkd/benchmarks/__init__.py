"""The paper's datasets and protocols: readers, few-shot samples, settings, published numbers."""

from promptkd.benchmarks.dataset import BenchmarkDataset, ProtocolLists, Sample, load
from promptkd.benchmarks.hub import download
from promptkd.benchmarks.paper import PAPER, PAPER_MEAN, PaperDataset, PaperResult, find
from promptkd.benchmarks.presence import CatalogueEntry, DatasetReport, catalogue, check

__all__ = [
    "PAPER",
    "PAPER_MEAN",
    "BenchmarkDataset",
    "CatalogueEntry",
    "DatasetReport",
    "PaperDataset",
    "PaperResult",
    "ProtocolLists",
    "Sample",
    "catalogue",
    "check",
    "download",
    "find",
    "load",
]
