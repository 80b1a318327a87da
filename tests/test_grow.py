import copy
import math
import pickle
from functools import partial

import pytest
import torch
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, Adam, Lookahead, OptimWrapper
from fastai_helpers import Journal, On, fit, learner, loaders, masks_of, momentum, net, quiet, state_of, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsparse.callback import SparsifyCallback
from fastsparse.grow import Regrow, as_growth, available_growths, drop_and_grow
from fastsparse.plan import MACs, erk
from fastsparse.schedule import constant, taper
from fastsparse.sparsifier import Sparsifier

some = settings(max_examples=40, deadline=None)
GROWTHS = ['rigl', 'set', 'snfs', 'granet']
MSE = nn.functional.mse_loss


# -- drop and grow

@pytest.mark.parametrize('alive,drop,grow,share,expected', [
    ([1, 1, 1, 0, 0, 0], [1, 2, 3, 9, 9, 9], [9, 9, 9, 1, 3, 2], 34, [1, 1, 1, 0, 0, 0]), # what has just gone may come right back
    ([1, 1, 1, 0, 0, 0], [1, 2, 3, 9, 9, 9], [0, 9, 9, 1, 3, 2], 34, [0, 1, 1, 0, 1, 0]),
    ([1, 1, 1, 0, 0, 0], [1, 2, 3, 9, 9, 9], [0, 0, 9, 1, 3, 2], 67, [0, 0, 1, 0, 1, 1]),
    ([1, 1, 1, 0, 0, 0], [2, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], 34, [0, 1, 1, 0, 0, 1]), # ties: the first are the lowest
    ([1, 1, 1, 0, 0, 0], [1, 2, 3, 9, 9, 9], [0, 0, 9, 1, 3, 2], 10, [1, 1, 1, 0, 0, 0]), # 0.3 of a weight
    ([1, 1, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1], 50, [1, 1, 1, 1]),
    ([0, 0, 0, 0], [1, 2, 3, 4], [4, 3, 2, 1], 50, [0, 0, 0, 0])])
def test_by_hand(alive, drop, grow, share, expected):
    got = drop_and_grow(torch.tensor(alive).bool(), torch.tensor(drop).float(), torch.tensor(grow).float(), share)
    assert got.int().tolist() == expected


def naive(alive, drop, grow, share):
    there = [i for i, a in enumerate(alive) if a]
    k = round(share*len(there)/100)
    kept = set(there) - set(sorted(there, key=lambda i: (drop[i], i))[:k])
    return kept | set(sorted(set(range(len(alive))) - kept, key=lambda i: (grow[i], i))[len(alive) - len(there):])


few = st.sampled_from([-math.inf, -2., -1., 0., 0., .5, 1., 3., math.inf])


@some
@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.floats(0, 100))
def test_each_row_keeps_its_number_the_lowest_go_and_the_highest_return(data, rows, n, share):
    draw = lambda of: data.draw(st.lists(st.lists(of, min_size=n, max_size=n), min_size=rows, max_size=rows))
    alive, drop, grow = draw(st.booleans()), draw(few), draw(few)
    got = drop_and_grow(torch.tensor(alive), torch.tensor(drop), torch.tensor(grow), share)
    top = torch.finfo(torch.float32).max
    bounded = lambda row: [max(min(s, top), -top) for s in row]
    for row, *given_ in zip(got, alive, map(bounded, drop), map(bounded, grow)):
        assert {i for i, a in enumerate(row.tolist()) if a} == naive(*given_, share) and row.sum() == sum(given_[0])


def test_nan_is_refused():
    with pytest.raises(ValueError, match='NaN among the scores by which to grow'): drop_and_grow(torch.ones(2).bool(), torch.ones(2), torch.tensor([1, math.nan]), 50)


def test_the_share_decays():
    assert Regrow(share=30, end_pct=.75).at(.25) == pytest.approx(22.5) # of the paper: .3, t=25, T=75
    assert Regrow().at(0) == 30 and Regrow().at(.75) == Regrow().at(1.) == 0 and Regrow(decay=lambda p: 1.).at(.7) == 30


