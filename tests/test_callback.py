"SparsifyCallback in plain fits: exact, met during training, held after every step, and everything else as it was"
import copy
import csv
import random
import re
from functools import partial

import pytest
import torch
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.learner import Recorder
from fastai.optimizer import Adam, Lamb, OptimWrapper, RAdam, RMSProp, ranger
from torch import nn

from fastai_helpers import (Journal, On, anatomy, column, conv, dense_state, fit, is_exact, learner, loaders, masks_of, momentum, net, percent, quiet, regrown, same,
                            sparse_learner, state_of, throw, when, zeros)
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.granularity import NM
from fastsparse.schedule import Schedule, Steps, available_schedules
from fastsparse.sparsifier import SparsityWarning

ENDING = [s for s in available_schedules() if s != 'dsd']
OPTIMIZERS = dict(
    sgd=momentum, adam=partial(Adam, wd=.1), adamw=partial(Adam, decouple_wd=True, wd=.1), adam_l2=partial(Adam, decouple_wd=False, wd=.1), rmsprop=partial(RMSProp, mom=.9),
    radam=RAdam, ranger=ranger, lamb=Lamb, torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, weight_decay=.1)),
    torch_adam=partial(OptimWrapper, opt=torch.optim.Adam), torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
    torch_rmsprop=partial(OptimWrapper, opt=partial(torch.optim.RMSprop, momentum=.9)))


# -- the target

@pytest.mark.parametrize('schedule', ENDING)
@pytest.mark.parametrize('batches,epochs', [(1, 1), (2, 1), (3, 1), (3, 3)])
def test_the_target_is_met_exactly_and_the_last_batch_was_trained_at_it(schedule, batches, epochs):
    learn, cb = learner(dls=loaders(batches)), SparsifyCallback(90, schedule=schedule)
    forwards = []
    look = On(before_backward=lambda learn: forwards.append(percent(learn.model)))
    fit(learn, epochs, cbs=[cb, look])
    assert is_exact(learn.model, 90)
    assert forwards[-1] == percent(learn.model) == cb.current_sparsity == cb.report.sparsity == column(learn)[-1]
    assert forwards == sorted(forwards) and len(forwards) == batches*epochs
    assert len(column(learn)) == epochs


@pytest.mark.parametrize('schedule', ENDING)
def test_training_follows_the_schedule_batch_by_batch(schedule):
    learn, cb = learner(dls=loaders(4)), SparsifyCallback(80, schedule=schedule)
    journal = Journal(cb)
    fit(learn, 3, cbs=[cb, journal])
    wanted = [80*cb.schedule((i+1)/12) for i in range(12)]
    assert all(is_exact_at(p, w, learn.model) for p, w in zip(journal.steps, wanted))
    assert journal.epochs == column(learn) == [journal.steps[i] for i in (3, 7, 11)]


def is_exact_at(got, wanted, model):
    n = sum(w.numel() for w in (model[0].weight, model[3].weight, model[8].weight))
    return abs(got - wanted)*n/100 <= .5 + 1e-6


@pytest.mark.parametrize('target', [0, 1, 10, 50, 70, 90, 99, 100])
@pytest.mark.parametrize('method', ['local', 'global'])
def test_every_target(target, method):
    learn, cb = sparse_learner(target, method=method)
    if method == 'global': assert is_exact(learn.model, target)
    else:
        for w in (learn.model[0].weight, learn.model[3].weight, learn.model[8].weight): assert abs(int((w == 0).sum()) - target*w.numel()/100) <= .5
    assert cb.current_sparsity == percent(learn.model) == column(learn)[-1]


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', 'row', 'column', 'channel', 'shared_kernel', 'shared_weight', 'layer'])
def test_every_granularity_takes_whole_groups(granularity):
    learn, cb = sparse_learner(50, granularity, layers=nn.Conv2d)
    for t in cb.sparsifier.targets.values():
        whole = t.groups.expand(t.groups.alive(t.weight != 0))
        assert torch.equal(whole, t.weight != 0)


def test_a_schedule_that_never_changes_anything_twice_is_not_asked_to():
    _, cb = sparse_learner(50, schedule='one_shot', epochs=3)
    assert len(cb.history) == 1 and cb.history[0] == (pytest.approx(7/12), 50)


