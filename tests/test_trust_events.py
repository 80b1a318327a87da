"Whatever the Learner goes through: cut epochs, cancelled steps, validation, exceptions, several fits"
import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
                                  CancelValidException)
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import RandomSplitter
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_helpers import (Journal, On, anatomy, at, column, dense_state, fit, forward_watch, is_exact, learner, loaders, masks_of, net, percent, quiet, regrown, samples, same,
                            sparse_learner, state_of, throw, when)
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.schedule import Schedule, Steps
from fastsparse.sparsifier import SparsityWarning

LINEAR = Schedule(lambda p: p)


def positions(cb): return [p for p, _ in cb.history]


# -- the position in training

def test_the_position_is_exact_and_never_rounded():
    learn, cb = learner(nn.Sequential(nn.Flatten(), nn.Linear(1, 100)), dls=loaders(1500, bs=1, valid=1, size=1), metrics=None), SparsifyCallback(100, schedule=LINEAR, update_every=1)
    fit(learn, 1, cbs=cb)
    assert positions(cb) == [(i+1)/1500 for i in range(1500)]


def test_masks_are_updated_about_a_hundred_times_or_as_often_as_asked():
    make = lambda: learner(nn.Sequential(nn.Flatten(), nn.Linear(1, 100)), dls=loaders(900, bs=1, valid=1, size=1), metrics=None)
    for kwargs, low, high in ((dict(), 90, 115), (dict(update_every=300), 3, 4), (dict(update_every=10**6), 1, 2), (dict(update_every=1), 890, 900)):
        learn, cb = make(), SparsifyCallback(80, schedule=LINEAR, **kwargs)
        fit(learn, 1, cbs=cb)
        assert low <= len(cb.history) <= high and cb.history[-1] == (1, 80) and is_exact(learn.model, 80)


@pytest.mark.parametrize('start', [1, 2])
def test_skipped_epochs(start):
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    fit(learn, 3, cbs=cb, start_epoch=start)
    assert positions(cb) == [(i+1)/12 for i in range(4*start, 12)] and is_exact(learn.model, 80)


@pytest.mark.parametrize('pct', [0., .3, .6])
@pytest.mark.parametrize('first', [True, False])
def test_short_epochs_end_at_the_target(pct, first):
    learn, cb, trained = learner(dls=loaders(5)), SparsifyCallback(80, schedule=LINEAR), []
    short, look = ShortEpochCallback(pct, short_valid=False), On(before_backward=lambda learn: trained.append(percent(learn.model)))
    fit(learn, 2, cbs=[short, cb, look] if first else [cb, look, short])
    n = len(trained)//2
    assert positions(cb) == pytest.approx([(i+1)/(2*n) for i in range(2*n)], rel=1e-12) and positions(cb)[-1] == 1
    assert is_exact(learn.model, 80) and trained[-1] == percent(learn.model) # trained at it


@pytest.mark.parametrize('event,ex', [('before_step', CancelStepException), ('before_step', CancelBatchException), ('before_batch', CancelBatchException),
                                      ('before_backward', CancelBackwardException), ('after_loss', CancelBatchException), ('before_backward', CancelBatchException)])
@pytest.mark.parametrize('which', ['all', 'odd', 'last'])
def test_cancelled_steps_do_not_move_the_schedule(event, ex, which):
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    chosen = dict(all=lambda learn: True, odd=lambda learn: learn.iter % 2, last=at(1, 3))[which]
    journal, seen = Journal(cb), []
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, journal, On(order=100, **{event: when(lambda learn: learn.training and chosen(learn), throw(ex))})])
    handle.remove()
    assert positions(cb) == [(i+1)/8 for i in range(8)] and is_exact(learn.model, 80)
    assert journal.regrown == 0 and journal.dense_state == 0 and not any(seen)


