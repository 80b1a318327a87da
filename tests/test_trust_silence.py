"What used to be wrong without a word: each is right now, or told"
import copy
import re
import warnings

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from core_helpers import CRITERIA, bits, invent, linear, same
from fastai_helpers import On, column, conv, fit, learner, loaders, seed, state_of
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.criteria import as_criterion
from fastsparse.mask import ZeroHolder
from fastsparse.method import floors, least_kept
from fastsparse.plan import UnknownOption, erk
from fastsparse.report import sparsity_report
from fastsparse.schedule import as_schedule
from fastsparse.sparsifier import Sparsifier, SparsityWarning


def share(*layers): return 100*sum(int((x.weight == 0).sum()) for x in layers)/sum(x.weight.numel() for x in layers)
def zeros(masks): return sum(int((~m).sum()) for m in masks.values())


def quietly(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        return f(*args, **kwargs)


def told(f, *args, **kwargs):
    "The warnings of ours, as texts"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message) for w in seen if issubclass(w.category, SparsityWarning)]


# one ranking over layers that cannot be compared

@pytest.mark.parametrize('n,channels,share,level,least', [
    (320, 42, .5, False, 42), (320, 42, .2, False, 32), (320, 42, .5, True, 160), (64, 128, .5, False, 16), (4096, 128, .02, False, 40), (10, 7, .05, False, 1),
    (10, 7, .0, True, 1)])
def test_the_floor_by_hand(n, channels, share, level, least): assert least_kept(n, channels, share, level) == least


@pytest.mark.parametrize('wanted', [0, 1, 50, 300, 4000, 4350, 4400, 4413.9])
def test_the_floor_leaves_room_for_the_budget(wanted):
    n, step = [320, 4096], [1, 1]
    least = floors(n, step, [42, 128], [False, True], wanted)
    assert all(f >= 1 for f in least) and sum(n) - sum(least) >= wanted


@pytest.mark.parametrize('percent', [50, 80, 95])
@pytest.mark.parametrize('scale', [1e-2, 1e-4])
def test_a_layer_of_smaller_scale_keeps_a_way_through(percent, scale):
    seed()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data.mul_(scale)
    s = Sparsifier(model)
    said = told(s.prune_model, percent)
    assert zeros(s.masks) == round(percent*3*4096/100)
    kept = s.masks['1.weight'].sum(1)
    assert kept.sum() == min(128, int(4096*(100-percent)/100)//2) and kept.min() == kept.sum()//64, 'and all outputs alike'
    assert len(said) == 1 and said[0].startswith('1 is down to the least') and "method='local'" in said[0] and said[0] in str(s.report())
    best = model[1].weight.abs().masked_fill(~s.masks['1.weight'], 0).amax(1)
    assert torch.equal(best, model[1].weight.abs().amax(1)), 'of each output, the largest'


def test_layers_that_can_be_compared_are_one_ranking():
    seed()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    flat = torch.cat([m.weight.detach().abs().flatten() for m in model])
    s = Sparsifier(model)
    assert not told(s.prune_model, 80)
    assert torch.equal(torch.cat([m.flatten() for m in s.masks.values()]), flat > flat.sort().values[round(.8*len(flat)) - 1])


@pytest.mark.parametrize('make', [lambda: nn.Conv2d(8, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 3), lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: nn.ConvTranspose1d(8, 8, 9, groups=4)])
@pytest.mark.parametrize('granularity', ['weight', 'kernel'])
def test_every_output_of_a_squeezed_layer_stays_alive(make, granularity):
    seed()
    model = nn.Sequential(make(), nn.Conv2d(8, 64, 3) if '2d' in type(make()).__name__ else nn.Conv1d(8, 64, 9))
    model[0].weight.data.mul_(1e-3)
    s = Sparsifier(model, granularity)
    quietly(s.prune_model, 60)
    w, transposed = s.masks['0.weight'], 'Transpose' in type(model[0]).__name__
    groups = model[0].groups
    outputs = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1).flatten(1) if transposed and groups == 1 else \
        torch.cat([g.transpose(0, 1).flatten(1) for g in w.chunk(groups)]) if transposed else w.flatten(1)
    kept = int(s.targets['0.weight'].groups.alive(w).sum())
    assert len(outputs) == 8 and (outputs.any(1).all() or kept < 8)


@pytest.mark.parametrize('percent', [5, 50, 80])
def test_a_layer_that_starts_at_zero_keeps_its_share(percent):
    seed()
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.zeros_(model[4].weight)
    s = Sparsifier(model)
    for p in (percent/2, percent) if percent > 5 else (percent,): quietly(s.prune_model, p)
    kept = s.masks['4.weight'].sum(1)
    assert kept.sum() == int(320*(100-percent)/100 + 1e-6) and kept.min() == kept.sum()//10, 'its share, shared out over the outputs'
    assert zeros(s.masks) == round(percent*(2048*2 + 320)/100)


@pytest.mark.parametrize('criteria', ['movement', 'magnitude_increase', 'movmag', 'updating_movement'])
def test_where_nothing_has_moved_every_layer_loses_its_share(criteria):
    "At the first update all scores are zero; a ranking would empty the first layer"
    seed()
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 200), nn.Linear(200, 10))
    s = Sparsifier(model, criteria=criteria)
    quietly(s.prune_model, 3)
    assert all(abs(share(m) - 3) <= 100/m.weight.numel() for m in model)


