"""What attention costs, before it is run: operations, bytes, time and energy, for a model, a phase, a length and a GPU.

Nothing here needs PyTorch, a GPU or more than a second. Everything is imported on first use.

    from flashlib import cost

    problem = cost.Problem.causal(batch=1, q_heads=32, kv_heads=8, q_len=8192, kv_len=8192, head_dim=128)
    cost.formula(problem).products, cost.fa2(problem, 128, 128).bytes
    cost.attention_time(problem, cost.device("h200")).seconds
    cost.StepCost.of(cost.model("llama-3-8b"), cost.decode(batch=16, context=32768), cost.device("h200")).tokens_per_s
"""

from importlib import import_module

_HOME = {
    "CONVENTIONS": "conventions",
    "Device": "devices",
    "Estimate": "roofs",
    "LINKS": "links",
    "Link": "links",
    "Model": "models",
    "PHASES": "steps",
    "Parallel": "parallel",
    "Problem": "counts",
    "Requests": "steps",
    "SharedStep": "links",
    "Step": "steps",
    "StepCost": "steps",
    "Visible": "visible",
    "Work": "counts",
    "attention_time": "roofs",
    "backward": "counts",
    "backward_launches": "launches",
    "chunked": "steps",
    "compulsory": "counts",
    "decode": "steps",
    "decode_launches": "launches",
    "device": "devices",
    "device_names": "devices",
    "fa1": "counts",
    "fa2": "counts",
    "formula": "counts",
    "forward_launches": "launches",
    "largest_tile": "models",
    "link": "links",
    "max_batch": "models",
    "max_context": "models",
    "model": "models",
    "model_names": "models",
    "naive": "counts",
    "paper_flops": "counts",
    "prefill": "steps",
    "read_config": "models",
    "scaling": "links",
    "scaling_table": "links",
    "shared_prefix_launches": "launches",
    "shared_step": "links",
    "speculative": "steps",
    "step_of": "steps",
    "this_machine": "devices",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
