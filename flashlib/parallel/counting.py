"""How many bytes this rank hands to its process groups: counted where PyTorch hands them over, not where we meant to send them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Sent", "count_sent"]


@dataclass
class Sent:
    """What one rank has sent.

    Attributes:
        by_operator: bytes by operator of ``torch.ops.c10d``. Of point-to-point sends what is sent; of a collective what the least algorithm for
            it makes one rank send on a ring: an all-gather its own part to all others, an all-reduce twice all but a share.
        messages: how often it was called.
    """

    by_operator: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)

    @property
    def data(self) -> int:
        """Bytes of tensors sent from rank to rank."""
        return self.by_operator.get("send", 0)

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())


class count_sent(TorchDispatchMode):
    """``with count_sent() as sent:`` counts what this thread sends inside of the block, backward passes on a CPU included.

    Source: ``torch.distributed.tensor.debug.CommDebugMode`` counts calls in the same way, not bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = Sent()

    def __enter__(self) -> Sent:
        super().__enter__()
        return self.sent

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            self.sent.by_operator[name] = self.sent.by_operator.get(name, 0) + _bytes_sent(name, args)
            self.sent.messages[name] = self.sent.messages.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _bytes_sent(name: str, args: tuple) -> int:
    if name == "send":
        return _nbytes(args[0])
    if name == "recv":
        return 0
    if name == "allgather_base":
        return _nbytes(args[0]) - _nbytes(args[1])
    if name == "allgather":
        return _nbytes(args[0]) - _nbytes(args[1])
    if name == "alltoall_base":
        return _nbytes(args[1]) * (_ranks(args[2]) - 1) // _ranks(args[2])
    if name == "allreduce":
        return 2 * _nbytes(args[0]) * (_ranks(args[1]) - 1) // _ranks(args[1])
    if name == "reduce_scatter_base":
        return _nbytes(args[1]) - _nbytes(args[0])
    return 0


def _ranks(group) -> int:
    return torch.distributed.ProcessGroup.unbox(group).size()


def _nbytes(x) -> int:
    return x.nbytes if isinstance(x, torch.Tensor) else sum(map(_nbytes, x))
