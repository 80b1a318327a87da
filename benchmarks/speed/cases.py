"""One measurement in a process of its own: `python benchmarks/speed/cases.py select '{"arm": "fastsparse", "model": "resnet50"}'` ends with a line of JSON."""
import contextlib, ctypes, gc, io, json, re, subprocess, sys, time, warnings
from functools import wraps
from pathlib import Path
import torch
from torch import nn


def wait(device):
    if device == 'cuda': torch.cuda.synchronize()

def seconds(f, device='cpu'):
    "How long `f` takes"
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - start

class Clock:
    "Counts the calls of a method from now on, and their seconds"
    def __init__(self, cls, name, device='cpu'):
        f,self.calls,self.seconds = getattr(cls, name),0,0.
        @wraps(f)
        def timed(*args, **kwargs):
            wait(device)
            self.calls,start = self.calls+1,time.perf_counter()
            try: return f(*args, **kwargs)
            finally:
                wait(device)
                self.seconds += time.perf_counter() - start
        setattr(cls, name, timed)

def _resident(what): return 1024*int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def peak_from_now(device):
    "A function that gives the bytes needed since now, at the worst moment, on top of what is there now; None where that cannot be known"
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0) # what is free already would not be seen to be used again
        Path('/proc/self/clear_refs').write_text('5') # the peak starts anew
        before = _resident('VmRSS')
    except OSError: return lambda: None
    return lambda: _resident('VmHWM') - before


# -- selection

def build(name):
    "A model of torchvision with its initial weights; 'tiny_vit', or a number: Linears with about that many weights"
    torch.manual_seed(0)
    if name[0].isdigit(): return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(max(round(float(name)/2**20), 1))])
    import torchvision
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128) if name == 'tiny_vit' else getattr(torchvision.models, name)()
    if hasattr(model, 'heads'): nn.init.normal_(model.heads.head.weight, std=.02) # torchvision starts it at zero
    return model

class Limit:
    "One pass over the weights, warmed up: the cost if the threshold were known"
    def __init__(self, model, kinds, **_):
        self.weights = [m.weight.detach() for m in model.modules() if isinstance(m, kinds)]
        self.prune()
    def prune(self, percent=None):
        for w in self.weights: w.mul_(w.abs() > 1e-8)

class Copy:
    "All weights copied, warmed up: the bandwidth of the device"
    def __init__(self, model, kinds, **_):
        self.pairs = [(w, w.clone()) for w in (m.weight.detach() for m in model.modules() if isinstance(m, kinds))]
        self.prune()
    def prune(self, percent=None):
        for w,copy in self.pairs: w.copy_(copy)

class Fastsparse:
    def __init__(self, model, kinds, granularity, method, criteria):
        from fastsparse import Sparsifier
        self.sparsifier = Sparsifier(model, granularity, method, criteria, layers=lambda name,layer: isinstance(layer, kinds))
    def prune(self, percent): self.sparsifier.prune_model(percent)

class Fasterai:
    def __init__(self, model, kinds, granularity, method, criteria):
        from fasterai.core import criteria as known
        from fasterai.sparse.sparsifier import Sparsifier
        nm = granularity == '2:4'
        self.sparsifier = Sparsifier(model, 'weight' if nm else granularity, method, getattr(known, criteria), nm=nm, layer_type=kinds)
    def prune(self, percent): self.sparsifier.sparsify_model(percent/100)

class Prune:
    "torch.nn.utils.prune"
    def __init__(self, model, kinds, granularity, method, criteria):
        self.layers,self.had,self.filters,self.together = [m for m in model.modules() if isinstance(m, kinds)],0,granularity == 'filter',method == 'global'
    def prune(self, percent):
        from torch.nn.utils import prune
        share,self.had = (percent - self.had)/(100 - self.had),percent # it counts from what is left
        if self.together: prune.global_unstructured([(m, 'weight') for m in self.layers], prune.L1Unstructured, amount=share)
        for m in self.layers if not self.together else ():
            if self.filters: prune.ln_structured(m, 'weight', share, n=1, dim=0)
            else: prune.l1_unstructured(m, 'weight', share)

class AO:
    "torch.ao.pruning, which prunes each matrix for itself, and no convolution"
    def __init__(self, model, kinds, granularity, method, criteria):
        from torch.ao.pruning import WeightNormSparsifier
        self.sparsifier = WeightNormSparsifier(1., (1, 4), 2) if granularity == '2:4' else WeightNormSparsifier(.7, (1, 1), 1)
        self.sparsifier.prepare(model, [{'tensor_fqn': f'{n}.weight'} for n,m in model.named_modules() if isinstance(m, kinds) and isinstance(m, nn.Linear)])
    def prune(self, percent):
        self.sparsifier.step()
        self.sparsifier.squash_mask()

ARMS = dict(limit=Limit, copy=Copy, fastsparse=Fastsparse, fasterai=Fasterai, prune=Prune, ao=AO)

