"Weights that stay make up for those that go: beside explicit inverses and least squares"
import copy

import pytest
import torch
from fastai_helpers import anatomy, fit, learner, loaders, net, state_of
from torch import nn

from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.granularity import NM
from fastsparse.patterns import has_pattern
from fastsparse.repair import _upper, as_matrices, from_matrices, obs, second_moments, sparsegpt, sparsegpt_layer
from fastsparse.sparsifier import Sparsifier

W, X = torch.tensor([[1., -2.], [3., .5]]), torch.tensor([[1., 2.], [3., -1.]])
H = 2/len(X)*X.T@X


def close(got, want, tol=1e-4): assert torch.allclose(torch.as_tensor(got).float(), torch.as_tensor(want), rtol=tol, atol=tol), got


def correlated(n=256, inputs=24, rank=8):
    "Samples of inputs that depend on one another, and their Hessian"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, rank, generator=g)@torch.randn(rank, inputs, generator=g) + .3*torch.randn(n, inputs, generator=g)
    return x, 2/n*x.T@x


# -- literals

def test_literal_costs():
    close(H, [[10., -1.], [-1., 5.]])
    close(torch.linalg.inv(H), [[5/49, 1/49], [1/49, 10/49]])
    close(W.square()/torch.linalg.inv(H).diag(), [[9.8, 19.6], [88.2, 1.225]])
    close(_upper(H).diag().square(), [5/49, .2])
    close(W.square()/_upper(H).diag().square(), [[9.8, 20.], [88.2, 1.25]])


def test_literal_repair():
    new, kept = obs(W, H, 2)
    assert kept.tolist() == [[False, True], [True, False]]
    close(new[0], [0., -2.2])
    assert new[1, 1] == 0 and new[1, 0] == pytest.approx(3 - .5/10*1, abs=1e-6) # -w_q/[H^-1]_qq H^-1[0,q], to the left
    new, kept = sparsegpt_layer(W, H, 2, damping=0)
    close(new, [[0., -2.2], [3., 0.]])


# -- obs: the best that a row can do with what is left

@pytest.mark.parametrize('lose', [1, 20, 60, 95])
def test_obs_leaves_the_least_squares_solution(lose):
    x, hessian = correlated()
    torch.manual_seed(1)
    w = torch.randn(4, 24)
    new, kept = obs(w, hessian, lose)
    assert int((~kept).sum()) == lose and not new[~kept].any()
    for row, got, k in zip(w.double(), new, kept, strict=True):
        if not k.any(): continue
        best = torch.linalg.lstsq(x.double()[:, k], x.double()@row).solution
        assert torch.allclose(got[k].double(), best, rtol=1e-3, atol=1e-3)


# -- sparsegpt: beside an inverse for each column

def slow(w, hessian, kept, damping=0.):
    "Column after column, each loss made up for by the columns to the right, with the inverse of what is left written out"
    new, hessian = w.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damping/100*hessian.diagonal().mean())
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        lost = torch.where(kept[:, j], 0., new[:, j])
        new[:, j:] -= torch.outer(lost, inverse[0]/inverse[0, 0])
    return new.masked_fill(~kept, 0)


@pytest.mark.parametrize('block', [1, 5, 8, 128])
@pytest.mark.parametrize('lose', [60, NM(2, 4), NM(1, 3)], ids=str)
@pytest.mark.parametrize('damping', [1., 10.])
def test_columns_are_repaired_as_with_an_inverse_for_each(block, lose, damping):
    _, hessian = correlated()
    torch.manual_seed(2)
    w = torch.randn(5, 24)
    new, kept = sparsegpt_layer(w, hessian, lose, block, damping)
    assert torch.allclose(new.double(), slow(w, hessian, kept, damping), atol=2e-3)
    if isinstance(lose, NM): assert (kept.view(-1, lose.m).sum(1) == lose.n).all()
    else: assert int((~kept).sum()) == lose


def test_a_block_is_chosen_by_the_weights_as_they_are_then():
    _, hessian = correlated()
    torch.manual_seed(3)
    w = torch.randn(5, 24)
    new, kept = sparsegpt_layer(w, hessian, 60, 8, 1.)
    damped = hessian + .01*hessian.diagonal().mean()*torch.eye(24)
    for a in (0, 8, 16):
        before = slow(w, hessian, torch.cat([kept[:, :a], torch.ones(5, 24-a, dtype=torch.bool)], 1), 1.).float()
        cost = (before/_upper(damped).diag())[:, a:a+8].square()
        assert (~kept[:, a:a+8]).sum() == 20 and cost[~kept[:, a:a+8]].max() <= cost[kept[:, a:a+8]].min()*(1 + 1e-4)