@pytest.mark.parametrize('ex', [CancelTrainException, CancelValidException, CancelEpochException])
@pytest.mark.parametrize('epoch', [0, 1])
def test_epochs_that_are_cut_where_nobody_announced_it(ex, epoch):
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    cut = On(after_step=when(at(epoch, 1), throw(ex))) if ex is not CancelValidException else On(before_validate=when(lambda learn: learn.epoch == epoch, throw(ex)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', SparsityWarning)
        fit(learn, 2, cbs=[cb, cut])
    assert positions(cb) == sorted(positions(cb)) and regrown(cb) == 0
    if ex is CancelEpochException and epoch == 1: assert any('80 %' in str(w.message) and f'{percent(learn.model):.4g} %' in str(w.message) for w in said)
    else: assert is_exact(learn.model, 80) and not said


class Understated(DataLoader):
    "Says that it has half as many batches as it has"
    def __len__(self): return super().__len__()//2


class Overstated(DataLoader):
    "Says that it has twice as many batches as it has"
    def __len__(self): return super().__len__()*2


@pytest.mark.parametrize('cls', [Understated, Overstated])
def test_loaders_with_a_wrong_length_neither_fall_nor_miss_the_target(cls):
    items = samples(96)
    learn, cb = learner(dls=DataLoaders(cls(items[:64], bs=16), DataLoader(items[64:], bs=32))), SparsifyCallback(80, schedule=LINEAR)
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal])
    assert journal.steps == sorted(journal.steps) and is_exact(learn.model, 80)
    assert journal.epochs[0] <= 40.1 # half of the training is half of the way


def test_fit_one_cycle_and_flat_cos():
    import fastai.callback.schedule  # noqa: F401
    for name in ('fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'):
        learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
        with quiet(learn): getattr(learn, name)(2, **(dict(cycle_len=1) if name == 'fit_sgdr' else {}), cbs=cb)
        assert positions(cb)[-1] == 1 and is_exact(learn.model, 80)


# -- validation is not training

def image_learner(**kwargs):
    image = lambda i: np.random.RandomState(i).randint(0, 255, (8, 8), dtype=np.uint8)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=image, get_y=lambda i: 'ab'[i % 2], splitter=RandomSplitter(seed=0))
    model = net()
    model[8] = nn.Linear(16, 2)
    return learner(model, dls=block.dataloaders(range(24), bs=8, num_workers=0), **kwargs)


def look_at_results(learn):
    import matplotlib.pyplot as plt
    learn.show_results(max_n=2)
    plt.close('all')


LOOKS = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(), with_loss=lambda learn: learn.get_preds(with_loss=True),
             train_preds=lambda learn: learn.get_preds(ds_idx=0), predict=lambda learn: learn.predict(3), show_results=look_at_results,
             tta=lambda learn: learn.tta(n=1, use_max=True))


@pytest.mark.parametrize('name', LOOKS)
@pytest.mark.parametrize('fitted', [False, True])
def test_looking_at_a_model_has_no_effect_and_no_output(name, fitted, capsys):
    torch.manual_seed(0)
    cb = SparsifyCallback(50, 'filter', layers=nn.Conv2d, criteria='random_score')
    learn = image_learner(cbs=[cb, KeepSparsityCallback()])
    with quiet(learn):
        if fitted: learn.fit(2)
        before, shape, masks, history, sparsifier = state_of(learn.model), anatomy(learn.model), masks_of(cb) if fitted else None, list(cb.history), cb.sparsifier
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter('error', SparsityWarning)
            LOOKS[name](learn)
    assert same(before, state_of(learn.model)) and shape == anatomy(learn.model) and cb.history == history
    assert capsys.readouterr() == ('', '')
    if fitted: assert same(masks, masks_of(cb)) and cb.sparsifier is sparsifier
    else: assert cb.sparsifier is None
    with quiet(learn): learn.fit(1)
    assert cb.history[-1][0] <= 1 and regrown(cb) == 0


def test_a_tabular_learner():
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(64), b=rng.randn(64), c=rng.choice(list('xyz'), 64), y=rng.choice(list('pq'), 64)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=16, valid_idx=list(range(48, 64)))
    learn, cb = tabular_learner(dls, layers=[20, 10], n_out=2), SparsifyCallback(60)
    with quiet(learn):
        learn.fit(2, cbs=cb)
        before = state_of(learn.model)
        learn.predict(df.iloc[0])
    assert is_exact(learn.model, 60) and cb.current_sparsity == percent(learn.model) and same(before, state_of(learn.model))


