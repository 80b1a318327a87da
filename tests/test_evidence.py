"Gradients and inputs: what is gathered, when, and that it leaves no trace. Literal values are those of a layer y = Wx, two samples, and the loss |y|²/2"
import copy
import itertools
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_helpers import linear, rows
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.callback.core import CancelStepException
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai_helpers import Journal, On, anatomy, fit, is_exact, learner, loaders, momentum, net, regrown, state_of
from hypothesis import given, settings, strategies as st
from torch import nn

from fastsparse import criteria as C, evidence
from fastsparse.callback import SparsifyCallback
from fastsparse.criteria import EVIDENCE, as_criterion, available_criteria, each_step, evidence_of
from fastsparse.evidence import GATHERED, blend, inputs_of, register_inputs, spread_inputs
from fastsparse.sparsifier import Sparsifier, SparsityWarning

W, X = [[1., -2.], [3., .5]], torch.tensor([[1., 2.], [3., -1.]])


def half_square(out, *_): return out.square().sum()/len(out)/2


def close(got, want, tol=1e-5): assert torch.allclose(torch.as_tensor(got).float(), torch.as_tensor(want), rtol=tol, atol=tol), got


def told(criteria, granularity='weight', batches=None, **kwargs):
    "The scores of a layer after `gather`"
    s = Sparsifier(linear(*W), granularity, 'local', criteria)
    s.gather(batches or [(X, X)], half_square, **kwargs)
    from fastsparse.sparsifier import _Scores
    return _Scores(s, list(s.units.values()))[0].view(-1, 2 if granularity == 'weight' else 1)


# -- literals

SINGLE = [X[:1], X[1:]]
LITERALS = [
    ('wanda', {}, [[3.162278, 4.472136], [9.486833, 1.118034]]),
    ('wanda', dict(batches=SINGLE), [[3.162278, 4.472136], [9.486833, 1.118034]]),
    ('snip', {}, [[6., 11.], [44.25, .125]]),
    ('taylor', {}, [[36., 121.], [1958.0625, .015625]]),
    ('taylor', dict(granularity='row'), [[289.], [1947.015625]]),
    ('taylor', dict(granularity='row', batches=SINGLE), [[353.], [2738.03125]]),
    ('taylor', dict(granularity='row', per_sample=True), [[353.], [2738.03125]]),
    ('gate', dict(granularity='row', per_sample=True), [[17.], [44.125]]),
    ('fisher', dict(per_sample=True), [[58.5, 61.], [1499.0625, 8.515625]]),
    ('grasp', {}, [[32.75, 33.5], [221.625, -4.]]), ('grasp', dict(batches=SINGLE), [[32.75, 33.5], [221.625, -4.]]), ('grasp', dict(per_sample=True), [[32.75, 33.5], [221.625, -4.]]),
    ('mest', {}, [[1.06, 2.055], [3.1475, .5025]]),
    ('movement_signed', dict(per_sample=True), [[3. - 15, -12. - 10], [-12. - 76.5, -4. + 4.25]]),
]


@pytest.mark.parametrize('criteria,kwargs,scores', LITERALS)
def test_literal_scores(criteria, kwargs, scores): close(told(criteria, **kwargs), scores)


def test_snip_is_the_share_of_the_sum():
    s = told('snip')
    close(s/s.sum(), [[.097759, .179226], [.720978, .002037]])


def test_movement_in_a_fit_of_two_steps():
    "Sanh et al.: S -= g w at each step, with the weight as it is before the step"
    learn, cb, seen = two_steps(criteria='movement_signed')
    fit(learn, 2, cbs=[cb, On(order=1, after_train=lambda learn: seen.append(cb.sparsifier._memory['moved']['weight'].clone()))])
    close(seen[0], [[-17.67, -19.42], [-75.18, -6.43]], 1e-4)


def two_steps(**kwargs):
    data = DataLoader([(x, x) for x in X], bs=1)
    learn = Learner(DataLoaders(data, data), linear(*W), loss_func=half_square, opt_func=SGD, lr=.1)
    return learn, SparsifyCallback(50, schedule=lambda pos: float(pos == 1), **kwargs), []


# -- inputs, by definition: the square of what each weight is multiplied with, summed over everything that comes out

LAYERS = {
    'Linear': (nn.Linear(3, 4), (2, 5, 3)), 'Linear, one sample': (nn.Linear(3, 4), (3,)),
    'Conv1d': (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7)),
    'Conv2d': (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 2, 6, 5)),
    'Conv2d, one sample': (nn.Conv2d(2, 3, 3), (2, 6, 5)),
    'Conv2d dilated': (nn.Conv2d(4, 4, 3, dilation=(2, 1), padding=2, groups=2), (2, 4, 7, 6)),
    'Conv2d depthwise': (nn.Conv2d(4, 8, 3, groups=4, padding='same'), (2, 4, 5, 6)),
    'Conv2d circular': (nn.Conv2d(2, 4, 3, padding=1, padding_mode='circular'), (2, 2, 5, 6)),
    'Conv2d reflect': (nn.Conv2d(2, 4, 3, padding=2, padding_mode='reflect'), (2, 2, 5, 6)),
    'Conv3d': (nn.Conv3d(2, 2, (2, 1, 3), stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
    'ConvTranspose2d': (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2), (2, 4, 3, 4)),
    'ConvTranspose1d': (nn.ConvTranspose1d(2, 3, 4), (2, 2, 5)),
    'LSTMCell': (nn.RNNCell(3, 4), (2, 3)), # of which one step is a sum of products
}


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_what_each_weight_is_multiplied_with(kind, dtype):
    layer, shape = LAYERS[kind]
    layer, x = copy.deepcopy(layer).to(dtype), torch.randn(shape).to(dtype)
    param = 'weight_ih' if kind == 'LSTMCell' else 'weight'
    got = spread_inputs(inputs_of(layer, param)(layer, param, x), getattr(layer, param).shape)
    exact = copy.deepcopy(layer).double()
    if kind == 'LSTMCell': exact = nn.functional.linear
    w = getattr(layer, param).detach().double().requires_grad_()
    out = exact(x.double(), w) if kind == 'LSTMCell' else torch.func.functional_call(exact, {param: w}, (x.double(),))
    each = [torch.autograd.grad(o, w, retain_graph=True)[0].square() for o in out.flatten()]
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(got.double(), sum(each), rtol=1e-4 if dtype == torch.float32 else 1e-6 if dtype == torch.float64 else 1e-2)


