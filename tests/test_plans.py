"A plan in one value: on a model, in a fit, before either, drawn"
import copy
import inspect
import pickle
import warnings

import pytest
import torch
from fastai_helpers import fit, learner, loaders, net
from torch import nn

from fastsparse.allocation import Bounded
from fastsparse.callback import PlanCallback, SparsifyCallback
from fastsparse.ends import first_layer, last_layer
from fastsparse.plan import Count, MACs, Params, UnknownOption
from fastsparse.plans import PlanSparsifier
from fastsparse.plot import plot_history, plot_schedule, plot_sparsity
from fastsparse.sparsifier import Sparsifier, SparsityWarning


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        yield


def mlp(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6), nn.Linear(6, 12))
def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def zeros(w): return int((w == 0).sum())


TWO = {nn.Linear: 75, '0': dict(sparsity=50, granularity='row', method='local')}


# on a model

def test_it_prunes_as_separate_sparsifiers_would():
    m, twin = net(), net()
    twin.load_state_dict(m.state_dict())
    s = PlanSparsifier(m, {nn.Conv2d: dict(sparsity=50, granularity='filter', method='local'), nn.Linear: 80, '0': None})
    s.prune_model()
    Sparsifier(twin, 'filter', 'local', layers='3').prune_model(50)
    Sparsifier(twin, layers='8').prune_model(80)
    assert same(state(m), state(twin)) and set(s.masks) == set(s.targets) == {'3.weight', '8.weight'} and not s.left_dense
    assert [r.name for r in s.report().layers] == ['3', '8'] and s.sparsity() == s.planned() == 100*(576+128)/(1152+160) and s.reach() == 100


@pytest.mark.parametrize('a, b', [('row', 'row'), ('2:4', 'NM'), ('weight', None)])
def test_equal_settings_are_one_part_however_they_are_said(a, b):
    from fastsparse.granularity import NM
    two = dict(sparsity=50) if b is None else dict(sparsity=50., granularity=NM(2, 4) if b == 'NM' else b, criteria='large_final', schedule='taper')
    s = PlanSparsifier(mlp(), {'0': dict(sparsity=50, granularity=a), '2': two, '4': 60 if a != '2:4' else None})
    assert [sorted(p.targets) for p in s.parts][0] == ['0.weight', '2.weight']


def test_later_keys_win_and_none_leaves_dense():
    plan = {'*': dict(sparsity=50), '2': 75, nn.ReLU: None, '4': None, '5': None, '5.weight': 25}
    s = PlanSparsifier(mlp(), plan)
    s.prune_model()
    assert {n: round(100*zeros(p)/p.numel()) for n, p in s.model.named_parameters() if p.dim() > 1} == {'0.weight': 50, '2.weight': 75, '4.weight': 0, '5.weight': 25}
    assert not s.left_dense
    s = PlanSparsifier(mlp(), plan, exclude=['2', '5'])
    assert set(s.targets) == {'0.weight'} and not s.left_dense


def test_what_a_line_cannot_prune_stays_with_an_earlier_one():
    s = PlanSparsifier(mlp(), {'*': 75, nn.Linear: dict(sparsity=50, granularity='2:4')})
    assert {str(p.granularity): sorted(p.targets) for p in s.parts} == {'weight': ['5.weight'], '2:4': ['0.weight', '2.weight', '4.weight']} and not s.left_dense
    assert [r.key for r in s.dry_run().layers] == ['Linear', 'Linear', 'Linear', '*']
    s = PlanSparsifier(mlp(), {nn.Linear: dict(sparsity=50, granularity='2:4')})
    assert s.left_dense == {'5': 'its 6 inputs do not divide into blocks of 4'}
    assert '5 is left dense: its 6 inputs do not divide into blocks of 4.' in s.report().notes and s.reach() == pytest.approx(100*480/552)
    s = PlanSparsifier(mlp(), {'5': None, nn.Linear: dict(sparsity=50, granularity='2:4')})
    assert list(s.left_dense) == ['5'], 'the last key means it'