def test_one_layer_whose_scores_are_all_equal_loses_the_first():
    s = Sparsifier(linear([1, 1, 1], [1, 1, 1]))
    s.prune_model(50)
    assert bits(s.masks['weight']) == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize('percent', [50, 80])
def test_a_head_that_starts_at_zero_survives_a_fit(percent):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(model[5].weight)
    learn, cb = learner(model, lr=1e-3), SparsifyCallback(percent)
    fit(learn, 2, cbs=cb)
    assert (model[5].weight != 0).any(1).all() and abs(cb.current_sparsity - percent) < .01


@pytest.mark.parametrize('percent', [50, 90])
def test_filters_of_a_small_layer_are_not_all_taken(percent):
    seed()
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    model[1].weight.data.mul_(.01)
    s = Sparsifier(model, 'filter')
    said = told(s.prune_model, percent)
    kept = int(s.masks['1.weight'].flatten(1).any(1).sum())
    assert kept == max(int(32*(100-percent)/100)//2, 1) and any(m.startswith('1 is down') or '1,' in m for m in said)


# state that outlives what it describes

def mlp(): return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))


def test_a_scan_that_loads_the_weights_back_prunes_one_layer_at_a_time():
    seed()
    m, seen = mlp(), []
    dense, s = copy.deepcopy(m.state_dict()), Sparsifier(m)
    for name in ('0', '2', '4'):
        s.prune_layer(name, 80)
        seen.append([round(share(m[i])) for i in (0, 2, 4)])
        m.load_state_dict(dense)
    assert seen == [[80, 0, 0], [0, 80, 0], [0, 0, 80]]
    s.prune_model(30)
    assert s.sparsity() == pytest.approx(30, abs=.1)


@pytest.mark.parametrize('method', ['local', 'global'])
def test_levels_may_fall_when_weights_were_loaded_back(method):
    seed()
    m = mlp()
    dense, s, fresh = copy.deepcopy(m.state_dict()), Sparsifier(m, method=method), {}
    for p in (90, 50, 20):
        s.prune_model(p)
        fresh[p] = Sparsifier(copy.deepcopy(m), method=method) # only for its masks
        assert s.sparsity() == pytest.approx(p, abs=.2)
        m.load_state_dict(dense)
        again = Sparsifier(copy.deepcopy(m), method=method)
        again.prune_model(p)
        assert same(again.masks, s.masks)


def test_masks_of_filters_that_were_loaded_back_leave_their_norms_alone():
    seed()
    m = nn.Sequential(*conv(3, 8), *conv(8, 8))
    m[1].bias.data.fill_(1)
    dense, s = copy.deepcopy(m.state_dict()), Sparsifier(m, 'filter', 'local')
    s.prune_layer('0', 50)
    assert int((m[1].bias == 0).sum()) == 4
    m.load_state_dict(dense)
    s.prune_layer('3', 50)
    assert (m[1].bias == 1).all() and (m[0].weight != 0).all() and int((m[4].weight == 0).sum()) == 4


def test_a_trial_leaves_nothing_behind():
    seed()
    m = nn.Sequential(*conv(3, 8), *conv(8, 8))
    for granularity, criteria in (('filter', 'large_final'), ('weight', 'updating_movement')):
        s = Sparsifier(m, granularity, criteria=criteria)
        quietly(s.prune_model, 30)
        before, state = copy.deepcopy(m.state_dict()), s.state_dict()
        with s.trial() as t:
            assert t is s
            quietly(s.prune_model, 80)
            assert s.sparsity() > 70
        assert same(before, m.state_dict()) and same(state['masks'], s.masks) and s.sparsity() == s.planned()
        with pytest.raises(KeyError), s.trial():
            quietly(s.prune_model, 90)
            raise KeyError('x')
        assert same(before, m.state_dict()) and same(state['masks'], s.masks)
        m.load_state_dict({k: torch.randn_like(v) if v.is_floating_point() else v for k, v in m.state_dict().items()})


def test_reset_forgets_masks():
    seed()
    m = mlp()
    s = Sparsifier(m)
    s.prune_model(80)
    for p in m.parameters(): p.data.normal_()
    assert told(s.prune_model, 80)[0].startswith('pruned weights of 0, 2, 4 were changed since') and 'reset()' in told(lambda: (m[0].weight.data.normal_(), s.prune_model(80)))[0]
    for p in m.parameters(): p.data.normal_()
    s.reset()
    assert all(mask.all() for mask in s.masks.values()) and not told(s.prune_model, 80)
    other = Sparsifier(copy.deepcopy(m))
    assert other.sparsity() == s.sparsity()


