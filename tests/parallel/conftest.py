"""Worlds of two and of four ranks, each started once for all tests here."""

import pytest
from worlds import World


@pytest.fixture(scope="session")
def two_ranks():
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def four_ranks():
    world = World(4)
    yield world
    world.close()