def test_validation_does_not_restart_a_finished_callback():
    learn, cb = learner(cbs=SparsifyCallback(80)), None
    cb = learn.sparsify
    fit(learn, 1)
    learn.model[3].weight.data.fill_(1) # the user's own doing stays the user's own
    learn.get_preds()
    assert (learn.model[3].weight == 1).all() and list(learn.recorder.metric_names)[-2:] != ['sparsity', 'sparsity']
    assert cb.current_sparsity == percent(learn.model)


@pytest.mark.parametrize('event,epoch', [('after_epoch', 0), ('after_epoch', 1), ('before_epoch', 1), ('after_validate', 1), ('before_train', 1), ('after_train', 0), ('after_train', 2)])
@pytest.mark.parametrize('look', ['validate', 'get_preds'])
@pytest.mark.parametrize('order', [0, 100])
def test_validation_in_the_middle_of_a_fit(event, epoch, look, order):
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    journal, plain = Journal(cb), learner()
    def act(learn):
        before = state_of(learn.model)
        training, module, dl = learn.training, learn.model.training, getattr(learn, 'dl', None)
        LOOKS[look](learn)
        learn.training, learn.dl = training, dl
        learn.model.train(module)
        assert same(before, state_of(learn.model))
    nested = lambda: On(order=order, **{event: when(lambda learn: learn.epoch == epoch and not learn.lock.locked(), act)})
    fit(plain, 3, cbs=nested())
    fit(learn, 3, cbs=[cb, journal, nested()])
    assert journal.steps == sorted(journal.steps) and journal.regrown == 0
    assert positions(cb) == [(i+1)/12 for i in range(12)] and is_exact(learn.model, 80)


@pytest.mark.parametrize('i', [0, 2, 3])
def test_validation_between_two_batches(i):
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    def act(learn):
        dl, n_iter = learn.dl, learn.n_iter
        learn.validate()
        learn.training, learn.dl, learn.n_iter = True, dl, n_iter
        learn.model.train()
    fit(learn, 2, cbs=[cb, On(after_batch=when(at(1, i), act))])
    assert positions(cb) == [(i+1)/8 for i in range(8)] and is_exact(learn.model, 80)


def test_validation_in_a_fit_leaves_the_column_where_it_is():
    learn, cb = learner(), SparsifyCallback(80)
    fit(learn, 3, cbs=[cb, On(after_epoch=when(lambda learn: learn.epoch == 0 and not learn.lock.locked(), lambda learn: learn.validate()), order=100)])
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']


# -- exceptions: after_fit may never come

class Boom(Exception): pass


def loss_that_breaks(at_call):
    calls = []
    def loss(pred, y):
        calls.append(1)
        if len(calls) == at_call: raise Boom('loss')
        return nn.functional.cross_entropy(pred, y)
    return loss


BREAKS = dict(
    interrupt_before_batch=dict(before_batch=when(at(1, 1), throw(KeyboardInterrupt()))), interrupt_after_step=dict(after_step=when(at(1, 1), throw(KeyboardInterrupt()))),
    interrupt_in_validation=dict(after_pred=when(lambda learn: not learn.training and learn.epoch == 1, throw(KeyboardInterrupt()))),
    error_after_backward=dict(after_backward=when(at(1, 1), throw(Boom('here')))), error_after_step=dict(after_step=when(at(1, 1), throw(Boom('here')))),
    error_after_batch=dict(after_batch=when(at(1, 1), throw(Boom('here')))), error_after_epoch=dict(after_epoch=when(lambda learn: learn.epoch == 1, throw(Boom('here')))),
    error_before_validate=dict(before_validate=when(lambda learn: learn.epoch == 1, throw(Boom('here')))), cancelled=dict(after_batch=when(at(1, 1), throw(CancelFitException()))))