def test_a_step_later_than_the_start_is_made_at_the_first_batch_after_it():
    _, cb = sparse_learner(60, schedule='iterative', epochs=3)
    assert [p for _, p in cb.history] == pytest.approx([20, 40, 60], abs=.1)
    assert [round(12*p) for p, _ in cb.history] == [4, 7, 10]


def test_a_user_s_function_is_a_schedule_over_the_whole_training():
    _, cb = sparse_learner(50, schedule=lambda p: p*p, epochs=2)
    assert [p for _, p in cb.history] == pytest.approx([50*((i+1)/8)**2 for i in range(8)], abs=.1)
    assert cb.history[-1][0] == 1


def test_zero_epochs():
    learn, cb = learner(), SparsifyCallback(50)
    before = state_of(learn.model)
    fit(learn, 0, cbs=cb)
    assert same(before, state_of(learn.model)) and cb.current_sparsity == 0


def test_before_a_fit_there_is_nothing_to_report():
    for read in (lambda cb: cb.report, lambda cb: cb.current_sparsity, lambda cb: cb.state_dict()):
        with pytest.raises(RuntimeError, match=r'pass this callback to a fit first'): read(SparsifyCallback(50))


def test_after_the_fit_the_callback_still_answers():
    learn, cb = sparse_learner(50)
    assert cb.learn is None and cb.sparsifier.model is learn.model
    assert cb.report.sparsity == cb.current_sparsity == percent(learn.model)
    learn.model[3].weight.data.zero_() # measured, not remembered
    assert cb.current_sparsity == percent(learn.model) > 50


# -- every optimizer

@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_pruned_weights_stay_zero_after_every_step(name, granularity):
    learn, cb = learner(opt_func=OPTIMIZERS[name], lr=.01, wd=.1), SparsifyCallback(70, granularity, schedule='iterative', layers=nn.Conv2d)
    journal, steps = Journal(cb), []
    at_once = On(after_step=lambda learn: steps.append(regrown(cb)), order=100)
    fit(learn, 3, cbs=[cb, journal, at_once])
    assert steps == [0]*12
    assert journal.regrown == 0
    assert journal.dense_state == 0
    assert journal.steps == sorted(journal.steps) and percent(learn.model) > 50
    assert all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.parametrize('name', ['adam', 'ranger', 'torch_adam'])
def test_weights_that_are_kept_train(name):
    learn, cb = learner(opt_func=OPTIMIZERS[name], lr=.01), SparsifyCallback(70, schedule=Schedule(Steps(1), 0))
    states = []
    fit(learn, 2, cbs=[cb, On(after_batch=lambda learn: states.append(state_of(learn.model)) if learn.training else None)])
    name, mask = '3.weight', cb.sparsifier.masks['3.weight']
    assert (states[-1][name] != states[0][name])[mask].float().mean() > .9


def test_zero_is_zero_before_the_callback_has_had_its_turn():
    "The optimizer never hears of pruned weights: its step leaves them at zero, without any mask applied afterwards"
    for name, opt_func in OPTIMIZERS.items():
        learn, cb = learner(opt_func=opt_func, lr=.01, wd=.1), SparsifyCallback(70, schedule=Schedule(Steps(2), 0))
        seen = []
        fit(learn, 2, cbs=[cb, On(after_step=lambda learn: seen.append(regrown(cb)), order=-100)])
        assert name == 'ranger' or seen == [0]*8, name # ranger goes back towards weights of its own every 6 steps


# -- what goes along with a filter

def channels_put_out(model, cb, log, layer='0', bn=1):
    dead = lambda: ~cb.sparsifier.masks[f'{layer}.weight'].flatten(1).any(1)
    return model[bn].register_forward_hook(lambda m, i, out: log.append((int(dead().sum()), float(out.detach()[:, dead()].abs().sum()))) if cb.sparsifier else None)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'ranger', 'torch_adam'])
