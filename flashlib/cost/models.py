"""Language models as shapes: their weights, their KV cache, and what fits into a memory.

A model is read from the fields of a Hugging Face ``config.json``. Only architectures whose every weight is known here are read,
so that the count of parameters is exact; any other is refused by name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flashlib.cost.counts import BYTES
from flashlib.cost.devices import Device
from flashlib.cost.visible import checked_count

__all__ = [
    "MLA",
    "Experts",
    "Layer",
    "Model",
    "largest_tile",
    "max_batch",
    "max_context",
    "model",
    "model_names",
    "read_config",
]

DATA = Path(__file__).with_name("models.json")
MEMORY_KEPT = 0.10  # of a device's memory, for activations, workspaces and what the allocator cannot use


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention: K and V of all heads are made from one latent vector a token, which is what is cached.

    Attributes:
        q_rank: of the queries' own compression; None if they are projected at once. kv_rank: of the latent.
        nope_dim, rope_dim: channels of a head's query and key without and with a rotation; the rotated key is shared by all heads.
        v_dim: channels of a head's value.

    Source: DeepSeek-AI 2024, DeepSeek-V2 (arXiv 2405.04434), section 2.1; appendix C has the equations.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: ``chosen`` of ``count`` for each token, and ``shared`` that all tokens take, each of ``size`` channels."""

    count: int
    chosen: int
    size: int
    shared: int = 0
    bias: bool = False

    def touched(self, tokens: int) -> float:
        """How many different experts ``tokens`` tokens take together, on average, if each chooses evenly and by itself."""
        return self.count * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Layer:
    """One layer: ``window`` keys that a row sees, itself included, or None for all; experts, or one MLP."""

    window: int | None = None
    experts: bool = False


