"""Train random small models through random sequences of whatever fastai does, and check after each that the promises hold.

    .venv/bin/python benchmarks/soak.py --minutes 60 --seed 0

A failure prints the seed of its sequence and what was done, so that `--only SEED` repeats just that one.
"""
import contextlib, copy, io, random, tempfile, time, traceback, warnings
from functools import partial
from pathlib import Path
import torch
from fastcore.script import call_parse
from fastai.basics import Adam, Callback, CancelBatchException, CancelStepException, DataLoader, DataLoaders, Learner, OptimWrapper, RMSProp, SGD, accuracy, noop, params, ranger
from fastai.callback.all import GradientAccumulation, GradientClip, ProgressCallback, SaveModelCallback, ShortEpochCallback
from torch import nn
from fastsparse.all import (KeepSparsityCallback, Sparsifier, SparsifyCallback, SparsityWarning, available_criteria, available_granularities, available_schedules)


class Block(nn.Module):
    "A residual block, so that BatchNorms follow sums"
    def __init__(self, n):
        super().__init__()
        self.bn2,self.bn1 = nn.BatchNorm2d(n),nn.BatchNorm2d(n) # registered in the wrong order, on purpose
        self.conv1,self.conv2 = nn.Conv2d(n, n, 3, padding=1),nn.Conv2d(n, n, 3, padding=1, bias=False)
    def forward(self, x): return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def random_learner(r, folder):
    n = r.choice([4, 8, 12])
    groups = r.choice([1, n])
    body = nn.Sequential(nn.Conv2d(3, n, 3, bias=r.random() < .5), nn.BatchNorm2d(n), nn.ReLU(), *[Block(n) for _ in range(r.randint(0, 2))],
                         nn.Conv2d(n, n, 3, padding=1, groups=groups), nn.BatchNorm2d(n, affine=r.random() < .8), nn.ReLU(), nn.AdaptiveAvgPool2d(r.choice([1, 2])), nn.Flatten())
    with torch.no_grad(): width = body.eval()(torch.zeros(1, 3, 8, 8)).shape[1]
    model = nn.Sequential(body, nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)))
    if r.random() < .2: model = model.to(memory_format=torch.channels_last)
    items = [(torch.randn(3, 8, 8), torch.tensor(r.randrange(4))) for _ in range(r.choice([20, 48]))]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:16], bs=8))
    opt = r.choice([partial(SGD, mom=.9), Adam, RMSProp, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, opt_func=opt, splitter=lambda m: [params(m[0]), params(m[1])], path=folder, wd=r.choice([0, .1]))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def random_callback(r):
    granularity = r.choice([*available_granularities(), 'weight', 'filter', '2:4'])
    sparsity = 50 if granularity == '2:4' else r.choice([0, 10, 50, 70, 90, 99, 100])
    return SparsifyCallback(sparsity, granularity, r.choice(['local', 'global']), r.choice([c for c in available_criteria() if c != 'slimming']), r.choice(available_schedules()))


class Raise(Callback):
    "Raises something, somewhere"
    order = 200
    def __init__(self, event, error, at): self.event,self.error,self.at,self.count = event,error,at,0
    def __call__(self, name):
        super().__call__(name)
        if name == self.event and getattr(self, 'training', False):
            self.count += 1
            if self.count == self.at: raise self.error('soak')


class Watch(Callback):
    "After each step: what is masked is zero, in the weight, its gradient and the optimizer's memory"
    order = 1000
    def __init__(self, cb): self.cb = cb
    def after_step(self):
        state = getattr(self.opt, 'opt', self.opt).state
        for p,mask in self.cb.sparsifier.pairs():
            assert not p.detach()[~mask].any(), 'a masked weight is not zero after the step'
            if p.grad is not None: assert not p.grad[~mask].any(), 'a masked gradient is not zero'
            for v in state.get(p, {}).values():
                if isinstance(v, torch.Tensor) and v.shape == p.shape: assert not v[~mask].any(), 'the optimizer remembers a masked weight'


def extra(r):
    return r.sample([GradientClip(.5), GradientAccumulation(16), ShortEpochCallback(.5, short_valid=False), SaveModelCallback(fname='soak', monitor='accuracy')], r.randint(0, 2))


def check(learn, before):
    keys,ids,types = before
    assert list(learn.model.state_dict()) == keys, 'the keys of the model changed'
    assert [id(p) for p in learn.model.parameters()] == ids, 'the parameters of the model changed'
    assert [type(m) for m in learn.model.modules()] == types, 'the modules of the model changed'
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in learn.model.modules()), 'a hook is left'
    assert len(learn.metrics) == 1 and not any(isinstance(c, (SparsifyCallback, KeepSparsityCallback)) for c in learn.cbs), 'something is left on the Learner'


