"""Inside the fence: import the student's file, answer calls, never decide anything.

Nothing here is secret and nothing here is trusted: the student's code shares this process and may change all of it. What
counts is measured or judged by the grader. The honest student gets his own traceback, the operation that is forbidden,
and the traffic his code made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import mmap
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flashlib.course.grader.sandbox import wire
from flashlib.course.grader.sandbox.confine import Fence, confine, die_with_parent
from flashlib.course.grader.sandbox.handout import open_faults
from flashlib.measure.counting.kernel_watch import KernelFault, KernelWatch, interpreting
from flashlib.measure.counting.meter import TrafficMeter

TEXT_LIMIT = 4000  # characters of a message or a traceback
CHAIN_LIMIT = 20  # errors wrapped in each other
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")


compiler: type | None = None  # what compiles launches in place of running them, in a zygote that was started for that


class ForbiddenOperation(RuntimeError):
    """A student's code reached an operation that its exercise forbids."""

    def __init__(self, group: str, operation: str) -> None:
        text = f"{operation} is not allowed in this exercise"
        super().__init__(text)
        self.group = group
        _refusals[text] = group


_refusals: dict[str, str] = {}  # what was said so far, by its text: TorchScript keeps of an error the text alone


ForbiddenOperation.__module__ = "builtins"  # a traceback then shows the bare name


@functools.cache
def rehearse_meter() -> None:
    """Meter something once, in the zygote: a first use loads much, for which no child should pay time or memory."""
    with TrafficMeter():
        torch.ones(4, 4).matmul(torch.ones(4, 4)).softmax(-1)


