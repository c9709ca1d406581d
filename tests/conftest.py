"""For all tests: fresh inputs, and the order of files.

Those that take longest come first, so that at the end no worker is left alone with one of them.
"""

import random
import secrets
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
LONGEST_FIRST = (
    "grader/test_kill_matrix.py",
    "kernels/test_compiled.py",
    "models/test_smollm2.py",
    "course/test_own.py",
    "core/test_backends_agree.py",
    "kernels/test_decode_kernels.py",
    "kernels/test_interpreter.py",
    "measure/test_race.py",
    "grader/test_hostile.py",
    "interop/test_transformers_on_triton.py",
    "course/test_figures.py",
    "notebooks/test_comparison_notices.py",
    "core/test_tiled.py",
    "measure/test_decoding.py",
    "interop/test_flash_attn.py",
    "setup/test_lab.py",
    "course/test_split_decoding.py",
    "models/test_interop_transformers.py",
    "course/test_in_the_interpreter.py",
    "course/test_widgets.py",
    "interop/test_varlen_on_triton.py",
    "models/test_injected_memory.py",
    "setup/test_weights.py",
    "course/test_growing_kernels.py",
    "grader/test_front_doors.py",
    "course/test_mask_kernels.py",
    "grader/test_check_api.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {TESTS / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture
def rng() -> random.Random:
    """A random source with a new seed each time, torch's included; pytest shows the seed if the test fails."""
    seed = secrets.randbits(32)
    print(f"seed = {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)