def target_met(cb, learn):
    "The final count of a schedule that ends at its target is the one that a Sparsifier reaches in one go"
    s = cb.sparsifier
    again = Sparsifier(copy.deepcopy(s.model), s.granularity, s.method, cb.criteria)
    if again.state_dict().keys() & {'steps'}: again.gather(learn.dls.train, learn.loss_func)
    again.prune_model(cb.sparsity)
    a,b = (sum(int((~m).sum()) for m in x.masks.values()) for x in (s, again))
    sizes = [t.groups.step for t in s.targets.values()]
    assert abs(a-b) <= max(sizes), f'{a} masked weights at the end, {b} in one go'


def sequence(seed, folder):
    r = random.Random(seed)
    torch.manual_seed(seed)
    learn = random_learner(r, folder)
    before = list(learn.model.state_dict()), [id(p) for p in learn.model.parameters()], [type(m) for m in learn.model.modules()]
    done = []
    for _ in range(r.randint(2, 6)):
        action = r.choice(['fit', 'fit', 'one_cycle', 'fine_tune', 'broken', 'lr_find', 'keep', 'save_load', 'validate', 'export'])
        cb = random_callback(r)
        done.append((action, str(cb.granularity), cb.method.__name__, cb.criteria.__name__, cb.sparsity, cb.schedule))
        try:
            if action in ('fit','one_cycle','fine_tune'):
                others,dense = extra(r),not any(bool((p == 0).any()) for p in learn.model.parameters() if p.dim() > 1)
                method = {'fit': learn.fit, 'one_cycle': learn.fit_one_cycle, 'fine_tune': learn.fine_tune}[action]
                method(r.randint(1, 3), 1e-3, cbs=[cb, Watch(cb), *others])
                if action == 'fine_tune': learn.unfreeze()
                if dense and cb.schedule(1.) == 1 and not any(isinstance(c, SaveModelCallback) for c in others): target_met(cb, learn)
            elif action == 'broken':
                event,error = r.choice([('after_step', KeyboardInterrupt), ('after_loss', RuntimeError), ('before_step', CancelStepException), ('after_pred', CancelBatchException), ('before_train', ValueError)])
                with contextlib.suppress(KeyboardInterrupt, RuntimeError, ValueError): learn.fit(2, 1e-3, cbs=[cb, Watch(cb), Raise(event, error, r.randint(1, 4))])
            elif action == 'lr_find':
                then = copy.deepcopy(learn.model.state_dict())
                learn.add_cb(cb); learn.lr_find(show_plot=False); learn.remove_cb(cb)
                assert all(torch.equal(a, b) for a,b in zip(then.values(), learn.model.state_dict().values())), 'lr_find changed the model'
            elif action == 'keep':
                zero = [(p, p.detach() == 0) for p in learn.model.parameters() if 0 < int((p == 0).sum()) < p.numel()]
                learn.fit(1, 1e-3, cbs=KeepSparsityCallback())
                assert not any(p.detach()[z].any() for p,z in zero), 'a kept zero grew'
            elif action == 'save_load':
                learn.save('soak'); learn.load('soak', weights_only=False)
            elif action == 'validate':
                then = copy.deepcopy(learn.model.state_dict())
                learn.add_cb(cb); learn.validate(); learn.get_preds(); learn.remove_cb(cb)
                assert all(torch.equal(a, b) for a,b in zip(then.values(), learn.model.state_dict().values())), 'looking changed the model'
            elif action == 'export': copy.deepcopy(learn.model); torch.save(cb, folder/'cb.pth')
        except ValueError as e: # a request that this model cannot fulfil is refused with a reason
            if not any(s in str(e) for s in ('no layer to prune', 'soak', 'NaN among the scores')): raise
        check(learn, before)
    return done


@call_parse
def main(
    minutes:float=1, # How long
    seed:int=0, # Of the first sequence
    only:int=None, # Repeat just this sequence
):
    "Random sequences of fits and interruptions until the time is up; exits 1 if any promise was broken"
    warnings.simplefilter('ignore', SparsityWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
    warnings.filterwarnings('ignore', category=UserWarning)
    torch.set_num_threads(1)
    end,failed,n,steps = time.time() + 60*minutes,[],0,0
    with tempfile.TemporaryDirectory() as folder:
        while (only is None and time.time() < end) or (only is not None and n == 0):
            current = only if only is not None else seed + n
            n += 1
            try:
                with contextlib.redirect_stdout(io.StringIO()): steps += len(sequence(current, Path(folder)))
            except Exception:
                failed.append(current)
                print(f'\nsequence {current} failed:\n{traceback.format_exc()}', flush=True)
            if n % 20 == 0: print(f'\r{n} sequences, {steps} actions, {len(failed)} failed, {max(end-time.time(), 0)/60:.1f} minutes left', end='', flush=True)
    print(f'\n{n} sequences of {steps} actions: {len(failed)} failed{": " + ", ".join(map(str, failed)) if failed else ""}')
    raise SystemExit(bool(failed))