def test_a_loop_of_ones_own():
    s = PlanSparsifier(mlp(), {'0': dict(sparsity=50, schedule='one_shot'), '2': dict(sparsity=80, schedule='lin')}, exclude='5')
    plan, seen = s.plan(), []
    for i in range(1, 5):
        s.advance(plan, i/4)
        seen.append([round(r.percent) for r in s.report().layers])
    assert seen == [[0, 40], [0, 80], [50, 80], [50, 80]]
    with torch.no_grad(): s.model[0].weight.add_(1)
    s.apply_masks()
    assert round(s.report().layers[0].percent) == 50
    s.model(torch.randn(3, 8)).sum().backward()
    s.mask_gradients()
    assert all(not s.model.get_parameter(n).grad[~m].any() for n, m in s.masks.items())


def broken(w): raise RuntimeError('no grad here')


def test_all_or_nothing():
    m = mlp()
    before = state(m)
    s = PlanSparsifier(m, TWO | {'4': dict(sparsity=50, criteria=broken)})
    with pytest.raises(ValueError, match="criterion broken failed at layer '4'"): s.prune_model()
    assert same(state(m), before) and all(k.all() for k in s.masks.values())
    s = PlanSparsifier(m, TWO)
    with s.trial():
        s.prune_model()
        assert s.sparsity() > 50
    assert same(state(m), before) and s.sparsity() == 0


def test_its_state_goes_to_another_process():
    s, other = PlanSparsifier(mlp(), TWO), PlanSparsifier(mlp(), TWO)
    s.prune_model()
    other.load_state_dict(s.state_dict())
    assert same(s.masks, other.masks) and other.sparsity() == s.sparsity()
    before = copy.deepcopy(s.state_dict())
    bad = copy.deepcopy(before)
    bad['0']['masks'] = {n: ~m for n, m in bad['0']['masks'].items()}
    bad['1']['masks'].popitem()
    for wrong, says in ((bad, 'do not fit the targets'), (before['0'], 'is not of a plan|has the parts'), ({'0': before['0']}, 'of 1 parts of the plan is missing'), (3, 'is not of a plan')):
        with pytest.raises(ValueError, match=says): other.load_state_dict(wrong)
        assert same(s.masks, other.masks) and other.sparsity() == s.sparsity(), 'nothing half done'


def test_coupled_outputs_are_watched():
    m = net()
    plan = {nn.Conv2d: dict(sparsity=Params(50), granularity='coupled', method='local'), nn.Linear: 50}
    with pytest.raises(ValueError, match='pass example_input='): PlanSparsifier(m, plan)
    s = PlanSparsifier(m, plan, example_input=torch.randn(2, 1, 8, 8))
    s.prune_model()
    assert [bool(r.dead_filters) for r in s.report().layers] == [True, True, False]
    assert 'PlanSparsifier of 3 tensors in 2 parts' in repr(s)
    s.reset()
    s.watch(torch.randn(1, 1, 8, 8))
    assert s.sparsity() == s.planned()


# mistakes, before any model is seen

MISTAKES = [
    ({'0': {'1': dict(sparsity=50)}}, ValueError, "the settings of '0' are a plan themselves; write its keys, '1'"), ({'0': dict(sparsity={'1': 50})}, ValueError, "the sparsity of '0' is a dict itself"),
    ({'0': dict(sparsity=50, granularty='row')}, UnknownOption, "in the settings of '0': there is no argument 'granularty'; did you mean 'granularity'"), ({'0': dict(sparsity=50, criteria='nope')}, ValueError, "settings of '0'.*'nope'"),
    ({'0': 30, nn.Linear: dict(sparsity=50, granularity='filtr')}, ValueError, "settings of 'Linear': granularity 'filtr' is unknown"), ({'0': dict(sparsity=50, schedule='agpp')}, ValueError, "did you mean 'agp'"),
    ({'0': dict(sparsity=50, method='globl')}, ValueError, "did you mean 'global'"), ({'0': dict(sparsity=MACs(50))}, ValueError, "settings of '0'.*granularity='coupled'"), ({'0': 50, '1': dict(sparsity=.5)}, ValueError, "settings of '1'.*did you mean 50"),
    ({'0': dict(sparsity=50, round_to=0)}, ValueError, "settings of '0': round_to=0"), ({'0': dict(sparsity=60, granularity='2:4')}, ValueError, "settings of '0'.*ask for 50"), ({'0': None, '1': {}}, ValueError, "settings of '1' have no sparsity"),
    ({'0': dict(sparsity=50, exclude='1')}, ValueError, 'the key says which layers'), ({3: dict(sparsity=50)}, ValueError, 'sparsity key=3 selects nothing'), ({torch.zeros(2): dict(sparsity=50)}, ValueError, 'is a tensor'),
    ({nn.Linear(2, 2): dict(sparsity=.3)}, ValueError, "in the settings of 'Linear': sparsity=0.3"),
]


