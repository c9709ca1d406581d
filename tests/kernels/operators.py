"""The operators under PyTorch's own checks, and under torch.compile. A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/kernels/operators.py
"""

import torch
import triton  # noqa: F401  (KernelWatch asks whether it interprets)

from flashlib import attention, masks
from flashlib.launch.operators import attention_backward, attention_forward
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised
from flashlib.spec import AttentionSpec

torch.manual_seed(torch.seed())
q = torch.randn(2, 2, 9, 16, requires_grad=True)
k = torch.randn(2, 1, 12, 16, requires_grad=True)
v = torch.randn(2, 1, 12, 8, requires_grad=True)


ENGINES = ("triton ieee never", "tiled 4 4 q_outer")


def test_operators(engine: str) -> None:
    for options, wants_lse in (
        ({"causal": True}, False),
        ({"mask": masks.KeyLengths([5, 12]), "softcap": 2.0, "alibi_slopes": torch.rand(2)}, True),
    ):
        given = (*AttentionSpec.from_tensors(q, k, v, **options).numbers(), engine)
        torch.library.opcheck(attention_forward, (q, k, v, *given))
        inputs = [x.detach() for x in (q, k, v)]
        out, lse = attention_forward(*inputs, *given)
        grad_lse = torch.randn_like(lse) if wants_lse else None
        torch.library.opcheck(attention_backward, (*inputs, out, lse, torch.randn_like(out), grad_lse, *given))
    tokens_first = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(attention_forward, (tokens_first, k, v, *given))
    if engine.startswith("triton"):
        assert attention_forward(tokens_first, k, v, *given)[0].transpose(1, 2).is_contiguous()
    # Rows that end between multiples of 16 bytes are copied to where they do not; what comes out is as if they had not been.
    odd = [x.detach() for x in (tokens_first[..., :13], k[..., 3:], v[..., :7])]
    torch.library.opcheck(attention_forward, (*odd, *given))
    out, lse = attention_forward(*odd, *given)
    torch.library.opcheck(attention_backward, (*odd, out, lse, torch.randn_like(out), None, *given))


def test_compiled(engine: str) -> None:
    def objective(q, k, v):
        out, lse = attention(q, k, v, causal=True, return_lse=True, backend=engine.split()[0])
        return (out.square().sum() + lse.sin().sum()) * 2

    eager = objective(q, k, v)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(eager, compiled), (eager, compiled)
    for ours, expected in zip(
        torch.autograd.grad(compiled, (q, k, v)), torch.autograd.grad(eager, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


with KernelWatch(), faults_raised():
    for words in ENGINES:
        test_operators(words)
        test_compiled(words)
print("operators hold")
