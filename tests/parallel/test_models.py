"""A language model on two ranks: trained with its sequences spread over them, and writing with its cache spread over them."""

import pytest
import torch
from parallel_ranks import batches, small_smollm2

from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.reference import naive_attention

STEPS = 20


def losses_alone(dtype: torch.dtype, *, swapped: bool = False) -> torch.Tensor:
    """Of one rank, with naive attention. ``swapped``: the sequences of a batch in the other order, which redraws every rounding error."""
    model = small_smollm2(dtype)
    set_attention(model, naive_attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    losses = []
    for ids in batches(STEPS):
        ids = ids.flip(0) if swapped else ids
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def test_training_under_fsdp_has_the_losses_of_one_rank(two_ranks):
    """Against training in float64, with naive attention in float32 as the measure: at most twice its worst distance over the steps, and one rounding."""
    exact = losses_alone(torch.float64)
    assert exact[-1] < exact[0] - 0.3, f"it learns: {exact}"
    naive = max((losses_alone(torch.float32, swapped=swapped) - exact).abs().max() for swapped in (False, True))
    budget = 2 * naive + torch.finfo(torch.float32).eps * exact.abs().max()
    for found in two_ranks.run("parallel_ranks:trained", STEPS, "zigzag"):
        error = (torch.tensor(found, dtype=torch.float64) - exact).abs().max()
        assert len(found) == STEPS and error <= budget, f"{error} of {budget}"


@pytest.mark.weights
def test_smollm2_writes_the_same_with_its_cache_on_two_ranks(two_ranks):
    from flashlib.course.models import load_smollm2

    prompt, tokens = "The capital of France is", 12
    model, tokenizer = load_smollm2()
    set_attention(model)
    cache = FlashlibCache(capacity=64)
    expected = model.generate(
        **tokenizer(prompt, return_tensors="pt"), past_key_values=cache, max_new_tokens=tokens, do_sample=False
    )
    for ids, nbytes in two_ranks.run("parallel_ranks:generated", prompt, tokens):
        assert ids == expected[0].tolist() and nbytes == cache.nbytes // 2
