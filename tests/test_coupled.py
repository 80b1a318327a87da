"Outputs that go together: found, chosen, kept zero, and cut out"
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from core_helpers import CRITERIA, invent
from fastai_helpers import Journal, fit, learner, net, quiet
from hypothesis import given, settings, strategies as st
from test_compact import Forward, equal, stir
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastsparse.learner  # noqa: F401 (learn.compact)

from fastsparse.callback import SparsifyCallback
from fastsparse.compact import compact
from fastsparse.flow import flow
from fastsparse.granularity import Coupled, as_granularity
from fastsparse.method import local
from fastsparse.plan import MACs, Params
from fastsparse.schedule import available_schedules
from fastsparse.sparsifier import Sparsifier, SparsityWarning

few = settings(deadline=None, derandomize=True, max_examples=40, database=None)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        yield


def conv(i=8, o=8, k=3, **kwargs): return nn.Conv2d(i, o, k, padding=k//2, **kwargs)


def residual(width=8, groups=1):
    "A stem, a branch that is added to it, and a head of four classes"
    run = lambda s, x: s.head((lambda y: (y + s.out(s.norm(s.up(y)).relu())).relu().mean((2, 3)))(s.stem(x)))  # noqa: E731
    return stir(Forward(run, stem=conv(3, width), up=conv(width, 2*width), norm=nn.BatchNorm2d(2*width), out=conv(2*width, width, groups=groups), head=nn.Linear(width, 4)))


image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def units(model, example=image, **kwargs): return {n: (u.groups.n, [(t.layer_name, e.shape[1]) for t, e in zip(u.parts, u.entries)]) for n, u in Sparsifier(model, 'coupled', example_input=example, **kwargs).units.items()}
def alive(layer): return (layer.weight != 0).flatten(1).any(1)


# which outputs go together

def test_what_is_added_goes_together_and_the_head_stays():
    s = Sparsifier(residual(), 'coupled', example_input=image)
    assert units(residual()) == {'stem.weight': (8, [('stem', 1), ('out', 1)]), 'up.weight': (16, [('up', 1)])}
    assert list(s.targets) == ['stem.weight', 'up.weight', 'out.weight'] and 'outputs of the model' in s.left_dense['head']


KINDS = {
    'concatenated': (lambda: Forward(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), c=conv(10, 2)), {'a.weight': (4, [('a', 1)]), 'b.weight': (6, [('b', 1)])}),
    'concatenated, then added': (lambda: Forward(lambda s, x: s.d(torch.cat([s.a(x), s.b(x)], 1) + s.c(x)), a=conv(3, 4), b=conv(3, 6), c=conv(3, 10), d=conv(10, 2)),
                                 {'a.weight': (4, [('a', 1), ('c', 1)]), 'b.weight': (6, [('b', 1), ('c', 1)])}),
    'depthwise': (lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 2)), {'0.weight': (8, [('0', 1), ('1', 1)])}),
    'depth multiplier': (lambda: nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), {'0.weight': (4, [('0', 1), ('1', 2)])}),
    'grouped': (lambda: nn.Sequential(conv(3, 8), conv(8, 12, groups=4), conv(12, 2)), {'0.weight': (2, [('0', 4)]), '1.weight': (3, [('1', 4)])}),
    'transposed': (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 2)), {'0.weight': (8, [('0', 1)]), '1.weight': (6, [('1', 1)])}),
    'pixel shuffle': (lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)), {'0.weight': (2, [('0', 4)])}),
    'flattened': (lambda: nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 6), nn.ReLU(), nn.Linear(6, 2)), {'0.weight': (4, [('0', 1)]), '2.weight': (6, [('2', 1)])}),
    'gated': (lambda: Forward(lambda s, x: s.c(F.silu(s.a(x))*s.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)), {'a.weight': (8, [('a', 1), ('b', 1)])}),
    'in halves': (lambda: Forward(lambda s, x: s.b(s.a(x).chunk(2, 1)[0]*s.a(x).chunk(2, 1)[1]), a=conv(3, 8), b=conv(4, 2)), {'a.weight': (4, [('a', 2)])}),
    'along tokens': (lambda: Forward(lambda s, x: s.c(s.b(s.a(x.mean(1)).transpose(1, 2)).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 2)), {'b.weight': (6, [('b', 1)])}),
    'used twice': (lambda: Forward(lambda s, x: s.b(s.a(s.stem(x).relu()) + s.a(s.stem(x))), stem=conv(3, 8), a=conv(8, 6), b=conv(6, 2)), {'stem.weight': (8, [('stem', 1)]), 'a.weight': (6, [('a', 1)])}),
}


