"""What a user of ``attention`` meets: bad input, alignment, empty problems, strides, choice of a backend, configuration."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import flashlib
from flashlib import (
    AttentionSpec,
    BackendUnavailableError,
    FlashAttentionConfig,
    attention,
    backends,
    explain,
    masks,
    use_config,
)
from flashlib.backends import BACKENDS, PREFERENCES, available, choose, order_of_choice
from flashlib.config import BACKEND_NAMES, current_config
from flashlib.measure import load_record
from flashlib.reference import assert_within_budget, check, check_gradients, error_budget, naive_attention, oracle

CPU_BACKENDS = [name for name, missing in available().items() if missing is None]


def qkv(*, batch=1, heads=2, kv_heads=2, q_len=5, kv_len=5, dim=8, seed=0, **kind):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim, generator=generator) for _ in range(2))
    return tuple(x.to(**kind) for x in (q, k, v))


Q, K, V = qkv()
BAD = [
    ((Q.numpy(), K, V), {}, TypeError, "q must be a torch.Tensor; got ndarray"),
    ((Q, K.long(), V), {}, TypeError, "k is torch.int64; expected one of float16, bfloat16, float32, float64"),
    ((Q[0], K, V), {}, ValueError, "q must be 4-dimensional [batch, heads, seq, head_dim]; got shape (2, 5, 8)"),
    ((Q, K, V.half()), {}, TypeError, "v is torch.float16 but q is torch.float32"),
    ((Q, K.to("meta"), V), {}, TypeError, "k is on meta but q is on cpu"),
    ((Q, K.repeat(2, 1, 1, 1), V), {}, ValueError, "k has batch 2 but q has batch 1"),
    ((Q, K, V[:, :, :4]), {}, ValueError, "k and v must have the same heads and length"),
    ((Q, K, V[:, :1]), {}, ValueError, "k and v must have the same heads and length"),
    ((Q, K[..., :7], V), {}, ValueError, "k has head_dim 7 but q has head_dim 8"),
    ((Q, *qkv(kv_heads=3)[1:]), {}, ValueError, "q has 2 heads and k has 3; expected a multiple of the KV heads"),
    ((Q, K[:, :0], V[:, :0]), {}, ValueError, "q has 2 heads and k has 0"),
    ((Q[..., :0], K[..., :0], V), {}, ValueError, "q has head_dim 0"),
    ((Q, K, V), {"causal": 1}, TypeError, "causal must be True or False; got 1"),
    ((Q, K, V), {"scale": "1"}, TypeError, "scale must be a number; got '1'"),
    ((Q, K, V), {"scale": True}, TypeError, "scale must be a number; got True"),
    ((Q, K, V), {"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    ((Q, K, V), {"scale": -0.5}, ValueError, "scale must be greater than 0; got -0.5"),
    ((Q, K, V), {"softcap": -1.0}, ValueError, "softcap must be at least 0 (0 for none); got -1.0"),
    ((Q, K, V), {"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a torch.Tensor or None; got float"),
    (
        (Q, K, V),
        {"alibi_slopes": torch.ones(Q.shape[1]).half()},
        TypeError,
        "alibi_slopes is torch.float16; expected float32",
    ),
    ((Q, K, V), {"alibi_slopes": torch.ones(Q.shape[1] + 1)}, ValueError, "one per query head"),
    (
        (Q, K, V),
        {"alibi_slopes": torch.ones(1, 2, 4)},
        ValueError,
        "or (1, 2, 5) or (1, 2, 5): one per query head and row",
    ),
    ((Q, K, V), {"alibi_slopes": torch.ones(Q.shape[1]).requires_grad_()}, ValueError, "pass alibi_slopes.detach()"),
    (
        (Q, K, V),
        {"mask": torch.ones(5, 5)},
        TypeError,
        "mask must be a flashlib.masks.Mask or None; got Tensor; say the rule",
    ),
    ((Q, K, V), {"mask": "causal"}, TypeError, "mask must be a flashlib.masks.Mask or None; got str"),
    ((Q, K, V), {"mask": masks.KeyLengths([1, 2])}, ValueError, "2 lengths for a batch of 1"),
]


@pytest.mark.parametrize("tensors, options, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(tensors, options, error, message):
    for call in (attention, naive_attention, AttentionSpec.from_tensors, flashlib.backends.pytorch.tiled_attention):
        with pytest.raises(error) as caught:
            call(*tensors, **options)
        assert message in str(caught.value)


def test_the_configuration_knows_every_backend():
    assert tuple(BACKENDS) == BACKEND_NAMES


def test_bad_backend_and_config_are_named():
    with pytest.raises(ValueError, match="there is no backend 'fast'; backends are reference, tiled"):
        attention(Q, K, V, backend="fast")
    with pytest.raises(TypeError, match="config must be a FlashAttentionConfig; got dict"):
        attention(Q, K, V, config={})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("q_len, kv_len", [(3, 6), (6, 3), (1, 6), (6, 1)])
def test_causal_is_bottom_right(backend, q_len, kv_len):
    q, k, v = qkv(q_len=q_len, kv_len=kv_len)
    visible = torch.ones(q_len, kv_len).tril(kv_len - q_len).bool()
    expected = torch.zeros(1, 2, q_len, 8)
    for i in range(q_len):
        if visible[i].any():
            weights = (q[:, :, i : i + 1] @ k[:, :, visible[i]].mT / 8**0.5).softmax(-1)
            expected[:, :, i : i + 1] = weights @ v[:, :, visible[i]]
    out = attention(q, k, v, causal=True, backend=backend)
    budget = error_budget(q, k, v, causal=True)
    assert (out - expected).abs().max() <= 2 * budget.out
    assert (out[:, :, : max(0, q_len - kv_len)] == 0).all()


def test_pytorch_aligns_top_left_and_we_do_not():
    q, k, v = qkv(q_len=3, kv_len=6)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    top_left = attention(q, k, v, mask=masks.Causal(offset=0))
    budget = error_budget(q, k, v, mask=masks.Causal(offset=0))
    assert (theirs - top_left).abs().max() <= budget.out
    assert (theirs - attention(q, k, v, causal=True)).abs().max() > 0.1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [{"q_len": 0}, {"kv_len": 0}, {"batch": 0}, {"q_len": 0, "kv_len": 0}])
def test_nothing_to_attend_gives_zeros_and_zero_gradients(backend, shape):
    inputs = [x.requires_grad_() for x in qkv(**shape)]
    out = attention(*inputs, backend=backend, causal=True)
    assert out.shape == (*inputs[0].shape[:3], 8)
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in inputs)


def test_empty_rows_have_lse_minus_infinity():
    q, k, v = qkv(kv_len=0)
    out, lse = attention(q, k, v, return_lse=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert lse.dtype == torch.float32
    assert attention(q.double(), k.double(), v.double(), return_lse=True)[1].dtype == torch.float64


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inputs_are_not_modified(backend):
    inputs = qkv(q_len=40, kv_len=40)
    before = [x.clone() for x in inputs]
    attention(*inputs, mask=masks.KeyLengths([30]), causal=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_very_large_and_very_negative_scores(backend, size):
    """exp of these overflows or vanishes unless the row's maximum is taken off first."""
    q, k, v = qkv(q_len=9, kv_len=70)
    q, k = size * q.abs(), k.abs()
    assert_within_budget(attention(q, k, v, backend=backend), q, k, v)


