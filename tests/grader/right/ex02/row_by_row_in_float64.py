import math

import torch


def update(m, l, acc, scores, v):
    state = [one_row(float(m[i]), float(l[i]), acc[i].double(), scores[i].double(), v.double()) for i in range(len(m))]
    maxima, sums, accs = zip(*state, strict=True)
    return torch.tensor(maxima), torch.tensor(sums), torch.stack(accs).float()


def one_row(m, l, acc, scores, v):
    for score, value in zip(scores.tolist(), v, strict=True):
        if score == -math.inf:
            continue
        if score > m:
            l, acc, m = l * math.exp(m - score), acc * math.exp(m - score), score
        weight = math.exp(score - m)
        l, acc = l + weight, acc + weight * value
    return m, l, acc


def online_attention(scores, v, block):
    out = torch.empty(scores.shape[0], v.shape[1])
    lse = torch.empty(scores.shape[0])
    for i, row in enumerate(scores):
        m, l, acc = -math.inf, 0.0, torch.zeros(v.shape[1], dtype=torch.float64)
        for start in range(0, len(row), block):
            s, values = row[start : start + block].double(), v[start : start + block].double()
            new = max(m, float(s.max()))
            if new == -math.inf:
                continue
            factor = math.exp(m - new)
            l, acc, m = l * factor + float((s - new).exp().sum()), acc * factor + (s - new).exp() @ values, new
        out[i] = acc / l if l > 0 else acc
        lse[i] = m + math.log(l) if l > 0 else -math.inf
    return out, lse


def merge(out_a, lse_a, out_b, lse_b):
    share = torch.sigmoid(lse_b.double() - lse_a.double())[..., None]  # NaN where both are empty
    a, b = lse_a[..., None] == -math.inf, lse_b[..., None] == -math.inf
    out = torch.where(a, 0.0, out_a.double()) * (1 - share) + torch.where(b, 0.0, out_b.double()) * share
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    return torch.where(a & b, 0.0, out).float(), lse.float()


def fold(outs, lses):
    wide = lses.double()
    if not len(wide):
        return torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -math.inf)
    pivot = wide.max(dim=0).values.clamp(min=-1e30)
    weights = (wide - pivot).exp()
    total = weights.sum(0)
    values = outs.double().where(weights[..., None] > 0, torch.zeros((), dtype=torch.float64))
    out = (weights[..., None] * values).sum(0) / total.clamp(min=1e-300)[..., None]
    return out.float(), (pivot + total.log()).float()
