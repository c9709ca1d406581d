"""Starting a kernel."""

import random
from types import SimpleNamespace

import torch

from flashlib.launch.hopper import HOPPER_CACHE, heads_together
from flashlib.launch.start import Launch


class Recorder:
    """In place of a kernel: notes what it is started with, and which tensor's device was current then."""

    def __init__(self, monkeypatch):
        self.current, self.started = None, []
        monkeypatch.setattr(torch.cuda, "device_of", self.device_of)

    def device_of(self, tensor):
        recorder = self

        class Guard:
            def __enter__(self):
                recorder.current = tensor

            def __exit__(self, *_):
                recorder.current = None

        return Guard()

    def __getitem__(self, grid):
        return lambda **arguments: self.started.append((grid, self.current, arguments))


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch):
    """A tensor on cuda:1 while cuda:0 is current would otherwise be an illegal memory access."""
    kernel, tensor = Recorder(monkeypatch), torch.zeros(3)
    Launch(kernel, (4,), {"p_start": None, "scale": 0.5, "p_q": tensor}).start()
    Launch(kernel, (2,), {"desc_q": SimpleNamespace(base=tensor), "left": 0}).start()
    assert [(grid, current is tensor) for grid, current, _ in kernel.started] == [((4,), True), ((2,), True)]
    assert kernel.started[0][2]["p_q"] is tensor


def test_an_empty_grid_starts_nothing(monkeypatch):
    kernel = Recorder(monkeypatch)
    Launch(kernel, (0, 3), {"p_q": torch.zeros(0)}).start()
    assert kernel.started == []


def test_groups_of_heads_are_large_enough_and_the_last_one_is_no_small_rest():
    rng = random.Random()
    for _ in range(1000):
        heads, row_blocks, spread = rng.randint(1, 300), rng.randint(1, 128), rng.choice((0, 3.5))
        kilobytes = rng.randint(1, 20_000)
        together = heads_together(heads, row_blocks, 132, kilobytes * 1024, spread)
        problem = f"{heads} heads of {row_blocks} blocks and {kilobytes} KiB, spread {spread}: {together} together"
        assert 1 <= together <= heads, problem
        last = heads % together or together
        assert together == heads or last * row_blocks >= spread * 132, problem
        assert together == heads or (last + 1) * kilobytes * 1024 > HOPPER_CACHE, problem
