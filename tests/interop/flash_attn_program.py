"""A small program as people write it for flash_attn: train a language model on sequences of different lengths, without padding.

Its test runs it with ``from flash_attn`` replaced by ``from flashlib.interop.flash_attn``, and nothing else changed. It runs as
it stands where flash_attn and a GPU are.
"""

import argparse

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from torch import nn

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 16, 64, 4, 2, 16


class Block(nn.Module):
    """Pre-norm attention and MLP on packed tokens ``[total, WIDTH]``; with ``window``, over the nearest keys only."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def project(self, x):
        qkv = self.qkv(self.norms[0](x)).view(*x.shape[:-1], -1, HEAD_DIM)
        return qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=-2)

    def finish(self, x, attended):
        x = x + self.out(attended.reshape(*x.shape[:-1], -1))
        return x + self.mlp(self.norms[1](x))

    def forward(self, x, cu_seqlens, max_seqlen):
        attended = flash_attn_varlen_func(
            *self.project(x),
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout_p=0.0,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            window_size=self.window,
            deterministic=True,
        )
        return self.finish(x, attended)

    def forward_one(self, x):
        """The same for one sequence ``[1, seqlen, WIDTH]``."""
        return self.finish(x, flash_attn_func(*self.project(x), causal=True, window_size=self.window))


class Model(nn.Module):
    def __init__(self, longest):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(longest, WIDTH)
        self.blocks = nn.ModuleList([Block((-1, -1)), Block((8, 0))])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))

    def forward(self, ids, attention_mask):
        batch, seqlen = ids.shape
        x, indices, cu_seqlens, max_seqlen, *_ = unpad_input(self.embed(ids), attention_mask)
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen)
        return pad_input(self.head(x), indices, batch, seqlen)

    def forward_one(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block.forward_one(x)
        return self.head(x)


def random_batch(batch, longest, device):
    """Sequences that count upwards from a random start, of random lengths, padded on the right."""
    ids = (torch.randint(VOCABULARY, (batch, 1)) + torch.arange(longest)) % VOCABULARY
    lengths = torch.randint(2, longest + 1, (batch, 1))
    return ids.to(device), (torch.arange(longest) < lengths).to(device)


def train(model, steps, batch, longest, device):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        ids, attention_mask = random_batch(batch, longest, device)
        logits = model(ids, attention_mask)[:, :-1].flatten(0, 1)
        targets, wanted = ids[:, 1:].flatten(), attention_mask[:, 1:].flatten().nonzero().flatten()
        loss = F.cross_entropy(index_first_axis(logits, wanted).float(), targets[wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_difference(model, batch, longest, device):
    """Between the logits of a packed batch and those of each sequence by itself."""
    ids, attention_mask = random_batch(batch, longest, device)
    with torch.no_grad():
        together = model(ids, attention_mask)
        worst = 0.0
        for row, real in zip(range(batch), attention_mask.sum(1).tolist(), strict=True):
            alone = model.forward_one(ids[row : row + 1, :real])
            worst = max(worst, (together[row, :real] - alone[0]).abs().max().item())
        assert not together[~attention_mask].any(), "padding must come back as zeros"
    return worst


def cross_attention_lse(device, dtype):
    """LSE of 2 + 3 queries on 4 + 0 keys, ``[HEADS, 5]``: three queries find no key."""
    q, kv = (
        torch.randn(5, HEADS, HEAD_DIM, device=device, dtype=dtype),
        torch.randn(4, HEADS, HEAD_DIM, device=device, dtype=dtype),
    )
    ends = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2, 5], [0, 4, 4])]
    out, lse, _ = flash_attn_varlen_func(q, kv, kv, *ends, 3, 4, return_attn_probs=True)
    assert not out[2:].any()
    qkv = torch.stack((q, q, q), dim=1)
    assert flash_attn_varlen_qkvpacked_func(qkv, ends[0], 3).shape == q.shape
    return lse


def slopes(*shape, device):
    """ALiBi's for HEADS heads, ``[*shape, HEADS]``."""
    return (2.0 ** -torch.arange(1, HEADS + 1, device=device, dtype=torch.float32)).expand(*shape, HEADS).contiguous()


def serve(device, dtype):
    """A step of a server: a prompt in part, a token, three tokens to be verified; keys of all in pages of 256, or packed.

    Returns the largest difference between the two, and the LSE ``[HEADS, 9]`` of the packed ones with ALiBi.
    """
    lengths_q, lengths_k, page = [5, 1, 3], [300, 17, 256], 256
    q = torch.randn(sum(lengths_q), HEADS, HEAD_DIM, device=device, dtype=dtype)
    k, v = torch.randn(2, sum(lengths_k), KV_HEADS, HEAD_DIM, device=device, dtype=dtype).unbind()
    ends_q, ends_k = (
        F.pad(torch.tensor(lengths), (1, 0)).cumsum(0).to(device, torch.int32) for lengths in (lengths_q, lengths_k)
    )
    block_table = torch.tensor([[4, 1], [0, 0], [2, 0]], device=device, dtype=torch.int32)
    k_pages, v_pages = torch.zeros(2, 5, page, KV_HEADS, HEAD_DIM, device=device, dtype=dtype).unbind()
    for tokens, pages in ((k, k_pages), (v, v_pages)):
        for row, part in zip(block_table, tokens.split(lengths_k), strict=True):
            for number, chunk in zip(row, part.split(page), strict=False):
                pages[number, : len(chunk)] = chunk
    worst = 0.0
    for options in ({}, {"window_size": (100, 0)}, {"alibi_slopes": slopes(3, device=device)}):
        lengths = (ends_q, ends_k, max(lengths_q), max(lengths_k))
        packed, lse, _ = flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True, **options)
        paged = flash_attn_varlen_func(q, k_pages, v_pages, *lengths, causal=True, **options, block_table=block_table)
        worst = max(worst, (packed - paged).abs().max().item())
    # Queries and keys are not the same tokens, and the gradient knows it too.
    q.requires_grad_()
    flash_attn_varlen_func(q, k, v, *lengths, causal=True, alibi_slopes=slopes(device=device)).sum().backward()
    assert q.grad.isfinite().all()
    return worst, lse


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(torch.seed() % 2**32)
    longest = 24
    model = Model(longest).to(options.device, dtype)
    losses = train(model, options.steps, 8, longest, options.device)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"difference {largest_difference(model, 6, longest, options.device):.2e}")
    print(f"lse {tuple(cross_attention_lse(options.device, dtype).shape)}")
    worst, lse = serve(options.device, dtype)
    print(f"serving {worst:.2e} {tuple(lse.shape)}")


if __name__ == "__main__":
    main()
