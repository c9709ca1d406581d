"""A real language model for the course: SmolLM2-135M-Instruct, and what its attention is given.

30 layers, 9 query heads and 3 KV heads of 64 channels, 135 million parameters: small enough for any laptop, and its
attention is that of the large ones. Weights come from :mod:`flashlib.course.weights`; nothing here uses the network except,
the first time, that download.

Source: Allal et al., "SmolLM2: When Smol Goes Big", 2025, https://arxiv.org/abs/2502.02737 (Apache-2.0).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flashlib.course.weights import GGUF_SHA256, cache_dir, fetch_weights
from flashlib.reference import naive_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flashlib.interop.transformers import FlashlibCache

_TRANSFORMERS_OWN = ("eager", "sdpa")
_TOKENIZERS: WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase] = WeakKeyDictionary()


def load_smollm2(
    dtype: torch.dtype = torch.float32, attention: str | Callable[..., Tensor] = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct on the CPU, ready for inference, and its tokenizer.

    The first call may download the weights and takes about 20 s to unpack them; later ones take a second or two. From then on
    transformers prints errors only, and no progress bars, so that a notebook's output is the same each time.

    Args:
        dtype: of the parameters and of q, k and v: float32, float16, bfloat16 or float64.
        attention: as ``backend`` in :func:`flashlib.interop.transformers.set_attention`: ``"auto"``, the name of a backend, or
            a function of yours; or ``"eager"`` or ``"sdpa"`` for transformers' own.

    Raises:
        TypeError: ``dtype`` is not a floating-point dtype, or ``attention`` is neither a name nor a function.
        ValueError: there is no such backend.
        flashlib.course.weights.WeightsError: the weights are not here and cannot be fetched.
        ImportError: the extra ``models`` is not installed.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype; got {dtype!r}")
    transformers = _quiet_transformers()
    from flashlib.interop.transformers import register, set_attention

    if attention not in _TRANSFORMERS_OWN:
        register(attention)  # refuses an unknown name before the weights are read
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype, local_files_only=True)
    model.eval().requires_grad_(False)
    if attention in _TRANSFORMERS_OWN:
        model.set_attn_implementation(attention)
    else:
        set_attention(model, attention)
    _TOKENIZERS[model] = load_tokenizer()
    return model, load_tokenizer()


@lru_cache(maxsize=1)
def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2: 49,152 pieces of words. Raises as :func:`load_smollm2` does."""
    return _quiet_transformers().AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def sample_text(tokens: int | None = None) -> str:
    """Real text to run a model on: the first five chapters of Lewis Carroll's "Alice's Adventures in Wonderland" (1865).

    Args:
        tokens: return only so much from its beginning that SmolLM2's tokenizer makes exactly this many tokens of it. None
            for the whole text (14,311 tokens), which needs no tokenizer and no weights.

    Raises:
        TypeError, ValueError: ``tokens`` is not an int, or not between 1 and what there is.
    """
    text = resources.files("flashlib.course").joinpath("data/alice.txt").read_text(encoding="ascii")
    if tokens is None:
        return text
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"tokens must be an int or None; got {type(tokens).__name__}")
    tokenizer = load_tokenizer()
    ids = tokenizer(text).input_ids
    if not 1 <= tokens <= len(ids):
        raise ValueError(f"tokens must be between 1 and {len(ids):,}, the whole text; got {tokens:,}")
    return tokenizer.decode(ids[:tokens])


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question the way the model was taught to see one: with its system message and the marks of a conversation."""
    _check_tokenizer(tokenizer)
    if not isinstance(question, str):
        raise TypeError(f"question must be a str; got {type(question).__name__}")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class CapturedAttention:
    """What one attention layer was given on a real text, and what it answered.

    Attributes:
        q: ``[1, Hq, S, D]``. k: ``[1, Hkv, S, D]``. v: ``[1, Hkv, S, Dv]``. As attention received them, or before the rotary
            embedding if that was asked for.
        out: ``[1, Hq, S, Dv]``: the layer's causal attention of q, k and v as attention received them.
        scale: the factor on the scores.
        tokens: the S tokens as text. ids: their numbers, ``[1, S]``.
        positions: ``[S]``, ``frequencies [D / 2]``: for :func:`flashlib.rotary.apply_rotary`.
        layer: which layer, counted from 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    tokens: list[str]
    ids: Tensor
    positions: Tensor
    frequencies: Tensor
    layer: int

    def __repr__(self) -> str:
        q, k = (list(x.shape) for x in (self.q, self.k))
        return f"CapturedAttention(layer={self.layer}, {len(self.tokens)} tokens, q {q}, k and v {k}, scale={self.scale:g})"


