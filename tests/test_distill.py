"Soft targets, where a teacher comes from, and what it must not disturb"
import copy, math, warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, MSELossFlat
from torch import nn

from fastai_helpers import On, fit, is_exact, learner, loaders, net, quiet, same, samples, seed, state_of
from fastsparse.callback import SparsifyCallback
from fastsparse.distill import DistillCallback, class_axis, soft_targets
import fastsparse.learner # noqa: F401 (learn.compact)
from fastsparse.schedule import Schedule
from test_measure import language_learner
from test_trust_files import _getters, small_learner # noqa: F401 (a fixture)


# -- the loss

def test_two_classes_by_hand():
    "KL((.75, .25) ‖ (.5, .5)) = .75 ln 1.5 + .25 ln .5; logits and temperature doubled give four times that"
    kl = .75*math.log(1.5) + .25*math.log(.5)
    v = torch.tensor([[math.log(3), 0.]])
    assert kl == pytest.approx(.130812, abs=1e-6)
    assert float(soft_targets(torch.zeros(1, 2), v, 1.)) == pytest.approx(kl, abs=1e-6)
    assert float(soft_targets(torch.zeros(1, 2), 2*v, 2.)) == pytest.approx(4*kl, abs=1e-5)
    assert float(soft_targets(v, torch.zeros(1, 2), 1.)) == pytest.approx(.5*math.log(.5/.75) + .5*math.log(.5/.25), abs=1e-6), 'not the same the other way round'


@pytest.mark.parametrize('T', [.5, 1., 4., 20.])
def test_gradient_is_that_of_the_cross_entropy_with_soft_labels(T):
    "Hinton et al. 2015, equation 2, times T²: T (softmax(z/T) - softmax(v/T))"
    z, v = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    soft_targets(z, v, T).backward()
    assert torch.allclose(z.grad, T*((z/T).softmax(1) - (v/T).softmax(1))/5, atol=1e-6)


@pytest.mark.parametrize('shape,axis', [((3, 4), 1), ((3, 4), -1), ((3, 4, 5, 6), 1), ((3, 5, 4), -1)])
def test_axis_and_reduction(shape, axis):
    z, v = torch.randn(shape), torch.randn(shape)
    flat = lambda t: t.movedim(axis, -1).reshape(-1, 4)
    rows = [float(soft_targets(a[None], b[None], 2.)) for a, b in zip(flat(z), flat(v))]
    assert float(soft_targets(z, v, 2., axis)) == pytest.approx(sum(rows)/len(rows), rel=1e-4)
    assert float(soft_targets(z, v, 2., axis, 'sum')) == pytest.approx(sum(rows), rel=1e-4)


def test_half_precision_is_computed_in_full():
    z, v = torch.randn(4, 9), torch.randn(4, 9)
    assert soft_targets(z.bfloat16(), v.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('loss,axis', [(CrossEntropyLossFlat(), -1), (CrossEntropyLossFlat(axis=1), 1), (nn.CrossEntropyLoss(), 1), (F.cross_entropy, 1), (FocalLossFlat(), -1), (nn.NLLLoss(), 1),
    (LabelSmoothingCrossEntropy(), 1), (LabelSmoothingCrossEntropyFlat(), -1), (MSELossFlat(), None), (nn.BCEWithLogitsLoss(), None), (lambda a, b: a.mean(), None)])
def test_where_classes_are(loss, axis): assert class_axis(loss) == axis


# -- in a fit

class Watch(Callback):
    "Notes the mixed loss and what it is made of"
    order = 5
    def __init__(self, teacher, w=.5, T=2.): self.wise, self.w, self.T, self.off = teacher, w, T, []
    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): v = copy.deepcopy(self.wise).eval()(*self.xb)
        own = F.cross_entropy(self.pred, self.yb[0])
        kl = F.kl_div((self.pred/self.T).log_softmax(1), (v/self.T).softmax(1), reduction='batchmean')
        self.off.append(abs(float(self.loss_grad - ((1-self.w)*own + self.w*self.T**2*kl))))
        assert float(self.learn.loss) == pytest.approx(float(own), abs=1e-6), 'what is shown is the plain loss'


