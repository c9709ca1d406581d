"""Figures for the notebooks. Each function returns a `flashlib.course.Figure`: a PNG with a description in words.

One visual language throughout, kept in `style`: Q blue, K orange, V green, S and P purple, O vermilion, LSE gray.
"""

from flashlib.course.figures.attention import attention_matrix, online_softmax_trace, running_softmax
from flashlib.course.figures.backward import backward_sweep
from flashlib.course.figures.by_hand import row_by_hand, tiles_by_hand
from flashlib.course.figures.charts import MEASURED_HERE, bars, line_chart, memory_scaling, recorded
from flashlib.course.figures.heads import cache_figure, head_gallery, layout_heads, rotary_figure
from flashlib.course.figures.hierarchy import best_of, h200_memory, memory_hierarchy
from flashlib.course.figures.kernels import program_lanes
from flashlib.course.figures.pages import page_map
from flashlib.course.figures.programs import attention_programs
from flashlib.course.figures.rings import ring_sweep
from flashlib.course.figures.roofs import estimates, under_roofs
from flashlib.course.figures.scaling import power_laws
from flashlib.course.figures.splits import split_schedule, split_shares
from flashlib.course.figures.tiles import Step, mask_figure, mask_gallery, tile_counts, tile_steps, tile_sweep
from flashlib.course.figures.traffic import moved_bytes, naive_moved_bytes, tile_budget, tile_bytes
from flashlib.course.figures.visits import tile_visits

__all__ = [
    "MEASURED_HERE",
    "Step",
    "attention_matrix",
    "attention_programs",
    "backward_sweep",
    "bars",
    "best_of",
    "cache_figure",
    "estimates",
    "h200_memory",
    "head_gallery",
    "layout_heads",
    "line_chart",
    "mask_figure",
    "mask_gallery",
    "memory_hierarchy",
    "memory_scaling",
    "moved_bytes",
    "naive_moved_bytes",
    "online_softmax_trace",
    "page_map",
    "power_laws",
    "program_lanes",
    "recorded",
    "ring_sweep",
    "rotary_figure",
    "row_by_hand",
    "running_softmax",
    "split_schedule",
    "split_shares",
    "tile_budget",
    "tile_bytes",
    "tile_counts",
    "tile_steps",
    "tile_sweep",
    "tile_visits",
    "tiles_by_hand",
    "under_roofs",
]