@pytest.mark.parametrize('plan, error, says', MISTAKES)
@pytest.mark.parametrize('make', [lambda p: PlanSparsifier(mlp(), p), SparsifyCallback], ids=['model', 'callback'])
def test_mistakes_are_told_with_their_key(make, plan, error, says):
    with pytest.raises(error, match=says): make(plan)


def test_what_is_no_plan():
    for bad in (50, {}, None, {'0': None}):
        with pytest.raises(ValueError, match='is no plan|leaves all layers dense'): PlanSparsifier(mlp(), bad)
    with pytest.raises(UnknownOption, match="no argument 'lth'"): PlanSparsifier(mlp(), {'0': dict(sparsity=50, lth=True)})
    with pytest.raises(ValueError, match='did you mean learn.model'): PlanSparsifier(learner(), {'0': 50})
    with pytest.raises(ValueError, match="sparsity key='1': no layer to prune by weight"): PlanSparsifier(mlp(), {'0': 50, '1': 30})
    with pytest.raises(ValueError, match="exclude='nope' matches no layer"): PlanSparsifier(mlp(), {'0': 50}, exclude='nope')
    with pytest.raises(ValueError, match='exclude=3 selects nothing'): SparsifyCallback({'0': dict(sparsity=50)}, exclude=3)
    for ask in (Sparsifier(mlp()).prune_model, Sparsifier(mlp()).dry_run):
        with pytest.raises(ValueError, match=r'settings are for SparsifyCallback\(.*PlanSparsifier\(model'): ask({'0': dict(sparsity=50)})


def test_a_typo_in_the_name_of_a_parameter():
    m = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4))
    for ask in (lambda s: Sparsifier(m, layers=s), lambda s: Sparsifier(m, exclude=s), lambda s: PlanSparsifier(m, {s: 50}), lambda s: Sparsifier(m).prune_model({s: 50})):
        with pytest.raises(ValueError, match="the parameters are 0.weight_ih_l0, 0.weight_hh_l0; did you mean '0.weight_hh_l0'"): ask('0.weight_hhl0')
        with pytest.raises(ValueError, match="the parameters are 1.weight; did you mean '1.weight'"): ask('1.wieght')
        with pytest.raises(ValueError, match="the parameters are 0.weight_ih_l0, 0.weight_hh_l0"): ask('*_hh_l3')
    with pytest.raises(ValueError) as e: Sparsifier(mlp(), layers='conv1')
    assert 'the parameters' not in str(e.value), 'each is called weight, and its layer is listed'


# before it is done

def test_a_dry_run_is_what_will_be():
    m = net()
    plan = {nn.Conv2d: dict(sparsity=50, granularity='filter', method='local'), '0': None, '8': 80}
    s, before = PlanSparsifier(m, plan, example_input=torch.randn(2, 1, 8, 8)), state(m)
    d = s.dry_run()
    assert same(state(m), before) and s.sparsity() == 0
    s.prune_model()
    assert d.all_zeros == s.report().all_zeros and [r.zeros for r in d.layers if r.plan] == [r.zeros for r in s.report().layers]
    assert [(r.name, r.key) for r in d.layers] == [('0.weight', '0'), ('3.weight', 'Conv2d'), ('8.weight', '8')] and d.layers[0].why == 'as its key says'
    assert d.layers[1].groups == (8, 16) and set(d.layers[1].follows) == {'3.bias', '4.weight', '4.bias'}


@pytest.mark.parametrize('what', [{nn.Linear: dict(sparsity=50, criteria='snip')}, 50])
def test_a_dry_run_that_gathers_uses_no_data_up(what):
    learn = learner(dls=loaders(shuffle=True))
    before = learn.dls.train.rng.getstate()
    SparsifyCallback(what, criteria='snip').dry_run(learn)
    assert learn.dls.train.rng.getstate() == before


def test_a_dry_run_of_something_else():
    with pytest.raises(ValueError, match='model is a list, not a PyTorch module'): SparsifyCallback(50).dry_run([1])


