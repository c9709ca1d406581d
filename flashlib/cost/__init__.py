"""What attention costs, before it is run: operations, bytes, time and energy, for a model, a phase, a length and a GPU.

Nothing here needs PyTorch, a GPU or more than a second. Everything is imported on first use.

    from flashlib import cost

    problem = cost.Problem.causal(batch=1, q_heads=32, kv_heads=8, q_len=8192, kv_len=8192, head_dim=128)
    cost.formula(problem).products, cost.fa2(problem, 128, 128).bytes
"""

from importlib import import_module

_HOME = {
    "Problem": "counts",
    "Visible": "visible",
    "Work": "counts",
    "backward": "counts",
    "compulsory": "counts",
    "fa1": "counts",
    "fa2": "counts",
    "formula": "counts",
    "naive": "counts",
    "paper_flops": "counts",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