@pytest.mark.parametrize('name', BREAKS)
@pytest.mark.parametrize('order', [-100, 0, 100])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_fit_that_breaks_leaves_the_model_sparse_and_clean(name, order, granularity):
    learn, cb = learner(), SparsifyCallback(80, granularity, schedule=LINEAR, layers=nn.Conv2d)
    before = anatomy(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        try: fit(learn, 3, cbs=[cb, On(order=order, **BREAKS[name])])
        except (Boom, KeyboardInterrupt): pass
        else: assert name == 'cancelled'
        got = percent(learn.model)
        assert 10 < got < 80 and regrown(cb) == 0 and anatomy(learn.model) == before and cb not in learn.cbs
        assert cb.current_sparsity == cb.report.sparsity
        fit(learn, 1, cbs=SparsifyCallback(90, granularity, 'local', layers=nn.Conv2d)) # the next fit works
    assert abs(int((learn.model[3].weight == 0).sum()) - .9*learn.model[3].weight.numel()) <= (36 if granularity == 'filter' else .5)
    assert list(learn.recorder.metric_names).count('sparsity') == 1


def test_an_exception_in_the_loss():
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    loss, learn.loss_func = learn.loss_func, loss_that_breaks(7)
    with pytest.raises(Boom): fit(learn, 3, cbs=cb)
    assert regrown(cb) == 0 and percent(learn.model) > 10
    learn.loss_func = loss
    fit(learn, 1, cbs=cb)
    assert is_exact(learn.model, 80)


@pytest.mark.parametrize('order', [0, 52, 100])
def test_an_exception_in_before_fit_of_another_callback(order):
    learn, cb = learner(), SparsifyCallback(80)
    before, shape = state_of(learn.model), anatomy(learn.model)
    with pytest.raises(Boom): fit(learn, 1, cbs=[cb, On(before_fit=throw(Boom('x')), order=order)])
    assert same(before, state_of(learn.model)) and shape == anatomy(learn.model)
    fit(learn, 1)
    assert percent(learn.model) == 0 and 'sparsity' not in learn.recorder.metric_names
    fit(learn, 1, cbs=cb)
    assert is_exact(learn.model, 80)


def test_a_fit_that_another_callback_cancels_at_once_does_nothing():
    for first in (None, Boom('x')):
        learn = learner(cbs=SparsifyCallback(80, reset_end=True))
        if first:
            with pytest.raises(Boom): fit(learn, 2, cbs=On(after_batch=when(at(1, 0), throw(first))))
        before = state_of(learn.model)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            fit(learn, 1, cbs=On(before_fit=throw(CancelFitException)))
        assert same(before, state_of(learn.model))


def test_an_attached_callback_after_an_interrupt_is_asleep():
    learn = learner(cbs=SparsifyCallback(80))
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=On(after_batch=when(at(0, 1), throw(KeyboardInterrupt()))))
    before = state_of(learn.model)
    with quiet(learn): learn.validate(); learn.get_preds()
    assert same(before, state_of(learn.model))


@pytest.mark.parametrize('event', ['after_batch', 'before_batch', 'after_step', 'after_epoch', 'before_validate'])
def test_removed_in_the_middle_of_a_fit_it_leaves_nothing(event):
    learn = learner(cbs=SparsifyCallback(80, schedule=LINEAR))
    cb, before = learn.sparsify, anatomy(learn.model)
    def act(learn):
        if cb in learn.cbs: learn.remove_cb(cb)
    fit(learn, 3, cbs=On(**{event: when(lambda learn: learn.epoch == 1, act)}, order=100))
    assert anatomy(learn.model) == before and cb.learn is None and not hasattr(learn, 'sparsify')
    assert len(cb.history) < 12 and percent(learn.model) < 5 # nothing holds any longer
    fit(learn, 1)
    assert 'sparsity' not in learn.recorder.metric_names
    assert cb.current_sparsity == percent(learn.model)


def test_errors_keep_their_message():
    learn = learner()
    with pytest.raises(ValueError, match=r'(?s)SparsifyCallback.*matches no layer'): fit(learn, 1, cbs=SparsifyCallback(50, layers='nope'))