@pytest.mark.parametrize('kind', KINDS)
def test_units_of_each_kind_and_what_is_pruned_can_be_cut(kind):
    make, expected = KINDS[kind]
    torch.manual_seed(0)
    model = stir(make())
    assert units(model) == expected
    s = Sparsifier(model, 'coupled', 'local', example_input=image)
    s.prune_model(50)
    assert s.sparsity() == 50 or kind == 'grouped'
    c = compact(model, image)
    gone = {k for u in s.units.values() for k in u.classes[~s._alive(u)[0]].tolist()}
    f = flow(stir(make()), image)
    assert equal(model, c.model, image) and c.weights[1] == f.params(gone) and c.macs[1] == f.macs(gone)
    assert not any(t.zeros for t in c.tensors), str(c)


def test_the_count_of_multiply_adds_is_that_of_torch():
    for make, _ in KINDS.values():
        model = stir(make())
        Sparsifier(model, 'coupled', 'local', example_input=image).prune_model(50)
        c = compact(model, image)
        for m, counted in zip((model, c.model), c.macs):
            with FlopCounterMode(display=False) as counter, torch.no_grad(): m(image)
            assert counter.get_total_flops() == 2*counted


# what stays

def test_partners_of_what_is_left_out_stay_and_are_told():
    s = Sparsifier(residual(), 'coupled', example_input=image, exclude='out')
    assert list(s.targets) == ['up.weight'] and s.left_dense['stem'] == 'its outputs go together with those of out, which is left dense'
    s = Sparsifier(residual(), 'coupled', example_input=image, layers=['stem', 'up'])
    assert list(s.targets) == ['up.weight'] and 'those of out' in str(s.report())
    with pytest.raises(ValueError, match="no coupled outputs to prune .stem: its outputs go together with those of out"): Sparsifier(residual(), 'coupled', example_input=image, layers='stem')


def test_frozen_partners():
    m = residual()
    m.out.weight.requires_grad_(False)
    s = Sparsifier(m, 'coupled', 'local', example_input=image, trainable_only=True)
    s.prune_model(50)
    assert alive(m.stem).all() and alive(m.out).all() and alive(m.up).sum() == 8
    m.up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match='unfreeze'): Sparsifier(m, 'coupled', example_input=image, trainable_only=True)


def test_an_embedding_that_is_added_keeps_its_channels():
    m = Forward(lambda s, x: s.b(s.e(x) + s.a(s.e2(x))), e=nn.Embedding(10, 6), e2=nn.Embedding(10, 4), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    with pytest.raises(ValueError, match='a: its outputs go together with those of e, which is left dense'): Sparsifier(m, 'coupled', example_input=torch.arange(6)[None])


def test_norms_over_all_channels_and_unknown_operations_keep_them():
    m = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    s = Sparsifier(m, 'coupled', example_input=torch.randn(3, 4))
    assert list(s.targets) == ['2.weight'] and 'its channels have to stay (native_layer_norm in 1' in s.left_dense['0']


def test_a_part_that_stays_is_told():
    m = Forward(lambda s, x: s.c(s.a(x)[..., :3]) + s.d(s.b(s.a(x)).relu()), a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(3, 2), d=nn.Linear(6, 2))
    s = Sparsifier(m, 'coupled', example_input=torch.randn(3, 4))
    assert list(s.targets) == ['b.weight'] and 'slice' in s.left_dense['a']


WRITTEN = {
    'a view': lambda: Forward(lambda s, x: s.h(s.f(s.b(s.a(x).relu()).relu().view(-1, 8*64)).relu()), a=conv(3, 6), b=conv(6, 8), f=nn.Linear(512, 6), h=nn.Linear(6, 4)),
    'pieces': lambda: Forward(lambda s, x: s.h(sum(s.b(s.a(x)).split(4, 1))), a=conv(3, 6), b=conv(6, 8), h=conv(4, 2)),
    'a recurrence': lambda: Forward(lambda s, x: s.h(s.r(s.b(s.a(x.mean(1)).relu()))[0]), a=nn.Linear(8, 6), b=nn.Linear(6, 8), r=nn.GRU(8, 5, batch_first=True), h=nn.Linear(5, 2)),
    'an attention': lambda: Forward(lambda s, x: s.h((lambda y: s.r(y, y, y)[0])(s.b(s.a(x.mean(1)).relu()))), a=nn.Linear(8, 6), b=nn.Linear(6, 8), r=nn.MultiheadAttention(8, 2, batch_first=True), h=nn.Linear(8, 2)),
}


class Tied(nn.Module):
    "The embedding is also the last layer, and so gives what that reads"
    def __init__(self): super().__init__(); self.e, self.a, self.b, self.o = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 10); self.o.weight = self.e.weight
    def forward(self, x): return self.o(self.b(self.a(self.e(x)).relu()).relu())


