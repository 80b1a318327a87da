"Saved, loaded, resumed, exported, copied"
import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from fastai.callback.core import CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper, ranger
from torch import nn

from fastai_helpers import Journal, On, column, fit, is_exact, learner, masks_of, momentum, net, percent, quiet, regrown, same, sparse_learner, state_of, throw, when
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.schedule import Schedule
from fastsparse.sparsifier import SparsityWarning

LINEAR = Schedule(lambda p: p)


def plain(file, model):
    "The state in a file that anybody can read without this package; `L` is how fastai saves hyperparameters"
    with torch.serialization.safe_globals([L]): state = torch.load(file, weights_only=True)
    state = state.get('model', state)
    assert list(state) == list(model.state_dict())
    return state


def zeros_of(state): return 100*sum(int((v == 0).sum()) for k, v in state.items() if k in ('0.weight', '3.weight', '8.weight'))/sum(
    v.numel() for k, v in state.items() if k in ('0.weight', '3.weight', '8.weight'))


# -- save and load

@pytest.mark.parametrize('with_opt', [True, False])
@pytest.mark.parametrize('order', [0, 61, 100])
@pytest.mark.parametrize('event', ['after_step', 'after_batch', 'after_epoch', 'before_validate'])
def test_saved_in_the_middle_of_a_fit(with_opt, order, event, tmp_path):
    if event == 'after_step': order = max(order, 60) # right after our turn
    learn, cb = learner(path=tmp_path), SparsifyCallback(80, schedule=LINEAR)
    saved = []
    fit(learn, 2, cbs=[cb, On(order=order, **{event: lambda learn: saved.append((learn.save(f'm{len(saved)}', with_opt=with_opt), masks_of(cb)))})])
    for file, masks in saved:
        state = plain(file, learn.model)
        assert all(not state[n][~m].any() for n, m in masks.items())
        net().load_state_dict(state)


def test_loaded_after_the_fit_and_kept(tmp_path):
    learn, cb = sparse_learner(80)
    learn.path = tmp_path
    learn.save('sparse')
    masks = masks_of(cb)
    fit(learn, 1)
    learn.load('sparse')
    assert is_exact(learn.model, 80) and cb.current_sparsity == percent(learn.model)
    fit(learn, 2, cbs=KeepSparsityCallback())
    assert is_exact(learn.model, 80) and all(not learn.model.get_parameter(n)[~m].any() for n, m in masks.items())
    fresh = learner(path=tmp_path, value=5).load('sparse')
    fit(fresh, 1, cbs=KeepSparsityCallback())
    assert is_exact(fresh.model, 80)