def test_nan_in_the_ranking_is_an_error_that_names_the_layer():
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    poison = On(after_batch=when(at(0, 1), lambda learn: learn.model[3].weight.data[0, 0, 0, 0].fill_(torch.nan)))
    with pytest.raises(ValueError, match=r"NaN.*'3'"): fit(learn, 2, cbs=[cb, poison])
    assert regrown(cb) == 0


def test_ends_below_the_target_with_both_numbers():
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    with pytest.warns(SparsityWarning) as said: fit(learn, 4, cbs=[cb, On(after_batch=when(at(1, 3), throw(CancelFitException())))])
    assert len(said) == 1 and '80 %' in str(said[0].message) and '40' in str(said[0].message)
    cb.sparsifier.prune_model(80) # the fix that it names
    assert is_exact(learn.model, 80)


# -- several fits

def groups(model): return [list(model[:3].parameters()), list(model[3:6].parameters()), list(model[6:].parameters())]


@pytest.mark.parametrize('schedule', ['agp', 'one_shot', 'iterative', LINEAR])
@pytest.mark.parametrize('freeze_epochs', [1, 2])
def test_fine_tune_is_one_journey(schedule, freeze_epochs):
    learn, cb = learner(splitter=groups), SparsifyCallback(80, schedule=schedule)
    journal = Journal(cb)
    with quiet(learn): learn.fine_tune(3, freeze_epochs=freeze_epochs, cbs=[cb, journal])
    assert journal.steps == sorted(journal.steps) and set(journal.steps[:4*freeze_epochs]) == {0.}
    assert is_exact(learn.model, 80) and journal.steps[-1] == percent(learn.model) and journal.regrown == 0


def test_fine_tune_without_groups_does_not_reach_the_end_in_its_first_phase():
    learn, cb = learner(), SparsifyCallback(80)
    journal = Journal(cb)
    with quiet(learn): learn.fine_tune(3, cbs=[cb, journal])
    assert journal.steps == sorted(journal.steps) and journal.steps[3] < 80 and is_exact(learn.model, 80)


def test_fine_tune_of_a_sparse_model_keeps_its_zeros_while_frozen():
    learn, _ = sparse_learner(50)
    learn.splitter, learn.opt = groups, None
    cb = SparsifyCallback(80)
    journal = Journal(cb)
    with quiet(learn): learn.fine_tune(3, cbs=[cb, journal])
    assert set(journal.steps[:4]) == {50.} and journal.steps == sorted(journal.steps) and is_exact(learn.model, 80)


def share(*layers): return 100*sum(int((x.weight == 0).sum()) for x in layers)/sum(x.weight.numel() for x in layers)


@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('by_hand', [True, False])
def test_what_is_frozen_is_left_as_it_is_and_what_trains_is_pruned(by_hand, method):
    "In a fit by hand, and in a `fine_tune` that ends before it unfreezes"
    learn, cb = learner(splitter=groups), SparsifyCallback(80, method=method)
    learn.freeze()
    trains = [m for m in learn.model if hasattr(m, 'weight') and m.weight.requires_grad and m.weight.dim() > 1]
    frozen = [m for m in learn.model if hasattr(m, 'weight') and not m.weight.requires_grad and m.weight.dim() > 1]
    assert trains and frozen
    with pytest.warns(SparsityWarning, match=f'{len(frozen)} of {len(frozen)+len(trains)} layers to prune are frozen and stay as they are'):
        if by_hand: fit(learn, 2, cbs=cb)
        else:
            with quiet(learn): learn.fine_tune(0, freeze_epochs=2, cbs=cb)
    assert share(*frozen) == 0 and abs(share(*trains) - 80) < .5 and regrown(cb) == 0
    if by_hand: # the other one has looked at the model again, unfrozen
        assert abs(cb.current_sparsity - share(*trains)) < 1e-9 and column(learn)[-1] == cb.current_sparsity
        assert 'frozen (requires_grad=False)' in str(cb.report) and len(cb.report.layers) == len(trains)


