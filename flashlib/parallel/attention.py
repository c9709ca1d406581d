"""The front door: attention over a sequence that lies on several ranks, by four methods that are two.

Members of a **ring** keep their rows, and keys come by: at step t a rank attends to what it was sent by the rank t places before it, while what the next
one has to say is on its way. Each step gives a :class:`flashlib.Partial`; merged, they are attention over all keys (Liu et al. 2023, Ring Attention,
arXiv 2310.01889). Where every rank reaches every other one as fast as the next, as behind a switch, there is no reason to pass keys on through others: what a
rank's rows do not see is not sent to it.

Members of a **team** exchange tokens for heads: each gets all of the team's tokens for some of the heads, and afterwards gives rows back (Jacobs et al.
2023, DeepSpeed-Ulysses, arXiv 2309.14509).

``"ring"`` is a ring of all, each a team of its own; ``"all_to_all"`` a single team; ``"hybrid"`` a ring of teams, on a mesh of two dimensions (Fang and Zhao
2024, USP, arXiv 2405.07719). ``"gather"`` is a ring whose steps are all taken at once, in a single attention call over all keys that are seen.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from flashlib.attention import attention
from flashlib.autocast import autocast_inputs, autocast_off
from flashlib.backends import BACKENDS, BackendUnavailableError, order_of_choice
from flashlib.config import FlashAttentionConfig, current_config
from flashlib.launch.engines import CPUEngine, Engine, TiledEngine, TritonEngine
from flashlib.masks import Mask, Unmasked
from flashlib.parallel.layout import LAYOUTS, check_layout, checked_positions
from flashlib.parallel.link import NAMED, Link, eager, link_of
from flashlib.parallel.plan import Plan
from flashlib.parallel.ring import Ring, ring_attention
from flashlib.parallel.team import Team, to_heads, to_tokens
from flashlib.partial import merge_sinks
from flashlib.spec import CAUSAL, DTYPES, AttentionSpec

__all__ = ["METHODS", "parallel_attention"]

METHODS = ("auto", "ring", "all_to_all", "gather", "hybrid")
ENGINES = ("triton", "cpu", "tiled")  # those that give a backward from another call's LSE
MOST_PLANS = 4


@eager
def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """:func:`flashlib.attention` over a sequence of which each rank of a mesh has some tokens. Differentiable, deterministic.

    Every rank calls it, with the same arguments but for its tokens, and every rank runs the backward pass. The gradients are those of the sum of what the
    ranks make of their rows. Ranks may have different numbers of tokens, and none.

    Args:
        q: this rank's queries, ``[B, Hq, n, D]``; fp16, bf16, fp32 or fp64.
        k, v: this rank's keys ``[B, Hkv, m, D]`` and values ``[B, Hkv, m, Dv]``; m may differ from n.

            Or all three DTensors that are ``Shard(2)`` in every dimension of their mesh; then so is the result.
        mesh: the ranks, in the order of the layout: of one dimension, or for "hybrid" of two: ring, team. May be left out for DTensors.
        method: "ring", "all_to_all", "hybrid", "gather" (:mod:`flashlib.parallel.attention`), or "auto": "hybrid" on a mesh of two dimensions, and on one
            of one dimension "all_to_all" where it sends less than a ring and leaves no rank without a head, else "ring". Memory is linear in a rank's own
            tokens, but with "gather", where a rank holds all keys that its rows see.
        layout: which tokens are whose: "contiguous", "zigzag" or "striped" (:func:`flashlib.parallel.shard`). Under a causal mask "zigzag" and "striped" give all
            ranks of a ring equally much to do.
        mask, causal: of the whole sequence, the same on every rank. What no row of a rank sees is not sent to it. Where the rows' intervals are not those
            of a band, they are laid out once, on the host: two integers for each token of the whole.
        scale, softcap, sinks: as in :func:`flashlib.attention`. The gradient of ``sinks`` is that of this rank's rows: add them up, as for any parameter that
            all ranks have.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``. In a ring not with "striped", whose keys are no runs.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "auto", or one of "triton", "cpu" and "tiled".

    Returns:
        out ``[B, Hq, n, Dv]``; with ``return_lse`` also lse ``[B, Hq, n]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: bad arguments. On the other ranks :class:`flashlib.parallel.ParallelError`, which says what this one was given.
        flashlib.parallel.ParallelError: the ranks disagree; or one of them raised, died, or was not heard of within the timeout of the mesh's process group.
        flashlib.BackendUnavailableError: the named backend cannot run this problem.
    """
    if _is_dtensor(q) or _is_dtensor(k) or _is_dtensor(v):
        return _on_dtensors(
            q, k, v, mesh, method=method, layout=layout, mask=mask, causal=causal, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
            sinks=sinks, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if mesh is None:
        raise TypeError("mesh must be a torch.distributed DeviceMesh, unless q, k and v are DTensors; got None")
    link = link_of(mesh)
    scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    if link.size == 1:
        if (method, layout, backend) != ("auto", "contiguous", "auto"):  # a call of one rank costs no more than it must
            _check_choice(method, layout, mesh, backend)
        return attention(q, k, v, mask=mask, causal=causal, **scores, return_lse=return_lse, backend=backend)
    with link.call("parallel_attention"):
        call = _Call.agreed(q, k, v, mesh, link, method, layout, mask, causal, scores, return_lse, backend)
        with autocast_off(call.spec.device):
            out, lse = call.run()
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """One call, checked and agreed upon."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    link: Link
    engine: Engine
    plan: Plan
    ring: list[int]
    team: list[int]
    gather: bool
    q_places: Sequence[Tensor]
    k_places: Sequence[Tensor]
    wants_lse: bool

    @classmethod
    def agreed(cls, q, k, v, mesh, link, method, layout, mask, causal, scores, return_lse, backend) -> _Call:
        checked: dict[str, Any] = {}

        def describe() -> dict[str, int]:
            shape = _check_choice(method, layout, mesh, backend)
            inputs = autocast_inputs(q, k, v)
            spec = AttentionSpec.from_tensors(*inputs, **scores)
            if spec.alibi_slopes is not None and spec.alibi_slopes.dim() == 3:
                raise ValueError(
                    "alibi_slopes must be [Hq] or [B, Hq] here: slopes for each row belong to rows that lie elsewhere"
                )
            rule = _checked_rule(mask, causal)
            checked.update(inputs=inputs, spec=spec, rule=rule, engine=_engine(spec, backend, current_config()))
            return {
                "batch": spec.batch, "query heads": spec.q_heads, "KV heads": spec.kv_heads, "head_dim": spec.head_dim,
                "v_head_dim": spec.v_head_dim, "dtype": DTYPES.index(spec.dtype), "device": int(spec.device.type != "cpu"),
                "method": METHODS.index(method), "layout": LAYOUTS.index(layout), "mesh": hash(shape), "mask": _digest(rule),
                "scale": _digest(spec.scale), "softcap": _digest(spec.softcap), "alibi_slopes": _digest(spec.alibi_slopes),
                "sinks": int(sinks_given), "return_lse": int(bool(return_lse)), "needing gradients": int(spec.needs_grad),
                "query length": spec.q_len, "key length": spec.kv_len,
            }  # fmt: skip

        sinks_given = scores["sinks"] is not None
        said = link.agree(describe, own=("query length", "key length"))
        spec, rule = checked["spec"], checked["rule"]
        q_lengths, k_lengths = ([one[f"{side} length"] for one in said] for side in ("query", "key"))
        q_places = checked_positions(sum(q_lengths), q_lengths, layout)
        k_places = checked_positions(sum(k_lengths), k_lengths, layout)
        method = _chosen(method, mesh, spec, link.size)
        ring, team = _members(method, mesh, link)
        by_run = spec.alibi_slopes is not None
        if by_run and layout == "striped" and len(ring) > 1 and method != "gather":
            raise ValueError('alibi_slopes with layout "striped" needs method "all_to_all" or "gather"; got a ring')
        plan = _plan(rule, spec, q_places, k_places, link.size // len(team), len(team), by_run)
        q, k, v = checked["inputs"]
        return cls(
            q=q, k=k, v=v, spec=spec, link=link, engine=checked["engine"], plan=plan, ring=ring, team=team, gather=method == "gather",
            q_places=q_places, k_places=k_places, wants_lse=return_lse or sinks_given,
        )  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor | None]:
        q, k, v, spec, slopes = self.q, self.k, self.v, self.spec, self.spec.alibi_slopes
        team = Team(self.link, self.team, spec, self.q_places, self.k_places) if len(self.team) > 1 else None
        if team is not None:
            q, k, v = to_heads(q, k, v, team)
            slopes = None if slopes is None else slopes[:, team.q_heads]
        numbers = (slopes, spec.scale, spec.softcap)
        ring = Ring(self.link, self.ring, self.plan, self.engine, numbers, self.gather)
        out, lse = ring_attention(q, k, v, ring)
        if team is not None:
            out, lse = to_tokens(out, lse if self.wants_lse else None, team)
        if spec.sinks is not None:
            assert lse is not None
            out, lse = merge_sinks(out, lse, spec.sinks)
        return out, lse


