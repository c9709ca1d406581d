"""Values that travel together through device code, as one argument: what is asked, how it is cut up, and where its data lie.

A kernel's own signature stays flat: the launch gives each number by name, and ``do_not_specialize`` goes by name. Its first lines fill
the bundles, and what it calls takes those. A bundle leaves no trace: its fields are passed one by one to a function that the
compiler inlines, and benchmarks/machine_code.py says that no instruction changes for it.

    @bundle
    class Block:
        row: base_value  # a number or tensor of the program, a pointer, shared memory, a barrier, a descriptor; or None
        ROWS: constexpr  # known to the compiler, which decides an ``if`` on it

    block = Block(row=row, ROWS=64)

What to know before one is changed:

* Fields are given by keyword alone, and all of them. The key of Triton's cache is made of the sources of functions, and a class is none:
  if two fields changed places, a caller that goes by position would run what was compiled for the other order.
* A field cannot be assigned to, nor ``+=``. What changes is a local variable.
* An annotation must be a class, which it would not be under ``from __future__ import annotations``.
* A tuple, named or not, would do as well but for one thing: bound to a variable, it loses what is known to the compiler.
* The warps of a warp-specialised kernel are handed the fields through shared memory: in the order of the arguments of ``warp_specialize``,
  and of each bundle's fields. Another order is as right, and may be other machine code.
"""

import triton
from triton.language import constexpr
from triton.language.core import _aggregate, base_value

INTERPRETED = triton.knobs.runtime.interpret


def bundle(cls: type) -> type:
    """Make a class whose annotations are its fields, to be filled in device code by keyword."""

    def fill(self, **values):
        for name, value in values.items():
            setattr(self, name, value if isinstance(value, base_value) else constexpr(value))

    def fill_interpreted(self, **values):
        if values.keys() != cls.__annotations__.keys():
            raise AttributeError(f"{cls.__name__} has {', '.join(cls.__annotations__)}; got {', '.join(values)}")
        self.__dict__.update(values)

    def refuse(self, name, value):
        raise AttributeError(f"{name} of {cls.__name__} cannot be assigned to")

    # In the interpreter device code is Python, in which a constant is a plain number.
    if INTERPRETED:
        cls.__init__, cls.__setattr__ = fill_interpreted, refuse
        return cls
    cls.__init__ = triton.constexpr_function(fill)
    return _aggregate(cls)


@bundle
class Problem:
    """Which keys a row sees, and what becomes of a product of q and k."""

    q_len: base_value
    kv_len: base_value
    # Under a band row i sees the keys i + offset - left .. i + offset + right.
    offset: base_value
    left: base_value
    right: base_value
    # Under row intervals it sees start[i] .. stop[i] - 1, in this batch entry, or in the first one where a program works on several.
    p_start: base_value
    p_stop: base_value
    scale: base_value
    softcap: base_value
    MASK: constexpr  # UNMASKED, BAND or INTERVALS
    HAS_LEFT: constexpr  # whether the band has an edge there
    HAS_RIGHT: constexpr
    SOFTCAP: constexpr  # whether there is one
    ALIBI: constexpr  # 0, BY_HEAD or BY_ROW


# Of the kernels that run on any GPU.


@bundle
class Shape:
    """How wide rows are, and how the work is cut into tiles."""

    head_dim: base_value
    v_head_dim: base_value
    CHECK_D: constexpr  # what common.tile_at calls CHECK_COLS, for q and k
    CHECK_DV: constexpr  # and for v
    BLOCK_D: constexpr
    BLOCK_DV: constexpr
    BLOCK_M: constexpr
    BLOCK_N: constexpr
    PRECISION: constexpr  # of fp32 products, as tl.dot takes it


@bundle
class Ranges:
    """Where tiles lie that hold visible pairs: in [first, last), and nothing else in [full_first, full_last)."""

    first: base_value
    full_first: base_value
    full_last: base_value
    last: base_value


@bundle
class Slopes:
    """ALiBi: what is taken from a score for each key that lies between it and its row."""

    slope: base_value  # of the head, in score units; and the offset, of all rows
    offset: base_value
    p_slopes: base_value  # where each row has its own: those of the head begin at ``at``
    p_offsets: base_value
    at: base_value


@bundle
class Dropout:
    """Which weights are dropped, as common.kept_pairs draws them."""

    p_seed: base_value
    drop_below: base_value  # pairs whose number is below it
    keep_factor: base_value  # what the others are multiplied by
    i_head: base_value  # of all heads of the batch
    DROPOUT: constexpr  # whether there is any


@bundle
class Rows:
    """The rows that a program owns, while the keys pass by."""

    o_m: base_value
    start: base_value  # which keys each of them sees
    stop: base_value
    seen_first: base_value  # and which they see together
    seen_last: base_value
    slope: base_value  # of ALiBi: of each row, or of all
    offset: base_value


@bundle
class Keys:
    """K and V of one head, which pass by."""

    p_k: base_value
    p_v: base_value
    stride_ks: base_value
    stride_vs: base_value


@bundle
class PassingRows:
    """Q, dO and two numbers for each row of one head, which pass by the keys that a program owns."""

    p_q: base_value
    p_do: base_value
    p_lse: base_value
    p_delta: base_value
    stride_qs: base_value
    stride_gs: base_value


# Of decoding.


