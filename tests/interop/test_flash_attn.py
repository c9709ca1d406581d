"""flash_attn's functions over whole sequences against the oracle, and against each other."""

import inspect
from itertools import accumulate

import numpy as np
import pytest
import torch
from problems import DTYPES, HEADS
from varlen_problems import Packed, expect, random_options

from flashlib import BackendUnavailableError, FlashAttentionConfig, use_config
from flashlib.backends import BACKENDS
from flashlib.interop import flash_attn
from flashlib.interop.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashlib.measure.counting.meter import TrafficMeter
from flashlib.reference import check, check_gradients

SHARED = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # as in flash_attn 2.8.3
    "flash_attn_func": f"(q, k, v, {SHARED})",
    "flash_attn_qkvpacked_func": f"(qkv, {SHARED})",
    "flash_attn_kvpacked_func": f"(q, kv, {SHARED})",
    "flash_attn_varlen_func": f"(q, k, v, {VARLEN}, {SHARED}, block_table=None)",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {SHARED})",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {VARLEN}, {SHARED})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
        "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)"
    ),
    "flash_attn_combine": "(out_partial, lse_partial, out=None, out_dtype=None)",  # as in FlashAttention-3
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_every_way_to_import_them():
    from flashlib.interop.flash_attn import bert_padding, flash_attn_interface

    assert flash_attn_interface.flash_attn_func is flash_attn.flash_attn_func and bert_padding.pad_input
    assert {*SIGNATURES, "install", "installed", "uninstall"} == set(
        flash_attn.__all__
    ) and flash_attn.__version__.startswith("2.8")


def random_inputs(rng, lengths_q, lengths_k, dtypes=DTYPES):
    """q, k, v ``[total, heads, head_dim]``, requiring gradients."""
    (heads, kv_heads), dtype, head_dim = rng.choice(HEADS), rng.choice(dtypes), rng.choice((8, 24, 64))
    shapes = ((sum(lengths_q), heads), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads))
    return [torch.randn(*shape, head_dim, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("round", range(12))
@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
def test_batches_of_one_length(backend, round, rng):
    batch, q_len, kv_len = rng.choice((1, 2, 3)), rng.choice((0, 1, 17, 40)), rng.choice((0, 1, 17, 60))
    packed = random_inputs(rng, [q_len] * batch, [kv_len] * batch)
    lengths = (q_len, kv_len, kv_len)
    q, k, v = (x.detach().unflatten(0, (batch, n)).requires_grad_() for x, n in zip(packed, lengths, strict=True))
    options, exact = random_options(rng)
    if rng.random() < 0.3:
        heads = (q.shape[2],) if rng.random() < 0.5 else (batch, q.shape[2])
        options["alibi_slopes"] = exact["alibi_slopes"] = torch.rand(heads)
    with use_config(FlashAttentionConfig(backend=backend)):
        out, lse, probabilities = flash_attn_func(q, k, v, **options, return_attn_probs=True)
        alone = flash_attn_func(q, k, v, **options)
    assert out.shape == q.shape and out.is_contiguous() and lse.shape == (batch, q.shape[2], q_len)
    assert probabilities.shape == (0,) and probabilities.dtype == q.dtype
    ours, theirs = (q, k, v), [x.transpose(1, 2) for x in (q, k, v)]
    for result, its_lse in ((out, lse), (alone, None)):
        comparison = check(result.transpose(1, 2), its_lse, *theirs, **exact)
        assert comparison.passed, f"{options}: {comparison.message}"
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    gradients = [g.transpose(1, 2) for g in torch.autograd.grad((out, lse), ours, grads)]
    comparison = check_gradients(gradients, *theirs, grads[0].transpose(1, 2), grads[1], **exact)
    assert comparison.passed, f"{options}: {comparison.message}"


@pytest.mark.parametrize("round", range(20))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_packed_sequences_are_each_its_own_problem(backend, round, rng):
    """Every sequence against the oracle, forward and backward; what no query sees is NaN."""
    problem = Packed.draw(rng, alibi=rng.random() < 0.5)
    with use_config(FlashAttentionConfig(backend=backend)):
        results, given, gradients = problem.run_with_gradients()
    expect(problem, problem.compare(*results) + problem.compare_gradients(given, gradients))


@pytest.mark.parametrize("sequences", [None, [5, 0, 9]], ids=["padded", "varlen"])
def test_packed_tensors_are_the_same_call_and_get_the_gradient(sequences, rng):
    """q, k, v in one tensor: the same bits out, and one gradient, in that tensor."""
    options = {"causal": True, "window_size": (6, -1), "softcap": 3.0, "return_attn_probs": True}
    lead, lengths = ((2, 14), ()) if sequences is None else ((14,), _of(sequences))
    qkv = torch.randn(*lead, 3, 4, 8, requires_grad=True)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(-3))
    kv = torch.stack((k, v), dim=-3).detach().requires_grad_()
    if sequences is None:
        functions = flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func
        pair = ()
    else:
        functions = flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func
        pair = (lengths[0], lengths[0], lengths[1], lengths[1])
    apart, of_three, of_two = functions
    results = [apart(q, k, v, *pair, **options), of_three(qkv, *lengths, **options), of_two(q, kv, *pair, **options)]
    grad = torch.randn_like(results[0][0])
    dq, dk, dv = torch.autograd.grad(results[0][0], (q, k, v), grad)
    (dqkv,) = torch.autograd.grad(results[1][0], qkv, grad)
    dq2, dkv = torch.autograd.grad(results[2][0], (q, kv), grad)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))
    assert torch.equal(dqkv, torch.stack((dq, dk, dv), dim=-3))
    assert torch.equal(dq2, dq) and torch.equal(dkv, torch.stack((dk, dv), dim=-3))


