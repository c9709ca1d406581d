"""Launches by plan: what is built for a call and what is not, and what the driver is given. No GPU and no compilation."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernels.recorded_launches import recorded

from flashlib import attention, routes
from flashlib.inference import decode_attention
from flashlib.launch import forms, packets, plans
from flashlib.launch.start import Launch, TileMap
from flashlib.masks import Causal, KeyLengths, Varlen, Window

pytestmark = pytest.mark.skipif(packets.why_missing() is not None, reason=f"no plans here: {packets.why_missing()}")

CALLS_OF_A_FORWARD = 40  # of Python functions; 14 when this was written, and some 300 without plans


def tensors(q_len=128, kv_len=None, heads=8, dim=64, batch=1, dtype=torch.bfloat16, grad=False):
    shapes = [(batch, heads, q_len, dim), *[(batch, heads, kv_len or q_len, dim)] * 2]
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def attend(*inputs, **options):
    return attention(*inputs, backend="triton", **options)


CLASSES = {
    "causal": {"causal": True},
    "full": {},
    "window": {"mask": Window(left=30, right=4)},
    "softcap": {"softcap": 20.0, "causal": True},
    "LSE": {"return_lse": True},
    "key lengths": {"mask": KeyLengths(torch.tensor([100]))},
    "packed": {"mask": (packed := Varlen(torch.tensor([0, 50, 128]))) & Causal(packed)},
    "offset": {"mask": Causal(offset=3)},
    "ALiBi": {"alibi_slopes": torch.rand(8), "causal": True},
}


def what_is_built(stack: list[str]):
    """Notes what must not be made anew: arguments of launches, descriptors, packets, forms."""
    noted = []
    for owner, name in ((Launch, "__init__"), (TileMap, "__init__"), (packets, "packet"), (forms.Form, "__init__")):
        made, what = getattr(owner, name), f"{getattr(owner, '__name__', owner)}.{name}"

        def note(*arguments, made=made, what=what, **others):
            stack.append(what)
            return made(*arguments, **others)

        noted.append(mock.patch.object(owner, name, note))
    return noted


def python_calls(call) -> int:
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_second_call_builds_nothing(name, grad):
    options, built = CLASSES[name], []
    first, second = tensors(grad=grad), tensors(grad=grad)
    given = torch.randn(1, 8, 128, 64).bfloat16()

    def step(inputs):
        result = attend(*inputs, **options)
        out = result[0] if "return_lse" in options else result
        return torch.autograd.grad(out, inputs, given) if grad else out

    with recorded() as launches:
        step(first)
        compiled, started, modules = len(launches.compiled), len(launches), set(sys.modules)
        patches = what_is_built(built)
        for patch in patches:
            patch.start()
        try:
            step(second)
        finally:
            for patch in patches:
                patch.stop()
        assert not built
        assert len(launches.compiled) == compiled and set(sys.modules) == modules
        assert len(launches) == 2 * started > 0
        if not grad:
            assert python_calls(lambda: step(second)) <= CALLS_OF_A_FORWARD


def test_a_second_step_of_decoding_builds_nothing():
    q, built = torch.randn(2, 8, 1, 64).half(), []
    k, v = (torch.randn(2, 2, 512, 64).half() for _ in range(2))
    lengths = torch.tensor([100, 512])
    with recorded() as launches, torch.no_grad():
        decode_attention(q, k, v, lengths=lengths, backend="triton")
        compiled = len(launches.compiled)
        patches = what_is_built(built)
        for patch in patches:
            patch.start()
        try:
            decode_attention(q.clone(), k, v, lengths=lengths.clone(), backend="triton")
        finally:
            for patch in patches:
                patch.stop()
        assert not built and len(launches.compiled) == compiled


def holds(image: bytes, x: torch.Tensor) -> bool:
    """Whether the address of a tensor is among the parameters."""
    return struct.pack("<q", x.data_ptr()) in image


@pytest.mark.parametrize("name", CLASSES)
def test_kernels_are_given_the_tensors_of_the_call(name):
    options = {**CLASSES[name], "return_lse": True}
    with recorded() as launches:
        attend(*tensors(), **options)
        inputs = tensors()
        begin = len(launches)
        out, lse = attend(*inputs, **options)
        images = b"".join(launches[i].image for i in range(begin, len(launches)))
        assert all(holds(images, x) for x in (*inputs, out, lse))
        mask = options.get("mask")
        if isinstance(mask, KeyLengths):
            assert holds(images, mask.lengths)
        if name == "packed":  # themselves, and no copy of another type
            assert holds(images, packed.cu_seqlens_q) and holds(images, packed.cu_seqlens_k)


def test_numbers_reach_the_kernel():
    with recorded() as launches:
        for scale in (0.25, 0.5):
            attend(*tensors(), scale=scale)
            assert struct.pack("<f", scale) in launches[-1].image
        attend(*tensors(), mask=Window(left=77, right=55))
        assert struct.pack("<i", 77) in launches[-1].image and struct.pack("<i", 55) in launches[-1].image


def test_calls_that_differ_in_anything_share_no_route():
    base = {"causal": False}
    others = [
        {"causal": True},
        {"scale": 0.3},
        {"softcap": 5.0},
        {"return_lse": True},
        {"mask": Window(3, 3)},
        {"mask": Window(3, 4)},
    ]
    with recorded():
        attend(*tensors(), **base)
        for number, options in enumerate(others, start=1):
            attend(*tensors(), **options)
            assert len(routes._routes) == number + 1, options
        known = len(routes._routes)
        for inputs in (
            tensors(129),
            tensors(128, 256),
            tensors(dtype=torch.float16),
            tensors(grad=True),
            [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()],
        ):
            attend(*inputs, **base)
            known += 1
            assert len(routes._routes) == known, [x.shape for x in inputs]
        attend(*tensors(), causal=True)
        assert len(routes._routes) == known
        with pytest.raises(TypeError, match="causal must be True or False; got 1"):
            attend(*tensors(), causal=1)
        with pytest.raises(TypeError, match="scale must be a number; got True"):
            attend(*tensors(), scale=True)


def test_what_is_refused_is_refused_on_every_call():
    q, k, v = tensors()
    with recorded():
        attend(q, k, v)
        for _ in range(2):
            with pytest.raises(ValueError, match="k has head_dim 32 but q has head_dim 64"):
                attend(q, k[..., :32], v)
            with pytest.raises(TypeError, match="float16 but q is"):
                attend(q, k.half(), v)
            with pytest.raises(ValueError, match="scale must be greater than 0"):
                attend(q, k, v, scale=-1.0)


def test_whatever_stands_between_takes_no_route():
    q, k, v = tensors()

    class Subclass(torch.Tensor):
        pass

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def key(*inputs, **options):
        said = {
            "mask": None,
            "causal": False,
            "scale": None,
            "softcap": 0.0,
            "alibi_slopes": None,
            "return_lse": False,
            "backend": "auto",
        }
        return routes.route_key(*inputs, *(said | options).values(), None)[0]

    with recorded():
        assert key(q, k, v) is not None
        assert key(q.as_subclass(Subclass), k, v) is None
        assert key(torch.empty(q.numel() + 1).bfloat16()[1:].view(q.shape), k, v) is None
        assert key(q, k, v, mask=Varlen(torch.tensor([0, 128])) & Varlen(torch.tensor([0, 128]))) is None
        with Mode():
            assert key(q, k, v) is None
        with torch.autograd.forward_ad.dual_level():
            assert key(q, k, v) is None
        assert torch.func.vmap(lambda x: torch.tensor(key(q, k, v) is None))(q[0]).all()
        with mock.patch.object(routes, "launches_are_watched", lambda: True):
            assert key(q, k, v) is None
        with mock.patch.object(routes, "plans_are_possible", lambda: False):
            assert key(q, k, v) is None


def test_routes_and_plans_are_bounded():
    with recorded(), mock.patch.object(routes, "MOST_PLANS", 8), mock.patch.object(plans, "MOST_PLANS", 8):
        for length in range(64, 94):
            attend(*tensors(length))
        for heads in range(1, 12):
            attend(*tensors(heads=heads))
        assert len(routes._routes) == len(routes._relatives) == len(plans._kept.plans) == 8


def test_a_call_under_other_settings_is_another_class():
    from flashlib import use_config
    from flashlib.config import FlashAttentionConfig

    with recorded():
        attend(*tensors())
        with use_config(FlashAttentionConfig()):
            attend(*tensors())
        assert len(routes._routes) == 2
        kept = [route.config for route in routes._routes.values()]
        assert kept[0] is not kept[1], "a configuration is known by its identity, so its route must keep it alive"


def test_gradients_are_refused_a_second_time_in_our_words():
    inputs = tensors(grad=True)
    with recorded():
        for _ in range(2):
            out = attend(*inputs)
            (dq,) = torch.autograd.grad(out, inputs[:1], torch.ones_like(out), create_graph=True)
            with pytest.raises(NotImplementedError, match="triton attention has no second derivative"):
                torch.autograd.grad(dq.sum(), inputs[0])


def test_packets_refuse_what_does_not_fit():
    library = packets.library()
    with pytest.raises(ValueError, match="outside of the image"):
        library.Packet(1, (1, 1, 1), 32, 0, b"\0" * 8, (8,), ())
    with pytest.raises(ValueError, match="outside of the image"):
        library.Packet(1, (1, 1, 1), 32, 0, b"\0" * 8, (0,), ((0, 4, 0, False),))
    packet, other = (library.Packet(1, (1, 1, 1), 32, 0, b"\0" * 8, (0,), ((at, 0, 0, False),)) for at in (1, 2))
    library.record(written := [])
    try:
        with pytest.raises(ValueError, match="an address is missing"):
            library.run((other,), (), 0, (), 0, 0, 1, 2)
        library.run((packet,), (), 0, (), 0, 0, 1, 2)
    finally:
        library.record(None)
    assert written[0][-1] == struct.pack("<q", 2)


def test_forms_answer_as_tensors_do():
    rng = random.Random(random.SystemRandom().getrandbits(40))
    for _ in range(50):
        x = torch.randn([rng.randint(1, 5) for _ in range(4)])
        if rng.random() < 0.5:
            x = x.transpose(1, 2)
        memory = forms.Memory(torch.device("cpu"))
        form = memory.input(x.shape, x.stride(), x.dtype)
        begin = rng.randint(0, x.shape[2] - 1)
        index = rng.choice(((slice(None), slice(None), slice(begin, None)), (0,), (slice(0, 1),), (slice(None), 0)))
        expected, came = x[index], form[index]
        assert came.shape == tuple(expected.shape)
        assert all(a == b for a, b, n in zip(came.stride(), expected.stride(), expected.shape, strict=True) if n > 1)
        assert came.data_ptr() == expected.data_ptr() - x.data_ptr()
        assert form.new_empty(x.shape).stride() == torch.empty(x.shape).stride()
        assert form.numel() == x.numel() and form.element_size() == x.element_size()


def test_masks_laid_out_by_the_kernel_are_the_masks():
    program = Path(__file__).with_name("laid_out.py")
    seed = random.SystemRandom().getrandbits(40)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "--seed", str(seed), "--problems", "40"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_attention_does_not_import_a_compiler():
    program = """