@pytest.mark.parametrize('w,T', [(.5, 4.), (0., 1.), (1., 2.), (.9, 8.)])
def test_the_loss_is_what_it_says(w, T):
    learn, teacher = learner(), net(width=4)
    watch = Watch(teacher, w, T)
    fit(learn, 2, cbs=[DistillCallback(teacher, w, T), watch])
    assert len(watch.off) == 8 and max(watch.off) < 1e-5


@pytest.mark.parametrize('before', [True, False])
def test_the_dense_self_is_the_teacher_beside_pruning(before):
    learn = fit(learner(), 2)
    dense, cb, prune = state_of(learn.model), DistillCallback(), SparsifyCallback(80, schedule=Schedule(lambda p: p))
    watch = Watch(copy.deepcopy(learn.model))
    fit(learn, 2, cbs=[cb, prune, watch] if before else [prune, cb, watch])
    assert same(dense, cb.teacher.state_dict()) and is_exact(learn.model, 80) and max(watch.off) < 1e-5
    assert not cb.teacher.training and not any(p.requires_grad for p in cb.teacher.parameters())


def test_validation_is_the_plain_one():
    learn, cb = learner(), DistillCallback(net())
    fit(learn, 1, cbs=cb)
    learn.add_cb(cb)
    with quiet(learn): a = list(learn.validate())
    learn.remove_cb(cb)
    with quiet(learn): assert a == list(learn.validate()) == learn.recorder.values[-1][-2:] or a == list(learn.validate())


@pytest.mark.parametrize('training', [True, False])
def test_a_given_teacher_is_not_changed(training):
    teacher = learner(net(width=4), value=3)
    teacher.model.train(training)
    before, modes, grads = state_of(teacher.model), [m.training for m in teacher.model.modules()], [p.requires_grad for p in teacher.model.parameters()]
    fit(learner(), 1, cbs=DistillCallback(teacher))
    assert same(before, teacher.model.state_dict()) and modes == [m.training for m in teacher.model.modules()] and grads == [p.requires_grad for p in teacher.model.parameters()]
    assert all(p.grad is None for p in teacher.model.parameters())


def test_it_can_teach():
    "A student that sees no labels comes closer to its teacher"
    teacher = fit(learner(value=1), 4).model
    learn = learner(value=2)
    apart = lambda: float((learn.model.eval()(x).log_softmax(1) - teacher.eval()(x).log_softmax(1)).abs().mean())
    x = torch.stack([s[0] for s in samples(96)])
    before = apart()
    fit(learn, 6, cbs=DistillCallback(teacher, weight=1.))
    assert apart() < .7*before


def test_the_teacher_is_made_once_and_before_anything_moves():
    learn = fit(learner(), 1)
    cb, dense = DistillCallback(), state_of(learn.model)
    fit(learn, 1, cbs=cb)
    first = cb.teacher
    fit(learn, 1, cbs=cb)
    assert cb.teacher is first and same(dense, first.state_dict()) and not same(dense, state_of(learn.model))
    other = learner(value=5)
    fit(other, 1, cbs=cb)
    assert cb.teacher is not first, 'another Learner has another self'


def split(m): return [list(m[:3].parameters()), list(m[3:].parameters())]


def test_fine_tune_has_one_teacher_made_when_the_body_begins_to_train():
    learn, cb, seen = learner(splitter=split), DistillCallback(), []
    watch = On(before_train=lambda l: seen.append((l.opt.frozen_idx, None if cb.teacher is None else id(cb.teacher))), order=20)
    with quiet(learn): learn.fine_tune(2, freeze_epochs=2, cbs=[cb, SparsifyCallback(50), watch])
    assert [f for f, _ in seen] == [1, 1, 0, 0] and seen[0][1] is seen[1][1] is None and seen[2][1] == seen[3][1] == id(cb.teacher)
    given, seen = DistillCallback(net()), []
    with quiet(learn): learn.fine_tune(1, cbs=[given, On(after_loss=lambda l: l.training and seen.append(float(l.loss_grad - l.loss)), order=3)])
    assert all(seen), 'a given one teaches in both'


