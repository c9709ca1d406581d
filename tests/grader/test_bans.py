"""What an exercise forbids is gone by every route: found by calling everything that PyTorch has."""

import secrets

import pytest

from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import SDPA, SOFTMAX, Exercise
from flashlib.course.grader.sandbox.outcome import Limits

PROBE = '''
import inspect
import math
import os
import re
import sys
import warnings

import torch
import torch.nn.functional as F

warnings.simplefilter("ignore")


def wanted(x, q):
    """By name, what an operation that is forbidden computes from what the probe gives it, made from other operations."""
    found = {}
    for dim in range(x.ndim):
        e = torch.exp(x)
        total = e.sum(dim, keepdim=True)
        found[f"softmax {dim}"] = e / total
        found[f"log_softmax {dim}"] = x - total.log()
        found[f"logsumexp {dim}"] = total.log()
        found[f"logcumsumexp {dim}"] = e.cumsum(dim).log()
    for causal in (False, True):
        for scale in (1.0, q.shape[-1] ** -0.5, q.shape[-1] ** -1.0):
            s = torch.exp(q @ q.mT * scale)
            s = s.tril() if causal else s
            found[f"attention {causal} {scale:.2f}"] = s / s.sum(-1, keepdim=True) @ q
    return found


def tensors_in(value, depth=0):
    if isinstance(value, torch.Tensor):
        try:
            yield value.to_dense() if value.layout != torch.strided else value
        except Exception:
            return
    elif isinstance(value, (tuple, list)) and depth < 3:
        for item in value:
            yield from tensors_in(item, depth + 1)


def names_of(value, known):
    for tensor in tensors_in(value):
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        for name, exact in known.items():
            if tensor.numel() == exact.numel() and torch.allclose(
                tensor.detach().double().reshape(-1), exact.double().reshape(-1), rtol=1e-3, atol=1e-4
            ):
                yield name


def argument(kind, name, tensor, given):
    """Something for a parameter of that type; None if nothing comes to mind."""
    text = str(kind)
    if text == "Tensor":
        return torch.zeros(tensor.shape, dtype=torch.bool) if "mask" in name else tensor
    if text == "List[Tensor]":
        return [tensor, tensor]
    if text in ("int", "SymInt"):
        return -1 if "dim" in name else {"embed_dim": 8, "num_head": 1, "num_heads": 1}.get(name, 1)
    if text in ("List[int]", "List[SymInt]"):
        return [-1]
    if text in ("float", "number"):
        return 0.0 if "drop" in name else 1.0
    if text == "bool":
        return False
    if text.startswith("Optional"):
        return None
    return None


def call_all(names, tensor, known):
    hits = []
    for full in names:
        for schema in torch._C._jit_get_schemas_for_operator(full):
            overload = getattr(torch.ops.aten, full.partition("::")[2], None)
            overload = getattr(overload, schema.overload_name or "default", None)
            if overload is None:
                continue
            given, keywords = [], {}
            for each in schema.arguments:
                value = argument(each.type, each.name, tensor, given)
                if each.is_out:
                    value = torch.empty(0)
                if each.kwarg_only:
                    if each.is_out or not each.has_default_value():
                        keywords[each.name] = value
                elif not each.has_default_value() or each.name in ("dim",):
                    given.append(value)
            start = [tensor.clone() if each is tensor else each for each in given]  # it may be written to
            try:
                value = overload(*start, **keywords)
            except Exception:
                continue
            if list(names_of([value, list(keywords.values()), start], known)):
                hits.append(f"{full}.{schema.overload_name}")
    return hits


def python_functions():
    pattern = re.compile("softmax|logsumexp|attention|attn|sdpa|softmin|MultiheadAttention", re.I)
    for module_name in sorted(sys.modules):
        module = sys.modules[module_name]
        if module_name.partition(".")[0] != "torch" or module is None:
            continue
        for name, value in sorted(vars(module).items()):
            if pattern.search(name) and callable(value):
                yield f"{module_name}.{name}", value


def call_python(label, function, x, q, known):
    ways = [(x, -1), (x,), (x, 1, False), (x, -1, False), (q, q, q), (x, (-1,)), (x, [-1], False), (q, q, q, None, 0.0, False)]
    if inspect.isclass(function):
        makers = [(), (-1,), (8, 1), (-1, 1)]
    else:
        makers = [None]
    for maker in makers:
        try:
            target = function if maker is None else function(*maker)
        except Exception:
            continue
        if not callable(target):
            continue
        for way in ways:
            try:
                value = target(*(each.clone() if isinstance(each, torch.Tensor) else each for each in way))
            except Exception:
                continue
            if list(names_of(value, known)):
                return [label]
    return []


def in_a_fork(work, items):
    """`work(items)` in a process of its own; where that dies, in two halves."""
    import pickle

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            import signal

            signal.alarm(20)
            os.write(writer, pickle.dumps(work(items)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    if said:
        return pickle.loads(said)
    if len(items) == 1:
        return []
    half = len(items) // 2
    return in_a_fork(work, items[:half]) + in_a_fork(work, items[half:])


def probe(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator)
    q = torch.randn(1, 2, 6, 8, generator=generator)
    known = wanted(x, q)
    names = sorted({full.partition(".")[0] for full in torch._C._dispatch_get_all_op_names() if full.startswith("aten::")})
    hits = []
    for start in range(0, len(names), 100):
        part = names[start : start + 100]
        hits += in_a_fork(lambda items: call_all(items, x, known) + call_all(items, q, known), part)
    functions = list(python_functions())
    for start in range(0, len(functions), 30):
        part = functions[start : start + 30]
        hits += in_a_fork(lambda items: [h for item in items for h in call_python(*item, x, q, known)], part)
    return sorted(set(hits)), len(names), len(functions)
'''


