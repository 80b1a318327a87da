"Masks hold whoever writes the weights, in every kind of model and precision"
from functools import partial

import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision, copy_clone, get_master, to_master_grads, to_model_params
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.optimizer import Adam, Lamb, Larc, OptimWrapper, RMSProp, ranger
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from fastai_helpers import (Journal, On, anatomy, column, conv, dense_state, fit, forward_watch, is_exact, learner, loaders, momentum, net, percent, quiet, regrown, sparse_learner,
                            state_of, when)
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.schedule import Schedule, Steps, agp, dsd
from fastsparse.sparsifier import Sparsifier

AT_ONCE = Schedule(Steps(1), 0)


# -- others who write the weights

class EMA(Callback):
    "Moves the model towards an average of its weights, at one event"
    def __init__(self, event, order):
        self.order, self.averages = order, None
        setattr(self, event, self.move)
    def move(self):
        params = list(self.learn.model.parameters())
        if self.averages is None: self.averages = [p.detach().clone() + .01 for p in params]
        for p, a in zip(params, self.averages): p.data.lerp_(a, .1)


class Swap(Callback):
    "Validates with averaged weights, and trains on with its own"
    def __init__(self, order): self.order, self.averages = order, None
    def after_step(self):
        params = list(self.learn.model.parameters())
        if self.averages is None: self.averages = [p.detach().clone() + .01 for p in params]
        for p, a in zip(params, self.averages): a.lerp_(p.detach(), .1)
    def before_validate(self):
        self.own = [p.detach().clone() for p in self.learn.model.parameters()]
        for p, a in zip(self.learn.model.parameters(), self.averages): p.data.copy_(a)
    def after_validate(self):
        for p, o in zip(self.learn.model.parameters(), self.own): p.data.copy_(o)


WRITING = ['before_batch', 'after_backward', 'after_step', 'after_batch', 'before_train', 'after_train', 'before_epoch', 'after_epoch', 'before_validate']


@pytest.mark.parametrize('order', [-20, 0, 51, 60, 100])
@pytest.mark.parametrize('event', WRITING)
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_masks_hold_at_every_forward_whoever_writes_weights_and_when(order, event, granularity):
    learn, cb, seen = learner(), SparsifyCallback(70, granularity, schedule=AT_ONCE, layers=nn.Conv2d), []
    if event == 'before_batch': order = min(order, cb.order - .001) # between our turn and the forward there is no place for a mask
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, EMA(event, order)])
    handle.remove()
    assert len(seen) == 10 + (granularity == 'filter') and not any(seen), 'one is watched'
    assert percent(learn.model) > 60


def inline(order):
    averages = {}
    def move(self):
        for n, p in self.learn.model.named_parameters():
            averages.setdefault(n, p.detach().clone() + .01)
            p.data.lerp_(averages[n], .1)
    cb = Callback(after_step=move)
    cb.order = order
    return cb


@pytest.mark.parametrize('order', [0, 60, 100])
def test_callbacks_made_of_functions_write_weights_too(order):
    learn, cb, seen = learner(), SparsifyCallback(70, schedule=AT_ONCE), []
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, inline(order)])
    handle.remove()
    assert len(seen) == 10 and not any(seen)


@pytest.mark.parametrize('order', [0, 51, 60, 100])
def test_averaged_weights_are_validated_sparse(order):
    learn, cb, seen = learner(), SparsifyCallback(70, schedule=AT_ONCE), []
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, Swap(order)])
    handle.remove()
    assert len(seen) == 10 and not any(seen)
    assert is_exact(learn.model, 70) and column(learn)[-1] == pytest.approx(70, abs=.1)


@pytest.mark.parametrize('event', ['after_train', 'after_validate', 'after_epoch', 'after_fit', 'after_batch'])
@pytest.mark.parametrize('order', [-20, 0, 50])
def test_who_writes_weights_last_of_all_leaves_them_sparse(event, order):
    learn, cb = learner(), SparsifyCallback(70, schedule=AT_ONCE)
    fit(learn, 2, cbs=[cb, EMA(event, order)])
    assert is_exact(learn.model, 70)