def _check_choice(method: str, layout: str, mesh: DeviceMesh, backend: str) -> tuple[int, ...]:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_layout(layout)
    if backend != "auto" and backend not in ENGINES:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(ENGINES)}, whose results can be merged; got {backend!r}"
        )
    shape = tuple(mesh.shape)
    expected = {"hybrid": (2,), "auto": (1, 2)}.get(method, (1,))
    if len(shape) not in expected:
        raise ValueError(
            f"method {method!r} takes a mesh of {' or '.join(map(str, expected))} dimension{'s' * (expected != (1,))}; got one of shape {shape}"
        )
    return shape


def _checked_rule(mask: Mask | None, causal: bool) -> Mask:
    """The mask of the whole. Whether it fits the lengths is seen once they are known."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask must be a flashlib.masks.Mask or None; got {type(mask).__name__}")
    rule = Unmasked() if mask is None else mask
    return rule & CAUSAL if causal else rule


def _chosen(method: str, mesh: DeviceMesh, spec: AttentionSpec, ranks: int) -> str:
    if method != "auto":
        return method
    if len(mesh.shape) == 2:
        return "hybrid"
    if spec.q_heads < ranks:
        return "ring"
    # Channels that a token's rank sends, each W - 1 times: a ring its keys, a team a share of all heads, and of the rows that come back.
    width = spec.head_dim + spec.v_head_dim
    in_team = width * (spec.q_heads / ranks + max(spec.kv_heads / ranks, 1))
    return "all_to_all" if in_team < width * spec.kv_heads else "ring"


def _members(method: str, mesh: DeviceMesh, link: Link) -> tuple[list[int], list[int]]:
    """The places of this rank's ring and of its team, each of which has it."""
    if method == "hybrid":
        teams = mesh.shape[1]
        mine = link.rank % teams
        first = link.rank - mine
        return list(range(mine, link.size, teams)), list(range(first, first + teams))
    if method == "all_to_all":
        return [link.rank], list(range(link.size))
    return list(range(link.size)), [link.rank]


