"""One measurement in a process of its own, which prints a line of JSON:

    python benchmarks/engines/measure.py '{"case": "linear", "n": 1024, "percent": 95, "batch": 1}'
"""
import json, sys, warnings
from dataclasses import asdict
from pathlib import Path
import torch
from torch import nn
from fastsparse import Sparsifier, accelerate, benchmark, compact
from fastsparse.benchmark import _filled
sys.path.append(str(Path(__file__).parent.parent/'compact'))
from zoo import build, images # noqa: E402 (from the other benchmark)

def linear(n, **settings):
    "A single layer"
    torch.manual_seed(0)
    return nn.Linear(n, n),torch.randn(settings['batch'], n)

def model(model, batch, size=224, **settings):
    "A model of torchvision"
    return build(model, size),images(batch, size)

@torch.no_grad()
def apart(fast, dense, x):
    "The largest difference of outputs on a new input, by the largest number"
    other = torch.randn_like(x)
    return ((fast(other) - (ref := dense(other))).abs().amax()/ref.abs().amax()).item()

def prune(net, x, percent=50, granularity='weight', layers=None, **settings):
    "Each layer for itself, so that all are equally empty"
    Sparsifier(net, granularity, 'local', layers=layers, example_input=x).prune_model(percent)

def compared(net, x, granularity, seconds):
    "The model in all its forms, in turns"
    forms = {'dense': _filled(net), 'masked': net}
    if granularity == 'coupled': forms['compacted'] = compact(net, x)
    fast = accelerate(net, x)
    if fast.timings: forms['accelerated'] = fast
    rows = {r.name: asdict(r) for r in benchmark(forms, x, seconds).rows}
    times = {n: [round(s, 9) for s in r.pop('timing')['seconds']] for n,r in rows.items()}
    return dict(rows=rows, seconds=times, done=sum(bool(l.done) for l in fast.layers), layers=len(fast.layers), difference=apart(fast.model, net, x))

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    s = json.loads(sys.argv[1])
    torch.set_num_threads(s['threads'])
    device,seconds = s.get('device', 'cpu'),s.get('seconds', 5.)
    net,x = globals()[s.pop('case')](**s)
    if device == 'cuda': prune(net, x, granularity='2:4', layers=nn.Linear); net,x = net.half().to(device),x.half().to(device)
    else: prune(net, x[:2], **s)
    print(json.dumps(compared(net.eval(), x, s.get('granularity'), seconds)))