def _of(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths)


def test_arguments_by_position(rng):
    """In flash_attn's order: dropout_p, softmax_scale, causal, window_size, softcap, ..."""
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind()
    slopes = torch.rand(4)
    by_name = flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=0.2, causal=True, window_size=(4, 0), softcap=5.0, alibi_slopes=slopes,
        deterministic=True, return_attn_probs=True,
    )  # fmt: skip
    by_place = flash_attn_func(q, k, v, 0.0, 0.2, True, (4, 0), 5.0, slopes, True, True)
    assert all(torch.equal(*pair) for pair in zip(by_name, by_place, strict=True))


def test_no_tensor_grows_with_the_square(rng):
    """4,096 tokens in 64 sequences, forward and backward, with the backend that auto picks: nothing near 4,096 x 4,096."""
    qkv, (ends, longest) = torch.randn(4096, 3, 1, 8, requires_grad=True), _of([64] * 64)
    with TrafficMeter() as meter:
        flash_attn_varlen_qkvpacked_func(qkv, ends, longest, causal=True).sum().backward()
    assert meter.largest.elements <= 8 * qkv.numel()  # the CPU kernels sum dQ in at most 16 parts of a third of that


def spy_on(monkeypatch, names):
    """Record which of these backends run, and under which configuration."""
    calls = []
    for name in names:
        usual = BACKENDS[name].run

        def run(q, k, v, spec, config, name=name, usual=usual):
            calls.append((name, config))
            return usual(q, k, v, spec, config)

        monkeypatch.setattr(BACKENDS[name], "run", run)
    return calls


def test_deterministic_leaves_out_what_may_not_repeat(monkeypatch, rng):
    calls = spy_on(monkeypatch, ("tiled", "torch_sdpa_flash"))
    q = torch.randn(1, 9, 2, 8)
    with use_config(FlashAttentionConfig(order=["torch_sdpa_flash", "tiled"])):
        flash_attn_func(q, q, q, deterministic=True)  # without gradients every backend repeats itself
        q.requires_grad_()
        flash_attn_func(q, q, q)
        flash_attn_func(q, q, q, deterministic=True)
    assert [name for name, _ in calls] == ["torch_sdpa_flash", "torch_sdpa_flash", "tiled"]
    assert [config.fa2.deterministic and config.fa3.deterministic for _, config in calls] == [False, False, True]
    message = "deterministic=True: the gradients of 'torch_sdpa_flash' may differ"
    with (
        use_config(FlashAttentionConfig(backend="torch_sdpa_flash")),
        pytest.raises(BackendUnavailableError, match=message),
    ):
        flash_attn_func(q, q, q, deterministic=True)