@torch.no_grad()
def select(arm, model, kinds=('Conv2d','Linear'), granularity='weight', method='global', criteria='large_final', percents=(70,), dtype='float32', device='cpu'):
    "Prune a model, to one percentage after the other"
    kinds = tuple(getattr(nn, k) for k in kinds)
    small = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 16))
    for net in (small, build(model)): # with the small one, everything is loaded and started
        net.to(device, getattr(torch, dtype))
        layers = [m for m in net.modules() if isinstance(m, kinds)]
        def make(): nonlocal tool; tool = ARMS[arm](net, kinds, granularity=granularity, method=method, criteria=criteria)
        tool,peak = None,peak_from_now(device)
        made = seconds(make, device)
        if criteria != 'large_final':
            for m in layers: m.weight += torch.randn_like(m.weight)/100 # as if it had been trained
        pruned = [seconds(lambda: tool.prune(p), device) for p in percents]
        memory = peak()
    weights = sum(m.weight.numel() for m in layers)
    return dict(weights=weights, made=made, pruned=pruned[-1], total=made + sum(pruned), memory=None if memory is None else memory/(weights*layers[0].weight.element_size()),
                zeros=100*sum(int((m.weight == 0).sum()) for m in layers)/weights)


# -- training

def callbacks(arm, model):
    "The callbacks of an arm, and clocks of their events and of their updates"
    from fastai.callback.core import Callback
    if arm == 'plain': return [],None,None
    if arm == 'fasterai':
        from fasterai.core.criteria import large_final
        from fasterai.core.schedule import agp
        from fasterai.sparse.all import Sparsifier, SparsifyCallback
        return [SparsifyCallback(.9, 'weight', 'global', large_final, agp)],Clock(SparsifyCallback, '__call__'),Clock(Sparsifier, 'sparsify_model')
    class Foreign(Callback):
        def after_batch(self): pass
    class Touch(Callback): # what any callback costs that touches every weight after every step
        def after_step(self): torch._foreach_mul_([m.weight.detach() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))], 1.)
    if arm == 'touch': return [Touch()],Clock(Touch, '__call__'),None
    from fastsparse.callback import HoldingCallback, KeepSparsityCallback, Sparsifier, SparsifyCallback
    if arm == 'hold': Sparsifier(model).prune_model(90)
    cbs = [KeepSparsityCallback()] if arm == 'hold' else [SparsifyCallback(90)]
    if arm == 'beside': cbs.append(Foreign())
    return cbs,Clock(HoldingCallback, '__call__'),Clock(Sparsifier, 'advance')

def beside(learn, *known):
    "Bytes of all tensors that are alive, beside the parameters, their gradients, the optimizer's state and `known`"
    gc.collect()
    def storages(tensors): return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    params,state = list(learn.model.parameters()),[t for s in learn.opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    known = storages([*params, *[p.grad for p in params if p.grad is not None], *state, *known])
    return sum(n for p,n in storages(o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)).items() if p not in known)

def step(arm, size, batches, bs=32, half=False, device='cpu'):
    "Train a ResNet-18 for one epoch of random images"
    import torchvision
    from fastai.basics import DataLoader, DataLoaders, Learner
    from fastai.callback import fp16, schedule # noqa: F401 (adds to_fp16 and fit_one_cycle to Learner)
    from fastai.torch_core import default_device
    default_device(device == 'cuda')
    torch.manual_seed(0)
    data = [(torch.randn(bs, 3, size, size, device=device), torch.randint(10, (bs,), device=device)) for _ in range(8)]
    model = torchvision.models.resnet18(num_classes=10).to(device)
    weights = sum(m.weight.numel()*4 for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    known = [*model.buffers(), *[t for batch in data for t in batch]]
    cbs,events,updates = callbacks(arm, model)
    dls = DataLoaders(DataLoader([data[i%8] for i in range(batches)], bs=None), DataLoader(data[:1], bs=None), device=device)
    learn,loop = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), cbs=cbs),Clock(Learner, '_do_epoch_train', device)
    if half: learn.to_fp16()
    def train(train=learn._do_epoch_train):
        nonlocal during
        train()
        during = beside(learn, *known)
    during,learn._do_epoch_train = None,train
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): learn.fit_one_cycle(1)
    pruned = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return dict(loop=loop.seconds/batches, inside=events.seconds/batches if events else None, updates=updates.calls if updates else None,
                update=updates.seconds/updates.calls if updates and updates.calls else None, during=during/weights, after=beside(learn, *known)/weights,
                zeros=100*sum(int((w == 0).sum()) for w in pruned)/sum(w.numel() for w in pruned))


# -- the rest

def imports(arm):
    "A fresh Python that imports some modules"
    return dict(loop=seconds(lambda: subprocess.run([sys.executable, '-W', 'ignore', '-c', f'import {arm}'], check=True)))

def machine():
    "What the measurements run on"
    return dict(threads=torch.get_num_threads(), cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else None)

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    case,settings = sys.argv[1],json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    print('\n' + json.dumps(dict(select=select, step=step, imports=imports, machine=machine)[case](**settings)))