def test_a_replaced_layer_is_not_pruned_counted_or_held_in_silence():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.fc = nn.Linear(8, 16), nn.Linear(16, 100)
    m = Net()
    s = Sparsifier(m)
    s.prune_model(70)
    m.fc = nn.Linear(16, 5)
    for ask in (lambda: s.prune_model(90), lambda: s.prune_layer('fc', 90), lambda: s.plan(90), s.reset):
        with pytest.raises(ValueError, match="weight of layer 'fc' has been replaced; make a new Sparsifier"): ask()
    assert not s.is_current() and s.sparsity() == pytest.approx(share(m.body, m.fc))
    assert [l.weights for l in s.report().layers] == [128, 80] and 'fc has been replaced' in str(s.report())
    s.prune_layer('body', 90)
    assert share(m.body) == pytest.approx(90, abs=.5)
    del m.fc
    assert [l.name for l in s.report().layers] == ['body']


def test_a_weight_that_becomes_computed_is_refused_where_zeros_would_be_lost():
    m = mlp()
    s = Sparsifier(m)
    s.prune_model(70)
    parametrizations.weight_norm(m[0])
    for ask in (s.apply_masks, lambda: s.prune_model(80)):
        with pytest.raises(ValueError, match=r"weight of layer '0' is computed at each forward now \(ParametrizedLinear\)"): ask()
    assert 'no mask holds there' in str(s.report())


class Quantize(nn.Module):
    def forward(self, w): return (w*8).round()/8


class Parametrize(Callback):
    "As callbacks of quantization do, after ours"
    order = 90
    def __init__(self, *at): self.at = at
    def before_fit(self):
        for i in self.at: parametrize.register_parametrization(self.learn.model[i], 'weight', Quantize())


def test_a_weight_that_a_later_callback_makes_computed_is_left_dense_and_told():
    learn, cb = learner(), SparsifyCallback(80)
    said = told(fit, learn, 1, cbs=[cb, Parametrize(3)])
    assert any('this fit prunes' in m and '3: its weight is computed' in m for m in said)
    assert list(cb.sparsifier.targets) == ['0.weight', '8.weight'] and abs(column(learn)[-1] - 80) < .5
    assert abs(share(learn.model[0], learn.model[8]) - 80) < .5


def test_where_later_callbacks_make_all_weights_computed_nothing_is_trained():
    learn = learner()
    before = state_of(learn.model)
    with pytest.raises(ValueError, match='(?s)no layer to prune by weight.*is computed at each forward'): fit(learn, 1, cbs=[SparsifyCallback(80), Parametrize(0, 3, 8)])
    for i in (0, 3, 8): parametrize.remove_parametrizations(learn.model[i], 'weight', leave_parametrized=False)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items())


def test_counted_and_planned_are_compared_at_the_end_of_a_fit():
    learn, cb = learner(), SparsifyCallback(80)
    swap = On(after_epoch=lambda learn: learn.model.__setitem__(8, nn.Linear(16, 10)), order=100)
    said = told(fit, learn, 1, cbs=[cb, swap])
    assert re.search(r'masks of this fit make (80|79\.99|80\.01) % of its layers zero, but \d[\d.]* % are: layers were replaced', said[-1])
    learn, cb = learner(), SparsifyCallback(80)
    swap = On(after_epoch=lambda learn: setattr(learn, 'model', copy.deepcopy(learn.model)), order=100)
    assert "the Learner's model is another one now" in told(fit, learn, 1, cbs=[cb, swap])[-1]
    assert not told(fit, *(learner(), 1), cbs=SparsifyCallback(80))


def test_parameters_that_are_assigned_anew_are_still_masked():
    seed()
    m = mlp()
    s = Sparsifier(m)
    s.prune_model(50)
    m.load_state_dict({k: torch.ones_like(v) for k, v in m.state_dict().items()}, assign=True)
    s.apply_masks()
    assert s.sparsity() == 50 == s.planned()


# pruned stays pruned

@pytest.mark.parametrize('criteria', CRITERIA)
@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'row'])
def test_pruned_weights_stay_pruned_whatever_became_of_them(criteria, method, granularity):
    layer = linear([1], [2], [8], [9]) if granularity == 'row' else linear([1, 2, 8, 9])
    s = invent(Sparsifier(layer, granularity, method, criteria))
    s.prune_model(50)
    mask = s.masks['weight'].clone()
    layer.weight.data.copy_(torch.tensor([9., 9., 1., 1.]).view_as(layer.weight))
    quietly(s.prune_model, 50)
    assert torch.equal(s.masks['weight'], mask)
    layer.weight.data.copy_(torch.tensor([9., 9., 1., 1.]).view_as(layer.weight))
    quietly(s.prune_model, 75)
    assert not (s.masks['weight'] & ~mask).any() and s.sparsity() == 75


# what is asked for, and what there is

class Mixer(nn.Module):
    "Two matrices of which nothing is known"
    def __init__(self, n=16):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(n, 4*n)), nn.Parameter(torch.randn(4*n, n))

    def forward(self, x): return (x@self.a).relu()@self.b


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.rnn, self.ff, self.decoder = nn.Embedding(50, 16), Mixer(), nn.Linear(16, 16), nn.Linear(16, 50)
        self.decoder.weight = self.encoder.weight

    def forward(self, x): return self.decoder(self.ff(self.rnn(self.encoder(x))))


@pytest.mark.parametrize('how', [nn.Embedding, 'encoder', 'enc*', lambda n, m: n == 'encoder', ['decoder']])
def test_what_is_excluded_is_excluded_by_tensor(how):
    assert list(Sparsifier(LM(), exclude=how).targets) == ['ff.weight']