def test_lr_find_leaves_no_teacher_behind():
    learn, cb = learner(), DistillCallback()
    learn.add_cb(cb)
    with quiet(learn): learn.lr_find(num_it=9, show_plot=False)
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(1)
    now = state_of(learn.model)
    fit(learn)
    assert same(now, cb.teacher.state_dict())


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_inputs(mix):
    learn, teacher, seen = learner(), net(), []
    cb = DistillCallback(teacher, weight=1., temperature=2.)
    def check(l):
        if not l.training: return
        with torch.no_grad(): v = copy.deepcopy(teacher).eval()(*l.xb)
        seen.append(abs(float(l.loss_grad - soft_targets(l.pred, v, 2.))))
    fit(learn, 1, cbs=[cb, mix(), On(after_loss=check, order=5)])
    assert len(seen) == 4 and max(seen) < 1e-6 and isinstance(learn.loss_func, CrossEntropyLossFlat)


def weights(cbs, bs, **kwargs):
    seed(0)
    teacher = net(width=4)
    learn = learner(dls=loaders(64//bs, bs=bs), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), **kwargs)
    fit(learn, 2, cbs=[DistillCallback(teacher), *cbs])
    return state_of(learn.model)


def test_accumulated_gradients_are_those_of_one_large_batch():
    a, b = weights([GradientAccumulation(32)], 16), weights([], 32)
    for n in a: assert torch.allclose(a[n], b[n], atol=1e-5)


def test_mixed_precision_callbacks_run():
    a, b = weights([MixedPrecision()], 16), weights([], 16)
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_a_model_of_another_precision_than_its_teacher():
    class Cast(Callback):
        def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    for teacher in (None, net(), net().bfloat16()): fit(learner(net().double(), cbs=Cast()), 1, cbs=DistillCallback(teacher))


def test_recurrent_models():
    learn = fit(language_learner())
    dense, cb = state_of(learn.model), DistillCallback()
    fit(learn, 2, cbs=[cb, SparsifyCallback(50)])
    assert same(dense, cb.teacher.state_dict()) and cb.teacher[0].hidden is not learn.model[0].hidden
    fit(learn, 1, cbs=DistillCallback(language_learner()))


def test_a_recurrent_teacher_begins_each_epoch_anew():
    learn, cb, hidden = fit(language_learner()), DistillCallback(language_learner()), []
    fit(learn, 2, cbs=[cb, On(before_batch=lambda l: l.training and hidden.append(sum(float(t.abs().sum()) for h in cb.teacher[0].hidden for t in h)), order=20)])
    assert [h == 0 for h in hidden] == 2*[True, False, False, False]


def test_regression_by_a_function():
    data = [(torch.randn(4), torch.randn(1)) for _ in range(32)]
    learn = Learner(DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)), nn.Linear(4, 1), loss_func=MSELossFlat())
    with pytest.raises(ValueError, match='loss of this Learner, MSELoss, is not known as one of classes.*nn.MSELoss'): fit(learn, 1, cbs=DistillCallback())
    teacher, seen = nn.Linear(4, 1), []
    check = On(after_loss=lambda l: l.training and seen.append(float(l.loss_grad - (.5*F.mse_loss(l.pred, l.yb[0]) + .5*F.mse_loss(l.pred, teacher(*l.xb))))), order=5)
    fit(learn, 1, cbs=[DistillCallback(teacher, loss_func=nn.MSELoss()), check])
    assert seen == pytest.approx([0]*4, abs=1e-6)


def test_segmentation():
    data = [(torch.randn(1, 8, 8), torch.randint(0, 3, (8, 8))) for _ in range(16)]
    make = lambda: nn.Conv2d(1, 3, 3, padding=1)
    learn, teacher, seen = Learner(DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)), make(), loss_func=CrossEntropyLossFlat(axis=1)), make(), []
    check = On(after_loss=lambda l: l.training and seen.append(float(l.loss_grad - soft_targets(l.pred, teacher(*l.xb), 2., 1))), order=5)
    fit(learn, 1, cbs=[DistillCallback(teacher, weight=1.), check])
    assert seen == pytest.approx([0]*2, abs=1e-6)


def test_a_sum_is_taught_a_sum():
    learn, teacher, seen = learner(), net(), []
    learn.loss_func = nn.CrossEntropyLoss(reduction='sum')
    check = On(after_loss=lambda l: l.training and seen.append(float(l.loss_grad - 16*soft_targets(l.pred, copy.deepcopy(teacher).eval()(*l.xb)))), order=5)
    fit(learn, 1, lr=1e-6, cbs=[DistillCallback(teacher, weight=1.), check])
    assert seen == pytest.approx([0]*4, abs=1e-3)