def exercise(forbidden):
    return Exercise(
        "ex98",
        "ex98_probe.py",
        "probe",
        "none",
        1,
        1,
        1,
        forbidden=forbidden,
        limits=Limits(seconds=280.0, total_seconds=290.0, memory=8 << 30, processes=True),
    )


def probed(forbidden, seed) -> tuple[list[str], int, int]:
    found = []
    declared = exercise(forbidden)

    @declared.property(points=1)
    def probes(t):
        """probes"""
        found.append(t.call("probe", seed))

    with sandbox_for(declared, kernel_fences=False) as sandbox:
        report = grade(declared, Submission("probe", PROBE.encode()), sandbox)
    assert report.passed, report
    return found[0]


def test_no_operator_and_no_function_that_is_left_computes_what_is_forbidden():
    seed = secrets.randbits(30)
    found, operators, functions = probed({}, seed)
    assert operators > 1000 and functions > 100
    # That the probe finds what there is, if nothing forbids it:
    assert {
        "aten::softmax.int",
        "aten::_softmax.",
        "aten::_softmax.out",
        "aten::logsumexp.out",
        "aten::_masked_softmax.",
    } <= set(found)
    assert {"torch.nn.functional.softmax", "torch._refs.logsumexp", "torch._decomp.decompositions._softmax"} <= set(
        found
    )
    assert any("scaled_dot_product_attention" in name for name in found)
    left, _, _ = probed(SDPA | SOFTMAX, seed)
    assert left == [], f"seed {seed}"


