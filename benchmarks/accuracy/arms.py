"What is compared: for each name, a function from percent, task and model to the callbacks of a fit and a description of their settings"
import random
from contextlib import redirect_stdout
from copy import deepcopy
from io import StringIO
import fastai.callback.schedule # noqa: F401 (adds fit_one_cycle to Learner)
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn
from fastsparse.callback import SparsifyCallback
from fastsparse.distill import DistillCallback
from fastsparse.plan import erk
from fastsparse.schedule import Schedule, agp

def _fasterai(percent, task, model=None, start=.2, end=1.): # its own agp goes from 0.2 to 1
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_agp
    from fasterai.sparse.sparsify_callback import SparsifyCallback as Peer
    class Quiet(Peer): # it prints during the fit
        def __call__(self, event_name):
            with redirect_stdout(StringIO()): return super().__call__(event_name)
    schedule = Schedule(sched_agp, start_pct=start, end_pct=end)
    args,shown = [percent/100, 'weight', 'global', large_final, schedule],f"{percent/100}, 'weight', 'global', large_final, Schedule(sched_agp, {start}, {end})"
    if task == 'cifar10': return [Quiet(*args)],f"SparsifyCallback({shown})"
    return [Quiet(*args, layer_type=(nn.Conv2d, nn.Linear))],f"SparsifyCallback({shown}, layer_type=(Conv2d, Linear))" # by default it leaves Linears dense, which are nothing there but a lot here

def _ours(percent, task=None, model=None, shown=None, **settings):
    if task == 'vit': settings.setdefault('exclude', '*.in_proj_weight') # which fasterai cannot prune
    cb = SparsifyCallback(percent, **settings)
    what = ''.join(f', {k}={getattr(v, "__name__", v)}' for k,v in settings.items() if k != 'schedule')
    return [cb],f'SparsifyCallback({shown or percent}{what}): {cb.schedule}'

def _erk(model, percent, task): return erk(model, percent, exclude='*.in_proj_weight' if task == 'vit' else None)

class _TrainDense(Callback):
    "Train a teacher on the same batches, as long and with the same highest rate, before the fit; all random numbers are as they were"
    def __init__(self, model): self.dense = model
    def before_fit(self):
        rng = self.dls.train.rng
        states = random.getstate(),np.random.get_state(),torch.get_rng_state(),rng.getstate()
        other = Learner(self.dls, self.dense, loss_func=self.loss_func, opt_func=self.opt_func, wd=self.wd, moms=self.moms)
        with other.no_bar(),other.no_logging(): other.fit_one_cycle(self.n_epoch, self.opt.hypers[-1]['lr'])
        for put,state in zip((random.setstate, np.random.set_state, torch.set_rng_state, rng.setstate), states): put(state)
        self.dls.train.rng = rng

def _taught(percent, task, model): # pretrained, the network is its own teacher
    callbacks,shown = _ours(percent, task)
    if task == 'cifar10': return [*callbacks, DistillCallback()],f'{shown}, DistillCallback()'
    teacher = deepcopy(model)
    return [_TrainDense(teacher), *callbacks, DistillCallback(teacher)],f'{shown}, DistillCallback(the same network, trained dense by fit_one_cycle)'

def _ends(name, layer): return name in ('conv1','0') or isinstance(layer, nn.Linear) # of both networks

ARMS = {
    'dense': lambda percent, task, model: ([], 'no callback'),
    'fastsparse': _ours,
    'fasterai': _fasterai,
    'fasterai tuned': lambda percent, task, model: _fasterai(percent, task, start=0., end=.5),
}

TRIED = { # in place of the defaults, one at a time
    'agp until 0.5': lambda percent, task, model: _ours(percent, schedule=Schedule(agp.func, 0., .5)),
    'agp until 0.75': lambda percent, task, model: _ours(percent, schedule=Schedule(agp.func, 0., .75)),
    'in every batch': lambda percent, task, model: _ours(percent, update_every=1),
    'lamp': lambda percent, task, model: _ours(percent, criteria='lamp'),
    'erk': lambda percent, task, model: _ours(_erk(model, percent, task), task, method='local', shown=f'erk(model, {percent})'),
    'uniform': lambda percent, task, model: _ours(percent, task, method='local'),
    **{name: lambda percent, task, model, name=name: _ours(percent, task, grow=name) for name in ('rigl','set','granet')},
    **{name: lambda percent, task, model, name=name: _ours(percent, task, criteria=name) for name in ('taylor','movement_signed','wanda','mest')},
    'taught by the dense net': _taught,
    'first and last layer dense': lambda percent, task, model: _ours(percent, exclude=_ends),
}
