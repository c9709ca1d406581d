"""Solutions that compute the right numbers in a forbidden way: by code that nothing counts, or by changing what counts."""

from dataclasses import replace

import pytest

from flashlib.course.grader.engine import Submission, grade
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.sandbox.outcome import Limits
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.scan import suspicious


def solution(name: str) -> bytes:
    return (REPOSITORY / "solutions" / load_exercise(name).file).read_bytes()


# How a tensor gets out to where nothing counts, as an array `a` of NumPy made of a tensor `x`.
EXITS = {
    "numpy": "a = x.detach().numpy()",
    "asarray": "a = np.asarray(x.detach())",
    "array": "a = np.array(x.detach())",
    "tolist": "a = np.array(x.tolist(), dtype=np.float32).reshape(x.shape)",
    "DLPack": "a = np.from_dlpack(x.detach())",
    "address": "import ctypes\n    x = x.contiguous()\n    a = np.ctypeslib.as_array((ctypes.c_float * x.numel()).from_address(x.data_ptr())).copy().reshape(x.shape)",
    "protocol": "a = x.detach().__array__()",
    "pickle": "import io, pickle\n    a = pickle.loads(pickle.dumps(x.detach())).numpy()",
    "method of the class": "a = torch.Tensor.numpy(x.detach())",
    "numpy force": "a = x.numpy(force=True)",
}  # fmt: skip
OUTSIDE = """

import numpy as np


def _array(x):
    {exit}
    return a


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    q, k, v = (_array(x.float()) for x in (q, k, v))
    out, lse = np.empty((*q.shape[:3], v.shape[3]), np.float32), np.empty(q.shape[:3], np.float32)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(0, q.shape[2], 64):
                s = (q[b, h, i : i + 64] @ k[b, h].T * np.float32(scale)).astype(np.float32)
                m = s.max(-1, keepdims=True)
                p = np.exp(s - m)
                total = p.sum(-1, keepdims=True)
                out[b, h, i : i + 64] = p / total @ v[b, h]
                lse[b, h, i : i + 64] = (m + np.log(total))[:, 0]
    return torch.from_numpy(out).to(dtype), torch.from_numpy(lse)
"""


@pytest.mark.parametrize("way", EXITS)
def test_numbers_that_leave_pytorch_earn_nothing_where_something_counts(sandbox_of, way):
    exercise = load_exercise("ex03")
    source = solution("ex03") + OUTSIDE.replace("{exit}", EXITS[way]).encode()
    report = grade(exercise, Submission("cheat", source), sandbox_of(exercise))
    failed = {result.name: result.finding.diagnosis for result in report.results if result.finding}
    assert set(failed.values()) == {"leaves-pytorch"}, report
    assert {"linear-memory", "memory-traffic"} <= set(failed)


WHOLE_ROW = """

def online_attention(scores, v, block):
    s, values = scores.numpy().astype("float64"), v.numpy().astype("float64")
    m = s.max(1, keepdims=True)
    import numpy as np
    safe = np.where(np.isinf(m), 0.0, m)
    p = np.exp(s - safe)
    total = p.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = safe[:, 0] + np.log(total[:, 0])
    return torch.from_numpy(p @ values / np.where(total == 0, 1.0, total)).float(), torch.from_numpy(lse).float()
"""
COPIED_PREFIXES = """

_tiled = shared_prefix_attention


def shared_prefix_attention(q, levels, k, v, lengths):
    import numpy as np
    copied = [(torch.from_numpy(np.copy(a.numpy())), torch.from_numpy(np.copy(b.numpy())), c) for a, b, c in levels]
    return _tiled(q, copied, k, v, lengths)
"""


@pytest.mark.parametrize(("name", "cheat"), [("ex02", WHOLE_ROW), ("ex13", COPIED_PREFIXES)])
def test_whole_rows_and_copies_in_numpy_earn_no_full_marks(sandbox_of, name, cheat):
    exercise = load_exercise(name)
    report = grade(exercise, Submission("cheat", solution(name) + cheat.encode()), sandbox_of(exercise))
    assert set(report.diagnoses) == {"leaves-pytorch"}, report