class Beside(nn.Module):
    "Something is added at each place that is the same for all channels"
    def __init__(self): super().__init__(); self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 2); self.register_buffer('at', torch.rand(1, 1, 8, 8)); self.register_buffer('one', torch.rand(1))
    def forward(self, x): return self.c((self.b((self.a(x) + self.one).relu()) + self.at).relu())


@pytest.mark.parametrize('make, example', [(Tied, torch.arange(6)[None]), (Beside, image)])
def test_what_would_not_be_zero_where_it_is_read_is_left_dense(make, example):
    torch.manual_seed(0)
    s = Sparsifier(make().eval(), 'coupled', 'local', example_input=example)
    assert list(s.units) == ['a.weight'] and 'pruned, they would not be zero where' in s.left_dense['b']


@pytest.mark.parametrize('kind', WRITTEN)
def test_what_could_be_pruned_but_never_cut_is_left_dense(kind):
    torch.manual_seed(0)
    m = stir(WRITTEN[kind]())
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    assert 'the smaller model fails' in s.left_dense['b'] and 'a.weight' in s.units
    s.prune_model(MACs(10))
    c = compact(m, image)
    dead = {k for u in s.units.values() for k in u.classes[~s._alive(u)[0]].tolist()}
    assert equal(m, c.model, image) and c.macs[1] == s._flow.macs(dead) and not any(t.zeros for t in c.tensors)


