"Attentions as people write them"
import math

import torch
import torch.nn.functional as F
from torch import nn

fused = F.scaled_dot_product_attention


def by_hand(q, k, v, attn_mask=None):
    a = q@k.transpose(-2, -1)/math.sqrt(q.shape[-1])
    return (a if attn_mask is None else a + attn_mask).softmax(-1)@v


def einsum(q, k, v):
    a = torch.einsum('bhid,bhjd->bhij', q, k)*q.shape[-1]**-.5
    return torch.einsum('bhij,bhjd->bhid', a.softmax(-1), v)


def batches_of_heads(q, k, v): # one axis for samples and heads
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2))*q.shape[-1]**-.5).softmax(-1), v).view(2, -1, *v.shape[1:])


def three_axes(q, k, v): # the same, and the operation of torch
    return fused(*(t.reshape(-1, *t.shape[2:]) for t in (q, k, v))).view(2, -1, *v.shape[2:])


def padded(q, k, v): # to a width that a kernel likes
    return fused(*(F.pad(t, (0, 3)) for t in (q, k, v)), scale=.5)[..., :v.shape[-1]]


def in_steps(q, k, v): # as torch does it without a kernel
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH): return fused(q, k, v, is_causal=True)


def linear_attention(q, k, v): return q.softmax(-1)@(k.softmax(-2).transpose(-2, -1)@v)


def causal(q, k, v):
    a = (q@k.transpose(-2, -1)*q.shape[-1]**-.5).masked_fill(torch.ones(q.shape[-2], q.shape[-2]).tril() == 0, -math.inf)
    return F.dropout(a.softmax(-1), .1, training=False)@v


def rotary(x):
    a, b = x.chunk(2, -1)
    angle = torch.arange(x.shape[-2])[:, None]/torch.tensor([1., 10.])
    cos, sin = (t.repeat(1, 2) for t in (angle.cos(), angle.sin()))
    return x*cos + torch.cat([-b, a], -1)*sin


class RMS(nn.Module):
    def __init__(self, d): super().__init__(); self.weight = nn.Parameter(torch.rand(d) + .5)
    def forward(self, x): return x*(x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()*self.weight


class Packed(nn.Module):
    "One Linear for queries, keys and values; `out`: what the forward is written with at the end"
    def __init__(self, d=16, heads=4, attn=fused, norm=None, out='width', bias=True, drop=0.):
        super().__init__()
        self.num_heads, self.head_dim, self.dim, self.attn_dim, self.window_size = heads, 4, d, heads*4, heads*4
        self.qkv, self.proj, self.attn, self.out, self.drop = nn.Linear(d, 12*heads, bias=bias), nn.Linear(4*heads, d), attn, out, drop
        self.q_norm, self.k_norm = (norm(4), norm(4)) if norm else (nn.Identity(), nn.Identity())

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        more = {'dropout_p': self.drop if self.training else 0.} if self.drop else {}
        x = self.attn(self.q_norm(q), self.k_norm(k), v, **more).transpose(1, 2)
        return self.proj(x.reshape(B, N, {'width': self.attn_dim, 'input': C, 'dim': self.dim, 'free': -1}[self.out]))

    def rows(self): return [(self.qkv, i*4*self.num_heads, 4) for i in range(3)]


class Scaled(Packed):
    "A buffer that scales each place of a head"
    def __init__(self, attn=fused):
        super().__init__()
        self.per, self.attn = nn.Buffer(torch.rand(4) + .5), lambda q, k, v: attn(q*self.per, k, v*self.per)


class Separate(nn.Module):
    "Three Linears, of which keys and values may have fewer heads"
    def __init__(self, d=16, heads=4, kv=None, attn=fused, count=True, turn=False, repeat=True, bias=True, **kw):
        super().__init__()
        kv = kv or heads
        self.n_heads, self.n_kv_heads, self.head_dim, self.groups, self.kw = heads, kv, 4, heads//kv, kw
        self.q, self.k, self.v = (nn.Linear(d, n*4, bias=bias) for n in (heads, kv, kv))
        self.o, self.attn, self.count, self.turn, self.repeat = nn.Linear(heads*4, d), attn, count, turn, repeat

    def forward(self, x, mask=None):
        B, N, _ = x.shape
        cut = lambda y, n: y.view(B, N, n if self.count else -1, self.head_dim).transpose(1, 2)  # noqa: E731
        q, k, v = cut(self.q(x), self.n_heads), cut(self.k(x), self.n_kv_heads), cut(self.v(x), self.n_kv_heads)
        if self.turn: q, k = rotary(q), rotary(k)
        more = self.kw if mask is None else {'attn_mask': mask}
        if self.groups > 1 and not self.repeat: more = more | {'enable_gqa': True}
        elif self.groups > 1:
            k, v = (t[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(B, -1, N, self.head_dim) for t in (k, v))
        return self.o(self.attn(q, k, v, **more).transpose(1, 2).reshape(B, N, -1))

    def rows(self): return [(self.q, 0, 4*self.groups), (self.k, 0, 4), (self.v, 0, 4)]


class BertSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 4, 16
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def heads(self, x): return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x):
        y = by_hand(self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x)))
        y = y.permute(0, 2, 1, 3).contiguous()
        return y.view(*y.shape[:-2], self.all_head_size)


