"Any tensor of any layer: recurrent layers, attention, embeddings, a user's own"
import copy
import pickle
import warnings

import pytest
import torch
from core_helpers import CRITERIA, invent
from fastai_helpers import Journal, fit, learner, regrown
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from fastsparse.callback import PlanCallback, SparsifyCallback
from fastsparse.granularity import NM, Outputs, _layer_types, available_granularities, layer_type, prunable_params, register_layer
from fastsparse.report import sparsity_report
from fastsparse.select import find_targets, places
from fastsparse.sparsifier import Sparsifier, SparsityWarning


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        yield


class Experts(nn.Module):
    "A bank of experts, and a router whose parameter has a name of its own"
    def __init__(self, experts=4, ni=8, no=8):
        super().__init__()
        self.bank, self.router = nn.Parameter(torch.randn(experts, no, ni)), nn.Parameter(torch.randn(experts, ni))

    def forward(self, x): return torch.einsum('bi,eoi,be->bo', x, self.bank, (x@self.router.t()).softmax(-1))


@pytest.fixture(autouse=True, scope='module')
def _register():
    before = dict(_layer_types)
    register_layer(Experts, 'expert out in', dict(weight='expert out in', row='expert out', column='expert in', expert='expert'), 'bank')
    register_layer(Experts, 'expert in', dict(weight='expert in', row='expert', column='in'), 'router')
    yield
    _layer_types.clear()
    _layer_types.update(before)


class Named(nn.Module):
    "A layer in a model, under a name"
    def __init__(self, layer): super().__init__(); self.layer = layer