@pytest.mark.parametrize('affine', [True, False])
def test_channels_of_pruned_filters_put_out_exactly_zero(name, affine):
    model = net()
    if not affine: model[1], model[4] = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(16, affine=False)
    for m in (model[1], model[4]):
        if affine: nn.init.uniform_(m.bias, 1, 2)
    learn, cb, log = learner(model, opt_func=OPTIMIZERS[name], lr=.01), SparsifyCallback(50, 'filter', 'local', layers=nn.Conv2d), []
    handles = [channels_put_out(model, cb, log), channels_put_out(model, cb, log, '3', 4)]
    fit(learn, 2, cbs=cb)
    learn.model.train(); learn.model(torch.randn(8, 1, 8, 8))
    learn.model.eval(); learn.model(torch.randn(8, 1, 8, 8))
    for h in handles: h.remove()
    assert [n for n, _ in log][-4:] == [4, 8, 4, 8]
    assert all(out == 0 for _, out in log)


def test_a_linear_row_takes_its_bias():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    nn.init.uniform_(model[1].bias, 1, 2)
    fit(learner(model), 2, cbs=SparsifyCallback(50, 'row', layers='1'))
    dead = ~model[1].weight.any(1)
    assert dead.sum() == 10 and not model[1].bias[dead].any() and model[1].bias[~dead].all()


# -- the model stays what it was

@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_keys_parameters_types_and_hooks_stay(granularity):
    learn, cb = learner(), SparsifyCallback(50, granularity, layers=nn.Conv2d)
    before, seen = anatomy(learn.model), []
    look = lambda learn: seen.append(anatomy(learn.model))
    fit(learn, 2, cbs=[cb, On(before_fit=look, after_step=look, after_validate=look, after_epoch=look, after_fit=look, order=100)])
    assert len(seen) > 10 and all(s == before for s in seen + [anatomy(learn.model)])


def test_the_learner_keeps_nothing():
    learn = learner()
    fit(learn, 1)
    before = set(vars(learn)), list(map(type, learn.cbs)), list(learn.metrics), list(learn.recorder.metric_names)
    fit(learn, 1, cbs=SparsifyCallback(50))
    fit(learn, 1)
    assert (set(vars(learn)), list(map(type, learn.cbs)), list(learn.metrics), list(learn.recorder.metric_names)) == before


# -- bad input

BAD = [
    (dict(sparsity=-5), r'sparsity=-5 .*0 to 100'), (dict(sparsity=150), r'sparsity=150 .*0 to 100'), (dict(sparsity=.7), r'0\.7.*did you mean 70\?'),
    (dict(sparsity=float('nan')), r'nan.*0 to 100'), (dict(sparsity=True), r'True is not a number.*0 to 100'), (dict(sparsity='abc'), r"'abc' is not a number.*such as 70"),
    (dict(sparsity=None), r'None is not a number'), (dict(sparsity={}), r'empty dict.*50'), (dict(sparsity={'0': None}), r"leaves all dense"),
    (dict(sparsity={'0': 150}, method='local'), r'sparsity=150 .*0 to 100'), (dict(granularity='wieght'), r"'wieght' is unknown.*weight.*filter"),
    (dict(method='locally'), r"'locally' is unknown.*'local'.*'global'"), (dict(criteria='big'), r"'big' is unknown.*large_final"),
    (dict(schedule='agpp'), r"'agpp' is unknown.*agp"), (dict(schedule=.5), r'0\.5 is unknown'), (dict(round_to=0), r'round_to=0 .*at least 1'), (dict(round_to=-4), r'round_to=-4 '),
    (dict(round_to=2.5), r'round_to=2\.5 .*whole'), (dict(layers=[]), r'layers=\[\] is empty'), (dict(layers=5), r'layers=5 .*nn\.Conv2d'), (dict(exclude=5), r'exclude=5'),
    (dict(update_every=0), r'update_every=0 .*at least 1'), (dict(update_every=True), r'update_every=True'), (dict(update_every=2.5), r'update_every=2\.5'),
    (dict(granularity='2:4', sparsity=70), r'70 .*50'), (dict(granularity='4:2'), r'did you mean NM\(2, 4\)'),
    (dict(lth=True), r'has no rounds.*iterative'), (dict(lth=True, schedule='dsd'), r'has no rounds'), (dict(rewind_epoch=-1, lth=True, schedule='iterative'), r'rewind_epoch=-1'),
    (dict(rewind_epoch=1.5, lth=True, schedule='iterative'), r'rewind_epoch=1\.5'), (dict(rewind_epoch=2), r'lth=True or reset_end=True'), (dict(save_tickets=True), r'add lth=True'),
    (dict(lth=True, schedule='iterative', save_tickets=3), r'save_tickets=3'),
]


