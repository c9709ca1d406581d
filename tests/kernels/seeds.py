"""What the programs that run kernels in Triton's interpreter are told."""

import argparse

import torch

from flashlib.launch.start import interpreting


def seeds_asked_for(program: str) -> range:
    """The seeds of ``--problems`` problems, from ``--seed`` on; ``program`` is the text of ``--help``."""
    parser = argparse.ArgumentParser(description=program)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--problems", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert interpreting(), "set TRITON_INTERPRET=1"
    return range(options.seed, options.seed + options.problems)
