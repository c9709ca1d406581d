"""The files through which q walks from the door to the store of a kernel, one JSON list a door.

TRITON_INTERPRET=1 python tests/kernels/interpreted_walk.py
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.runtime.interpreter import InterpreterBuilder

import flashlib
from flashlib.inference import decode_attention

PACKAGE = Path(flashlib.__file__).parent


def walk(door: Callable[[], object]) -> list[str]:
    """Files of flashlib, each as often as the walk comes to it: those whose functions stand one above the other when a kernel first stores."""
    walks = []
    store = InterpreterBuilder.create_masked_store

    def spy(self, *arguments):
        if not walks:
            files, frame = [], sys._getframe(1)
            while frame is not None:
                file = Path(frame.f_code.co_filename)
                if file.is_relative_to(PACKAGE) and files[-1:] != [file]:
                    files.append(file)
                frame = frame.f_back
            walks.append([file.relative_to(PACKAGE).as_posix() for file in reversed(files)])
        return store(self, *arguments)

    InterpreterBuilder.create_masked_store = spy
    try:
        door()
    finally:
        InterpreterBuilder.create_masked_store = store
    return walks[0]


def main() -> None:
    q, k = torch.randn(1, 2, 20, 16), torch.randn(1, 1, 24, 16)
    learnt = q.clone().requires_grad_()
    doors = {
        "attention": lambda: flashlib.attention(q, k, k, causal=True, backend="triton"),
        "attention, with a gradient": lambda: flashlib.attention(learnt, k, k, causal=True, backend="triton"),
        "decode_attention": lambda: decode_attention(q[:, :, :1], k, k, backend="triton"),
    }
    print(json.dumps({name: walk(door) for name, door in doors.items()}))


if __name__ == "__main__":
    main()