def test_any_tensor_of_what_is_excluded_is_excluded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc, self.other = nn.RNN(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.fc.weight = self.rnn.weight_hh_l0
    assert list(Sparsifier(Tied(), exclude=nn.RNN).targets) == ['other.weight']


@pytest.mark.parametrize('layers,which', [([Mixer, nn.Linear], 'Mixer'), (['rnn', 'ff'], "'rnn'"), (Mixer, ''), ([lambda n, m: n == 'rnn', 'ff'], '<lambda>')])
def test_a_selector_that_yields_nothing_is_refused_with_the_reason(layers, which):
    with pytest.raises(ValueError, match=rf'no layer to prune by weight.*{which}.*rnn.a, rnn.b: Mixer is not a prunable type of layer; register_layer'):
        Sparsifier(LM(), layers=layers)


def test_a_selector_of_which_all_is_excluded_is_no_mistake():
    assert list(Sparsifier(LM(), layers=['encoder', 'decoder', 'ff'], exclude='decoder').targets) == ['ff.weight']


def test_every_matrix_that_stays_dense_has_a_line():
    class Free(LM):
        def __init__(self):
            super().__init__()
            self.positions, self.scale = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
            self.bilinear = nn.Bilinear(2, 3, 4)
            self.attention = nn.MultiheadAttention(8, 2)
    s = Sparsifier(Free())
    matrices = {n for n, p in s.model.named_parameters() if p.dim() > 1}
    held = set(s.targets) | {n if n in matrices else f'{n}.weight' for n in s.left_dense}
    assert held == matrices and 'attention.in_proj_weight' in s.targets and 'bilinear.weight' in s.targets and 'positions' in s.left_dense
    for n in s.left_dense: assert n in str(s.report()) or 'more' in str(s.report())
    assert set(Sparsifier(LM(), layers='*').left_dense) == {'rnn.a', 'rnn.b'}


def test_a_fit_that_reaches_less_than_half_says_so_once():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.rnn, self.fc = Mixer(8), nn.Linear(8, 10)
        def forward(self, x): return self.fc(self.rnn(x[:, 0])[:, -1])
    learn, cb = learner(Net()), SparsifyCallback(50)
    said = told(fit, learn, 1, cbs=cb)
    assert len(said) == 1 and re.match(r"this fit prunes 14 % of the model's tensors of two or more axes; the others stay dense \(rnn.a, rnn.b: Mixer", said[0])
    assert not told(fit, learn, 1, cbs=cb), 'once'
    assert not told(fit, learner(Net()), 1, cbs=SparsifyCallback(50, layers='fc')), 'who named the layer knows'


# layers with a forward of their own

class StdConv(nn.Conv2d):
    def forward(self, x):
        w = nn.functional.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class ConvSame(nn.Conv2d):
    def forward(self, x): return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias).relu()


class ScaledLinear(nn.Linear):
    def forward(self, x): return nn.functional.linear(x, self.weight.float()/self.weight.norm(dim=1, keepdim=True), self.bias)


class Odd(nn.Linear):
    def forward(self, x, y): return nn.functional.linear(x, self.weight) + y


@pytest.mark.parametrize('layer,dense', [(StdConv(4, 8, 3), 'convolution'), (ConvSame(4, 8, 3), ''), (ScaledLinear(4, 8), ''), (Odd(4, 8), 'TypeError')])
def test_a_forward_of_its_own_is_seen_through_or_the_layer_stays_dense(layer, dense):
    model = nn.ModuleList([layer, nn.Linear(4, 4)])
    state, rng = state_of(layer), torch.get_rng_state()
    s = Sparsifier(model)
    assert ('0' in s.left_dense) == bool(dense) and dense in s.left_dense.get('0', '')
    assert same(state, state_of(layer)) and torch.equal(rng, torch.get_rng_state()) and layer.training
    assert '0.weight' in Sparsifier(nn.ModuleList([layer, nn.Linear(4, 4)]), layers='0').targets, 'who names it gets it'
    assert '0 has a forward of its own' in str(s.report()) or not dense


# reports

def test_a_report_lists_every_layer_whose_weight_is_computed():
    m = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(5)])
    r = sparsity_report(m)
    assert [l.name for l in r.layers] == list('01234') and r.weights == 320


def test_a_report_counts_the_computed_weight_and_changes_nothing():
    m = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    with torch.no_grad(): m[0].parametrizations.weight.original[:3] = 0
    before = copy.deepcopy(m.state_dict())
    assert sparsity_report(m).layers[0].zeros == 24 and same(before, m.state_dict()) and m[0].parametrizations.weight[0].training


@pytest.mark.filterwarnings('ignore')
def test_quantized_and_scripted_models_are_counted():
    m = mlp()
    Sparsifier(m).prune_model(60)
    zeros = [l.zeros for l in sparsity_report(m).layers]
    q = sparsity_report(torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8))
    assert [l.name for l in q.layers] == ['0', '2', '4'] and all(a >= b for a, b in zip([l.zeros for l in q.layers], zeros)) and 60 <= q.sparsity < 75
    assert q.all_weights == q.weights == 900
    s = sparsity_report(torch.jit.script(m))
    assert [(l.name, l.type, l.zeros) for l in s.layers] == [(n, 'Linear', z) for n, z in zip('024', zeros)]