def test_zeros_of_frozen_layers_are_held():
    learn, cb = learner(splitter=groups), SparsifyCallback(80)
    fit(learn, 2, cbs=cb)
    assert is_exact(learn.model, 80)
    before = state_of(learn.model)
    learn.freeze()
    fit(learn, 1, cbs=(again := SparsifyCallback(90)))
    assert torch.equal(before['0.weight'], learn.model[0].weight) and regrown(again) == 0 and abs(again.current_sparsity - 90) < .5
    fit(learn, 1, cbs=KeepSparsityCallback())
    assert torch.equal(before['0.weight'], learn.model[0].weight)


def test_a_fit_in_which_all_is_frozen_is_refused():
    learn = learner()
    for m in learn.model:
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r'(?s)all layers to prune are frozen.*unfreeze'): fit(learn, 1, cbs=SparsifyCallback(80))


def test_a_frozen_teacher_in_the_model_is_left_alone():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        def forward(self, x): return self.net(x) + self.teacher(x)
    learn = fit(learner(Student()), 2, cbs=SparsifyCallback(80))
    assert share(learn.model.teacher[1]) == 0 and share(learn.model.net[1]) == 80


@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('schedule', ['agp', LINEAR, 'one_shot'])
@pytest.mark.parametrize('criteria', ['large_final', 'small_final', 'random_score', 'magnitude_increase'])
def test_a_second_fit_starts_from_the_zeros_and_a_higher_target_keeps_them(method, schedule, criteria):
    learn, cb = sparse_learner(50, method=method, criteria=criteria)
    first = masks_of(cb)
    again, journal = SparsifyCallback(50, method=method, criteria=criteria, schedule=schedule), None
    journal = Journal(again)
    fit(learn, 1, cbs=[again, journal])
    assert same(first, masks_of(again)) and set(journal.steps) == {percent(learn.model)}
    more = SparsifyCallback(80, method=method, criteria=criteria, schedule=schedule)
    journal = Journal(more)
    fit(learn, 2, cbs=[more, journal])
    assert journal.steps == sorted(journal.steps) and abs(percent(learn.model) - 80) < .1
    for n, m in masks_of(more).items(): assert not (m & ~first[n]).any()


def test_a_lower_target_keeps_the_zeros_and_says_so():
    learn, _ = sparse_learner(80)
    with pytest.warns(SparsityWarning, match=r'asked for 50 % zeros, got (80|79\.99) % \(.*\): these zeros were there before'): fit(learn, 1, cbs=SparsifyCallback(50))
    assert is_exact(learn.model, 80)


@pytest.mark.parametrize('granularity', ['filter', 'kernel', '2:4'])
def test_groups_that_are_zero_stay_whole_in_a_second_fit(granularity):
    args = dict(layers=nn.Conv2d, exclude='0')
    learn, cb = sparse_learner(50, granularity, **args)
    first = masks_of(cb)
    again = SparsifyCallback(50 if granularity == '2:4' else 75, granularity, **args)
    fit(learn, 1, cbs=again)
    for n, m in masks_of(again).items(): assert not (m & ~first[n]).any()


def test_a_layer_that_was_pruned_whole_stays_so_in_a_second_fit():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn, cb, regrew = learner(model), SparsifyCallback({'2': 100}, 'weight', 'local'), []
    fit(learn, 1, cbs=cb)
    fit(learn, 2, cbs=[cb, On(after_step=lambda learn: regrew.append(bool(model[2].weight.any())), order=100)])
    assert not any(regrew)


def test_keep_after_sparsify_in_one_fit():
    learn, cb = sparse_learner(50)
    fit(learn, 2, cbs=[KeepSparsityCallback(), SparsifyCallback(80)])
    assert is_exact(learn.model, 80)
    for n, m in cb.sparsifier.masks.items(): assert not learn.model.get_parameter(n)[~m].any()


# -- lr_find