def test_inputs_of_a_product_and_of_tokens():
    layer, a, b = nn.Bilinear(2, 3, 4), torch.randn(5, 2), torch.randn(5, 3)
    close(inputs_of(layer)(layer, 'weight', a, b)[0], (a[:, :, None]*b[:, None]).square().sum(0))
    layer, tokens = nn.Embedding(5, 3), torch.tensor([[0, 1, 1], [4, 1, 0]])
    assert rows(inputs_of(layer)(layer, 'weight', tokens)) == [[2], [3], [0], [0], [1]]


def test_inputs_of_an_attention_and_of_recurrent_layers():
    q, k, v = torch.randn(3, 5, 2, 4)
    squares = [x.square().sum((0, 1)) for x in (q, k, v)]
    one, each = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=4, vdim=3)
    seen = spread_inputs(inputs_of(one, 'in_proj_weight')(one, 'in_proj_weight', q, key=k, value=v), (12, 4))
    for i in range(3): close(seen[4*i:4*i+4], squares[i].expand(4, 4))
    close(inputs_of(each, 'v_proj_weight')(each, 'v_proj_weight', q, k, v[..., :3])[0], squares[2][:3])
    rnn, packed = nn.LSTM(4, 3, bidirectional=True), nn.utils.rnn.pack_padded_sequence(q, [5, 3])
    for p in ('weight_ih_l0', 'weight_ih_l0_reverse'): close(inputs_of(rnn, p)(rnn, p, q)[0], squares[0])
    close(inputs_of(rnn, 'weight_ih_l0')(rnn, 'weight_ih_l0', packed)[0], squares[0] - q[3:, 1].square().sum(0))
    cell, h = nn.LSTMCell(4, 3), torch.randn(2, 2, 3)
    close(inputs_of(cell, 'weight_hh')(cell, 'weight_hh', q[0], (h[0], h[1]))[0], h[0].square().sum(0))
    close(inputs_of(cell, 'weight_hh')(cell, 'weight_hh', q[0])[0], torch.zeros(3))


def test_a_conv1d_of_transformers_is_known_by_name():
    Conv1D = type('Conv1D', (nn.Module,), dict(__module__='transformers.pytorch_utils'))
    x = torch.randn(2, 3, 4)
    close(inputs_of(Conv1D())(None, 'weight', x)[:, 0], x.square().sum((0, 1)))


def test_inputs_that_nobody_sees_are_named_at_construction():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3, 2))
    with pytest.raises(ValueError, match=r"reads inputs, and nobody can see those of '1.weight_hh_l0', '1.weight_ih_l1', '1.weight_hh_l1' \(LSTM\); leave"):
        Sparsifier(model, criteria='wanda')
    assert len(Sparsifier(model, criteria='wanda', exclude=['*_hh_*', '*_l1']).targets) == 2
    Sparsifier(model, criteria='snip')


def test_a_layer_whose_module_is_not_called_is_named():
    s = Sparsifier(nn.MultiheadAttention(4, 2), criteria='wanda')
    s.gather([(torch.randn(3, 1, 4),)*3])
    with pytest.raises(ValueError, match='none of out_proj: their modules were not called'): s.prune_model(50)


def test_inputs_of_a_layer_of_ones_own(monkeypatch):
    monkeypatch.setattr(evidence, '_inputs', dict(evidence._inputs))
    class Twice(nn.Linear):
        def forward(self, x): return super().forward(2*x)
    @register_inputs(Twice)
    def _(layer, param, x): return (2*x).square().sum(0)[None]
    layer = Twice(2, 2, bias=False)
    s = Sparsifier(layer, criteria='wanda', layers='*')
    s.gather([X])
    close(s._memory['inputs']['weight'], [[40., 20.]])


# -- every criterion, every granularity

def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.depthwise = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.inner, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        def forward(self, x):
            x = self.stem(x).relu()
            x = (x + self.depthwise(self.conv(x).relu())).mean((2, 3))
            return self.head(self.inner(x).relu())
    return Residual()


BATCHES = [(torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 3) for i in range(3)]
OF_EVIDENCE = [n for n in available_criteria() if set(evidence_of(as_criterion(n))) & set(GATHERED)]


@pytest.mark.parametrize('granularity', ['weight', 'output', 'row', 'filter', 'kernel', 'column', 'coupled', '2:4', 'layer'])
@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('criteria', OF_EVIDENCE)
def test_every_granularity(criteria, method, granularity):
    torch.manual_seed(0)
    m = residual()
    s = Sparsifier(m, granularity, method, criteria, example_input=BATCHES[0][0][:2] if granularity == 'coupled' else None)
    s.gather(BATCHES, F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        s.prune_model(50)
    masks = {n: k.clone() for n, k in s.masks.items()}
    assert 35 <= s.sparsity() <= 65 or granularity == 'layer'
    s.gather(BATCHES, F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        s.prune_model(50)
    assert not any((s.masks[n] & ~masks[n]).any() for n in masks), 'pruned stays pruned'


@pytest.mark.parametrize('criteria', ['taylor', 'gate'])
def test_coupled_groups_are_scored_as_a_whole(criteria):
    torch.manual_seed(0)
    m = residual()
    s = Sparsifier(m, 'coupled', 'local', criteria, example_input=BATCHES[0][0][:2])
    s.gather(BATCHES, F.cross_entropy)
    unit = next(u for u in s.units.values() if len(u.parts) == 3)
    by_hand = torch.zeros(unit.groups.n)
    for x, y in BATCHES:
        grads = torch.autograd.grad(F.cross_entropy(m(x), y), [t.parameter for t in unit.parts])
        for i in range(unit.groups.n):
            total = sum((t.weight[o]*g[o]).sum() for t, e, g in zip(unit.parts, unit.entries, grads, strict=True) for o in e[i])
            by_hand[i] += (total**2 if criteria == 'taylor' else total.abs())/len(BATCHES)
    assert torch.allclose(s._memory['scores'][unit.name][0], by_hand, rtol=1e-4)


def test_a_granularity_that_reduces_in_its_own_way_reduces_scores_of_weights():
    from fastsparse.granularity import Granularity
    s = Sparsifier(linear(*W), Granularity('row', torch.amax), 'local', 'taylor')
    s.gather([(X, X)], half_square)
    close(s._memory['scores']['weight'], [[121., 1958.0625]])


@pytest.mark.parametrize('criteria', ['taylor', 'snip', 'mest', 'fisher', 'movement_signed', 'wanda', 'grasp', 'synflow'])
def test_pieces_rank_as_the_whole(criteria):
    torch.manual_seed(0)
    m, f = nn.Sequential(nn.Linear(700, 500), nn.ReLU(), nn.Linear(500, 600)), as_criterion(criteria)
    masks, batches = [], [(torch.randn(8, 700), torch.randn(8, 600))]
    def whole(w, **kwargs): return f(w, **kwargs)
    whole.__signature__ = C.inspect.signature(f)
    if hasattr(f, 'each_step'): whole = each_step(lambda x: f.each_step(x))(whole)
    for c in (criteria, whole):
        model = copy.deepcopy(m)
        s = Sparsifier(model, criteria=c)
        s.gather(batches, F.mse_loss)
        s.prune_model(60), s.prune_model(90)
        masks.append(s.masks)
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    assert sum(int((~k).sum()) for k in masks[0].values()) == .9*650_000


# -- without data

W2 = [[2., -1.], [0., 4.]]


def two_layers(between=nn.ReLU): return nn.Sequential(linear(*W), between(), linear(*W2))


def flow_scores(model, **kwargs):
    s = Sparsifier(model, criteria='synflow')
    s.gather([torch.randn(3, 2)], **kwargs)
    return {n: C.synflow(t.weight, s._memory['synaptic_flow'][n]) for n, t in s.targets.items()}


@pytest.mark.parametrize('between', [nn.ReLU, nn.Identity, nn.Dropout])
def test_literal_synaptic_flow(between):
    got = flow_scores(two_layers(between))
    close(got['0.weight'], [[2., 4.], [15., 2.5]])
    close(got['2.weight'], [[6., 3.5], [0., 14.]])
    assert all(x.sum() == 23.5 for x in got.values()), 'what flows through a layer is the same everywhere'


def test_buffers_and_biases_flow_too_and_all_is_as_it_was():
    m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).train()
    m[1].running_mean.fill_(-.1), m[1].weight.data.neg_()
    before = state_of(m)
    flow_scores(m)
    assert equal(before, state_of(m)) and m.training


def test_a_deep_network_overflows_nothing():
    torch.manual_seed(0)
    m = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(60)])
    with torch.no_grad():
        for p in m.parameters(): p.mul_(10)
    got = flow_scores(nn.Sequential(nn.Linear(2, 64), m))
    assert all(x.isfinite().all() and (x > 0).all() for x in got.values()) and 1e29 < max(float(x.max()) for x in got.values()) < 1e31