# Code that changes what counts, in its own process: every count says what the checks want to hear.
SILENCED = """

import sys as _sys

_frame = _sys._getframe()
while "TrafficMeter" not in _frame.f_globals:
    _frame = _frame.f_back
_harness = _frame.f_globals
_real, _calls = _harness["_traffic"], [1]


def _lying(meter, watch, leaving):
    told = _real(meter, watch, leaving)
    _calls[0] *= 4
    nothing = {"bytes_read": {}, "bytes_written": {}, "left": {}, "peak_bytes": 1, "largest_elements": 1000}
    return {**told, **nothing, "calls": {"aten.zeros": _calls[0]}, "launches": {"kernel": 1}, "largest_block": 1}


_harness["_traffic"] = _lying
"""


@pytest.mark.parametrize(("name", "rests"), [("ex03", False), ("ex10", True), ("ex14", False)])
def test_points_that_rest_on_a_process_own_word_are_told_beside_what_its_source_reaches_for(sandbox_of, name, rests):
    exercise = load_exercise(name)
    source = solution(name) + SILENCED.encode()
    honest = grade(exercise, Submission("honest", solution(name)), sandbox_of(exercise))
    if not sandbox_hands_out(sandbox_of(exercise)):
        pytest.skip("this system hands nothing out piece by piece: all counts are the process's own word")
    assert honest.passed and suspicious(solution(name)) == []
    assert (honest.unverified > 0) == rests, [result.name for result in honest.results if result.own_word]
    found = " ".join(suspicious(source))
    assert "_getframe" in found and "f_globals" in found


# By what they read, by how much they take, and in which order, whatever they say of themselves.
SEEN_FROM_OUTSIDE = [
    ("ex02", "blocks_of_its_own", "online-attention-never-holds-the-row"),
    ("ex03", "keys_cut_by_block_q", "memory-traffic"),
    ("ex03", "rereads_its_copies", "memory-traffic"),
    ("ex04", "map_from_the_whole_mask", "attention-stays-tiled"),
    ("ex08", "loads_before_it_decides", "loads-what-is-seen"),
    ("ex10", "cache_read_by_every_query_head", "every-key-is-read-once"),
    ("ex11", "padded_copy", "attention-does-not-pad"),
    ("ex12", "one_request_at_a_time", "bounded-memory"),
    ("ex13", "one_request_at_a_time", "read-once"),
]


def sandbox_hands_out(sandbox):
    child = sandbox.open_child(b"", "nothing.py", Limits(), {})
    try:
        child.fence_in()
        return child.hands_out
    finally:
        child.end()


@pytest.mark.parametrize(("name", "wrong", "check"), SEEN_FROM_OUTSIDE)
def test_what_is_seen_from_outside_is_seen_whatever_a_process_says_of_itself(sandbox_of, name, wrong, check):
    exercise = load_exercise(name)
    if not sandbox_hands_out(sandbox_of(exercise)):
        pytest.skip("this system hands nothing out piece by piece: all counts are the process's own word")
    exercise = replace(exercise, properties=[each for each in exercise.properties if each.name == check])
    source = (REPOSITORY / f"tests/grader/wrong/{name}/{wrong}.py").read_bytes() + SILENCED.encode()
    report = grade(exercise, Submission("cheat", source), sandbox_of(exercise))
    assert report.results[0].finding is not None, report


def test_memory_is_seen_from_outside_whatever_the_code_says_of_itself(sandbox_of):
    exercise = load_exercise("ex03")
    untiled = (REPOSITORY / "tests/grader/wrong/ex03/untiled.py").read_bytes()
    report = grade(exercise, Submission("cheat", untiled + SILENCED.encode()), sandbox_of(exercise))
    failed = {result.name: result.finding for result in report.results if result.finding}
    assert failed["linear-memory"].diagnosis == "untiled" and "process that grew" in failed["linear-memory"].got


