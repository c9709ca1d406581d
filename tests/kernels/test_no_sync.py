"""From a call to its launches, nothing waits for the GPU: no value of a tensor there is read by the host.

Tensors on the meta device have no values, so that whatever reads one fails.
"""

import pytest
import torch

from flashlib import AttentionSpec, masks
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch

B, H, S, D = 2, 4, 50, 64
VARLEN = masks.Varlen([0, 20, 50])
MASKS = {
    "none": None,
    "causal": masks.Causal(),
    "window": masks.Window(5, 3),
    "window with offsets": masks.Window(5, 3, torch.tensor([1, 2])),
    "key lengths": masks.KeyLengths([20, 50]),
    "prefix": masks.Prefix([3, 9]),
    "documents": masks.Documents([0] * 20 + [1] * 30),
    "varlen": VARLEN & masks.Causal(VARLEN.offset(S)),
}


def on_meta(mask: masks.Mask) -> masks.Mask:
    """A mask whose tensors lie where nobody can read them, as they would lie on a GPU."""
    for part in mask.parts if isinstance(mask, masks.Intersection) else (mask,):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and name not in ("lengths_q", "lengths_k"):  # those two stay on the CPU
                object.__setattr__(part, name, value.to("meta"))
    return mask


@pytest.mark.parametrize("name", MASKS)
def test_no_value_is_read_on_the_way_to_the_launches(name):
    q, k, v = (torch.empty(B, H, S, D, dtype=torch.bfloat16, device="meta") for _ in range(3))
    mask = None if MASKS[name] is None else on_meta(MASKS[name])
    spec = AttentionSpec.from_tensors(q, k, v, mask=mask, alibi_slopes=torch.empty(H, device="meta"))
    options = KernelOptions.from_spec(spec)
    launch, out, lse = forward_launch(q, k, v, options)
    launches, _ = backward_launches(q, k, v, out, lse, torch.empty_like(out), torch.empty_like(lse), options)
    assert {x.name for x in (launch, *launches)} >= {
        "attention_forward",
        "backward_delta",
        "backward_dkdv",
        "backward_dq",
    }