@pytest.mark.parametrize('kwargs,message', BAD, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_mistakes_are_refused_in_the_constructor(kwargs, message):
    with pytest.raises(ValueError, match=f'(?s){message}'): SparsifyCallback(**{'sparsity': 50, **kwargs})


@pytest.mark.parametrize('name', ['sparsity_', 'round', 'layer', 'epochs'])
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match=name): SparsifyCallback(50, **{name: 1})


def test_a_schedule_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match=r'did you mean start_pct=0\.2, end_pct=0\.8'): Schedule(lambda p: p, .8, .2)


NEEDS_MODEL = [
    (dict(layers='nothing'), r'layers=.*nothing.*matches no layer.*Conv2d'), (dict(exclude='nothing'), r'exclude=.*nothing.*matches no layer'),
    (dict(layers=nn.Conv3d), r'Conv3d matches no layer'), (dict(granularity='kernel', layers=nn.Linear), r'no layer to prune by kernel.*Linear'),
    (dict(granularity='filter', round_to=32, layers=nn.Conv2d), r'round_to=32 is larger.*0 \(8\).*exclude'), (dict(sparsity={'7.*': 50}, method='local'), r"'7\.\*'"),
    (dict(sparsity={'nothing': 50}, method='local'), r"sparsity key.*'nothing'"), (dict(exclude=nn.Module), r'no layer to prune|no prunable layer'),
    (dict(lth=True, schedule='iterative', rewind_epoch=5), r'rewind_epoch=5.*only the epochs 0 to 2'), (dict(reset_end=True, rewind_epoch=3), r'only the epochs 0 to 2'),
    (dict(lth=True, schedule='iterative', rewind_epoch=1), r'after the first round.*25%.*earlier epoch'),
]