def test_loaded_in_the_middle_of_a_fit(tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(80, schedule=LINEAR)
    learn.create_opt()
    learn.save('dense')
    journal = Journal(cb)
    fit(learn, 3, cbs=[cb, journal, On(after_epoch=when(lambda learn: learn.epoch == 1, lambda learn: learn.load('dense')))])
    assert journal.steps == sorted(journal.steps) and journal.regrown == 0 and is_exact(learn.model, 80)


# -- trackers

@pytest.mark.parametrize('monitor', ['valid_loss', 'accuracy', 'train_loss', 'sparsity'])
@pytest.mark.parametrize('with_opt', [True, False])
def test_the_best_model_kept_is_fully_sparse(monitor, with_opt, tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(80)
    values = iter([1e-3, 5., 4., 6.]) # the dense model of the first epoch looks best by far
    worse = On(after_validate=lambda learn: learn.recorder.log.__setitem__(slice(1, 4), [v := next(values), v, -v]), order=50.5)
    saver = SaveModelCallback(monitor=monitor, comp=np.greater if monitor in ('accuracy', 'sparsity') else np.less, with_opt=with_opt)
    fit(learn, 4, cbs=[cb, worse, saver])
    assert is_exact(learn.model, 80) and abs(zeros_of(plain(tmp_path/'models'/'model.pth', learn.model)) - 80) < .1
    assert cb.current_sparsity == percent(learn.model) and regrown(cb) == 0


def test_the_best_of_those_that_are_fully_sparse_is_kept(tmp_path):
    learn, cb, states = learner(path=tmp_path), SparsifyCallback(80, schedule='agp'), []
    values = iter([1., .1, 5., 3., 4., 6.])
    worse = On(after_validate=lambda learn: learn.recorder.log.__setitem__(2, next(values)), order=50.5)
    fit(learn, 6, cbs=[cb, worse, SaveModelCallback(), On(after_epoch=lambda learn: states.append(state_of(learn.model)), order=100)])
    assert [zeros_of(s) > 79.9 for s in states] == [False, False, True, True, True, True]
    assert same(state_of(learn.model), states[3])


@pytest.mark.parametrize('kwargs', [dict(every_epoch=True), dict(every_epoch=2), dict(at_end=True)])
@pytest.mark.parametrize('with_opt', [True, False])
def test_other_ways_to_save(kwargs, with_opt, tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(80, schedule=LINEAR)
    fit(learn, 4, cbs=[cb, SaveModelCallback(with_opt=with_opt, **kwargs)])
    files = sorted((tmp_path/'models').glob('*.pth'))
    got = [zeros_of(plain(f, learn.model)) for f in files]
    epochs = [0, 1, 2, 3] if kwargs.get('every_epoch') is True else [0, 2] if kwargs.get('every_epoch') else [3]
    assert got == pytest.approx([column(learn)[i] for i in epochs]) and is_exact(learn.model, 80)


def test_saving_works_in_fine_tune_and_with_an_attached_callback(tmp_path):
    learn = learner(path=tmp_path, splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())], cbs=[SparsifyCallback(80), SaveModelCallback()])
    with quiet(learn): learn.fine_tune(3)
    assert is_exact(learn.model, 80)
    with quiet(learn): learn.validate()


def test_early_stopping_starts_afresh_at_the_target():
    learn, cb = learner(), SparsifyCallback(80, schedule='agp')
    values = iter([1., 2., 3., 4., 5., 6.]) # ever worse
    worse = On(after_validate=lambda learn: learn.recorder.log.__setitem__(2, next(values)), order=50.5)
    fit(learn, 6, cbs=[cb, worse, EarlyStoppingCallback(patience=3)])
    assert len(column(learn)) == 6 and is_exact(learn.model, 80) # without the target: over after the fourth


def test_early_stopping_before_the_target_says_so():
    learn, cb = learner(), SparsifyCallback(80, schedule=LINEAR)
    values = iter([1., 2., 3., 4.])
    worse = On(after_validate=lambda learn: learn.recorder.log.__setitem__(2, next(values)), order=50.5)
    with pytest.warns(SparsityWarning, match=r'ended at 40.* before .* 80 %'): fit(learn, 4, cbs=[cb, worse, EarlyStoppingCallback(patience=1)])
    assert regrown(cb) == 0 and column(learn)[-1] == cb.current_sparsity == percent(learn.model)


def test_a_plateau_is_counted_afresh_at_the_target():
    learn, cb, rates = learner(), SparsifyCallback(80, schedule='agp'), []
    values = iter([1., 2., 3., 4., 5., 6.])
    worse = On(after_validate=lambda learn: learn.recorder.log.__setitem__(2, next(values)), order=50.5)
    fit(learn, 6, cbs=[cb, worse, ReduceLROnPlateau(patience=3), On(after_epoch=lambda learn: rates.append(learn.opt.hypers[-1]['lr']), order=100)])
    assert rates[:5] == [.05]*5 and rates[5] == pytest.approx(.005)


def test_a_best_model_from_before_the_target_is_never_silent(tmp_path):
    learn, cb = learner(path=tmp_path), SparsifyCallback(80, schedule=LINEAR)
    with pytest.warns(SparsityWarning, match='80'): fit(learn, 4, cbs=[cb, SaveModelCallback(), On(after_epoch=when(lambda learn: learn.epoch == 2, throw(CancelFitException)), order=100)])
    assert cb.current_sparsity == percent(learn.model) < 80


# -- export, copy, pickle

READER = """
import sys
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'fastsparse': raise ImportError('fastsparse is not installed here')
sys.meta_path.insert(0, Block())
sys.path[:0] = [{tests!r}]
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import load_learner
learn = torch.load({file!r}, weights_only=False)
assert not any(m.startswith('fastsparse') for m in sys.modules)
print(sum(int((m.weight == 0).sum()) for m in learn.model if hasattr(m, 'weight') and m.weight.dim() > 1))
"""


@pytest.fixture(autouse=True)
def _getters(tmp_path, monkeypatch): # functions that a pickle can name, and a reader without this package can import
    (tmp_path/'small_getters.py').write_text("import torch\ndef x(i): return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i))\ndef y(i): return i % 10\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop('small_getters', None)


def small_learner(tmp_path, **kwargs):
    import small_getters
    dsets = Datasets(range(40), [[small_getters.x], [small_getters.y]], splits=(list(range(32)), list(range(32, 40))))
    return learner(opt_func=Adam, dls=DataLoaders.from_dsets(dsets.train, dsets.valid, bs=16, num_workers=0), path=tmp_path, **kwargs)


@pytest.mark.parametrize('attached', [False, True])
def test_exported_and_loaded(attached, tmp_path):
    cb = SparsifyCallback(70, 'filter', layers='3', criteria='movement')
    learn = small_learner(tmp_path, cbs=cb if attached else None)
    fit(learn, 2, cbs=None if attached else cb)
    want, opt = state_of(learn.model), learn.opt
    learn.export()
    assert learn.opt is not None and len(learn.dls.train_ds) == 32 and opt is not None
    again = load_learner(tmp_path/'export.pkl')
    assert same(state_of(again.model), want) and hasattr(again, 'sparsify') == attached
    if attached:
        assert again.sparsify.sparsifier is None
        learn.remove_cb(SparsifyCallback)
        learn.export()
    fit(learn, 1) # the Learner is still whole


def test_an_exported_file_loads_where_fastsparse_is_not_installed(tmp_path):
    learn, cb = sparse_learner(70)
    learn.path = tmp_path
    other = small_learner(tmp_path)
    other.model.load_state_dict(learn.model.state_dict())
    fit(other, 1, cbs=[SparsifyCallback(80), KeepSparsityCallback()])
    other.dls = other.dls.new_empty()
    other.export('export.pkl')
    count = sum(int((m.weight == 0).sum()) for m in other.model if hasattr(m, 'weight') and m.weight.dim() > 1)
    script = READER.format(file=str(tmp_path/'export.pkl'), tests=str(tmp_path))
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0 and out.stdout.split()[-1] == str(count), out.stderr[-2000:]


def test_the_reader_above_would_notice(tmp_path):
    other = small_learner(tmp_path, cbs=SparsifyCallback(80))
    fit(other, 1)
    other.export('export.pkl')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', READER.format(file=str(tmp_path/'export.pkl'), tests=str(tmp_path))], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode and 'fastsparse is not installed here' in out.stderr


@pytest.mark.parametrize('attached', [False, True])
def test_deepcopy_of_a_learner(attached):
    cb = SparsifyCallback(70)
    learn = learner(cbs=cb if attached else None)
    fit(learn, 1, cbs=None if attached else cb)
    before, twin = state_of(learn.model), copy.deepcopy(learn)
    assert same(before, state_of(twin.model))
    fit(twin, 1, cbs=None if attached else SparsifyCallback(90))
    assert is_exact(twin.model, 70 if attached else 90) and same(before, state_of(learn.model)) and cb.sparsifier.model is learn.model


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb)), copy.copy], ids=['deepcopy', 'pickle', 'copy'])
@pytest.mark.parametrize('fitted', [False, True])
def test_a_copy_of_a_callback_is_a_callback(duplicate, fitted):
    cb = SparsifyCallback(70, 'filter', 'local', 'movement', 'iterative', layers=nn.Conv2d, exclude='0', lth=True)
    if fitted: fit(learner(), 1, cbs=cb)
    twin, learn = duplicate(cb), learner()
    assert twin.schedule == cb.schedule and twin.criteria is cb.criteria and twin.sparsity == 70
    fit(learn, 1, cbs=twin)
    assert twin.sparsifier.model is learn.model and (learn.model[3].weight.flatten(1).any(1)).sum() == 5
    if fitted: assert cb.sparsifier is not twin.sparsifier


