"""The paper's datasets and protocols: readers, few-shot samples, settings, published numbers."""
