"""KV injection: exact in both meanings of alpha, in chunks, with bounded memory, and differentiable."""

import math

import numpy as np
import pytest
import torch

from flashlib import FlashAttentionConfig, attention, use_config
from flashlib.config import InjectionConfig
from flashlib.inference.injection import KVInjector, Memory, alphas_by_layer
from flashlib.masks import Causal, KeyLengths
from flashlib.measure.counting.meter import TrafficMeter
from flashlib.reference import assert_within_budget, error_budget, largest_error, one_rounding, oracle
from flashlib.rotary import apply_rotary, rotary_frequencies
from flashlib.tiled import Tiling

MODES = ("blend", "gate")


def injector(mode, backend="auto", **settings):
    return KVInjector(InjectionConfig(mode=mode, **settings), backend=backend)


def problem(rng, dtype=torch.float32, q_len=None):
    """q, k, v, a memory, and the options of a call together with the same options for the concatenation."""
    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 2), rng.choice((1, 2, 3))
    dim, v_dim = rng.choice((8, 16)), rng.choice((8, 12))
    kv_len, length = rng.randint(1, 20), rng.choice((0, 1, 7, 150))
    q_len = q_len or rng.randint(1, kv_len)
    memories = rng.choice((1, batch))
    q = torch.randn(batch, kv_heads * group, q_len, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, d, dtype=dtype) for d in (dim, v_dim))
    memory = Memory(*(torch.randn(memories, kv_heads, length, d, dtype=dtype) for d in (dim, v_dim)))
    lengths = torch.tensor([rng.randint(0, kv_len) for _ in range(batch)])
    mask, whole_mask = rng.choice(
        ((None, None), (Causal(), Causal()), (KeyLengths(lengths), KeyLengths(lengths + length)))
    )
    options = {"scale": rng.choice((dim**-0.5, 0.4)), "softcap": rng.choice((0.0, 0.0, 4.0))}
    return q, k, v, memory, {"mask": mask, **options}, {"mask": whole_mask, **options}


def concatenated(k, v, memory):
    """What injection never makes."""
    return tuple(
        torch.cat([x.expand(own.shape[0], -1, -1, -1), own], dim=2) for x, own in ((memory.k, k), (memory.v, v))
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("repeat", range(15))
def test_alpha_1_is_the_concatenation(rng, mode, repeat):
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
    q, k, v, memory, options, whole = problem(rng, dtype)
    out = injector(mode).inject(q, k, v, memory, alpha=1.0, **options)
    assert_within_budget(out, q, *concatenated(k, v, memory), **whole)
    assert out.dtype == dtype


@pytest.mark.parametrize("repeat", range(15))
def test_blend_is_a_mixture_of_both_outputs(rng, repeat):
    q, k, v, memory, options, whole = problem(rng)
    alpha, both = rng.random(), concatenated(k, v, memory)
    out = injector("blend").inject(q, k, v, memory, alpha=alpha, **options)
    local, injected = oracle(q, k, v, **options)[0], oracle(q, *both, **whole)[0]
    exact = (1 - alpha) * local + alpha * injected
    budget = (1 - alpha) * error_budget(q, k, v, **options).out + alpha * error_budget(q, *both, **whole).out
    assert largest_error(out, exact) <= budget + one_rounding(exact, q.dtype)


@pytest.mark.parametrize("repeat", range(15))
def test_gate_adds_log_alpha_to_the_scores_of_the_memory(rng, repeat):
    q, k, v, memory, options, whole = problem(rng)
    options["softcap"] = whole["softcap"] = 0.0
    alpha = rng.choice((1e-30, 1e-4, 0.3, 0.99, 1.7, 50.0))
    out = injector("gate").inject(q, k, v, memory, alpha=alpha, **options)
    # One channel more says the same in plain attention: 1 in every query, log(alpha) / scale in the memory's keys.
    gate = torch.full((*memory.k.shape[:3], 1), math.log(alpha) / whole["scale"])
    gated = Memory(torch.cat([memory.k, gate], dim=3), memory.v)
    k_gated, v_gated = concatenated(torch.cat([k, torch.zeros(*k.shape[:3], 1)], dim=3), v, gated)
    assert_within_budget(out, torch.cat([q, torch.ones(*q.shape[:3], 1)], dim=3), k_gated, v_gated, **whole)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_0_is_bitwise_no_memory_and_does_not_read_it(rng, mode):
    q, k, v, memory, options, _ = problem(rng)
    unread = Memory(torch.full_like(memory.k, math.nan), torch.full_like(memory.v, math.nan))
    tool = injector(mode)
    assert torch.equal(tool.inject(q, k, v, unread, alpha=0, **options), attention(q, k, v, **options))
    assert torch.equal(tool.inject_chunked(q, k, v, unread, alpha=0, **options), attention(q, k, v, **options))
    # As a tensor its value is not looked at: the memory is read, and counts for nothing.
    tool = injector(mode, backend="tiled")
    zeros = torch.zeros(q.shape[1])
    assert torch.equal(
        tool.inject(q, k, v, memory, alpha=zeros, **options), attention(q, k, v, backend="tiled", **options)
    )


@pytest.mark.parametrize("mode", MODES)
def test_alpha_0_where_the_memory_would_take_everything(rng, mode):
    q, k, v = torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    strong = Memory(torch.full((1, 1, 2, 4), 200.0), torch.randn(1, 1, 2, 4))  # scores of 400 against 0
    alpha = torch.zeros((), requires_grad=True)
    out = injector(mode).inject(q, k, v, strong, alpha=alpha)
    assert_within_budget(out, q, k, v)
    out.sum().backward()
    assert alpha.grad.isfinite()


@pytest.mark.parametrize("mode", MODES)
def test_alpha_of_each_head_and_request(rng, mode):
    q, k, v, memory, options, _ = problem(rng)
    batch, heads = q.shape[:2]
    alpha = torch.rand(batch, heads)
    tool = injector(mode)
    out = tool.inject(q, k, v, memory, alpha=alpha, **options)
    for b in range(batch):
        for h in range(heads):
            single = tool.inject(q, k, v, memory, alpha=float(alpha[b, h]), **options)[b, h]
            assert torch.allclose(out[b, h], single, rtol=0, atol=8 * torch.finfo().eps * float(v.abs().max()))
    per_head = tool.inject(q, k, v, memory, alpha=alpha[0], **options)
    assert torch.equal(per_head, tool.inject(q, k, v, memory, alpha=alpha[:1].expand(batch, -1), **options))


def test_the_smallest_gate_is_enough_for_rows_that_have_nothing_else(rng):
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    memory = Memory(torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8))
    for alpha in (1e-30, torch.tensor(1e-30)):
        out = injector("gate").inject(q, k, v, memory, alpha=alpha, mask=KeyLengths([0]))
        assert_within_budget(out, q, memory.k, memory.v)