@pytest.mark.parametrize('to', ['to_sparse_csr', 'to_sparse_coo', 'to_sparse_csc'])
@pytest.mark.filterwarnings('ignore:Sparse')
def test_sparse_layouts_are_counted_left_dense_or_refused_by_name(to):
    m = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    Sparsifier(m).prune_model(90)
    before = sparsity_report(m)
    m[0].weight = nn.Parameter(getattr(m[0].weight.detach(), to)())
    assert [l.zeros for l in sparsity_report(m).layers] == [l.zeros for l in before.layers] and sparsity_report(m).all_zeros == before.all_zeros
    assert 'to_dense' in Sparsifier(m).left_dense['0']
    for refused in (ZeroHolder, lambda m: Sparsifier(m, layers='0')):
        with pytest.raises(ValueError, match=r"weight of layer '0' has the layout torch.sparse_...; make it dense first"): refused(m)


def test_what_has_no_values_is_named():
    m = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4, device='meta'), nn.Linear(4, 4))
    r = sparsity_report(m)
    assert [l.name for l in r.layers] == ['2'] and r.all_weights == 20 and '0 is not counted: its weight does not exist yet' in str(r) and '1 is not counted: its weight is on the meta device' in str(r)
    assert list(Sparsifier(m).targets) == ['2.weight'] and set(Sparsifier(m).left_dense) == {'0', '1'}
    with pytest.raises(ValueError, match="(?s)weight of layer '0' does not exist yet.*weight of layer '1' is on the meta device"): Sparsifier(m, layers=['0', '1'])
    with pytest.raises(ValueError, match="(?s)layer '0' does not exist yet.*layer '1' is on the meta device"): ZeroHolder(m)
    assert 'No layer was found whose weight can be counted' in str(sparsity_report(nn.ReLU()))


def test_a_tensor_that_keeps_its_values_in_a_way_of_its_own_is_left_dense_or_refused():
    from torch.testing._internal.two_tensor import TwoTensor
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    m[0].weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    assert list(Sparsifier(m).targets) == ['1.weight'] and 'TwoTensor' in Sparsifier(m).left_dense['0']
    with pytest.raises(ValueError, match="weight of layer '0' is a TwoTensor"): Sparsifier(m, layers='0')
    with pytest.raises(ValueError, match="weight of layer '0' is a TwoTensor"): ZeroHolder(m)
    assert '0 is not counted' in str(sparsity_report(m))


@pytest.mark.parametrize('dtype', [torch.cfloat, torch.cdouble])
def test_complex_zeros_are_kept(dtype):
    class Spectral(nn.Module):
        def __init__(self): super().__init__(); self.w, self.f = nn.Parameter(torch.randn(64, 8, dtype=dtype)), nn.Linear(8, 10)
        def forward(self, x): return self.f((x.flatten(1).to(dtype)@self.w).abs().float())
    seed()
    m = Spectral()
    with torch.no_grad(): m.w[m.w.abs() < .8] = 0
    gone, grads = m.w.detach() == 0, []
    fit(learner(m), 2, cbs=[KeepSparsityCallback(), On(before_step=lambda learn: grads.append(m.w.grad[gone].abs().sum().item()), order=100)])
    assert gone.any() and torch.equal(m.w.detach() == 0, gone) and grads and not any(grads)


# zeros that nobody pruned

def initialised(name):
    m = nn.Sequential(*conv(1, 8), *conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 10))
    if name == 'identity': nn.init.eye_(m[8].weight)
    if name == 'dirac': nn.init.dirac_(m[3].weight)
    if name == 'chance': m[3].weight.data[0, 0, 0] = 0
    if name == 'both': nn.init.eye_(m[8].weight), nn.init.dirac_(m[3].weight)
    return m


@pytest.mark.parametrize('name', ['identity', 'dirac', 'chance', 'both'])
@pytest.mark.parametrize('granularity,schedule', [('weight', 'taper'), ('weight', 'one_shot'), ('kernel', 'taper')])
def test_sparsity_0_trains_as_if_nobody_was_there(name, granularity, schedule):
    seed()
    model = initialised(name)
    plain, watched = learner(copy.deepcopy(model)), learner(model)
    fit(plain, 2), fit(watched, 2, cbs=SparsifyCallback(0, granularity, layers=nn.Conv2d, schedule=schedule))
    assert same(state_of(plain.model), state_of(watched.model))