# Choice of a backend


def test_explain_lists_every_backend_once_and_marks_what_auto_runs():
    spec = AttentionSpec.from_tensors(Q, K, V)
    explanation = explain(spec)
    assert sorted(row[0] for row in explanation.rows) == sorted(BACKENDS)
    assert [row[0] for row in explanation.rows] == order_of_choice(current_config(), spec.device)
    assert explanation.chosen == choose(spec).name == "torch_sdpa_flash"
    assert f"->  {explanation.chosen}" in str(explanation)
    assert "<table>" in explanation._repr_html_()
    for name, runs, reason in explanation.rows:
        assert reason
        assert runs == (BACKENDS[name].why_not(spec, current_config()) is None)


def test_explain_tells_recorded_speeds_on_a_gpu_and_none_on_a_cpu():
    rows = load_record("h200/training_forward").select(peer="torch_sdpa_cudnn", length=16384, head_dim=128)
    full, causal = (next(row["tflops"] for row in rows if row["mask"] == mask) for mask in ("full", "causal"))
    told = backends._reasons(torch.device("cuda"))["torch_sdpa_cudnn"]
    assert told.endswith(f"; {full:.0f} / {causal:.0f} TFLOP/s full / causal on NVIDIA H200")
    assert backends._reasons(torch.device("cpu")) == {one.backend: one.reason for one in PREFERENCES}
    assert not any("TFLOP" in one.reason for one in PREFERENCES)


def test_our_kernels_come_first_on_a_gpu_and_behind_compiled_ones_on_a_cpu():
    preferred = [preference.backend for preference in PREFERENCES]
    assert preferred[0] == "triton"
    assert order_of_choice(FlashAttentionConfig(), torch.device("cuda")) == preferred
    on_cpu = order_of_choice(FlashAttentionConfig(), torch.device("cpu"))
    assert [name for name in on_cpu if name != "triton"] == preferred[1:]
    assert on_cpu.index("torch_sdpa_flash") < on_cpu.index("triton") < on_cpu.index("tiled")
    asked = FlashAttentionConfig(order=["tiled", "triton"])
    assert order_of_choice(asked, torch.device("cpu")) == ["tiled", "triton"]