def test_packed_sequences_leave_out_what_would_make_the_matrix(monkeypatch, rng):
    calls = spy_on(monkeypatch, ("cpu", "tiled", "torch_sdpa_flash", "reference"))
    q, (ends, longest) = torch.randn(9, 2, 8), _of([4, 5])
    for config in (FlashAttentionConfig(), FlashAttentionConfig(order=["torch_sdpa_flash", "reference"])):
        with use_config(config):
            flash_attn_varlen_func(q, q, q, ends, ends, longest, longest)
    assert [name for name, _ in calls] == ["tiled" if BACKENDS["cpu"].missing() else "cpu", "reference"]
    message = "none of torch_sdpa_flash runs packed sequences"
    with (
        use_config(FlashAttentionConfig(order=["torch_sdpa_flash"])),
        pytest.raises(BackendUnavailableError, match=message),
    ):
        flash_attn_varlen_func(q, q, q, ends, ends, longest, longest)
    with use_config(FlashAttentionConfig(backend="torch_sdpa_flash")):  # asked for by name, matrix and all
        flash_attn_varlen_func(q, q, q, ends, ends, longest, longest)
    assert calls[-1][0] == "torch_sdpa_flash"


def test_cumulative_lengths_are_those_of_now(rng):
    """A model's layers all get the same tensor. In place of the old lengths, new ones are seen, however they were written, and bad ones refused."""
    q, (ends, longest) = torch.randn(9, 2, 8), _of([4, 5])

    def run():
        return flash_attn_varlen_func(q, q, q, ends, ends, 9, 9)

    first = run()
    assert torch.equal(run(), first)
    writes = (
        lambda at: ends.fill_(0).copy_(at),
        lambda at: ends.data.copy_(at),
        lambda at: np.copyto(ends.numpy(), at.numpy()),
    )
    for round, write in enumerate(writes):
        write(torch.tensor([0, 2 + round, 9], dtype=ends.dtype))
        assert torch.equal(run(), flash_attn_varlen_func(q, q, q, ends.clone(), ends.clone(), 9, 9))
        assert torch.equal(run(), first) == (2 + round == 4)
        write(torch.tensor([0, 11, 9], dtype=ends.dtype))
        with pytest.raises(ValueError, match="cu_seqlens_q must never fall; got 11 and then 9"):
            run()
    with torch.inference_mode():
        own = torch.tensor([0, 4, 9])
        assert torch.equal(flash_attn_varlen_func(q, q, q, own, own, longest, longest), first)


def test_torch_compile_gives_the_same(rng):
    q, (ends, longest) = torch.randn(9, 2, 8), _of([4, 5])

    def layer(q):
        out = flash_attn_varlen_func(2 * q, q, q, ends, ends, longest, longest, causal=True)
        return out + flash_attn_func(q[None], q[None], q[None], causal=True)[0]

    torch.testing.assert_close(
        torch.compile(layer, backend="eager")(q), layer(q)
    )  # a small problem may take another backend eagerly


Q, K, QKV, KV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8), torch.zeros(2, 5, 3, 4, 8), torch.zeros(2, 7, 2, 2, 8)
T, TQKV, TKV = torch.zeros(9, 4, 8), torch.zeros(9, 3, 4, 8), torch.zeros(9, 2, 2, 8)
ENDS = torch.tensor([0, 4, 9], dtype=torch.int32)


def varlen(q=T, k=T, v=T, cu_q=ENDS, cu_k=ENDS, max_q=5, max_k=5, **options):
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)


