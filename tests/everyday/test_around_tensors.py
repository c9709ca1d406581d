"""Tensors that are not what they seem, and transforms inside of transforms: right, or refused in our words; never a wrong number."""

import subprocess
import sys

import pytest
import torch
from torch.func import jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from flashlib import attention, masks
from flashlib.backends import BACKENDS
from flashlib.interop.flash_attn import flash_attn_func, flash_attn_with_kvcache

HERE = [
    name
    for name in ("reference", "tiled", "torch_sdpa_math", "torch_sdpa_flash", "cpu")
    if BACKENDS[name].missing() is None
]


def formula(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[3] ** 0.5, -1) @ v


def drawn(q_len: int = 6, kv_len: int = 100, dim: int = 64):
    return torch.randn(1, 2, q_len, dim), torch.randn(1, 2, kv_len, dim), torch.randn(1, 2, kv_len, dim)


@pytest.mark.parametrize("backend", ["auto", *HERE])
def test_a_recorded_graph_computes_what_was_recorded(backend, rng):
    q, k, v = drawn()
    graph = make_fx(lambda q: attention(q, k, v, backend=backend))(q)
    fresh = torch.randn_like(q)
    torch.testing.assert_close(graph(fresh), formula(fresh, k, v), rtol=1e-4, atol=1e-5)
    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    graph = make_fx(lambda q: flash_attn_func(q, *tokens[1:]))(tokens[0])
    torch.testing.assert_close(graph(fresh.transpose(1, 2)).transpose(1, 2), formula(fresh, k, v), rtol=1e-4, atol=1e-5)


def test_classes_of_tensors_with_a_say_of_their_own():
    """In a process of its own: what goes wrong there is a null pointer."""
    program = """
import torch, flashlib
from torch.testing._internal.two_tensor import TwoTensor
inputs = [torch.randn(1, 2, 100, 64) for _ in range(3)]
wrapped = [TwoTensor(x, x.clone()) for x in inputs]
for backend in ("auto", "tiled", "cpu", "reference"):
    if flashlib.backends.BACKENDS.get(backend) and flashlib.backends.BACKENDS[backend].missing():
        continue
    try:
        out = flashlib.attention(*wrapped, backend=backend)
    except (NotImplementedError, flashlib.BackendUnavailableError, TypeError) as error:
        print(backend, type(error).__name__, error)
        continue
    assert isinstance(out, TwoTensor), type(out)
    torch.testing.assert_close(out.a, flashlib.attention(*inputs, backend=backend))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    with pytest.raises(TypeError, match="q has layout torch.sparse_coo; expected torch.strided"):
        attention(torch.randn(1, 1, 4, 8).to_sparse(), *[torch.randn(1, 1, 4, 8)] * 2)


def test_a_tangent_inside_of_a_tangent(rng):
    q, k, v = (x.double() for x in drawn(2, 3, 4))
    t = torch.randn_like(q)

    def twice(call):
        return jvp(lambda x: jvp(call, (x,), (t,))[1], (q,), (t,))[1]

    torch.testing.assert_close(twice(lambda q: attention(q, k, v)), twice(lambda q: formula(q, k, v)))
    torch.testing.assert_close(
        jacfwd(jacfwd(lambda q: attention(q, k, v)))(q), jacfwd(jacfwd(lambda q: formula(q, k, v)))(q)
    )
    with pytest.raises(
        RuntimeError, match="has no second derivative, and one tangent is pushed forward inside another"
    ):
        twice(lambda q: attention(q, k, v, backend="tiled"))


def test_dropout_under_vmap_drops_what_it_drops_without(rng):
    q, (k, v), seed = torch.randn(3, 1, 2, 3, 8), torch.randn(2, 1, 2, 4, 8), torch.tensor([rng.getrandbits(62)])

    def call(q, backend="auto"):
        return attention(q, k, v, dropout_p=0.5, dropout_seed=seed, backend=backend)

    torch.testing.assert_close(vmap(call)(q), torch.stack([call(x) for x in q]))
    with pytest.raises(RuntimeError, match="drops pairs by their place in the batch, which vmap hides"):
        vmap(lambda q: call(q, "tiled"))(q)


@pytest.mark.parametrize("backend", HERE)
def test_masks_may_be_mapped(backend, rng):
    q, k, v = torch.randn(3, 1, 2, 3, 8), *torch.randn(2, 1, 2, 4, 8)
    lengths = torch.tensor([[1], [4], [2]])
    mapped = vmap(lambda q, length: attention(q, k, v, mask=masks.KeyLengths(length), backend=backend))(q, lengths)
    for one, x, length in zip(mapped, q, lengths, strict=True):
        torch.testing.assert_close(one, attention(x, k, v, mask=masks.KeyLengths(length), backend="reference"))


def test_slopes_made_inside_of_what_is_compiled(rng):
    q, k, v = drawn()
    whole = torch.compile(
        lambda q: attention(q, k, v, alibi_slopes=torch.ones(2)), backend="aot_eager", fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(whole(q), attention(q, k, v, alibi_slopes=torch.ones(2)))


def test_what_was_recorded_under_the_defaults_is_recomputed_under_them():
    """In a process of its own, where nobody has entered a use_config before."""
    program = """
import torch, flashlib
from flashlib import attention
from torch.utils.checkpoint import checkpoint
for use_reentrant in (False, True):
    q = torch.randn(1, 2, 130, 16, requires_grad=True)
    out = checkpoint(lambda q: attention(q, q, q, dropout_p=0.5, dropout_seed=torch.tensor([1])), q, use_reentrant=use_reentrant)
    with flashlib.use_config(flashlib.FlashAttentionConfig(backend="reference")):
        out.sum().backward()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_no_window_is_too_large_for_a_cache_that_is_copied(rng):
    q, k, v = torch.randn(3, 2, 3, 4, 8)
    wide = flash_attn_with_kvcache(q, k, v, cache_seqlens=2, window_size=(2**64, -1), alibi_slopes=torch.ones(4))
    assert torch.equal(wide, flash_attn_with_kvcache(q, k, v, cache_seqlens=2, alibi_slopes=torch.ones(4)))
