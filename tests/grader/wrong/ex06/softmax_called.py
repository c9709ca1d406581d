# diagnosis: softmax-called
import torch


def ragged_softmax(x, lengths):
    beyond = torch.arange(x.shape[1]) >= lengths[:, None]
    return torch.softmax(x.masked_fill(beyond, -torch.inf), -1).masked_fill(beyond, 0.0).nan_to_num(nan=0.0)


def packed_softmax(values, cu_seqlens, max_seqlen):
    rows = values.split(cu_seqlens.diff().tolist())
    return torch.cat([torch.softmax(row, 0) for row in rows])
