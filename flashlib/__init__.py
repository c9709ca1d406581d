"""FlashAttention, from first principles to the speed of light."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashlib import backends, cost, masks
    from flashlib.attention import attention
    from flashlib.backends import BackendUnavailableError, explain
    from flashlib.config import FlashAttentionConfig, use_config
    from flashlib.masks import Mask
    from flashlib.partial import Partial
    from flashlib.spec import AttentionSpec
    from flashlib.values import check_values

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec",
    "BackendUnavailableError",
    "FlashAttentionConfig",
    "Mask",
    "Partial",
    "attention",
    "backends",
    "check_values",
    "cost",
    "explain",
    "masks",
    "use_config",
]

_HOME = {
    "AttentionSpec": "spec",
    "BackendUnavailableError": "backends",
    "FlashAttentionConfig": "config",
    "Mask": "masks",
    "Partial": "partial",
    "attention": "attention",
    "check_values": "values",
    "explain": "backends",
    "use_config": "config",
}


class _Untouched(ModuleType):
    """The package until the first of its names is used. Then all of them are imported, PyTorch with them, and it is a plain module.

    So ``flashlib cost``, which needs none of it, answers at once. A class, because ``flashlib.attention`` is a function that lives in a
    module of the same name: whoever imports that module first would put it in the function's place.
    """

    @property
    def attention(self):
        return self.__getattr__("attention")

    @attention.setter
    def attention(self, value) -> None:
        if not isinstance(value, ModuleType):
            _load()
            vars(self)["attention"] = value

    def __getattr__(self, name: str):
        if name == "cost":
            return import_module("flashlib.cost")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return vars(self)[name]

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


def _load() -> None:
    package = sys.modules[__name__]
    for name in ("backends", "cost", "masks"):
        vars(package)[name] = import_module(f"{__name__}.{name}")
    found = {name: getattr(import_module(f"{__name__}.{home}"), name) for name, home in _HOME.items()}
    package.__class__ = ModuleType
    vars(package).update(found)


sys.modules[__name__].__class__ = _Untouched