@pytest.mark.parametrize('order', [0, 55, 59])
def test_checkpoints_are_sparse_though_averages_are_written_before_they_are_saved(order, tmp_path):
    from fastai.callback.tracker import SaveModelCallback
    learn, cb = learner(path=tmp_path), SparsifyCallback(70, schedule=AT_ONCE)
    fit(learn, 2, cbs=[cb, EMA('after_epoch', order), SaveModelCallback(every_epoch=True)])
    for i in range(2):
        saved = torch.load(tmp_path/'models'/f'model_{i}.pth', weights_only=True)
        assert sum(int((saved[n][~m] != 0).sum()) for n, m in cb.sparsifier.masks.items()) == 0


@pytest.mark.parametrize('order', [0, 60, 100])
def test_keep_holds_whoever_writes_weights(order):
    learn, cb = sparse_learner(70)
    seen = []
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[KeepSparsityCallback(), EMA('after_step', order)])
    handle.remove()
    assert not any(seen)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1., 1e-30])
def test_masks_are_assigned_whatever_stood_there(value):
    learn, cb, seen = learner(), SparsifyCallback(70, schedule=AT_ONCE), []
    def poison(learn):
        for n, m in cb.sparsifier.masks.items(): learn.model.get_parameter(n).data[~m] = value
    def poison_gradients(learn):
        for n, m in cb.sparsifier.masks.items(): learn.model.get_parameter(n).grad[~m] = value
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, On(after_step=poison), On(after_backward=poison_gradients)])
    handle.remove()
    assert not any(seen) and is_exact(learn.model, 70) and all(p.isfinite().all() for p in learn.model.parameters())


def test_nan_in_the_batchnorm_of_a_pruned_filter_does_not_survive():
    learn, cb = learner(), SparsifyCallback(50, 'filter', 'local', schedule=AT_ONCE, layers=nn.Conv2d)
    def poison(learn): learn.model[1].weight.data[~cb.sparsifier.masks['0.weight'].flatten(1).any(1)] = torch.nan
    fit(learn, 1, cbs=[cb, On(after_step=poison)])
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_a_checkpoint_loaded_in_the_middle_of_a_fit_is_masked(tmp_path):
    learn, cb, seen = learner(path=tmp_path), SparsifyCallback(70, schedule=AT_ONCE), []
    with torch.no_grad(): learn.save('dense')
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[cb, On(after_batch=when(lambda learn: learn.training and learn.iter == 1, lambda learn: learn.load('dense', with_opt=False)))])
    handle.remove()
    assert not any(seen) and is_exact(learn.model, 70)


# -- clipping, decay, frozen groups, mixed precision

def test_clipping_sees_no_gradient_of_pruned_weights():
    learn, cb, norms = learner(), SparsifyCallback(90, schedule=AT_ONCE), []
    norm = lambda learn: torch.stack([p.grad.norm() for p in learn.model.parameters()]).norm().item()
    alive = lambda learn: torch.stack([(p.grad*cb.sparsifier.masks.get(n, 1)).norm() for n, p in learn.model.named_parameters()]).norm().item()
    fit(learn, 2, cbs=[cb, On(before_step=lambda learn: norms.append((norm(learn), alive(learn))), order=5), GradientClip(.01),
                       On(before_step=lambda learn: norms.append((alive(learn), .01)), order=12)])
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in norms) and len(norms) == 16


def test_frozen_groups_and_discriminative_rates():
    groups = lambda m: [list(m[:3].parameters()), list(m[3:6].parameters()), list(m[6:].parameters())]
    learn, cb = learner(splitter=groups, opt_func=Adam, wd=.1), SparsifyCallback(75, 'filter', 'local', layers=nn.Conv2d)
    fit(learn, 1, cbs=SparsifyCallback(75, 'filter', 'local', layers=nn.Conv2d)) # leaves gradients behind
    learn.freeze_to(1)
    journal = Journal(cb)
    fit(learn, 2, lr=slice(1e-4, 1e-2), cbs=[cb, journal])
    assert journal.regrown == 0 and journal.dense_state == 0 and percent(learn.model) > 60
    dead = ~cb.sparsifier.masks['0.weight'].flatten(1).any(1)
    assert dead.any() and not learn.model[1].weight[dead].any() and not learn.model[1].bias[dead].any()