LAYERS = {
    'LSTM': lambda: nn.LSTM(8, 8, 2, bidirectional=True), 'LSTM projected': lambda: nn.LSTM(8, 16, proj_size=4), 'GRU': lambda: nn.GRU(8, 12), 'RNN': lambda: nn.RNN(8, 12),
    'LSTMCell': lambda: nn.LSTMCell(8, 8), 'GRUCell': lambda: nn.GRUCell(8, 8), 'RNNCell': lambda: nn.RNNCell(8, 8), 'attention': lambda: nn.MultiheadAttention(16, 4),
    'attention, separate': lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12), 'bilinear': lambda: nn.Bilinear(8, 4, 6), 'embedding': lambda: nn.Embedding(20, 8), 'bag': lambda: nn.EmbeddingBag(20, 8),
    'experts': Experts, 'GRU both ways': lambda: nn.GRU(8, 12, bidirectional=True), 'LSTM projected both ways': lambda: nn.LSTM(8, 16, bidirectional=True, proj_size=4),
    'Conv1D': lambda: hugging_face_conv1d(16, 8), 'AWD-LSTM': lambda: awd_lstm(8, 12), 'linear': lambda: nn.Linear(8, 12), 'conv': lambda: nn.Conv2d(8, 12, 3, groups=2), 'transposed': lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
}
SEQUENCES, BATCHES = torch.randn(5, 3, 8), torch.randn(3, 8) # time first
INPUTS = {
    **dict.fromkeys(['LSTM', 'LSTM projected', 'GRU', 'RNN', 'GRU both ways', 'LSTM projected both ways', 'AWD-LSTM'], (SEQUENCES,)), **dict.fromkeys(['experts', 'Conv1D', 'linear'], (BATCHES,)),
    'LSTMCell': (BATCHES, (BATCHES + 1, BATCHES)), **dict.fromkeys(['GRUCell', 'RNNCell'], (BATCHES, BATCHES + 1)),
    'attention': (torch.randn(5, 3, 16),)*3, 'attention, separate': (torch.randn(5, 3, 16), torch.randn(4, 3, 8), torch.randn(4, 3, 12)), 'bilinear': (BATCHES, torch.randn(3, 4)),
    **dict.fromkeys(['embedding', 'bag'], (torch.arange(20).view(4, 5),)), **dict.fromkeys(['conv', 'transposed'], (torch.randn(2, 8, 6, 6),)),
}
TARGETS = {
    'LSTM': [f'weight_{w}_l{i}{r}' for i in (0, 1) for r in ('', '_reverse') for w in ('ih', 'hh')], 'LSTM projected': ['weight_ih_l0', 'weight_hh_l0', 'weight_hr_l0'], 'GRU': ['weight_ih_l0', 'weight_hh_l0'],
    'RNN': ['weight_ih_l0', 'weight_hh_l0'], 'LSTMCell': ['weight_ih', 'weight_hh'], 'GRUCell': ['weight_ih', 'weight_hh'], 'RNNCell': ['weight_ih', 'weight_hh'],
    'attention': ['in_proj_weight', 'out_proj.weight'], 'attention, separate': ['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'out_proj.weight'], 'bilinear': ['weight'], 'embedding': ['weight'], 'bag': ['weight'],
    'experts': ['bank', 'router'], 'GRU both ways': [f'weight_{w}_l0{r}' for r in ('', '_reverse') for w in ('ih', 'hh')], 'LSTM projected both ways': [f'weight_{w}_l0{r}' for r in ('', '_reverse') for w in ('ih', 'hh', 'hr')],
    'AWD-LSTM': ['weight_hh_l0_raw', 'module.weight_ih_l0'], **dict.fromkeys(['Conv1D', 'linear', 'conv', 'transposed'], ['weight']),
}


def hugging_face_conv1d(no, ni):
    "The layer of GPT-2, or where that is not installed another one of its name: inputs first"
    try: from transformers.pytorch_utils import Conv1D
    except ImportError:
        def forward(self, x): return torch.addmm(self.bias, x, self.weight)
        layer = type('Conv1D', (nn.Module,), {'__module__': 'transformers.pytorch_utils', 'forward': forward})()
        layer.weight, layer.bias = nn.Parameter(torch.randn(ni, no)), nn.Parameter(torch.zeros(no))
        return layer
    return Conv1D(no, ni)


def awd_lstm(ni, nh):
    from fastai.text.models.awdlstm import WeightDropout
    return WeightDropout(nn.LSTM(ni, nh), .3)


def make(kind):
    torch.manual_seed(0)
    return Named(LAYERS[kind]())


@pytest.mark.parametrize('kind', LAYERS)
def test_all_matrices_of_each_type_are_targets(kind):
    s = Sparsifier(make(kind), layers='layer')
    assert list(s.targets) == [f'layer.{n}' for n in TARGETS[kind]] and not s.left_dense
    assert {n for n, p in s.model.named_parameters() if p.dim() > 1} == set(s.targets)


@torch.no_grad()
def outputs(m, inputs, weights=None):
    "What the layer puts out in training and in evaluation, with its own parameters or with others"
    found = []
    for mode in (True, False):
        m.train(mode)
        torch.manual_seed(0) # of dropout
        y = torch.func.functional_call(m.layer, weights or {}, inputs)
        found += [t.detach().clone() for t in tree_leaves(y) if isinstance(t, torch.Tensor)]
    return found


@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'row', 'column', 'output', '2:4'])
@pytest.mark.parametrize('kind', LAYERS)
def test_counts_are_exact_and_the_forward_uses_the_zeros(kind, granularity, method):
    m = make(kind)
    try: s = Sparsifier(m, granularity, method, layers='layer')
    except ValueError as e:
        assert "no layer to prune by 2:4" in str(e) and "NM(2, 4, 'feature')" in str(e) and kind in ('embedding', 'bag') and granularity == '2:4'
        return
    assert set(s.targets) == {f'layer.{n}' for n in TARGETS[kind]} and not s.left_dense
    weights = {n: t.weight.clone() for n, t in s.targets.items()}
    for percent in (50,) if granularity == '2:4' else (50, 90):
        s.prune_model(percent)
        sizes, gone = {n: t.size for n, t in s.targets.items()}, {n: int((~s.masks[n]).sum()) for n in s.targets}
        if method == 'local' or granularity == '2:4':
            for n, t in s.targets.items():
                best = min(abs(k*t.groups.step - percent*sizes[n]/100) for k in range(t.groups.n))
                assert abs(gone[n] - percent*sizes[n]/100) == pytest.approx(best)
        else:
            most = sum(t.size - t.groups.step for t in s.targets.values())
            assert abs(sum(gone.values()) - min(percent*sum(sizes.values())/100, most)) <= max(t.groups.step for t in s.targets.values())
        assert all(not t.weight[~s.masks[n]].any() for n, t in s.targets.items())
        assert s.report().zeros == sum(gone.values()) and s.sparsity() == pytest.approx(100*sum(gone.values())/sum(sizes.values()))
        masked = {n.removeprefix('layer.'): p for n, p in m.named_parameters()} | {n.removeprefix('layer.'): w*s.masks[n] for n, w in weights.items()}
        now, meant = outputs(m, INPUTS[kind]), outputs(make(kind), INPUTS[kind], masked)
        assert all(torch.equal(a, b) for a, b in zip(now, meant)), 'its forward uses the zeros'
        for n in [n.removeprefix('layer.') for n in weights if percent == 50 and method == 'local']: # every one of them
            rest = {k: w for k, w in masked.items() if k != n}
            assert not all(torch.equal(a, b) for a, b in zip(now, outputs(make(kind), INPUTS[kind], rest)))