def test_keep_is_picklable():
    cb = KeepSparsityCallback()
    fit(learner(), 1, cbs=cb)
    assert isinstance(pickle.loads(pickle.dumps(cb)), KeepSparsityCallback) and copy.deepcopy(cb) is not cb


def test_a_broken_fit_leaves_a_learner_that_can_be_exported(tmp_path):
    learn = small_learner(tmp_path, cbs=[SparsifyCallback(70, criteria='updating_movement', schedule='iterative', lth=True), KeepSparsityCallback()])
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=On(after_step=throw(KeyboardInterrupt())))
    learn.export()
    assert load_learner(tmp_path/'export.pkl').sparsify.sparsifier is None and len(learn.dls.train_ds) == 32


# -- an interrupted run goes on

def opt_of(name): return dict(sgd=momentum, adam=Adam, ranger=ranger, torch_adam=lambda params, **kwargs: OptimWrapper(params, torch.optim.Adam, **kwargs))[name]


@pytest.mark.parametrize('name', ['sgd', 'adam', 'torch_adam', 'ranger'])
@pytest.mark.parametrize('schedule', ['agp', 'iterative', 'dsd', LINEAR])
@pytest.mark.parametrize('criteria,state', [('large_final', False), ('large_final', True), ('updating_movement', True), ('movement', True), ('magnitude_increase', True),
    ('taylor', True), ('movement_signed', True), ('fisher', True), ('wanda', True)])