class _Captured(Exception):
    """Ends the forward pass once the layer's attention has been seen: the layers above it are not needed."""


@torch.no_grad()
def capture_qkv(
    model: PreTrainedModel,
    text: str | Sequence[int] | Tensor,
    layer: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    before_rope: bool = False,
) -> CapturedAttention:
    """Run a model on a text, and keep the q, k and v that one layer's attention is called with.

    The call itself is intercepted, so these are the model's own numbers and not a second computation of them. The pass ends
    there: a low layer of a long text costs little. The model is left as it was.

    Args:
        model: a causal transformers model laid out as Llama is (SmolLM2, Qwen2, Mistral ...).
        text: a text, or token ids ``[S]`` or ``[1, S]``.
        layer: which layer, counted from 0.
        tokenizer: needed for a text or for ``tokens``, unless the model is from :func:`load_smollm2`.
        before_rope: give q and k as they leave their projections, before the rotary embedding turns them.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from flashlib.interop.transformers import attention_forward

    _check_model(model)
    tokenizer = tokenizer or _TOKENIZERS.get(model)
    if tokenizer is None:
        raise ValueError("tokenizer must be given for a model that is not from load_smollm2; got None")
    attention_module = _attention_module(model, layer)
    ids = _token_ids(text, tokenizer, "text").to(model.device)

    usual = model.config._attn_implementation
    # "eager" is code inside each model and has no entry here; naive attention is the same formula.
    compute = AttentionInterface().get(usual, partial(attention_forward, compute=naive_attention))
    seen = {}

    def intercept(module, query, key, value, attention_mask, **kwargs):
        out, weights = compute(module, query, key, value, attention_mask, **kwargs)
        if module is attention_module:
            scale = kwargs.get("scaling")
            seen.update(
                q=query,
                k=key,
                v=value,
                out=out.transpose(1, 2),
                scale=query.shape[3] ** -0.5 if scale is None else scale,
            )
            raise _Captured
        return out, weights

    name = "fl_capture"
    AttentionInterface.register(name, intercept)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[usual])
    with _projections(attention_module) as before:
        try:
            model.set_attn_implementation(name)
            model.base_model(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            model.set_attn_implementation(usual)
    if before_rope:
        seen.update(q=before["q_proj"], k=before["k_proj"])
    return CapturedAttention(
        **{name: value.contiguous() if isinstance(value, Tensor) else value for name, value in seen.items()},
        tokens=[tokenizer.decode([token]) for token in ids[0].tolist()],
        ids=ids,
        positions=torch.arange(ids.shape[1], device=ids.device),
        frequencies=model.base_model.rotary_emb.inv_freq.clone(),
        layer=layer,
    )


@dataclass(frozen=True)
class Step:
    """One token that the model wrote.

    Attributes:
        token: its number. text: what it adds to the text.
        logits: ``[vocabulary]``: the scores it was chosen from.
        cached: how many tokens the cache held when it was chosen; 0 without a cache.
    """

    token: int
    text: str
    logits: Tensor
    cached: int


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int] | Tensor,
    max_new_tokens: int = 64,
    *,
    cache: FlashlibCache | None = None,
    use_cache: bool = True,
) -> Iterator[Step]:
    """Let the model write, always taking the most likely token, one :class:`Step` at a time.

    ``"".join(step.text for step in generate_greedy(...))`` is the whole answer.

    Args:
        prompt: a text, or token ids ``[S]`` or ``[1, S]``.
        max_new_tokens: write at most so many; fewer if the model ends its answer.
        cache: the cache to use. One that already holds tokens is continued: the prompt is what comes after them. None for a
            new one that is just large enough.
        use_cache: False computes everything again for each token, to see what the cache is good for.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        flashlib.inference.cache.CacheFullError: the cache that was given is too small.
    """
    from flashlib.interop.transformers import FlashlibCache

    _check_model(model)
    ids = _token_ids(prompt, tokenizer, "prompt").to(model.device)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an int; got {type(max_new_tokens).__name__}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0; got {max_new_tokens}")
    if cache is not None and not isinstance(cache, FlashlibCache):
        raise TypeError(f"cache must be a FlashlibCache or None; got {type(cache).__name__}")
    if cache is not None and not use_cache:
        raise ValueError("cache must be None when use_cache is False; got one")
    if use_cache and cache is None:
        cache = FlashlibCache(capacity=ids.shape[1] + max_new_tokens)
    return _write(model, tokenizer, ids, max_new_tokens, cache)


@torch.no_grad()
def _write(model, tokenizer, ids: Tensor, max_new_tokens: int, cache: FlashlibCache | None) -> Iterator[Step]:
    stop = model.generation_config.eos_token_id
    stop = set(stop) if isinstance(stop, list) else {stop}
    written: list[int] = []
    shown = ""
    context = ids  # prefill: the whole prompt at once
    for _ in range(max_new_tokens):
        output = model(input_ids=context, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        logits = output.logits[0, -1]
        token = int(logits.argmax())
        written.append(token)
        so_far = tokenizer.decode(written, skip_special_tokens=True)
        # A character of several tokens decodes to U+FFFD until its last token is there: it is shown when it is whole.
        text = "" if so_far.endswith("\ufffd") else so_far[len(shown) :]
        shown += text
        yield Step(token, text, logits, cache.get_seq_length() if cache is not None else 0)
        if token in stop:
            return
        chosen = ids.new_tensor([[token]])
        # decode: with a cache, the new token alone; without one, everything again
        context = chosen if cache is not None else torch.cat([context, chosen], dim=1)


def _check_model(model: PreTrainedModel) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a transformers tokenizer; got {type(tokenizer).__name__}")


def _token_ids(text: str | Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase, argument: str) -> Tensor:
    """int64 ``[1, S]``, S at least 1."""
    _check_tokenizer(tokenizer)
    if isinstance(text, str):
        ids = torch.tensor(tokenizer(text).input_ids, dtype=torch.int64)
    elif isinstance(text, Tensor) or (
        isinstance(text, (list, tuple)) and all(isinstance(token, int) for token in text)
    ):
        ids = torch.as_tensor(text)
    else:
        raise TypeError(f"{argument} must be a str or token ids; got {type(text).__name__}")
    ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
    if ids.dim() != 1:
        raise ValueError(f"{argument} must be one sequence of token ids, [S] or [1, S]; got {list(ids.shape)}")
    if not len(ids):
        raise ValueError(f"{argument} must hold at least one token; got none")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{argument} must be integer token ids; got {ids.dtype}")
    if int(ids.min()) < 0 or int(ids.max()) >= len(tokenizer):
        raise ValueError(
            f"{argument} must hold token ids below {len(tokenizer)}; got {int(ids.min())} to {int(ids.max())}"
        )
    return ids.to(torch.int64)[None]


def _attention_module(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not all(hasattr(layers[0].self_attn, name) for name in ("q_proj", "k_proj", "head_dim")):
        raise ValueError(f"model must be laid out as Llama is (layers[i].self_attn.q_proj); got {type(model).__name__}")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int; got {type(layer).__name__}")
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must be between 0 and {len(layers) - 1}; got {layer}")
    return layers[layer].self_attn


@contextmanager
def _projections(attention_module: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what the query and key projections give, as ``[B, H, S, D]``."""
    outputs: dict[str, Tensor] = {}

    def keep(name, _module, _inputs, output):
        outputs[name] = output.unflatten(-1, (-1, attention_module.head_dim)).transpose(1, 2)

    hooks = [
        getattr(attention_module, name).register_forward_hook(partial(keep, name)) for name in ("q_proj", "k_proj")
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def model_folder() -> Path:
    """Where the model lies in the layout that transformers loads in a second.

    The first call makes it from the GGUF file, which takes about 20 s. Raises as :func:`load_smollm2` does.
    """
    unpacked = cache_dir() / f"SmolLM2-135M-Instruct.Q4_1-{GGUF_SHA256[:8]}"
    if unpacked.is_dir():
        return unpacked
    weights = fetch_weights()
    return weights if weights.is_dir() else _unpack(weights, unpacked)


def _unpack(gguf: Path, folder: Path) -> Path:
    """Write the GGUF file's 4-bit weights as float32 (540 MB), which loads in a second instead of 17."""
    transformers = _quiet_transformers()
    packed = {"gguf_file": gguf.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # one progress bar there ignores disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **packed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **packed)
    # A model that remembers being quantized refuses to be saved: the same weights go into one that does not.
    del model.config.quantization_config
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    # Under a temporary name first, so that two processes do not meet and a half-written folder is never used.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial_folder:
        complete = Path(partial_folder) / folder.name
        plain.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        try:
            complete.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster: its folder is as good
                raise
    return folder


def _quiet_transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"the model needs transformers: pip install 'flashlib[models]' ({error})") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