class Overflow(Callback):
    "What mixed precision does on an overflow: infinite gradients, and no step"
    order = 10
    def __init__(self, which): self.which = which
    def after_backward(self):
        for p in self.learn.model.parameters():
            if self.learn.train_iter % 3 in self.which: p.grad.fill_(torch.inf)
    def before_step(self):
        if self.learn.train_iter % 3 in self.which: raise CancelStepException()


@pytest.mark.parametrize('which', [(0,), (2,), (0, 1, 2)])
def test_steps_that_overflow(which):
    learn, cb = learner(dls=loaders(3), opt_func=Adam), SparsifyCallback(80)
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, Overflow(which), journal])
    assert journal.regrown == 0 and journal.dense_state == 0 and is_exact(learn.model, 80) and journal.steps[-1] == percent(learn.model)


@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision(mode):
    learn, cb = learner(), SparsifyCallback(80)
    journal = Journal(cb)
    fit(learn, 2, cbs=[MixedPrecision(mode), cb, journal, GradientClip(1.)])
    assert journal.regrown == 0 and journal.dense_state == 0 and is_exact(learn.model, 80)


class MasterCopy(Callback):
    "`NonNativeMixedPrecision` with its tests for a GPU left out"
    order = NonNativeMixedPrecision.order
    def before_fit(self):
        self.model_pgs, self.master_pgs = get_master(self.learn.opt)
        self.old = self.learn.opt.param_lists
        for ps, ms in zip(self.model_pgs, self.master_pgs):
            for p, m in zip(ps, ms): self.learn.opt.state[m] = copy_clone(self.learn.opt.state.pop(p, {}))
        self.learn.opt.param_lists = self.master_pgs
    def before_step(self): to_master_grads(self.model_pgs, self.master_pgs)
    def after_step(self):
        self.learn.model.zero_grad()
        to_model_params(self.model_pgs, self.master_pgs)
    def after_fit(self):
        for ps, ms in zip(self.model_pgs, self.master_pgs):
            for p, m in zip(ps, ms): self.learn.opt.state[p] = self.learn.opt.state.pop(m, {})
        self.learn.opt.param_lists = self.old
        del self.master_pgs, self.model_pgs


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('schedule', ['agp', 'iterative', AT_ONCE])
@pytest.mark.parametrize('make', [lambda: SparsifyCallback(80), KeepSparsityCallback])
def test_weights_that_are_stepped_in_a_copy(first, schedule, make):
    learn, cb, seen, states = learner(opt_func=Adam), SparsifyCallback(80, schedule=schedule), [], []
    if make is KeepSparsityCallback: fit(learn, 1, cbs=cb)
    master, held = MasterCopy(), cb if make is not KeepSparsityCallback else KeepSparsityCallback()
    def look(learn):
        masters = {id(p): m for ps, ms in zip(master.model_pgs, master.master_pgs) for p, m in zip(ps, ms)}
        for n, m in cb.sparsifier.masks.items():
            copy = masters[id(learn.model.get_parameter(n))]
            states.extend(int((v[~m] != 0).sum()) for v in learn.opt.state[copy].values() if isinstance(v, torch.Tensor) and v.shape == m.shape)
    handle = forward_watch(learn.model, cb, seen)
    fit(learn, 2, cbs=[*([master, held] if first else [held, master]), On(after_batch=when(lambda learn: learn.training, look))])
    handle.remove()
    assert not any(seen) and states and not any(states) and is_exact(learn.model, 80)


def test_weights_that_return_come_from_the_copy_as_zero_too():
    learn, cb = learner(), SparsifyCallback(90, schedule=Schedule(lambda p: float(.3 < p < .7)))
    found, last = [], {}
    def look(learn):
        if last and cb.history[-1][1] == 0: found.append(max(float(learn.model.get_parameter(n).detach()[~m].abs().max()) for n, m in last.items())); last.clear()
        elif cb.history and cb.history[-1][1]: last.update({n: m.clone() for n, m in cb.sparsifier.masks.items()})
    fit(learn, 2, lr=1e-6, cbs=[cb, MasterCopy(), On(after_batch=when(lambda learn: learn.training, look))])
    assert len(found) == 1 and found[0] < 1e-4