@dataclass(frozen=True)
class Model:
    """A decoder.

    Attributes:
        name, architecture: ours, and ``model_type`` of its config.
        hidden, vocab, mlp: channels, tokens, channels inside an MLP. tied: whether the embedding is the head too.
        layers: in order.
        q_heads, kv_heads, head_dim: of attention; with ``mla``, its own.
        experts, mla: or None.
        norms: RMSNorms of ``hidden`` channels in a layer. qk_norm: whether queries and keys of a head are normalised.
        qkv_bias, out_bias, mlp_bias: whether these projections have one. sinks: whether each head has a learned sink.
        softcap: whether attention scores are capped.
        context: positions that the model was made for.
    """

    name: str
    architecture: str
    hidden: int
    vocab: int
    mlp: int
    tied: bool
    layers: tuple[Layer, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    experts: Experts | None = None
    mla: MLA | None = None
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    softcap: bool = False
    context: int = 0

    @property
    def v_head_dim(self) -> int:
        return self.mla.v_dim if self.mla else self.head_dim

    @cached_property
    def attention_weights(self) -> int:
        """Parameters of the projections of one layer's attention, biases and small norms included."""
        if self.mla is not None:
            mla, heads = self.mla, self.q_heads
            query = heads * (mla.nope_dim + mla.rope_dim)
            down = self.hidden * query if mla.q_rank is None else mla.q_rank * (self.hidden + 1 + query)
            latent = self.hidden * (mla.kv_rank + mla.rope_dim) + mla.kv_rank
            return down + latent + mla.kv_rank * heads * (mla.nope_dim + mla.v_dim) + heads * mla.v_dim * self.hidden
        q, kv = self.q_heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        small = self.qkv_bias * (q + kv) + self.out_bias * self.hidden + self.qk_norm * 2 * self.head_dim
        return self.hidden * (2 * q + kv) + small + self.sinks * self.q_heads

    @property
    def mlp_weights(self) -> int:
        """Parameters of a dense MLP: gate, up and down."""
        return 3 * self.hidden * self.mlp + self.mlp_bias * (2 * self.mlp + self.hidden)

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert."""
        if self.experts is None:
            return 0
        size, bias = self.experts.size, self.experts.bias
        return 3 * self.hidden * size + bias * (2 * size + self.hidden)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Parameters by part; their sum is all that the model has."""
        experts = sum(layer.experts for layer in self.layers)
        dense = len(self.layers) - experts
        parts = {
            "embedding": self.vocab * self.hidden,
            "head": 0 if self.tied else self.vocab * self.hidden,
            "attention": self.attention_weights * len(self.layers),
            "mlp": self.mlp_weights * dense,
            "norms": self.hidden * (self.norms * len(self.layers) + 1),
        }
        if self.experts is not None:
            parts["experts"] = self.expert_weights * (self.experts.count + self.experts.shared) * experts
            parts["router"] = (self.hidden + self.experts.bias) * self.experts.count * experts
        return parts

    @property
    def parameters(self) -> int:
        return sum(self.weights.values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the experts only those it takes, and one row of the embedding."""
        found = dict(self.weights)
        found["embedding"] = self.hidden
        if self.tied:
            found["head"] = self.vocab * self.hidden
        if self.experts is not None:
            layers = sum(layer.experts for layer in self.layers)
            found["experts"] = self.expert_weights * (self.experts.chosen + self.experts.shared) * layers
        return sum(found.values())

    def weight_bytes(self, dtype: str = "bf16") -> float:
        """Bytes of all weights. ``dtype``: of the projections and experts; embedding, head, router and norms stay in two bytes at least."""
        kept = max(_bytes("dtype", dtype), BYTES["bf16"])
        projections = {"attention", "mlp", "experts"}
        return sum(count * (BYTES[dtype] if name in projections else kept) for name, count in self.weights.items())

    def cache_values(self, layer: Layer, *, latent: bool = True) -> int:
        """Numbers that a token takes in a layer's KV cache. ``latent``: of an MLA, the latent; False for K and V of every head."""
        if self.mla is not None:
            if latent:
                return self.mla.kv_rank + self.mla.rope_dim
            return self.q_heads * (self.mla.nope_dim + self.mla.rope_dim + self.mla.v_dim)
        return 2 * self.kv_heads * self.head_dim

    def cache_bytes(self, context: int, *, dtype: str = "bf16", latent: bool = True, rolling: bool = True) -> float:
        """Bytes of the KV cache of one request with ``context`` tokens.

        Args:
            dtype: a key of :data:`flashlib.cost.counts.BYTES`; the scales of a quantised cache are not counted.
            latent: as in :meth:`cache_values`.
            rolling: whether layers with a window keep no more than it.
        """
        checked_count("context", context, 0)
        size = _bytes("dtype", dtype)
        kept = (min(context, layer.window) if rolling and layer.window else context for layer in self.layers)
        return sum(
            self.cache_values(layer, latent=latent) * tokens * size
            for layer, tokens in zip(self.layers, kept, strict=True)
        )


def max_batch(
    found: Model, memory_bytes: float, context: int, *, dtype: str = "bf16", cache_dtype: str = "", devices: int = 1, kept: float = MEMORY_KEPT
) -> int:  # fmt: skip
    """How many requests of ``context`` tokens fit beside the weights; 0 if none does.

    What a request takes is its KV cache, which grows with its length. It does not grow with the square of it: no matrix of scores is kept.

    Args:
        memory_bytes: of one device. devices: that share weights and cache evenly.
        dtype: of the weights. cache_dtype: of the cache; that of the weights, or bf16 if they are quantised, unless given.
        kept: share of the memory that is left free.
    """
    checked_count("context", context, 1)
    each = found.cache_bytes(context, dtype=cache_dtype or _cache_dtype(dtype))
    return max(0, int(_free(found, memory_bytes, dtype, devices, kept) // each))


def max_context(
    found: Model, memory_bytes: float, batch: int = 1, *, dtype: str = "bf16", cache_dtype: str = "", devices: int = 1, kept: float = MEMORY_KEPT
) -> int:  # fmt: skip
    """How long ``batch`` requests can become together, in tokens of each; 0 if the weights alone do not fit. As :func:`max_batch`."""
    checked_count("batch", batch, 1)
    free = _free(found, memory_bytes, dtype, devices, kept) / batch
    cache_dtype = cache_dtype or _cache_dtype(dtype)
    longest, shortest = 1, 0
    while found.cache_bytes(longest, dtype=cache_dtype) <= free:
        shortest, longest = longest, 2 * longest
        if longest > 2**40:  # every layer has a window, and all of them fit
            return found.context
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        if found.cache_bytes(middle, dtype=cache_dtype) <= free:
            shortest = middle
        else:
            longest = middle
    return shortest


def largest_tile(head_dim: int, target: Device, *, dtype: str = "bf16", stages: int = 2) -> int:
    """Rows of the largest square tile, a power of two, that a program's own memory holds: Q, ``stages`` of K and V, all of ``head_dim``
    channels. 0 if not even 16 rows fit. The sequence has no say in it, but for being no shorter than the tile should be.
    """
    checked_count("head_dim", head_dim, 1), checked_count("stages", stages, 1)
    per_row = head_dim * _bytes("dtype", dtype) * (1 + 2 * stages)
    rows = 16
    while 2 * rows * per_row <= target.local_bytes:
        rows *= 2
    return rows if rows * per_row <= target.local_bytes else 0


def model_names() -> list[str]:
    return list(_known())


def model(name: str | Path) -> Model:
    """A model by name, such as ``"llama-3-8b"``, or the path of a ``config.json``.

    Raises:
        ValueError: there is no such model or file, or :func:`read_config` refuses it.
    """
    known = _known()
    if str(name).lower() in known:
        return read_config(known[str(name).lower()], name=str(name).lower())
    if str(name).endswith(".json"):
        path = Path(name)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"model: there is no file {path}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"model: {path} is not JSON: {error}") from None
        return read_config(config, name=path.parent.name or path.stem)
    near = difflib.get_close_matches(str(name).lower(), known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"there is no model {str(name)!r}; models are {', '.join(known)}, or give the path of a config.json{hint}"
    )


def read_config(config: Mapping, *, name: str = "") -> Model:
    """A model from the fields of a Hugging Face ``config.json``.

    Raises:
        TypeError: ``config`` is not a mapping, or a field is not a whole number where one is needed.
        ValueError: the architecture is not known, or a field is missing or out of range; names it.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping of fields; got {type(config).__name__}")
    if isinstance(config.get("text_config"), Mapping):  # a model of text and pictures
        config = config["text_config"]
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type {architecture!r} is not known; known are {', '.join(ARCHITECTURES)}")
    fields = _Fields(config, architecture)
    found = Model(
        name=name or architecture,
        architecture=architecture,
        hidden=fields.count("hidden_size"),
        vocab=fields.count("vocab_size"),
        mlp=fields.count("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", architecture in TIED)),
        context=fields.count("max_position_embeddings", 0),
        **ARCHITECTURES[architecture](fields),
    )
    if found.q_heads % found.kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads; got {found.q_heads} and {found.kv_heads}"
        )
    return found


class _Fields:
    """Fields of a config, each asked for by name."""

    def __init__(self, config: Mapping, architecture: str) -> None:
        self.config, self.architecture = config, architecture

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1. Without a default it must be there."""
        value = self.config.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"config.json of a {self.architecture} model must have the field {name}")
            return default
        return checked_count(name, value, 1)

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.config.get(name, default))

    def heads(self) -> dict:
        q_heads = self.count("num_attention_heads")
        head_dim = self.count("head_dim", self.count("hidden_size") // q_heads)
        return {"q_heads": q_heads, "kv_heads": self.count("num_key_value_heads", q_heads), "head_dim": head_dim}

    def layers(
        self, window_where: Callable[[int], bool] | None = None, experts_from: int | None = None
    ) -> tuple[Layer, ...]:
        """The layers; a window where ``layer_types`` says so, or else ``window_where``."""
        count, window, types = (
            self.count("num_hidden_layers"),
            self.config.get("sliding_window"),
            self.config.get("layer_types"),
        )
        if types is not None and len(types) != count:
            raise ValueError(f"layer_types must name {count} layers; got {len(types)}")

        def windowed(n: int) -> bool:
            return types[n] == "sliding_attention" if types else bool(window_where and window_where(n))

        if window is not None:
            checked_count("sliding_window", window, 1)
        elif any(windowed(n) for n in range(count)):
            raise ValueError(
                f"config.json of a {self.architecture} model with windows must have the field sliding_window"
            )
        return tuple(
            Layer(window if windowed(n) else None, experts_from is not None and n >= experts_from) for n in range(count)
        )


def _llama(fields: _Fields) -> dict:
    bias = fields.flag("attention_bias")
    return {
        **fields.heads(),
        "layers": fields.layers(),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias"),
    }


def _mistral(fields: _Fields) -> dict:
    return {**fields.heads(), "layers": fields.layers(lambda n: fields.config.get("sliding_window") is not None)}


def _qwen2(fields: _Fields) -> dict:
    return {**fields.heads(), "layers": _qwen_layers(fields), "qkv_bias": True}


def _qwen3(fields: _Fields) -> dict:
    bias = fields.flag("attention_bias")
    return {**fields.heads(), "layers": _qwen_layers(fields), "qk_norm": True, "qkv_bias": bias, "out_bias": bias}


def _qwen_layers(fields: _Fields) -> tuple[Layer, ...]:
    used = fields.flag("use_sliding_window")
    return fields.layers(lambda n: used and n >= fields.count("max_window_layers", 28))


def _qwen3_moe(fields: _Fields) -> dict:
    if fields.config.get("mlp_only_layers") or fields.config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers and decoder_sparse_step of a qwen3_moe model are not known here")
    experts = Experts(
        fields.count("num_experts"), fields.count("num_experts_per_tok"), fields.count("moe_intermediate_size")
    )
    return {**fields.heads(), "layers": fields.layers(experts_from=0), "qk_norm": True, "experts": experts}


def _mixtral(fields: _Fields) -> dict:
    experts = Experts(
        fields.count("num_local_experts"), fields.count("num_experts_per_tok"), fields.count("intermediate_size")
    )
    layers = fields.layers(lambda n: fields.config.get("sliding_window") is not None, experts_from=0)
    return {**fields.heads(), "layers": layers, "experts": experts}


def _gemma2(fields: _Fields) -> dict:
    layers, capped = fields.layers(lambda n: n % 2 == 0), fields.config.get("attn_logit_softcapping") is not None
    return {**fields.heads(), "layers": layers, "norms": 4, "softcap": capped}


def _gemma3(fields: _Fields) -> dict:
    every = fields.count("sliding_window_pattern", 6)
    return {**fields.heads(), "layers": fields.layers(lambda n: (n + 1) % every != 0), "norms": 4, "qk_norm": True}


def _gpt_oss(fields: _Fields) -> dict:
    size = fields.count("intermediate_size")
    experts = Experts(fields.count("num_local_experts"), fields.count("num_experts_per_tok"), size, bias=True)
    layers = fields.layers(lambda n: n % 2 == 0, experts_from=0)
    return {**fields.heads(), "layers": layers, "experts": experts, "qkv_bias": True, "out_bias": True, "sinks": True}


def _deepseek_v3(fields: _Fields) -> dict:
    rank = fields.config.get("q_lora_rank")
    dims = [fields.count(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    mla = MLA(None if rank is None else checked_count("q_lora_rank", rank, 1), *dims)
    heads = fields.count("num_attention_heads")
    count, chosen, size, shared = (fields.count(name) for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"))  # fmt: skip
    experts = Experts(count, chosen, size, shared)
    layers = fields.layers(experts_from=fields.count("first_k_dense_replace"))
    return {"q_heads": heads, "kv_heads": heads, "head_dim": mla.nope_dim + mla.rope_dim, "layers": layers, "experts": experts, "mla": mla}  # fmt: skip


ARCHITECTURES: dict[str, Callable[[_Fields], dict]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
TIED = ("gemma2", "gemma3_text")  # where the config need not say it


def _known() -> dict[str, dict]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def _bytes(name: str, dtype: str) -> float:
    if dtype not in BYTES:
        raise ValueError(f"{name} must be one of {', '.join(BYTES)}; got {dtype!r}")
    return BYTES[dtype]


def _cache_dtype(dtype: str) -> str:
    return dtype if dtype in ("bf16", "fp16", "fp32") else "bf16"


def _free(found: Model, memory_bytes: float, dtype: str, devices: int, kept: float) -> float:
    checked_count("devices", devices, 1)
    if not 0 <= kept < 1:
        raise ValueError(f"kept must be a share from 0 to 1; got {kept}")
    return memory_bytes * devices * (1 - kept) - found.weight_bytes(dtype)
