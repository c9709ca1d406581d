"""What the check of a property works with: fresh inputs, calls into the student's process, and judgements."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashlib.course.grader.exercise import FORBIDDEN_SAYS, Misconception, Target, as_tuple
from flashlib.course.grader.findings import Failure, Finding
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.sandbox.conversation import Child
from flashlib.course.grader.sandbox.outcome import Reply, StudentError
from flashlib.course.grader.sandbox.wire import Handle
from flashlib.course.grader.text import clean
from flashlib.reference import largest_error

# A wrong answer is recognized as a misconception's when it is this much nearer to it than that is to the truth.
RECOGNIZED_WITHIN = 0.05
STRUCTURAL_HINTS = {
    "exception": "The last line names the error, the line above it where your code was. Print the shapes there.",
    "timeout": "Look for a loop whose end is never reached, or work that grows much faster than the input.",
    "missing": "Keep the names and arguments of the functions as they are in the exercise file.",
    "out-of-bounds-load": "Each lane of a block has an address. Which lanes have one that is not theirs, and what masks them?",
    "out-of-bounds-store": "Each lane of a block has an address. Which lanes have one that is not theirs, and what masks them?",
    "race": "Which program ids compute the same address? Each should write what no other reads or writes, or add by an atomic.",
    "compile-error": "The interpreter runs any Python. A GPU's kernel has numbers, blocks, tl's functions and constexprs, and no more.",
    "unsendable": "Return what the docstring says: tensors, or a tuple of them.",
}


class BrokenCheck(Exception):
    """A check contradicts itself, whatever the submission did."""


class Process:
    """The process a submission runs in: started when it is needed, and started anew after it had to be ended."""

    def __init__(self, start: Callable[[bool], Child]) -> None:
        self._start = start
        self._child: Child | None = None
        self._printed = ""
        self.cpu_seconds = 0.0  # of all processes that were ended

    def child(self, *, metered: bool) -> Child:
        """The process, with the student's file loaded. `metered` says that the meter will be used, if it must be started."""
        if self._child is None:
            self._child = self._start(metered)
        return self._child

    def end(self) -> int:
        """End it; answers how many bytes it had grown at its largest."""
        if self._child is None:
            return 0
        ending = self._child.end()
        self._printed += self._child.take_printed()
        self.cpu_seconds += ending.cpu_seconds
        self._child = None
        return ending.memory_growth

    def take_printed(self) -> str:
        """What it printed since the last time this was asked."""
        printed, self._printed = self._printed, ""
        return printed + (self._child.take_printed() if self._child else "")