def dead(w, axis, size):
    "Blocks of `size` along an axis that are zero altogether"
    return (w.detach().movedim(axis, 0).reshape(-1, size, *[n for d, n in enumerate(w.shape) if d != axis]) == 0).flatten(1).all(1)


def test_a_gate_a_unit_and_a_head_are_what_their_names_say():
    m = make('GRU')
    with torch.no_grad(): m.layer.weight_ih_l0[12:24] *= .01 # the second of three gates
    Sparsifier(m, 'gate', 'local').prune_layer('layer.weight_ih_l0', 34)
    assert dead(m.layer.weight_ih_l0, 0, 12).tolist() == [False, True, False]
    m = make('GRU')
    with torch.no_grad(): m.layer.weight_hh_l0.view(3, 12, 12)[:, 5] *= .01
    Sparsifier(m, 'unit', 'local').prune_layer('layer.weight_hh_l0', 9)
    assert dead(m.layer.weight_hh_l0, 0, 1).nonzero().flatten().tolist() == [5, 17, 29]
    m = make('attention')
    with torch.no_grad(): m.layer.in_proj_weight.view(3, 4, 4, 16)[:, 2] *= .01
    Sparsifier(m, 'head', 'local').prune_layer('layer.in_proj_weight', 25)
    assert dead(m.layer.in_proj_weight, 0, 4).nonzero().flatten().tolist() == [2, 6, 10]
    m = make('experts')
    with torch.no_grad(): m.layer.bank[3] *= .01
    Sparsifier(m, 'expert', 'local').prune_model(25)
    assert dead(m.layer.bank, 0, 1).tolist() == [False, False, False, True]


def test_two_of_four_along_the_input():
    m = make('LSTM')
    s = Sparsifier(m, NM(2, 4))
    s.prune_model(50)
    for t in s.targets.values(): assert ((t.weight != 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize('criterion', CRITERIA)
def test_every_criterion(criterion):
    s = invent(Sparsifier(make('attention'), criteria=criterion))
    for t in s.targets.values(): t.parameter.data.add_(torch.randn_like(t.weight)*.1)
    s.prune_model(60)
    assert s.sparsity() == pytest.approx(60, abs=.1)


# embeddings

class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.rnn, self.ff, self.decoder = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16), nn.Linear(16, 50)
        self.decoder.weight = self.encoder.weight

    def forward(self, x): return self.decoder(self.ff(self.rnn(self.encoder(x))[0]))


@pytest.mark.parametrize('layers, pruned', [(None, False), (nn.Embedding, True), ('encoder', True), ('enc*', True), ('*', True), ('decoder', True), ('encoder.weight', True), (lambda n, m: n == 'encoder', True), (['rnn', 'encoder'], True)])
def test_an_embedding_is_pruned_when_it_is_named(layers, pruned):
    s = Sparsifier(LM(), layers=layers)
    assert ('encoder.weight' in s.targets) == pruned and (pruned or 'only when it is named' in s.left_dense['encoder'])
    if layers is None: assert list(s.targets) == ['rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'ff.weight'] and 'encoder is left dense: as the tensor of an Embedding' in str(s.report())


def test_a_container_does_not_name_an_embedding():
    m = nn.Sequential(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)), nn.Linear(4, 2))
    for layers in (nn.Sequential, m[0], m): assert '0.0.weight' not in Sparsifier(m, layers=layers).targets
    assert '0.0.weight' in Sparsifier(m, layers='0.*').targets


def test_where_there_is_nothing_else_an_embedding_is_pruned():
    class Dot(nn.Module):
        def __init__(self): super().__init__(); self.users, self.items = nn.Embedding(20, 8), nn.Embedding(30, 8)
    s = Sparsifier(Dot())
    assert list(s.targets) == ['users.weight', 'items.weight'] and not s.left_dense
    with pytest.raises(ValueError, match='left out'): Sparsifier(Dot(), exclude=nn.Embedding)


def test_words_and_features_of_an_embedding():
    m = make('embedding')
    s = Sparsifier(m, 'row', 'local')
    s.prune_model(50)
    assert (m.layer.weight == 0).all(1).sum() == 10
    t = Sparsifier(make('embedding'), 'output', 'local')
    t.prune_model(50)
    assert (t.model.layer.weight == 0).all(0).sum() == 4


# by name

def test_selectors_name_parameters():
    m = LM()
    names = lambda **kwargs: list(Sparsifier(m, **kwargs).targets) # noqa: E731
    assert names(layers='rnn.weight_hh_l0') == ['rnn.weight_hh_l0'] and names(layers='*_ih_*') == ['rnn.weight_ih_l0']
    assert names(exclude='*.weight_hh_l0') == ['rnn.weight_ih_l0', 'ff.weight'] and names(layers=nn.LSTM, exclude='rnn.weight_ih_l0') == ['rnn.weight_hh_l0']
    s = Sparsifier(m, method='local')
    s.prune_model({'rnn': 50, '*_hh_*': 75, 'ff': 25})
    assert [round(r.percent) for r in s.report().layers] == [50, 75, 25]
    with pytest.raises(ValueError, match='matches no layer'): Sparsifier(m, layers='rnn.weight_zz')