def test_tokens_have_no_synaptic_flow():
    m = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    for batch in (torch.tensor([[1, 2]]), dict(input=torch.ones(2, 2))):
        with pytest.raises(ValueError, match='real numbers; pass one sample for its shape'): Sparsifier(m, criteria='synflow').gather([batch])


def authors(model, percent, rounds):
    "SynFlow's algorithm 1, by its description"
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    masks = [torch.ones_like(w) for w in weights]
    for k in range(1, rounds+1):
        ws = [(w.detach()*m).abs().double().requires_grad_() for w, m in zip(weights, masks, strict=True)]
        out = torch.ones(1, ws[0].shape[1], dtype=torch.double)
        for w in ws: out = out@w.T
        out.sum().backward()
        scores = torch.cat([(w*w.grad).detach().flatten() for w in ws])
        keep = round(len(scores)*(1 - percent/100)**(k/rounds))
        best = torch.zeros_like(scores).index_fill_(0, scores.sort(stable=True).indices[len(scores)-keep:], 1)
        masks = [b.view_as(w) for b, w in zip(best.split([w.numel() for w in weights]), weights, strict=True)]
    return masks


def only_lowest(scores, n, step, wanted, floor):
    "One ranking, without a floor"
    return scores.lowest(round(sum(wanted)), step)


@pytest.mark.parametrize('percent,rounds', [(50, 1), (80, 10), (95, 30)])
def test_rounds_of_synaptic_flow_are_those_of_the_authors(percent, rounds):
    torch.manual_seed(3)
    m = nn.Sequential(nn.Linear(8, 20, bias=False), nn.ReLU(), nn.Linear(20, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False))
    want = authors(m, percent, rounds)
    s = Sparsifier(m, 'weight', only_lowest, 'synflow')
    s.prune_in_rounds(percent, [torch.ones(1, 8)], rounds=rounds)
    assert all(torch.equal(k, w.bool()) for k, w in zip(s.masks.values(), want, strict=True))


@pytest.mark.parametrize('criteria,granularity', [('synflow', 'weight'), ('synflow', 'filter'), ('snip', 'weight'), ('taylor', 'filter'), ('wanda', 'weight')])
def test_rounds_meet_the_target_and_tell_once(criteria, granularity):
    s = Sparsifier(net(), granularity, criteria=criteria, layers=nn.Conv2d)
    data = ((torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        s.prune_in_rounds(75, data, F.cross_entropy, rounds=4)
    assert s.sparsity() == pytest.approx(75, abs=.2 if granularity == 'weight' else 5) and len(said) <= 2


def test_rounds_of_no_use():
    s = Sparsifier(net(), criteria='synflow')
    for bad in (0, 2.5, None):
        with pytest.raises(ValueError, match='has to be a whole number'): s.prune_in_rounds(50, [torch.ones(1, 1, 8, 8)], rounds=bad)
    for bad in ({'0': 50}, .5):
        with pytest.raises(ValueError, match='rounds go by one percentage|did you mean 50'): s.prune_in_rounds(bad, [torch.ones(1, 1, 8, 8)])
    s.prune_in_rounds(0, [torch.ones(1, 1, 8, 8)], rounds=2)
    assert s.sparsity() == 0


# -- beside its BatchNorm, and beside the others

def test_slimming_goes_by_the_batchnorm_behind():
    m = net()
    m[1].weight.data = torch.tensor([.5, -3, .1, 2, -.2, 4, 1, 5])
    m[4].weight.data = torch.linspace(-1, 1, 16)
    for granularity in ('filter', 'coupled', 'output'):
        twin = copy.deepcopy(m)
        s = Sparsifier(twin, granularity, 'local', 'slimming', layers=['0', '3'], example_input=torch.randn(2, 1, 8, 8))
        s.prune_model(50)
        assert [i for i, k in enumerate(s.masks['0.weight'].flatten(1).any(1)) if not k] == [0, 2, 4, 6]
        assert s.masks['3.weight'].flatten(1).any(1).tolist() == [True]*4 + [False]*8 + [True]*4
        s.prune_model(75)
        assert [i for i, k in enumerate(s.masks['0.weight'].flatten(1).any(1)) if k] == [5, 7], 'the gammas of what went are zero now'


def test_slimming_in_a_fit():
    cb = SparsifyCallback(50, 'coupled', 'local', criteria='slimming', schedule=at_last)
    learn = learner(net(), loaders(3))
    learn.model[1].weight.data = torch.tensor([5., 3, .1, 2, .2, 4, .3, .4])
    fit(learn, 1, cbs=cb)
    assert cb.sparsifier.masks['0.weight'].flatten(1).any(1).tolist() == [True, True, False, True, False, True, False, False]


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'row'])
def test_slimming_needs_a_batchnorm_behind_each_output(granularity):
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 3))
    with pytest.raises(ValueError, match=r"the gamma of the BatchNorm behind each output of layer '[03]', and none is known; it is for whole outputs"):
        Sparsifier(m, granularity, 'local', 'slimming').prune_model(50)


