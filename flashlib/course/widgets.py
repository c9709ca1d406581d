"""Interactive figures: move a control, and see what the mechanism does.

All of them are made by `explore`: a function that draws a `Figure`, and controls for its arguments. Where widgets run it
shows the controls above the figure; elsewhere (`FLASHLIB_NONINTERACTIVE=1`, or no notebook) it is the figure for the
controls' first values.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashlib import masks
from flashlib.config import INJECTION_MODES, InjectionConfig
from flashlib.course import figures
from flashlib.course.chapters.memory_stories import Story, log_probabilities
from flashlib.course.chapters.serving import SCRIPT, replay
from flashlib.course.chapters.timing_machine import HABITS, WAYS, measured
from flashlib.course.display import Figure, format_bytes, widgets_run
from flashlib.course.models import capture_qkv
from flashlib.inference.injection import KVInjector
from flashlib.masks import Mask
from flashlib.reference import naive_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PLAY_MILLISECONDS = 900

# What a control is called, where the argument's name is not a word that a reader knows.
_WORDS = {
    "block_q": "rows of a tile",
    "block_k": "keys of a tile",
    "kv_heads": "KV heads",
    "num_splits": "splits",
    "itemsize": "dtype",
    "blocks_seen": "blocks seen",
    "gpu": "GPU",
    "n": "tokens",
    "head_dim": "channels of a head",
    "kind": "mask",
    "size": "size of the mask",
    "queries": "rows",
    "loop_order": "loop order",
    "habit": "habit of the machine",
    "way": "way to time it",
    "mode": "meaning of alpha",
}


@dataclass(frozen=True)
class Slider:
    """A whole number from `low` to `high`. `play` adds a button that runs through them."""

    low: int
    high: int
    value: int
    step: int = 1
    play: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value must be from {self.low} to {self.high}; got {self.value}")


@dataclass(frozen=True)
class Choice:
    """One of `options`: values, or a mapping from what is shown to the value."""

    options: Sequence[Any] | dict[str, Any]
    value: Any

    def __post_init__(self) -> None:
        values = list(self.options.values()) if isinstance(self.options, dict) else list(self.options)
        if self.value not in values:
            raise ValueError(f"value must be one of {values}; got {self.value!r}")


class Explorer:
    """Controls above a figure that follows them.

    Attributes:
        controls: argument name to its ipywidget. Setting `controls["step"].value` redraws.
        figure: the `Figure` shown.
        box: the whole as one ipywidget.
    """

    def __init__(self, draw: Callable[..., Figure], controls: dict[str, Slider | Choice]) -> None:
        import ipywidgets as widgets

        self._draw = draw
        self._image, self._caption = widgets.HTML(), widgets.HTML()
        self.controls, shown = {}, []
        for name, control in controls.items():
            self.controls[name], row = _control_widget(_WORDS.get(name, name.replace("_", " ")), control)
            self.controls[name].observe(lambda _: self._redraw(), names="value")
            shown.append(row)
        self._redraw()
        row = widgets.HBox(shown, layout={"flex_flow": "row wrap"})
        self.box = widgets.VBox([row, self._image, self._caption])

    def _redraw(self) -> None:
        try:
            self.figure = self._draw(**{name: widget.value for name, widget in self.controls.items()})
        except ValueError as problem:  # two controls that do not go together; the old figure stays
            self._caption.value = f"<b>{html.escape(str(problem))}</b>"
            return
        width, height = self.figure.size
        png, alt = base64.b64encode(self.figure.png).decode("ascii"), html.escape(self.figure.alt, quote=True)
        shape = f'width="{width}" height="{height}" style="max-width:100%;height:auto"'
        self._image.value = f'<img src="data:image/png;base64,{png}" alt="{alt}" {shape}>'
        self._caption.value = f'<details><summary>In words</summary><small role="status">{alt}</small></details>'

    def _repr_mimebundle_(self, include=None, exclude=None):
        return self.box._repr_mimebundle_(include=include, exclude=exclude)


def explore(draw: Callable[..., Figure], **controls: Slider | Choice) -> Figure | Explorer:
    """`draw`'s figure with a control for each of its arguments; without widgets, the figure for their first values.

    Args:
        draw: takes the controls' values by name and returns a `Figure`. A `ValueError` it raises is shown to the reader.
        **controls: a `Slider` or `Choice` for each argument of `draw`.

    Example:
        >>> explore(lambda kv_heads: figures.layout_heads(8, kv_heads), kv_heads=Choice([1, 2, 4, 8], 2))
    """
    if widgets_run():
        return Explorer(draw, controls)
    return draw(**{name: control.value for name, control in controls.items()})


def attention_explorer(model: PreTrainedModel, text: str, *, layer: int = 0, head: int = 0) -> Figure | Explorer:
    """Choose a layer and a head of a model, and see what each token of a short text looks at.

    Args:
        model: as in `flashlib.course.capture_qkv`, from `load_smollm2`.
        text: a sentence; its tokens become rows and columns.
        layer, head: where it starts.
    """

    @cache
    def weights(layer: int) -> tuple[Tensor, list[str]]:
        captured = capture_qkv(model, text, layer)
        # The output is a mean of values, weighted by attention. If the values are the unit vectors, it is the weights.
        unit_vectors = torch.eye(len(captured.tokens), dtype=captured.k.dtype).expand(1, captured.k.shape[1], -1, -1)
        out = naive_attention(captured.q, captured.k, unit_vectors, causal=True, scale=captured.scale)
        return out[0], captured.tokens

    def draw(layer: int, head: int) -> Figure:
        of_heads, tokens = weights(layer)
        return figures.attention_matrix(of_heads[head], tokens, title=f"Layer {layer}, head {head}")

    shape = model.config
    return explore(
        draw,
        layer=Slider(0, shape.num_hidden_layers - 1, layer),
        head=Slider(0, shape.num_attention_heads - 1, head),
    )


def tile_stepper(
    q_len: int = 32,
    kv_len: int = 32,
    block_q: int = 8,
    block_k: int = 8,
    mask: Mask | None = None,
    *,
    step: int = 1,
) -> Figure | Explorer:
    """Step through the tiles of the forward pass, in either loop order. See `figures.tile_sweep`.

    `step` is where it starts (and what the static figure shows).
    """
    last = len(figures.tile_steps(q_len, kv_len, block_q, block_k, mask))

    def draw(step: int, loop_order: str) -> Figure:
        return figures.tile_sweep(q_len, kv_len, block_q, block_k, step, mask, loop_order)

    orders = {"FlashAttention-2: rows outside": "q_outer", "FlashAttention-1: keys outside": "kv_outer"}
    return explore(draw, step=Slider(1, last, step, play=True), loop_order=Choice(orders, "q_outer"))


def mask_explorer(q_len: int = 32, kv_len: int = 32) -> Figure | Explorer:
    """Choose a mask, its size, the lengths and the tile, and see which tiles are full, partial and skipped."""

    def draw(kind: str, size: int, queries: int, block_q: int, block_k: int) -> Figure:
        mask, title = _MASKS[kind](size, queries, kv_len)
        return figures.mask_figure(mask, queries, kv_len, block_q, block_k, title=title)

    blocks = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= max(q_len, kv_len)]
    block = blocks[len(blocks) // 2]
    return explore(
        draw,
        kind=Choice(list(_MASKS), "causal window"),
        size=Slider(0, kv_len, kv_len // 3),
        queries=Slider(1, q_len, q_len),
        block_q=Choice(blocks, block),
        block_k=Choice(blocks, block),
    )


_MASKS: dict[str, Callable[[int, int, int], tuple[Mask, str]]] = {
    "everything": lambda size, q_len, kv_len: (masks.Unmasked(), "Every row sees every key"),
    "causal": lambda size, q_len, kv_len: (masks.Causal(), "Causal, aligned bottom-right"),
    "causal window": lambda size, q_len, kv_len: (
        masks.Window(size, 0),
        f"Causal window: itself and {size} keys before",
    ),
    "window on both sides": lambda size, q_len, kv_len: (masks.Window(size, size), f"Window: {size} keys on each side"),
    "key length": lambda size, q_len, kv_len: (masks.KeyLengths([size]), f"Padded: {size} of {kv_len} keys are real"),
    "causal and key length": lambda size, q_len, kv_len: (
        masks.Causal() & masks.KeyLengths([size]),
        f"Causal, and {size} of {kv_len} keys are real",
    ),
    "prefix": lambda size, q_len, kv_len: (masks.Prefix(size), f"Prefix: everybody sees the first {size} keys"),
    "documents": lambda size, q_len, kv_len: (
        masks.Causal() & _documents(max(1, size), q_len, kv_len),
        f"Causal, in documents of {max(1, size)} tokens",
    ),
}


def _documents(length: int, q_len: int, kv_len: int) -> Mask:
    ids = torch.arange(kv_len) // length
    return masks.Documents(q_ids=ids[kv_len - q_len :] if q_len <= kv_len else ids.new_zeros(q_len), k_ids=ids)


def tile_size_explorer(
    n: int = 4096, head_dim: int = 64, sram_bytes: int = 100 * 1024, *, itemsize: int = 4
) -> Figure | Explorer:
    """Choose a tile: does it fit into fast memory, and how many bytes does the loop then move?

    Args:
        n: sequence length of queries and keys.
        head_dim: D.
        sram_bytes: the fast memory, M.
        itemsize: bytes per element.
    """

    def draw(block_q: int, block_k: int) -> Figure:
        return figures.tile_budget(n, head_dim, block_q, block_k, sram_bytes, itemsize=itemsize)

    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size <= n]
    return explore(draw, block_q=Choice(sizes, min(64, sizes[-1])), block_k=Choice(sizes, min(64, sizes[-1])))


def online_softmax_stepper(x: Tensor | Sequence[float], block: int = 4) -> Figure | Explorer:
    """Let the blocks of a row of scores arrive one by one. See `figures.online_softmax_trace`."""
    count = -(-len(x) // block)

    def draw(blocks_seen: int) -> Figure:
        return figures.online_softmax_trace(x, block, upto=blocks_seen)

    return explore(draw, blocks_seen=Slider(1, count, 1, play=True))


def row_by_hand() -> Figure | Explorer:
    """Four scores in two blocks, with every number of the online softmax written out. See `figures.row_by_hand`."""

    def draw(blocks_seen: int) -> Figure:
        return figures.row_by_hand((1, 3, 2, 5), (1, 2, 3, 4), 2, blocks_seen)

    return explore(draw, blocks_seen=Slider(0, 3, 0, play=True))


def tiles_by_hand() -> Figure | Explorer:
    """Four rows and four keys in tiles of 2 x 2, and the state of each row. See `figures.tiles_by_hand`."""
    scores = ((1, 0, 2, 1), (0, 3, 1, 2), (2, 1, 0, 4), (1, 2, 3, 0))

    def draw(step: int) -> Figure:
        return figures.tiles_by_hand(scores, (1, 2, 3, 4), 2, step)

    return explore(draw, step=Slider(0, 4, 0, play=True))


def program_explorer(lengths: Sequence[int] = (5, 3, 6, 1), cols: int = 6) -> Figure | Explorer:
    """Choose a program and a layout, and see which addresses its lanes load. See `figures.program_lanes`.

    Args:
        lengths: of the rows of a ragged matrix.
        cols: its columns.
    """
    rows = len(lengths)
    layouts = {
        "contiguous": (cols, 1),
        "a slice of a wider matrix": (cols + 3, 1),
        "transposed": (1, rows),
    }

    def draw(program: int, layout: str) -> Figure:
        return figures.program_lanes(lengths, cols, layouts[layout], program, layout=layout)

    return explore(draw, program=Slider(0, rows - 1, 1, play=True), layout=Choice(list(layouts), "contiguous"))


def attention_program_explorer(
    q_heads: int = 4, kv_heads: int = 2, row_blocks: int = 3, key_tiles: int = 5
) -> Figure | Explorer:
    """Choose a program of the forward kernel and let the keys pass by. See `figures.attention_programs`."""

    def draw(row_block: int, head: int, tiles_seen: int) -> Figure:
        return figures.attention_programs(q_heads, kv_heads, row_blocks, key_tiles, (row_block, head), tiles_seen)

    return explore(
        draw,
        row_block=Slider(0, row_blocks - 1, 1),
        head=Slider(0, q_heads - 1, 2),
        tiles_seen=Slider(0, key_tiles, 0, play=True),
    )


def visits_explorer(length: int = 64, head_dim: int = 64, itemsize: int = 2) -> Figure | Explorer:
    """Choose a mask and a block of rows, and see the order in which the forward kernel visits its tiles of keys.

    The kernel's own functions decide, so this needs Triton's interpreter. See `figures.tile_visits`.

    Args:
        length: queries and keys.
        head_dim, itemsize: of K and V, for the bytes that are loaded.
    """
    from flashlib.course.chapters.mask_kernels import visits_of

    def draw(row_block: int, kind: str, size: int, block_q: int, block_k: int) -> Figure:
        mask, title = _MASKS[kind](size, length, length)
        intervals = mask.intervals(1, length, length)
        seen = visits_of(intervals, block_q, block_k)
        if row_block >= len(seen):
            raise ValueError(f"with {block_q} rows a block, the last is block {len(seen) - 1}")
        loops = seen[row_block].full, seen[row_block].partial
        of_one = 2 * block_k * head_dim * itemsize
        return figures.tile_visits(intervals, block_q, block_k, row_block, *loops, tile_bytes=of_one, title=title)

    return explore(
        draw,
        row_block=Slider(0, length // 8 - 1, length // 32, play=True),
        kind=Choice(list(_MASKS), "causal window"),
        size=Slider(0, length, 29),
        block_q=Choice([8, 16, 32], 16),
        block_k=Choice([4, 8, 16, 32], 8),
    )


def split_explorer(tiles: int = 24, sm_count: int = 12) -> Figure | Explorer:
    """Choose the number of splits and the batch, and see what the multiprocessors do. See `figures.split_schedule`.

    Args:
        tiles: of keys of the longest request, for one KV head.
        sm_count: multiprocessors.
    """
    batches = {
        "one request": [tiles],
        "four equal requests": [tiles] * 4,
        "four of different lengths": [tiles, tiles // 6, tiles // 2, tiles // 8],
        "sixteen equal requests": [tiles] * 16,
    }

    def draw(num_splits: int, batch: str) -> Figure:
        return figures.split_schedule(batches[batch], num_splits, sm_count)

    return explore(
        draw,
        num_splits=Slider(1, tiles, min(4, tiles), play=True),
        batch=Choice(list(batches), "four of different lengths"),
    )


def ring_explorer(ranks: int = 4, length: int = 32) -> Figure | Explorer:
    """Follow a ring step by step: who has whose keys, who waits, and what came. See `figures.ring_sweep`.

    Args:
        ranks, length: of the ring, and tokens.
    """
    rules = {
        "causal": masks.Causal(),
        "no mask": masks.Unmasked(),
        "window of 6": masks.Window(5, 0),
        "four documents": masks.Documents.from_lengths([length // 4] * 4) & masks.Causal(),
    }

    def draw(step: int, layout: str, mask: str) -> Figure:
        return figures.ring_sweep(layout, step, ranks=ranks, length=length, mask=rules[mask])

    return explore(
        draw,
        step=Slider(0, ranks - 1, 1, play=True),
        layout=Choice(["contiguous", "zigzag", "striped"], "contiguous"),
        mask=Choice(list(rules), "causal"),
    )


def backward_explorer(tiles: int = 5) -> Figure | Explorer:
    """Follow one program of a backward kernel through its tiles. See `figures.backward_sweep`.

    Args:
        tiles: of rows, and of keys.
    """

    def draw(step: int, program: int, kernel: str) -> Figure:
        return figures.backward_sweep(kernel, program, step, row_tiles=tiles, key_tiles=tiles)

    kernels = {"dK and dV: owns keys": "dk_dv", "dQ: owns rows": "dq", "all three, dQ by atomics": "one_kernel"}
    return explore(
        draw,
        step=Slider(1, tiles, 1, play=True),
        program=Slider(0, tiles - 1, 1),
        kernel=Choice(kernels, "dk_dv"),
    )


def heads_explorer(q_heads: int = 9, kv_heads: int = 3) -> Figure | Explorer:
    """Choose how many KV heads the query heads share. See `figures.layout_heads`."""
    divisors = [count for count in range(1, q_heads + 1) if q_heads % count == 0]
    return explore(lambda kv_heads: figures.layout_heads(q_heads, kv_heads), kv_heads=Choice(divisors, kv_heads))


def cache_explorer(
    layers: int = 30, q_heads: int = 9, kv_heads: int = 3, head_dim: int = 64, *, weight_bytes: int | None = None
) -> Figure | Explorer:
    """How large the KV cache of a model grows with context, batch and dtype, and what sharing heads saves.

    Args:
        layers, q_heads, kv_heads, head_dim: the model's shape; SmolLM2-135M's by default.
        weight_bytes: size of the model's weights, drawn for comparison.
    """
    lengths = [2**power for power in range(9, 18)]
    kinds = {f"MHA, {q_heads} KV heads": q_heads, f"GQA, {kv_heads} KV heads": kv_heads, "MQA, 1 KV head": 1}

    def draw(context: int, batch: int, itemsize: int) -> Figure:
        per_token = {name: 2 * layers * heads * head_dim * itemsize for name, heads in kinds.items()}
        here = ", ".join(
            f"{name.split(',')[0]} {format_bytes(size * batch * context)}" for name, size in per_token.items()
        )
        return figures.line_chart(
            lengths,
            {name: [size * batch * length for length in lengths] for name, size in per_token.items()},
            xlabel="context length (tokens)",
            ylabel="KV cache",
            title=f"KV cache at {context:,} tokens x {batch}: {here}",
            log_x=True,
            log_y=True,
            bytes_y=True,
            mark=context,
            reference=("weights of the model", weight_bytes) if weight_bytes else None,
        )

    return explore(
        draw,
        context=Choice(lengths, 8192),
        batch=Choice([1, 4, 16, 64, 256], 1),
        itemsize=Choice({"fp32": 4, "bf16": 2, "fp8": 1}, 2),
    )


def roofline_explorer() -> Figure | Explorer:
    """Choose a device and an attention call, and see the call move under the roofs, and which of them binds it. See
    `figures.under_roofs`."""
    from flashlib.cost import Problem, device, device_names

    gpus = [name for name in device_names() if device(name).kind == "gpu"]

    def draw(gpu: str, phase: str, batch: int, length: int, kv_heads: int, head_dim: int) -> Figure:
        queries = length if phase == "prefill" else 1
        problem = Problem.causal(batch, 32, kv_heads, queries, length, head_dim)
        name = f"{phase} of {batch} x {length:,} tokens, 32 query and {kv_heads} KV heads of {head_dim}"
        return figures.under_roofs({name: (problem, "forward" if phase == "prefill" else "decode")}, device(gpu))

    return explore(
        draw,
        gpu=Choice(gpus, "h200"),
        phase=Choice(["prefill", "decode"], "decode"),
        batch=Choice([1, 4, 16, 64], 16),
        length=Choice([2**power for power in range(9, 16)], 8192),
        kv_heads=Choice([1, 8, 32], 8),
        head_dim=Choice([64, 128], 128),
    )


def timing_explorer() -> Figure | Explorer:
    """Choose a machine's habit and a way to time, and see what that way says of three calls. See `flashlib.course.chapters.timing_machine`."""
    costs = {"a": 4.0, "b": 2.0, "c": 6.0}

    def draw(habit: str, way: str) -> Figure:
        found = measured(way, costs, **HABITS[habit])
        return figures.bars(
            list(costs),
            {"true": list(costs.values()), "measured": [round(found[name], 2) for name in costs]},
            ylabel="time (ms)",
            title=f"The machine: {habit}. The way: {way}.",
        )

    return explore(draw, habit=Choice(list(HABITS), "slows down"), way=Choice(list(WAYS), "one after the other"))


