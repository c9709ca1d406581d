"""Fresh inputs for every run, and one loaded language model for all tests that need it."""

import secrets

import pytest
import torch


@pytest.fixture
def generator():
    """A random source with a new seed each time; pytest shows the seed if the test fails."""
    seed = secrets.randbits(32)
    print(f"seed = {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer). Tests choose their own backend and need not restore it."""
    from flashlib.course.models import load_smollm2

    return load_smollm2()