@pytest.mark.parametrize('kwargs,message', NEEDS_MODEL, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_mistakes_that_the_model_shows_are_refused_before_anything_is_trained(kwargs, message):
    learn, cb = learner(), SparsifyCallback(**{'sparsity': 50, **kwargs})
    before, batches = state_of(learn.model), []
    with pytest.raises(ValueError, match=f'(?s){message}'): fit(learn, 3, cbs=[cb, On(before_batch=batches.append)])
    assert same(before, state_of(learn.model)) and not batches
    fit(learn, 1, cbs=SparsifyCallback(50)) # and the Learner is as good as before
    assert is_exact(learn.model, 50)


@pytest.mark.parametrize('schedule', ['agp', 'one_shot'])
def test_weights_with_nan_are_refused_before_anything_is_trained(schedule):
    learn, batches = learner(), []
    learn.model[3].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*'3'"): fit(learn, 1, cbs=[SparsifyCallback(50, schedule=schedule), On(after_step=batches.append, order=-100)])
    assert not batches


# -- dict targets, patterns, multiples

def test_each_layer_its_own_target():
    learn, cb = sparse_learner({'0': 25, nn.Linear: 75}, 'weight', 'local', epochs=2)
    assert [100*(m.weight == 0).float().mean().item() for m in (learn.model[0], learn.model[3], learn.model[8])] == pytest.approx([25, 0, 75])
    assert cb.current_sparsity == column(learn)[-1] == percent(learn.model)


def test_a_layer_outside_of_the_dict_is_left_free():
    learn = learner()
    seen = []
    fit(learn, 2, cbs=[SparsifyCallback({'0': 50}, 'weight', 'local'), On(after_epoch=lambda learn: seen.append(learn.model[3].weight.clone()))])
    assert (seen[0] != seen[1]).all()


@pytest.mark.parametrize('pattern', ['2:4', NM(1, 4)])
@pytest.mark.parametrize('schedule', ['agp', 'one_shot', 'iterative'])
def test_patterns_in_a_fit(pattern, schedule):
    want = 50 if pattern == '2:4' else 75
    learn, cb = learner(), SparsifyCallback(want, pattern, schedule=schedule, exclude='0')
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal])
    for w in (learn.model[3].weight.movedim(1, -1), learn.model[8].weight): assert ((w.reshape(-1, 4) == 0).sum(1) == want*4//100).all()
    assert journal.regrown == 0 and column(learn)[-1] == cb.current_sparsity == want


def test_a_layer_that_the_pattern_does_not_divide_is_left_dense_and_named():
    learn, cb = sparse_learner(50, '2:4', epochs=1)
    assert (learn.model[0].weight != 0).all()
    assert re.search('0 is left dense', str(cb.report))


@pytest.mark.parametrize('method', ['local', 'global'])
def test_what_remains_is_a_multiple(method):
    model = net(width=16)
    learn, cb = learner(model), SparsifyCallback(50, 'filter', method, round_to=8, layers=nn.Conv2d)
    seen = []
    left = lambda learn: [int(m.weight.flatten(1).any(1).sum()) for m in (model[0], model[3])]
    with quiet(learn): learn.fit(2, cbs=[cb, On(after_step=lambda learn: seen.append(left(learn)), order=100)])
    assert all(n % 8 == 0 and n >= 8 for step in seen for n in step)
    if method == 'local': assert left(learn) == [8, 16]


def test_what_whole_groups_cannot_reach_is_said_with_both_numbers():
    with pytest.warns(SparsityWarning, match=r'asked for 50 % zeros, got (33\.3\d*|66\.6\d*) %'):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        fit(learner(model), 1, cbs=SparsifyCallback(50, 'filter', layers='0'))


def test_layers_and_exclude():
    learn, cb = sparse_learner(50, layers=nn.Conv2d, exclude='0')
    assert list(cb.sparsifier.masks) == ['3.weight'] and (learn.model[3].weight == 0).sum() == learn.model[3].weight.numel()/2
    assert learn.model[0].weight.all() and learn.model[8].weight.all()


# -- the table

def test_the_column_stands_before_the_time_and_in_the_csv(tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(70)
    fit(learn, 3, cbs=[cb, CSVLogger()])
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert [float(r['sparsity']) for r in rows] == column(learn) and float(rows[-1]['sparsity']) == cb.current_sparsity
    assert all(re.fullmatch(r'\d\d:\d\d', r['time']) for r in rows)


def test_the_column_reaches_the_logger():
    learn, lines = learner(), []
    learn.logger = lines.append
    with learn.no_bar(): learn.fit(2, cbs=[SparsifyCallback(70)])
    assert [line[4] for line in lines] == column(learn) and all(len(line) == 6 for line in lines)


def test_the_column_without_a_time_and_without_a_recorder():
    learn = learner()
    learn.recorder.add_time = False
    fit(learn, 1, cbs=SparsifyCallback(70))
    assert list(learn.recorder.metric_names)[-1] == 'sparsity' and len(learn.recorder.values[-1]) == 4
    learn = learner()
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, (Recorder, ProgressCallback)))): learn.fit(1, cbs=SparsifyCallback(70))
    assert is_exact(learn.model, 70)


@pytest.mark.parametrize('kwargs', [dict(train_metrics=True), dict(train_metrics=True, valid_metrics=False)])
def test_the_column_with_training_metrics(kwargs):
    learn = learner()
    for k, v in kwargs.items(): setattr(learn.recorder, k, v)
    fit(learn, 2, cbs=SparsifyCallback(70))
    assert column(learn)[-1] == percent(learn.model)
    assert all(len(row) == len(learn.recorder.metric_names) - 2 for row in learn.recorder.values)


def test_the_row_of_an_epoch_without_validation_has_no_sparsity_where_another_column_is():
    from fastai.callback.core import CancelValidException
    learn = learner()
    fit(learn, 2, cbs=[SparsifyCallback(70), On(before_validate=throw(CancelValidException))])
    names = list(learn.recorder.metric_names)[1:]
    for row in learn.recorder.values:
        assert dict(zip(names, row)).get('valid_loss') is None
        assert dict(zip(names, row)).get('accuracy') is None


# -- lottery tickets

def rewound(cb, kept, model, name='3.weight'):
    m = cb.sparsifier.masks[name]
    return torch.equal(model.state_dict()[name][m], kept[name][m])


