"""Run programs of this folder in Triton's interpreter, in one process, since importing takes longer than most of them.

TRITON_INTERPRET=1 python tests/course/run_interpreted.py watched_kernels interpreted_gradients

Each is a module with a function ``main(rng)``. A line of JSON says of each its seed, and its traceback if it failed.
"""

import importlib
import json
import random
import sys
import traceback
import warnings

import torch


def run(name: str) -> dict[str, object]:
    seed, failure = random.SystemRandom().getrandbits(32), ""
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            importlib.import_module(name).main(random.Random(seed))
    except Exception:
        failure = traceback.format_exc()
    return {"program": name, "seed": seed, "failure": failure}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps(run(name)))