def test_prune_layer_takes_a_layer_or_one_of_its_parameters():
    m = LM()
    s = Sparsifier(m, method='local')
    s.prune_layer('rnn', 50)
    assert [round(r.percent) for r in s.report().layers] == [50, 50, 0]
    s.prune_layer('rnn.weight_hh_l0', 75)
    s.prune_layer(m.ff, 25)
    assert [(r.name, round(r.percent)) for r in s.report().layers] == [('rnn.weight_ih_l0', 50), ('rnn.weight_hh_l0', 75), ('ff', 25)]


def test_tensors_that_are_shared_are_one_target():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.RNN(8, 8), nn.Linear(8, 8)
            self.fc.weight = self.rnn.weight_hh_l0
    m = Tied()
    s = Sparsifier(m)
    assert list(s.targets) == ['rnn.weight_ih_l0', 'rnn.weight_hh_l0']
    s.prune_layer('fc', 50)
    assert (m.fc.weight == 0).sum() == 32 and not s.left_dense


def test_types_that_are_known_by_name_only():
    Conv1D = type('Conv1D', (nn.Module,), {'__module__': 'transformers.pytorch_utils'})
    m = nn.Sequential(Conv1D(), nn.Linear(4, 4))
    m[0].weight = nn.Parameter(torch.randn(6, 8)) # inputs first
    s = Sparsifier(m, 'row', 'local', layers='0')
    s.prune_model(50)
    assert (m[0].weight == 0).all(0).sum() == 4 and s.report().layers[0].filters == 8


@pytest.mark.parametrize('axes, says', [('(gate:4 hidden:2) in', 'one part without a size'), ('(a b) in', 'one part without a size'), ('in in', 'names of their own')])
def test_axes_that_cannot_be_read(axes, says):
    with pytest.raises(ValueError, match=says): register_layer(Experts, axes, {}, 'nothing')


def test_what_is_known_of_a_type():
    assert available_granularities(nn.LSTM) == ['weight', 'row', 'column', 'unit', 'gate', 'layer'] and 'head' in available_granularities(nn.MultiheadAttention)
    assert prunable_params(nn.LSTM(2, 3)) == ['weight_ih_l0', 'weight_hh_l0'] and layer_type(nn.LSTM, 'bias_ih_l0') is None and layer_type(nn.LSTM) is None
    assert [p.name for p in places(LM())] == ['encoder.weight', 'rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'ff.weight', 'decoder.weight']
    assert [r.name for r in sparsity_report(LM()).layers] == ['rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'ff', 'decoder']


def test_outputs_of_convolutions_and_linears_in_one_call():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.Flatten(), nn.Linear(54, 10))
    s = Sparsifier(m, 'output', 'local')
    s.prune_model(50)
    assert [Outputs().groups(layer, param).n for layer, param in ((nn.LSTM(4, 8), 'weight_ih_l0'), (nn.MultiheadAttention(8, 2), 'in_proj_weight'), (nn.Embedding(9, 5), 'weight'))] == [8, 24, 5]
    assert [r.dead_filters for r in s.report().layers] == [4, 3, 5] and (m[0].bias[(m[0].weight == 0).flatten(1).all(1)] == 0).all()
    assert str(Outputs()) == 'output'


def test_a_granularity_of_somebody_else_that_knows_only_weights():
    class Mine:
        def groups(self, layer): return Outputs().groups(layer)
    targets, dense = find_targets(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1)), Mine())
    assert len(targets) == 2 and not dense


# in a fit

def sequences(m):
    "Digits as sequences of rows"
    class Rows(nn.Module):
        def __init__(self): super().__init__(); self.net, self.head = m, nn.Linear(16, 10)
        def forward(self, x):
            y = self.net(x[:, 0])
            return self.head((y[0] if isinstance(y, tuple) else y)[:, -1])
    return Rows()


class SelfAttention(nn.Module):
    def __init__(self): super().__init__(); self.up, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 4, batch_first=True)
    def forward(self, x): return self.attention(self.up(x), self.up(x), self.up(x), need_weights=False)[0]