@pytest.mark.parametrize('fitted', [False, True])
@pytest.mark.parametrize('criteria', ['large_final', 'updating_movement', 'random_score'])
def test_lr_find_leaves_everything_as_it_was(fitted, criteria, tmp_path):
    cb = SparsifyCallback(80, criteria=criteria)
    learn = learner(cbs=[cb], path=tmp_path)
    if fitted: fit(learn, 1)
    before, shape, masks, history = state_of(learn.model), anatomy(learn.model), masks_of(cb) if fitted else None, list(cb.history)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('error', SparsityWarning)
        learn.lr_find(num_it=8, show_plot=False)
    assert same(before, state_of(learn.model)) and anatomy(learn.model) == shape and cb.history == history
    if fitted: assert same(masks, masks_of(cb)) and cb.current_sparsity == percent(learn.model)
    fit(learn, 2)
    assert is_exact(learn.model, 80) and positions(cb) == sorted(positions(cb))


def test_lr_find_with_keep(tmp_path):
    learn, _ = sparse_learner(80)
    learn.path = tmp_path
    learn.add_cb(KeepSparsityCallback())
    before = state_of(learn.model)
    with quiet(learn): learn.lr_find(num_it=8, show_plot=False)
    assert same(before, state_of(learn.model))


# -- several callbacks

def test_two_on_different_layers_have_a_column_each():
    learn, a, b = learner(), SparsifyCallback(50, layers=nn.Conv2d), SparsifyCallback(80, layers=nn.Linear, schedule='one_shot')
    fit(learn, 2, cbs=[a, b])
    assert (learn.model[8].weight == 0).float().mean() == pytest.approx(.8) and abs(a.current_sparsity - 50) < .1
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'sparsity_2', 'time']
    assert column(learn)[-1] == a.current_sparsity and column(learn, 'sparsity_2')[-1] == b.current_sparsity
    assert regrown(a) == regrown(b) == 0


@pytest.mark.parametrize('layers', [None, '3', nn.Linear])
def test_two_on_the_same_layers_are_refused(layers):
    learn = learner()
    before = state_of(learn.model)
    with pytest.raises(ValueError, match=r'(?s)two SparsifyCallbacks.*(3|8).*layers= or exclude='): fit(learn, 1, cbs=[SparsifyCallback(50), SparsifyCallback(80, layers=layers)])
    assert same(before, state_of(learn.model))
    fit(learn, 1, cbs=SparsifyCallback(50))
    assert is_exact(learn.model, 50)


def test_one_schedule_in_two_learners_at_once():
    schedule = Schedule(Steps(4), .1, .9)
    a, b, cbs = learner(), learner(value=1), [SparsifyCallback(50, schedule=schedule), SparsifyCallback(80, schedule=schedule)]
    def other(_): fit(b, 2, cbs=cbs[1])
    fit(a, 2, cbs=[cbs[0], On(after_batch=when(at(0, 2), other))])
    assert is_exact(a.model, 50) and is_exact(b.model, 80) and [p for p, _ in cbs[0].history] == [p for p, _ in cbs[1].history]


def test_one_callback_in_two_learners():
    a, b, cb = learner(), learner(net(width=4), value=1), SparsifyCallback(50)
    fit(a, 1, cbs=cb)
    first = state_of(a.model)
    fit(b, 1, cbs=cb)
    assert is_exact(a.model, 50) and is_exact(b.model, 50) and same(first, state_of(a.model)) and cb.sparsifier.model is b.model
    fit(a, 1, cbs=cb)
    assert cb.sparsifier.model is a.model and cb.current_sparsity == percent(a.model)


def test_a_replaced_model():
    learn = learner(cbs=SparsifyCallback(50))
    fit(learn, 1)
    old = learn.model
    learn.model, learn.opt = net(width=4), None
    before = state_of(old)
    fit(learn, 1)
    assert is_exact(learn.model, 50) and learn.sparsify.sparsifier.model is learn.model and same(before, state_of(old))


# -- gradients

def test_gradients_of_pruned_weights_are_zero_before_anything_sees_them():
    learn, cb, seen = learner(), SparsifyCallback(80, schedule=Schedule(Steps(1), 0)), []
    def look(learn): seen.append(sum(float(learn.model.get_parameter(n).grad[~m].abs().sum()) for n, m in cb.sparsifier.masks.items()))
    fit(learn, 2, cbs=[On(before_step=look, order=-100), cb])
    assert seen == [0.]*8


