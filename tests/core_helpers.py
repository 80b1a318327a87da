"Small layers, small models, and slow but obvious versions of what the package does fast"
from functools import lru_cache
from itertools import product

import torch
from torch import nn

from fastsparse.criteria import available_criteria

LAYERS = {
    'Conv1d': lambda: nn.Conv1d(4, 6, 3), 'Conv1d grouped': lambda: nn.Conv1d(4, 6, 3, groups=2), 'Conv1d depthwise': lambda: nn.Conv1d(4, 4, 3, groups=4),
    'Conv2d': lambda: nn.Conv2d(4, 6, (3, 2)), 'Conv2d grouped': lambda: nn.Conv2d(4, 6, (3, 2), groups=2), 'Conv2d depthwise': lambda: nn.Conv2d(4, 8, 3, groups=4),
    'Conv3d': lambda: nn.Conv3d(2, 4, (2, 3, 1)), 'Conv3d grouped': lambda: nn.Conv3d(4, 4, 2, groups=2), 'Conv3d depthwise': lambda: nn.Conv3d(3, 3, 2, groups=3),
    'ConvTranspose1d': lambda: nn.ConvTranspose1d(4, 6, 3), 'ConvTranspose1d grouped': lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    'ConvTranspose1d depthwise': lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
    'ConvTranspose2d': lambda: nn.ConvTranspose2d(4, 6, (3, 2)), 'ConvTranspose2d grouped': lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
    'ConvTranspose2d depthwise': lambda: nn.ConvTranspose2d(4, 8, 3, groups=4),
    'ConvTranspose3d': lambda: nn.ConvTranspose3d(2, 4, (2, 3, 1)), 'ConvTranspose3d grouped': lambda: nn.ConvTranspose3d(4, 4, 2, groups=2),
    'ConvTranspose3d depthwise': lambda: nn.ConvTranspose3d(3, 3, 2, groups=3),
    'Linear': lambda: nn.Linear(6, 5),
}

# What a group keeps: O the output, I the input, d h w the place in the kernel (only w for one dimension)
KEPT = {
    2: dict(weight='OIhw', kernel='OI', filter='O', row='OIh', column='OIw', channel='Ohw', vertical_slice='Ow', horizontal_slice='Oh', shared_weight='Ihw',
        shared_kernel='I',
            shared_row='Ih', shared_column='Iw', shared_channel='hw', shared_vertical_slice='w', shared_horizontal_slice='h', layer=''),
    1: dict(weight='OIw', kernel='OI', filter='O', channel='Ow', shared_weight='Iw', shared_kernel='I', shared_channel='w', layer=''),
    3: dict(weight='OIdhw', kernel='OI', filter='O', row='OIdh', column='OIdw', channel='Odhw', vertical_slice='Odw', horizontal_slice='Odh', shared_weight='Idhw',
            shared_kernel='I', shared_row='Idh', shared_column='Idw', shared_channel='dhw', shared_vertical_slice='dw', shared_horizontal_slice='dh', layer=''),
    0: dict(weight='OI', row='O', column='I', layer=''),
}
EACH = [(kind, name) for kind, make in LAYERS.items() for name in KEPT[make().weight.dim() - 2]]
PERCENTS = (0, 1, 10, 50, 70, 90, 99, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(None)
def _places(shape, transposed, groups, kept):
    "The group of each weight, counted in the order of the axes"
    keys = []
    for place in product(*map(range, shape)):
        if transposed: of = dict(I=place[0], O=place[0]//(shape[0]//groups)*shape[1] + place[1])
        else: of = dict(O=place[0], I=place[0]//(shape[0]//groups)*shape[1] + place[1])
        of |= dict(zip('dhw'[3-len(place[2:]):], place[2:], strict=True))
        keys.append(tuple(of[a] for a in ('IO' if transposed else 'OI')+'dhw' if a in kept))
    number = {k: i for i, k in enumerate(sorted(set(keys)))}
    return torch.tensor([number[k] for k in keys]).view(shape)


def naive_groups(layer, granularity):
    "A tensor of the weight's shape with the number of each weight's group"
    rank = layer.weight.dim() - 2
    return _places(tuple(layer.weight.shape), 'Transpose' in type(layer).__name__, getattr(layer, 'groups', 1), KEPT[rank][granularity])


def naive_mask(scores, groups, k, rows=1):
    "Lose the `k` groups with the lowest sums, by a stable sort; from each of `rows` equal parts of them as many, or one more"
    sums = [0.]*(int(groups.max())+1)
    for s, g in zip(scores.flatten().tolist(), groups.flatten().tolist(), strict=True): sums[g] += s
    each = len(sums)//rows
    better = lambda g: sum(sums[o] > sums[g] or (sums[o] == sums[g] and o > g) for o in range(g//each*each, (g//each+1)*each)) # noqa: E731
    lost = sorted(range(len(sums)), key=lambda g: (-better(g) if rows > 1 else 0, sums[g]))[:k]
    return torch.tensor([g not in set(lost) for g in groups.flatten().tolist()]).view(groups.shape)


def nearest(percent, n, size, floor):
    "The least that one can be off with whole groups of `size` weights, at most n - floor of them"
    return min(abs(k*size - percent*n*size/100) for k in range(n-floor+1))


def fill(layer, values=None):
    "Small whole numbers without zero, so that sums are exact in every dtype; or one value"
    with torch.no_grad():
        w = layer.weight
        w.copy_(torch.full(w.shape, float(values)) if values is not None else torch.randint(1, 8, w.shape)*(torch.randint(0, 2, w.shape)*2-1).float())
    return layer


def linear(*rows):
    "A Linear without bias that has these rows"
    w = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data.copy_(w)
    return layer


def rows(t): return t.detach().tolist()


def bits(t):
    "0 and 1 instead of False and True, to be read in tables"
    return t.int().tolist()


def small_net():
    "conv, BatchNorm, ReLU twice, and a head"
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4))


def zeros(model): return sum(int((p == 0).sum()) for p in model.parameters())


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CRITERIA = [n for n in available_criteria() if n != 'slimming'] # which asks for a BatchNorm behind each layer


def invent(s):
    "Give a Sparsifier made-up evidence of whatever its criterion reads; gives it back"
    from fastsparse.evidence import PASSES
    for kind in s._gathers:
        if kind in PASSES: s._memory[kind] = {n: torch.rand(t.weight.shape) for n, t in s.targets.items()}
    if s.reads_steps: s.gather_step({n: torch.randn_like(t.weight) for n, t in s.targets.items()})
    return s
