"""Code put behind a right solution: now and then one of its functions answers with something odd, of the kinds that beginners return.

`SEED` is replaced by a number. Which call it is, and what it answers, follow from it.
"""

ODD = b"""


import random as _random

_rng = _random.Random(SEED)


def _odd_tensor(x):
    kind = _rng.randrange(16)
    f = x.float() if not x.is_complex() else x.real
    return [
        lambda: x.unsqueeze(0), lambda: x.flatten(), lambda: x[:0], lambda: x.sum(), lambda: x.double(), lambda: x.half(),
        lambda: x.long(), lambda: x.bool(), lambda: f * float("nan"), lambda: f + float("inf"), lambda: torch.zeros(0),
        lambda: x.movedim(0, -1), lambda: torch.zeros(x.shape + (0,)), lambda: x.tolist(), lambda: -f, lambda: torch.tensor(3),
    ][kind]()


def _odd_scalar():
    return _rng.choice([
        None, True, False, 0, -1, 2**62, -(2**62), 1e308, float("nan"), float("-inf"), "", "a string", "=1+1", "\\x1b[2J\\ud800",
        "\\u202e", [], (), {}, [[]], [None], ["a", "b"], {"a": 1}, {"": []}, torch.float16, 0.5, b"bytes".decode(), "x" * 5000,
    ])


def _odd(value, depth=0):
    if _rng.random() < 0.35 or depth > 3:
        return _odd_scalar()
    if isinstance(value, torch.Tensor):
        return _odd_tensor(value)
    if isinstance(value, (tuple, list)):
        items = list(value)
        kind = _rng.randrange(5)
        if kind == 0 and items:
            items[_rng.randrange(len(items))] = _odd_scalar()
        elif kind == 1 and items:
            at = _rng.randrange(len(items))
            items[at] = _odd(items[at], depth + 1)
        elif kind == 2:
            items = items[:-1]
        elif kind == 3:
            items = items + [_odd_scalar()]
        else:
            items = items[::-1]
        return type(value)(items) if type(value) in (tuple, list) else items
    if isinstance(value, (bool, int, float)) and _rng.random() < 0.4:
        return _rng.choice([value + 1, -value, float(value), str(value), [value], torch.tensor(value), value * 10**6])
    return _odd_scalar()


def _sometimes_odd(function):
    def wrapped(*args, **kwargs):
        value = function(*args, **kwargs)
        return _odd(value) if _rng.random() < RATE else value
    return wrapped


for _name, _value in list(globals().items()):
    if getattr(_value, "__module__", "") != __name__ or _name.startswith("_") or _name in ("wrapped",):
        continue
    if isinstance(_value, type):
        for _method, _function in list(vars(_value).items()):
            if callable(_function) and not _method.startswith("_"):
                setattr(_value, _method, _sometimes_odd(_function))
            elif isinstance(_function, property):
                setattr(_value, _method, property(_sometimes_odd(_function.fget)))
    elif callable(_value) and hasattr(_value, "__code__"):
        globals()[_name] = _sometimes_odd(_value)
"""


def with_odd_answers(solution: bytes, seed: int, rate: float = 0.4) -> bytes:
    """The solution, answering oddly at some of its calls."""
    return solution + ODD.replace(b"SEED", str(seed).encode()).replace(b"RATE", repr(rate).encode())
