"""Fresh inputs for every run."""

import random
import secrets

import pytest
import torch


@pytest.fixture
def rng():
    """A random source with a new seed each time, torch's included; pytest shows the seed if the test fails."""
    seed = secrets.randbits(32)
    print(f"seed = {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
