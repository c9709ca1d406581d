"""Indices of every integer dtype, as programs pass them: transformers makes int32 ones at a step of one token."""

import pytest
import torch

from flashlib.interop.flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices(dtype, rng):
    x = torch.randn(7, 2, 3, requires_grad=True)
    places = rng.sample(range(7), 4)
    indices = torch.tensor(places, dtype=dtype)
    assert torch.equal(index_first_axis(x, indices), x[places])
    put = index_put_first_axis(x[:4], indices, 7)
    expected = torch.zeros(7, 2, 3)
    expected[places] = x[:4].detach()
    assert torch.equal(put, expected)
    grad = torch.randn_like(put)
    (gradient,) = torch.autograd.grad(put, x, grad)
    assert torch.equal(gradient[:4], grad[places]) and not gradient[4:].any()
    with pytest.raises(ValueError, match="indices must be at least 0 and below 3"):
        index_put_first_axis(x[:4], indices.fill_(3), 3)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("mask_dtype", [*INTEGERS, torch.bool, torch.float16, torch.float32])
def test_there_and_back(dtype, mask_dtype):
    x = torch.randn(3, 5, 2)
    mask = (torch.rand(3, 5) < 0.6).to(mask_dtype)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(pad_input(packed, indices.to(dtype), 3, 5), x * (mask != 0)[..., None])
    assert cu_seqlens[-1] == len(packed) and longest == int(used.max())