# Ways around a count that are not changes of what counts. Each is one kind, and leads to what is refused, or seen from outside.
IN_A_THREAD = """

import threading

_honest = {function}


def {function}(*args, **kwargs):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(_honest(*args, **kwargs)))
    thread.start()
    thread.join()
    return answers[0]
"""
IN_A_TASK = """

_honest = {function}


def {function}(*args, **kwargs):
    return torch.futures.wait_all([torch.jit.fork(_honest, *args, **kwargs)])[0]
"""
MODES_OFF = """

from torch.utils._python_dispatch import _disable_current_modes

_honest = {function}


def {function}(*args, **kwargs):
    with _disable_current_modes():
        return _honest(*args, **kwargs)
"""
BITS_AS_INTEGERS = """

import numpy as np


def _array(x):
    return x.contiguous().view(torch.int32).numpy().view(np.float32)


def {function}(q, k, v, block_q, block_k, scale=None):
    s = _array(q) @ _array(k).swapaxes(2, 3) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    return torch.from_numpy(p @ _array(v) / l).to(q.dtype), torch.from_numpy((m + np.log(l))[..., 0]).float()
"""
READ_BY_A_CALLBACK = """

_honest = {function}


def {function}(q, k, v, *args, **kwargs):
    for _ in range(20):
        k.map_(k, lambda number, same: number)
    return _honest(q, k, v, *args, **kwargs)
"""


@pytest.mark.parametrize("cheat", [IN_A_THREAD, IN_A_TASK, MODES_OFF, BITS_AS_INTEGERS, READ_BY_A_CALLBACK])
def test_computing_where_nothing_is_counted_earns_no_points_for_what_counts(sandbox_of, cheat):
    exercise = load_exercise("ex03")
    exercise = replace(exercise, properties=[each for each in exercise.properties if each.name == "memory-traffic"])
    honest = (REPOSITORY / "tests/grader/wrong/ex03/hard_coded_tiles.py").read_bytes()
    report = grade(
        exercise, Submission("cheat", honest + cheat.format(function="tiled_attention").encode()), sandbox_of(exercise)
    )
    assert set(report.diagnoses) & {"nothing-counted", "leaves-pytorch", "keys-read-too-often", "block-k-ignored"}, (
        report
    )


# Where K and V are put by that no meter and no memory of the process shows, to be read again and again from there.
PUT_BY = {
    "a file": "open(name, 'wb').write(data)",
    "a file mapped": "open(name, 'wb').close(), os.truncate(name, len(data)), mmap.mmap(os.open(name, os.O_RDWR), 0).write(data)",
    "pipes": "[os.write(os.pipe()[1], data[at : at + 65536]) for at in range(0, len(data), 65536)]",
    "sockets": "kept += [socket.socketpair() for at in range(0, len(data), 65536)]; kept[-1][0].send(data[:65536])",
    "memory without a name": "os.write(os.memfd_create('x'), data)",
}  # fmt: skip
KEPT = """

import mmap, os, socket

_honest = tiled_attention


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    if k.shape[2] > 10_000:
        name, kept = "kept", []
        for at in range(0, k.shape[2], 8192):
            data = k[0, 0, at : at + 8192].clone().view(torch.uint8).numpy().tobytes()
            name = f"kept{{at}}"
            {put}
    return _honest(q, k, v, block_q, block_k, scale)
"""


@pytest.mark.parametrize("put", PUT_BY.values(), ids=PUT_BY)
def test_keys_put_by_outside_of_the_memory_of_the_process_are_seen(sandbox_of, put):
    exercise = load_exercise("ex03")
    if not sandbox_hands_out(sandbox_of(exercise)):
        pytest.skip("this system hands nothing out piece by piece: all counts are the process's own word")
    exercise = replace(exercise, properties=[each for each in exercise.properties if each.name == "memory-traffic"])
    source = solution("ex03") + KEPT.format(put=put).encode()
    assert not grade(exercise, Submission("cheat", source), sandbox_of(exercise)).passed