def test_inputs_that_are_always_zero():
    x, _ = correlated()
    x[:, 3] = 0
    new, kept = sparsegpt_layer(torch.randn(5, 24), 2/len(x)*x.T@x, 60)
    assert not new[:, 3].any() and new.isfinite().all() and int((~kept).sum()) == 60


@pytest.mark.parametrize('f', [obs, sparsegpt_layer, lambda *args: sparsegpt_layer(*args, 6)])
def test_pruned_stays_pruned(f):
    _, hessian = correlated()
    torch.manual_seed(4)
    w = torch.randn(5, 24).masked_fill(torch.rand(5, 24) < .3, 0)
    for lose in (0, 60, 90):
        new, kept = f(w, hessian, lose)
        assert not (kept & (w == 0)).any() and int((~kept).sum()) == max(lose, int((w == 0).sum())) and not new[~kept].any()


# -- layers

LAYERS = [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(8, 6, 3, padding=1), lambda: nn.Conv2d(8, 6, (3, 2), stride=2, groups=2, bias=False), lambda: nn.Conv1d(8, 4, 3, dilation=2, padding='same'),
          lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: nn.Conv3d(8, 4, 2)]
SHAPES = {nn.Linear: (5, 7, 8), nn.Conv1d: (3, 8, 9), nn.Conv2d: (3, 8, 7, 6), nn.Conv3d: (2, 8, 3, 4, 3)}


@pytest.mark.parametrize('make', LAYERS)
def test_the_hessian_is_that_of_the_squared_outputs(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(SHAPES[type(layer)])
    moments = second_moments(layer, [layer], [x[:1], x[1:]])[layer].double()
    w = torch.randn_like(layer.weight)
    out = torch.func.functional_call(layer, {'weight': w, **({'bias': torch.zeros_like(layer.bias)} if layer.bias is not None else {})}, (x,))
    each = as_matrices(layer, w).double()
    quadratic = torch.einsum('goi,gij,goj->', each, moments, each)/2
    rows = out.numel()/layer.weight.shape[0]
    assert quadratic.item() == pytest.approx(out.double().square().sum().item()/rows, rel=1e-4)
    assert torch.equal(from_matrices(layer, as_matrices(layer, layer.weight)), layer.weight)


def test_a_conv1d_of_transformers_is_the_transpose():
    class Conv1D(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(8, 6))
        def forward(self, x): return x@self.weight
    Conv1D.__module__, Conv1D.__qualname__ = 'transformers.pytorch_utils', 'Conv1D'
    m, twin, x = nn.Sequential(Conv1D()), nn.Sequential(nn.Linear(8, 6, bias=False)), torch.randn(40, 8)
    twin[0].weight.data = m[0].weight.data.T.clone()
    for model in (m, twin): sparsegpt(model, [x], '2:4')
    close(m[0].weight.T, twin[0].weight.detach())


# -- whole models

def images(n=48): return torch.nn.functional.avg_pool2d(torch.randn(n, 1, 10, 10), 3, 1)


def off(model, other, x): return (model.eval()(x) - other.eval()(x)).square().mean().item()


@pytest.mark.parametrize('kwargs', [{}, dict(at_once=True), dict(block=16), dict(layers=nn.Conv2d), dict(exclude='8')])
@pytest.mark.parametrize('sparsity', [30, 50, 80, '2:4'])
def test_a_model_is_pruned_exactly_and_better_than_by_magnitude(kwargs, sparsity):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    x = images()
    by_magnitude, repaired = copy.deepcopy(m), copy.deepcopy(m)
    selectors = {k: v for k, v in kwargs.items() if k in ('layers', 'exclude')}
    Sparsifier(by_magnitude, sparsity if sparsity == '2:4' else 'weight', 'local', **selectors).prune_model(50 if sparsity == '2:4' else sparsity)
    s = sparsegpt(repaired, list(x.split(16)), sparsity, **kwargs)
    for t in s.targets.values():
        want = t.size/2 if sparsity == '2:4' else round(t.size*sparsity/100)
        assert int((t.weight == 0).sum()) == int((~s.masks[t.name]).sum()) == want
        if sparsity == '2:4': assert has_pattern(t.layer, '2:4')
    assert off(repaired, m, x) < off(by_magnitude, m, x)


def test_exact_is_better_still():
    torch.manual_seed(0)
    m, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), correlated(200, 16, 6)[0]
    a, b = copy.deepcopy(m), copy.deepcopy(m)
    sparsegpt(a, [x], 60), sparsegpt(b, [x], 60, exact=True)
    assert off(b, m, x) < off(a, m, x) and int((b[0].weight == 0).sum()) == round(.6*256)