BAD = [
    # Options
    (lambda: flash_attn_func(Q, K, K, -0.1), ValueError, "dropout_p must be at least 0 and below 1; got -0.1"),
    (lambda: flash_attn_func(Q, K, K, None), TypeError, "dropout_p must be a number; got None"),
    (lambda: flash_attn_func(Q, K, K, float("nan")), ValueError, "dropout_p must be at least 0 and below 1; got nan"),
    (lambda: flash_attn_func(Q, K, K, softmax_scale=0.0), ValueError, "softmax_scale must be above 0 and finite, or None; got 0.0"),
    (lambda: flash_attn_func(Q, K, K, softmax_scale="1"), TypeError, "softmax_scale must be a number; got '1'"),
    (lambda: flash_attn_func(Q, K, K, softmax_scale=float("nan")), ValueError, "softmax_scale must be above 0 and finite, or None; got nan"),
    (lambda: flash_attn_func(Q, K, K, causal="no"), TypeError, "causal must be True or False; got 'no'"),
    (lambda: flash_attn_func(Q, K, K, deterministic=[True]), TypeError, "deterministic must be True or False; got [True]"),
    (lambda: flash_attn_func(Q, K, K, return_attn_probs="yes"), TypeError, "return_attn_probs must be True or False; got 'yes'"),
    (lambda: flash_attn_func(Q, K, K, window_size=4), TypeError, "window_size must be two ints (left, right); got 4"),
    (lambda: flash_attn_func(Q, K, K, window_size=(4, 4, 4)), TypeError, "window_size must be two ints (left, right); got (4, 4, 4)"),
    (lambda: flash_attn_func(Q, K, K, window_size=(4, None)), TypeError, "window_size must be two ints (left, right); got (4, None)"),
    (lambda: flash_attn_func(Q, K, K, softcap=None), TypeError, "softcap must be a number; got None"),
    (lambda: flash_attn_func(Q, K, K, softcap=float("inf")), ValueError, "softcap must be finite; got inf"),
    (lambda: flash_attn_func(Q, K, K, softcap=float("nan")), ValueError, "softcap must be finite; got nan"),
    (lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.zeros(3)), ValueError, "alibi_slopes has shape (3,); expected (4,) or (2, 4)"),
    (lambda: flash_attn_func(Q, K, K, alibi_slopes=[0.1]), TypeError, "alibi_slopes must be a torch.Tensor or None; got list"),
    (lambda: varlen(alibi_slopes=[0.1]), TypeError, "alibi_slopes must be a torch.Tensor or None; got list"),
    (lambda: varlen(alibi_slopes=torch.zeros(1, 4)), ValueError, "alibi_slopes has shape (1, 4); expected (4,) or (2, 4): one per query head"),
    (lambda: varlen(alibi_slopes=torch.zeros(2, 4).half()), TypeError, "alibi_slopes is torch.float16; expected float32"),
    (lambda: varlen(alibi_slopes=torch.zeros(2, 4, device="meta")), TypeError, "alibi_slopes is on meta but q is on cpu"),
    (lambda: varlen(alibi_slopes=torch.zeros(2, 4, requires_grad=True)), ValueError, "pass alibi_slopes.detach()"),
    # Tensors
    (lambda: flash_attn_func([1.0], K, K), TypeError, "q must be [batch, seqlen_q, nheads, headdim], a torch.Tensor; got list"),
    (lambda: flash_attn_func(Q, K[0], K), ValueError, "k must be [batch, seqlen_k, nheads_k, headdim]; got shape (7, 2, 8)"),
    (lambda: flash_attn_func(Q, K[:1], K), ValueError, "got shape (1, 7, 2, 8), but batch is 2 in q"),
    (lambda: flash_attn_func(Q, K, K[:, :6]), ValueError, "v must be [batch, seqlen_k, nheads_k, headdim_v]; got shape (2, 6, 2, 8), but seqlen_k is 7 in k"),
    (lambda: flash_attn_func(Q, K[..., :7], K), ValueError, "got shape (2, 7, 2, 7), but headdim is 8 in q"),
    (lambda: flash_attn_func(Q, K[:, :, :1], K), ValueError, "but nheads_k is 1 in k"),
    (lambda: flash_attn_func(Q[:, :, :3], K, K), ValueError, "nheads must be a multiple of nheads_k; got 3 and 2"),
    (lambda: flash_attn_func(Q, K[:, :, :0], K[:, :, :0]), ValueError, "nheads must be a multiple of nheads_k; got 4 and 0"),
    (lambda: flash_attn_func(Q, K.half(), K), TypeError, "k has dtype torch.float16, but q has torch.float32; all must have one"),
    (lambda: flash_attn_func(Q, K, K.to("meta")), TypeError, "v has device meta, but q has cpu; all must have one"),
    (lambda: flash_attn_func(Q.int(), K, K), TypeError, "q is torch.int32; expected float16, bfloat16, float32 or float64"),
    (lambda: flash_attn_qkvpacked_func(Q), ValueError, "qkv must be [batch, seqlen, 3, nheads, headdim]; got shape (2, 5, 4, 8)"),
    (lambda: flash_attn_qkvpacked_func(QKV[:, :, :2]), ValueError, "got shape (2, 5, 2, 4, 8), but expected 3 in place of 2"),
    (lambda: flash_attn_kvpacked_func(Q, QKV), ValueError, "kv must be [batch, seqlen_k, 2, nheads_k, headdim]; got shape (2, 5, 3, 4, 8), but expected 2 in place of 3"),
    (lambda: flash_attn_kvpacked_func(Q, KV.half()), TypeError, "kv has dtype torch.float16, but q has torch.float32"),
    (lambda: flash_attn_varlen_qkvpacked_func(TKV, ENDS, 5), ValueError, "qkv must be [total, 3, nheads, headdim]; got shape (9, 2, 2, 8), but expected 3 in place of 2"),
    (lambda: flash_attn_varlen_kvpacked_func(T, TQKV, ENDS, ENDS, 5, 5), ValueError, "kv must be [total_k, 2, nheads_k, headdim]"),
    # Packed sequences
    (lambda: varlen(q=Q), ValueError, "q must be [total_q, nheads, headdim]; got shape (2, 5, 4, 8)"),
    (lambda: varlen(k=T[:8]), ValueError, "but total_k is 8 in k"),
    (lambda: varlen(cu_q=[0, 4, 9]), TypeError, "cu_seqlens_q must be a torch.Tensor [batch + 1]; got list"),
    (lambda: varlen(cu_k=None), TypeError, "cu_seqlens_k must be a torch.Tensor [batch + 1]; got NoneType"),
    (lambda: varlen(cu_q=ENDS.float()), TypeError, "cu_seqlens_q must hold integers; got torch.float32"),
    (lambda: varlen(cu_q=ENDS[None]), ValueError, "cu_seqlens_q must be 1-dimensional; got shape (1, 3)"),
    (lambda: varlen(cu_q=ENDS[1:]), ValueError, "cu_seqlens_q must begin with 0; got [4]"),
    (lambda: varlen(cu_q=ENDS[:0]), ValueError, "cu_seqlens_q must begin with 0; got []"),
    (lambda: varlen(cu_k=torch.tensor([0, 5, 4])), ValueError, "cu_seqlens_k must never fall; got 5 and then 4, at entry 2"),
    (lambda: varlen(cu_k=ENDS[:2]), ValueError, "cu_seqlens_q has 2 sequences, but cu_seqlens_k has 1"),
    (lambda: varlen(cu_q=2 * ENDS, max_q=10), ValueError, "cu_seqlens_q goes up to 18, but there are only 9 tokens"),
    (lambda: varlen(cu_k=2 * ENDS, max_k=10), ValueError, "cu_seqlens_k goes up to 18, but there are only 9 tokens"),
    (lambda: varlen(max_q=4), ValueError, "max_seqlen_q must be at least the length of the longest sequence, 5; got 4"),
    (lambda: varlen(max_k=4), ValueError, "max_seqlen_k must be at least the length of the longest sequence, 5; got 4"),
    (lambda: varlen(max_q=5.0), TypeError, "max_seqlen_q must be an int; got 5.0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