def test_messages_name_types_as_one_would():
    for ask in (lambda: Sparsifier(mlp(), exclude='0').prune_model({'0': 50}), lambda: Sparsifier(mlp(), layers='0', method=Bounded('local', {'2': 50})).prune_model(50)):
        with pytest.raises(ValueError, match="key '.' means none"): ask()
    with pytest.raises(ValueError, match="key 'Linear' means none"): Sparsifier(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), layers='0').prune_model({nn.Linear: 50})


def test_a_dry_run_says_why_each_is_dense_and_by_which_key():
    m = nn.ModuleDict(dict(emb=nn.Embedding(9, 8), a=nn.Linear(8, 8), b=nn.Linear(6, 8), c=nn.Linear(8, 8), d=nn.Linear(8, 8), e=nn.Linear(8, 8)))
    m.own = nn.Parameter(torch.ones(3, 4))
    plan = {nn.Linear: dict(sparsity=50, granularity='2:4'), '[c]': None, ('emb', m['d']): 25}
    d = PlanSparsifier(m, plan, exclude='e').dry_run()
    assert {r.name: (r.key, r.plan.split(',')[0] or r.why) for r in d.layers} == {
        'own': ('', 'no key means it'), 'emb.weight': ('emb, d', 'weight'), 'a.weight': ('Linear', '2:4'), 'b.weight': ('Linear', 'its 6 inputs do not divide into blocks of 4'),
        'c.weight': ('[c]', 'as its key says'), 'd.weight': ('emb, d', 'weight'), 'e.weight': ('', 'left out')}
    table = d.to_dataframe()
    assert list(table.key) == [r.key for r in d.layers] and '<th style="text-align:left">key</th>' in d._repr_html_() and '  key  ' in str(d).split('\n')[0]


@pytest.mark.parametrize('sparsity, how', [(50, {}), (50, dict(granularity='filter', method='local')), ({nn.Conv2d: dict(sparsity=50), '8': 20}, {}), (50, dict(granularity='coupled'))])
def test_a_callback_needs_no_learner_for_it(sparsity, how):
    learn, cb = learner(), SparsifyCallback(sparsity, **how)
    if how.get('granularity') == 'coupled':
        with pytest.raises(ValueError, match='pass example_input='): cb.dry_run(learn.model)
    assert str(cb.dry_run(learn.model, torch.randn(2, 1, 8, 8))) == str(cb.dry_run(learn))


def test_a_dict_of_percentages_has_keys_too():
    s = Sparsifier(mlp(), method='local')
    d = s.dry_run({nn.Linear: 50, '2': 75, '4': None})
    assert [(r.key, r.zeros, bool(r.plan)) for r in d.layers] == [('Linear', 64, True), ('2', 192, True), ('4', 0, False), ('Linear', 36, True)]
    d = s.dry_run({'0': 50})
    assert [r.why for r in d.layers] == ['', *['no key means it']*3] and d.layers[0].key == '0'
    d = s.dry_run(50)
    assert all(r.key == '' for r in d.layers) and 'key' not in str(d).split('\n')[0].split()