@pytest.mark.parametrize('name', ['sgd', 'adam', 'ranger', 'torch_adam'])
@pytest.mark.parametrize('schedule,rounds', [('one_shot', 1), ('iterative', 3)])
def test_each_round_rewinds_weights_statistics_and_optimizer(name, schedule, rounds):
    learn, cb = learner(opt_func=OPTIMIZERS[name], lr=.01), SparsifyCallback(80, schedule=schedule, lth=True)
    first, seen, n = state_of(learn.model), [], []
    def look(learn):
        if learn.training and len(cb.history) > len(n):
            n.append(1)
            state = getattr(learn.opt, 'opt', learn.opt).state
            momenta = [v for s in state.values() for k, v in s.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.any()]
            seen.append((state_of(learn.model), masks_of(cb), momenta))
    fit(learn, 3, cbs=[cb, On(before_batch=look, order=100)])
    assert len(seen) == rounds
    for state, masks, momenta in seen:
        assert all(torch.equal(state[n], first[n]*masks.get(n, 1)) for n in first)
        assert not momenta
    assert is_exact(learn.model, 80) and not rewound(cb, first, learn.model) # trained on after the last round


@pytest.mark.parametrize('name', ['sgd', 'adam', 'torch_adam'])
def test_rewinding_to_a_later_epoch_brings_its_optimizer_state_back(name):
    learn, cb = learner(opt_func=OPTIMIZERS[name], lr=.01), SparsifyCallback(80, schedule=Schedule(Steps(2), .5), lth=True, rewind_epoch=1)
    kept, back, n = {}, [], []
    opt_state = lambda: {k: copy.deepcopy(getattr(learn.opt, 'opt', learn.opt).state[p]) for k, p in learn.model.named_parameters()}
    def look(learn):
        if learn.training and (learn.epoch, learn.iter) == (1, 0): kept.update(model=state_of(learn.model), opt=opt_state())
        if learn.training and len(cb.history) > len(n): n.append(1); back.append((state_of(learn.model), masks_of(cb), opt_state()))
    fit(learn, 4, cbs=[cb, On(before_batch=look, order=100)])
    assert len(back) == 2
    for model, masks, opt in back:
        assert all(torch.equal(model[k], v*masks.get(k, 1)) for k, v in kept['model'].items())
        for k, before in kept['opt'].items():
            for what, v in before.items():
                if isinstance(v, torch.Tensor): assert torch.equal(opt[k][what], v*masks.get(k, 1) if v.shape == model[k].shape else v), (k, what)
                else: assert opt[k][what] == v


def test_reset_end_leaves_the_ticket_untrained():
    learn, cb = learner(), SparsifyCallback(80, schedule='iterative', lth=True, reset_end=True)
    first = state_of(learn.model)
    fit(learn, 2, cbs=cb)
    assert all(torch.equal(v, first[k]*cb.sparsifier.masks.get(k, 1)) for k, v in learn.model.state_dict().items())
    assert is_exact(learn.model, 80)