@pytest.mark.parametrize('granularity', ['weight', 'row', '2:4'])
@pytest.mark.parametrize('make', [lambda: nn.LSTM(8, 16, batch_first=True), lambda: nn.GRU(8, 16, batch_first=True), SelfAttention, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_zeros_stay_in_a_fit(make, granularity):
    m = make()
    if isinstance(m, nn.TransformerEncoderLayer): m = nn.Sequential(m, nn.Linear(8, 16))
    learn, cb = learner(sequences(m)), SparsifyCallback(50, granularity, 'local', exclude='head')
    journal = Journal(cb)
    fit(learn, 2, [cb, journal])
    assert cb.current_sparsity == pytest.approx(50, abs=3) and journal.regrown == 0 and journal.dense_state == 0
    state = copy.deepcopy(cb.sparsifier.state_dict())
    other = Sparsifier(copy.deepcopy(learn.model), granularity, 'local', exclude='head')
    other.load_state_dict(state)
    assert other.sparsity() == cb.current_sparsity


def language_model():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    return get_language_model(AWD_LSTM, 30, config=dict(awd_lstm_lm_config, emb_sz=16, n_hid=24, n_layers=2))


def test_awd_lstm_is_zero_where_its_forward_uses_it():
    from fastai.callback.rnn import ModelResetter, RNNCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    x = torch.randint(0, 30, (48, 6), generator=torch.Generator().manual_seed(0))
    items = list(zip(x, x.roll(-1, 1)))
    learn = learner(language_model(), DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)), metrics=[], cbs=[ModelResetter, RNNCallback])
    cb = SparsifyCallback(80)
    fit(learn, 2, cb)
    s = cb.sparsifier
    assert list(s.targets) == [f'0.rnns.{i}.{n}' for i in (0, 1) for n in ('weight_hh_l0_raw', 'module.weight_ih_l0')] and '0.encoder' in s.left_dense
    assert s.sparsity() == pytest.approx(80, abs=.1) and s.reach() > 85
    learn.model.eval()
    with torch.no_grad(): learn.model(x[:8])
    for i, rnn in enumerate(learn.model[0].rnns): assert not rnn.module.weight_hh_l0.detach()[~s.masks[f'0.rnns.{i}.weight_hh_l0_raw']].any()
    assert (learn.model[0].encoder.weight != 0).all()


def test_two_callbacks_on_the_parameters_of_one_layer():
    learn = learner(sequences(nn.LSTM(8, 16, batch_first=True)))
    one, two = SparsifyCallback(50, layers='*_ih_*'), SparsifyCallback(75, layers='*_hh_*')
    fit(learn, 1, [one, two])
    assert (one.current_sparsity, two.current_sparsity) == (50, 75)
    with pytest.raises(ValueError, match='prune the same layers: net.weight_hh_l0'): fit(learn, 1, [SparsifyCallback(50), SparsifyCallback(75, layers='*_hh_*')])


# before it is done

def test_a_dry_run_lists_every_matrix_and_changes_nothing():
    m = LM()
    m.extra = nn.Parameter(torch.ones(3, 4))
    before = copy.deepcopy(m.state_dict())
    s = Sparsifier(m, 'row', 'local', exclude='ff')
    d = s.dry_run(50)
    assert [r.name for r in d.layers] == ['extra', 'encoder.weight', 'rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'ff.weight']
    assert [r.zeros for r in d.layers] == [0, 0, 512, 512, 0] and [bool(r.plan) for r in d.layers] == [False, False, True, True, False]
    assert 'not a prunable type' in d.layers[0].why and 'only when it is named' in d.layers[1].why and 'left out' in d.layers[4].why
    assert d.layers[2].groups == (32, 64) and 'row, local, large_final' in str(d) and 'dense: left out' in str(d) and '<table>' in d._repr_html_() and len(d.to_dataframe()) == 5
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and s.sparsity() == 0 and all(k.all() for k in s.masks.values())
    s.prune_model(50)
    assert [r.zeros for r in s.report().layers] == [512, 512], 'what it said'


def test_a_dry_run_says_what_follows_and_what_is_asked_in_vain():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    d = Sparsifier(m, 'filter', 'local', example_input=torch.randn(2, 3, 8, 8)).dry_run(50)
    assert set(d.layers[0].follows) == {'0.bias', '1.weight', '1.bias'} and d.layers[1].why.startswith('its outputs are outputs of the model')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'asked for 50 % zeros' in str(Sparsifier(nn.Linear(3, 3), 'row', 'local').dry_run(50))
    with pytest.raises(ValueError, match='did you mean 50'): Sparsifier(nn.Linear(3, 3)).dry_run(.5)


def test_a_dry_run_of_a_callback():
    learn = learner()
    before, rng = copy.deepcopy(learn.model.state_dict()), torch.get_rng_state()
    d = SparsifyCallback(50, 'coupled', 'local').dry_run(learn)
    assert [r.name for r in d.layers if r.plan] == ['0.weight', '3.weight'] and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and learn.opt is None


# a plan in one value

def test_a_plan_treats_layers_differently_and_later_keys_win():
    learn = learner()
    cb = SparsifyCallback({nn.Conv2d: dict(sparsity=50, granularity='filter', method='local'), '3': dict(sparsity=50, granularity='2:4'), nn.Linear: 80, '0': None})
    assert isinstance(cb, SparsifyCallback) and type(copy.deepcopy(cb)) is type(cb)
    d = cb.dry_run(learn)
    assert [bool(r.plan) for r in d.layers] == [False, True, True] and '2:4' in d.layers[1].plan
    fit(learn, 2, cb)
    conv = learn.model[3].weight
    assert ((conv != 0).view(16, 2, 4, 3, 3).sum(2) == 2).all() and (learn.model[0].weight != 0).all() and [round(r.percent) for r in cb.report.layers] == [50, 80]
    assert cb.current_sparsity == cb.report.sparsity and len(cb.parts) == 2 and learn.recorder.metric_names[-3:] == ['sparsity', 'sparsity_2', 'time']


def test_equal_settings_are_one_ranking():
    learn = learner(sequences(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))))
    cb = SparsifyCallback({'net.0': dict(sparsity=50), 'net.2': 50, 'net.4': 75, 'head': None}, schedule='one_shot')
    fit(learn, 1, cb)
    assert [sorted(p.sparsifier.targets) for p in cb.parts] == [['net.0.weight', 'net.2.weight'], ['net.4.weight']]
    assert [round(p.current_sparsity) for p in cb.parts] == [50, 75] and all(len(p.history) == 1 for p in cb.parts)