def test_a_key_that_means_one_of_several_coupled_layers_is_the_key_of_all():
    class Sum(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        def forward(self, x): return self.c(self.a(x) + self.b(x))
    d = Sparsifier(Sum(), 'coupled', 'local', example_input=torch.randn(1, 3, 4, 4)).dry_run({'a': 50})
    assert [(r.key, r.zeros) for r in d.layers][:2] == [('a', 12), ('a', 12)] and not d.layers[2].plan


# in a fit

def test_it_looks_like_one_callback():
    learn, cb = learner(), SparsifyCallback({'3': dict(sparsity=50, granularity='filter', method='local'), nn.Linear: dict(sparsity=80, schedule='one_shot'), '0': None})
    assert type(cb) is PlanCallback and isinstance(cb, SparsifyCallback) and cb.sparsifier is None and cb.history == []
    for what in ('report', 'current_sparsity'):
        with pytest.raises(RuntimeError, match='nothing has been sparsified yet'): getattr(cb, what)
    fit(learn, 2, cb)
    s = cb.sparsifier
    assert isinstance(s, PlanSparsifier) and s is cb.sparsifier and set(s.masks) == {'3.weight', '8.weight'} and s.parts == [p.sparsifier for p in cb.parts]
    assert str(cb.report) == str(s.report()) and cb.current_sparsity == cb.report.sparsity == 100*(576+128)/1312
    assert cb.history[-1][1] == pytest.approx(cb.current_sparsity) and [x for x, _ in cb.history] == sorted({x for p in cb.parts for x, _ in p.history})
    half = [[y for x, y in history if x < .5][-1] for history in (cb.history, cb.parts[0].history)]
    assert half[0] == pytest.approx(half[1]*1152/1312), 'of the head nothing is gone yet'
    assert cb.sparsity['0'] is None and cb.schedule(1.) == 1 and cb.dry_run(learn).layers[1].key == '3'


def test_copies_pickles_and_signatures():
    cb = SparsifyCallback({'0': dict(sparsity=50)}, 'filter')
    for new in (copy.copy(cb), copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
        assert type(new) is PlanCallback and new.plan == cb.plan and new.sparsity == cb.sparsity and new.sparsifier is None
    for new in (copy.copy(SparsifyCallback(50)), pickle.loads(pickle.dumps(SparsifyCallback({'0': 50})))): assert type(new) is SparsifyCallback
    assert list(inspect.signature(SparsifyCallback).parameters)[:5] == ['sparsity', 'granularity', 'method', 'criteria', 'schedule'] == list(inspect.signature(PlanCallback).parameters)[:5]
    class Mine(SparsifyCallback):
        def __init__(self, percent): super().__init__(percent)
    assert Mine(50).sparsity == 50 and list(inspect.signature(Mine).parameters) == ['percent']


def told(cb, learn=None, epochs=1):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learn or learner(), epochs, cb)
    return [str(x.message) for x in w if 'of the model\'s tensors' in str(x.message)]


@pytest.mark.parametrize('plan, little', [
    ({'0': dict(sparsity=50)}, '3, 8: no key means it'), ({'0': 50}, '3, 8: no key means it'), ({'0': dict(sparsity=50), '3': None}, '8: no key means it'), ({'0': dict(sparsity=50), '3': None, '8': None}, ''),
    ({'0': 50, '3': None, '8': None}, ''), ({'3': 50, '0': None, '8': None}, ''), ({'3': dict(sparsity=50)}, ''), ({'3': 50}, ''), ({'0': 50, '8': 50, '3': 0}, ''), ({'0': dict(sparsity=50, granularity='filter')}, '3, 8: no key means it'),
    ({'0': dict(sparsity=50, granularity='coupled', method='local')}, '3, 8: no key means it')])
def test_a_plan_that_reaches_little_says_so_once(plan, little):
    cb = SparsifyCallback(plan)
    said = told(cb, epochs=2)
    assert len(said) == bool(little) and all(little in s and 'cb.sparsifier.left_dense has all' in s for s in said)
    assert not told(cb)


def test_what_a_key_leaves_dense_is_no_lack_of_reach():
    m = nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 8))
    s = Sparsifier(m)
    assert list(s.left_dense) == ['0'] and not s.asked({'1': 50, '0': None})[1] and list(s.asked({'1': 50})[1]) == ['0'] and s.reach() < 10
    assert PlanSparsifier(m, {'1': 50, '0': None}).reach() == 100 and PlanSparsifier(m, {'1': 50}).reach() == s.reach()


