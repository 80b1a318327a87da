"""Measurements in a process of their own, which prints a line of JSON for each name:

    python benchmarks/compact/measure.py model '{"names": ["resnet18"], "arm": "fastsparse", "mask": "coupled"}'
"""
import ctypes, json, re, statistics, sys, time, warnings
from pathlib import Path
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from fastsparse.benchmark import multiply_adds
from fastsparse.flow import flow
from fastsparse.timing import evaluating, take_turns
from tools import ARMS, MASKS, output_layers
from zoo import MODELS, build, decoder, images, settle

def seconds(f, *args):
    "How long `f` takes, and what it returns"
    start = time.perf_counter()
    out = f(*args)
    return time.perf_counter() - start,out

def error(e): return f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0]}'[:160]

def weights(model): return sum(p.numel() for p in model.parameters())

def apart(out, ref):
    "The largest difference of two outputs, by the largest number; None if they do not even have the same shapes"
    outs,refs = tree_leaves(out),tree_leaves(ref)
    if [o.shape for o in outs] != [r.shape for r in refs]: return None
    return torch.stack([(a-b).abs().amax()/b.abs().amax() for a,b in zip(outs, refs)]).max().item() # NaN if one is

@torch.no_grad()
def compared(small, model, inputs):
    "How far the outputs are apart on new inputs, and how far those of two inputs are"
    refs = [model(x) for x in inputs]
    differences = [apart(small(x), ref) for x,ref in zip(inputs, refs)]
    return dict(difference=None if None in differences else torch.tensor(differences).max().item(), varies=apart(refs[0], refs[1]))

def in_turn(models, x, budget):
    "Seconds of each model in each round, for about as long as that; three rounds at least"
    with evaluating(models): return [[round(s, 6) for s in t.seconds] for t in take_turns([lambda m=m: m(x) for m in models], budget, rounds=(3, 40))]

def typical(f, repeats=5): return statistics.median(seconds(f)[0] for _ in range(repeats + 1))

def start(arm=None):
    "One thread, and everything loaded and used once"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    small,x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(),torch.randn(1, 3, 8, 8)
    for a in [arm] if arm else []: ARMS[a](small, x, ['3'])

def model(name, arm, mask, size=224, batches=(1, 16), budget=3.):
    "One model with half of its channels dead, and what a tool makes of it"
    dense,x = build(name, size),images(1, size)
    MASKS[mask](dense, x)
    settle(dense, images(4, size))
    state,new = dense.state_dict(),[images(2, size).double() for _ in range(2)]
    start_from,outputs = MODELS[name](size).eval(),output_layers(dense, x)
    start_from.load_state_dict(state)
    zeros = sum(int((p == 0).sum()) for p in dense.parameters())/weights(dense)
    with torch.no_grad(): forward = typical(lambda: dense(x))
    figures = dict(zeros=zeros, dense=[weights(dense), multiply_adds(dense, x)], forward=forward, example=list(x.shape))
    try: analysis,small = seconds(ARMS[arm], start_from, x, outputs)
    except Exception as e: return dict(figures, error=error(e))
    try:
        figures |= dict(analysis=analysis, small=[weights(small), multiply_adds(small.eval(), x)])
        figures['latency'] = {b: in_turn([dense, small], images(b, size), budget) for b in batches}
        return dict(figures, **compared(small.double(), dense.double(), new))
    except Exception as e: return dict(figures, error=error(e))

def edge(name, arm):
    "A small module with dead channels"
    from edges import make
    (original,inputs),(copy,_) = make(name),make(name)
    x = inputs()
    try:
        small = ARMS[arm](copy, x, output_layers(original, x)).eval()
        return dict(dense=[weights(original)], small=[weights(small)], **compared(small, original, [inputs(), inputs()]))
    except Exception as e: return dict(error=error(e))

def growth(name, arm, model='resnet50', size=224, batch=1):
    "Time of the analysis in forwards of the example"
    from fastsparse.compact import compact
    dense = build(model, size)
    MASKS['coupled'](dense, x := images(batch, size))
    with torch.no_grad(): forward = typical(lambda: dense(x), 3)
    return dict(example=list(x.shape), forward=forward, flow=seconds(flow, dense, x)[0], analysis=seconds(compact, dense, x)[0])


# -- memory

def _resident(what): return 1024*int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def extra_memory(f):
    "Seconds, and the bytes needed at the worst moment of `f` on top of what is there before; None where that cannot be known"
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5') # the peak starts anew
        before = _resident('VmRSS')
    except OSError: return seconds(f)[0],None
    taken = seconds(f)[0]
    return taken,_resident('VmHWM') - before

def large(name, arm, weights_=1e9, tokens=32):
    "Does looking at a large model need a second copy of its weights?"
    from fastsparse.compact import compact
    net,x = decoder(weights_),torch.randint(0, 1000, (1, tokens))
    nbytes = sum(p.numel()*p.element_size() for p in net.parameters())
    def run():
        with torch.no_grad(): net(x)
    run()
    figures = dict(dense=[weights(net)], bytes=nbytes, example=list(x.shape))
    for what,f in dict(forward=run, flow=lambda: flow(net, x), prune=lambda: MASKS['coupled'](net, x), compact=lambda: compact(net, x)).items():
        taken,extra = extra_memory(f)
        figures[what] = dict(seconds=taken, memory=None if extra is None else extra/nbytes)
    return figures

if __name__ == '__main__':
    case,settings = sys.argv[1],json.loads(sys.argv[2])
    names = settings.pop('names')
    start(settings.get('arm'))
    for name in names: print(json.dumps(dict(name=name, **globals()[case](name, **settings))), flush=True)
