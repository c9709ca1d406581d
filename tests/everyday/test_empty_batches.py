"""Nothing to compute is no error: a batch of no sequences, no query heads, no rows or no keys."""

import pytest
from everyday.empty_batches import (
    decoding_holds,
    flash_attn_holds,
    injection_holds,
    prefixes_hold,
    the_rest_holds,
    training_holds,
)

BACKENDS = ["reference", "tiled", "torch_sdpa_math", "torch_sdpa_flash"]
WITH_LSE = ["reference", "tiled"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend, rng):
    training_holds(backend)


def test_decoding(rng):
    decoding_holds("torch")


@pytest.mark.parametrize("backend", WITH_LSE)
def test_shared_prefixes(backend, rng):
    prefixes_hold(backend)


@pytest.mark.parametrize("backend", WITH_LSE)
def test_injection(backend, rng):
    injection_holds(backend)


def test_caches_tiles_budgets_and_pieces(rng):
    the_rest_holds()


def test_flash_attn_functions(rng):
    flash_attn_holds()


def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("empty_batches")