# -- a Sparsifier

def layers():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))


@some
@given(st.sampled_from(['weight', 'kernel', 'column', 'row', 'shared_weight', 'shared_kernel', 'filter']), st.sampled_from(['local', 'global', 'erk', 'per_output']), st.floats(1, 99), st.floats(0, 100), st.sampled_from(['gradient', 'random', 'momentum']), st.integers(0, 9))
def test_every_layer_keeps_its_number_and_what_returns_is_zero(granularity, method, percent, share, by, seed):
    torch.manual_seed(seed)
    model = layers()
    if granularity == 'filter': by = 'random'
    if method == 'per_output' and granularity != 'weight': method = 'local'
    try: s = Sparsifier(model, granularity, method, layers=None if granularity in ('weight', 'filter') else nn.Conv2d, grow=Regrow(by))
    except ValueError as e: assert 'have no gradient' in str(e) or 'has no granularity' in str(e); return
    s.prune_model(percent)
    for _ in range(2):
        if by != 'random': s.gather([(torch.randn(8, 4, 5, 5), torch.randn(8, 5))], MSE)
        before = {n: m.clone() for n, m in s.masks.items()}
        with torch.no_grad():
            for n, m in before.items(): model.get_parameter(n).masked_fill_(~m, 1.) # as a step of an optimizer might
        back = s.regrow(share)
        new = {n: s.masks[n] & ~before[n] for n in before}
        assert back == sum(int(m.sum()) for m in new.values())
        for n, m in before.items():
            assert s.masks[n].sum() == m.sum() and not model.get_parameter(n)[new[n] | ~s.masks[n]].any()
        assert all(torch.equal(t.groups.expand(t.groups.alive(s.masks[n])), s.masks[n]) for n, t in s.targets.items())


def test_of_a_linear_layer_by_hand():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad(): layer.weight.copy_(torch.tensor([[1., -2, 0, 0], [3, .5, 0, 0]]))
    s = Sparsifier(layer, grow='rigl')
    s.prune_model(50)
    s.gather_step({'weight': torch.tensor([[0., 0, 5, 1], [0, 2, -7, 3]])})
    assert s.regrow(50) == 2 # .5 and 1 go; |5| and |-7| return
    assert s.masks['weight'].int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]] and layer.weight.tolist() == [[0, -2, 0, 0], [3, 0, 0, 0]]
    with pytest.raises(ValueError, match='none were gathered since'): s.regrow(50)


def test_momentum_decays():
    layer = nn.Linear(2, 1, bias=False)
    s = Sparsifier(layer, grow='snfs')
    for g in ([[1., 0]], [[0, 1.]]): s.gather_step({'weight': torch.tensor(g)})
    torch.testing.assert_close(s._memory['growth_momentum']['weight'], torch.tensor([[.9, 1.]]))


def test_what_followed_a_filter_returns_with_it():
    torch.manual_seed(0)
    model = net()
    x = torch.randn(4, 1, 8, 8)
    s = Sparsifier(model, 'filter', 'local', grow='set', example_input=x)
    s.prune_model(50)
    was = s.masks['0.weight'].clone()
    for _ in range(20): s.regrow(50)
    back = (s.masks['0.weight'] & ~was).flatten(1).any(1)
    assert back.any() and model[1].weight[back].all() and not model[1].weight[~s.masks['0.weight'].flatten(1).any(1)].any()


def test_by_a_function_of_ones_own():
    layer = nn.Linear(4, 2)
    s = Sparsifier(layer, grow=Regrow(lambda w, grad, generator: -grad.abs()))
    s.prune_model(50)
    s.gather([(torch.randn(3, 4), torch.randn(3, 2))], MSE)
    s.regrow(50)
    assert s.masks['weight'].sum() == 4


