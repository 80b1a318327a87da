"Tiny Learners, callbacks made of functions, and the questions that every test asks"
import random
from contextlib import contextmanager

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback  # noqa: F401
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn

from fastsparse.callback import SparsifyCallback

torch.set_num_threads(1) # tiny layers, shared cores
BATCHES = 4


def seed(value=0): random.seed(value); np.random.seed(value); torch.manual_seed(value)


def samples(n, size=8, channels=1):
    "Digits cut to `n`"
    from sklearn.datasets import load_digits
    d = load_digits()
    x = torch.tensor(d.images[:n], dtype=torch.float32)[:, None, :size, :size]/8 - 1
    return list(zip(x.expand(-1, channels, -1, -1).contiguous(), torch.tensor(d.target[:n])))


def loaders(batches=BATCHES, bs=16, valid=32, shuffle=False, **kwargs):
    items = samples(batches*bs + valid, **kwargs)
    return DataLoaders(DataLoader(items[:batches*bs], bs=bs, shuffle=shuffle), DataLoader(items[batches*bs:], bs=valid))


def conv(i, o, **kwargs): return [nn.Conv2d(i, o, 3, padding=1, **kwargs), nn.BatchNorm2d(o), nn.ReLU()]


def net(channels=1, width=8):
    return nn.Sequential(*conv(channels, width), *conv(width, 2*width, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width, 10))


def momentum(params, **kwargs): return SGD(params, mom=.9, **kwargs)


def learner(model=None, dls=None, opt_func=momentum, lr=.05, metrics=accuracy, value=0, **kwargs):
    seed(value)
    if model is None: model = net()
    return Learner(dls or loaders(), model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, metrics=metrics, **kwargs)


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn


def fit(learn, n_epoch=1, cbs=None, **kwargs):
    with quiet(learn): learn.fit(n_epoch, cbs=cbs, **kwargs)
    return learn


def sparse_learner(*args, epochs=1, model=None, **kwargs):
    "A Learner, and the callback after a fit"
    learn, cb = learner(model), SparsifyCallback(*args, **kwargs)
    fit(learn, epochs, cbs=cb)
    return learn, cb


class On(Callback):
    "A callback made of functions of the Learner, such as On(after_step=f, order=100)"
    def __init__(self, order=0, **events):
        self.order = order
        for name, f in events.items(): setattr(self, name, lambda f=f: f(self.learn))


def when(condition, act):
    "Act on the Learner if the condition holds"
    return lambda learn: act(learn) if condition(learn) else None


def at(epoch, i): return lambda learn: learn.training and (learn.epoch, learn.iter) == (epoch, i)


def throw(ex):
    def act(learn): raise ex
    return act


# -- what is true of the weights

def targets(model): return {f'{n}.weight': m.weight for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
def zeros(model): return sum(int((w == 0).sum()) for w in targets(model).values())
def size(model): return sum(w.numel() for w in targets(model).values())
def percent(model): return 100*zeros(model)/size(model)
def is_exact(model, target): return abs(zeros(model) - target*size(model)/100) <= .5


def regrown(cb, model=None):
    "How many pruned entries are not zero"
    model = model or cb.sparsifier.model
    return sum(int((model.get_parameter(n)[~m.to(model.get_parameter(n).device)] != 0).sum()) for n, m in cb.sparsifier.masks.items())


def dense_state(cb, opt):
    "How many entries of the optimizer's state at pruned places are not zero"
    state, params = getattr(opt, 'opt', opt).state, dict(cb.sparsifier.model.named_parameters())
    return sum(int((v[~m] != 0).sum()) for n, m in cb.sparsifier.masks.items() for v in state.get(params[n], {}).values()
               if isinstance(v, torch.Tensor) and v.shape == m.shape)


def state_of(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def masks_of(cb): return {n: m.clone() for n, m in cb.sparsifier.masks.items()}


def anatomy(model):
    "All that a callback must not change"
    hooks = [len(getattr(m, h)) for m in model.modules() for h in vars(m) if h.endswith('_hooks')]
    tensors = [len(t._backward_hooks or ()) for t in model.parameters()]
    return list(model.state_dict()), [(n, id(p)) for n, p in model.named_parameters()], [type(m) for m in model.modules()], hooks, tensors


class Journal(Callback):
    "Notes after each training batch, and at each epoch's end, what is true"
    order = 200
    def __init__(self, cb): self.cb, self.steps, self.epochs, self.regrown, self.dense_state = cb, [], [], 0, 0
    def after_batch(self):
        if not self.training: return
        self.steps.append(percent(self.cb.sparsifier.model))
        self.regrown += regrown(self.cb)
        self.dense_state += dense_state(self.cb, self.opt)
    def before_validate(self): self.regrown += regrown(self.cb)
    def after_epoch(self): self.epochs.append(percent(self.cb.sparsifier.model if self.cb.sparsifier else self.learn.model))


def forward_watch(model, cb, log):
    "Note how many pruned weights are not zero at each forward; gives the handle"
    return model.register_forward_pre_hook(lambda *_: log.append(regrown(cb)) if cb.sparsifier is not None else None)


def column(learn, name='sparsity'):
    "The values of a column of the table, a row for each epoch"
    i = list(learn.recorder.metric_names).index(name) - 1
    return [row[i] for row in learn.recorder.values]