def test_reset_end_goes_with_a_continuous_schedule():
    learn, cb = learner(), SparsifyCallback(80, reset_end=True, rewind_epoch=1)
    kept = {}
    fit(learn, 3, cbs=[cb, On(before_train=lambda learn: kept.update({learn.epoch: state_of(learn.model)}), order=-100)])
    assert all(torch.equal(v, kept[1][k]*cb.sparsifier.masks.get(k, 1)) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize('where', ['default', 'own'])
def test_tickets_are_plain_files(tmp_path, where):
    learn = learner(path=tmp_path)
    first, folder = state_of(learn.model), tmp_path/'models'/'tickets' if where == 'default' else tmp_path/'a'/'b'
    cb = SparsifyCallback(75, schedule='iterative', lth=True, save_tickets=True if where == 'default' else str(folder))
    fit(learn, 2, cbs=cb)
    files = sorted(folder.iterdir())
    assert len(files) == 3
    for file, want in zip(files, (25, 50, 75)):
        ticket = torch.load(file, weights_only=True)
        assert list(ticket) == list(first)
        fresh = net()
        fresh.load_state_dict(ticket)
        assert is_exact(fresh, want)
        assert all(torch.equal(v, torch.where(v == 0, 0., first[k])) for k, v in ticket.items() if v.is_floating_point())


def test_lottery_works_with_a_module_of_any_kind():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = nn.Sequential(*conv(1, 8)), nn.Parameter(torch.ones(1))
            self.rnn, self.head = nn.GRU(64, 12, batch_first=True), nn.Linear(12, 10)
            self.register_buffer('count', torch.zeros((), dtype=torch.long))
        def forward(self, x):
            self.count += 1
            return self.head(self.rnn(self.body(x).flatten(2))[0][:, -1])*self.scale
    learn, cb = learner(Odd()), SparsifyCallback(50, schedule='one_shot', lth=True, reset_end=True)
    first = state_of(learn.model)
    fit(learn, 2, cbs=cb)
    assert all(torch.equal(v, first[k]*cb.sparsifier.masks.get(k, 1)) for k, v in learn.model.state_dict().items())


def test_learning_rates_are_not_rewound():
    learn, rates = learner(), []
    with quiet(learn): learn.fit_one_cycle(3, cbs=[SparsifyCallback(80, schedule='iterative', lth=True), On(after_step=lambda learn: rates.append(learn.opt.hypers[-1]['lr']), order=-5)])
    other, plain = learner(), []
    with quiet(other): other.fit_one_cycle(3, cbs=On(after_step=lambda learn: plain.append(learn.opt.hypers[-1]['lr']), order=-5))
    assert rates == plain


def test_a_ticket_in_fine_tune_may_rewind_to_an_epoch_of_the_main_fit():
    learn = learner(splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    with quiet(learn): learn.fine_tune(4, cbs=SparsifyCallback(50, schedule='one_shot', lth=True, rewind_epoch=1))
    assert is_exact(learn.model, 50)


def test_a_ticket_whose_epoch_was_skipped_is_refused_before_anything_is_trained():
    learn, batches = learner(), []
    with pytest.raises((ValueError, RuntimeError), match='epoch.*skipped|skipped.*epoch'):
        fit(learn, 4, cbs=[SparsifyCallback(50, schedule='one_shot', lth=True), On(after_batch=batches.append)], start_epoch=1)
    assert not batches


# -- keeping, and falling

def test_keep_holds_what_is_zero_when_the_fit_starts():
    learn, cb = sparse_learner(80)
    zero = {n: p == 0 for n, p in learn.model.named_parameters()}
    seen = []
    fit(learn, 2, cbs=[KeepSparsityCallback(), On(after_step=lambda learn: seen.append(zeros(learn.model)), order=100)])
    assert seen == [zeros(learn.model)]*8 and is_exact(learn.model, 80)
    assert all(torch.equal(p == 0, zero[n]) for n, p in learn.model.named_parameters() if n in cb.sparsifier.masks)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_keep_holds_with_every_optimizer(name):
    learn, cb = sparse_learner(80, 'filter', layers=nn.Conv2d)
    learn.opt_func, learn.opt = OPTIMIZERS[name], None
    before = zeros(learn.model)
    fit(learn, 2, lr=.01, cbs=KeepSparsityCallback())
    assert zeros(learn.model) == before
    assert not learn.model[1].weight[~cb.sparsifier.masks['0.weight'].flatten(1).any(1)].any()


def test_without_any_callback_weights_regrow():
    learn, cb = sparse_learner(80)
    fit(learn, 1)
    assert percent(learn.model) < 5


def test_a_falling_schedule_follows_its_curve_and_weights_return_at_zero():
    learn, cb = learner(), SparsifyCallback(80, schedule='dsd')
    returned, old = [], {}
    def look(learn):
        new = masks_of(cb)
        for n, m in new.items():
            back = m & ~old.get(n, m)
            returned.append(float(learn.model.get_parameter(n)[back].abs().sum()))
        old.update(new)
    journal = Journal(cb)
    fit(learn, 4, cbs=[cb, On(before_batch=when(lambda learn: learn.training, look), order=100), journal])
    got = [p for _, p in cb.history]
    assert got == pytest.approx([80*cb.schedule((i+1)/16) for i in range(16)], abs=.05)
    assert set(returned) == {0.} and journal.regrown == 0 and journal.dense_state == 0
    assert percent(learn.model) < 5 # free to train
    assert cb.history[-1] == (1, 0)


def test_filters_that_return_are_free_to_train():
    learn, cb = learner(), SparsifyCallback(75, 'filter', 'local', schedule='dsd', layers=nn.Conv2d)
    fit(learn, 4, cbs=cb)
    assert cb.history[-1] == (1, 0)
    heard = learn.model[1].bias > 0 # behind a ReLU, a constant below zero has no gradient
    assert learn.model[1].weight.all() and heard.any()
    fit(learn, 2)
    assert learn.model[0].weight.flatten(1).any(1)[heard].all()


@pytest.mark.parametrize('name', ['adam', 'ranger', 'torch_adam'])
def test_nothing_but_zero_is_remembered_of_a_weight_that_returns(name):
    learn, cb = learner(opt_func=OPTIMIZERS[name], lr=.01), SparsifyCallback(90, schedule=Schedule(lambda p: float(.3 < p < .7), 0, 1))
    kept = []
    def look(learn):
        if not cb.history or cb.history[-1][1]: return kept.append({n: ~m for n, m in cb.sparsifier.masks.items()})
        for n, back in kept[-1].items(): assert not learn.model.get_parameter(n)[back].any()
        throw(KeyboardInterrupt('seen'))(learn)
    with pytest.raises(KeyboardInterrupt): fit(learn, 5, cbs=[cb, On(before_batch=when(lambda learn: learn.training, look), order=100)])
    slow = getattr(learn.opt, 'slow_weights', None)
    if slow is not None:
        params = {id(p): s for ps, ss in zip(learn.opt.param_lists, slow) for p, s in zip(ps, ss)}
        for n, back in kept[-1].items(): assert not params[id(learn.model.get_parameter(n))][back].any(), 'the slow weights still hold what was pruned'


# -- transparent

@pytest.mark.parametrize('criteria', ['large_final', 'random_score', 'movement', 'updating_movmag'])
def test_sparsity_0_trains_bit_identically(criteria):
    dense, sparse = learner(nn.Sequential(*net(), nn.Dropout(.3)), dls=loaders(shuffle=True)), learner(nn.Sequential(*net(), nn.Dropout(.3)), dls=loaders(shuffle=True))
    sparse.model.load_state_dict(dense.model.state_dict())
    for learn, cbs in ((dense, None), (sparse, SparsifyCallback(0, criteria=criteria))):
        torch.manual_seed(1); random.seed(1)
        for dl in learn.dls: dl.rng.seed(1)
        fit(learn, 2, cbs=cbs)
    assert same(state_of(dense.model), state_of(sparse.model))
    assert dense.recorder.losses == sparse.recorder.losses


@pytest.mark.parametrize('criteria', ['large_final', 'random_score'])
def test_the_same_seed_gives_the_same_weights(criteria):
    one, two = (sparse_learner(70, criteria=criteria, epochs=2)[0] for _ in range(2))
    assert same(state_of(one.model), state_of(two.model))


def test_nothing_is_printed_in_a_fit(capsys):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for args in ((70,), (50, 'filter'), (50, '2:4')):
            sparse_learner(*args, epochs=2, layers=nn.Conv2d, exclude='0')
        learn, _ = sparse_learner(50)
        fit(learn, 1, cbs=KeepSparsityCallback())
    assert capsys.readouterr() == ('', '')


def test_no_tensor_hook_or_key_leaks_over_15_fits():
    import gc
    learn = learner()
    before = anatomy(learn.model)
    def count():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    attached = SparsifyCallback(80, 'filter', criteria='movement', layers=nn.Conv2d)
    seen = []
    for i in range(15):
        fit(learn, 1, cbs=[attached, SparsifyCallback(50, layers=nn.Linear, schedule='one_shot', lth=True)] if i % 2 else [KeepSparsityCallback()])
        seen.append(count())
    assert seen[-1] <= seen[3] and seen[-2] <= seen[2]
    assert anatomy(learn.model) == before and len(learn.metrics) == 1


def test_an_attached_callback_works_in_every_fit():
    learn, cb = learner(cbs=SparsifyCallback(60)), None
    cb = learn.sparsify
    for epochs in (1, 2):
        fit(learn, epochs)
        assert is_exact(learn.model, 60) and len(cb.history) and column(learn)[-1] == cb.current_sparsity
    assert dense_state(cb, learn.opt) == 0 and regrown(cb) == 0
