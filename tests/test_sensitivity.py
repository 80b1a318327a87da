"One layer at a time, and the plan that follows"
import copy, math, warnings

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

from fastai_helpers import fit, learner, loaders, net, percent, quiet, same, samples, state_of, targets
from fastsparse.callback import SparsifyCallback
from fastsparse.granularity import NM
from fastsparse.measure import measure
from fastsparse.plan import Count, MACs
from fastsparse.sensitivity import SensitivityReport, _bears, _curve, sensitivity
from fastsparse.sparsifier import Sparsifier


def test_each_row_is_what_pruning_that_layer_by_hand_gives():
    learn = fit(learner(), 2)
    report = sensitivity(learn, (50, 90))
    assert [(r['layer'], r['level']) for r in report.rows] == [(n, p) for n in ('0', '3', '8') for p in (50, 90)] and report.dense == measure(learn)
    dense = copy.deepcopy(learn.model)
    for r in report.rows:
        learn.model = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            Sparsifier(learn.model).prune_layer(r['layer'], r['level'])
        found = measure(learn)
        assert {k: r[k] for k in found} == found
        assert r['percent'] == pytest.approx(100*float((learn.model[int(r['layer'])].weight == 0).float().mean())) and r['keys'] == (f"{r['layer']}.weight",)


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'coupled', '2:4'])
@pytest.mark.parametrize('criteria', ['large_final', 'random_score', 'movement'])
def test_all_is_as_it_was_bit_by_bit(granularity, criteria):
    learn = fit(learner(dls=loaders(shuffle=True)))
    learn.add_cb(SparsifyCallback(50))
    before, training, rng, py = state_of(learn.model), [m.training for m in learn.model.modules()], torch.get_rng_state(), learn.dls.train.rng.getstate()
    values, attrs, opt = list(learn.recorder.values), set(vars(learn)), copy.deepcopy(learn.opt.state_dict())
    sensitivity(learn, (30, 80), granularity, criteria)
    assert same(before, state_of(learn.model)) and training == [m.training for m in learn.model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert learn.dls.train.rng.getstate() == py and learn.recorder.values == values and set(vars(learn)) == attrs
    assert repr(opt) == repr(learn.opt.state_dict()) and not learn.lock.locked()
    fresh = Sparsifier(learn.model)
    assert fresh.planned() == 0, 'no memory of masks either'


def test_an_error_in_the_middle_restores_too():
    learn = fit(learner())
    calls = []
    def metric(pred, targ):
        calls.append(1)
        if len(calls) == 4: raise RuntimeError('no more')
        return pred.mean()
    learn.metrics = metric
    before = state_of(learn.model)
    with pytest.raises(RuntimeError, match='no more'): sensitivity(learn)
    assert same(before, state_of(learn.model)) and Sparsifier(learn.model).planned() == 0


def test_coupled_layers_are_one():
    class Res(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 10)
        def forward(self, x):
            x = self.a(x).relu()
            return self.head((x + self.c(self.b(x).relu())).mean((2, 3)))
    learn = learner(Res())
    report = sensitivity(learn, (50,), 'coupled')
    assert [r['keys'] for r in report.rows] == [('a.weight',), ('b.weight',)] and [r['percent'] for r in report.rows] == [50, 50]
    cb = SparsifyCallback(report.plan(drop=1000), 'coupled', 'local')
    fit(learn, 1, cbs=cb)
    assert {n: float((~m).float().mean()) for n, m in cb.sparsifier.masks.items()} == {'a.weight': .5, 'b.weight': .5, 'c.weight': .5}


def test_a_pattern_has_one_level():
    report = sensitivity(learner(), granularity=NM(2, 4))
    assert report.levels == [50] and {r['percent'] for r in report.rows} == {50}


def test_groups_that_are_whole_say_what_was_zero():
    rows = sensitivity(learner(), (30, 95), 'filter', layers='0').rows
    assert [r['percent'] for r in rows] == [25, 87.5]


def test_levels_in_any_order_and_selection():
    report = sensitivity(learner(), [90, 50, 90], exclude='8')
    assert report.levels == [50, 90] and list(report.layers) == ['0', '3']


# -- values by hand

def made(**curves):
    "A report of layers with losses at 50, 80 and 90 %; dense 1"
    sizes = dict(a=100, b=300, c=600)
    rows = [dict(layer=n, keys=(f'{n}.weight',), weights=sizes[n], level=float(p), percent=float(p), valid_loss=v, accuracy=2-v)
            for n, vs in curves.items() for p, v in zip((50, 80, 90), vs)]
    return SensitivityReport(tuple(rows), dict(valid_loss=1., accuracy=1.))


def test_plan_by_drop_is_the_highest_level_that_costs_no_more():
    report = made(a=(1.01, 1.05, 1.5), b=(1.2, 1.3, 1.4), c=(.9, 1.06, 1.04))
    assert report.plan(drop=5) == {'a.weight': 80, 'b.weight': None, 'c.weight': 90}
    assert report.plan(5, by='accuracy') == report.plan(5) and report.plan(drop=1000) == dict.fromkeys(('a.weight', 'b.weight', 'c.weight'), 90)
    assert report.plan(5, by='accuracy', higher_is_better=False) == dict.fromkeys(('a.weight', 'b.weight', 'c.weight'), 90)


def test_plan_by_percent_costs_the_same_everywhere():
    "At a cost of 20 %: a bears 50 %, b 65, c 80 (by lines through what was measured)"
    report = made(a=(1.2, 1.4, 1.8), b=(1.1, 1.3, 1.9), c=(1.05, 1.2, 1.6))
    wanted = (50*100 + 65*300 + 80*600)/1000
    assert report.plan(percent=wanted) == pytest.approx({'a.weight': 50, 'b.weight': 65, 'c.weight': 80}, abs=1e-9)


@pytest.mark.parametrize('percent', [1, 10, 30.5, 50, 77.7, 89.9, 90])
@pytest.mark.parametrize('curves', [dict(a=(1.2, 1.4, 1.8), b=(1.1, 1.3, 1.9), c=(1.05, 1.2, 1.6)), dict(a=(1, 1, 1), b=(1, 1, 1), c=(1, 1, 1)), dict(a=(1, 1, 2), b=(1, 1.5, 1.5), c=(.9, .8, .7)),
    dict(a=(math.nan, 1.2, 1.3), b=(1.1, 1.2, 1.3), c=(1.1, 1.2, 1.3)), dict(a=(9, 99, 999), b=(1, 1, 1), c=(1.0001, 1.0002, 5))])
def test_plan_by_percent_adds_up(percent, curves):
    report = made(**curves)
    sizes = {f'{n}.weight': rows[0]['weights'] for n, rows in report.layers.items()}
    try: plan = report.plan(percent=percent)
    except ValueError as e:
        assert 'measure higher levels=' in str(e) and math.isnan(curves['a'][0]) and percent > 80
        return
    assert sum((p or 0)*sizes[n] for n, p in plan.items())/1000 == pytest.approx(percent, abs=1e-6) and all(p is None or 1 <= p <= 90 for p in plan.values())


def test_where_more_costs_less_the_costlier_one_counts():
    rows = [dict(percent=float(p), valid_loss=v) for p, v in ((50, 1.3), (80, 1.1), (90, 1.4))]
    curve = _curve(rows, 'valid_loss', 1., None)
    assert [c for _, c in curve] == pytest.approx([0, 30, 30, 40])
    assert [_bears(curve, c) for c in (-1, 0, 15, 31, 35, 40, 99)] == pytest.approx([0, 0, 25, 81, 85, 90, 90])


class Parts(nn.Module):
    "Half of the outputs of `a` go with those of `b`, half with those of `c`"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(16, 10)
    def forward(self, x):
        return self.head((self.a(x) + torch.cat([self.b(x), self.c(x)], 1)).relu().mean((2, 3)))


def test_units_that_share_a_tensor_are_tried_together():
    learn = learner(Parts())
    x = torch.stack([s[0] for s in samples(4)])
    assert len(Sparsifier(learn.model, 'coupled', example_input=x).units) == 2
    report = sensitivity(learn, (50,), 'coupled')
    assert len(report.layers) == 1 and report.rows[0]['percent'] == 50 and report.rows[0]['weights'] == 9*32
    cb = SparsifyCallback(report.plan(drop=10**4), 'coupled', 'local')
    fit(learn, 1, cbs=cb)
    assert cb.current_sparsity == 50


@pytest.mark.parametrize('percent', [30, 75, 90])
def test_the_callback_and_the_sparsifier_take_a_plan_exactly(percent):
    learn = fit(learner(), 2)
    plan = sensitivity(learn).plan(percent=percent)
    want = sum(round((p or 0)*learn.model.get_parameter(n).numel()/100) for n, p in plan.items())
    cb = SparsifyCallback(plan, method='local')
    fit(learn, 2, cbs=cb)
    zeros = {n: int((~m).sum()) for n, m in cb.sparsifier.masks.items()}
    assert abs(sum(zeros.values()) - want) <= len(plan) and abs(cb.current_sparsity - percent) < .2
    for n, p in plan.items(): assert abs(zeros.get(n, 0) - (p or 0)*learn.model.get_parameter(n).numel()/100) <= .5
    model = net()
    Sparsifier(model, method='local').prune_model(plan)
    assert percent_of(model) == pytest.approx(percent, abs=.2)


def percent_of(model): return percent(model)


def test_drop_plan_in_a_fit():
    learn = fit(learner(), 2)
    plan = sensitivity(learn, (50, 90)).plan(drop=30)
    cb = SparsifyCallback(plan, method='local')
    fit(learn, 1, cbs=cb)
    for n, w in targets(learn.model).items(): assert 100*float((w == 0).float().mean()) == pytest.approx(plan[n] or 0, abs=1)


# -- shown

def test_shown_as_text_html_frame_and_picture():
    learn = learner()
    report = sensitivity(learn, (50, 90))
    text = str(report).splitlines()
    assert text[0].split() == ['layer', 'weights', '50', '%', '90', '%'] and text[2].split()[:2] == ['0', '72'] and 'with none: valid_loss' in text[-1]
    assert '<th style="text-align:right">90 %</th>' in report._repr_html_()
    df = report.to_dataframe()
    assert list(df.columns) == ['layer', 'weights', 'level', 'percent', 'valid_loss', 'accuracy'] and len(df) == 6
    for by in ('valid_loss', 'accuracy'):
        ax = report.plot(by)
        assert len(ax.texts) == 6 and [t.get_text() for t in ax.get_yticklabels()] == ['0', '3', '8'] and by in ax.get_title()
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    assert made(a=(1, math.nan, math.inf)).plot(ax=ax) is ax


def test_without_metrics():
    report = sensitivity(learner(metrics=None), (50,))
    assert list(report.dense) == ['valid_loss'] and report.plan(drop=10**6) and report.plot()


def test_a_part_of_the_data():
    learn = learner(dls=DataLoaders(DataLoader(samples(32), bs=16), DataLoader(samples(48), bs=16)))
    assert sensitivity(learn, (50,), n_batches=1).dense == measure(learn, n_batches=1) != measure(learn)
    assert sensitivity(learn, (50,), dl=learn.dls.train).dense == measure(learn, learn.dls.train)


# -- mistakes

@pytest.mark.parametrize('kwargs,message', [(dict(levels=[.5]), 'did you mean 50?'), (dict(levels=[]), 'list of percents'), (dict(levels=90), 'list of percents'), (dict(levels=[101]), 'out of range'), (dict(levels=[Count(9)]), 'Count(9) is no percentage'), (dict(levels=[MACs(50)]), 'no percentage'),
    (dict(granularity='fliter'), 'choose one of'), (dict(layers='conv9'), 'matches no layer'), (dict(n_batches=0), 'n_batches=0'), (dict(sparsity=50), 'no argument')])
def test_mistakes_are_told(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as e: sensitivity(learner(), **kwargs)
    assert message in str(e.value)


@pytest.mark.parametrize('kwargs,message', [({}, 'either drop='), (dict(drop=1, percent=50), 'either drop='), (dict(drop=-1), 'at least 0'), (dict(drop='5'), 'at least 0'), (dict(percent=.9), 'did you mean 90?'),
    (dict(percent=0), 'above 0'), (dict(percent={'a': 5}), 'no percentage'), (dict(percent=Count(9)), 'no percentage'), (dict(percent=95), '90 %; measure higher'), (dict(drop=1), 'the least that one costs is 10 %'),
    (dict(drop=50, by='f1'), 'choose one of valid_loss, accuracy')])
def test_plans_that_cannot_be_made_are_refused(kwargs, message):
    with pytest.raises(ValueError) as e: made(a=(1.2, 1.4, 1.8), b=(1.1, 1.3, 1.9), c=(1.1, 1.2, 1.6)).plan(**kwargs)
    assert message in str(e.value)


def test_nothing_is_printed_without_a_bar(capsys):
    learn = learner()
    with quiet(learn), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        sensitivity(learn, (50,), 'filter')
    assert not capsys.readouterr().out and not [w for w in told if 'asked for' in str(w.message)]