def test_layers_are_repaired_by_what_comes_out_of_the_pruned_ones():
    torch.manual_seed(0)
    m, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), correlated(200, 16, 6)[0]
    a, b = copy.deepcopy(m), copy.deepcopy(m)
    sparsegpt(a, [x], 60), sparsegpt(b, [x], 60, at_once=True)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[2].weight, b[2].weight)
    by_hand, _ = sparsegpt_layer(m[2].weight.detach(), second_moments(a, [a[2]], [x])[a[2]][0], round(.6*64))
    close(a[2].weight, by_hand)


def test_zeros_are_held_afterwards():
    model = net()
    learn = learner(model, loaders(4))
    s = sparsegpt(learn.model, learn.dls.train, 50, n_batches=2)
    zeros = {n: ~m for n, m in s.masks.items()}
    for cb in (KeepSparsityCallback(), SparsifyCallback(50)):
        fit(learn, 1, cbs=cb)
        assert all(not learn.model.get_parameter(n)[z].any() for n, z in zeros.items())
    assert s.sparsity() == pytest.approx(50, abs=.1)


def test_what_cannot_be_repaired_is_left_dense_and_named():
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.attention, self.rnn, self.fc = nn.MultiheadAttention(8, 2), nn.GRU(8, 8), nn.Linear(8, 8)
        def forward(self, x): return self.fc(self.rnn(self.attention(x, x, x)[0])[0])
    m, x = Model(), torch.randn(5, 4, 8)
    s = sparsegpt(m, [x], 50)
    assert list(s.targets) == ['fc.weight'] and s.left_dense['attention.out_proj'] == 'its module is not called' and 'no matrix product' in s.left_dense['rnn.weight_hh_l0']
    with pytest.raises(ValueError, match='rnn.weight_ih_l0: it is no matrix product.*leave them out of layers='): sparsegpt(m, [x], 50, layers=['rnn', 'fc'])


class Breaks(nn.Module):
    "Fails once the layer before it has been pruned"
    def __init__(self, before): super().__init__(); self.before = [before]
    def forward(self, x):
        if (self.before[0].weight == 0).any(): raise KeyError('broken')
        return x


def test_a_failure_changes_nothing():
    m, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(30, 8)
    before, hooks = state_of(m), anatomy(m)
    bad = [x, torch.full_like(x, float('nan'))]
    with pytest.raises((ValueError, RuntimeError)): sparsegpt(m, bad, 50)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and anatomy(m) == hooks
    broken = nn.Sequential(m[0], Breaks(m[0]), m[2])
    with pytest.raises(KeyError): sparsegpt(broken, [x], 50)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_modes_and_running_statistics_are_as_they_were():
    m = net().train()
    m[1].eval()
    before, modes = {k: v for k, v in state_of(m).items() if 'running' in k or 'num_' in k}, [x.training for x in m.modules()]
    rng = torch.get_rng_state()
    x = images(8)[:, :, :8, :8]
    torch.set_rng_state(rng)
    sparsegpt(m, [x], 50)
    assert all(torch.equal(m.state_dict()[k], v) for k, v in before.items()) and [x.training for x in m.modules()] == modes and torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize('args,match', [((.5,), 'did you mean 50'), (({'0': 50},), 'one percentage'), ((NM(2, 4, pad=True),), 'plain patterns'), ((NM(2, 4, 'out'),), 'plain patterns'), (('filter',), 'prunes single weights')])
def test_mistakes_are_told(args, match):
    with pytest.raises(ValueError, match=match): sparsegpt(net(), [images(4)[:, :, :8, :8]], *args)


def test_too_few_samples_without_damping():
    with pytest.raises(ValueError, match="inputs of layer '0' depend on one another.*larger damping="): sparsegpt(nn.Sequential(nn.Linear(8, 8)), [torch.randn(2, 8)], 50, damping=0.)