@pytest.mark.parametrize('make', [lambda: nn.Linear(3, 5), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose1d(3, 4, 2), lambda: nn.Conv1d(2, 5, 3)])
def test_fpgm_is_the_sum_of_distances_to_the_other_outputs(make):
    torch.manual_seed(0)
    layer = make()
    w, groups = layer.weight.detach(), getattr(layer, 'groups', 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd): by_output = torch.cat([x.transpose(0, 1) for x in w.chunk(groups)])
    else: by_output = w
    filters = by_output.flatten(1)
    want = torch.stack([sum((a - b).norm() for b in filters) for a in filters])
    got = C.fpgm(w, layer, 'some.layer.weight')
    if isinstance(layer, nn.modules.conv._ConvTransposeNd): got = torch.cat([x.transpose(0, 1) for x in got.chunk(groups)])
    assert torch.allclose(got.flatten(1), want[:, None].expand(-1, filters.shape[1]), rtol=1e-4)


def test_fpgm_spares_what_is_unlike_the_others():
    layer = nn.Conv2d(1, 5, 1, bias=False)
    layer.weight.data = torch.tensor([9., 10, 11, 100, -80]).view(5, 1, 1, 1)
    Sparsifier(layer, 'filter', 'local', 'fpgm').prune_model(40)
    assert [i for i, w in enumerate(layer.weight.flatten().tolist()) if w] == [2, 3, 4] or [i for i, w in enumerate(layer.weight.flatten().tolist()) if w] == [0, 3, 4]
    for granularity, m in (('output', nn.LSTM(3, 4)), ('unit', nn.GRU(3, 4)), ('coupled', net())):
        s = Sparsifier(m, granularity, 'local', 'fpgm', example_input=torch.randn(2, 1, 8, 8) if granularity == 'coupled' else None)
        s.prune_model(50)
        assert 40 < s.sparsity() < 60


# -- missing, and wrong

@pytest.mark.parametrize('criteria', OF_EVIDENCE)
def test_without_evidence_nothing_is_pruned_and_the_way_out_is_told(criteria):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    s = Sparsifier(model, criteria=criteria)
    for ask in (lambda: s.prune_model(50), lambda: s.prune_layer('0', 50), lambda: s.dry_run(50)):
        with pytest.raises(ValueError, match=rf'the criterion {criteria} reads \w+, and nothing was gathered yet; call sparsifier.gather\(batches'): ask()
    assert all((p != 0).all() for p in model.parameters()) and not s.state_dict()['masks']['0.weight'].logical_not().any()


def test_a_layer_that_the_loss_does_not_reach_is_named():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        def forward(self, x): return self.a(x)
    for criteria in ('snip', 'taylor'):
        s = Sparsifier(Two(), criteria=criteria)
        s.gather([(X, X)], half_square)
        with pytest.raises(ValueError, match='none of b: the loss does not depend on them; leave them out with exclude='): s.prune_model(50)


def test_what_reads_nothing_gathers_nothing():
    with pytest.raises(ValueError, match='large_final reads nothing that has to be gathered, which would be grad'): Sparsifier(linear(*W)).gather([X])


def test_every_name_that_a_criterion_may_ask_for_is_served():
    assert set(EVIDENCE) == {'initial', 'previous', 'generator', 'gamma', 'layer', 'name', *GATHERED}


def test_a_criterion_is_told_its_layer_and_its_name():
    seen = []
    def by_place(w, layer, name): seen.append((layer, name)); return w.abs()*(2 if name == '1.weight' else 1)
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for f in (by_place, C.elementwise(lambda w, layer, name: by_place(w, layer, name))):
        seen.clear()
        Sparsifier(m, criteria=f).prune_model(25)
        assert set(seen) == {(m[0], '0.weight'), (m[1], '1.weight')}


def test_a_criterion_of_steps_cannot_ask_for_what_comes_later():
    with pytest.raises(ValueError, match=r"asked at each step, when there is no \['inputs'\]"): each_step(torch.abs)(lambda w, grad, inputs: w)
    seen = []
    @each_step(torch.abs)
    def f(w, grad, initial, name): seen.append(name); return (w - initial + 1)*grad
    s = Sparsifier(linear(*W), 'row', 'local', f)
    s.gather([(X, X)], half_square)
    close(s._memory['scores']['weight'], [[.5, 14.5]])
    assert seen == ['weight']


BAD = [([], 'batches= is empty'), (X, 'an iterable of batches'), (3, 'an iterable of batches'), (dict(x=X), 'an iterable of batches'),
       (SimpleNamespace(train_ds=1), 'did you mean dls.train')]


@pytest.mark.parametrize('batches,match', BAD)
def test_batches_of_no_use(batches, match):
    with pytest.raises(ValueError, match=match): Sparsifier(linear(*W), criteria='snip').gather(batches, half_square)


@pytest.mark.parametrize('loss,match', [(lambda out, y: out, r'one number, but it is a tensor of shape \(2, 2\)'), (lambda out, y: out.sum()*float('nan'), 'the loss is nan'), (lambda out, y: 3., 'but it is a float'),
                                        (lambda out, y: y.sum(), 'no gradient reaches|does not require grad'), (lambda out, y: (out*1e30).square().sum().sqrt()*1e25, 'infinite or NaN|the loss is inf')])
def test_losses_of_no_use(loss, match):
    s = Sparsifier(linear(*W), criteria='snip')
    s.gather([(X, X)], half_square)
    before = s.state_dict()
    with pytest.raises((ValueError, RuntimeError), match=match): s.gather([(X, X)], loss)
    assert torch.equal(before['grad']['weight'], s.state_dict()['grad']['weight']), 'what there was is still there'