def test_rows_that_see_nothing_of_their_own_see_the_memory(rng):
    q, k, v = torch.randn(2, 2, 1, 8), torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)
    memory = Memory(torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8))
    mask = KeyLengths([0, 4])
    for mode in MODES:
        out = injector(mode).inject(q, k, v, memory, mask=mask)
        assert_within_budget(out[:1], q[:1], memory.k[:1], memory.v[:1])
        assert not injector(mode).inject(q, k, v, memory, alpha=0.0, mask=mask)[0].any()
    nothing = Memory(memory.k[:, :, :0], memory.v[:, :, :0])
    for mode in MODES:
        out = injector(mode).inject(q, k, v, nothing, alpha=torch.tensor(0.5), mask=mask)
        assert not out[0].any()
        assert_within_budget(out[1:], q[1:], k[1:], v[1:])


@pytest.mark.parametrize("repeat", range(10))
def test_chunks_are_exact_whatever_their_size(rng, repeat):
    dtype = rng.choice((torch.float32, torch.bfloat16))
    q, k, v, memory, options, whole = problem(rng, dtype)
    out = injector(rng.choice(MODES)).inject_chunked(q, k, v, memory, chunk_size=rng.choice((1, 3, 64, 500)), **options)
    assert_within_budget(out, q, *concatenated(k, v, memory), **whole)