def test_erk_as_a_method():
    torch.manual_seed(0)
    one, other = layers(), None
    other = copy.deepcopy(one)
    Sparsifier(one, method='erk').prune_model(80)
    Sparsifier(other, method='local').prune_model(erk(other, 80))
    assert same(state_of(one), state_of(other))


# -- a fit

class Watch(Journal):
    "Notes what returned at each forward, and what is not zero of it, in weights and in the optimizer"
    def __init__(self, cb): super().__init__(cb); self.masks, self.returned, self.bad, self.counts, self.at = None, 0, 0, [], []
    def after_pred(self):
        if not self.training: return
        now, params = masks_of(self.cb), dict(self.cb.sparsifier.model.named_parameters())
        of = self.cb._optimizer_state()
        self.counts.append({n: int(m.sum()) for n, m in now.items()})
        if self.masks is not None:
            if any((now[n] != self.masks[n]).any() for n in now): self.at.append(self.train_iter)
            for n, m in now.items():
                moved = (m != self.masks[n])
                new = m & ~self.masks[n]
                self.returned += int(new.sum())
                self.bad += int((params[n][moved & ~m] != 0).sum() + (params[n][new] != 0).sum())
                for v in of(params[n]).values():
                    if isinstance(v, torch.Tensor) and v.shape == m.shape: self.bad += int((v[moved] != 0).sum())
        self.masks = now


OPTIMIZERS = dict(sgd=momentum, adam=partial(Adam, wd=.1), torch_adam=partial(OptimWrapper, opt=torch.optim.Adam), lookahead=lambda p, **kw: Lookahead(SGD(p, mom=.9, **kw)))


@pytest.mark.parametrize('grow', GROWTHS)
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_what_returns_starts_afresh_and_the_budget_is_exact_at_every_step(grow, opt):
    learn, cb = learner(dls=loaders(6), opt_func=OPTIMIZERS[opt], lr=.01), SparsifyCallback(80, grow=grow, update_every=2)
    watch = Watch(cb)
    fit(learn, 4, cbs=[cb, watch])
    assert watch.returned > 20 and watch.bad == 0 and watch.regrown == 0
    if grow != 'granet': assert all(c == watch.counts[0] for c in watch.counts)
    else: assert [sum(c.values()) for c in watch.counts] == sorted((sum(c.values()) for c in watch.counts), reverse=True)
    assert watch.at[-1] < .75*24 and abs(cb.sparsifier.planned() - 80) < .2
    assert cb.current_sparsity >= cb.sparsifier.planned() # what returned and has no gradient is still zero


@pytest.mark.parametrize('grow', GROWTHS)
@pytest.mark.parametrize('opt', ['sgd', 'torch_adam'])
def test_the_same_without_any_callback_that_looks_on(grow, opt): # which would have the gradients of pruned weights masked
    learn, cb, notes = learner(dls=loaders(6), opt_func=OPTIMIZERS[opt], lr=.01), SparsifyCallback(80, grow=grow, update_every=2), []
    def look(model, args):
        if not model.training or cb.sparsifier is None or cb._holder is None: return
        assert not cb._exposed
        now, state, was = masks_of(cb), cb._optimizer_state(), notes[-1][0] if notes else masks_of(cb)
        new = {n: m & ~was[n] for n, m in now.items()}
        bad = sum(int((v[new[n]] != 0).sum()) for n in now for v in (learn.model.get_parameter(n).detach(), *state(learn.model.get_parameter(n)).values())
                  if isinstance(v, torch.Tensor) and v.shape == now[n].shape)
        notes.append((now, sum(int(m.sum()) for m in new.values()), bad))
    handle = learn.model.register_forward_pre_hook(look)
    fit(learn, 4, cbs=cb)
    handle.remove()
    assert sum(n for _, n, _ in notes) > 20 and not any(bad for _, _, bad in notes)


