"""Our encoders of GGUF's types against libggml's, which every writer of such files uses."""

from __future__ import annotations

import hashlib

import bench_k_quants
import numpy as np
import pytest
import torch

from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS

SIMPLE = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
# The start of the SHA-256 of what ggml 0.13.1 makes of 512 numbers: it shows that the judge is called as it should be.
JUDGE = {
    "Q2_K": "0089432154ed0906",
    "Q4_K": "16a5c1cd71c9304b",
    "Q6_K": "e2cb27cd8b18ca82",
    "IQ4_XS": "85b68c74e181d7e6",
}


@pytest.fixture(scope="module")
def weights():  # type: ignore[no-untyped-def]  # the script's
    return bench_k_quants.Weights.draw(rows=256)


@pytest.fixture
def libggml(import_peer):  # type: ignore[no-untyped-def]  # the script's
    import_peer("pywhispercpp")
    return bench_k_quants.libggml()


@pytest.mark.parametrize("kind", JUDGE)
def test_the_judge_gives_the_golden_bytes(kind, libggml) -> None:  # type: ignore[no-untyped-def]
    numbers = torch.tensor([np.sin(0.37 * i) * (1 + i % 7) for i in range(512)], dtype=torch.float64).float()
    stored = libggml(kind)(numbers[None], None)
    assert hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:16] == JUDGE[kind]


@pytest.mark.parametrize("kind", [*K_QUANTS, *SIMPLE])
def test_our_errors_are_below_those_of_libggml(kind, libggml, weights) -> None:  # type: ignore[no-untyped-def]
    theirs = bench_k_quants.errors(kind, libggml(kind), weights)
    ones = torch.ones_like(weights.importance)
    with_ones = bench_k_quants.relative_error(kind, weights.normal, libggml(kind)(weights.normal, ones), None)
    searched = bench_k_quants.errors(kind, bench_k_quants.ours(kind, search=True), weights)
    assert all(own < other for own, other in zip(searched, theirs, strict=True))
    assert searched[0] < with_ones
    nearest = bench_k_quants.errors(kind, bench_k_quants.ours(kind, search=False), weights)
    assert nearest[0] <= theirs[0] * 1.0001
    assert nearest[1] <= theirs[1] * 1.0001