def test_the_documents_average_of_chunks_is_far_outside_the_budget(rng):
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    memory = Memory(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    tool = injector("blend")
    averaged = torch.stack([tool.inject(q, k, v, chunk) for chunk in memory.chunks(10)]).mean(0)
    both = concatenated(k, v, memory)
    assert largest_error(averaged, oracle(q, *both)[0]) > 1000 * error_budget(q, *both).out


def test_chunks_from_an_iterator_in_another_precision(rng, tmp_path):
    keys, dim, chunk_size = 1000, 16, 96
    stored = np.memmap(tmp_path / "memory.bin", dtype=np.float16, mode="w+", shape=(2, 1, 2, keys, dim))
    stored[:] = np.random.default_rng(rng.getrandbits(32)).standard_normal(stored.shape)
    k_stored, v_stored = torch.from_numpy(stored).unbind(0)
    chunks = (
        Memory(k_stored[:, :, i : i + chunk_size].clone(), v_stored[:, :, i : i + chunk_size].clone())
        for i in range(0, keys, chunk_size)
    )
    q, k, v = torch.randn(3, 4, 2, dim), torch.randn(3, 2, 5, dim), torch.randn(3, 2, 5, dim)
    out = injector("gate").inject_chunked(q, k, v, chunks, causal=True)
    both = concatenated(k, v, Memory(k_stored.float(), v_stored.float()))
    assert_within_budget(out, q, *both, causal=True)


LONG_TILES = FlashAttentionConfig(tiled=Tiling(block_k=1024))


def extra_memory(keys, chunk_size, make):
    """Peak bytes of what one injection makes beside q, k, v, when its memory comes from ``make(first, count)``."""
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    tool = injector("blend", backend="tiled")
    with use_config(LONG_TILES), TrafficMeter() as meter:
        tool.inject_chunked(q, k, v, (make(first, chunk_size) for first in range(0, keys, chunk_size)))
    return meter.peak_bytes


@pytest.mark.parametrize("loaded", ["as_float32", "as_float16"])
def test_128k_keys_take_the_memory_of_one_chunk(loaded):
    chunk_size, dim = 4096, 16

    def make(first, count):
        k = torch.zeros(1, 1, count, dim, dtype=getattr(torch, loaded.removeprefix("as_")))
        return Memory(k.fill_(first % 7), torch.full_like(k, first % 5))

    one, all_chunks = (extra_memory(keys, chunk_size, make) for keys in (chunk_size, 32 * chunk_size))
    chunk = make(0, chunk_size)
    as_computed = chunk.nbytes * 4 // chunk.k.element_size()
    given = 0 if chunk.k.dtype == torch.float32 else chunk.nbytes  # a chunk in another precision is there twice
    scratch = 64 * 1024  # the scores of one tile, 2 rows x 1024 keys, a few times over: nothing that grows
    assert chunk.nbytes < one <= as_computed + given + scratch
    assert all_chunks <= one + 256


def test_chunks_of_a_memory_in_place_are_not_copied():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    memory = Memory(torch.randn(1, 1, 2**17, 16), torch.randn(1, 1, 2**17, 16))
    with use_config(LONG_TILES), TrafficMeter(memory_k=memory.k, memory_v=memory.v) as meter:
        out = injector("blend", backend="tiled").inject_chunked(q, k, v, memory, chunk_size=2**13)
    assert meter.times_read == {"memory_k": 1.0, "memory_v": 1.0}
    assert meter.peak_bytes < memory.nbytes / 100
    assert_within_budget(out, q, *concatenated(k, v, memory))


def test_a_memory_shared_by_a_batch_is_read_once_and_not_copied():
    q, k, v = torch.randn(16, 4, 1, 16), torch.randn(16, 2, 3, 16), torch.randn(16, 2, 3, 16)
    memory = Memory(torch.randn(1, 2, 4096, 16), torch.randn(1, 2, 4096, 16))
    with TrafficMeter(memory_k=memory.k, memory_v=memory.v) as meter:
        injector("blend", backend="tiled").inject(q, k, v, memory)
    assert meter.times_read == {"memory_k": 1.0, "memory_v": 1.0}
    assert meter.peak_bytes < memory.nbytes / 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [None, "scalar", "per head", "zero"])
def test_gradients(rng, mode, alpha):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, k, v = leaf(2, 2, 3, 4), leaf(2, 1, 4, 4), leaf(2, 1, 4, 3)
    memories = rng.choice((1, 2))
    k_memory, v_memory = leaf(memories, 1, 5, 4), leaf(memories, 1, 5, 3)
    alphas = {"scalar": torch.rand(()), "per head": torch.rand(2, 2), "zero": torch.zeros(2)}
    alpha = (alphas[alpha].double().requires_grad_(),) if alpha else ()
    tool = injector(mode, backend="tiled")

    def run(q, k, v, k_memory, v_memory, alpha=0.7):
        return tool.inject(q, k, v, Memory(k_memory, v_memory), alpha=alpha, causal=True)

    def run_chunked(q, k, v, k_memory, v_memory, alpha=0.7):
        return tool.inject_chunked(q, k, v, Memory(k_memory, v_memory), alpha=alpha, causal=True, chunk_size=2)

    for function in (run, run_chunked):
        assert torch.autograd.gradcheck(function, (q, k, v, k_memory, v_memory, *alpha), fast_mode=True)