# -- models

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 10)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(self.b(self.a(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize('method', ['local', 'global'])
def test_tied_tensors_are_counted_and_masked_once(method):
    learn, cb = learner(Tied()), SparsifyCallback(80, method=method)
    fit(learn, 2, cbs=cb)
    assert learn.model.a.weight is learn.model.b.weight and list(cb.sparsifier.masks) == ['a.weight', 'head.weight']
    total = 64*64 + 640
    assert abs(int((learn.model.a.weight == 0).sum() + (learn.model.head.weight == 0).sum()) - .8*total) <= 1
    assert cb.report.weights == total and cb.report.all_weights == total + 10
    two = [SparsifyCallback(80, layers='a'), SparsifyCallback(80, layers='b')]
    with pytest.raises(ValueError, match='same layers'): fit(learn, 1, cbs=two)


def test_a_decoder_tied_to_an_embedding():
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.dec = nn.Embedding(10, 8), nn.Linear(8, 10)
            self.dec.weight = self.emb.weight
        def forward(self, x): return self.dec(self.emb((x[:, 0, 0, :4] > 0).long()).mean(1))
    learn, cb = learner(LM()), SparsifyCallback(50)
    fit(learn, 2, cbs=cb)
    assert (learn.model.emb.weight == 0).sum() == 40 and learn.model.dec.weight is learn.model.emb.weight


def test_a_compiled_model_is_compiled_once_and_sparse():
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = net()
    learn, cb = learner(torch.compile(model, backend='eager'), dls=loaders(4, valid=16)), SparsifyCallback(80, schedule='iterative')
    learn.opt = learn.opt_func(learn.model.parameters(), lr=.05)
    fit(learn, 1, cbs=[])
    graphs = counters['stats']['unique_graphs']
    fit(learn, 3, cbs=cb)
    fit(learn, 1, cbs=KeepSparsityCallback())
    assert graphs and counters['stats']['unique_graphs'] == graphs and not counters['recompile_limit']
    assert is_exact(model, 80) and cb.sparsifier.model is model and all(not n.startswith('_orig_mod') for n in cb.sparsifier.masks)
    torch._dynamo.reset()


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'kernel'])
def test_channels_last(granularity):
    learn, cb = learner(net(channels=3), dls=loaders(channels=3)), SparsifyCallback(50, granularity, 'local', layers=nn.Conv2d)
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal, ChannelsLast()])
    w = learn.model[3].weight
    assert w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
    assert journal.regrown == 0 and journal.dense_state == 0 and (w == 0).sum() == w.numel()/2


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize('criteria', ['large_final', 'movement', 'random_score'])
def test_weights_of_other_types(dtype, criteria):
    learn, cb = learner(net().to(dtype), lr=.01), SparsifyCallback(70, criteria=criteria)
    learn.loss_func = lambda p, y: nn.functional.cross_entropy(p.float(), y)
    journal = Journal(cb)
    fit(learn, 2, cbs=[cb, journal, On(before_batch=lambda learn: setattr(learn, 'xb', (learn.xb[0].to(dtype),)))])
    assert journal.regrown == 0 and journal.dense_state == 0 and is_exact(learn.model, 70) and learn.model[0].weight.dtype == dtype


def test_a_model_that_moves_between_fits():
    learn, cb = sparse_learner(70)
    learn.model.double()
    learn.opt = None
    fit(learn, 1, cbs=[SparsifyCallback(80), On(before_batch=lambda learn: setattr(learn, 'xb', (learn.xb[0].double(),)))])
    assert is_exact(learn.model, 80) and cb.current_sparsity == percent(learn.model)


LEFTOVERS = dict(parametrized=(lambda layer: parametrizations.weight_norm(layer), r'remove_parametrizations'), spectral=(lambda layer: parametrizations.spectral_norm(layer), r'remove_parametrizations'),
                 weight_norm=(lambda layer: weight_norm(layer), r'remove_weight_norm'), pruned=(lambda layer: prune.l1_unstructured(layer, 'weight', .5), r'prune\.remove'))


