"""SmolLM2 on the reader's own functions: what was written in `exercises/` becomes the model's attention.

    own.write("ex01", model, tokenizer, "What is the capital of France?")

Each exercise asks for other arguments than a model's layers have. An adapter says in a few lines what goes where; chapters show it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.course.chapters.io_model import count_traffic, tile_machine
from flashlib.course.display import Table, table
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.front_door import find
from flashlib.course.models import chat_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ADAPTERS", "functions_of", "meter", "train", "write"]


def functions_of(exercise: str) -> ModuleType:
    """The reader's file of an exercise, run as a module.

    Raises:
        ValueError: there is no such exercise, or its file is not found.
    """
    path = find(load_exercise(exercise).file)
    spec = importlib.util.spec_from_file_location(f"own_{exercise}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------------ adapters
# Each is called by every layer of the model: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], where Hkv divides Hq and row i sees the keys up to
# i + Sk - Sq.


def on_ex01(yours: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Naive attention has as many heads of keys as of queries, so the shared ones are copied (chapter 05)."""
    group = q.shape[1] // k.shape[1]
    return yours.naive_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale, causal=True)


def on_ex03(yours: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The tiled forward knows no mask (chapter 04), so row i is given the keys that it may see, and no others."""
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = [
        yours.tiled_attention(q[:, :, i : i + 1], k[:, :, : past + i + 1], v[:, :, : past + i + 1], 16, 16, scale)[0]
        for i in range(q.shape[2])
    ]
    return torch.cat(rows, dim=2)


def on_ex05(yours: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Shared heads and the causal mask are in the function itself; K and V come out of your own `KVCache`."""
    return yours.gqa_attention(q, k, v, causal=True)


def on_ex07(yours: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One token sees all keys and needs no mask. The prompt does, and is read by `flashlib.attention`."""
    if q.shape[2] > 1:
        return attention(q, k, v, causal=True, scale=scale)
    return yours.attention_forward(q, k, v, scale)[0]


ADAPTERS: dict[str, Callable[..., Tensor]] = {"ex01": on_ex01, "ex03": on_ex03, "ex05": on_ex05, "ex07": on_ex07}


# ------------------------------------------------------------------------------------------------------------ what chapters call


def write(
    exercise: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int = 8
) -> Table:
    """Let a model answer with the reader's functions in every layer, and beside it with PyTorch's.

    Args:
        exercise: one of `ADAPTERS`.
        model, tokenizer: from :func:`flashlib.course.load_smollm2`. The model's attention is as before when this returns.
        question: what it is asked. tokens: how many to write at most.
    """
    adapt, yours, calls = ADAPTERS[exercise], functions_of(exercise), []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Any, scale: float, softcap: float) -> Tensor:
        calls.append(q.shape[2])
        return adapt(yours, q, k, v, scale)

    cache = partial(_own_cache, yours) if hasattr(yours, "KVCache") else None
    try:
        written = _greedy(model, tokenizer, question, tokens, attend, cache)
    except Exception as error:
        return _not_yet(exercise, error)
    expected = _greedy(model, tokenizer, question, tokens, "torch_sdpa_flash")
    rows = [
        ("with yours", repr(tokenizer.decode(written))),
        ("with PyTorch's", repr(tokenizer.decode(expected))),
        ("the same tokens", written == expected),
        ("calls of your function", len(calls)),
    ]
    return table(rows, [f"SmolLM2 on your {exercise}", ""])


def meter(exercise: str, q: Tensor, k: Tensor, v: Tensor, block: int = 64) -> Table:
    """Count what the reader's tiled forward moves on the two-level machine of chapter 03, beside flashlib's and the formula.

    Args:
        exercise: `"ex03"`.
        q, k, v: one head, ``[1, 1, N, D]``. block: rows and keys of a tile.
    """
    from flashlib.backends.pytorch import tiled_attention

    yours, memory = functions_of(exercise), tile_machine(block, block, q.shape[3])
    try:
        own = count_traffic(lambda *qkv: yours.tiled_attention(*qkv, block, block), q, k, v, fast_memory=memory)
    except Exception as error:
        return _not_yet(exercise, error)
    ours = count_traffic(partial(tiled_attention, block_q=block, block_k=block), q, k, v, fast_memory=memory)
    blocks = -(-q.shape[2] // block)
    rows = [
        (
            name,
            *(round(counted.passes(operand)[0], 1) for operand in "qkv"),
            round(counted.bytes / counted.operand_bytes, 1),
        )
        for name, counted in (("yours", own), ("flashlib's", ours))
    ]
    rows.append(("the formula", 1, blocks, blocks, 2 + 2 * blocks))
    return table(rows, ["passes over N x d numbers", "Q read", "K read", "V read", "all, read and written"])


def train(
    exercise: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, rate: float = 0.01
) -> Table:
    """One training step of a model whose attention goes back through the reader's kernels, beside autograd through naive attention.

    The projections to queries, keys and values of all layers are trained, with plain gradient descent, and are put back.

    Args:
        exercise: `"ex09"`.
        model, tokenizer: from :func:`flashlib.course.load_smollm2`.
        text: what is learned: each token from those before it. rate: the step.
    """
    yours = functions_of(exercise)
    ids = tokenizer(text, return_tensors="pt").input_ids
    trained = [
        p for name, p in model.named_parameters() if any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    ]
    try:
        own = _losses_and_gradient(model, ids, trained, partial(_Backward.apply, yours), rate)
    except Exception as error:
        return _not_yet(exercise, error)
    exact = _losses_and_gradient(model, ids, trained, None, rate)
    apart = (own[2] - exact[2]).norm() / exact[2].norm()
    rows = [
        ("loss before the step", f"{own[0]:.3f}", f"{exact[0]:.3f}"),
        ("loss after it", f"{own[1]:.3f}", f"{exact[1]:.3f}"),
        ("gradient of all layers, apart by less than 1e-3", "", bool(apart < 1e-3)),
    ]
    return table(rows, [f"SmolLM2, {ids.shape[1]} tokens", f"your {exercise}", "autograd"])


# ------------------------------------------------------------------------------------------------------------------- machinery


def _not_yet(exercise: str, error: BaseException | None) -> Table:
    """What to show where a stub is left; any other error of the reader's code is raised as it is. Triton wraps those of kernels."""
    raised = error
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__cause__ or error.__context__
    if error is None:
        raise raised
    file = load_exercise(exercise).file
    return table([("not written yet", f"exercises/{file}: {error}")], [f"SmolLM2 on your {exercise}", ""])


@contextmanager
def _attention_of(model: PreTrainedModel, attend: str | Callable[..., Tensor]) -> Iterator[None]:
    from flashlib.interop.transformers import set_attention

    before = model.config._attn_implementation
    set_attention(model, attend)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def _greedy(model, tokenizer, question: str, tokens: int, attend, cache=None) -> list[int]:
    from flashlib.interop.transformers import FlashlibCache

    ids = tokenizer(chat_prompt(tokenizer, question), return_tensors="pt").input_ids
    capacity = ids.shape[1] + tokens
    past, written = (cache or FlashlibCache)(capacity), []
    with _attention_of(model, attend):
        for _ in range(tokens):
            ids = model(input_ids=ids, past_key_values=past).logits[:, -1:].argmax(-1)
            if ids.item() == tokenizer.eos_token_id:
                break
            written.append(ids.item())
    return written


def _own_cache(yours: ModuleType, capacity: int):
    """transformers' cache with the reader's `KVCache` in every layer."""
    from transformers import Cache

    from flashlib.interop.transformers import KVCacheLayer

    class Layer(KVCacheLayer):
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            batch, kv_heads, _, head_dim = key_states.shape
            self.store = yours.KVCache(batch, kv_heads, self.capacity, head_dim)
            self.is_initialized = True

        def get_seq_length(self) -> int:
            return self.store.length if self.is_initialized else 0

    return Cache(layer_class_to_replicate=partial(Layer, capacity))


class _Backward(torch.autograd.Function):
    """Causal attention whose forward is flashlib's and whose backward is the reader's."""

    @staticmethod
    def forward(ctx, yours: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        ctx.yours, ctx.scale = yours, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        gradients = ctx.yours.attention_backward(q, k, v, out, lse, grad_out, causal=True, scale=ctx.scale)
        return None, *gradients, None


def _losses_and_gradient(model, ids: Tensor, trained: list[Tensor], own, rate: float) -> tuple[float, float, Tensor]:
    """The loss before and after a step of gradient descent, and the gradient; the parameters are as before."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Any, scale: float, softcap: float) -> Tensor:
        return own(q, k, v, scale)

    def loss() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:])

    with _attention_of(model, "reference" if own is None else attend):
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            before = loss()
            gradients = torch.autograd.grad(before, trained)
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)
        with torch.no_grad():
            _move(trained, gradients, -rate)
            after = loss().item()
            _move(trained, gradients, rate)
    return before.item(), after, torch.cat([gradient.flatten() for gradient in gradients])


def _move(parameters: list[Tensor], gradients: tuple[Tensor, ...], by: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient, alpha=by)
