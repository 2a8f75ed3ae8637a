"""The teacher cache: the teacher runs once per picture and view, whatever is distilled from it."""

from promptkd.cache.build import build_cache, extend_cache, merge_caches
from promptkd.cache.read import FeatureCache
from promptkd.cache.verify import verify_cache

__all__ = ["FeatureCache", "build_cache", "extend_cache", "merge_caches", "verify_cache"]
