"""Step caches: skip blocks whose outcome changes little from one denoising step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin

from omni_convert.formats.errors import RecipeError, did_you_mean
from omni_convert.loaders.tea_cache import TeaCache

__all__ = ["BACKENDS", "disable_step_cache", "enable_step_cache", "step_cache_of"]

CACHE = "_omni_convert_step_cache"
# Serving engines let the first block decide; cache-dit's own default of eight is more than small models have.
CACHE_DIT_DEFAULTS = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}


def enable_step_cache(pipe: DiffusionPipeline, backend: str, config: Mapping[str, Any] | None = None) -> None:
    """Skips blocks from step to step.

    Args:
        backend: `tea_cache`, `first_block_cache` (diffusers' own) or `cache_dit` (the package)
        config: settings of the backend: `rel_l1_thresh` and `coefficients` of TeaCache, `threshold` of the first-block
            cache, the fields of cache-dit's `DBCacheConfig`

    Raises:
        RecipeError: the backend is unknown, not installed or does not fit the pipeline; a setting is unknown or wrong;
            or a cache is in use already.
    """
    if backend not in BACKENDS:
        raise RecipeError(f"cache_backend: found '{backend}', expected one of {', '.join(BACKENDS)}")
    if step_cache_of(pipe) is not None:
        raise RecipeError("cache_backend: found a step cache in use already, expected one; call disable_step_cache")
    setattr(pipe, CACHE, BACKENDS[backend](pipe, dict(config or {})))


def disable_step_cache(pipe: DiffusionPipeline) -> None:
    """Lets every block run in every step again."""
    cache = step_cache_of(pipe)
    if cache is not None:
        cache.remove()
        setattr(pipe, CACHE, None)


def step_cache_of(pipe: DiffusionPipeline) -> Any:
    """The cache in use, or None; that of `tea_cache` counts the calls that it skipped."""
    return getattr(pipe, CACHE, None)


def _tea_cache(pipe: DiffusionPipeline, config: Mapping[str, Any]) -> TeaCache:
    _check_keys(config, ("rel_l1_thresh", "coefficients"))
    coefficients = config.get("coefficients")
    if coefficients is not None and (
        not isinstance(coefficients, list | tuple) or len(coefficients) != 5 or not all(map(_is_number, coefficients))
    ):
        raise RecipeError(f"cache_config: found coefficients {coefficients!r}, expected five numbers")
    return TeaCache(pipe, _threshold(config, "rel_l1_thresh", 0.2), coefficients)


class _FirstBlockCache:
    def __init__(self, pipe: DiffusionPipeline, config: Mapping[str, Any]) -> None:
        _check_keys(config, ("threshold",))
        transformer = getattr(pipe, "transformer", None)
        name = type(pipe if transformer is None else transformer).__name__
        if not isinstance(transformer, CacheMixin):
            raise RecipeError(
                f"cache_backend: diffusers has no first_block_cache for {name}; use tea_cache or cache_dit"
            )
        self._transformer: Any = transformer
        self._transformer.enable_cache(FirstBlockCacheConfig(threshold=_threshold(config, "threshold", 0.1)))

    def remove(self) -> None:
        self._transformer.disable_cache()


class _CacheDit:
    def __init__(self, pipe: DiffusionPipeline, config: Mapping[str, Any]) -> None:
        if find_spec("cache_dit") is None:
            raise RecipeError(
                "cache_backend: found no package cache-dit for cache_dit; pip install 'omni-convert[cache-dit]'"
            )
        if getattr(pipe, "transformer", None) is None:
            raise RecipeError(f"cache_backend: found {type(pipe).__name__}, expected a pipeline with a transformer")
        import cache_dit

        self._pipe = pipe
        try:
            settings = cache_dit.DBCacheConfig(**{**CACHE_DIT_DEFAULTS, **config})
        except TypeError as error:
            raise RecipeError(f"cache_config: found what cache-dit's DBCacheConfig does not take ({error})") from None
        cache_dit.enable_cache(pipe, cache_config=settings)

    def remove(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self._pipe)


#: Name → what installs the cache and, by its method `remove`, takes it away.
BACKENDS: dict[str, Callable[[DiffusionPipeline, Mapping[str, Any]], Any]] = {
    "tea_cache": _tea_cache,
    "first_block_cache": _FirstBlockCache,
    "cache_dit": _CacheDit,
}


def _check_keys(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in config:
        if key not in known:
            raise RecipeError(f"cache_config: found '{key}', expected {' or '.join(known)}{did_you_mean(key, known)}")


def _threshold(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not _is_number(value) or not value > 0:
        raise RecipeError(f"cache_config: found {key} {value!r}, expected a positive number")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