def test_how_a_fit_goes_comes_with_the_way_to_regrow():
    assert SparsifyCallback(90).schedule is taper and SparsifyCallback(90).method.__name__ == 'global_'
    assert SparsifyCallback(90, grow='rigl').schedule is constant and str(SparsifyCallback(90, grow='set').method) == 'erk'
    assert SparsifyCallback(90, grow='granet').schedule is taper and SparsifyCallback(90, grow='rigl', schedule='agp', method='local').method.__name__ == 'local'
    assert available_growths() == GROWTHS and as_growth(None) is None


def test_without_growth_all_is_as_it_was():
    learn, same_learn = (learner(dls=loaders(6)) for _ in range(2))
    fit(learn, 2, cbs=SparsifyCallback(90))
    fit(same_learn, 2, cbs=SparsifyCallback(90, 'weight', 'global', 'large_final', 'taper', grow=None))
    assert same(state_of(learn.model), state_of(same_learn.model))


@pytest.mark.parametrize('criteria', ['large_final', 'taylor', 'movement_signed', 'wanda'])
@pytest.mark.parametrize('grow', ['rigl', 'granet'])
def test_every_criterion_says_who_goes(criteria, grow):
    learn, cb = learner(dls=loaders(6)), SparsifyCallback(80, criteria=criteria, grow=grow, update_every=3)
    watch = Watch(cb)
    fit(learn, 3, cbs=[cb, watch])
    assert watch.returned and watch.bad == 0 and abs(cb.sparsifier.planned() - 80) < .2


@pytest.mark.parametrize('grow', ['rigl', 'snfs', 'granet'])
@pytest.mark.parametrize('every', [2, 4, 5])
def test_a_resumed_fit_goes_on_where_an_uninterrupted_one_does(grow, every):
    def run(cb, learn, more=(), **kwargs):
        with quiet(learn): learn.fit(4, cbs=[cb, *more], **kwargs)
    whole, one = learner(dls=loaders(4), opt_func=SGD), SparsifyCallback(80, grow=grow, update_every=every)
    run(one, whole)
    part, two = learner(dls=loaders(4), opt_func=SGD), SparsifyCallback(80, grow=grow, update_every=every)
    def stop(learn):
        if learn.epoch == 1: raise CancelFitException()
    run(two, part, [On(after_epoch=stop, order=99)])
    state, three = copy.deepcopy(two.state_dict()), SparsifyCallback(80, grow=grow, update_every=every)
    again = learner(dls=loaders(4), opt_func=SGD)
    again.model.load_state_dict(part.model.state_dict())
    three.load_state_dict(state)
    run(three, again, start_epoch=2)
    assert same(masks_of(one), masks_of(three)) and same(state_of(whole.model), state_of(again.model))


def test_all_batches_of_an_accumulated_step_say_who_returns():
    learn, cb, seen = learner(dls=loaders(8)), SparsifyCallback(80, grow='rigl', update_every=3), []
    n = learn.dls.bs
    gather = Sparsifier.gather_step
    def note(self, grads, kinds=None): seen.append((learn.train_iter, {k: g.clone() for k, g in grads.items()})); return gather(self, grads, kinds)
    watch = Watch(cb)
    sums = On(order=5, before_step=lambda learn: setattr(learn, 'n_back', getattr(learn, 'n_back', 0) + 1))
    Sparsifier.gather_step = note
    try: fit(learn, 3, cbs=[cb, watch, GradientAccumulation(n_acc=2*n), sums])
    finally: Sparsifier.gather_step = gather
    assert seen and all(i % 2 == 1 for i, _ in seen) # a step is made in every other batch
    assert watch.at and all(i % 2 == 0 for i in watch.at) and watch.bad == 0


def test_a_gradient_that_overflows_says_nothing_and_the_update_waits():
    learn, cb = learner(dls=loaders(8)), SparsifyCallback(80, grow='rigl', update_every=4)
    def spoil(learn):
        if learn.train_iter in (3, 4): learn.model[0].weight.grad.fill_(math.inf)
    def mend(learn):
        if learn.train_iter in (3, 4): learn.model[0].weight.grad.zero_()
    watch = Watch(cb)
    fit(learn, 2, cbs=[cb, watch, On(after_backward=spoil, order=-1), On(before_step=mend, order=300)])
    assert watch.at == [6, 8] # not in 4, and not in 5


