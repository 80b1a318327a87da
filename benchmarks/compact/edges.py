"""Small modules of which half of the channels are dead: what a tool has to know to leave the outputs as they are"""
import torch
import torch.nn.functional as F
from torch import nn
from zoo import NORMS, settle, stir

class Forward(nn.Module):
    "Modules, and a forward that is a function of them and the input"
    def __init__(self, forward, **modules):
        super().__init__()
        for n,m in modules.items(): setattr(self, n, m)
        self._run = forward
    def forward(self, x): return self._run(self, x)

def first(n): return torch.arange(n//2)
def every_other(n): return torch.arange(0, n, 2)

@torch.no_grad()
def kill(modules, which=first, norms=True):
    "Zero half of the outputs of each layer, with its bias and its norm"
    for m in (k for top in modules for k in top.modules()):
        layer = isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding))
        if not (layer or norms and isinstance(m, NORMS)) or m.weight is None: continue
        axis = int(getattr(m, 'transposed', False) or isinstance(m, nn.Embedding))
        m.weight.index_fill_(axis, dead := which(m.weight.shape[axis]), 0.)
        if getattr(m, 'bias', None) is not None: m.bias.index_fill_(0, dead, 0.)

def conv(i=3, o=8, k=3, **kw): return nn.Conv2d(i, o, k, padding=k//2, **kw)
def seq(*layers): return nn.Sequential(*layers)

def written(m, x):
    y = m.a(x)
    y[:, :4] += 1
    return m.b(y)

def gated(m, x):
    a,b = m.a(x).chunk(2, 1)
    return m.b(a*b.sigmoid())

def scaled(m, x):
    q,k = m.q(x),m.k(x)
    return (q@k.transpose(1, 2))*q.shape[-1]**-.5

def squeezed(m, x):
    y = m.a(x)
    return m.b(y*m.e(m.s(y.mean((2, 3), keepdim=True)).relu()).sigmoid())

def tied():
    m = Forward(lambda m, x: m.b(m.a(x).relu() + m.c(x.flip(3)).relu()), a=conv(), c=conv(), b=conv(8, 2))
    m.c.weight = m.a.weight
    return m

def normed():
    m = seq(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU(), conv(8, 2))
    with torch.no_grad(): m[0].parametrizations.weight.original0[:4] = m[0].bias[:4] = 0
    return m

def transposed(): return Forward(lambda m, x: F.linear(m.a(x.mean((2, 3))), m.a.weight.t()), a=nn.Linear(3, 8))
def transformer(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1, enable_nested_tensor=False)
def recurrent(): return Forward(lambda m, x: m.b(m.l(m.a(x))[0]), a=nn.Linear(6, 8), l=nn.LSTM(8, 8, batch_first=True), b=nn.Linear(8, 2))
def frozen(): return seq(conv(), nn.ReLU(), conv(8, 2)).requires_grad_(False)

def hooked():
    m = seq(conv(), nn.ReLU(), conv(8, 2))
    m[0].register_forward_hook(lambda m, a, o: o + 1)
    return m

def random_image(): return torch.randn(2, 3, 16, 16)
def tensor_image():
    from fastai.vision.all import TensorImage
    return TensorImage(random_image())

CASES = { # name to a function that makes the model, the last child of which gives the outputs
    'sigmoid behind the dead convolution': lambda: seq(conv(), nn.Sigmoid(), conv(8, 2)),
    'norm that makes dead channels constant, padding': lambda: seq(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)),
    'softmax over channels': lambda: seq(conv(), nn.Softmax(1), conv(8, 2)),
    'in-place write on a slice': lambda: Forward(written, a=conv(), b=conv(8, 2)),
    'attention scaled by its width': lambda: Forward(scaled, q=nn.Linear(6, 8), k=nn.Linear(6, 8)),
    'hook that adds 1': hooked,
    'tied weights': tied,
    'weight_norm': normed,
    '`[:, :3]`': lambda: Forward(lambda m, x: m.b(m.a(x)[:, :3]), a=conv(), b=conv(3, 2)),
    'a buffer per channel': lambda: Forward(lambda m, x: m.b(m.a(x)*m.s), a=conv(), b=conv(8, 2), s=nn.Buffer(torch.rand(8, 1, 1))),
    '`arange(C)` as a constant': lambda: Forward(lambda m, x: m.b(m.a(x) + torch.arange(8.).view(8, 1, 1)), a=conv(), b=conv(8, 2)),
    '`view(n, 8*16*16)` written out': lambda: Forward(lambda m, x: m.b(m.c(m.a(x).relu()).view(-1, 8*16*16)), a=conv(), c=conv(8, 8), b=nn.Linear(2048, 2)),
    'decoder that uses `W.t()`': transposed,
    'a free parameter as gate': lambda: Forward(lambda m, x: m.b(m.a(x)*m.g), g=nn.Parameter(torch.rand(8, 1, 1)), a=conv(), b=conv(8, 2)),
    'grouped convolution': lambda: seq(conv(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 2)),
    'channel shuffle': lambda: seq(conv(3, 8, 1), nn.ChannelShuffle(2), conv(8, 8, groups=8, bias=False), conv(8, 2, 1)),
    'depthwise convolution': lambda: seq(conv(), conv(8, 8, groups=8, bias=False), nn.ReLU(), conv(8, 2)),
    'depth multiplier': lambda: seq(conv(), conv(8, 16, groups=8, bias=False), nn.ReLU(), conv(16, 2)),
    'flatten into Linear and BatchNorm1d': lambda: seq(conv(), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(2048), nn.Linear(2048, 2)),
    'PReLU': lambda: seq(conv(), nn.PReLU(8), conv(8, 2)),
    'transposed convolution': lambda: seq(conv(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), conv(6, 2)),
    'pixel shuffle': lambda: seq(conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2)),
    'shared module': lambda: Forward(lambda m, x: m.b(m.c(m.c(m.a(x)))), a=conv(), c=conv(8, 8), b=conv(8, 2)),
    'chunk': lambda: Forward(gated, a=conv(3, 16), b=conv(8, 2)),
    'squeeze and excitation': lambda: Forward(squeezed, a=conv(), s=conv(8, 4, 1), e=conv(4, 8, 1), b=conv(8, 2)),
    'concatenation with the input': lambda: Forward(lambda m, x: m.b(torch.cat([m.a(x), x, m.c(x)], 1)), a=conv(), c=conv(3, 4), b=conv(15, 2)),
    'two heads': lambda: Forward(lambda m, x: (lambda y: [m.b(y), {'c': m.c(y)}])(m.a(x)), a=conv(), b=conv(8, 2), c=conv(8, 3)),
    'parameters that the forward does not use': lambda: Forward(lambda m, x: m.b(m.a(x)), a=conv(), aux=conv(8, 4), b=conv(8, 2)),
    'Embedding': lambda: seq(nn.Embedding(10, 8), nn.Linear(8, 2)),
    'TransformerEncoderLayer': transformer,
    'GroupNorm': lambda: seq(conv(), nn.GroupNorm(2, 8), conv(8, 2)),
    'LayerNorm': lambda: seq(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
    'LSTM': recurrent,
    'a frozen model': frozen,
    "fastai's TensorImage as example": lambda: seq(conv(), nn.ReLU(), conv(8, 2)),
}
INPUTS = { # where it is not a random image
    'TransformerEncoderLayer': lambda: torch.randn(2, 5, 16), 'LayerNorm': lambda: torch.randn(2, 5, 6), 'LSTM': lambda: torch.randn(2, 4, 6),
    'attention scaled by its width': lambda: torch.randn(2, 5, 6),
    'Embedding': lambda: torch.randint(0, 10, (2, 5)), "fastai's TensorImage as example": tensor_image,
}
DEAD = { # which modules lose half of their channels, where it is not all but the last
    'weight_norm': lambda m: [], 'decoder that uses `W.t()`': lambda m: [m.a], 'attention scaled by its width': lambda m: [m.q, m.k],
    'two heads': lambda m: [m.a], 'parameters that the forward does not use': lambda m: [m.a],
    'TransformerEncoderLayer': lambda m: [m.layers[0].linear1], 'LSTM': lambda m: [m.a],
}

EVEN = ('grouped convolution','channel shuffle','chunk','`[:, :3]`') # of which not the first half dies, but every other channel

def make(name):
    "A model with dead channels, and a function that gives inputs"
    torch.manual_seed(0)
    inputs = INPUTS.get(name, random_image)
    model = settle(stir(CASES[name]()), inputs())
    dead = DEAD[name](model) if name in DEAD else list(model.children())[:-1]
    kill(dead, every_other if name in EVEN else first, norms='constant' not in name)
    return model,inputs