class Trial:
    """One run of one property against one submission.

    Attributes:
        generator: the source of this trial's inputs; its seed comes from the run's seed and the property's name.
    """

    def __init__(
        self, name: str, seed: int, process: Process, results: Results, compiler: Process | None = None
    ) -> None:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.tried = ""
        self.answered = ""  # the last answer, in a line; "" before the first
        self.own_word = False  # whether it rests on what the student's process counted itself
        self.apart = False  # whether it took a process of its own
        self._process, self._compiler = process, compiler
        self._results = results

    # --------------------------------------------------------------------------------------------------------- inputs

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator).to(dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [low, high)."""
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(dtype)

    def integer(self, low: int, high: int) -> int:
        """One integer, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def permutation(self, count: int) -> Tensor:
        """The integers 0 .. count-1 in random order."""
        return torch.randperm(count, generator=self.generator)

    # ---------------------------------------------------------------------------------------------------------- calls

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """The student's `function(*args, **kwargs)`, run in his process: tensors, numbers, tuples of them.

        Raises:
            Failure: there was no usable answer; the finding says why.
        """
        return self.ask(function, args, kwargs).value

    def make(self, factory: str, *args: Any, **kwargs: Any) -> Remote:
        """An object that stays in the student's process, such as a cache: `t.make("Cache", 2).call("append", k, v)`."""
        return Remote(self, factory, self.ask(factory, args, kwargs, keep=True).value)

    def ask(
        self,
        function: str,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        on: Handle | None = None,
        keep: bool = False,
        meter: dict[str, Tensor] | None = None,
        fast_memory: int = 0,
        guarded: Mapping[str, tuple[Tensor, int]] | None = None,
        together: bool = False,
        leaving_allowed: bool = False,
    ) -> Reply:
        """As `call`, with everything else that is known about it: `.value`, `.meter`, `.changed`, `.seconds`.

        Args:
            meter, fast_memory, guarded, together: as in `Child.call`.
            leaving_allowed: even where numbers leave PyTorch's tensors, to where the meter does not count.
        """
        self.tried = describe_call(function, args, kwargs or {})
        try:
            reply = self._process.child(metered=meter is not None).call(
                function,
                args,
                kwargs,
                on=on,
                keep=keep,
                meter=meter,
                fast_memory=fast_memory,
                guarded=guarded,
                together=together,
            )
        except StudentError as error:
            raise Failure(self._structural(error)) from error
        self.answered = show(reply.value)
        if reply.meter is not None:
            self.own_word = True
            if not leaving_allowed:
                self._expect_to_be_counted(reply, computes=on is None)
        return reply

    def watch(
        self,
        function: str,
        *args: Any,
        first: Sequence[Any],
        room: Mapping[str, tuple[Tensor, int]],
        together: bool = False,
        memory: int | None = None,
        copied: Misconception | None = None,
    ) -> Reply | None:
        """Call the function in a process of its own, and see from outside what it reads: `.seen` of the reply.

        Where this system has no means for that, None: then what the meter counts in the student's process is all there is, and
        the points stay his own word. Else say `confirmed` once all that the check counts was seen.

        Args:
            first: arguments of a small call that is made before, so that what a first call loads is not taken for a copy.
            room: tensors that are handed out piece by piece, by name, and how many bytes of each may lie in the student's memory
                at a time: that of a tile. What does not fit is handed out again when it is read again.
            together: whether they share the largest room, so that whoever takes keys and values in turn reads both again. A matrix
                product may come past its operand as often as it likes, if that has room.
            memory: bytes by which the process may grow beyond that room: less than a copy of what is handed out needs. None if a copy would be
                seen anyway, because it reads what is not to be read.
            copied: what it is if it grows more.

        Raises:
            Failure: no usable answer, or `copied`.
        """
        self.apart = True
        self._process.end()
        child = self._process.child(metered=False)
        if not child.hands_out:
            return None
        self.ask(function, first)
        before = child.memory_peak()
        child.keep_to_memory()
        reply = self.ask(function, args, guarded=room, together=together)
        self._expect_unchanged(reply.seen.changed)
        rooms = [size for _, size in room.values()]
        grown = self._process.end() - before - (max(rooms) if together else sum(rooms))
        if memory is not None and grown > memory:
            got = f"a process that grew by {grown // MIB} MiB"
            self.fail_as(copied, got=got, expected=f"at most {memory // MIB} MiB")
        return reply

    def grown_by(self, first: Callable[[], Any], run: Callable[[], Any]) -> int:
        """Bytes by which a new process of the student grows at its largest in ``run()`` beyond what it had come to in ``first()``.

        The kernel's record, read from outside. Both make their calls through this trial; ``first`` is so small that what it loads is all it takes.
        """
        self._process.end()
        first()
        before = self._process.child(metered=False).memory_peak()
        run()
        return self._process.end() - before

    def confirmed(self) -> None:
        """What this check counted was seen from outside, too: its points are not the process's own word."""
        self.own_word = False

    def _expect_to_be_counted(self, reply: Reply, *, computes: bool = True) -> None:
        """Code that computes something runs some operation, or launches a kernel, where the meter looks, and stays there."""
        meter, made = reply.meter, [x for x in as_tuple(reply.value) if isinstance(x, Tensor) and x.is_floating_point()]
        if computes and any(x.numel() for x in made) and not (meter["calls"] or meter["launches"] or meter["left"]):
            self.fail(
                "nothing-counted",
                "Your code computed this answer where nothing is counted: in another thread, or with PyTorch's hooks switched off. "
                "This check counts: compute in the function that is called.",
                got="an answer, and no operation",
                expected="operations of PyTorch, or a kernel",
            )
        if reply.meter["left"]:
            self.fail(
                "leaves-pytorch",
                "Your code takes numbers out of PyTorch's tensors, to where nothing of what it reads and makes is counted. "
                "This check counts: compute with PyTorch's operations.",
                got=", ".join(sorted(reply.meter["left"]))[:200],
                expected="tensors that stay tensors",
                hint="Look for .numpy(), .tolist() and data_ptr() on tensors of floating-point numbers.",
            )

    def compile(self, function: str, *args: Any, **kwargs: Any) -> dict[str, list[tuple[str, str]]]:
        """Call the student's function where each launch of a Triton kernel is compiled for sm_80 and sm_90 instead.

        Returns:
            for each kernel that was launched, by name, how it multiplies tiles and of which type: `("ieee", "f32")`, say.

        Raises:
            Failure: `"compile-error"`, at the line of the kernel that the compiler refuses; or no usable answer.
        """
        self.apart = True
        self.tried = f"{describe_call(function, args, kwargs)}, compiled for sm_80 and sm_90"
        try:
            return self._compiler.child(metered=False).call(function, args, kwargs).compiled or {}
        except StudentError as error:
            raise Failure(self._structural(error)) from error

    # ----------------------------------------------------------------------------------------------------- judgements

    def check(
        self,
        target: Target,
        *args: Any,
        if_it_raises: Misconception | None = None,
        but_not_on: Sequence[Any] = (),
        **kwargs: Any,
    ) -> Any:
        """Call the target's function and hold the answer against the oracle; answers what came.

        Args:
            if_it_raises: what an exception here looks like, if there is none with the arguments `but_not_on`: ordinary ones,
                that differ in nothing else. If these raise too (a mistyped name, say), the exception is told as it is.

        Raises:
            Failure: no answer, wrong structure, wrong values or wrong dtype.
        """
        try:
            answer = self.call(target.function, *args, **kwargs)
        except Failure as failure:
            if (
                if_it_raises is None
                or failure.finding.diagnosis != "exception"
                or self._raises(target, but_not_on, kwargs)
            ):
                raise
            self.tried = failure.finding.tried
            self.fail_as(if_it_raises, got=failure.finding.says, expected="an answer")
        self._judge(target, answer, args, kwargs)
        return answer

    def judge(self, target: Target, answer: Any, *args: Any, **kwargs: Any) -> None:
        """Hold an answer that `ask` brought against the oracle, as `check` does.

        Raises:
            Failure: wrong structure, wrong values or wrong dtype.
        """
        self._judge(target, answer, args, kwargs)

    def check_inputs_untouched(self, target: Target, *args: Any, **kwargs: Any) -> None:
        """Call the target's function: its arguments must still hold what they held, to the last byte, and the answer be right.

        Raises:
            Failure: as `check`; or `"mutated-input"`.
        """
        reply = self.ask(target.function, args, kwargs)
        self._expect_unchanged(reply.changed)
        self._judge(target, reply.value, args, kwargs)

    def _expect_unchanged(self, changed: Sequence[str]) -> None:
        if changed:
            self.fail(
                "mutated-input",
                f"Your function changed what it was given ({', '.join(changed)}). The caller still needs it.",
                got="an argument whose memory holds other bytes after the call",
                expected="arguments left as they were",
                hint="Look for in-place operations: names that end in _, and x[...] = or x += on an argument or its view.",
            )

    def check_tiled(
        self,
        target: Target,
        *args: Any,
        largest: int,
        memory: int | None = None,
        first: Sequence[Any] = (),
        sample: Callable[[Tensor], Tensor] = lambda x: x,
        says: str = "",
        **kwargs: Any,
    ) -> Reply:
        """Check the values, that no tensor has more than `largest` elements, and that the process grew by at most `memory`.

        The first bound is counted by the meter in the student's process. The second is the kernel's record of that
        process's peak, read from outside, and holds whatever the code does to the meter. Give inputs so large that the
        untiled matrix exceeds both.

        Args:
            memory: bytes that the untiled matrix alone exceeds, so that this bound confirms the first one. If None, there is no
                second one, and the points are the process's own word.
            first: arguments of a small call that is made before, so that what a first call loads does not count.
            sample: picks what is compared with the oracle, which is slow on large inputs: applied to the first argument
                and to each output, as in `sample=lambda x: x[:, :, -64:]` for the last 64 queries.

        Raises:
            Failure: as `check`; or `"untiled"`.
        """
        self.apart = True
        self._process.end()
        own_word, loaded = self.own_word, 0
        if memory is not None:
            self.ask(target.function, first, meter={}, leaving_allowed=True)
            loaded = self._process.child(metered=True).memory_peak()
        reply = self.ask(target.function, args, kwargs, meter={}, leaving_allowed=True)
        outputs = tuple(sample(x) if isinstance(x, Tensor) and x.ndim > 2 else x for x in as_tuple(reply.value))
        self._judge(target, outputs, (sample(args[0]), *args[1:]), kwargs)
        says = says or "You made the whole score matrix. The point of tiling is never to hold it."
        hint = "Which tensor in your loop has a size that grows with both sequence lengths?"
        made = reply.meter["largest_elements"]
        if made > largest:
            shape, operation = str(reply.meter["largest_shape"])[:80], reply.meter["largest_op"][:80]
            self.fail(
                "untiled",
                says,
                got=f"a tensor of shape {shape} ({made} elements) made by {operation}",
                expected=f"no tensor of more than {largest:,} elements",
                hint=hint,
            )
        grown = self._process.end() - loaded
        if memory is not None and grown > memory:
            self.fail(
                "untiled",
                says + " (The operations that were seen do not show it; the memory of your process does.)",
                got=f"a process that grew by {grown // MIB} MiB",
                expected=f"at most {memory // MIB} MiB",
                hint=hint,
            )
        self._expect_to_be_counted(reply)
        if memory is not None:
            self.own_word = own_word
        return reply

    def expect_calls_to_grow(
        self,
        function: str,
        few: Sequence[Any],
        many: Sequence[Any],
        mistake: Misconception,
        *,
        factor: float = 2.0,
    ) -> None:
        """A call that has to take many steps runs more operations than one that has to take few: it uses the size it was given.

        Args:
            few, many: arguments that differ in the size of a step alone.
            mistake: what it is, if the second does not run `factor` times as many operations as the first.

        Raises:
            Failure: it does not.
        """
        counts = [sum(self.ask(function, args, meter={}).meter["calls"].values()) for args in (few, many)]
        if counts[1] < factor * counts[0]:
            self.fail_as(
                mistake,
                got=f"{counts[0]:,} operations in few steps, {counts[1]:,} in many",
                expected=f"at least {factor:g} times as many in many steps",
            )

    def results_on(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], tuple[Any, ...]]:
        """What gives, for an oracle, a budget or a model, its outputs on these arguments, and computes them once.

        "Once" is for all submissions that are graded with the same `Results` and get the same inputs.
        """
        return self._results.on(args, kwargs)

    def expect_tensor(self, value: Any, what: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """`value`, if it is a tensor of that shape (and dtype). For answers that you compute with yourself.

        Raises:
            Failure: it is not.
        """
        wanted = f"a tensor of shape {list(shape)}" + (f" and dtype {_dtype(dtype)}" if dtype else "")
        if not isinstance(value, Tensor):
            self.fail("wrong-type", f"{what} should be a tensor.", got=show(value), expected=wanted)
        if value.shape != tuple(shape):
            self.fail("wrong-shape", f"{what} does not have the right shape.", got=show(value), expected=wanted)
        if dtype is not None and value.dtype != dtype:
            self.fail("wrong-dtype", f"{what} does not have the right dtype.", got=show(value), expected=wanted)
        return value

    def expect_tuple(self, value: Any, *names: str) -> tuple[Any, ...]:
        """`value`, if it is a tuple (or list) of as many items as there are names.

        Raises:
            Failure: it is not.
        """
        if not isinstance(value, (tuple, list)) or len(value) != len(names):
            wanted = f"a tuple ({', '.join(names)})"
            self.fail("wrong-type", f"The answer should be {wanted}.", got=show(value), expected=wanted)
        return tuple(value)

    def expect_same(
        self, first: Tensor, second: Tensor, budget: float, *, diagnosis: str, says: str, hint: str = ""
    ) -> None:
        """Two answers of the student must agree within `budget`, as when only a tile size differs.

        Raises:
            Failure: they do not.
        """
        error = largest_error(first, second) if first.shape == second.shape else float("inf")
        if error > budget:
            self.fail(
                diagnosis,
                says,
                got=f"answers that differ by {error:.3g}",
                expected=f"a difference of at most {budget:.3g}",
                hint=hint,
            )

    def expect_equal(
        self, got: Any, expected: Any, what: str, misconceptions: Sequence[Misconception] = (), *args, **kwargs
    ) -> None:
        """An answer that is no floating-point result (a classification, a count) must be exactly `expected`.

        Args:
            misconceptions: their models are called with `*args, **kwargs`, and recognized if they give exactly `got`.

        Raises:
            Failure: it is not.
        """
        if _equal(got, expected):
            return
        for mistake in misconceptions:
            if mistake.model is not None and _equal(got, mistake.model(*args, **kwargs)):
                self.fail(mistake.slug, mistake.says, got=show(got), expected=show(expected), hint=mistake.hint)
        self.fail("wrong-values", f"{what} is not right.", got=show(got), expected=show(expected))

    def fail(self, diagnosis: str, says: str, *, got: str = "", expected: str = "", hint: str = "") -> None:
        """This property is not fulfilled.

        Raises:
            Failure: always.
        """
        raise Failure(Finding(diagnosis, says, self.tried, got, expected, (hint,) if hint else ()))

    def fail_as(self, mistake: Misconception, *, got: str = "", expected: str = "") -> None:
        """This property is not fulfilled, because of a mistake recognized in some other way than by its model."""
        self.fail(mistake.slug, mistake.says, got=got, expected=expected, hint=mistake.hint)

    # ------------------------------------------------------------------------------------------------------ internals

    def _raises(self, target: Target, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        try:
            self.call(target.function, *args, **kwargs)
        except Failure:
            return True
        return False

    def _judge(self, target: Target, value: Any, args, kwargs) -> None:
        names = list(target.outputs)
        answers = as_tuple(value)
        if len(answers) != len(names) or not all(isinstance(answer, Tensor) for answer in answers):
            wanted = "a tensor" if len(names) == 1 else f"a tuple of tensors ({', '.join(names)})"
            self.fail("wrong-type", f"{target.function} should return {wanted}.", got=show(value), expected=wanted)
        outputs_of = self.results_on(*args, **kwargs)
        exact, budgets = outputs_of(target.oracle), outputs_of(target.budget)
        if not all(math.isfinite(budget) for budget in budgets):
            call = describe_call(target.function, args, kwargs)
            raise BrokenCheck(f"the error budget of {call} is {budgets}: everything would pass")
        wrong = [i for i in range(len(names)) if _error(answers[i], exact[i]) > budgets[i]]
        if wrong:
            self._diagnose(target, answers, exact, budgets, wrong[0], outputs_of)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for name, answer in zip(names, answers, strict=True):
            dtype = target.outputs[name] or tensors[0].dtype
            if answer.dtype != dtype:
                self.fail(
                    "wrong-dtype",
                    f"{name} has the right values but not the right dtype.",
                    got=_dtype(answer.dtype),
                    expected=_dtype(dtype),
                    hint="Which dtype does the docstring promise? Convert once, at the end.",
                )

    def _diagnose(self, target: Target, answers, exact, budgets, wrong: int, outputs_of) -> None:
        name, answer, truth, budget = list(target.outputs)[wrong], answers[wrong], exact[wrong], budgets[wrong]
        got, expected = contrast(name, answer, truth, budget)
        mistake = recognize(target.misconceptions, answers, exact, budgets, outputs_of)
        if mistake is not None:
            self.fail(mistake.slug, mistake.says, got=got, expected=expected, hint=mistake.hint)
        if answer.shape != truth.shape:
            self.fail("wrong-shape", f"{name} does not have the right shape.", got=got, expected=expected)
        if answer.isnan().any() and not truth.isnan().any():
            self.fail(
                "nan-produced",
                f"{name} contains NaN: somewhere inf - inf, 0 * inf or 0 / 0 was computed.",
                got=got,
                expected=expected,
                hint="Which row has the first NaN, and what are its maximum and its sum?",
            )
        self.fail("wrong-values", f"{name} is off by more than rounding explains.", got=got, expected=expected)

    def _structural(self, error: StudentError) -> Finding:
        diagnosis = error.group if error.kind == "forbidden" and error.group in FORBIDDEN_SAYS else error.kind
        says = FORBIDDEN_SAYS.get(diagnosis, error.message)
        hint = STRUCTURAL_HINTS.get(error.kind)
        return Finding(diagnosis, says, self.tried, traceback=error.traceback, hints=(hint,) if hint else ())


class Remote:
    """An object in the student's process."""

    def __init__(self, trial: Trial, name: str, handle: Handle) -> None:
        self._trial, self.name, self.handle = trial, name, handle

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Its `method(*args, **kwargs)`."""
        return self._trial.ask(method, args, kwargs, on=self.handle).value

    def get(self, attribute: str) -> Any:
        """Its attribute (a method without arguments is called)."""
        return self._trial.ask(attribute, on=self.handle).value


# ------------------------------------------------------------------------------------------------------- recognizing


def recognize(
    misconceptions: Sequence[Misconception],
    answers: Sequence[Tensor],
    exact: Sequence[Tensor],
    budgets: Sequence[float],
    outputs_of: Callable[[Callable[..., Any]], Sequence[Tensor | None]],
) -> Misconception | None:
    """The misconception whose answer on the same inputs is this one; the nearest if several are.

    Args:
        outputs_of: gives a model's answer on these inputs, as `Trial.results_on` does.
    """
    best, best_distance = None, RECOGNIZED_WITHIN
    for mistake in misconceptions:
        if mistake.model is None:
            continue
        model = outputs_of(mistake.model)
        distance = max(
            (_distance(*four) for four in zip(answers, model, exact, budgets, strict=True) if four[1] is not None),
            default=float("inf"),
        )
        # A right answer errs by half its budget at most, so this mistake shows, if only just. Were it to show from a whole
        # budget on, an answer at the edge could be beyond it by a rounding more than its model is, and be called nothing.
        shows = any(m is not None and _error(m, e) > b / 2 for m, e, b in zip(model, exact, budgets, strict=True))
        if shows and distance < best_distance:
            best, best_distance = mistake, distance
    return best


def _distance(answer: Tensor, model: Tensor, exact: Tensor, budget: float) -> float:
    """How far the answer is from the model's, as a fraction of how far the model's is from the truth (and the budget)."""
    if answer.shape != model.shape:
        return float("inf")
    answer, model = answer.double(), model.double()
    if not torch.equal(answer.isnan(), model.isnan()):
        return float("inf")
    error = largest_error(answer.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), _no_nan(model))
    if error <= budget:
        return 0.0
    finite = model.isfinite() & exact.isfinite() if model.shape == exact.shape else model.isfinite()
    other = exact if model.shape == exact.shape else torch.zeros_like(model)
    scale = float((model - other).abs()[finite].max()) if finite.any() else 0.0
    return error / scale if scale else float("inf")


def _no_nan(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _error(answer: Tensor, exact: Tensor) -> float:
    return largest_error(answer, exact) if answer.shape == exact.shape else float("inf")


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return type(first) is type(second) and first == second


# ----------------------------------------------------------------------------------------------------------- showing


def describe_call(function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """`softmax(float32 [3, 5], scale=0.5)`."""
    shown = [_short(value) for value in args] + [f"{name}={_short(value)}" for name, value in kwargs.items()]
    return f"{function}({', '.join(shown)})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_short(item) for item in value[:4])}{', ...' if len(value) > 4 else ''})"
    return f"{value:.6g}" if isinstance(value, float) else clean(repr(value)[:60])


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(value: Any) -> str:
    """A value in a line: small tensors whole, others by dtype and shape."""
    if isinstance(value, Tensor) and value.numel() <= 12:
        return f"{_dtype(value.dtype)} {list(value.shape)}: {value.tolist()}"
    return _short(value)


def contrast(name: str, answer: Tensor, exact: Tensor, budget: float) -> tuple[str, str]:
    """What came and what was expected, at the place where they differ most."""
    if answer.shape != exact.shape:
        return f"{name} of shape {list(answer.shape)}", f"shape {list(exact.shape)}"
    error = torch.where(answer.double() == exact, 0.0, (answer.double() - exact).abs()).nan_to_num(nan=torch.inf)
    flat = int(error.flatten().argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    where = f"{name}[{', '.join(map(str, place))}]"
    wrong = int((error > budget).sum())
    share = f" ({wrong:,} of {error.numel():,} elements are off)"
    return (
        f"{where} = {float(answer[place]):.6g}{share}",
        f"{where} = {float(exact[place]):.6g}, with an error of at most {budget:.2g}",
    )