@pytest.mark.parametrize('last', ['steps', 'does not step'])
def test_accumulated_gradients(last):
    learn, cb = learner(dls=loaders(5 if last == 'does not step' else 4)), SparsifyCallback(80, schedule=LINEAR)
    journal, steps, grads = Journal(cb), [], []
    def look(learn): grads.append(sum(float(learn.model.get_parameter(n).grad[~m].abs().sum()) for n, m in cb.sparsifier.masks.items()))
    fit(learn, 1, cbs=[GradientAccumulation(32), cb, journal, On(after_step=steps.append, before_step=look, order=-100)])
    assert len(steps) == 2 and is_exact(learn.model, 80) and journal.regrown == 0 and journal.dense_state == 0
    assert set(grads) == {0.}
    assert percent(learn.model) == column(learn)[-1]


def test_copy_of_a_callback_in_the_middle_of_a_fit():
    learn, cb, copies = learner(), SparsifyCallback(80), []
    fit(learn, 2, cbs=[cb, On(after_batch=when(at(1, 0), lambda learn: copies.append(copy.deepcopy(learn.model))))])
    assert anatomy(copies[0])[0] == anatomy(learn.model)[0] and percent(copies[0]) > 0


def test_an_own_callback_may_read_the_sparsity_at_any_time():
    seen, learn, cb = [], learner(), SparsifyCallback(80)
    class Reader(Callback):
        def after_batch(self): seen.append((cb.current_sparsity, cb.report.sparsity, percent(self.learn.model)))
    fit(learn, 2, cbs=[cb, Reader()])
    assert all(a == b == c for a, b, c in seen)
    assert dense_state(cb, learn.opt) == 0


@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'before_batch', 'after_backward', 'after_step', 'before_validate', 'after_validate', 'after_epoch'])
def test_removed_in_the_middle_of_an_event(event):
    learn, cb = learner(), SparsifyCallback(80)
    remover = On(order=0, **{event: when(lambda learn: learn.epoch == 1 and cb in learn.cbs, lambda learn: learn.remove_cb(cb))})
    fit(learn, 3, cbs=[cb, remover])
    assert cb not in learn.cbs and list(learn.model.state_dict()) == list(learner().model.state_dict())


# -- lean

class Reads(TorchDispatchMode):
    "Counts what a GPU would have to be waited for"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._to_copy)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('cbs', [[], [GradientClip()]])
def test_nothing_waits_for_the_device_between_two_updates(cbs):
    learn, cb, reads = learner(), SparsifyCallback(80, 'filter', schedule=LINEAR, update_every=3), {}
    run = type(cb).__call__
    def counted(event_name):
        with Reads() as r: run(cb, event_name)
        if learn.training and event_name not in ('before_fit', 'before_epoch', 'before_train', 'after_train', 'after_epoch', 'after_fit'):
            reads.setdefault(len(cb.history) > len(seen), []).append(r.n)
        seen[:] = cb.history
    seen = []
    cb.__class__ = type('Counted', (SparsifyCallback,), dict(__call__=lambda self, event_name: counted(event_name), __module__='fastsparse.callback'))
    fit(learn, 3, cbs=[cb, *cbs])
    assert sum(reads[False]) == 0 and all(reads[True])


def test_after_a_fit_only_masks_are_left():
    learn, cb = learner(), SparsifyCallback(80)
    fit(learn, 2, cbs=cb)
    theirs = {t.data_ptr() for t in [*learn.model.state_dict().values()]}
    mine, todo, seen = [], [vars(cb), vars(cb.sparsifier)], set()
    while todo: # all tensors that the callback can reach, but not through the Learner or the model
        x = todo.pop()
        if id(x) in seen or isinstance(x, (nn.Module, type(learn), type(learn.opt))): continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor): mine.append(x)
        elif isinstance(x, dict): todo += x.values()
        elif isinstance(x, (list, tuple, set)): todo += x
        elif type(x).__module__.startswith('fastsparse.'): todo += vars(x).values()
    mine = [t for t in mine if t.data_ptr() not in theirs]
    assert sum(t.numel()*t.element_size() for t in mine) == sum(m.numel() for m in cb.sparsifier.masks.values())