def test_parts_may_have_schedules_of_their_own_and_go_on_elsewhere():
    plan = {'0': dict(sparsity=50, schedule='one_shot'), '3': dict(sparsity=75, schedule='lin')}
    learn, cb = learner(), SparsifyCallback(plan)
    fit(learn, 2, cb)
    assert len(cb.parts[0].history) == 1 and len(cb.parts[1].history) > 1
    again, other = SparsifyCallback(plan), learner()
    again.load_state_dict(cb.state_dict())
    other.model.load_state_dict(learn.model.state_dict())
    fit(other, 1, again)
    assert all(torch.equal(a.sparsifier.masks[n], k) for a, b in zip(again.parts, cb.parts) for n, k in b.sparsifier.masks.items())


def test_coupled_channels_and_single_weights_in_one_plan():
    learn = learner()
    cb = SparsifyCallback({nn.Conv2d: dict(sparsity=50, granularity='coupled', method='local'), nn.Linear: 90})
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, cbs=cb)
    assert [r.dead_filters for r in cb.report.layers[:2]] == [4, 8] and round(cb.report.layers[2].percent) == 90


@pytest.mark.parametrize('plan, kwargs, says', [({'0': dict(granularity='filter')}, {}, 'have no sparsity'), ({'0': dict(sparsity=50, granulrity='filter')}, {}, "did you mean 'granularity'"),
    ({'0': dict(sparsity=.5)}, {}, 'did you mean 50'), ({'0': dict(sparsity=50, layers='3')}, {}, 'the key says which layers'), ({'0': dict(sparsity=50)}, dict(layers='3'), 'leave layers= out'),
    ({'0': dict(sparsity=60, granularity='2:4')}, {}, 'ask for 50'), ({3: dict(sparsity=60)}, {}, 'selects nothing')])
def test_mistakes_in_a_plan(plan, kwargs, says):
    with pytest.raises((ValueError, TypeError), match=says): SparsifyCallback(plan, **kwargs)


def test_mistakes_in_a_plan_that_the_model_shows():
    with pytest.raises(ValueError, match='matches no layer'): fit(learner(), 1, SparsifyCallback({'nope': dict(sparsity=50)}))
    with pytest.raises(ValueError, match='leaves all layers dense'): fit(learner(), 1, SparsifyCallback({'0': dict(sparsity=50)}, exclude='0'))
    with pytest.raises(ValueError, match='prune the same layers'): fit(learner(), 1, [SparsifyCallback({'0': dict(sparsity=50)}), SparsifyCallback(50)])


