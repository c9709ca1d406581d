"""Host-side tensors say where they are: PyTorch's default device may be any other."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import flashlib
from flashlib import attention, masks, reference
from flashlib.backends.pytorch import tiled_attention
from flashlib.config import InjectionConfig
from flashlib.inference import (
    KVCache,
    KVInjector,
    Memory,
    PagedKVCache,
    SharedPrefix,
    decode_attention,
    shared_prefix_attention,
)
from flashlib.rotary import apply_rotary, rotary_frequencies

PACKAGE = Path(flashlib.__file__).parent
# What makes a tensor where PyTorch's default device is, unless it is told another.
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "tril_indices"),
    *("triu_indices", "zeros"),
}  # fmt: skip


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Tensors that are not told where to be hold no numbers: whoever needs some of them gets an error."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cpu")


def cached():
    cache = KVCache(2, 1, 8, 16, device="cpu")
    cache.append(draw(2, 1, 3, 16), draw(2, 1, 3, 16), counts=[3, 1])
    return attention(draw(2, 1, 1, 16), cache.keys, cache.values, mask=cache.mask(1)), cache.next_positions(2)


def paged():
    cache = PagedKVCache(num_pages=8, kv_heads=1, page_size=4, head_dim=16, device="cpu")
    requests = [cache.add() for _ in range(2)]
    cache.append(requests, draw(2, 1, 6, 16), draw(2, 1, 6, 16), counts=[6, 2], rotary=rotary_frequencies(16))
    options = {"lengths": cache.lengths(requests), "block_table": cache.block_table(requests)}
    decoded = decode_attention(draw(2, 1, 1, 16), cache.key_pages, cache.value_pages, **options)
    return decoded, *cache.gather(requests[0]), cache.next_positions(requests, 2)


def prefixed():
    two = SharedPrefix(draw(2, 1, 6, 16), draw(2, 1, 6, 16), members=[1, 0, 1], lengths=[3, 6])
    return shared_prefix_attention(draw(3, 2, 1, 16), two, draw(3, 1, 4, 16), draw(3, 1, 4, 16), lengths=[4, 1, 2])


def injected():
    memory = Memory(draw(1, 1, 6, 16), draw(1, 1, 6, 16)).turned(-6, rotary_frequencies(16))
    injector = KVInjector(InjectionConfig(mode="gate"))
    return injector.inject_chunked(draw(2, 2, 3, 16), draw(2, 1, 3, 16), draw(2, 1, 3, 16), memory, chunk_size=4)


def masked():
    rules = [
        *(masks.Documents.from_lengths([2, 3]), masks.Documents([0, 0, 1, 1, 1]), masks.Varlen([0, 2, 5])),
        *(masks.KeyLengths([4]), masks.Prefix([2]), masks.Prefix(1, offset=0), masks.Window(1, 1, offset=[0])),
    ]
    q, k, v = draw(1, 2, 5, 16), draw(1, 1, 5, 16), draw(1, 1, 5, 16)
    return [
        attention(q, k, v, mask=mask, backend=name)
        for mask in rules
        for name in ("reference", "tiled", "torch_sdpa_math")
    ]


def tiled():
    q, k, v = (draw(1, 1, 9, 16).requires_grad_() for _ in range(3))
    out = tiled_attention(q, k, v, causal=True, block_q=4, block_k=4, alibi_slopes=torch.ones(1, device="cpu"))
    out.sum().backward()
    return out, q.grad


def checked():
    q, k, v = (draw(1, 1, 9, 16) for _ in range(3))
    reference.assert_within_budget(attention(q, k, v), q, k, v)
    return draw(1)


def rotated():
    return apply_rotary(draw(1, 1, 3, 16), torch.arange(3, device="cpu"), rotary_frequencies(16))


CALLS = (cached, paged, prefixed, injected, masked, tiled, checked, rotated)


@pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])
def test_with_meta_as_the_default_device(call: Callable, meta_by_default, rng):
    results = call()
    for result in results if isinstance(results, tuple | list) else [results]:
        assert result.device.type == "cpu" and result.isfinite().all()


def devices_left_open(source: str) -> list[int]:
    """The lines on which a factory of PyTorch is called without a device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_the_package_says_where_each_tensor_is_made():
    assert devices_left_open("x = torch.zeros(3)\ny = torch.zeros(3, device=d)\nz = x.new_zeros(3)") == [1]
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] not in ("course", "interop"):
            lines = devices_left_open(file.read_text())
            assert not lines, f"{file}, lines {lines}: say device=, or PyTorch's default decides"