_plans: OrderedDict[tuple, Plan] = OrderedDict()


def _plan(rule: Mask, spec: AttentionSpec, q_places, k_places, rings: int, team: int, by_run: bool) -> Plan:
    """The plan of the ring whose members are teams: a team's tokens are those of all in it."""
    lengths = tuple(len(x) for x in (*q_places, *k_places))
    firsts = tuple(int(x[0]) if len(x) else -1 for x in (*q_places, *k_places))
    lasts = tuple(int(x[-1]) if len(x) else -1 for x in (*q_places, *k_places))
    key = (_digest(rule), spec.batch, lengths, firsts, lasts, rings, team, by_run)
    plan = _plans.get(key)
    if plan is None:
        q_len, kv_len = sum(map(len, q_places)), sum(map(len, k_places))
        sides = [
            [torch.cat(list(places[at * team : (at + 1) * team])).sort().values for at in range(rings)]
            for places in (q_places, k_places)
        ]
        plan = _plans[key] = Plan.of(rule, spec.batch, q_len, kv_len, *sides, by_run=by_run)
        while len(_plans) > MOST_PLANS:
            _plans.popitem(last=False)
    return plan


def _engine(spec: AttentionSpec, backend: str, config: FlashAttentionConfig) -> Engine:
    """What computes each piece: it must give a backward from the LSE of the whole."""
    wanted = config.backend if backend == "auto" else backend
    if wanted != "auto" and wanted not in ENGINES:
        raise BackendUnavailableError(
            f"backend {wanted!r} cannot run on several ranks: expected one of {', '.join(ENGINES)}, which give a backward from another call's LSE"
        )
    names = [name for name in order_of_choice(config, spec.device) if name in ENGINES] if wanted == "auto" else [wanted]
    reasons = []
    for name in names:
        reason = BACKENDS[name].why_not(spec, config)
        if reason is None:
            if name == "triton":
                return TritonEngine(config.triton.fp32_precision, config.triton.autotune)
            return CPUEngine() if name == "cpu" else TiledEngine(config.tiled)
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailableError(f"no backend can run this on several ranks: {'; '.join(reasons)}")