class Auxiliary(nn.Module):
    "A head and a branch that only training uses"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.aux, self.head = conv(3, 8), nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)), conv(3, 6), conv(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        y = F.dropout(self.a(x).relu(), .5, self.training)
        if not self.training: return self.head(self.b(y).relu().mean((2, 3)))
        return self.head((self.b(y) + self.d(self.c(x))).relu().mean((2, 3))), self.aux(y.mean((2, 3)))


def test_what_only_training_uses_is_followed_too():
    torch.manual_seed(0)
    m = stir(Auxiliary())
    assert units(m) == {'a.weight': (8, [('a', 1)]), 'b.0.weight': (8, [('b.0', 1), ('d', 1)]), 'c.weight': (6, [('c', 1)])}
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    s.prune_model(50)
    c = compact(m, image)
    assert equal(m, c.model, image) and not any(t.zeros for t in c.tensors) and c.model.c.out_channels == 3
    assert [tuple(o.shape) for o in c.model.train()(image)] == [(2, 4), (2, 4)]


def test_another_example_may_show_other_things():
    m = Forward(lambda s, x: s.o(s.a(x) if x.shape[-1] == 8 else s.b(x)), a=conv(3, 6), b=conv(3, 6), o=conv(6, 2))
    s = Sparsifier(m, 'coupled', example_input=image)
    assert list(s.targets) == ['a.weight'] and s.left_dense.keys() == {'b', 'o'}
    s.watch(image[..., :4])
    assert list(s.targets) == ['b.weight'] and s.left_dense.keys() == {'a', 'o'}


# exact, and together

@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('method', ['local', 'global'])
def test_every_criterion_and_method(criterion, method):
    torch.manual_seed(1)
    m = residual()
    s = invent(Sparsifier(m, 'coupled', method, criterion, example_input=image))
    for t in s.targets.values(): t.layer.weight.data.add_(torch.randn_like(t.weight)*.1)
    before = {n: k.clone() for n, k in s.masks.items()}
    for percent in (20, 50, 80):
        s.prune_model(percent)
        assert torch.equal(alive(m.stem), alive(m.out)) and not any((s.masks[n] & ~before[n]).any() for n in before)
        largest = max(u.groups.size for u in s.units.values())
        if method == 'global': assert abs(s.sparsity()*s.report().weights/100 - percent*s.report().weights/100) <= largest/2 + 1
        else: assert all(abs(int((~s._alive(u)).sum()) - percent*u.groups.n/100) <= .5 for u in s.units.values())
        before = {n: k.clone() for n, k in s.masks.items()}
    assert equal(m, compact(m, image).model, image)


def test_the_lowest_mean_over_all_layers_goes():
    m = residual()
    with torch.no_grad():
        for i in range(8): m.stem.weight[i] = 1 + i; m.out.weight[i] = 1. if i else 9.
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    s.prune_layer('out', 12.5)
    size, other = m.stem.weight[0].numel(), m.out.weight[0].numel()
    means = torch.tensor([(1 + i)*size + (1. if i else 9.)*other for i in range(8)])
    assert (~alive(m.stem)).nonzero().flatten().tolist() == (~alive(m.out)).nonzero().flatten().tolist() == [means.argmin().item()] and alive(m.up).all()


def test_one_ranking_compares_means_and_not_sums():
    m = nn.Sequential(conv(3, 4, 1), conv(4, 4), conv(4, 2))
    with torch.no_grad(): m[0].weight.fill_(.5); m[1].weight.fill_(.4) # groups of 3 and of 36 weights
    with torch.no_grad(): m[1].weight.mul_(1 + torch.rand_like(m[1].weight)*.01); m[0].weight.mul_(1 + torch.rand_like(m[0].weight)*.01)
    Sparsifier(m, 'coupled', 'global', example_input=image).prune_model(25)
    assert alive(m[0]).all() and alive(m[1]).sum() == 3


def test_reduce_sees_all_weights_of_a_group():
    m = residual()
    with torch.no_grad():
        m.stem.weight.uniform_(0, 1); m.out.weight.uniform_(0, 1)
        m.out.weight[3, 0, 0, 0] = 100
        m.stem.weight[3] = 0.01; m.out.weight[3, 1:] = 0.01
    for reduce, dies in ((torch.mean, True), (torch.amax, False)):
        small = copy.deepcopy(m)
        s = Sparsifier(small, Coupled(reduce), 'local', example_input=image)
        with torch.no_grad(): small.out.weight[3, 0, 0, 0] = 5. # mean stays small, the largest does not
        s.prune_layer('stem', 12.5)
        assert bool(alive(small.stem)[3]) != dies
    with pytest.raises(ValueError, match='cannot reduce'): Coupled(torch.sigmoid)


@pytest.mark.parametrize('method', ['local', 'global'])
def test_round_to_counts_outputs_of_each_layer(method):
    m = nn.Sequential(conv(3, 32), conv(32, 64, groups=4), nn.ReLU(), conv(64, 32), conv(32, 32, groups=32), conv(32, 2))
    Sparsifier(m, 'coupled', method, example_input=image).prune_model(40, round_to=8)
    for i in (0, 1, 3, 4): assert alive(m[i]).sum() % 8 == 0 and alive(m[i]).sum() >= 8
    if method == 'local': assert alive(m[1]).sum() == 40, 'two places of each of four channel groups at a time'
    assert len(set(alive(m[1]).view(4, 16).sum(1).tolist())) == 1
    with pytest.raises(ValueError, match='round_to=64 is larger'): Sparsifier(residual(), 'coupled', method, example_input=image).prune_model(40, round_to=64)


def test_selectors_and_their_percentages():
    m = residual()
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    s.prune_model({'stem': 25, 'up': 75})
    assert alive(m.out).sum() == alive(m.stem).sum() == 6 and alive(m.up).sum() == 4
    with pytest.raises(ValueError, match='head.*outputs of the model'): s.prune_model({'head': 50})
    with pytest.raises(ValueError, match='head.*outputs of the model'): s.prune_layer('head', 50)


def test_state_goes_on_elsewhere():
    m = residual()
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    s.prune_model(50)
    other = residual()
    t = Sparsifier(other, 'coupled', 'local', example_input=image)
    t.load_state_dict(s.state_dict())
    assert all(torch.equal(t.masks[n], k) for n, k in s.masks.items()) and t.sparsity() == s.sparsity() == 50
    before = {n: k.clone() for n, k in t.masks.items()}
    with t.trial(): t.prune_model(75)
    assert all(torch.equal(t.masks[n], k) for n, k in before.items()) and t.sparsity() == 50
    t.prune_model(75)
    assert all(not (t.masks[n] & ~k).any() for n, k in before.items())


def test_zeros_that_were_there_are_taken_over_by_whole_groups():
    m = residual()
    with torch.no_grad():
        for i in (1, 2): m.stem.weight[i] = 0; m.out.weight[i] = 0; m.out.bias[i] = 0; m.stem.bias[i] = 0
        m.out.weight[5] = 0 # alone: its partner is not zero
    s = Sparsifier(m, 'coupled', 'local', example_input=image)
    assert s._alive(s.units['stem.weight'])[0].tolist() == [True, False, False] + [True]*5
    s.prune_layer('stem', 25)
    assert (~alive(m.stem)).nonzero().flatten().tolist() == [1, 2]


@st.composite
def models(draw):
    "Convolutions that are chained, added, concatenated, grouped, with norms or without"
    width, blocks = draw(st.sampled_from([4, 6])), draw(st.lists(st.sampled_from(['plain', 'add', 'cat', 'depthwise', 'grouped', 'gate']), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers, channels = {'stem': conv(3, width)}, width
    for i, kind in enumerate(blocks):
        out = channels if kind in ('add', 'depthwise', 'gate') else width
        layers[f'c{i}'] = conv(channels, out, groups=channels if kind == 'depthwise' else 2 if kind == 'grouped' and channels % 2 == 0 else 1, bias=draw(st.booleans()))
        if draw(st.booleans()): layers[f'n{i}'] = nn.BatchNorm2d(out)
        if kind == 'cat': channels += out
        else: channels = out

    def run(s, x):
        x = s.stem(x)
        for i, kind in enumerate(blocks):
            y = getattr(s, f'c{i}')(x)
            if hasattr(s, f'n{i}'): y = getattr(s, f'n{i}')(y)
            x = x + y.relu() if kind == 'add' else torch.cat([x, y], 1) if kind == 'cat' else x*y.sigmoid() if kind == 'gate' else y.relu()
        return s.head(x.mean((2, 3)))
    return stir(Forward(run, **layers, head=nn.Linear(channels, 3)))


@few
@given(models(), st.sampled_from([30, 50, 80, MACs(40), Params(60)]), st.sampled_from(['local', 'global']))
def test_whatever_is_pruned_is_cut_and_the_outputs_are_equal(model, asked, method):
    dense = flow(model, image)
    s = Sparsifier(model, 'coupled', method, example_input=image)
    s.prune_model(asked)
    c = compact(model, image)
    assert equal(model, c.model, image) and not any(t.zeros for t in c.tensors)
    gone = {k for u in s.units.values() for k in u.classes[~s._alive(u)[0]].tolist()}
    assert c.weights[1] <= dense.params(gone) and c.macs[1] <= dense.macs(gone)


# what the smaller model costs

@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('cost', [MACs(50), Params(50), MACs(80), Params(20)])
def test_a_cost_is_met_to_within_one_group(cost, method):
    torch.manual_seed(0)
    m = nn.Sequential(conv(3, 32), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 64), nn.ReLU(), nn.MaxPool2d(2), conv(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    s = Sparsifier(m, 'coupled', method, example_input=image)
    s.prune_model(cost)
    c = compact(m, image)
    full, left = c.macs if isinstance(cost, MACs) else c.weights
    dead = {k for u in s.units.values() for k in u.classes[~s._alive(u)[0]].tolist()}
    one_more = [abs(cost.count(s._flow, dead) - cost.count(s._flow, dead | {next(k for k in u.classes.tolist() if k not in dead)})) for u in s.units.values()]
    assert abs(left - full*(1 - cost.percent/100)) <= max(one_more)
    assert any(f'{left:,} of {full:,}' in n for n in s.report().notes)


def test_a_cost_rises_with_the_schedule_and_nothing_returns():
    torch.manual_seed(0)
    m = residual(16)
    s = Sparsifier(m, 'coupled', 'global', example_input=image)
    plan, before, costs = s.plan(MACs(60)), {n: k.clone() for n, k in s.masks.items()}, []
    for progress in (0., .1, .3, .5, .8, .95, 1.):
        s.advance(plan, progress)
        for t in s.targets.values(): t.layer.weight.data.add_(torch.randn_like(t.weight)*.05)
        s.apply_masks()
        assert not any((s.masks[n] & ~k).any() for n, k in before.items())
        before = {n: k.clone() for n, k in s.masks.items()}
        costs.append(s._flow.macs({k for u in s.units.values() for k in u.classes[~s._alive(u)[0]].tolist()}))
    assert costs[0] == s._flow.macs() and costs == sorted(costs, reverse=True)
    assert abs(costs[-1]/costs[0] - .4) < .05 and abs(costs[3]/costs[0] - .7) < .05


def test_a_cost_out_of_reach_is_told():
    m = residual()
    with pytest.warns(SparsityWarning, match='asked for 100 % fewer multiply-adds: cut out, .* the nearest that whole groups allow, in the order of their scores'): Sparsifier(m, 'coupled', 'local', example_input=image).prune_model(MACs(100))
    assert alive(m.stem).sum() == 1


def test_a_cost_that_was_passed_before_is_told():
    s = Sparsifier(residual(), 'coupled', 'local', example_input=image)
    s.prune_model(MACs(70))
    before = s.sparsity()
    with pytest.warns(SparsityWarning, match='asked for 20 % fewer multiply-adds: .* these groups were pruned before, and stay'): s.prune_model(MACs(20))
    assert s.sparsity() == before


def test_nothing_can_be_pruned_before_it_is_known_what_goes_together():
    s = Sparsifier(residual(), 'coupled', example_input=...)
    for prune in (lambda: s.prune_model(50), lambda: s.prune_layer('up', 50)):
        with pytest.raises(ValueError, match='call watch'): prune()


@pytest.mark.parametrize('make, says', [(lambda: MACs(.5), 'did you mean 50'), (lambda: MACs(120), '100'), (lambda: Params(None), 'not a number'), (lambda: SparsifyCallback(MACs(50)), "granularity='coupled'"),
                                        (lambda: SparsifyCallback(MACs(50), 'filter'), "granularity='coupled'"), (lambda: Sparsifier(residual(), 'coupled'), 'pass example_input='),
                                        (lambda: SparsifyCallback({'stem': MACs(50)}, 'coupled', 'local'), 'percentage'), (lambda: as_granularity('copled'), "did you mean 'coupled'"),
                                        (lambda: Sparsifier(residual(), 'coupled', example_input=torch.randn(2, 5)), 'example')])
def test_mistakes(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_the_model_is_as_it_was_after_a_mistake():
    m = residual()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError): Sparsifier(m, 'coupled', example_input=torch.randn(2, 5, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and not any(k._forward_hooks for k in m.modules())


# grouped convolutions, filter by filter

@pytest.mark.parametrize('kwargs', [{}, dict(round_to=8)])
@pytest.mark.parametrize('make', [lambda: nn.Conv2d(8, 32, 3, groups=4), lambda: nn.ConvTranspose2d(8, 32, 3, groups=4), lambda: nn.Conv1d(16, 32, 3, groups=8)])
def test_filters_of_a_grouped_convolution_go_evenly(make, kwargs):
    layer = make()
    s = Sparsifier(layer, 'filter', 'local')
    for percent in (25, 50):
        s.prune_model(percent, **kwargs)
        kept = s.targets['weight'].groups.alive(layer.weight != 0).view(layer.groups, -1).sum(1)
        assert len(set(kept.tolist())) == 1 and kept.sum() == 32*(1 - percent/100)


def test_the_best_of_each_channel_group_stay():
    layer = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad(): layer.weight.copy_(torch.tensor([1., 2, 3, 7, 8, 9])[:, None, None, None].expand(6, 2, 1, 1))
    s = Sparsifier(layer, 'filter', 'local')
    s.prune_model(33.4)
    assert alive(layer).tolist() == [False, True, True, False, True, True]
    s.prune_model(50)
    assert alive(layer).tolist() == [False, False, True, False, True, True], 'one more of the lowest'


# in a fit

def block(width=8):
    run = lambda s, x: s.head((lambda y: (y + s.b(s.a(y))).relu().mean((2, 3)))(s.stem(x)))  # noqa: E731
    return Forward(run, stem=nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()), a=nn.Sequential(nn.Conv2d(width, 2*width, 3, padding=1), nn.BatchNorm2d(2*width), nn.ReLU()),
                   b=nn.Sequential(nn.Conv2d(2*width, width, 3, padding=1), nn.BatchNorm2d(width)), head=nn.Linear(width, 10))


@pytest.mark.parametrize('asked', [50, MACs(60), Params(50)])
@pytest.mark.parametrize('method', ['local', 'global'])
def test_a_fit_watches_its_first_batch_and_zeros_stay(asked, method):
    learn, cb = learner(block()), SparsifyCallback(asked, 'coupled', method)
    journal = Journal(cb)
    fit(learn, 2, [cb, journal])
    m = learn.model
    assert torch.equal(alive(m.stem[0]), alive(m.b[0])) and journal.regrown == 0 and journal.dense_state == 0
    x = torch.randn(4, 1, 8, 8)
    before = m.eval()(x)
    c = learn.compact()
    torch.testing.assert_close(learn.model.eval()(x), before)
    full, left = c.macs if isinstance(asked, MACs) else c.weights
    if not isinstance(asked, int): assert abs(100*(1 - left/full) - asked.percent) < 6
    assert learn.model is c.model and not any(t.zeros for t in c.tensors)
    fit(learn, 1)


@pytest.mark.parametrize('schedule', available_schedules())
def test_every_schedule(schedule):
    learn, cb = learner(block()), SparsifyCallback(60, 'coupled', 'local', schedule=schedule)
    fit(learn, 3, cb)
    assert torch.equal(alive(learn.model.stem[0]), alive(learn.model.b[0])) and cb.history
    if schedule != 'dsd': assert alive(learn.model.stem[0]).sum() == 3 and alive(learn.model.a[0]).sum() == 6


def test_a_fit_that_was_cut_goes_on_with_its_masks():
    learn, cb = learner(block()), SparsifyCallback(60, 'coupled', 'local')
    fit(learn, 2, cb)
    state = copy.deepcopy(cb.state_dict())
    again = SparsifyCallback(60, 'coupled', 'local')
    again.load_state_dict(state)
    other = learner(block())
    other.model.load_state_dict(learn.model.state_dict())
    fit(other, 1, again)
    assert all(torch.equal(again.sparsifier.masks[n], k) for n, k in cb.sparsifier.masks.items())


def test_a_second_fit_adds_to_the_first():
    learn = learner(block())
    fit(learn, 1, SparsifyCallback(25, 'coupled', 'local'))
    dead = ~alive(learn.model.a[0])
    fit(learn, 1, SparsifyCallback(50, 'coupled', 'local'))
    assert dead.sum() == 4 and (~alive(learn.model.a[0])).sum() == 8 and not (dead & alive(learn.model.a[0])).any()


def test_one_ticket_and_nothing_left_behind():
    learn, cb = learner(block()), SparsifyCallback(50, 'coupled', 'local', schedule='iterative', lth=True)
    fit(learn, 3, cb)
    assert torch.equal(alive(learn.model.stem[0]), alive(learn.model.b[0])) and not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())


def test_fine_tune_prunes_in_its_second_half():
    learn, cb = learner(nn.Sequential(net()[:6], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))), splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())]), SparsifyCallback(50, 'coupled', 'local')
    with quiet(learn): learn.fine_tune(1, cbs=cb)
    assert alive(learn.model[0][0]).sum() == 4 and alive(learn.model[0][3]).sum() == 8


class Whole(nn.Module):
    "Takes whole batches only"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x):
        if len(x) < 16: raise RuntimeError('a batch has at least 16 samples')
        return self.net(x)


def test_a_batch_that_cannot_be_cut_is_watched_whole():
    learn, cb = learner(Whole()), SparsifyCallback(50, 'coupled', 'local')
    fit(learn, 1, cb)
    assert alive(learn.model.net[0]).sum() == 4


def test_in_a_fit_that_cannot_be_watched_nothing_is_pruned_and_the_reason_is_told():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(64, 10)
        def forward(self, x): return self.a(x.flatten(1))
    with pytest.raises(ValueError, match='no coupled outputs to prune'): fit(learner(Odd()), 1, SparsifyCallback(50, 'coupled'))


def test_a_wrapped_model():
    m = nn.DataParallel(residual())
    s = Sparsifier(m, 'coupled', local, example_input=image)
    s.prune_model(50)
    assert s.sparsity() == 50 and torch.equal(alive(m.module.stem), alive(m.module.out)) and list(s.targets)[0] == 'module.stem.weight'