def memory_explorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, story: Story) -> Figure | Explorer:
    """Choose alpha, its meaning and the layers, and see how likely a model then thinks the answers about a story.

    Args:
        model, tokenizer: from `flashlib.course.load_smollm2`.
        story: what it is given as a memory, as `flashlib.course.chapters.memory_stories.HARBOR`.
    """
    from flashlib.interop.transformers_memory import encode_memory, with_memory

    memory = encode_memory(model, tokenizer(story.text).input_ids)
    layers = len(memory.layers)

    @cache
    def answers(alpha: float, mode: str, first: int, last: int) -> list[float]:
        alphas = dict.fromkeys(range(first, last + 1), alpha)
        with with_memory(model, memory, alpha=alphas, injector=KVInjector(InjectionConfig(mode=mode))):
            return log_probabilities(model, tokenizer, story.questions)

    def draw(alpha: float, mode: str, first_layer: int, last_layer: int) -> Figure:
        if first_layer > last_layer:
            raise ValueError(f"there is no layer from {first_layer} to {last_layer}")
        bars = {
            "without the memory": answers(0.0, "blend", 0, layers - 1),
            "with it": answers(alpha, mode, first_layer, last_layer),
        }
        rounded = {name: [round(value, 1) for value in values] for name, values in bars.items()}
        return figures.bars(
            [question.answer.strip() for question in story.questions],
            rounded,
            ylabel="log-probability of the answer",
            title=f"{mode}, alpha = {alpha:g}, layers {first_layer} to {last_layer}",
        )

    return explore(
        draw,
        alpha=Choice([0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0], 0.25),
        mode=Choice(list(INJECTION_MODES), "gate"),
        first_layer=Slider(0, layers - 1, 0),
        last_layer=Slider(0, layers - 1, layers - 1),
    )


