"""What crosses between grader and child: frames of JSON and raw bytes.

A frame is an eight-byte length, a JSON header of that length, and the blobs whose sizes the header lists. A Python value
becomes JSON in which each tensor is a number, the index of its description (dtype, shape, strides, where its bytes are).
Both sides use this module, and the reading side trusts nothing: whoever holds the channel may write what he likes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

HEADER_LIMIT = 1 << 20  # bytes of JSON
ALIGNMENT = 64  # bytes; each storage starts on a cache line
DEPTH_LIMIT = 20

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WireError(Exception):
    """A frame that no honest child sends."""


class NotSendable(TypeError):
    """A value that is not made of tensors, numbers, strings, lists, tuples and dicts."""


@dataclass(frozen=True)
class Handle:
    """An object that stays in the child, such as a student's cache; known to the grader by its number."""

    number: int


# ---------------------------------------------------------------------------------------------------- values as JSON


def to_json(value: Any, tensors: list[torch.Tensor], depth: int = 0) -> Any:
    """`value` as JSON; its tensors are appended to `tensors` and stand in the JSON as their index there.

    Raises:
        NotSendable: something in it is of no type that crosses.
    """
    if depth > DEPTH_LIMIT:
        raise NotSendable(f"a value nested more than {DEPTH_LIMIT} deep")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise NotSendable("an integer of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        if value.dtype not in DTYPE_NAMES or value.layout != torch.strided:
            raise NotSendable(f"a tensor of dtype {value.dtype} and layout {value.layout}")
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, Handle):
        return {"handle": value.number}
    if isinstance(value, tuple):
        return {"tuple": [to_json(item, tensors, depth + 1) for item in value]}
    if isinstance(value, list):
        return [to_json(item, tensors, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_json(item, tensors, depth + 1) for key, item in value.items()}}
    raise NotSendable(f"a value of type {type(value).__name__}")


def from_json(node: Any, tensors: list[torch.Tensor], objects: dict[int, Any], depth: int = 0) -> Any:
    """The value that `to_json` described. `objects` is what handles stand for.

    Raises:
        WireError: `node` was not made by `to_json`.
    """
    if depth > DEPTH_LIMIT + 2:
        raise WireError("a value nested too deep")
    if node is None or isinstance(node, (bool, float, str)):
        return node
    if isinstance(node, int):
        if abs(node) >= 1 << 63:
            raise WireError("an integer of more than 64 bits")
        return node
    if isinstance(node, list):
        return [from_json(item, tensors, objects, depth + 1) for item in node]
    if isinstance(node, dict) and len(node) == 1:
        ((kind, content),) = node.items()
        try:
            if kind == "tensor":
                return tensors[_natural(content)]
            if kind == "float" and content in ("inf", "-inf", "nan"):
                return float(content)
            if kind == "dtype":
                return DTYPES[content]
            if kind == "handle":
                return objects[_natural(content)]
        except (LookupError, TypeError) as error:
            raise WireError(f"{kind} {content!r:.40} does not exist") from error
        if kind == "tuple" and isinstance(content, list):
            return tuple(from_json(item, tensors, objects, depth + 1) for item in content)
        if kind == "dict" and isinstance(content, dict):
            return {key: from_json(item, tensors, objects, depth + 1) for key, item in content.items()}
    raise WireError(f"{str(node)[:40]!r} describes no value")


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise WireError(f"{str(number)[:40]!r} is not a count")
    return number


# ---------------------------------------------------------------------------------------------------- tensors as bytes


def describe(tensor: torch.Tensor, position: int) -> dict[str, Any]:
    """Where the bytes of `tensor` are: its storage begins at byte `position`."""
    return {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "offset": position + tensor.storage_offset() * tensor.element_size(),
        "requires_grad": tensor.requires_grad,
    }


def tensor_from(buffer: memoryview, description: Any, *, dense: bool = False) -> torch.Tensor:
    """The tensor that `describe` described, on the memory of `buffer`, without a copy.

    Args:
        dense: for answers of strangers: refuse a tensor with more elements than the buffer has room for, such as one expanded
            a billion times, and take every byte of a boolean that is not 0 for True.

    Raises:
        WireError: the description is malformed, or points outside the buffer.
    """
    try:
        dtype = DTYPES[description["dtype"]]
        shape = [_natural(size) for size in description["shape"]]
        strides = [_natural(stride) for stride in description["strides"]]
        offset = _natural(description["offset"])
        requires_grad = bool(description["requires_grad"])
    except (LookupError, TypeError, ValueError) as error:
        raise WireError("a tensor without dtype, shape, strides and offset") from error
    if len(shape) != len(strides) or len(shape) > 16:
        raise WireError(f"a tensor of shape {shape[:16]} and strides {strides[:16]}")
    elements = math.prod(shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if elements else 0
    needed = max(span, elements) if dense else span
    if offset % dtype.itemsize or offset + needed * dtype.itemsize > len(buffer):
        raise WireError(f"a tensor of {needed * dtype.itemsize} bytes at byte {offset} of {len(buffer)}")
    try:
        if not elements:
            return torch.empty(shape, dtype=dtype).requires_grad_(requires_grad)
        if dtype is torch.bool and dense:  # of a stranger's bytes, which may be neither 0 nor 1
            flat = torch.frombuffer(buffer, dtype=torch.uint8, count=span, offset=offset) != 0
        else:
            flat = torch.frombuffer(buffer, dtype=dtype, count=span, offset=offset)
        return flat.as_strided(shape, strides).requires_grad_(requires_grad)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise WireError(f"a tensor of shape {shape} and strides {strides}") from error


def storage_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory behind `tensor`, all of its storage."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
    return memoryview(whole.numpy())


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---------------------------------------------------------------------------------------------------------- frames


def encode_header(header: dict[str, Any]) -> bytes:
    """Length and JSON, ready to send.

    Raises:
        NotSendable: the JSON is larger than `HEADER_LIMIT`.
    """
    text = json.dumps(header, allow_nan=False).encode()
    if len(text) > HEADER_LIMIT:
        raise NotSendable(f"a value whose description takes {len(text):,} bytes (at most {HEADER_LIMIT:,})")
    return len(text).to_bytes(8, "big") + text


def header_size(prefix: bytes) -> int:
    """How many bytes of JSON follow these eight.

    Raises:
        WireError: more than `HEADER_LIMIT`.
    """
    size = int.from_bytes(prefix, "big")
    if size > HEADER_LIMIT:
        raise WireError(f"a header of {size} bytes")
    return size


def decode_header(text: bytes) -> dict[str, Any]:
    """The header.

    Raises:
        WireError: not a JSON object.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError("a header that is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("a header that is not a JSON object")
    return header