# Ways around, each of which computes what is forbidden where nothing forbids it.
ROUTES = {
    "out=": "torch.softmax(x, -1, out=torch.empty(5, 7))",
    "out= of log-sum-exp": "torch.logsumexp(x, -1, out=torch.empty(5))",
    "vmap": "torch.func.vmap(lambda row: torch.softmax(row, -1))(x)",
    "vmap twice": "torch.func.vmap(torch.func.vmap(lambda row: torch.logsumexp(row, 0)))(q[0])",
    "vmap of attention": "torch.func.vmap(F.scaled_dot_product_attention)(q, q, q)",
    "vmap of attention in its parts": "torch.func.vmap(torch.ops.aten._scaled_dot_product_attention_math.default)(q, q, q)",
    "a gradient": "torch.func.grad(lambda row: torch.logsumexp(row, -1).sum())(x)",
    "a derivative": "torch.func.jvp(lambda row: torch.softmax(row, -1), (x,), (x,))",
    "autograd": "torch.autograd.grad(torch.logsumexp(x.requires_grad_(), -1).sum(), x)",
    "inference mode": "torch.inference_mode()(lambda: torch.softmax(x, -1))()",
    "sparse": "torch.sparse.softmax(x.to_sparse(), 1).to_dense()",
    "nested": "torch.softmax(torch.nested.nested_tensor([x, x]), -1)",
    "oneDNN": "torch._softmax(x.to_mkldnn(), -1, False).to_dense()",
    "a key of the dispatcher": "torch.ops.aten.softmax.int._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, x, -1)",
    "redispatching": "torch.ops.aten._softmax.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), x, -1, False)",
    "decomposing": "torch.ops.aten.softmax.int.decompose(x, -1)",
    "the table of decompositions": "torch._decomp.decomposition_table[torch.ops.aten._softmax.default](x, -1, False)",
    "references in Python": "torch._refs.softmax(x, -1)",
    "references of references": "torch._refs.nn.functional.softmax(x, -1)",
    "a script": "torch.jit.CompilationUnit('def f(x):\\n  return torch.softmax(x, -1)\\n').f(x)",
    "a distribution": "torch.distributions.Categorical(logits=x).probs",
    "a loss": "F.cross_entropy(x, torch.zeros(5, dtype=torch.long))",
    "a layer": "torch.nn.MultiheadAttention(8, 2).eval()(q[0], q[0], q[0])",
    "masked tensors": "torch.masked.softmax(x, -1)",
    "destroying libraries": "[o._destroy() for o in gc.get_objects() if isinstance(o, torch.library.Library)], torch.softmax(x, -1)",
    "resetting libraries": "[o.reset() for o in gc.get_objects() if type(o).__name__ == '_DispatchModule'], torch.softmax(x, -1)",
    "a new library": "torch.library.Library('aten', 'IMPL')._destroy(), torch.softmax(x, -1)",
    "a collection": "gc.collect(), torch.softmax(x, -1)",
    "another thread": "ThreadPoolExecutor(1).submit(torch.softmax, x, -1).result()",
}


@pytest.mark.parametrize("route", ROUTES)
def test_ways_around_are_closed(sandbox_of, route):
    source = f"""
import gc
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.masked
import torch.nn.functional as F


def routes(x, q):
    {ROUTES[route]}
    return True
"""

    def goes(forbidden):
        declared = exercise(forbidden)

        @declared.property(points=1)
        def routes(t):
            """routes"""
            t.call("routes", t.randn(5, 7), t.randn(1, 2, 6, 8))

        return grade(declared, Submission("router", source.encode()), sandbox_of(declared))

    assert goes({}).passed, "no way where nothing is forbidden"
    report = goes(SDPA | SOFTMAX)
    assert set(report.diagnoses) <= {"softmax-called", "sdpa-called"} and report.diagnoses, report


@pytest.mark.parametrize(
    "use",
    [
        "@torch.compile\ndef f(x):\n    return x",
        "def f(x):\n    return torch.compile(lambda y: y)(x)",
        "f = torch.compile(lambda x: x)",
    ],
)
def test_compiling_is_refused_by_name_at_once(sandbox_of, use):
    declared = exercise({})

    @declared.property(points=1)
    def compiles(t):
        """compiles"""
        t.call("f", t.randn(3))

    report = grade(declared, Submission("compiler", f"import torch\n\n\n{use}\n".encode()), sandbox_of(declared))
    assert report.diagnoses == ("compile-called",) and "torch.compile" in str(report) and report.seconds < 20