def test_the_cpu_kernels_come_first_on_a_cpu_but_for_problems_too_small_for_their_call():
    if BACKENDS["cpu"].missing():
        pytest.skip(BACKENDS["cpu"].missing())
    large, small = (torch.randn(1, 2, length, 64) for length in (256, 8))
    assert choose(AttentionSpec.from_tensors(large, large, large)).name == "cpu"
    told = {name: (runs, reason) for name, runs, reason in explain(AttentionSpec.from_tensors(*[small] * 3)).rows}
    assert told["cpu"][0] and "calling ours costs more" in told["cpu"][1]
    for options in (
        {"return_lse": True},
        {"softcap": 2.0},
        {"mask": masks.KeyLengths([5])},
    ):  # not for SDPA, or a matrix
        assert choose(AttentionSpec.from_tensors(*[small] * 3, **options)).name == "cpu"
    only = FlashAttentionConfig(order=["cpu", "torch_sdpa_flash"])
    assert choose(AttentionSpec.from_tensors(*[small] * 3), config=only).name == "cpu"


def test_auto_falls_through_with_a_reason():
    explanation = explain(AttentionSpec.from_tensors(*(x.double() for x in (Q, K, V)), return_lse=True))
    assert explanation.chosen == "tiled"
    reasons = {name: reason for name, _, reason in explanation.rows}
    assert reasons["torch_sdpa_flash"] == "PyTorch's SDPA does not return the LSE"


def test_an_order_in_which_nothing_runs_raises_with_the_table():
    config = FlashAttentionConfig(order=["flash_attn_3", "torch_sdpa_cudnn"])
    with pytest.raises(BackendUnavailableError, match="needs a CUDA GPU"):
        attention(Q, K, V, config=config)