class Bert(nn.Module):
    def __init__(self): super().__init__(); self.self, self.output = BertSelf(), nn.ModuleDict({'dense': nn.Linear(16, 16), 'LayerNorm': nn.LayerNorm(16)})
    def forward(self, x): return self.output.LayerNorm(self.output.dense(self.self(x)) + x)
    def rows(self): return [(m, 0, 4) for m in (self.self.query, self.self.key, self.self.value)]


class Conv1D(nn.Module):
    "The transposed Linear of GPT-2"
    def __init__(self, nf, nx): super().__init__(); self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)*.3), nn.Parameter(torch.randn(nf))
    def forward(self, x): return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class GPT2(nn.Module):
    def __init__(self): super().__init__(); self.embed_dim, self.split_size, self.head_dim, self.c_attn, self.c_proj = 16, 16, 4, Conv1D(48, 16), Conv1D(16, 16)

    def forward(self, x):
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(self.split_size, dim=2))
        return self.c_proj(fused(q, k, v, is_causal=True).transpose(1, 2).reshape(*x.shape[:-1], -1))


class NanoGPT(nn.Module):
    "Takes the width of a head from that of the input"
    def __init__(self): super().__init__(); self.n_head, self.n_embd, self.c_attn, self.c_proj = 4, 16, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C//self.n_head).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
        return self.c_proj(fused(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C))

    def rows(self): return [(self.c_attn, i*16, 4) for i in range(3)]


class Relative(Separate):
    "With a table of relative positions, a column for each head"
    def __init__(self): super().__init__(attn=by_hand); self.table = nn.Embedding(9, 4)

    def forward(self, x):
        at = torch.arange(x.shape[1])
        return super().forward(x, self.table(at[:, None] - at[None] + 4).permute(2, 0, 1)[None])


class Llama(Separate):
    "Rotated by position, with frequencies in a buffer; grouped queries, or not"
    def __init__(self, kv=4, attn=fused):
        super().__init__(kv=kv, attn=attn, count=False, bias=False)
        self.register_buffer('inv_freq', torch.tensor([1., .1]))
        self.table = nn.Buffer(torch.rand(5, 4))

    def forward(self, x):
        at = torch.arange(x.shape[1]).float()
        freq = (self.inv_freq[None, :, None]@at[None, None]).transpose(1, 2)
        cos, sin = (f(torch.cat([freq, freq], -1))[:, None] for f in (torch.cos, torch.sin))
        heads = lambda y: y.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # noqa: E731
        half = lambda y: torch.cat([-y[..., 2:], y[..., :2]], -1)  # noqa: E731
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        q, k = q*cos + half(q)*sin, k*cos + half(k)*sin
        q = torch.cat([q[:, :, :1], q[:, :, 1:]*self.table[1:]], 2) # the first token is left as it is
        k, v = (t[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(len(x), -1, *t.shape[2:]) for t in (k, v))
        return self.o(self.attn(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))


class ViT(nn.Module):
    "Patches, a class token, positions, two blocks and a head"
    def __init__(self, attn=fused):
        super().__init__()
        self.patch, self.cls, self.pos = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(norm1=nn.LayerNorm(16), attn=Packed(attn=attn), norm2=nn.LayerNorm(16),
                                                       mlp=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for b in self.blocks:
            x = x + b.attn(b.norm1(x))
            x = x + b.mlp(b.norm2(x))
        return self.head(self.norm(x)[:, 0])


@torch.no_grad()
def behead(m, *heads):
    "Zero these heads of an attention"
    for layer, at, width in m.rows():
        for h in heads:
            for p in layer.parameters(): p[at + h*width:at + (h+1)*width] = 0
    return m