NORMED = {
    'weight_norm': lambda m, p: nn.utils.parametrizations.weight_norm(m, p), 'spectral_norm': lambda m, p: nn.utils.parametrizations.spectral_norm(m, p),
    'old weight_norm': lambda m, p: nn.utils.weight_norm(m, p), 'old spectral_norm': lambda m, p: nn.utils.spectral_norm(m, p),
    'prune': lambda m, p: prune.l1_unstructured(m, p, .3),
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*')
@pytest.mark.parametrize('kind, param', [('GRU', 'weight_hh_l0'), ('attention', 'in_proj_weight')])
@pytest.mark.parametrize('normed', NORMED)
def test_what_a_parameter_is_computed_from_is_no_target(normed, kind, param):
    m = make(kind)
    rest = [f'layer.{n}' for n in TARGETS[kind] if n != param]
    NORMED[normed](m.layer, param)
    s = Sparsifier(m)
    assert list(s.targets) == rest and list(s.left_dense) == [f'layer.{param}']
    assert f'remove_weight_norm(layer, {param!r})' in s.left_dense[f'layer.{param}'] and s.reach() < 80
    before = {n: p.clone() for n, p in m.named_parameters() if n not in rest}
    rows = s.dry_run(50).layers
    s.prune_model(50)
    assert s.sparsity() == pytest.approx(50, abs=1) and all(torch.equal(p, m.get_parameter(n)) for n, p in before.items())
    assert all('is computed at each forward' in r.why for r in rows if not r.plan)


def test_a_pattern_means_only_what_is_there():
    class Bank(nn.ParameterList): pass
    register_layer(Bank, 'out in', dict(weight='out in'), '*')
    m = nn.Sequential(Bank([nn.Parameter(torch.randn(4, 4)) for _ in range(2)]))
    s = Sparsifier(m)
    assert list(s.targets) == ['0.0', '0.1'] and not s.left_dense and s.reach() == 100


@pytest.mark.parametrize('axes, says', [('out in k', r'shape \(6, 4\).*axes out, in, k'), ('(gate:4 out) in', 'does not divide by 4 .gate:4.'),
    ('(gate:heads out) in', "'heads' of a part of an axis.*it is None")])
def test_axes_that_do_not_fit_the_tensor(axes, says):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(6, 4))
    register_layer(Odd, axes, dict(weight='out in', row='out'))
    s = Sparsifier(nn.Sequential(Odd(), nn.Linear(4, 4)), 'row')
    assert list(s.targets) == ['1.weight'] and list(s.left_dense) == ['0']
    with pytest.raises(ValueError, match=says): Sparsifier(nn.Sequential(Odd(), nn.Linear(4, 4)), 'row', layers='0')


@pytest.mark.parametrize('cls, axes, says', [(nn.ReLU(), 'out in', 'did you mean ReLU'), ('Conv1D', 'out in', 'full name'), (3, 'out in', 'no class of layers'),
    (nn.ReLU, '', 'name each axis'), (nn.ReLU, 'out (in', 'name each axis')])
def test_what_cannot_be_registered(cls, axes, says):
    with pytest.raises(ValueError, match=says): register_layer(cls, axes, {})


def test_a_tensor_of_two_names_in_one_layer_is_listed_once():
    m = make('RNN')
    m.layer.weight_hh_l0 = m.layer.weight_ih_l0 = nn.Parameter(torch.ones(12, 12))
    assert [r.name for r in sparsity_report(m).layers] == ['layer.weight_ih_l0']


def plan(conv=50, head=20): return SparsifyCallback({nn.Conv2d: dict(sparsity=conv), nn.Linear: head})


def test_a_state_of_a_plan_is_taken_up_once():
    learn, cb = learner(), plan()
    fit(learn, 1, cb)
    state, again = cb.state_dict(), plan()
    again.load_state_dict(state)
    fit(learn, 1, again)
    again.plan = plan(80, 60).plan
    fit(learn, 1, again)
    assert [list(p._start.values())[-1] > 15 for p in again.parts] == [True, True]
    again.plan = plan(90, 90).plan # one part
    fit(learn, 1, again)
    assert len(again.parts) == 1 and round(again.current_sparsity) == 90


@pytest.mark.parametrize('state, says', [([], 'is not of a plan'), ({'masks': 3}, 'is not of a plan'), ({'2': {}}, 'cannot be taken up'), ({'masks': {}}, 'cannot be taken up')])
def test_a_state_of_something_else(state, says):
    cb = plan()
    with pytest.raises(RuntimeError, match='nothing has been sparsified'): cb.state_dict()
    with pytest.raises(ValueError, match=says):
        cb.load_state_dict(state)
        fit(learner(), 1, cb)


def test_a_plan_for_a_compiled_model():
    learn, cb = learner(), plan()
    learn.model = torch.compile(learn.model, backend='eager')
    assert cb.dry_run(learn).zeros
    fit(learn, 1, cb)
    assert [round(float((learn.model._orig_mod[i].weight == 0).float().mean()), 1) for i in (3, 8)] == [.5, .2]