@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('percent', [10, 50, 90])
@pytest.mark.parametrize('name,schedule', [('identity', 'taper'), ('identity', 'one_shot'), ('dirac', 'taper'), ('both', 'one_shot')])
def test_a_target_never_holds_more_than_it_says(name, percent, method, schedule):
    seed()
    model = initialised(name)
    learn, cb, most = learner(model), SparsifyCallback(percent, method=method, schedule=schedule), []
    total = sum(m.weight.numel() for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    note = lambda learn: most.append(zeros(cb.sparsifier.masks)) # noqa: E731
    quietly(fit, learn, 2, cbs=[cb, On(before_batch=note, after_step=note, order=100)])
    assert max(most) <= percent*total/100 + len(cb.sparsifier.targets)/2 and most[-1] >= percent*total/100 - len(cb.sparsifier.targets)/2
    if name == 'identity': assert abs(cb.current_sparsity - percent) < 1, 'the others have moved'


def test_a_checkpoint_is_held_up_to_what_is_asked_for():
    seed()
    first = mlp()
    Sparsifier(first).prune_model(80)
    for asked, held in ((80, 720), (50, 450), (90, 810)):
        m = mlp()
        m.load_state_dict(first.state_dict())
        s = Sparsifier(m)
        assert zeros(s.masks) == 720
        said = told(s.prune_model, asked)
        assert zeros(s.masks) == held and all((m.get_parameter(n)[~k] == 0).all() for n, k in s.masks.items())
        assert [re.sub(r'\s+', ' ', x) for x in said] == ([] if asked >= 80 else ['asked for 50 % zeros, got 80 % (720 weights, not 450): these zeros were there before, and those beyond 450 are free to change'])


def test_what_was_pruned_in_this_model_stays_though_less_is_asked_for():
    m = mlp()
    Sparsifier(m).prune_model(80)
    s = Sparsifier(m)
    assert told(s.prune_model, 50) == ['asked for 50 % zeros, got 80 % (720 weights, not 450): these zeros were there before, and stay'] and zeros(s.masks) == 720


# small truths

@pytest.mark.parametrize('n', range(1, 120))
def test_local_and_global_agree_on_one_layer(n):
    for percent in (10, 30, 50, 70, 90):
        lost = set()
        for method in ('local', 'global'):
            s = Sparsifier(linear(range(1, n+1)), method=method)
            quietly(s.prune_model, percent)
            lost.add(zeros(s.masks))
        assert len(lost) == 1 and abs(lost.pop() - min(percent*n/100, n-1)) <= .5


@pytest.mark.parametrize('ask', [lambda: SparsifyCallback(1), lambda: Sparsifier(mlp()).prune_model(1.), lambda: Sparsifier(mlp()).prune_layer('0', 1)])
def test_one_percent_gets_a_hint(ask):
    assert re.match(r'sparsity=1(\.0)? is one percent; did you mean 100', told(ask)[0])


@pytest.mark.parametrize('bad', [None, 'resnet18', 3])
def test_erk_of_no_module_is_refused(bad):
    with pytest.raises(ValueError, match=f'model is a {type(bad).__name__}, not a PyTorch module'): erk(bad, 50)


@pytest.mark.parametrize('spoil,says', [
    (lambda s: {'masks': list(s['masks'].values())}, 'the masks are a list; they have to be a dict'), (lambda s: {'masks': {n: 3 for n in s['masks']}}, 'is a int; it has to be a tensor'),
    (lambda s: {'masks': {n: m.tolist() for n, m in s['masks'].items()}}, 'is a list; it has to be a tensor'), (lambda s: {'masks': None}, 'the masks are a NoneType'), (lambda s: {1: 2}, 'the state has')])
def test_masks_of_a_wrong_kind_are_refused(spoil, says):
    s = Sparsifier(mlp())
    with pytest.raises(ValueError, match=says): s.load_state_dict(spoil(s.state_dict()))
    assert all(m.all() for m in s.masks.values())


def test_a_schedule_of_fastai_is_refused_or_taken_for_what_it_is():
    from fastai.callback.schedule import SchedCos, sched_cos
    with pytest.raises(ValueError, match=r'sched_cos is not a function of the position alone.*SchedCos\(0, 1\)'): SparsifyCallback(50, schedule=sched_cos)
    assert as_schedule(SchedCos(0, 1))(.5) == pytest.approx(.5)


@pytest.mark.parametrize('make', [lambda **kw: SparsifyCallback(50, **kw), lambda **kw: Sparsifier(mlp(), **kw)])
@pytest.mark.parametrize('name,meant', [('context', 'method'), ('layer_type', 'layers'), ('criterion', 'criteria'), ('granularty', 'granularity'), ('excludes', 'exclude')])
def test_names_that_other_tools_use_get_a_hint(make, name, meant):
    with pytest.raises(UnknownOption, match=f"no argument {name!r}; did you mean {meant!r}"): make(**{name: 'x'})
    assert issubclass(UnknownOption, TypeError) and issubclass(UnknownOption, ValueError)


@pytest.mark.parametrize('name,meant', [('random', 'random_score'), ('magnitude', 'large_final'), ('L1', 'large_final'), ('large_finale', 'large_final')])
def test_names_of_criteria_of_other_tools_get_a_hint(name, meant):
    with pytest.raises(ValueError, match=f'did you mean {meant!r}'): as_criterion(name)


@pytest.mark.parametrize('f', [lambda w: (w*w.grad).abs(), lambda w: w.grad.abs(), lambda w: w.abs() + 'x'])
def test_a_criterion_that_wants_what_it_is_not_given_is_told_what_it_is_given(f):
    m = mlp()
    m(torch.ones(1, 20)).sum().backward()
    with pytest.raises(ValueError, match="criterion .* failed at layer '0'.*a plain tensor, without gradient"): Sparsifier(m, criteria=f).prune_model(50)
    assert not sparsity_report(m).zeros


# warnings worth reading

@pytest.mark.parametrize('n,percent,kept,warns', [(64, 70, 19, False), (8, 70, 2, True), (3, 50, 1, True), (100, 50.4, 50, False)])
def test_the_nearest_there_is_stands_in_the_report_and_warns_only_if_it_is_far(n, percent, kept, warns):
    s = Sparsifier(nn.Conv2d(3, n, 3), 'filter')
    said = told(s.prune_model, percent)
    assert int(s.masks['weight'].flatten(1).any(1).sum()) == kept and bool(said) == warns
    assert f'asked for {percent:.4g} % zeros, got' in str(s.report()) and 'the nearest that whole groups of filter allow' in str(s.report())


def test_what_could_not_be_followed_is_told_at_the_start_of_a_fit_once():
    class Branch(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        def forward(self, x): return self.fc(self.bn(self.conv(x) if float(x.sum()) > 0 else -self.conv(x)).mean((2, 3)))
    learn, cb, when = learner(Branch()), SparsifyCallback(50, 'filter'), []
    with warnings.catch_warnings():
        warnings.showwarning = lambda m, *_, **__: when.append((str(m), learn.epoch if hasattr(learn, 'train_iter') and learn.train_iter else 'start'))
        warnings.simplefilter('always', SparsityWarning)
        fit(learn, 2, cbs=cb), fit(learn, 1, cbs=cb)
    assert [(m[:12], t) for m, t in when if 'could not be' in m] == [('The data flo', 'start')]


# in a fit the first batch is watched

def segmenter(depthwise=False):
    seed()
    middle = [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()] if depthwise else []
    return nn.Sequential(*conv(1, 8), *middle, nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_outputs_of_the_model_are_no_filters_unless_they_are_named():
    learn, cb = learner(segmenter()), SparsifyCallback(50, 'filter')
    fit(learn, 2, cbs=cb)
    assert list(cb.sparsifier.targets) == ['0.weight'] and (learn.model[3].weight != 0).all() and share(learn.model[0]) == 50
    assert 'its outputs are outputs of the model' in cb.sparsifier.left_dense['3'] and '3 is left dense: its outputs are outputs' in str(cb.report)
    assert column(learn)[-1] == 50
    learn, cb = learner(segmenter()), SparsifyCallback(50, 'filter', 'local', layers=nn.Conv2d)
    said = told(fit, learn, 2, cbs=cb)
    assert share(learn.model[3]) == 50 and '3: what is pruned there is an output of the model' in str(cb.report), said


def test_without_an_example_outputs_of_the_model_are_told():
    model = segmenter()
    s = Sparsifier(model, 'filter', 'local')
    assert not any('output of the model' in n for n in s.report().notes)
    s.prune_model(50)
    assert any(n.startswith('3: what is pruned there is an output of the model') for n in s.report().notes)
    s = Sparsifier(segmenter(), 'filter', example_input=torch.randn(2, 1, 8, 8))
    assert list(s.targets) == ['0.weight'] and '3' in s.left_dense


def test_a_depthwise_channel_behind_a_pruned_filter_is_zero_after_a_fit():
    learn, cb = learner(segmenter(True)), SparsifyCallback(50, 'filter', 'local', layers='0')
    with torch.no_grad(): learn.model[4].bias.fill_(1)
    fit(learn, 2, cbs=cb)
    dead = ~cb.sparsifier.masks['0.weight'].flatten(1).any(1)
    out = learn.model[:6].eval()(torch.randn(4, 1, 8, 8))
    assert dead.sum() == 4 and not out[:, dead].any() and not told(Sparsifier, learn.model)
    s = Sparsifier(segmenter(True), 'filter', 'local', layers='0')
    s.prune_model(50)
    assert any('3: what becomes of pruned outputs there cannot be told from the code; pass example_input=' in n for n in s.report().notes)


def test_steps_of_a_sequence_are_no_features():
    "A BatchNorm1d behind a Linear may be over features, or over steps"
    def model():
        seed()
        m = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        nn.init.ones_(m[1].bias)
        return m
    m = model()
    s = Sparsifier(m, 'row', 'local', layers='0', example_input=torch.randn(5, 8, 4))
    s.prune_model(50)
    assert (m[1].bias == 1).all() and not s._unclear
    m = model()
    s = Sparsifier(m, 'row', 'local', layers='0', example_input=torch.randn(5, 4))
    s.prune_model(50)
    assert int((m[1].bias == 0).sum()) == 4
    s = Sparsifier(model(), 'row', 'local')
    s.prune_model(50)
    assert any(n.startswith('1: what becomes of pruned outputs there cannot be told') for n in s.report().notes)


def test_watching_the_first_batch_leaves_training_as_it_was():
    seed()
    model = nn.Sequential(*conv(1, 8), nn.Dropout(.5), *conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    plain, watched = (learner(copy.deepcopy(model), loaders(shuffle=True)) for _ in range(2))
    for learn, cbs in ((plain, None), (watched, SparsifyCallback(0, 'filter'))):
        seed(1)
        fit(learn, 2, cbs=cbs)
    assert same(state_of(plain.model), state_of(watched.model))


def test_every_word_of_a_tied_embedding_keeps_a_weight_in_one_ranking_with_larger_layers():
    seed()
    m = LM()
    with torch.no_grad(): m.encoder.weight.mul_(.01)
    s = Sparsifier(m, layers=['decoder', 'ff'])
    said = told(s.prune_model, 80)
    assert zeros(s.masks) == round(.8*(50*16 + 16*16)) and (m.encoder.weight != 0).any(1).all() and said[0].startswith('decoder is down to the least')


def test_a_fit_with_local_or_movement_does_not_empty_the_first_classes_of_a_head_that_starts_at_zero():
    for kw in (dict(method='local'), dict(criteria='movement'), dict(criteria='updating_movement')):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        nn.init.zeros_(model[3].weight)
        learn, cb = learner(model, lr=1e-2), SparsifyCallback(80, **kw)
        quietly(fit, learn, 2, cbs=cb)
        assert (model[3].weight != 0).any(1).all() and abs(cb.current_sparsity - 80) < .01, kw


def test_a_layer_in_which_nothing_has_moved_waits():
    s = Sparsifier(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), method='local', criteria='movement')
    plan = s.plan(50)
    assert s.advance(plan, .5) == 0
    s.model[1].weight.data.add_(torch.randn(10, 10))
    assert s.advance(plan, .5) == 12.5 and s.advance(plan, 1) == 50


def test_a_trial_brings_back_weights_that_got_new_storage():
    seed()
    m = mlp()
    s, before = Sparsifier(m), state_of(m)
    with s.trial():
        s.prune_model(50)
        m.double()
    assert same(before, state_of(m.float())) and s.planned() == 0
    with s.trial(): s.prune_model(50)
    again = Sparsifier(m)
    again.prune_model(20)
    assert again.planned() == 20, 'a trial is no pruning'


def test_what_was_pruned_before_is_told_from_zeros_that_nobody_pruned():
    m = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    nn.init.eye_(m[0].weight), nn.init.eye_(m[2].weight)
    quietly(Sparsifier(m).prune_model, 10)
    s = Sparsifier(m)
    quietly(s.prune_model, 20)
    assert s.planned() == 20
    quietly(Sparsifier(m).prune_model, 90)
    s = Sparsifier(m)
    quietly(s.prune_model, 20)
    assert s.planned() == 90


def test_a_run_with_filters_that_left_the_outputs_of_the_model_is_resumed():
    cb = SparsifyCallback(50, 'filter')
    fit(learner(segmenter()), 1, cbs=cb)
    state, again = cb.state_dict(), SparsifyCallback(50, 'filter')
    again.load_state_dict(state)
    fit(learner(segmenter()), 2, cbs=again, start_epoch=1)
    assert again.current_sparsity == 50
    with pytest.raises(ValueError, match='the state is a NoneType'): again.load_state_dict(None)


class Mixed:
    def forward(self, x): return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class MixedConv(Mixed, nn.Conv2d): pass


class Rotated(nn.Linear):
    def forward(self, x): return nn.functional.linear(x, torch.ones(8, 8)@self.weight, self.bias)


class Storing(nn.Linear):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class Clamped(nn.Linear):
    def forward(self, x): return nn.functional.linear(x, (self.weight*8).round().clamp(-3, 3).tril(), self.bias)


@pytest.mark.parametrize('layer,dense', [(MixedConv(4, 8, 3), True), (Rotated(4, 8), True), (Storing(4, 8), False), (Clamped(4, 8), False)])
def test_forwards_are_tried_and_not_judged_by_their_operations(layer, dense):
    if isinstance(layer, Storing): layer(torch.randn(2, 4))
    assert ('0' in Sparsifier(nn.ModuleList([layer, nn.Linear(4, 4)])).left_dense) == dense


def test_a_forward_that_was_set_on_a_layer_is_tried_too():
    import types
    m = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    m[0].forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight - self.weight.mean(), self.bias), m[0])
    assert list(Sparsifier(m).left_dense) == ['0']


def test_a_weight_of_another_shape_is_not_the_one_that_was_looked_at():
    m = mlp()
    s = Sparsifier(m)
    m[0].weight = nn.Parameter(torch.randn(10, 20))
    with pytest.raises(ValueError, match=r"weight of layer '0' has the shape \(10, 20\) now"): s.prune_model(50)


def test_a_head_of_zeros_with_a_chance_value_keeps_its_share():
    seed()
    m = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(m[2].weight)
    m[2].weight.data[0, 0] = 1e-9
    s = Sparsifier(m)
    assert told(s.prune_model, 80)
    kept = s.masks['2.weight'].sum(1)
    assert kept.sum() == 128 and kept.min() == 12


def test_nothing_pruned_says_nothing_of_zeros():
    m = nn.Linear(20, 20)
    nn.init.eye_(m.weight)
    Sparsifier(m).prune_model(0)
    s = Sparsifier(m)
    quietly(s.prune_model, 20)
    assert s.planned() == 20


def test_a_harmless_forward_that_was_set_on_a_layer_is_no_reason():
    import types
    m = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    m[0].forward = types.MethodType(lambda self, x: nn.functional.linear(x, 2*self.weight, self.bias), m[0])
    assert not Sparsifier(m).left_dense
    m[0].forward = lambda x: x
    assert 'could not be tried' in Sparsifier(m).left_dense['0']
