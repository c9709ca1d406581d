"""One forward step of a language model: its attention beside everything else, in time, bytes and energy.

A step takes some new tokens of each request, which see the keys that are cached and themselves. The phases of a server differ in
nothing else: :func:`prefill`, :func:`decode`, :func:`speculative`, and :func:`chunked`, one request's chunk among others' new tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from flashlib.cost.counts import BYTES, FP32, Problem, Work, compulsory, fa2
from flashlib.cost.devices import Device
from flashlib.cost.models import Layer, Model
from flashlib.cost.parallel import Parallel
from flashlib.cost.roofs import (
    KERNEL_SECONDS,
    UNCERTAIN_ASSUMED,
    Estimate,
    attention_time,
    matmul_time,
    tiles_time,
    total,
)
from flashlib.cost.visible import Visible, checked_count

__all__ = ["PHASES", "Requests", "Step", "StepCost", "chunked", "decode", "prefill", "speculative", "step_of"]

PHASES = ("prefill", "decode", "chunked", "speculative")
IDLE_SHARE = 0.15  # of the power cap, that a device draws when it waits; an assumption


@dataclass(frozen=True)
class Requests:
    """``count`` requests alike: ``new`` tokens of each are computed, which sit at the end of its ``context``.

    Raises:
        TypeError, ValueError: a number is out of range, or there are more new tokens than the context has.
    """

    count: int
    new: int
    context: int

    def __post_init__(self) -> None:
        for name in ("count", "new", "context"):
            checked_count(name, getattr(self, name), 1)
        if self.new > self.context:
            raise ValueError(f"new must be at most the context, {self.context}; got {self.new}")


@dataclass(frozen=True)
class Step:
    """What a step computes. ``phase`` says how it is told; ``requests`` what it is."""

    phase: str
    requests: tuple[Requests, ...]

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return sum(group.count * group.new for group in self.requests)

    @property
    def outputs(self) -> int:
        """Tokens that a reader gets from it: one of each request that is complete, in decoding one of each request."""
        return sum(group.count for group in self.requests)


def prefill(batch: int, context: int) -> Step:
    """All tokens of ``batch`` prompts of ``context`` tokens."""
    return Step("prefill", (Requests(batch, context, context),))


def decode(batch: int, context: int) -> Step:
    """The next token of ``batch`` requests, with which each has ``context`` tokens."""
    return Step("decode", (Requests(batch, 1, context),))


def speculative(batch: int, context: int, drafted: int = 4) -> Step:
    """The check of ``drafted`` guessed tokens, and one more, of ``batch`` requests.

    Source: Leviathan, Kalman and Matias 2022 (arXiv 2211.17192), section 2.
    """
    checked_count("drafted", drafted, 1)
    return Step("speculative", (Requests(batch, drafted + 1, context),))


def chunked(batch: int, context: int, chunk: int = 512) -> Step:
    """The last ``chunk`` tokens of one prompt of ``context`` tokens, together with the next token of ``batch - 1`` other requests.

    Source: Agrawal et al. 2023, SARATHI (arXiv 2308.16369), section 4.
    """
    checked_count("batch", batch, 1)
    others = (Requests(batch - 1, 1, context),) if batch > 1 else ()
    return Step("chunked", (Requests(1, chunk, context), *others))


def step_of(phase: str, batch: int, context: int, *, chunk: int = 512, drafted: int = 4) -> Step:
    """A step by the name of its phase, one of :data:`PHASES`.

    Raises:
        ValueError: there is no such phase, or a number is out of range.
    """
    makes = {
        "prefill": lambda: prefill(batch, context),
        "decode": lambda: decode(batch, context),
        "chunked": lambda: chunked(batch, context, chunk),
        "speculative": lambda: speculative(batch, context, drafted),
    }
    if phase not in makes:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
    return makes[phase]()


@dataclass(frozen=True)
class StepCost:
    """A step of a model, by part: of one device, the slowest.

    Attributes:
        parts: estimates of ``"attention"`` (its kernels alone), ``"projections"`` (from and to the heads), ``"mlp"``, ``"experts"``,
            ``"norms"``, ``"head"`` and ``"communication"``.
        tokens: new tokens of the step. outputs: as in :class:`Step`. devices: that share it.
        watts: the power cap of one device, and its power when idle.
        notes: what of it is not our kernels', or not known.
    """

    parts: dict[str, Estimate]
    tokens: int
    outputs: int
    devices: int
    watts: tuple[float, float]
    notes: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> Estimate:
        """All parts, one after the other."""
        return total(self.parts.values())

    @property
    def seconds(self) -> float:
        return self.whole.seconds

    @property
    def attention_share(self) -> float:
        """Of the time, in the kernels of attention."""
        return self.parts["attention"].seconds / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """New tokens, prompt tokens included, over the time; of all devices together."""
        return self.tokens / self.seconds

    @property
    def joules(self) -> float:
        """Energy of all devices: idle power all the time, and beside it what products and bytes take if the higher of a large product's
        rate and a large read's rate draws the power cap. An estimate of the right size, not more."""
        cap, idle = self.watts
        busy = min(self.seconds, sum(max(part.roofs["power"], part.roofs["memory"]) for part in self.parts.values()))
        return self.devices * (idle * self.seconds + (cap - idle) * busy)

    @classmethod
    def of(
        cls, model: Model, step: Step, device: Device, *, dtype: str = "bf16", weights: str = "", cache: str = "",
        parallel: Parallel | None = None, page_size: int | None = None, latent: bool = True,
    ) -> StepCost:  # fmt: skip
        """The cost of a step.

        Args:
            dtype: of activations, and in which products are formed. weights, cache: how weights and the KV cache are stored; ``dtype``
                unless given. They are converted as they are read.
            parallel: devices; None for one.
            page_size: of a paged cache; None for a contiguous one.
            latent: of a model with MLA, whether decoding attends in the latent space ("absorption"), or makes the keys and values of
                all heads from the cache first. Prefill always does the latter.

        Raises:
            ValueError: the device has no products in this dtype, or the devices do not divide the heads.
        """
        return _Costing(
            model, step, device, dtype, weights or dtype, cache or dtype, parallel or Parallel(), page_size, latent
        ).cost()