def test_a_resumed_run_is_the_uninterrupted_one(name, schedule, criteria, state, tmp_path):
    if name != 'adam' and (schedule not in ('agp', 'dsd') or criteria not in ('large_final', 'updating_movement', 'taylor')): schedule = LINEAR
    make = lambda **kwargs: learner(opt_func=opt_of(name), lr=.01, path=tmp_path, **kwargs)
    callback = lambda: SparsifyCallback(80, criteria=criteria, schedule=schedule)
    journey = lambda cb, log: On(after_epoch=lambda learn: log.append((percent(learn.model), masks_of(cb), state_of(learn.model))) if learn.epoch >= len(log) else None, order=100)
    whole, cb, log = make(), callback(), []
    fit(whole, 4, cbs=[cb, journey(cb, log)])
    broken, cb, first, kept = make(), callback(), [], {}
    save = lambda learn: (learn.save('latest'), kept.update(copy.deepcopy(cb.state_dict())))
    with pytest.raises(KeyboardInterrupt): fit(broken, 4, cbs=[cb, journey(cb, first), On(after_epoch=save, order=100), On(after_batch=when(lambda learn: learn.epoch == 2, throw(KeyboardInterrupt())))])
    torch.save(kept, tmp_path/'sparse.pth')
    resumed, cb, last = make(value=9), callback(), [None, None]
    resumed.load('latest')
    if state: cb.load_state_dict(torch.load(tmp_path/'sparse.pth', weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter('error', SparsityWarning)
        warnings.filterwarnings('ignore', '.* down to the least', SparsityWarning) # of the last layer, by an increase of magnitude
        fit(resumed, 4, cbs=[cb, journey(cb, last)], start_epoch=2)
    for (p, masks, weights), (q, others, again) in zip(log, first + last[2:]):
        assert p == q and same(masks, others)
        assert all(torch.allclose(weights[k].float(), again[k].float(), atol=1e-6) for k in weights)
    assert len(last) == 4


def test_a_resumed_run_that_began_sparse_does_not_fall(tmp_path):
    for state in (True, False):
        steps, kept = {}, {}
        for kind in ('whole', 'broken', 'resumed'):
            learn, cb = learner(path=tmp_path), SparsifyCallback(90, schedule=LINEAR)
            if kind == 'resumed':
                learn.load('latest')
                if state: cb.load_state_dict(dict(kept))
            else: fit(learn, 1, cbs=SparsifyCallback(60))
            journal = Journal(cb)
            stop = [On(after_epoch=when(lambda learn: learn.epoch == 0, throw(KeyboardInterrupt())), order=100)] if kind == 'broken' else []
            try: fit(learn, 4, cbs=[cb, journal, *stop], start_epoch=1 if kind == 'resumed' else 0)
            except KeyboardInterrupt: learn.save('latest'); kept.update(cb.state_dict())
            steps[kind] = journal.steps
        assert steps['resumed'] == steps['whole'][4:], state


def test_a_state_of_another_model_is_refused_before_anything_is_trained():
    _, cb = sparse_learner(50, criteria='movement')
    learn, other = learner(net(width=4)), SparsifyCallback(50, criteria='movement')
    before = state_of(learn.model)
    other.load_state_dict(cb.state_dict())
    with pytest.raises(ValueError, match='shape'): fit(learn, 1, cbs=other)
    assert same(before, state_of(learn.model))
    with pytest.raises(ValueError, match='same criteria'):
        other = SparsifyCallback(50)
        other.load_state_dict(cb.state_dict())
        fit(learn, 1, cbs=other)


def test_the_state_is_plain_and_a_copy(tmp_path):
    learn, cb = sparse_learner(50, criteria='updating_movmag')
    state = cb.state_dict()
    torch.save(state, tmp_path/'s.pth')
    again = torch.load(tmp_path/'s.pth', weights_only=True)
    assert same(again['masks'], masks_of(cb))
    state['masks']['3.weight'].fill_(False)
    fit(learn, 1, cbs=KeepSparsityCallback())
    assert is_exact(learn.model, 50)


def test_a_function_that_cannot_be_saved_does_not_break_the_export(tmp_path):
    cb = SparsifyCallback(70, criteria=lambda w: w.abs(), schedule=lambda p: p, exclude=lambda name, layer: name == '0')
    learn = small_learner(tmp_path, cbs=cb)
    fit(learn, 1)
    want = state_of(learn.model)
    learn.export()
    assert learn.opt is not None and len(learn.dls.train_ds) == 32
    again = load_learner(tmp_path/'export.pkl')
    assert same(state_of(again.model), want) and again.sparsify.sparsity == 70
    again.dls = learn.dls
    with pytest.raises(RuntimeError, match='could not be saved with it'): fit(again, 1)
    fit(learn, 1) # the original still has its functions
    for twin in (copy.copy(cb), copy.deepcopy(cb)): assert twin.criteria is cb.criteria