# -- of what

class Named(nn.Module):
    def __init__(self, fc): super().__init__(); self.fc = fc
    def forward(self, x, y=None):
        out = self.fc(x)
        return out if y is None else SimpleNamespace(loss=half_square(out), out=out)


KINDS = {
    'tuples': ([(X, X)], half_square, False), 'lists': ([[X, X]], half_square, False), 'a tensor': ([X], half_square, False), 'a generator': (((X, X) for _ in range(1)), half_square, False),
    'a data loader': (torch.utils.data.DataLoader(list(zip(X, X)), batch_size=2), half_square, False), 'of fastai': (DataLoader(list(zip(X, X)), bs=2), half_square, False),
    'dicts that give a loss': ([dict(x=X, y=X)], None, True), 'tuples that give a loss': ([(X, X)], None, True), 'dicts': ([dict(x=X)], lambda out, batch: half_square(out) + 0*batch['x'].sum(), True),
}


@pytest.mark.parametrize('kind', KINDS)
def test_batches_of_any_kind(kind):
    batches, loss_func, named = KINDS[kind]
    model = Named(linear(*W)) if named else linear(*W)
    s = Sparsifier(model, criteria='snip')
    s.gather(batches, loss_func)
    close(next(iter(s._memory['grad'].values())), [[6., -5.5], [14.75, -.25]])


def test_inputs_need_no_loss_and_no_target():
    for batches in ([X], [(X,)], [(X, 'target')], [(X, X)]):
        s = Sparsifier(linear(*W), criteria='wanda')
        s.gather(batches)
        close(s._memory['inputs']['weight'], [[10., 5.]])


def test_a_few_batches_and_two_inputs():
    class Add(nn.Linear):
        def forward(self, a, b): return super().forward(a) + b
    m = Add(2, 2, bias=False)
    m.weight.data = torch.tensor(W)
    s = Sparsifier(m, criteria='snip', layers='*')
    s.gather(itertools.chain([(X, 0*X, X)], itertools.repeat((None, None, None))), half_square, n_batches=1)
    close(s._memory['grad']['weight'], [[6., -5.5], [14.75, -.25]])


def test_what_is_gathered_again_starts_afresh():
    s = Sparsifier(linear(*W), criteria='movement_signed')
    for _ in range(2): s.gather([(X, X)], half_square)
    close(s._memory['moved']['weight'], [[-6., -11.], [-44.25, .125]])


@settings(deadline=None, database=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=1, max_size=8), st.booleans())
def test_blend_is_the_mean_or_the_sum(xs, mean):
    kept = {}
    for n, x in enumerate(xs, 1): blend(kept, 'w', None if x is None else torch.tensor([x]), n, mean)
    known = [x or 0. for x in xs]
    if all(x is None for x in xs): assert not kept
    else: assert kept['w'].item() == pytest.approx(sum(known)/(len(xs) if mean else 1), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_evidence_has_at_least_32_bits(dtype):
    s = Sparsifier(linear(*W).to(dtype), criteria='fisher')
    s.gather([(X.to(dtype)*1e-3, X)], lambda out, y: half_square(out.float()))
    got = s._memory['grad_squared']['weight']
    assert got.dtype == torch.promote_types(dtype, torch.float32) and (got > 0).all(), 'squares of 16-bit gradients would vanish'


# -- no trace

class Busy(nn.Module):
    "Draws random numbers of three kinds, has a BatchNorm and dropout, a frozen part, and hooks of its own"
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop, self.b = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 2)
        self.calls = 0
        self.b.requires_grad_(False)
        self.bn.eval()
        self.a.register_forward_pre_hook(lambda *_: None)
    def forward(self, x):
        self.calls += 1
        noise = torch.rand(1) + random.random() + np.random.rand()
        return self.b(self.drop(self.bn(self.a(x)).relu())) + float(noise)*1e-3


def everything(m):
    return (anatomy(m), state_of(m), [(n, x.training) for n, x in m.named_modules()], [p.requires_grad for p in m.parameters()], m.calls,
            [None if p.grad is None else p.grad.clone() for p in m.parameters()], torch.get_rng_state(), random.getstate(), [np.random.get_state()[1].tolist(), np.random.get_state()[2]])