import sys, torch
from flashlib import attention
from flashlib.masks import KeyLengths
q = torch.randn(2, 2, 20, 16, requires_grad=True)
for backend in ("tiled", "reference", "auto"):
    attention(q, q, q, mask=KeyLengths(torch.tensor([5, 20])), causal=True, backend=backend).sum().backward()
print(*[name for name in sys.modules if name == "sympy" or name.startswith(("torch._dynamo", "torch._inductor"))])
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not answer.stdout.split(), "these take seconds to import"


def test_a_launch_recorded_is_a_dataclass_of_what_the_driver_gets():
    with recorded() as launches:
        attend(*tensors())
    assert dataclasses.asdict(launches[-1])["grid"] == launches[-1].grid != (0, 0, 0)


@pytest.mark.parametrize("layout", ["tokens first", "heads first", "one head"])
def test_packs_of_a_known_class_are_started_where_they_lie(layout):
    """No mask and no view is made; what comes out lies as it did for the first call."""
    from flashlib import use_config
    from flashlib.config import FlashAttentionConfig
    from flashlib.interop.flash_attn import flash_attn_interface

    heads = 1 if layout == "one head" else 4
    shape = (heads, 100, 64) if layout == "heads first" else (100, heads, 64)
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    if layout == "heads first":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    ends = torch.tensor([0, 30, 100], dtype=torch.int32)

    def unread(*tensors):
        return False

    with (
        recorded() as launches,
        use_config(FlashAttentionConfig(order=("triton",))),
        mock.patch("flashlib.masks.may_read", unread),
        mock.patch.object(flash_attn_interface, "may_read", unread),
    ):
        outs, started = [], []
        for _ in range(4):
            before = len(launches)
            with mock.patch.object(Varlen, "__init__", autospec=True, side_effect=Varlen.__init__) as made:
                outs.append(flash_attn_interface.flash_attn_varlen_func(q, k, v, ends, ends, 70, 70, causal=True))
            started.append([launches[at] for at in range(before, len(launches))])
            assert made.call_count == (len(outs) == 1)
        assert all(out.shape == (100, heads, 64) and out.is_contiguous() for out in outs)
        assert len({tuple((x.function, x.grid) for x in each) for each in started}) == 1
        for out, each in zip(outs, started, strict=True):
            assert all(any(holds(x.image, tensor) for x in each) for tensor in (q, k, v, ends))
            assert layout == "heads first" or any(holds(x.image, out) for x in each)
        grads = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
        for _ in range(3):
            out = flash_attn_interface.flash_attn_varlen_func(*grads, ends, ends, 70, 70, causal=True)
            assert out.requires_grad