def _digest(x: Any) -> int:
    """A number by which ranks tell whether they were given the same: of masks, of tensors' values, of numbers."""
    found = hashlib.blake2b(digest_size=8)
    _feed(found, x)
    return struct.unpack("<q", found.digest())[0]


def _feed(found: Any, x: Any) -> None:
    if isinstance(x, Tensor):
        values = x.detach().cpu().contiguous()
        found.update(str((values.dtype, tuple(values.shape))).encode())
        found.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    elif is_dataclass(x):
        found.update(type(x).__name__.encode())
        for field in fields(x):
            _feed(found, getattr(x, field.name))
    elif isinstance(x, (tuple, list)):
        for item in x:
            _feed(found, item)
    else:
        found.update(repr(x).encode())


def _is_dtensor(x: Any) -> bool:
    if type(x) is Tensor or not isinstance(x, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _on_dtensors(q, k, v, mesh: DeviceMesh | None, **options):
    from torch.distributed.tensor import DTensor, Shard

    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor, as others of q, k and v are; got {type(x).__name__}")
        if mesh is None:
            mesh = x.device_mesh
        if x.device_mesh != mesh:
            raise ValueError(f"{name} lies on {x.device_mesh}; expected {mesh}")
        if any(placement != Shard(2) for placement in x.placements):
            raise ValueError(
                f"{name} has placements {x.placements}; expected Shard(2), the sequence, in every dimension"
            )
    assert mesh is not None
    found = parallel_attention(*(x.to_local() for x in (q, k, v)), mesh=mesh, **options)
    many = found if isinstance(found, tuple) else (found,)
    shape = torch.Size((*q.shape[:3], v.shape[3]))
    shapes = (shape, shape[:3])
    wrapped = [
        DTensor.from_local(
            x, mesh, q.placements, run_check=False, shape=size, stride=torch.empty(size, device="meta").stride()
        )
        for x, size in zip(many, shapes, strict=False)
    ]
    return tuple(wrapped) if isinstance(found, tuple) else wrapped[0]


NAMED.update(
    {
        "dtype": lambda value: str(DTYPES[value]).removeprefix("torch."),
        "method": lambda value: repr(METHODS[value]),
        "layout": lambda value: repr(LAYOUTS[value]),
        "device": lambda value: ("CPU", "GPU")[value],
        "sinks": lambda value: ("none", "given")[value],
        "return_lse": lambda value: str(bool(value)),
        "needing gradients": lambda value: ("no", "yes")[value],
    }
)