def equal(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def failing(batches):
    yield from batches
    raise KeyError('no more batches')


@pytest.mark.parametrize('criteria', OF_EVIDENCE)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('trouble', [None, 'loss', 'batches', 'model', 'interrupt'])
def test_gather_leaves_everything_as_it_was(criteria, training, trouble):
    m = Busy()
    m(torch.randn(4, 3)).sum().backward()
    s, batches = Sparsifier(m, criteria=criteria), [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    if trouble == 'model': batches[2] = (torch.randn(4, 5), batches[2][1])
    before, old = everything(m), s.state_dict()
    n = itertools.count()
    def loss(out, y):
        if trouble == 'loss' and next(n): raise KeyError('no loss')
        if trouble == 'interrupt' and next(n): raise KeyboardInterrupt
        return F.mse_loss(out, y)
    given = failing(batches) if trouble == 'batches' else batches
    if trouble is None or criteria == 'synflow': s.gather(given, loss, training=training) # which goes no further than the shape of a sample
    else:
        with pytest.raises((KeyError, RuntimeError, KeyboardInterrupt)): s.gather(given, loss, training=training)
        assert equal(old, s.state_dict())
    assert equal(before, everything(m))


def test_a_loader_goes_on_as_if_nothing_had_been_drawn():
    items = list(zip(torch.randn(40, 2), torch.randn(40, 2)))
    theirs = torch.utils.data.DataLoader(items, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    fastais = DataLoader(items, bs=4, shuffle=True)
    s = Sparsifier(linear(*W), criteria='snip')
    for loader in (theirs, fastais):
        random.seed(1), torch.manual_seed(1)
        twin = copy.deepcopy(loader)
        s.gather(loader, half_square, n_batches=2)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, twin, strict=True))


def test_in_training_mode_a_batchnorm_sees_the_batch():
    m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    grads = []
    for training in (False, True):
        s = Sparsifier(m, criteria='snip')
        s.gather([(5 + X, X)], half_square, training=training)
        twin = copy.deepcopy(m).train(training)
        half_square(twin(5 + X)).backward()
        close(s._memory['grad']['0.weight'], twin[0].weight.grad, 1e-4)
        grads.append(s._memory['grad']['0.weight'])
    assert not torch.allclose(*grads)


# -- in a loop of one's own

def test_steps_of_ones_own():
    m = linear(*W)
    s = Sparsifier(m, criteria='snip')
    assert not s.gather_step() and not s.has_steps, 'no gradient is there'
    for x in X:
        m.zero_grad()
        half_square(m(x[None])).backward()
        assert s.gather_step()
    close(s._memory['grad']['weight'], [[6., -5.5], [14.75, -.25]])
    m.weight.grad[0, 0] = float('nan')
    assert not s.gather_step()
    close(s._memory['grad']['weight'], [[6., -5.5], [14.75, -.25]])
    s.prune_model(50)
    close(s._memory['grad']['weight'], [[6., -5.5], [14.75, -.25]])
    m.weight.grad = torch.ones(2, 2)
    s.gather_step()
    close(s._memory['grad']['weight'], torch.ones(2, 2)) # since the masks were updated


def test_nothing_is_gathered_of_what_is_frozen():
    m = nn.Sequential(linear(*W), linear(*W))
    m[0].requires_grad_(False)
    m[0].weight.grad = torch.ones(2, 2) # left over
    m[1].weight.grad = torch.ones(2, 2)
    s = Sparsifier(m, criteria='snip', trainable_only=True)
    s.gather_step()
    assert list(s._memory['grad']) == ['1.weight']
    s.gather([(X, X)], half_square)
    s.prune_model(50)
    assert m[0].weight.all() and m[1].weight.count_nonzero() == 2


def test_what_moved_goes_on_after_an_update():
    m = linear(*W)
    s = Sparsifier(m, criteria='movement_signed')
    for _ in range(2):
        m.weight.grad = torch.ones(2, 2)
        s.gather_step()
        s.prune_model(0)
    close(s._memory['moved']['weight'], -2*torch.tensor(W))


def test_sparse_gradients_are_gathered():
    m = nn.Embedding(4, 2, sparse=True)
    s = Sparsifier(m, criteria='snip', layers='*')
    m(torch.tensor([1, 1, 3])).sum().backward()
    s.gather_step()
    close(s._memory['grad']['weight'], [[0., 0], [2, 2], [0, 0], [1, 1]])


def test_a_trial_and_a_dry_run_change_no_evidence():
    m = linear(*W)
    s = Sparsifier(m, criteria='snip')
    m.weight.grad = torch.ones(2, 2)
    s.gather_step()
    before = s.state_dict()
    with s.trial():
        s.prune_model(50)
        m.weight.grad = torch.zeros(2, 2)
        s.gather_step()
    s.dry_run(50)
    assert equal(before, s.state_dict())


# -- saved

@pytest.mark.parametrize('criteria', OF_EVIDENCE)
def test_evidence_is_saved(criteria):
    s, other = (Sparsifier(residual(), criteria=criteria) for _ in range(2))
    s.gather(BATCHES, F.cross_entropy)
    other.load_state_dict(copy.deepcopy(s.state_dict()))
    assert equal(s.state_dict(), other.state_dict()) and other.has_steps
    other.prune_model(50)


def test_evidence_that_does_not_fit_is_refused():
    s = Sparsifier(nn.Linear(2, 3), criteria='wanda')
    state = s.state_dict()
    for bad in ({'weight': torch.ones(1, 3)}, {'other': torch.ones(1, 2)}, {'weight': 3}, {'weight': torch.tensor(1.)}, None):
        with pytest.raises(ValueError, match='the inputs'): s.load_state_dict({**state, 'inputs': bad})
    with pytest.raises(ValueError, match='same criteria'): s.load_state_dict({'masks': state['masks']})


def test_a_new_beginning_forgets_evidence():
    s = Sparsifier(linear(*W), criteria='snip')
    s.gather([(X, X)], half_square)
    s.reset()
    with pytest.raises(ValueError, match='nothing was gathered yet'): s.prune_model(50)


# -- in a fit

class Scaled(On):
    "What mixed precision does: scales the loss, and takes the scale off again before the step, which is left out if numbers overflow"
    def __init__(self, overflow=()): self.overflow, self.n = overflow, 0; super().__init__(order=10)
    def before_backward(self):
        self.n += 1
        self.learn.loss_grad = self.learn.loss_grad*(float('inf') if self.n - 1 in self.overflow else 1024.)
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad /= 1024
        if not all(p.grad.isfinite().all() for p in self.learn.model.parameters()): raise CancelStepException


def at_last(pos): return float(pos == 1)


def watched_fit(criteria, *cbs, percent=50, schedule=at_last, batches=4, bs=16, model=None, **kwargs):
    "A fit of one epoch; the weights and the plain gradient of each batch, by hand; what was kept when the masks were made"
    learn = learner(model or net(), loaders(batches, bs=bs))
    cb, seen, kept = SparsifyCallback(percent, criteria=criteria, schedule=schedule, **kwargs), [], []
    def by_hand(learn):
        twin = copy.deepcopy(learn.model)
        learn.loss_func(twin(*learn.xb), *learn.yb).backward()
        seen.append({n: (p.detach().clone(), p.grad) for n, p in twin.named_parameters()})
    def keep(learn): kept.append({k: {n: t.clone() for n, t in v.items()} for k, v in cb.sparsifier._memory.items()})
    fit(learn, 1, cbs=[cb, On(order=70, before_batch=lambda learn: by_hand(learn) if learn.training else None), On(order=59, before_batch=lambda learn: keep(learn) if learn.training else None), *cbs])
    return learn, cb, seen, kept


OTHERS = {'alone': [], 'clipped': [lambda: GradientClip(1e-3)], 'scaled': [Scaled], 'scaled and clipped': [Scaled, lambda: GradientClip(1e-3)]}


@pytest.mark.parametrize('others', OTHERS)
@pytest.mark.parametrize('kind,criteria', [('grad', 'snip'), ('grad_squared', 'fisher'), ('moved', 'movement_signed')])
def test_a_fit_gathers_what_each_step_says(kind, criteria, others):
    learn, cb, seen, kept = watched_fit(criteria, *[make() for make in OTHERS[others]])
    assert is_exact(learn.model, 50)
    for n, got in kept[-1][kind].items(): # before the last batch, at which masks are made
        ws, gs = zip(*(s[n] for s in seen[:3]))
        want = dict(grad=sum(gs)/3, grad_squared=sum(g*g for g in gs)/3, moved=-sum(w*g for w, g in zip(ws, gs, strict=True)))[kind]
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-6), n
    assert not kept[0][kind]