def test_a_plan_prunes_a_shared_tensor_as_the_layer_that_its_key_means():
    m = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
    m[2].weight = m[0].weight
    for key, axes in (('2', ('out', 'in')), (nn.Embedding, ('token', 'feature'))):
        part, = SparsifyCallback({key: dict(sparsity=50, granularity='row')}, exclude='1').divide(m)
        assert [t.groups.axes for t in find_targets(m, part.granularity, part.layers)[0]] == [axes]
    part, = SparsifyCallback({'2': dict(sparsity=50, granularity='2:4')}).divide(m)
    assert part.layers == ['2.weight']


def test_a_dry_run_of_a_plan_counts_every_zero_once():
    learn = learner()
    Sparsifier(learn.model).prune_model(30)
    d = plan().dry_run(learn)
    assert d.all_zeros - sum(r.zeros for r in d.layers) == sum(int((p == 0).sum()) for p in learn.model.parameters() if p.dim() < 2)
    learn, cb = learner(), SparsifyCallback({'0': dict(sparsity=50, granularity='filter'), '3': dict(sparsity=75, granularity='filter')})
    follow = [cb.dry_run(learn).all_zeros - 8*18 for _ in range(2)]
    s = Sparsifier(learn.model, 'filter', 'local', layers=['0', '3'])
    d = s.dry_run({'0': 50, '3': 75})
    assert cb.dry_run(learn).all_zeros == d.all_zeros and follow[0] == follow[1]


def test_a_part_of_a_plan_that_is_frozen_stays():
    learn = learner(splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    learn.freeze()
    cb = plan()
    with pytest.warns(SparsityWarning, match=r'0.weight, 3.weight: these parts of the plan are frozen'): fit(learn, 1, cb)
    assert learn.model[3].weight.all() and (learn.model[8].weight == 0).sum() == 32
    other = plan()
    other.load_state_dict(cb.state_dict())
    learn.unfreeze()
    fit(learn, 1, other)
    assert round(float((learn.model[3].weight == 0).float().mean()), 1) == .5 and (learn.model[8].weight == 0).sum() == 32


def test_a_plan_says_what_it_is_not():
    class Mine(SparsifyCallback): pass
    with pytest.raises(ValueError, match='Mine cannot be a plan'): Mine({'0': dict(sparsity=50)})
    for bad in (50, {}, None):
        with pytest.raises(ValueError, match='is no plan'): PlanCallback(bad)
    cb = PlanCallback({'0': 50, '3': None}, 'filter')
    fit(learner(), 1, cb)
    assert [r.dead_filters for r in cb.report.layers] == [4]
    with pytest.raises(ValueError, match="sparsity key='q' matches no layer"): fit(learner(), 1, SparsifyCallback({'0': dict(sparsity=50), 'q': 3}))


def test_a_plan_warns_of_nothing_when_it_is_made():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan()


@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('in_a_plan', [False, True])
def test_a_rewind_of_one_leaves_the_zeros_of_the_others(in_a_plan, first):
    learn, lottery = learner(), dict(sparsity=50, lth=True, schedule='iterative', reset_end=True)
    settings = [('0', dict(sparsity=50)), ('3', lottery)][::1 if first else -1]
    cbs = [SparsifyCallback(dict(settings))] if in_a_plan else [SparsifyCallback(layers=k, **v) for k, v in settings]
    watched, parts = [], lambda: [p for cb in cbs for p in getattr(cb, 'parts', [cb]) if p.sparsifier]
    hook = learn.model.register_forward_pre_hook(lambda *_: watched.append(sum(map(regrown, parts()))))
    fit(learn, 4, cbs)
    hook.remove()
    assert not any(watched) and [int((learn.model[i].weight == 0).sum()) for i in (0, 3)] == [36, 576]


def test_a_plan_with_a_function_that_cannot_be_saved():
    cb = pickle.loads(pickle.dumps(SparsifyCallback({'0': dict(sparsity=50, criteria=lambda w: w.abs())})))
    assert cb.plan[0][1]['sparsity'] == 50
    with pytest.raises(RuntimeError, match='could not be saved with it'): fit(learner(), 1, cb)


def test_a_dry_run_says_what_is_frozen():
    learn = learner(splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    for cb in (SparsifyCallback(50), plan()): assert not any('frozen' in n for n in cb.dry_run(learn).notes)
    learn.freeze()
    for cb in (SparsifyCallback(50), plan()): assert any('0.weight, 3.weight: frozen now' in n for n in cb.dry_run(learn).notes)


def test_a_tensor_is_no_selector():
    m = make('GRU')
    with pytest.raises(ValueError, match=r'exclude= is a tensor of shape \(36, 12\); pass its name'): Sparsifier(m, exclude=m.layer.weight_hh_l0)
