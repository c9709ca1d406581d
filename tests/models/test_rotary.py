"""RoPE against its definition: a channel pair is a complex number, and a position multiplies it by exp(i * angle)."""

import pytest
import torch

from flashlib.rotary import apply_rotary, rotary_frequencies, rotary_table

EPS32 = torch.finfo(torch.float32).eps


def randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def positions_like(generator, *shape, low=-5_000, high=200_000):
    return torch.randint(low, high, shape, generator=generator)


def by_complex_numbers(x, positions, rotary_dim, base, interleaved):
    """float64 and complex128, written from the paper's equation 16."""
    turning = x[..., :rotary_dim].double()
    half = rotary_dim // 2
    real, imag = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    angle = torch.stack([positions.double() / base ** (2 * i / rotary_dim) for i in range(half)], dim=-1)
    angle = angle[None, None] if positions.dim() == 1 else angle[:, None]
    z = torch.complex(real, imag) * torch.polar(torch.ones_like(angle), angle)
    result = x.double().clone()
    if interleaved:
        result[..., 0:rotary_dim:2], result[..., 1:rotary_dim:2] = z.real, z.imag
    else:
        result[..., :half], result[..., half:rotary_dim] = z.real, z.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (80, 20), (59, 2), (2, 2)])
@pytest.mark.parametrize("per_request", [False, True], ids=["shared_positions", "positions_per_request"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_a_multiplication_by_a_complex_number(generator, head_dim, rotary_dim, interleaved, per_request, dtype):
    x = randn(generator, 3, 2, 17, head_dim, dtype=dtype)
    positions = positions_like(generator, *((3, 17) if per_request else (17,)))
    turned = apply_rotary(x, positions, rotary_frequencies(rotary_dim, 1e5), interleaved=interleaved)
    expected = by_complex_numbers(x, positions, rotary_dim, 1e5, interleaved)
    assert turned.dtype == dtype and turned.shape == x.shape
    if dtype == torch.float32:
        # Two products, a sum, and a rounded table: none of it grows with the position.
        bound = 4 * EPS32 * x.abs().max()
    else:
        # The angle itself is rounded to float64.
        bound = torch.finfo(dtype).eps * x.abs().max() * positions.abs().max()
    assert (turned.double() - expected).abs().max() <= bound
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_scores_depend_on_the_distance_alone(generator, interleaved):
    q, k = randn(generator, 1, 1, 1, 64), randn(generator, 1, 1, 1, 64)
    frequencies = rotary_frequencies(64, 1e4)

    def score(m, n):
        turned = (apply_rotary(x, torch.tensor([p]), frequencies, interleaved=interleaved) for x, p in ((q, m), (k, n)))
        return torch.mul(*turned).sum()

    distance, *starts = positions_like(generator, 9, low=-3000, high=3000).tolist()
    scores = torch.stack([score(start, start + distance) for start in starts])
    assert (scores - scores[0]).abs().max() <= 1e-10 * (q.norm() * k.norm())
    other = score(starts[0], starts[0] + distance + 1)
    assert (other - scores[0]).abs() > 1e-6 * (q.norm() * k.norm())


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_lengths_are_kept(generator, interleaved):
    x = randn(generator, 2, 3, 20, 64)
    turned = apply_rotary(x, positions_like(generator, 2, 20), rotary_frequencies(48), interleaved=interleaved)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_negative_positions_undo_and_differences_move(generator, interleaved):
    x = randn(generator, 2, 2, 11, 32)
    frequencies = rotary_frequencies(32)
    old, new = positions_like(generator, 2, 11), positions_like(generator, 2, 11)
    turned = apply_rotary(x, old, frequencies, interleaved=interleaved)
    back = apply_rotary(turned, -old, frequencies, interleaved=interleaved)
    moved = apply_rotary(turned, new - old, frequencies, interleaved=interleaved)
    assert (back - x).abs().max() < 1e-9
    assert (moved - apply_rotary(x, new, frequencies, interleaved=interleaved)).abs().max() < 1e-9


def test_position_zero_changes_nothing(generator):
    x = randn(generator, 1, 2, 5, 16, dtype=torch.float32)
    assert torch.equal(apply_rotary(x, torch.zeros(5, dtype=torch.int64), rotary_frequencies(16)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(generator, dtype):
    x = randn(generator, 2, 3, 40, 64, dtype=dtype)
    positions = positions_like(generator, 40)
    frequencies = rotary_frequencies(64, 1e5)
    expected = apply_rotary(x.float(), positions, frequencies).to(dtype)
    assert torch.equal(apply_rotary(x, positions, frequencies), expected)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_gradient_is_the_inverse_rotation(generator, interleaved):
    x = randn(generator, 2, 2, 5, 10).requires_grad_()
    positions, frequencies = positions_like(generator, 2, 5), rotary_frequencies(6)

    def turn(x, positions=positions):
        return apply_rotary(x, positions, frequencies, interleaved=interleaved)

    assert torch.autograd.gradcheck(turn, x)
    grad = randn(generator, 2, 2, 5, 10)
    (received,) = torch.autograd.grad(turn(x), x, grad)
    assert torch.allclose(received, turn(grad, -positions), rtol=1e-12, atol=1e-12)


def test_any_strides_and_inputs_untouched(generator):
    x = randn(generator, 2, 7, 3, 64, dtype=torch.float32).transpose(1, 2)
    before = x.clone()
    turned = apply_rotary(x, torch.arange(7), rotary_frequencies(64))
    assert torch.equal(x, before)
    assert torch.equal(turned, apply_rotary(x.contiguous(), torch.arange(7), rotary_frequencies(64)))


def test_no_tokens():
    assert apply_rotary(torch.empty(2, 3, 0, 8), torch.arange(0), rotary_frequencies(8)).shape == (2, 3, 0, 8)


def test_fractional_positions_interpolate(generator):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595) squeezes positions: half of them lie between integers."""
    x = randn(generator, 1, 1, 8, 16)
    frequencies = rotary_frequencies(16)
    squeezed = apply_rotary(x, torch.arange(8) / 2, frequencies)
    assert torch.allclose(squeezed, apply_rotary(x, torch.arange(8), frequencies / 2), rtol=0, atol=1e-14)


def test_table():
    cos, sin = rotary_table(torch.tensor([[0, 1], [2, -1]]), torch.tensor([1.0, 0.5]), torch.float64)
    angles = torch.tensor([[[0, 0], [1, 0.5]], [[2, 1], [-1, -0.5]]], dtype=torch.float64)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


def test_frequencies():
    assert torch.equal(rotary_frequencies(4, 100.0), torch.tensor([1.0, 0.1], dtype=torch.float64))
    frequencies = rotary_frequencies(64, 1e5)
    assert frequencies[0] == 1 and (frequencies[1:] < frequencies[:-1]).all() and frequencies[-1] > 1e-5


def test_agrees_with_the_rotary_embedding_of_llama(generator):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, head_dim=64, rope_parameters=rope)
    x = randn(generator, 2, 9, 50, 64, dtype=torch.float32)
    positions = positions_like(generator, 2, 50, low=0, high=8192)
    theirs, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))
    ours = apply_rotary(x, positions, rotary_frequencies(64, 100_000.0))
    # Theirs rounds the angle, and the frequency before it, to float32: an error of two half steps at that angle.
    angle_error = positions[:, None, :, None] * EPS32
    assert ((ours - theirs).abs() <= x.abs().max() * (2 * angle_error + 4 * EPS32)).all()