@pytest.mark.parametrize('clip', [False, True])
def test_accumulated_batches_are_one_step(clip):
    learn, cb, seen, kept = watched_fit('snip', GradientAccumulation(32), *[GradientClip(1e-3)]*clip, batches=5)
    for n, got in kept[-1]['grad'].items(): # two steps of two batches; weights change after the second and the fourth
        steps = [(seen[0][n][1] + seen[1][n][1])/2, (seen[2][n][1] + seen[3][n][1])/2]
        assert torch.allclose(got, sum(steps)/2, rtol=1e-3, atol=1e-6), n
    assert cb.sparsifier._steps == 0 or is_exact(learn.model, 50)


@pytest.mark.parametrize('others', [(), (0,), (0, 2)])
def test_a_step_that_overflows_is_none(others):
    learn, cb, seen, kept = watched_fit('snip', Scaled(others))
    for n, got in kept[-1]['grad'].items():
        gs = [s[n][1] for i, s in enumerate(seen[:3]) if i not in others]
        assert torch.allclose(got, sum(gs)/len(gs), rtol=1e-3, atol=1e-6), n
    assert is_exact(learn.model, 50)


def test_where_every_step_overflows_nothing_is_pruned_and_it_is_told():
    with pytest.warns(SparsityWarning, match='before its schedule reached 50 %'):
        learn, cb, _, kept = watched_fit('snip', Scaled(range(4)))
    assert cb.current_sparsity == 0 and not cb.sparsifier.has_steps


def test_gradients_of_pruned_weights_are_seen_and_yet_not_stepped_with():
    checked = []
    def masked(learn): # behind this callback, before clipping
        if cb.sparsifier.planned(): checked.append(max(float(learn.model.get_parameter(n).grad[~m].abs().max()) for n, m in cb.sparsifier.masks.items()))
    learn, cb = learner(net(), loaders(6)), SparsifyCallback(80, criteria='snip', schedule=lambda pos: min(2*pos, 1.))
    dense = []
    def keep(learn): dense.append({n: t.clone() for n, t in cb.sparsifier._memory['grad'].items()})
    journal = Journal(cb)
    fit(learn, 1, cbs=[cb, journal, GradientClip(.1), On(order=10.7, before_step=masked), On(order=58, after_step=keep)])
    assert checked and max(checked) == 0 and journal.regrown == journal.dense_state == 0
    assert all((t[~cb.sparsifier.masks[n]] != 0).float().mean() > .2 for n, t in dense[1].items()), 'a growth by gradients has to see them'


@pytest.mark.parametrize('schedule', ['one_shot', 'taper', 'agp', 'iterative', lambda pos: float(pos > 0)])
@pytest.mark.parametrize('criteria', ['taylor', 'wanda', 'grasp', 'synflow'])
@pytest.mark.parametrize('batches,epochs', [(1, 1), (2, 1), (3, 2)])
def test_the_target_is_reached_in_the_shortest_fits(criteria, schedule, batches, epochs):
    learn, cb = learner(net(), loaders(batches)), SparsifyCallback(70, criteria=criteria, schedule=schedule)
    fit(learn, epochs, cbs=cb)
    assert is_exact(learn.model, 70) and regrown(cb) == 0


def test_the_first_update_waits_for_the_first_step_and_no_longer():
    for criteria, first in (('large_final', 1/8), ('wanda', 1/8), ('snip', 2/8), ('taylor', 2/8)):
        _, cb, *_ = watched_fit(criteria, schedule=lambda pos: float(pos > 0), batches=8)
        assert [pos for pos, _ in cb.history] == [first]
    _, cb, *_ = watched_fit('snip', GradientAccumulation(48), schedule=lambda pos: float(pos > 0), batches=8)
    assert [pos for pos, _ in cb.history] == [4/8]
    _, cb, *_ = watched_fit('snip', schedule='lin', batches=8, update_every=4)
    assert [pos for pos, _ in cb.history] == [2/8, 4/8] # and not as late as the second one


@pytest.mark.parametrize('other', [lambda: GradientAccumulation(32), lambda: Scaled((0, 2))])
def test_the_place_among_callbacks_is_the_usual_one_but_for_the_step(other):
    orders = []
    watched_fit('snip', other(), On(order=5, after_batch=lambda learn: orders.append(next(c.order for c in learn.cbs if isinstance(c, SparsifyCallback))), after_backward=lambda learn: None))
    assert set(orders) == {SparsifyCallback.order}


@pytest.mark.parametrize('criteria', OF_EVIDENCE)
def test_zeros_that_were_taken_over_are_let_go_without_evidence(criteria):
    model = net()
    Sparsifier(model).prune_model(80)
    model = copy.deepcopy(model) # which nobody knows
    seen = []
    learn, cb = learner(model, loaders(4)), SparsifyCallback(40, criteria=criteria, schedule=at_last)
    fit(learn, 1, cbs=[cb, On(order=70, before_batch=lambda learn: seen.append(cb.sparsifier.planned()) if learn.training else None)])
    assert seen == pytest.approx([40]*4, abs=.2) and is_exact(learn.model, 40) and cb.sparsifier.criteria is as_criterion(criteria)


def test_inputs_are_those_of_the_batch_at_which_masks_are_made():
    learn, cb, seen, kept = watched_fit('wanda')
    first, by_hand = learn.dls.train.dataset[48:64], torch.stack([x for x, _ in learn.dls.train.dataset[48:64]])
    assert len(first) == 16
    close(cb.sparsifier._memory['inputs']['0.weight'], inputs_of(learn.model[0])(learn.model[0], 'weight', by_hand), 1e-3)
    assert not kept[-1]['inputs'], 'not gathered while no masks are made'


def test_inputs_are_those_that_the_model_sees_as_it_trains():
    learn, cb, want = learner(net(), loaders(4)), SparsifyCallback(50, criteria='wanda', schedule=at_last), []
    learn.model[1].running_mean.fill_(5.)
    def look(learn): # the same forward, by hand
        twin = copy.deepcopy(learn.model)
        want.append(inputs_of(twin[3])(twin[3], 'weight', twin[:3](learn.xb[0])))
    fit(learn, 1, cbs=[cb, On(order=59, before_batch=lambda learn: look(learn) if learn.training else None)])
    close(cb.sparsifier._memory['inputs']['3.weight'], want[-1], 1e-3)