def test_with_copies_in_half_precision():
    learn, cb = learner(dls=loaders(6), lr=.01), SparsifyCallback(80, grow='rigl', update_every=2)
    watch = Watch(cb)
    fit(learn, 2, cbs=[cb, watch, NonNativeMixedPrecision(dynamic=False, loss_scale=8)] if torch.cuda.is_available() else [cb, watch])
    assert watch.returned and watch.bad == 0


def test_a_best_model_is_one_that_the_masks_fit(tmp_path):
    learn, cb = learner(dls=loaders(6), path=tmp_path), SparsifyCallback(80, grow='rigl', update_every=2)
    fit(learn, 6, cbs=[cb, SaveModelCallback(monitor='accuracy')])
    kept = state_of(learn.model)
    cb.sparsifier.apply_masks()
    assert same(kept, state_of(learn.model)) and cb.sparsifier.sparsity() < 85


def test_a_plan_may_regrow_in_a_part():
    learn, cb = learner(dls=loaders(6)), SparsifyCallback({'0': dict(sparsity=50, grow='set'), '3': dict(sparsity=80, grow='rigl'), '8': 50}, update_every=2)
    seen = []
    def look(learn):
        if learn.training: seen.append({n: m.clone() for n, m in cb.sparsifier.masks.items()})
    fit(learn, 3, cbs=[cb, On(after_pred=look)])
    moved = {n for a, b in zip(seen, seen[1:]) for n in a if (b[n] & ~a[n]).any()}
    assert moved == {'0.weight', '3.weight'} and seen[0]['0.weight'].sum() == seen[-1]['0.weight'].sum()
    assert [p.schedule.func.__class__.__name__ for p in cb.parts][0] == 'Steps'


def test_sparsity_from_the_first_batch():
    learn, cb = learner(dls=loaders(4)), SparsifyCallback(90, schedule='constant', method='local')
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal])
    assert len(set(journal.steps)) == 1 and abs(journal.steps[0] - 90) < .2 and len(cb.history) == 1


# -- mistakes

@pytest.mark.parametrize('make,said', [
    (lambda: SparsifyCallback(90, grow='rigle'), "did you mean 'rigl'"),
    (lambda: SparsifyCallback(90, grow='gradient'), r"did you mean Regrow\('gradient'\)"),
    (lambda: SparsifyCallback(90, grow=True), 'grow=True is unknown'),
    (lambda: SparsifyCallback(90, schedule='iterative', lth=True, grow='rigl'), 'choose one of the two'),
    (lambda: SparsifyCallback(50, '2:4', grow='rigl'), 'keeps 2'),
    (lambda: SparsifyCallback(50, 'coupled', grow='set'), 'no budget would be exact'),
    (lambda: SparsifyCallback(50, 'filter', grow='rigl'), r"use Regrow\('random'\)"),
    (lambda: SparsifyCallback(50, 'output', grow='granet'), r"use Regrow\('random'\)"),
    (lambda: SparsifyCallback(MACs(50), 'coupled', method='erk'), "method='erk' gives each layer"),
    (lambda: SparsifyCallback({'0': dict(sparsity=50, grow='rigle'), '3': 20}), "settings of '0'"),
    (lambda: Regrow(share=.3), 'did you mean 30'),
    (lambda: Regrow(share=101), 'from 1 to 100'),
    (lambda: Regrow(end_pct=75), 'did you mean 0.75'),
    (lambda: Regrow(end_pct=0), 'above 0'),
    (lambda: Regrow('grad'), "did you mean 'gradient'|choose one of"),
    (lambda: Regrow(lambda w, inputs: w), 'can be given grad'),
    (lambda: Regrow(decay=lambda p: 2), 'both from 0'),
    (lambda: Regrow(decay=.5), 'has to be a function'),
    (lambda: Regrow(updates=0), 'at least 1'),
    (lambda: Regrow(method='erkk'), "method 'erkk' is unknown"),
    (lambda: Regrow(schedule='later'), "schedule 'later' is unknown"),
    (lambda: Sparsifier(layers(), 'row', grow='rigl'), r"use Regrow\('random'\)"),
    (lambda: Sparsifier(layers()).regrow(30), "grow='rigl'"),
    (lambda: Sparsifier(layers(), grow='set').regrow(130), 'from 0 to 100')])