def memory_wall_explorer(heads: int = 9, head_dim: int = 64) -> Figure | Explorer:
    """At which sequence length does the N x N matrix of naive attention no longer fit into the machine?

    Args:
        heads, head_dim: of the model; SmolLM2-135M's by default.
    """
    lengths = [2**power for power in range(9, 19)]

    def draw(n: int, memory: int, itemsize: int) -> Figure:
        naive, tiled = (
            [bytes_of(length, heads, head_dim, itemsize) for length in lengths]
            for bytes_of in (_naive_bytes, _tiled_bytes)
        )
        needed = _naive_bytes(n, heads, head_dim, itemsize)
        verdict = "fits into" if needed <= memory else "does not fit into"
        return figures.memory_scaling(
            lengths,
            {"naive": naive, "tiled": tiled},
            wall_bytes=memory,
            wall_name="memory",
            title=f"N = {n:,}: naive needs {format_bytes(needed)}, which {verdict} {format_bytes(memory)}",
            mark=n,
        )

    gib = 2**30
    return explore(
        draw,
        n=Choice(lengths, 16384),
        memory=Choice({f"{size} GiB": size * gib for size in (8, 16, 32, 80, 141)}, 16 * gib),
        itemsize=Choice({"fp32": 4, "bf16": 2}, 4),
    )


