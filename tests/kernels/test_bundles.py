"""Bundles of arguments leave no trace in machine code, and what they refuse they refuse in the interpreter too."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from flashlib.kernels.bundles import Keys
from flashlib.launch.inspect import compile_launch
from flashlib.launch.start import Launch


@triton.jit
def flat_step(b_acc, p_k, p_v, stride_ks, stride_vs, n, BLOCK: tl.constexpr):
    o_n = n + tl.arange(0, BLOCK)
    return b_acc + tl.load(p_k + o_n * stride_ks) * tl.load(p_v + o_n * stride_vs)


@triton.jit
def flat_kernel(p_k, p_v, p_out, stride_ks, stride_vs, length, BLOCK: tl.constexpr):
    b_acc = tl.zeros([BLOCK], tl.float32)
    for n in range(0, length, BLOCK):
        b_acc = flat_step(b_acc, p_k, p_v, stride_ks, stride_vs, n, BLOCK)
    tl.store(p_out + tl.arange(0, BLOCK), b_acc)


@triton.jit
def bundled_step(b_acc, keys, n, BLOCK: tl.constexpr):
    o_n = n + tl.arange(0, BLOCK)
    return b_acc + tl.load(keys.p_k + o_n * keys.stride_ks) * tl.load(keys.p_v + o_n * keys.stride_vs)


@triton.jit
def bundled_kernel(p_k, p_v, p_out, stride_ks, stride_vs, length, BLOCK: tl.constexpr):
    keys = Keys(p_k=p_k, p_v=p_v, stride_ks=stride_ks, stride_vs=stride_vs)
    b_acc = tl.zeros([BLOCK], tl.float32)
    for n in range(0, length, BLOCK):
        b_acc = bundled_step(b_acc, keys, n, BLOCK)
    tl.store(p_out + tl.arange(0, BLOCK), b_acc)


@triton.jit
def forgetful_kernel(p_k, p_v, p_out, stride_ks, stride_vs, length, BLOCK: tl.constexpr):
    keys = Keys(p_k=p_k, p_v=p_v, stride_ks=stride_ks)
    tl.store(p_out + tl.arange(0, BLOCK), keys.stride_ks)


@triton.jit
def positional_kernel(p_k, p_v, p_out, stride_ks, stride_vs, length, BLOCK: tl.constexpr):
    keys = Keys(p_k, p_v, stride_ks, stride_vs)
    tl.store(p_out + tl.arange(0, BLOCK), keys.stride_ks)


def launch_of(kernel, device: str = "meta") -> Launch:
    k, v, out = (torch.ones(512, device=device) for _ in range(3))
    arguments = {"p_k": k, "p_v": v, "p_out": out, "stride_ks": 1, "stride_vs": 2, "length": 256, "BLOCK": 128}
    return Launch(kernel, (1,), arguments)


def instructions(report) -> list[str]:
    """What is executed; the name of the kernel is in the lines before."""
    return [line for line in report.sass.splitlines() if line.lstrip().startswith("/*")]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_bundle_leaves_no_trace_in_the_machine_code(arch):
    flat, bundled = (instructions(compile_launch(launch_of(kernel), arch)) for kernel in (flat_kernel, bundled_kernel))
    assert len(flat) > 20
    assert bundled == flat


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (forgetful_kernel, "did not initialize attribute 'stride_vs'"),
        (positional_kernel, "takes 1 positional argument"),
    ],
)
def test_fields_are_given_all_and_by_keyword(kernel, message):
    with pytest.raises(Exception) as refused:  # Triton's own error, around that of the bundle
        compile_launch(launch_of(kernel), "sm_90")
    said = []
    error = refused.value
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    assert message in "\n".join(said)


INTERPRETED = """
from flashlib.kernels.bundles import Keys

keys = Keys(p_k=1, p_v=2, stride_ks=3, stride_vs=4)
assert (keys.p_k, keys.stride_vs) == (1, 4)
for wrong in (lambda: Keys(p_k=1), lambda: Keys(p_k=1, p_v=2, stride_ks=3, stride_vs=4, n=5), lambda: setattr(keys, "p_k", 2)):
    try:
        wrong()
    except AttributeError as error:
        print(error)
try:
    Keys(1, 2, 3, 4)
except TypeError as error:
    print(error)
"""


def test_what_the_compiler_refuses_the_interpreter_refuses_too():
    answer = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    said = answer.stdout.splitlines()
    assert said[0] == "Keys has p_k, p_v, stride_ks, stride_vs; got p_k"
    assert said[1].endswith("got p_k, p_v, stride_ks, stride_vs, n")
    assert said[2] == "p_k of Keys cannot be assigned to"
    assert "positional argument" in said[3] and len(said) == 4