def test_mistakes_are_told_where_they_are_made(make, said):
    with pytest.raises(ValueError, match=said): make()


# -- corners

def test_before_anything_is_pruned_nothing_returns():
    from fastsparse.schedule import Schedule, agp
    learn, cb = learner(dls=loaders(6)), SparsifyCallback(80, grow='rigl', schedule=Schedule(agp.func, .5, 1.), update_every=2)
    watch = Watch(cb)
    fit(learn, 4, cbs=[cb, watch])
    assert watch.at[0] >= 12 and watch.bad == 0 and watch.returned


def test_a_schedule_that_falls_goes_with_it():
    learn, cb = learner(dls=loaders(6)), SparsifyCallback(80, grow='rigl', schedule='dsd', update_every=2)
    watch = Watch(cb)
    fit(learn, 4, cbs=[cb, watch])
    assert cb.sparsifier.planned() == 0 and watch.bad == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype):
    torch.manual_seed(0)
    model = layers().to(dtype)
    s = Sparsifier(model, grow='rigl')
    s.prune_model(70)
    before = {n: int(m.sum()) for n, m in s.masks.items()}
    s.gather_step({n: torch.randn_like(t.weight) for n, t in s.targets.items()})
    assert s.regrow(50) > 0 and {n: int(m.sum()) for n, m in s.masks.items()} == before


def test_an_unfinished_pass_changes_nothing():
    layer = nn.Linear(8, 4)
    s = Sparsifier(layer, grow=Regrow(lambda w, grad: grad*math.nan))
    s.prune_model(50)
    s.gather_step({'weight': torch.ones(4, 8)})
    masks, weights = {n: m.clone() for n, m in s.masks.items()}, state_of(layer)
    with pytest.raises(ValueError, match='NaN among the scores by which to grow'): s.regrow(30)
    assert same(masks, s.masks) and same(weights, state_of(layer))


def test_fine_tune_prunes_and_regrows_in_its_second_half():
    learn, cb = learner(dls=loaders(6), splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]), SparsifyCallback(80, grow='rigl', update_every=2)
    watch = Watch(cb)
    with quiet(learn): learn.fine_tune(3, 1e-2, cbs=[cb, watch])
    assert watch.returned and watch.bad == 0 and abs(cb.sparsifier.planned() - 80) < .2


def test_a_validation_in_the_middle_of_a_fit_changes_nothing():
    def run(act):
        learn, cb = learner(dls=loaders(6)), SparsifyCallback(80, grow='rigl', update_every=2)
        fit(learn, 2, cbs=[cb, On(after_batch=lambda learn: act(learn) if learn.training and learn.iter == 3 else None, order=300)])
        return masks_of(cb)
    def validate(learn):
        with learn.no_logging(): learn.get_preds(dl=learn.dls.valid, inner=False)
        learn.model.train()
    assert same(run(lambda learn: None), run(lambda learn: None))
    run(validate)


def test_a_callback_that_regrows_can_be_saved():
    learn, cb = learner(dls=loaders(6)), SparsifyCallback(80, grow=Regrow(lambda w, grad: grad.abs()))
    fit(learn, 1, cbs=cb)
    for c, grow in ((SparsifyCallback(80, grow='rigl'), Regrow()), (cb, None)):
        again = pickle.loads(pickle.dumps(c))
        assert again.grow == grow or grow is None
