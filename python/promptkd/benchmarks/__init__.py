"""The paper's datasets and protocols: readers, few-shot samples, settings, published numbers."""

from promptkd.benchmarks.dataset import BenchmarkDataset, ProtocolLists, Sample, load
from promptkd.benchmarks.paper import PAPER, PAPER_MEAN, PaperDataset, PaperResult, find

__all__ = [
    "PAPER",
    "PAPER_MEAN",
    "BenchmarkDataset",
    "PaperDataset",
    "PaperResult",
    "ProtocolLists",
    "Sample",
    "find",
    "load",
]