@pytest.mark.parametrize('name', LEFTOVERS)
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_weights_that_are_computed_are_refused_with_the_fix(name):
    spoil, message = LEFTOVERS[name]
    model = net()
    spoil(model[3])
    learn = learner(model)
    before = state_of(model)
    with pytest.raises(ValueError, match=fr"(?s)'3'.*{message}.*exclude='3'"): fit(learn, 1, cbs=SparsifyCallback(50, layers=['0', '3']))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fit(learn, 1, cbs=(cb := SparsifyCallback(50))) # who did not ask for it gets the rest, and is told
    assert (model[0].weight == 0).any() and list(cb.sparsifier.left_dense) == ['3'] and '3 is left dense' in str(cb.report)


def test_leftovers_of_prune_work_after_the_fix():
    model = net()
    prune.l1_unstructured(model[3], 'weight', .5)
    prune.remove(model[3], 'weight')
    zero = model[3].weight == 0
    learn, cb = learner(model), SparsifyCallback(80)
    fit(learn, 1, cbs=cb)
    assert is_exact(model, 80) and not model[3].weight[zero].any()


class Elsewhere(nn.Module):
    "BatchNorms registered in an order that is not that of the data"
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.second, self.first = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        for n in self.norms: nn.init.uniform_(n.bias, 1, 2)
    def forward(self, x): return self.head(self.norms[0](self.second(self.norms[1](self.first(x)).relu())).relu().mean((2, 3)))


def test_batchnorms_are_found_by_where_data_flows():
    model = Elsewhere()
    learn, cb = learner(model), SparsifyCallback({'first': 25, 'second': 75}, 'filter', 'local')
    outs = {}
    handles = [n.register_forward_hook(lambda m, i, o, k=k: outs.__setitem__(k, o.detach())) for k, n in enumerate(model.norms)]
    fit(learn, 2, cbs=cb)
    for train in (True, False):
        model.train(train)(torch.randn(4, 1, 8, 8))
        for name, k, n in (('first', 1, 2), ('second', 0, 6)):
            dead = ~cb.sparsifier.masks[f'{name}.weight'].flatten(1).any(1)
            assert dead.sum() == n and not outs[k][:, dead].any() and outs[k][:, ~dead].flatten(2).any(2).any(0).all()
    for h in handles: h.remove()


def test_a_model_that_cannot_be_traced_is_pruned_and_the_report_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(*conv(1, 8)), nn.Linear(8, 10)
        def forward(self, x):
            if x.sum() > 1e9: return x
            return self.head(self.body(x).mean((2, 3)))
    learn, cb = learner(Odd()), SparsifyCallback(50, 'filter', layers=nn.Conv2d)
    fit(learn, 2, cbs=cb)
    assert cb.current_sparsity == 50 and 'could not be traced' in str(cb.report)
    assert learn.model.body[1].weight.all()


def test_a_model_with_names_of_ours():
    import warnings
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.sparsity, self.history, self.criteria, self.schedule, self.masks = net(), 5, [], 'x', None, 7
        def forward(self, x): return self.layers(x)
    learn, cb = learner(Named()), SparsifyCallback(50)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn, 2, cbs=cb)
    assert is_exact(learn.model, 50) and learn.model.history == [] and learn.model.sparsity == 5