@dataclass(frozen=True)
class _Costing:
    model: Model
    step: Step
    device: Device
    dtype: str
    weights: str
    cache: str
    parallel: Parallel
    page_size: int | None
    latent: bool

    def cost(self) -> StepCost:
        for name in ("weights", "cache"):
            if getattr(self, name) not in BYTES:
                raise ValueError(f"{name} must be one of {', '.join(BYTES)}; got {getattr(self, name)!r}")
        self.device.peak(self.dtype)
        model, layers = self.model, Counter(self.model.layers)
        self.parallel.heads(model.q_heads, model.kv_heads)
        experts = sum(count for layer, count in layers.items() if layer.experts)
        dense = len(model.layers) - experts
        parts = {
            "attention": total(self.attention(layer) * count for layer, count in layers.items()),
            "projections": self.projections() * len(model.layers),
            "mlp": self.linear(model.mlp_weights, model.hidden, model.hidden) * dense if dense else Estimate(),
            "experts": self.experts() * experts if experts else Estimate(),
            "norms": self.norms() * len(model.layers),
            "head": self.head(),
            "communication": self.communication() * len(model.layers),
        }
        used = {name: part for name, part in parts.items() if part.seconds or name == "attention"}
        watts = (self.device.watts, IDLE_SHARE * self.device.watts)
        return StepCost(used, self.step.tokens, self.step.outputs, self.parallel.devices, watts, tuple(self.notes()))

    def notes(self) -> list[str]:
        notes = []
        if self.device.kind == "gpu" and self._kernel_why_not():
            notes.append(
                f"attention is not by our kernels: {self._kernel_why_not()}; by FlashAttention-2's schedule in tiles of 64"
            )
        if self.device.kind == "cpu":
            notes.append(
                "attention by FlashAttention-2's schedule in tiles of 64, on all cores at their data sheet rates"
            )
        if not self.device.measured:
            notes.append(f"nothing was measured on {self.device.title}: ceilings are shares of data sheet figures")
        if self.cache != self.dtype and not self._kernel_why_not():
            notes.append(f"our kernels read caches in {self.dtype}; one in {self.cache} is counted as if they did")
        notes.append("attention alone was held against recorded runs; of the rest only the roofs are known")
        if self.model.sinks:
            notes.append("attention sinks, a number for each head, are not counted")
        return notes

    # Attention

    def attention(self, layer: Layer) -> Estimate:
        """The kernels of one layer."""
        return total(self._attention_of(layer, group) for group in self.step.requests)

    def _attention_of(self, layer: Layer, group: Requests) -> Estimate:
        by_splits = group.new < group.context and group.new <= 16
        if self.model.mla is not None:
            return self._latent_attention(group) if by_splits and self.latent else self._expanded_attention(group)
        problem = self._problem(
            layer, group, self.model.q_heads, self.model.kv_heads, self.model.head_dim, self.model.head_dim
        )
        if self.device.kind == "gpu" and not self._kernel_why_not():
            if by_splits:
                return attention_time(problem, self.device, direction="decode", page_size=self.page_size)
            return attention_time(problem, self.device)
        return tiles_time(
            fa2(problem, 64, 64), sum(sum(moved.values()) for moved in compulsory(problem)), self.dtype, self.device
        )

    def _problem(
        self, layer: Layer, group: Requests, q_heads: int, kv_heads: int, head_dim: int, v_head_dim: int
    ) -> Problem:
        """Of the device with most to do."""
        left = None if layer.window is None else layer.window - 1
        context = group.context
        parallel = self.parallel
        if (
            parallel.context > 1 and group.new < 2 * parallel.context
        ):  # too few rows to share: the keys are shared instead
            context, parallel = max(group.new, -(-context // parallel.context)), replace(parallel, context=1)
        mask = Visible.band(group.new, context, left=left, right=0)
        kv_dtype = self.cache if group.new < group.context else self.dtype
        whole = Problem(group.count, q_heads, kv_heads, group.new, context, head_dim, v_head_dim, (mask,), self.dtype, kv_dtype, self.model.softcap)  # fmt: skip
        return parallel.share(whole).slowest

    def _kernel_why_not(self) -> str | None:
        if self.model.mla is not None:
            return "there is none for MLA"
        if self.model.head_dim > 256:
            return f"they take a head_dim of at most 256; here it is {self.model.head_dim}"
        if self.dtype not in ("fp16", "bf16", "fp32"):
            return f"they take fp16, bf16 and fp32; here it is {self.dtype}"
        return None

    def _latent_attention(self, group: Requests) -> Estimate:
        """With absorption: all query heads share one key of ``kv_rank + rope`` channels, whose first ``kv_rank`` are the value. It is
        read once for both. (DeepSeek-V2, section 2.1.2.)"""
        mla, parallel = self.model.mla, self.parallel
        assert mla is not None
        wide = mla.kv_rank + mla.rope_dim
        heads = self.model.q_heads // (parallel.tensor * parallel.sequence)
        keys = -(-group.context // parallel.context)
        mask = Visible.band(group.new, max(keys, group.new), right=0)
        problem = Problem(
            group.count, heads, 1, group.new, max(keys, group.new), wide, mla.kv_rank, (mask,), self.dtype, self.cache
        )
        read, written = compulsory(problem)
        once = read["q"] + read["k"] + written["out"]
        return tiles_time(fa2(problem, 64, 64), once, self.dtype, self.device)

    def _expanded_attention(self, group: Requests) -> Estimate:
        """Without: K and V of every head are made from the latents of the whole context, written, and attended to."""
        mla, heads = self.model.mla, self.model.q_heads
        assert mla is not None
        problem = self._problem(Layer(), group, heads, heads, mla.nope_dim + mla.rope_dim, mla.v_dim)
        problem = replace(problem, kv_dtype=self.dtype)
        made = problem.batch * problem.kv_len * problem.kv_heads * (mla.nope_dim + mla.v_dim)
        latent = group.count * group.context * (mla.kv_rank + mla.rope_dim) * BYTES[self.cache]
        expand = Work(2 * made * mla.kv_rank, read={"latent": latent}, written={"kv": made * BYTES[self.dtype]})
        attend = tiles_time(
            fa2(problem, 64, 64), sum(sum(moved.values()) for moved in compulsory(problem)), self.dtype, self.device
        )
        return attend + (matmul_time(expand, self.dtype, self.device) if group.new < group.context else Estimate())

    # Everything else

    @property
    def tokens(self) -> int:
        """That one device has, where the tokens are shared."""
        return -(-self.step.tokens // (self.parallel.sequence * self.parallel.context))

    def linear(self, parameters: float, inputs: int, outputs: int, *, kernels: int = 2) -> Estimate:
        """Matrices of so many parameters, of which a device holds its share, on all its tokens."""
        held = parameters / self.parallel.tensor
        moved = self.tokens * BYTES[self.dtype]
        work = Work(
            2 * self.tokens * held,
            read={"weights": held * BYTES[self.weights], "in": moved * inputs},
            written={"out": moved * outputs},
        )
        return matmul_time(work, self.dtype, self.device, kernels=kernels)

    def projections(self) -> Estimate:
        model = self.model
        heads = model.q_heads * (model.head_dim + model.v_head_dim) + 2 * model.kv_heads * model.head_dim
        heads = 2 * model.hidden if model.mla else heads
        return self.linear(
            model.attention_weights, model.hidden, heads // self.parallel.tensor + model.hidden, kernels=4
        )

    def experts(self) -> Estimate:
        """Each token computes its own; of all only those that some token takes are read."""
        model, experts = self.model, self.model.experts
        assert experts is not None
        touched = experts.touched(self.tokens) + experts.shared
        computed = 2 * self.tokens * model.expert_weights * (experts.chosen + experts.shared) / self.parallel.tensor
        router = 2 * self.tokens * model.hidden * experts.count
        moved = self.tokens * model.hidden * BYTES[self.dtype]
        read = {
            "weights": touched * model.expert_weights * BYTES[self.weights] / self.parallel.tensor,
            "in": moved * (1 + experts.chosen),
        }
        work = Work(computed + router, read=read, written={"out": moved * (1 + experts.chosen)})
        return matmul_time(work, self.dtype, self.device, kernels=5)

    def norms(self) -> Estimate:
        """Norms, rotations, the cache's new entries, activations and residuals: each reads and writes the tokens once."""
        moved = self.tokens * self.model.hidden * BYTES[self.dtype]
        work = Work(other=self.tokens * self.model.hidden * 4 * self.model.norms, read={"in": 2 * moved * self.model.norms}, written={"out": moved * self.model.norms})  # fmt: skip
        return matmul_time(work, self.dtype, self.device, kernels=self.model.norms + 2)

    def head(self) -> Estimate:
        """The scores of the vocabulary, for the last token of each request, or for all that are checked; and rows of the embedding."""
        model = self.model
        scored = sum(
            group.count * (group.new if self.step.phase == "speculative" else 1) for group in self.step.requests
        )
        size, matrix = BYTES[self.dtype], model.vocab * model.hidden / self.parallel.tensor
        read = {"weights": matrix * max(size, BYTES["bf16"]), "embedding": self.step.tokens * model.hidden * size}
        work = Work(2 * scored * matrix, read=read, written={"out": scored * model.vocab * FP32 / self.parallel.tensor})
        return matmul_time(work, self.dtype, self.device, kernels=2)

    def communication(self) -> Estimate:
        """Of one layer: two all-reduces of the tokens among tensor-parallel devices (each sends 2 (n - 1) / n of them), and what
        :meth:`flashlib.cost.Parallel.sent` says of attention."""
        parallel = self.parallel
        if parallel.devices == 1:
            return Estimate()
        reduced = 2 * 2 * (parallel.tensor - 1) / parallel.tensor * self.tokens * self.model.hidden * BYTES[self.dtype]
        exchanged = 0.0
        for group in self.step.requests:
            mask = (Visible.band(group.new, group.context, right=0),)
            model = self.model
            whole = Problem(
                group.count,
                model.q_heads,
                model.kv_heads,
                group.new,
                group.context,
                model.head_dim,
                model.v_head_dim,
                mask,
                self.dtype,
            )
            few = parallel.context > 1 and group.new < 2 * parallel.context
            exchanged += (replace(parallel, context=1) if few else parallel).sent(whole)
            exchanged += (
                few * group.count * group.new * model.q_heads * (model.v_head_dim + 1) * FP32
            )  # partial results are merged
        seconds = (reduced + exchanged) / self.device.link_bytes_per_s + 2 * KERNEL_SECONDS
        return Estimate(seconds, bounds={"links": seconds}, uncertainty=UNCERTAIN_ASSUMED)