def test_a_memory_can_be_learned(rng):
    q, k, v = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 6, 8), torch.randn(4, 2, 6, 8)
    hidden = Memory(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    tool = injector("gate")
    wanted = tool.inject(q, k, v, hidden)
    # From a blurred copy: beside a memory that has nothing to do with the hidden one, the best gate may be a closed one.
    learned = Memory(*((x + 0.5 * torch.randn_like(x)).requires_grad_() for x in (hidden.k, hidden.v)))
    gate = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([learned.k, learned.v, gate], lr=0.05)
    losses = []
    for _ in range(100):
        loss = (tool.inject(q, k, v, learned, alpha=gate) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert gate.detach().abs().min() > 0.05


def test_a_turned_memory_is_one_encoded_elsewhere(rng):
    frequencies = rotary_frequencies(16)
    k, by = torch.randn(1, 2, 9, 16, dtype=torch.float64), rng.randint(-1000, 1000)
    memory = Memory(apply_rotary(k, torch.arange(9), frequencies), torch.randn(1, 2, 9, 16, dtype=torch.float64))
    turned = memory.turned(by, frequencies)
    assert torch.allclose(turned.k, apply_rotary(k, torch.arange(9) + by, frequencies), rtol=0, atol=1e-12)
    assert turned.v is memory.v


def test_injection_equals_recomputation_at_the_true_positions(rng):
    """One text of 20 tokens, the first 12 of them as a memory: turned back by 12, or the prompt moved on by 12."""
    frequencies, tokens, cut = rotary_frequencies(16), 20, 12
    q, k, v = (torch.randn(1, 2, tokens, 16, dtype=torch.float64) for _ in range(3))

    def rotated(x, first, last, start):
        return apply_rotary(x[:, :, first:last], torch.arange(start, start + last - first), frequencies)

    whole = attention(rotated(q, 0, tokens, 0), rotated(k, 0, tokens, 0), v, causal=True)[:, :, cut:]
    memory = Memory(rotated(k, 0, cut, 0), v[:, :, :cut])
    tool, own_v = injector("blend"), v[:, :, cut:]
    moved_prompt = tool.inject(rotated(q, cut, tokens, cut), rotated(k, cut, tokens, cut), own_v, memory, causal=True)
    own = (rotated(q, cut, tokens, 0), rotated(k, cut, tokens, 0), own_v)
    moved_memory = tool.inject(*own, memory.turned(-cut, frequencies), causal=True)
    overlapping = tool.inject(*own, memory, causal=True)
    assert torch.allclose(moved_prompt, whole, rtol=0, atol=1e-12)
    assert torch.allclose(moved_memory, whole, rtol=0, atol=1e-12)
    assert (overlapping - whole).abs().max() > 1e-2


def test_layers_with_their_own_memory_and_alpha(rng):
    inputs, memories = [], []
    for _ in range(3):
        q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
        inputs.append((q, k, v))
        memories.append(Memory(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)))
    memories[1] = None
    tool = injector("gate")
    outs = tool.inject_multi_layer(inputs, memories, alpha={0: 0.25, 1: 0.5}, causal=True)
    assert torch.equal(outs[0], tool.inject(*inputs[0], memories[0], alpha=0.25, causal=True))
    assert torch.equal(outs[1], attention(*inputs[1], causal=True))
    assert torch.equal(outs[2], attention(*inputs[2], causal=True))
    assert [tool.statistics[layer].keys for layer in range(3)] == [6, 0, 0]
    with pytest.raises(ValueError, match="memories must be one per layer, 3; got 2"):
        tool.inject_multi_layer(inputs, memories[:2])


def test_alphas_by_layer():
    assert alphas_by_layer(0.5, 3) == [0.5, 0.5, 0.5]
    assert alphas_by_layer([0.1, 0.2, 0.3], 3) == [0.1, 0.2, 0.3]
    assert alphas_by_layer({2: 0.5}, 3) == [0.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="alpha must be one per layer, 3; got 2"):
        alphas_by_layer([0.1, 0.2], 3)
    with pytest.raises(ValueError, match="alpha: layers are 0 to 2; got 3"):
        alphas_by_layer({3: 1.0}, 3)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_means_over_the_calls(rng, mode):
    tool = injector(mode)
    shares, lengths = [], []
    for _ in range(5):
        q, k, v, memory, options, whole = problem(rng, torch.float64)
        alpha = rng.random()
        tool.inject(q, k, v, memory, alpha=alpha, layer=3, **options)
        _, local_lse = oracle(q, k, v, **options)
        _, whole_lse = oracle(q, *concatenated(k, v, memory), **whole)
        own = (local_lse - whole_lse).exp().nan_to_num(nan=0.0) if memory.length else torch.ones_like(local_lse)
        own = torch.where(whole_lse.isinf(), 1.0, own)
        share = alpha * (1 - own)
        shares.append(float((share if mode == "blend" else share / (own + share)).mean()))
        lengths.append(memory.length)
    statistics = tool.statistics[3]
    assert statistics.calls == 5
    assert math.isclose(statistics.keys, np.mean(lengths))
    assert math.isclose(statistics.share, np.mean(shares), abs_tol=1e-9)
    assert "5 calls" in str(statistics)
    assert list(tool.statistics) == [3]


def test_configuration():
    settings = {"injection": {"mode": "gate", "alpha": 0.5, "chunk_size": 7}}
    config = FlashAttentionConfig.from_dict(settings)
    with use_config(config):
        assert KVInjector().config == InjectionConfig("gate", 0.5, 7)
    assert KVInjector().config == InjectionConfig("blend", 1.0, 1024)
    assert FlashAttentionConfig.from_dict(config.to_dict()) == config
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    memory = Memory(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
    by_config = KVInjector(config.injection)
    assert torch.equal(by_config.inject(q, k, v, memory), by_config.inject(q, k, v, memory, alpha=0.5))


Q, K, V = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
FITS = Memory(K[:1], V[:1])
BAD = [
    (lambda: InjectionConfig(mode="add"), ValueError, "mode must be one of blend, gate; got 'add'"),
    (lambda: InjectionConfig(alpha=1.5), ValueError, "alpha must be between 0 and 1 in mode 'blend'; got 1.5"),
    (lambda: InjectionConfig(alpha="1"), TypeError, "alpha must be a number or a tensor; got str"),
    (lambda: InjectionConfig(chunk_size=0), ValueError, "chunk_size must be at least 1; got 0"),
    (lambda: KVInjector({"mode": "gate"}), TypeError, "config must be an InjectionConfig; got dict"),
    (lambda: Memory(K.numpy(), V), TypeError, "memory k must be a torch.Tensor; got ndarray"),
    (lambda: Memory(K, V[0]), ValueError, "memory v must be [B or 1, Hkv, M, head_dim]; got [2, 5, 8]"),
    (lambda: Memory(K, V[:, :, :4]), ValueError, "memory k and v must agree in all but head_dim"),
    (lambda: KVInjector().inject(Q, K, V, (K, V)), TypeError, "memory must be a Memory, or Memory objects in an"),
    (lambda: KVInjector().inject_chunked(Q, K, V, [(K, V)]), TypeError, "memory must be a Memory, or Memory objects"),
    (lambda: KVInjector().inject(Q, K, V, FITS, alpha=-0.1), ValueError, "alpha must be between 0 and 1"),
    (lambda: KVInjector().inject(Q, K, V, FITS, alpha=math.nan), ValueError, "alpha must be between 0 and 1"),
    (lambda: KVInjector().inject(Q, K, V, FITS, alpha=True), TypeError, "alpha must be a number or a tensor; got bool"),
    (
        lambda: KVInjector().inject(Q, K, V, FITS, alpha=torch.ones(3)),
        ValueError,
        "[Hq] or [B, Hq], here [4] or [2, 4]",
    ),
    (lambda: KVInjector().inject(Q, K, V, FITS, alpha=torch.tensor(1)), TypeError, "alpha must be floating point"),
    (
        lambda: injector("gate").inject(Q, K, V, FITS, alpha=math.inf),
        ValueError,
        "finite and at least 0 in mode 'gate'",
    ),
    (
        lambda: KVInjector().inject(Q, K, V, Memory(K[:, :1], V[:, :1])),
        ValueError,
        "memory k must be [2, 2, M, 8] or [1, 2, M, 8], to fit k [2, 2, 5, 8]; got [2, 1, 5, 8]",
    ),
    (lambda: KVInjector().inject(Q, K, V, Memory(K[..., :4], V)), ValueError, "memory k must be [2, 2, M, 8] or"),
    (lambda: KVInjector().inject(Q, K, V, Memory(K, V[..., :4])), ValueError, "memory v must be [2, 2, M, 8] or"),
    (lambda: KVInjector().inject(Q, K, V, Memory(K.half(), V.half())), TypeError, "memory k is torch.float16 on cpu"),
    (lambda: KVInjector().inject_chunked(Q, K, V, FITS, chunk_size=0), ValueError, "chunk_size must be at least 1"),
    (lambda: KVInjector().inject_chunked(Q, K, V, FITS, chunk_size=2.0), TypeError, "chunk_size must be an int"),
    (lambda: KVInjector().inject_chunked(Q, K, V, [FITS], chunk_size=2), ValueError, "chunk_size must be None for"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