def test_recurrent_layers_are_pruned_and_usable():
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 10)
        def forward(self, x): return self.head(self.rnn(x[:, 0])[0][:, -1])
    learn, cb = learner(Rnn()), SparsifyCallback(50)
    before = anatomy(learn.model)
    fit(learn, 2, cbs=cb)
    assert list(cb.sparsifier.masks) == ['rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'head.weight'] and anatomy(learn.model) == before
    assert cb.current_sparsity == pytest.approx(50, abs=.1) and not learn.model.rnn.weight_hh_l0.all()


def test_the_optimizer_s_state_is_zero_where_a_second_fit_prunes_more():
    for opt_func in (Adam, None):
        learn = learner(**(dict(opt_func=opt_func) if opt_func else {}))
        fit(learn, 1)
        first, second = SparsifyCallback(50), SparsifyCallback(90, schedule=AT_ONCE)
        fit(learn, 1, cbs=first)
        assert dense_state(first, learn.opt) == 0
        fit(learn, 1, cbs=second)
        assert dense_state(second, learn.opt) == 0 and regrown(second) == 0


def test_keep_finds_the_optimizer_s_state_of_a_model_pruned_by_hand():
    learn, cb = learner(opt_func=Adam), None
    fit(learn, 1)
    from fastsparse.sparsifier import Sparsifier
    sparsifier = Sparsifier(learn.model)
    sparsifier.prune_model(80)
    seen = []
    cb = On(after_step=lambda learn: seen.append(sum(int((learn.model.get_parameter(n)[~m] != 0).sum()) for n, m in sparsifier.masks.items())), order=-100)
    with quiet(learn): learn.fit(1, cbs=[KeepSparsityCallback(), cb])
    assert seen == [0]*4


@pytest.mark.parametrize('order', [0, 60, 1000])
@pytest.mark.parametrize('keep', [False, True])
def test_whoever_writes_weights_after_the_fit_does_not_have_the_last_word(order, keep):
    "An average of the weights, say, that is copied into the model at the end"
    def dense(learn): [p.data.add_(1) for p in learn.model.parameters()]
    learn, cb = learner(), SparsifyCallback(80)
    fit(learn, 2, cbs=[cb, *([] if keep else [On(after_fit=dense, order=order)])])
    if keep: fit(learn, 1, cbs=[KeepSparsityCallback(), On(after_fit=dense, order=order)])
    assert is_exact(learn.model, 80) and cb.order < 60


# -- gradients are masked where somebody can see them, and only there

class Odd(torch.optim.SGD): pass


@pytest.mark.parametrize('seen,kwargs,cbs', [
    (False, dict(), []), (False, dict(opt_func=Adam), []), (False, dict(opt_func=RMSProp), []), (False, dict(opt_func=ranger), [ShortEpochCallback(.9)]),
    (False, dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), []), (True, dict(opt_func=partial(OptimWrapper, opt=Odd)), []),
    (True, dict(opt_func=Lamb), []), (True, dict(opt_func=Larc), []), (True, dict(), [GradientClip()]), (True, dict(), [GradientAccumulation(8)]),
    (True, dict(), [MixedPrecision()]), (True, dict(), [On(after_batch=lambda learn: None)]), (True, dict(), [Callback(after_batch=lambda self: None)])])
def test_gradients_are_masked_where_somebody_can_see_them(seen, kwargs, cbs):
    learn, cb, grads = learner(**kwargs), SparsifyCallback(80, schedule=AT_ONCE), []
    after = cb.after_backward
    def after_backward():
        after()
        grads.append(sum(int((learn.model.get_parameter(n).grad[~m] != 0).sum()) for n, m in cb.sparsifier.masks.items()))
    cb.after_backward = after_backward
    fit(learn, 1, cbs=[cb, *cbs])
    assert (sum(grads) == 0) == seen and dense_state(cb, learn.opt) == 0 and regrown(cb) == 0


@pytest.mark.parametrize('opt_func', [momentum, Adam, ranger])
@pytest.mark.parametrize('schedule', [agp, dsd])
def test_a_masked_gradient_changes_nothing_but_itself(opt_func, schedule):
    ends = []
    for cbs in ([], [On(after_backward=lambda learn: None)]):
        learn, cb = learner(opt_func=opt_func), SparsifyCallback(90, schedule=schedule)
        fit(learn, 2, cbs=[cb, *cbs])
        assert dense_state(cb, learn.opt) == 0
        ends.append(learn.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


class Around(Callback):
    def before_train(self): pass
    def after_epoch(self): pass


class Within(Callback):
    def after_batch(self): pass


class Called(Callback):
    def __call__(self, event_name): pass


@pytest.mark.parametrize('other,passes', [(None, 1), (Around, 1), (Within, 2), (Called, 2)]) # after each step, and before each batch
def test_only_who_acts_within_batches_costs_a_second_pass(other, passes, monkeypatch):
    learn, calls = learner(dls=loaders(3)), []
    apply = Sparsifier.apply_masks
    monkeypatch.setattr(Sparsifier, 'apply_masks', lambda self: (calls.append(learn.iter if learn.training else None), apply(self))[1])
    fit(learn, 1, cbs=[SparsifyCallback(80, schedule=AT_ONCE, update_every=1)] + ([other()] if other else []))
    assert calls.count(1) == calls.count(2) == passes
