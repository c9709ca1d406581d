"""From padded batches to packed sequences and back: ``flash_attn.bert_padding``, version 2.8.

A padded batch is ``[batch, seqlen, ...]``. Packed, its real tokens stand one after another, ``[total, ...]``, and ``cu_seqlens``
says where each sequence begins. All functions are differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlib.values import may_read

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the real tokens out of a padded batch.

    Args:
        hidden_states: ``[batch, seqlen, ...]``.
        attention_mask: ``[batch, seqlen]``, bool or numbers, 1 for a real token and 0 for padding.
        unused_mask: the same shape: 1 for tokens that are kept although they are not real, such as places held for later.

    Returns:
        hidden_states ``[total, ...]``: the tokens kept, in order. indices int64 ``[total]``: where each was in the flattened
        batch. cu_seqlens int32 ``[batch + 1]``: cumulative numbers of tokens kept. max_seqlen: the most kept of one sequence.
        seqused int32 ``[batch]``: how many of them are real.

    Raises:
        TypeError, ValueError: an argument is no tensor, the shapes do not fit, a mask holds something else than 0 and 1, or a
            token is marked by both masks.
    """
    _check_batch(hidden_states)
    real = kept = _marked("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        unused = _marked("unused_mask", unused_mask, hidden_states)
        if may_read(real, unused) and (real & unused).any():
            raise ValueError(
                "unused_mask marks tokens that attention_mask marks too; expected each token in one of them"
            )
        kept = real | unused
    return *_packed(hidden_states, kept, kept.sum(1)), real.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the real tokens out of a padded batch whose rows hold several sequences each, one after another.

    Args:
        hidden_states: ``[batch, seqlen, ...]``.
        attention_mask_in_length: integers ``[batch, seqlen]``: the lengths of the sequences in each row, then zeros. Row
            ``[2, 3, 0, 0, 0, 0]`` holds a sequence of 2 tokens, one of 3, and one token of padding.

    Returns:
        As :func:`unpad_input`, without seqused; cu_seqlens is int32 ``[sequences in all rows + 1]``.

    Raises:
        TypeError, ValueError: an argument is no tensor, the shapes do not fit, or the lengths are negative or fill more than a
            row.
    """
    _check_batch(hidden_states)
    lengths = _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"attention_mask_in_length must hold integers; got {lengths.dtype}")
    filled, seqlen = lengths.sum(1), hidden_states.shape[1]
    if may_read(lengths) and ((lengths < 0).any() or (filled > seqlen).any()):
        raise ValueError(
            f"attention_mask_in_length must hold lengths of at least 0 that fill at most {seqlen} tokens of each row; got "
            f"rows from {lengths.min().item()} up, the fullest of {filled.max().item()} tokens"
        )
    kept = torch.arange(seqlen, device=filled.device) < filled[:, None]
    return _packed(hidden_states, kept, lengths[lengths > 0])


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed tokens back to where they were: the inverse of :func:`unpad_input`, with zeros for padding.

    Args:
        hidden_states: ``[total, ...]``.
        indices: integers ``[total]``, from :func:`unpad_input`.
        batch, seqlen: of the padded batch.

    Returns:
        ``[batch, seqlen, ...]``.

    Raises:
        TypeError, ValueError: as :func:`index_put_first_axis`.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]`` for ``[N, ...]`` and ``[total]``. An entry taken twice gets both gradients."""
    return input.index_select(0, _as_indices(indices, input.shape[0]))


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros ``[first_axis_dim, ...]`` with ``values [total, ...]`` at ``indices [total]``, which must be distinct.

    Raises:
        TypeError, ValueError: ``indices`` are not one integer for each value, or lie outside of ``[0, first_axis_dim)``.
    """
    indices = _as_indices(indices, first_axis_dim)
    if len(indices) != values.shape[0]:
        raise ValueError(f"indices must be one for each token; got {len(indices)} for {values.shape[0]} tokens")
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``(index_first_axis(input, indices), input)``: the tokens picked, and all of them for a residual connection."""
    return index_first_axis(input, indices), input


def _packed(hidden_states: Tensor, kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(
        F.pad(lengths, (0, 1)).max().item()
    )  # how many tokens are kept, the host must know in any case, to make room
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest


def _check_batch(hidden_states: Tensor) -> None:
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states must be a torch.Tensor; got {type(hidden_states).__name__}")
    if hidden_states.dim() < 2:
        raise ValueError(f"hidden_states must be [batch, seqlen, ...]; got shape {tuple(hidden_states.shape)}")


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(mask).__name__}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected [batch, seqlen] as in hidden_states {tuple(hidden_states.shape)}"
        )
    return mask


def _marked(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    """``mask`` as bool. A mask of 0 and -inf, as others add to the scores, would mean the opposite, and is refused."""
    _check_mask(name, mask, hidden_states)
    strange = (mask != 0) & (mask != 1)
    if may_read(mask) and strange.any():
        raise ValueError(f"{name} must hold 1 for a token and 0 for none; got {mask[strange][0].item()} too")
    return mask.bool()


def _as_indices(indices: Tensor, count: int) -> Tensor:
    """Any integers as int64: not all of PyTorch's indexing takes others, and uint8 some of it takes for a mask."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a torch.Tensor; got {type(indices).__name__}")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"indices must hold integers; got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be 1-dimensional; got shape {tuple(indices.shape)}")
    indices = indices.to(torch.int64)
    if may_read(indices) and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(
            f"indices must be at least 0 and below {count}; got {int(indices.min())} to {int(indices.max())}"
        )
    return indices
