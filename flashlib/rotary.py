"""Rotary position embedding (RoPE): a position becomes an angle.

Attention by itself does not know where a token stands: exchange two keys together with their values, and nothing changes.
RoPE tells it by turning each pair of channels of q and k by an angle that grows with the position. A score is a sum of dot
products of such pairs, and a dot product of two turned vectors depends only on the difference of their angles. So the score
between a query at position m and a key at position n depends on m - n only, and a key can be turned once, when it is written
to the cache, and never again.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, https://arxiv.org/abs/2104.09864,
section 3.2, equations 14 to 16 and 34.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HEAD_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rotary_frequencies(rotary_dim: int, base: float = 10_000.0) -> Tensor:
    """How far each pair of channels turns per position: ``base ** (-2 i / rotary_dim)`` for pair ``i``.

    The first pair turns by one radian per position and tells neighbors apart; the last turns ``base`` times slower (nearly)
    and tells far from near.

    Args:
        rotary_dim: how many channels of a head turn: even, and at most the head dimension.
        base: the constant theta of the paper. SmolLM2 uses 100,000.

    Returns:
        ``[rotary_dim // 2]``, float64, on the CPU, radians per position.

    Raises:
        ValueError: ``rotary_dim`` is not an even positive number, or ``base`` is not above 1 and finite.
        TypeError: one of them is not a number of the right kind.
    """
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int):
        raise TypeError(f"rotary_dim must be an int; got {type(rotary_dim).__name__}")
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and positive, since channels turn in pairs; got {rotary_dim}")
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise TypeError(f"base must be a number; got {type(base).__name__}")
    if not 1 < base < float("inf"):
        raise ValueError(f"base must be above 1 and finite; got {base}")
    return base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)


def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every position's angles.

    Args:
        positions: any shape ``[...]``, integers or floats on any device. They may start anywhere and be negative: a negative
            position turns the other way.
        frequencies: ``[R]``, radians per position, as from :func:`rotary_frequencies`.
        dtype: float32 or float64, the dtype of the table.

    Returns:
        ``(cos, sin)``, each ``[..., R]`` on the device of ``positions``.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: ``frequencies`` is not one-dimensional.
    """
    _check_positions(positions)
    _check_frequencies(frequencies)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    # Angles are made in float64: near position 100,000 a float32 angle is already wrong by several thousandths of a radian.
    # Apple's GPU has no float64, so there the table is made on the CPU.
    device = "cpu" if positions.device.type == "mps" else positions.device
    angles = positions.to(device, torch.float64)[..., None] * frequencies.to(device, torch.float64)
    return angles.cos().to(positions.device, dtype), angles.sin().to(positions.device, dtype)


def apply_rotary(x: Tensor, positions: Tensor, frequencies: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the channel pairs of each token of ``x`` by its position (the paper's equation 34).

    A head of which only some channels turn ("partial rotary") needs nothing special: with ``R`` frequencies the first ``2 R``
    channels turn, and the others are copied.

    Turning by ``-positions`` undoes it, and turning a cached key by ``new - old`` moves it from one position to another.

    Args:
        x: queries or keys, ``[B, H, S, D]``, float64, float32, float16 or bfloat16.
        positions: ``[S]``, or ``[B, S]`` where the requests of a batch stand at different positions.
        frequencies: ``[R]`` with ``2 R <= D``, as from :func:`rotary_frequencies`.
        interleaved: which channels make a pair. False: ``i`` and ``i + R`` (GPT-NeoX, Llama, SmolLM2). True: ``2 i`` and
            ``2 i + 1`` (the paper, GPT-J). Weights trained with one do not work with the other.

    Returns:
        A new tensor of the shape and dtype of ``x``. The arithmetic is float32 (float64 for float64), whatever the dtype of
        ``x``. Differentiable in ``x``.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: a shape does not fit; the message gives both.
    """
    _check_heads(x)
    _check_positions(positions)
    _check_frequencies(frequencies)
    batch, _, length, head_dim = x.shape
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must be [S] or [B, S], here {[length]} or {[batch, length]} for x {list(x.shape)}; "
            f"got {list(positions.shape)}"
        )
    rotary_dim = 2 * len(frequencies)
    if rotary_dim > head_dim:
        raise ValueError(
            f"frequencies must have at most D / 2 entries, here {head_dim // 2} for x {list(x.shape)}; "
            f"got {len(frequencies)}"
        )

    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return turn_pairs(x, *rotary_table(positions.to(x.device), frequencies, compute_dtype), interleaved=interleaved)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the channel pairs of each token of ``x`` ``[B, H, S, D]`` by angles whose cosine and sine are given.

    Args:
        cos, sin: ``[S, R]`` or ``[B, S, R]``, as from :func:`rotary_table`, with ``2 R <= D``.
        interleaved: as in :func:`apply_rotary`, and so are the result and its arithmetic.
    """
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table.to(compute_dtype).unsqueeze(-3) for table in (cos, sin))  # one axis for the heads
    rotary_dim = 2 * cos.shape[-1]
    turning, still = x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    pairs = (-1, 2) if interleaved else (2, -1)
    pair_axis = -1 if interleaved else -2
    first, second = turning.to(compute_dtype).unflatten(-1, pairs).unbind(pair_axis)  # each [B, H, S, R]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=pair_axis).flatten(-2)
    return torch.cat([turned.to(x.dtype), still], dim=-1)


def _check_heads(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in _HEAD_DTYPES:
        raise TypeError(f"x must be float64, float32, float16 or bfloat16; got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, S, D]; got {list(x.shape)}")


def _check_positions(positions: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be a torch.Tensor; got {type(positions).__name__}")
    if positions.dtype == torch.bool or positions.is_complex():
        raise TypeError(f"positions must be integers or floats; got {positions.dtype}")


def _check_frequencies(frequencies: Tensor) -> None:
    if not isinstance(frequencies, Tensor):
        raise TypeError(f"frequencies must be a torch.Tensor; got {type(frequencies).__name__}")
    if not frequencies.is_floating_point():
        raise TypeError(f"frequencies must be floats; got {frequencies.dtype}")
    if frequencies.dim() != 1:
        raise ValueError(f"frequencies must be [R]; got {list(frequencies.shape)}")