def run(channel: int, output: int, setup: dict[str, Any]) -> None:
    """Become the child: fence in, say so, then answer requests until the grader hangs up. Does not return."""
    status = 1
    try:
        die_with_parent()
        os.setsid()
        channel = _move_files(channel, output)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(setup["directory"])
        os.environ.clear()
        os.environ.update(setup["environment"])
        tempfile.tempdir = None  # found anew, in the new environment
        if interpreting():
            # New memory then holds NaN, so that what a kernel leaves unwritten shows, instead of being 0 by luck. PyTorch's
            # use_deterministic_algorithms would do the same, and import the compiler for it.
            torch.set_deterministic_debug_mode("warn")
        _forbid(setup["forbidden"])
        link = _Link(socket.socket(fileno=channel))
        link.give(open_faults())  # what a fenced process may not make
        protections = confine(Fence(**setup["fence"]))
        link.reply({"active": protections.active, "missing": protections.missing})
        _serve(link, setup["file"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _move_files(channel: int, output: int) -> int:
    """Input from nowhere, output to the grader, the channel on 3, and nothing else open."""
    channel, output = os.dup(channel), os.dup(output)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(channel, 3)
    os.closerange(4, 1024)
    sys.stdout, sys.stderr = _text_to(1), _text_to(2)
    return 3


def _text_to(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


# Whoever calls an operation passes one of these. An operation that has a kernel for none of them has none of its own on a CPU.
_KEYS = (
    "CPU",
    "MkldnnCPU",
    "QuantizedCPU",
    "SparseCPU",
    "SparseCsrCPU",
    "NestedTensorCPU",
    "Meta",
    "AutogradFunctionality",
    "AutogradCPU",
    "AutogradNestedTensor",
    "FuncTorchBatched",
    "FuncTorchBatchedDecomposition",
    "FuncTorchVmapMode",
    "BatchedNestedTensor",
)


def _forbid(groups: dict[str, list[str]]) -> None:
    """Take operations out of PyTorch, so that no route to them is left: names, aliases, overloads, threads, transforms, modules.

    In the dispatcher they are replaced for good: what keeps the replacements there is an object that no Python object holds and
    the garbage collector does not know, so that nobody finds it to destroy it. PyTorch's second implementations, in Python, lose
    their code.
    """
    overloads: dict[str, list[str]] = {}
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, overload = full.partition("::")
        if namespace == "aten":
            overloads.setdefault(overload.partition(".")[0], []).append(overload)
    library = torch._C._dispatch_library("IMPL", "aten", "", __file__, 0)
    for group, names in groups.items():
        for name in names:
            refuse = _refusing(group, f"aten::{name}")
            for overload in overloads.get(name, ()):
                for key in _KEYS:
                    library.impl(overload, key, refuse)
        _empty_functions(group, set(names))
        _empty_kernels(group, set(names))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))
    torch.compile = _refusing("compile-called", "torch.compile")


def _refusing(group: str, operation: str) -> Callable[..., Any]:
    def refuse(*args, **kwargs):
        raise ForbiddenOperation(group, operation)

    return refuse


def _empty_functions(group: str, names: set[str]) -> None:
    """Replace the code of PyTorch's Python functions, and methods of classes, of these names by a refusal, whoever holds them."""

    def template(*args, **kwargs):
        raise "the refusal"  # noqa: B016  the constant is replaced by an exception below

    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "torch":
            continue
        for name in names & vars(module).keys():
            value = vars(module)[name]
            for function in vars(value).values() if isinstance(value, type) else (value,):
                if not isinstance(function, FunctionType):
                    continue
                while isinstance(getattr(function, "__wrapped__", None), FunctionType):
                    function = function.__wrapped__
                if not function.__code__.co_freevars:
                    refusal = ForbiddenOperation(group, f"{module_name}.{name}")
                    constants = (refusal if each == "the refusal" else each for each in template.__code__.co_consts)
                    function.__code__ = template.__code__.replace(co_consts=tuple(constants))


def _empty_kernels(group: str, names: set[str]) -> None:
    """Replace functions of these names in Triton's own language, which its interpreter makes anew from their source.

    They are reached as functions and as methods of a tile, by one object: what it calls is replaced, whoever holds it.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "triton":
            continue
        for name in names & vars(module).keys():
            kernel = vars(module)[name]
            if hasattr(kernel, "rewritten_fn"):
                refuse = _refusing(group, f"triton.language.{name}")
                kernel.rewritten_fn[kernel.fn] = refuse
                kernel.rewriter.rewrite_ast = lambda refuse=refuse: refuse


# --------------------------------------------------------------------------------------------------------- the channel


class _Link:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def request(self) -> tuple[dict[str, Any], mmap.mmap | None] | None:
        """The next request and the memory its tensors lie in, or None when the grader has hung up."""
        prefix, fds, _, _ = socket.recv_fds(self.channel, 8, 1)
        if not prefix:
            return None
        header = wire.decode_header(self._exactly(wire.header_size(prefix)))
        if not fds:
            return header, None
        memory = mmap.mmap(fds[0], 0)
        os.close(fds[0])
        return header, memory

    def give(self, fd: int | None) -> None:
        """Hand a descriptor over, if there is one, and keep none."""
        socket.send_fds(self.channel, [b"\1" if fd is not None else b"\0"], [fd] if fd is not None else [])
        if fd is not None:
            os.close(fd)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (more := self.channel.recv(size - len(data))):
                raise EOFError("the grader hung up in the middle of a request")
            data += more
        return bytes(data)

    def reply(self, header: dict[str, Any], tensors: list[torch.Tensor] | None = None) -> None:
        plain = [_plain(tensor) for tensor in tensors or []]
        position, descriptions = 0, []
        for tensor in plain:
            descriptions.append(wire.describe(tensor, position))
            position += wire.padded(tensor.untyped_storage().nbytes())
        self.channel.sendall(wire.encode_header({**header, "tensors": descriptions, "bytes": position}))
        for tensor in plain:
            data = wire.storage_bytes(tensor)
            self.channel.sendall(data)
            self.channel.sendall(bytes(wire.padded(len(data)) - len(data)))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with nothing else in its memory: of a result, only the elements matter."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------ answering


def _serve(link: _Link, file: str) -> None:
    module: ModuleType | None = None
    objects: dict[int, Any] = {}
    while (request := link.request()) is not None:
        header, memory = request
        answer, tensors = {}, []
        try:
            if header["do"] == "load":
                module = _load(file)
            else:
                if header["guarded"]:
                    link.reply({"id": header["id"], "mapped": ctypes.addressof(ctypes.c_char.from_buffer(memory))})
                    link.request()  # now the grader hands out
                answer, tensors = _call(header, memory, module, objects)
            sys.stdout.flush()
            link.reply({"id": header["id"], **answer}, tensors)
        except BaseException as error:
            link.reply({"id": header["id"], "error": _explain(error, file)})


def _load(file: str) -> ModuleType:
    name = os.path.splitext(os.path.basename(file))[0]
    sys.path.append(os.path.dirname(file))  # modules of the student's own lie beside it
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call(
    header: dict[str, Any], memory: mmap.mmap | None, module: ModuleType, objects: dict[int, Any]
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    buffer = memoryview(memory) if memory is not None else memoryview(b"")
    tensors = [wire.tensor_from(buffer, description) for description in header["tensors"]]
    args = wire.from_json(header["args"], tensors, objects)
    kwargs = wire.from_json(header["kwargs"], tensors, objects)
    owner = module if header["on"] is None else objects[header["on"]]
    operands = {name: tensors[index] for name, index in (header["meter"] or {}).items()}
    meter = TrafficMeter(fast_memory=header["fast_memory"], **operands) if header["meter"] is not None else None
    watch = KernelWatch(**operands) if interpreting() else None
    leaving = _Leaving(operands) if meter else None
    compiled = compiler() if compiler is not None else None
    with contextlib.ExitStack() as entered:
        for each in (meter, watch, leaving, compiled):
            entered.enter_context(each or contextlib.nullcontext())
        function = getattr(owner, header["function"], None)  # a property computes here
        if function is None:
            return {"error": {"kind": "missing", "message": header["function"]}}, []
        value = function(*args, **kwargs) if callable(function) else function
    answer = {"meter": _traffic(meter, watch, leaving) if meter else None}
    answer["compiled"] = compiled.kernels if compiled else None
    if header["keep"] is not None:
        objects[header["keep"]] = value
        return answer, []
    results: list[torch.Tensor] = []
    answer["value"] = wire.to_json(value, results)
    return answer, results


def _traffic(meter: TrafficMeter, watch: KernelWatch | None, leaving: _Leaving) -> dict[str, Any]:
    """What PyTorch's operations moved, and Triton's kernels in the interpreter, and what left for where nobody counts."""
    watch = watch or KernelWatch()
    largest = meter.largest
    return {
        "largest_elements": largest.elements,
        "largest_shape": list(largest.shape),
        "largest_op": largest.op,
        "peak_bytes": meter.peak_bytes,
        "bytes_read": dict(meter.bytes_read + watch.bytes_read + leaving.bytes_read),
        "bytes_written": dict(meter.bytes_written + watch.bytes_written),
        "calls": dict(meter.calls),
        "launches": dict(watch.launches),
        "programs": watch.programs,
        "largest_block": watch.largest_block,
        "left": dict(leaving.left),
    }


# By these the elements of a tensor reach code that no operation of PyTorch runs, where nothing counts what is read.
_EXITS = (
    "numpy",
    "__array__",
    "tolist",
    "data_ptr",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__dlpack__",
    "__reduce_ex__",
    "apply_",
    "map_",
    "map2_",
)


class _Leaving(TorchFunctionMode):
    """Note which of the floating-point tensors leave PyTorch in a `with` block, and how.

    Tensors of integers may, as lengths and page numbers, but not where they are the bits of floating-point numbers.

    Attributes:
        left: how often, by the name of the way.
        bytes_read: of each operand that left, all of its bytes each time: whoever has it may have read it.
    """

    def __init__(self, operands: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.left: Counter[str] = Counter()
        self.bytes_read: Counter[str] = Counter()
        self._owners = {x.untyped_storage()._cdata: (name, x.nbytes) for name, x in operands.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _EXITS and args and isinstance(args[0], torch.Tensor) and not self._is_librarys_own():
            with torch._C.DisableTorchFunction():
                self._note(name, args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        of_numbers = tensor.is_floating_point() or (tensor._base is not None and tensor._base.is_floating_point())
        if not (of_numbers or tensor.untyped_storage()._cdata in self._owners) or tensor.numel() <= 1:
            return
        self.left[name] += 1
        owner, size = self._owners.get(tensor.untyped_storage()._cdata, ("elsewhere", tensor.nbytes))
        self.bytes_read[owner] += size

    @staticmethod
    def _is_librarys_own() -> bool:
        """Whether PyTorch or Triton asked, for their own ends: Triton's interpreter takes the addresses of a kernel's arguments."""
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            frame = frame.f_back
        return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("triton", "flashlib")


# ----------------------------------------------------------------------------------------------------------- explaining


def _explain(error: BaseException, file: str) -> dict[str, str]:
    errors = _down_to_the_cause(error, file)
    cause = errors[-1]
    if _kind(cause, file) == "compile-error":
        return _explain_compilation(cause)
    return {
        "kind": _kind(cause, file),
        "type": type(cause).__name__[:100],
        "message": _message(cause)[:TEXT_LIMIT],
        "group": _group_of(cause) or "",
        "traceback": _own_traceback(errors, file)[-TEXT_LIMIT:],
    }


def _group_of(error: BaseException) -> str | None:
    """The group of the forbidden operation that an error is about, or None."""
    if isinstance(error, ForbiddenOperation):
        return error.group
    message = _message(error)
    return next((group for text, group in list(_refusals.items()) if text in message), None)


def _explain_compilation(error: BaseException) -> dict[str, str]:
    """Triton's message shows the kernel down to the line that it refuses, with a mark under the place, and then says why.

    An error in a function that a kernel calls comes wrapped in one for the call.
    """
    while _is_compilers(error.__cause__):
        error = error.__cause__
    lines = _message(error).splitlines()
    marked = max((at for at, line in enumerate(lines) if line.strip() == "^"), default=len(lines) - 1)
    reason = " ".join(line.strip() for line in lines[marked + 1 :]) or "It is not part of the language of kernels"
    shown = "\n".join(lines[max(0, marked - 5) : marked + 1])
    return {
        "kind": "compile-error",
        "type": "CompilationError",
        "message": reason[:TEXT_LIMIT],
        "traceback": shown[-TEXT_LIMIT:],
    }


def _is_compilers(error: BaseException | None) -> bool:
    """Whether Triton's compiler refused a kernel; never in the interpreter."""
    return compiler is not None and any(kind.__name__ == "CompilationError" for kind in type(error).__mro__)


def _down_to_the_cause(error: BaseException, file: str) -> list[BaseException]:
    """The error, and those that libraries wrapped in it on its way up, down to the one that says what happened.

    Triton's interpreter wraps an error once for the kernel, and again for each function that the kernel calls. What a student
    wraps himself (`raise ... from ...` in his own file) is his message and stays.
    """
    errors = [error]
    while (cause := errors[-1].__cause__) is not None and _frames(cause, file):
        raised_in = traceback.extract_tb(errors[-1].__traceback__)[-1:]
        if len(errors) == CHAIN_LIMIT or (raised_in and _is_own(raised_in[0], file)):
            break
        errors.append(cause)
    return errors


def _frames(error: BaseException, file: str) -> list[traceback.FrameSummary]:
    """Its frames in the student's files; a library's frames do not help him."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame, file)]


def _is_own(frame: traceback.FrameSummary, file: str) -> bool:
    return os.path.dirname(frame.filename) == os.path.dirname(file)


def _kind(error: BaseException, file: str) -> str:
    if _group_of(error) is not None:
        return "forbidden"
    if isinstance(error, KernelFault):
        return error.kind
    if _is_compilers(error):
        return "compile-error"
    if isinstance(error, wire.NotSendable):
        return "unsendable"
    if isinstance(error, SystemExit):
        return "exit"
    if isinstance(error, MemoryError) or any(sign in _message(error) for sign in OUT_OF_MEMORY):
        return "memory-limit"
    if isinstance(error, NotImplementedError):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and _is_own(frames[-1], file):
            return "not-implemented"
    # Of a file that Python cannot read at all (UTF-16, say) a SyntaxError names no file.
    if isinstance(error, SyntaxError) and os.path.dirname(error.filename or file) == os.path.dirname(file):
        return "syntax"
    return "exception"


def _message(error: BaseException) -> str:
    try:
        return str.__getitem__(str(error), slice(None))  # a plain string, even if __str__ gave a subclass
    except BaseException:  # __str__ may be the student's own, and raise what it likes
        return "(its message could not be made)"


def _own_traceback(errors: list[BaseException], file: str) -> str:
    """The frames in the student's files alone, from the outermost error to its cause, then the cause."""
    frames = [frame for error in errors for frame in _frames(error, file)]
    lines = [
        f"{os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name}\n    {frame.line or ''}"
        for frame in frames[-8:]
    ]
    return "\n".join([*lines, _summary(errors[-1]).replace(os.path.dirname(file) + os.sep, "")])


def _summary(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()
    except BaseException:  # a class of the student's own, whose methods may do anything
        return f"{type(error).__name__}: {_message(error)}"