def _naive_bytes(n: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Q, K, V, O, and the two matrices alive at once: the scores S and the weights P."""
    return heads * (2 * n * n + 4 * n * head_dim) * itemsize


def _tiled_bytes(n: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Q, K, V, O and the log-sum-exp, which is fp32 always."""
    return heads * n * (4 * head_dim * itemsize + 4)


def page_stepper(slots: int = 48, *, step: int = 0) -> Figure | Explorer:
    """Requests come to a paged cache, grow, continue one another and go, step by step, with pages of a size that you choose.

    ``step`` is where it starts (and what the static figure shows). See `figures.page_map`.
    """
    last = len(SCRIPT)

    def draw(step: int, page_size: int) -> Figure:
        now = replay(step, slots=slots, page_size=page_size)
        return figures.page_map(now.cache, now.names, title=f"Step {step}: {now.said}")

    return explore(draw, step=Slider(0, last, step, play=True), page_size=Choice([1, 2, 4, 8, 16], 4))


def _control_widget(label: str, control: Slider | Choice):
    """The ipywidget that holds the value, and the one to show (they differ where there is a play button)."""
    import ipywidgets as widgets

    style = {"description_width": "initial"}
    if isinstance(control, Choice):
        options = list(control.options.items()) if isinstance(control.options, dict) else list(control.options)
        dropdown = widgets.Dropdown(options=options, value=control.value, description=label, style=style)
        return dropdown, dropdown
    bounds = {"min": control.low, "max": control.high, "step": control.step, "value": control.value}
    slider = widgets.IntSlider(**bounds, description=label, continuous_update=False, style=style)
    if not control.play:
        return slider, slider
    play = widgets.Play(**bounds, interval=_PLAY_MILLISECONDS)
    widgets.jslink((play, "value"), (slider, "value"))
    return slider, widgets.HBox([play, slider])
