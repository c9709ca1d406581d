"""What the notebooks need: predictions, source views, figures, widgets, a real model, and the grader.

Everything is imported on first use, so that `import flashlib.course` brings neither matplotlib nor ipywidgets nor
transformers.
"""

from importlib import import_module

_HOME = {
    "Figure": "display",
    "attempt": "tasks",
    "capture_qkv": "models",
    "chat_prompt": "models",
    "check": "grader",
    "generate_greedy": "models",
    "load_smollm2": "models",
    "predict": "predictions",
    "sample_text": "models",
    "scoreboard": "predictions",
    "show_source": "source",
    "table": "display",
}
_MODULES = {"figures", "own", "widgets"}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