def test_compacted_afterwards():
    learn = fit(learner(), 1)
    cb = DistillCallback()
    fit(learn, 1, cbs=[SparsifyCallback(50, 'coupled', 'local'), cb])
    dense = cb.teacher
    assert learn.compact()
    fit(learn, 1, cbs=cb)
    assert cb.teacher is dense and dense[0].out_channels > learn.model[0].out_channels


def test_exported_without_its_teacher(tmp_path):
    learn = small_learner(tmp_path)
    learn.add_cb(DistillCallback(net(width=64), loss_func=lambda a, b: (a-b).square().mean()))
    fit(learn)
    learn.export('all.pkl')
    assert not {'teacher', 'compare'} & learn.distill.__getstate__().keys() and learn.distill.teacher is not None and learn.opt is not None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'all.pkl')
    again.dls = learn.dls
    with quiet(again):
        again.validate()
        with pytest.raises(RuntimeError, match='its teacher was not; make a new one'): again.fit(1)


def test_hooks_of_fastai_are_not_copied():
    learn, cb = fit(learner(), 1), DistillCallback()
    fit(learn, 1, cbs=[ActivationStats(with_hist=True), cb])
    assert not any(m._forward_hooks for m in cb.teacher.modules())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_computed_weights(norm):
    learn = fit(learner(nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))))
    expected, cb = None, DistillCallback()
    x = torch.stack([s[0] for s in samples(8)])
    expected = learn.model.eval()(x)
    fit(learn, 2, cbs=cb)
    assert torch.allclose(cb.teacher(x), expected, atol=1e-5) and not torch.allclose(learn.model.eval()(x), expected, atol=1e-3)


def test_nothing_is_left_after_a_broken_fit():
    learn = learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[DistillCallback(), On(after_step=lambda l: (_ for _ in ()).throw(KeyboardInterrupt('stop')))])
    assert not hasattr(learn, 'distill') and fit(learn)


# -- mistakes

@pytest.mark.parametrize('kwargs,message', [(dict(weight=50), 'did you mean 0.5?'), (dict(weight=-1), 'from 0 to 1'), (dict(weight='x'), 'from 0 to 1'), (dict(temperature=0), 'above 0'),
    (dict(temperature=math.inf), 'above 0'), (dict(temperature=True), 'above 0'), (dict(teacher='resnet18'), 'a Learner, a PyTorch module'), (dict(teacher=nn.Linear), 'a Learner, a PyTorch module'),
    (dict(loss_func=nn.MSELoss), 'such as nn.MSELoss()'), (dict(loss_func='mse'), 'function of two outputs'), (dict(temp=4), "no argument 'temp'; the arguments are teacher, weight")])
def test_mistakes_are_told(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as e: DistillCallback(**kwargs)
    assert message in str(e.value)


def test_outputs_of_another_shape():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ValueError, match=r'teacher are \(16, 7\), those of the model \(16, 10\).*as many classes'): fit(learner(), 1, cbs=DistillCallback(teacher))


def test_outputs_of_another_kind():
    class Two(nn.Module):
        def forward(self, x): return x, x
    with pytest.raises(ValueError, match=r'teacher are a tuple, those of the model \(16, 10\)'): fit(learner(), 1, cbs=DistillCallback(Two()))


def test_oneself_is_no_teacher():
    learn = learner()
    for teacher in (learn, learn.model, nn.Sequential(learn.model)):
        with pytest.raises(ValueError, match='shares weights with the model'): fit(learn, 1, cbs=DistillCallback(teacher))


def test_a_run_that_goes_on_needs_its_teacher():
    learn = learner()
    with pytest.raises(ValueError, match='pass that model as teacher='): fit(learn, 2, cbs=DistillCallback(), start_epoch=1)
    fit(learn, 2, cbs=DistillCallback(net()), start_epoch=1)
    cb = DistillCallback()
    fit(learn, 1, cbs=cb)
    fit(learn, 2, cbs=cb, start_epoch=1)