def test_a_part_of_a_model_that_is_frozen_is_no_lack_of_reach():
    learn = learner(splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    learn.freeze()
    assert not told(SparsifyCallback({nn.Conv2d: dict(sparsity=50), nn.Linear: 20}), learn)


def test_zeros_of_all_parts_are_remembered_in_the_next_fit():
    "What was pruned in this model stays, also where less is asked for; zeros that were only found would go"
    learn = learner()
    plan = lambda a, b: SparsifyCallback({nn.Conv2d: dict(sparsity=a), nn.Linear: b}) # noqa: E731
    fit(learn, 1, plan(60, 80))
    was = {i: learn.model[i].weight == 0 for i in (0, 3, 8)}
    fit(learn, 1, plan(30, 40))
    assert all(not learn.model[i].weight[z].any() for i, z in was.items())


def test_looking_for_a_learning_rate_leaves_what_was_pruned():
    learn, cb = learner(), SparsifyCallback({'3': dict(sparsity=50), nn.Linear: 25})
    learn.add_cb(cb)
    fit(learn, 1)
    before = str(cb.report)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert str(cb.report) == before
    learn.validate()
    assert str(cb.report) == before and cb.history


def test_an_early_end_says_what_to_do():
    from fastai.callback.core import Callback, CancelFitException
    class Stop(Callback):
        order = -1000
        def before_batch(self):
            if self.epoch == 1: raise CancelFitException
    learn, cb = learner(), SparsifyCallback({'3': dict(sparsity=50), '8': 50}, method='local')
    with pytest.warns(SparsityWarning, match=r'prune the rest with cb.sparsifier.prune_model\(\)'): fit(learn, 4, [cb, Stop()])
    cb.sparsifier.prune_model()
    assert [round(r.percent) for r in cb.report.layers] == [50, 50]


# drawn

def test_whatever_has_a_report_can_be_drawn():
    learn, cb = learner(), SparsifyCallback({nn.Conv2d: dict(sparsity=50), nn.Linear: 25})
    with pytest.raises(RuntimeError, match='nothing has been sparsified yet'): plot_sparsity(cb)
    fit(learn, 1, cb)
    some = Sparsifier(learn.model, layers='3')
    drawn = lambda what: [t.get_text() for t in plot_sparsity(what).get_yticklabels()] # noqa: E731
    assert drawn(some) == drawn(some.report()) == ['3'] and drawn(cb.parts[0]) == ['0', '3']
    for whole in (cb, cb.sparsifier, cb.report, learn.model, learn): assert drawn(whole) == ['0', '3', '8']
    for bad in (3, None, learn.dls, 'model'):
        with pytest.raises(ValueError, match=f'{type(bad).__name__} has no report to draw; pass a model, a Sparsifier'): plot_sparsity(bad)


def test_a_dry_run_is_drawn_with_keys_and_reasons():
    import matplotlib.pyplot as plt
    d = PlanSparsifier(mlp(), {'0': dict(sparsity=50, granularity='row', method='local'), '[24]': 75}).dry_run()
    _, given = plt.subplots()
    ax = d.plot(given)
    assert ax is given and [t.get_text() for t in ax.get_legend().get_texts()] == ['0: row, local, large_final', '[24]: weight, global, large_final']
    bars = ax.containers[1].patches
    assert [b.get_width() for b in bars] == [r.percent for r in d.layers] and [t.get_text() for t in ax.texts] == ['no key means it']
    assert bars[0].get_facecolor() != bars[1].get_facecolor() == bars[2].get_facecolor() and d.plot() is not ax
    assert Sparsifier(mlp(), exclude='0').dry_run(50).plot().get_legend() is not None


def test_history_of_one_and_of_several():
    learn, one = learner(), SparsifyCallback(50)
    with pytest.raises(ValueError, match='has no history to draw'): plot_history(one)
    with pytest.raises(ValueError, match='Learner has no history to draw'): plot_history(learn)
    fit(learn, 1, one)
    ax = plot_history(one)
    assert [tuple(p) for p in ax.lines[1].get_xydata()] == one.history and ax.lines[0].get_ydata()[-1] == 50
    many = SparsifyCallback({nn.Conv2d: dict(sparsity=50), nn.Linear: dict(sparsity=25, schedule='lin')})
    fit(learner(), 1, many)
    ax = plot_history(many)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['0.weight, 3.weight', '8.weight'] and [tuple(p) for p in ax.lines[3].get_xydata()] == many.parts[1].history
    assert plot_schedule('agp', sparsity=50).lines[0].get_ydata()[-1] == 50
    with pytest.raises(ValueError, match='schedule'): plot_schedule(3)


def test_keys_of_a_plan_name_the_ends_of_the_flow_and_numbers_of_weights():
    net,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),torch.randn(2, 3, 8, 8)
    plan = {'*': dict(sparsity=50), first_layer: None, last_layer: dict(sparsity=Count(20), method='per_output')}
    with pytest.raises(ValueError, match='example_input='): PlanSparsifier(copy.deepcopy(net), plan)
    run = SparsifyCallback(plan).dry_run(net, x)
    assert [(l.key, l.zeros) for l in run.layers] == [('first_layer', 0), ('*', 576), ('last_layer', 20)]
    s = PlanSparsifier(net, plan, example_input=x)
    s.prune_model()
    assert {n: int((~m).sum()) for n,m in s.masks.items()} == {'1.weight': 576, '4.weight': 20}
    assert ((net[4].weight == 0).sum(1) == 2).all()