@bundle
class Pages:
    """How keys lie in the cache."""

    p_table: base_value  # the pages of this request, in order
    i_b: base_value  # and which request it is: the page of a contiguous cache
    PAGE_SIZE: constexpr  # 0 for a contiguous cache
    TILE: constexpr  # how tiles lie in pages: IN_A_PAGE, OF_PAGES or ACROSS_PAGES
    BLOCK_N: constexpr


@bundle
class Cached:
    """K or V of one KV head, in pages."""

    p_base: base_value
    stride_page: base_value
    stride_key: base_value
    n_cols: base_value
    CHECK_COLS: constexpr


@bundle
class Splits:
    """Partial results ``[splits, n_rows, v_head_dim]`` and fp32 LSEs ``[splits, n_rows]``, and how many are folded at a time."""

    p_out: base_value
    p_lse: base_value
    n_rows: base_value
    n_splits: base_value
    v_head_dim: base_value
    BLOCK_DV: constexpr
    SPLITS: constexpr


@bundle
class Results:
    """Where ``out [rows, v_head_dim]`` and ``lse [rows]`` are written."""

    p_out: base_value
    p_lse: base_value
    v_head_dim: base_value
    BLOCK_DV: constexpr


# Of the warp-specialised kernels for Hopper. A ring is shared memory for STAGES tiles, with a barrier for each: "ready" once the tile has
# arrived, "empty" once every consumer is done with it.


@bundle
class HopperShape:
    """How the work is cut into tiles, and how many are on their way."""

    BLOCK_D: constexpr
    BLOCK_DV: constexpr
    BLOCK: constexpr  # rows or keys of a tile that passes by
    CONSUMERS: constexpr
    STAGES: constexpr


@bundle
class ForwardRings:
    """Shared memory of the forward."""

    q: base_value  # two slots: the block of rows under way, and the next
    k: base_value
    v: base_value
    plan: base_value  # what the producer tells of each block of rows
    own: base_value  # and of each consumer's rows
    ready_plan: base_value
    ready_q: base_value
    empty_q: base_value
    ready_k: base_value
    ready_v: base_value
    empty_k: base_value
    empty_v: base_value


@bundle
class PerHead:
    """Where the data of a batch entry and of a head lie, for consumers that go from one to another."""

    p_out: base_value
    p_lse: base_value
    p_slopes: base_value
    stride_ob: base_value
    stride_oh: base_value
    stride_os: base_value
    stride_interval: base_value
    stride_slope: base_value
    q_heads: base_value
    v_head_dim: base_value
    CHECK_DV: constexpr


@bundle
class Schedule:
    """Which blocks of rows there are, in which order programs take them, and which tiles of keys they need."""

    p_counter: base_value  # of blocks taken so far, and of programs that are done
    p_tiles: base_value  # what hopper_prepare has looked up, and which tiles of V come from its copy
    p_blanked: base_value
    stride_tiles: base_value
    stride_blanked: base_value
    heads: base_value
    q_heads: base_value
    group_size: base_value
    heads_together: base_value
    row_blocks: base_value


@bundle
class ForwardTensors:
    """What the copy engine must know of tensors."""

    q: base_value
    k: base_value
    v: base_value
    blanked: base_value  # V in which keys that no row sees are zeros


@bundle
class DkdvRings:
    """Shared memory of dK and dV."""

    k: base_value
    v: base_value
    q: base_value
    do: base_value
    lse: base_value
    delta: base_value
    seen: base_value  # which keys each row sees
    row: base_value  # where a tile of rows begins
    plan: base_value  # what the producer tells of the whole
    ready_kv: base_value
    ready_q: base_value
    ready_do: base_value
    empty: base_value
    done: base_value  # dK and dV of a consumer lie in the places of K and V


@bundle
class DkdvSchedule:
    """Which rows pass by which keys."""

    p_ranges: (
        base_value  # what backward_row_ranges has looked up, and which tiles come from the copies of hopper_blank_rows
    )
    p_blank: base_value
    stride_interval: base_value
    stride_blank: base_value
    stride_range: base_value
    kv_heads: base_value  # each counted ``parts`` times
    parts: base_value  # programs that share the query heads of a KV head
    group_size: base_value  # query heads of one program
    heads_together: base_value
    unseeing: base_value  # rows at the beginning that see nothing and are not in the tensors
    IN_PARTS: constexpr


@bundle
class DkdvParts:
    """Where a program writes in fp32, if others work on the same keys."""

    p_dk: base_value
    p_dv: base_value
    IN_PARTS: constexpr


@bundle
class DkdvTensors:
    """What the copy engine must know of tensors."""

    q: base_value
    k: base_value
    v: base_value
    do: base_value
    blank_q: base_value  # Q and dO in which rows that see nothing are zeros
    blank_do: base_value
    rows: base_value  # LSE and delta
    dk: base_value
    dv: base_value


@bundle
class DqRings:
    """Shared memory of dQ."""

    q: base_value
    do: base_value
    k: base_value
    v: base_value
    place: base_value  # batch entry and head
    ready_q: base_value
    ready_k: base_value
    ready_v: base_value
    empty_k: base_value
    empty_v: base_value


@bundle
class DqBlock:
    """The rows that a program owns, and the tiles of keys that they need, as common.key_tiles says."""

    row: base_value
    first: base_value
    n_tiles: base_value
    right_partial: base_value
    full: base_value
    i_b: base_value
    i_h: base_value


@bundle
class DqTensors:
    """What the copy engine must know of tensors."""

    q: base_value
    do: base_value
    k: base_value
    v: base_value
    blanked: base_value  # K in which keys that no row sees are zeros