@pytest.mark.parametrize('criteria', ['wanda', 'taylor', 'snip', 'grasp', 'synflow'])
def test_a_fit_is_not_changed_by_looking(criteria):
    "The same masks from scores that were made before, with the same steps: weights agree bit by bit"
    model, weights = net(), []
    model.insert(3, nn.Dropout(.2))
    for schedule in (at_last, lambda pos: 0.): # the second never prunes
        learn, cb = learner(copy.deepcopy(model), loaders(4)), SparsifyCallback(50, criteria=criteria, schedule=schedule)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SparsityWarning)
            fit(learn, 1, cbs=[cb, On(order=50, before_batch=lambda learn: weights.append(state_of(learn.model)) if learn.training else None)])
    assert all(map(equal, weights[:4], weights[4:]))


@pytest.mark.parametrize('criteria', ['wanda', 'taylor'])
@pytest.mark.parametrize('trouble', [None, KeyboardInterrupt(), RuntimeError('broken')])
def test_a_fit_leaves_no_trace(criteria, trouble):
    learn = learner(net(), loaders(4))
    before, order = anatomy(learn.model), SparsifyCallback.order
    cb = SparsifyCallback(50, criteria=criteria)
    def break_(learn):
        if trouble and learn.training and learn.iter == 2: raise trouble
    for event in ('before_step', 'after_backward', 'after_pred'):
        cbs = [cb, On(order=5, **{event: break_})]
        if trouble:
            with pytest.raises(type(trouble)): fit(learn, 1, cbs=cbs)
        else: fit(learn, 1, cbs=cbs)
        assert anatomy(learn.model) == before and not [c for c in learn.cbs if isinstance(c, SparsifyCallback)]
    fit(learn, 1, cbs=cb)
    assert cb.order == order and anatomy(learn.model) == before and is_exact(learn.model, 50)


def test_nothing_is_gathered_that_nobody_reads(monkeypatch):
    def never(*args, **kwargs): raise AssertionError('nobody reads it')
    for name in ('blend', 'all_finite', 'gather_evidence'): monkeypatch.setattr(f'fastsparse.sparsifier.{name}', never)
    hooks = []
    monkeypatch.setattr(nn.Module, 'register_forward_pre_hook', never)
    learn, cb = learner(net(), loaders(4)), SparsifyCallback(80)
    fit(learn, 1, cbs=[cb, GradientClip(1.), On(order=100, before_step=lambda learn: hooks.append(cb.order))])
    assert cb.sparsifier._memory == {} and set(hooks) == {SparsifyCallback.order} and is_exact(learn.model, 80)


def test_gathering_ends_with_the_schedule(monkeypatch):
    seen, step = [], Sparsifier.gather_step
    monkeypatch.setattr(Sparsifier, 'gather_step', lambda self, *args: seen.append(1) or step(self, *args))
    learn, cb = learner(net(), loaders(4)), SparsifyCallback(80, criteria='taylor', schedule=lambda pos: min(4*pos, 1.))
    from fastsparse.schedule import Schedule
    cb.schedule = Schedule(lambda x: x, 0., .5)
    fit(learn, 2, cbs=cb)
    assert 3 <= len(seen) <= 4 and is_exact(learn.model, 80)


def test_parts_of_a_plan_gather_for_themselves():
    seen = []
    cb = SparsifyCallback({nn.Conv2d: dict(sparsity=50, criteria='taylor', granularity='filter', method='local'), nn.Linear: dict(sparsity=80, criteria='wanda')})
    learn = learner(net(), loaders(4))
    clipped = []
    def at_clipping(learn): clipped.append(not cb.parts[0].sparsifier.has_steps)
    fit(learn, 2, cbs=[cb, GradientClip(1e-3), On(order=10.7, before_step=at_clipping), On(order=100, after_step=lambda learn: seen.append([dict(p.sparsifier._memory).keys() for p in cb.parts]))])
    assert not any(clipped), 'gathered before'
    assert [round(x.percent) for x in cb.report.layers] == [50, 50, 80]
    assert cb.order == SparsifyCallback.order
    assert {tuple(k) for k in seen[0]} == {('scores',), ('inputs',)}


def test_the_frozen_phase_of_fine_tune_gathers_nothing():
    seen = []
    learn = learner(nn.Sequential(net()[:6], net()[6:]), loaders(4), splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    cb = SparsifyCallback(50, criteria='snip')
    from fastai_helpers import quiet
    with quiet(learn): learn.fine_tune(1, freeze_epochs=1, cbs=[cb, On(order=100, after_epoch=lambda learn: seen.append(cb.sparsifier.has_steps))])
    assert seen == [False, True] and is_exact(learn.model, 50)


def test_a_dry_run_takes_a_batch():
    learn = learner(net(), loaders(4))
    before = state_of(learn.model)
    plan = SparsifyCallback(50, criteria='taylor').dry_run(learn)
    assert plan.sparsity > 45 and equal(before, state_of(learn.model))


def test_momentum_of_what_goes_is_forgotten_as_ever():
    learn, cb = learner(net(), loaders(6), opt_func=momentum), SparsifyCallback(80, criteria='taylor')
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal, GradientClip(.5)])
    assert journal.regrown == 0 and journal.dense_state == 0


# -- for others than the criterion

def test_more_can_be_gathered_than_the_criterion_reads():
    learn, cb, dense = learner(net(), loaders(4)), SparsifyCallback(50), []
    def ask(learn): cb.sparsifier.also_gather('grad') if learn.iter == 0 else dense.append(cb.sparsifier.evidence('grad'))
    fit(learn, 1, cbs=[cb, GradientClip(1e-3), On(order=70, before_batch=lambda learn: ask(learn) if learn.training else None)])
    assert [set(d) for d in dense] == [set(cb.sparsifier.targets)]*3 and is_exact(learn.model, 50)
    assert all((d[n][~m] != 0).any() for d in dense[:1] for n, m in cb.sparsifier.masks.items()), 'those of pruned weights too'
    with pytest.raises(ValueError, match=r"\['hessian'\] cannot be gathered; there is grad"): cb.sparsifier.also_gather('hessian')


def test_evidence_by_name_has_the_shape_of_the_weight():
    s = Sparsifier(nn.Conv2d(4, 6, 3, groups=2), criteria='wanda')
    assert s.evidence('inputs') == s.evidence('grad') == {}
    s.also_gather('grad', 'grad_squared')
    s.gather([(torch.randn(2, 4, 5, 5), None)], half_square)
    assert {e: x['weight'].shape for e in ('inputs', 'grad', 'grad_squared') for x in [s.evidence(e)]} == dict.fromkeys(('inputs', 'grad', 'grad_squared'), (6, 2, 3, 3))
    s.reset()
    assert s.evidence('grad') == {} and 'grad' in s.state_dict()