def stand_in_package(monkeypatch, name, calls, returns):
    """A package with flash_attn's function, computing by the formula; it notes what it was asked."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, **options):
        calls.append({"window_size": window_size, "causal": causal, **options})
        left, right = (None if width == -1 else width for width in window_size)
        out, lse = naive_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            mask=masks.Window(left, right),
            scale=softmax_scale,
            softcap=softcap,
            return_lse=True,
        )
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # flash_attn's value for a row that sees nothing
        return returns(out.transpose(1, 2), lse, options)

    module = types.ModuleType(name)
    module.flash_attn_func = flash_attn_func
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    "backend, package, returns",
    [
        ("flash_attn_2", "flash_attn", lambda o, lse, opt: (o, lse, None) if opt["return_attn_probs"] else o),
        ("flash_attn_3", "flash_attn_interface", lambda o, lse, opt: (o, lse) if opt["return_attn_probs"] else o),
    ],
)
def test_flash_attn_is_called_with_its_own_conventions(monkeypatch, backend, package, returns):
    calls = []
    stand_in_package(monkeypatch, package, calls, returns)
    q, k, v = qkv(heads=4, q_len=7, kv_len=4, dtype=torch.float16)
    config = FlashAttentionConfig.from_dict({"fa2": {"deterministic": True}, "fa3": {"deterministic": True}})
    for options in ({}, {"causal": True}, {"mask": masks.Window(2, 1), "softcap": 3.0, "scale": 0.5}):
        spec = AttentionSpec.from_tensors(q, k, v, **options, return_lse=True)
        out, lse = BACKENDS[backend].run(q, k, v, spec, config)
        assert_within_budget(out, q, k, v, lse=lse, **options)
        out_alone, no_lse = BACKENDS[backend].run(q, k, v, AttentionSpec.from_tensors(q, k, v, **options), config)
        assert torch.equal(out, out_alone)
        assert no_lse is None
    assert [call["window_size"] for call in calls[::2]] == [(-1, -1), (-1, 0), (2, 1)]
    assert all(call["deterministic"] and not call["causal"] for call in calls)


def test_flash_attn_says_what_it_lacks():
    spec = AttentionSpec.from_tensors(Q, K, V)
    config = FlashAttentionConfig.from_dict({"fa3": {"enabled": False}})
    assert "fa3.enabled is False" in BACKENDS["flash_attn_3"].why_not(spec, config)
    assert "the package flash_attn is not installed" in BACKENDS["flash_attn_2"].why_not(spec, config)
    assert "runs on CUDA" in BACKENDS["flash_attn_2"].unsupported(spec, config)


# Configuration


def test_config_goes_to_dict_and_back(tmp_path):
    settings = {"backend": "tiled", "tiled": {"block_q": 3, "loop_order": "kv_outer"}, "fa2": {"enabled": False}}
    config = FlashAttentionConfig.from_dict(settings)
    assert config.tiled.block_q == 3
    assert config.tiled.block_k == FlashAttentionConfig().tiled.block_k
    assert FlashAttentionConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "attention.yaml"
    path.write_text("backend: tiled\ntiled:\n  block_q: 3\n  loop_order: kv_outer\nfa2:\n  enabled: false\n")
    assert FlashAttentionConfig.from_yaml(path) == config
    path.write_text("")
    assert FlashAttentionConfig.from_yaml(path) == FlashAttentionConfig()


def test_config_reaches_the_backend(monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(BACKENDS["tiled"]), "run", lambda self, q, k, v, spec, config: seen.append(config) or (q, None)
    )
    config = FlashAttentionConfig.from_dict({"backend": "tiled", "tiled": {"block_q": 7}})
    with use_config(config):
        attention(Q, K, V)
        attention(Q, K, V, backend="torch_sdpa_math")  # a named backend wins over the configured one
        attention(Q, K, V, config=FlashAttentionConfig(backend="torch_sdpa_math"))
    attention(Q, K, V, config=config)
    assert seen == [config, config]
    assert current_config() == FlashAttentionConfig()


BAD_SETTINGS = [
    (
        {"bakend": "auto"},
        ValueError,
        "unknown setting: bakend; top-level settings are backend, order, packing, fa3, fa2, triton, tiled",
    ),
    ({"tiled": {"block": 3}}, ValueError, "unknown setting: "),
    ({"tiled": {"block_q": "3"}}, TypeError, "tiled.block_q must be <class 'int'>; got '3'"),
    ({"tiled": {"block_q": 0}}, ValueError, "block_q must be a whole number of at least 1; got 0"),
    ({"backend": "quick"}, ValueError, "backend: there is no backend 'quick'"),
    ({"order": ["tiled", "quick"]}, ValueError, "order: there is no backend 'quick'"),
    (["tiled"], TypeError, "settings must be a mapping of names to values; got list"),
]


@pytest.mark.parametrize("settings, error, message", BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error) as caught:
        FlashAttentionConfig.from_dict(settings)
    assert message in str(caught.value)


def test_use_config_refuses_a_dict():
    with pytest.raises(TypeError, match="config must be a FlashAttentionConfig; got dict"), use_config({}):
        pass


# The measure itself


def test_the_oracle_agrees_with_an_independent_float64_computation():
    q, k, v = qkv(q_len=6, kv_len=9, dtype=torch.float64)
    out, lse = oracle(q, k, v, causal=True)
    visible = torch.ones(6, 9).tril(3).bool()
    bias = torch.zeros(6, 9, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    assert torch.allclose(lse, torch.logsumexp(scores + bias, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_budget_is_tight_enough_to_catch_a_small_mistake(dtype):
    """An error of 1% in the scale, a forgotten key, one NaN, or the last five bits of the result lost are all outside."""
    q, k, v = qkv(q_len=64, kv_len=64, dim=64, dtype=dtype)
    good = attention(q, k, v, backend="tiled")
    assert check(good, None, q, k, v).passed
    assert not check(attention(q, k, v, scale=1.01 / 8), None, q, k, v).passed or dtype == torch.bfloat16
    assert not check(attention(q, k[:, :, 1:], v[:, :, 1:]), None, q, k, v).passed
    assert not check(good.masked_fill(torch.arange(64)[:, None] == 5, float("nan")), None, q, k, v).passed
    assert not check(good * (1 + 32 * torch.finfo(dtype).eps), None, q, k, v).passed


def test_gradient_check_catches_a_missing_scale():
    inputs = [x.requires_grad_() for x in qkv(q_len=16, kv_len=16)]
    out = attention(*inputs, backend="tiled")
    grad_out = torch.randn(out.shape)
    dq, dk, dv = torch.autograd.grad(out, inputs, grad_out)
    assert check_gradients((dq, dk, dv), *inputs, grad_out).passed
    assert not check_gradients((dq * 8**0.5, dk, dv), *inputs, grad_out).passed
    assert not check_gradients((dq, dk, dv * 1.001), *inputs, grad_out).passed


def test_wrong_shapes_are_refused_by_the_check():
    with pytest.raises(ValueError, match=r"out has shape \(1, 2, 4, 8\); expected \(1, 2, 5, 8\)"):
        check(Q[:, :, :4], None, Q, K, V)
    with pytest.raises(ValueError, match=r"lse has shape \(1, 2, 5, 8\); expected \(1, 2, 5\)"):
        check(Q, Q, Q, K, V)
