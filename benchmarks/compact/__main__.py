"""Zeros that pay: smaller models with the same outputs, side by side with Torch-Pruning; tables and a plot go to `benchmarks/results/compact`.

    python benchmarks/compact

goes on where it stopped. `--quick` sees in a few minutes that everything works, `--only resnet18 --again` measures anew what has 'resnet18' in its name.
"""
import json, os, platform, re, subprocess, sys, tempfile, time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from fastcore.script import call_parse
from edges import CASES
from report import write
from tools import ARMS, MASKS
from zoo import MODELS, SIZES

HERE = Path(__file__).parent

def plan(quick=False, large=False):
    "All runs as (name, arm, case, settings): a name is its section and what is measured"
    models = ['resnet18','shufflenet_v2_x1_0','xresnet18'] if quick else MODELS
    small = dict(size=64, batches=[1, 2], budget=.3) if quick else {}
    sizes = {m: {'size': SIZES[m]} for m in models if m in SIZES and not quick}
    runs = [(f'{mask}/{m}', a, 'model', dict(mask=mask, **small, **sizes.get(m, {}))) for mask in MASKS for m in models for a in ARMS]
    runs += [(f'edge/{c}', a, 'edge', {}) for a in ARMS for c in CASES]
    grown = [('resnet18', 64, 1)] if quick else [('resnet50', 64, 1), ('resnet50', 224, 1), ('resnet50', 224, 4), ('resnet50', 224, 16)]
    runs += [(f'growth/{m}, {b} × 3 × {s} × {s}', 'fastsparse', 'growth', dict(model=m, size=s, batch=b)) for m,s,b in grown]
    return runs + [('large/decoder', 'fastsparse', 'large', dict(weights_=1e7 if quick else 1e9))]*large

def bundles(runs):
    "Runs that share a process: edge cases of one arm"
    found = {}
    for name,arm,case,settings in runs: found.setdefault((arm, case, None if case == 'edge' else name), []).append((name, arm, case, settings))
    return found.values()

def results(stdout): return [json.loads(l) for l in (stdout or '').splitlines() if l.startswith('{"name"')]

def run(case, names, settings, limit):
    "The figures of a process for as many names as it came to, and what ended it early"
    command = [sys.executable, HERE/'measure.py', case, json.dumps({**settings, 'names': names})]
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as e:
        out = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout
        return results(out),f'not finished after {limit:.0f} s'
    if done.returncode < 0: return results(done.stdout),f'killed by signal {-done.returncode}'
    return results(done.stdout),(done.stderr.strip().splitlines() or ['?'])[-1][:160] if done.returncode else 'no result'

def measure(case, names, settings, limit, run=run):
    "Figures for each name; where a process crashed or hung, the rest goes on in another one"
    while names:
        figures,why = run(case, names, settings, limit)
        if len(figures) < len(names): figures.append(dict(error=why))
        yield from figures
        names = names[len(figures):]

def _line(file, start): # of a table in /proc
    try: return next((l.split(':')[1].strip() for l in Path(file).read_text().splitlines() if l.startswith(start)), '')
    except OSError: return ''

def _version(package):
    try: return f'{package} {version(package)}'
    except ModuleNotFoundError: return f'no {package}'

def environment():
    packages = ', '.join(_version(p) for p in ('torch','torchvision','fastai','torch-pruning','fastsparse'))
    return (f"{date.today()}, Python {platform.python_version()}, {packages}, "
            f"one of {os.cpu_count()} cores of {_line('/proc/cpuinfo', 'model name') or platform.processor() or platform.machine()}")

def shown(r):
    "The figures of one run in a line"
    if r.get('error'): return f"fails: {r['error']}"
    parts = [f"{r['dense'][0]:,} → {r['small'][0]:,} weights"] if 'small' in r else []
    if r.get('difference') is not None: parts.append(f"differs by {r['difference']:.0e}")
    if 'analysis' in r: parts.append(f"{r['analysis']:.2f} s, {r['analysis']/r['forward']:.1f} forwards")
    parts += [f"{k}: {v['seconds']:.2f} s, {v['memory'] or 0:.2f} × the weights" for k,v in r.items() if isinstance(v, dict) and 'memory' in v]
    return ', '.join(parts)

@call_parse
def main(
    quick:bool=False, # A few small models and one repeat, into a temporary folder
    only:str='', # Regular expression: run only what has it in its name, as in "coupled/resnet18" or "edge"
    again:bool=False, # Measure anew what is there already
    large:bool=False, # With a decoder of a billion weights, which takes a few GB
    limit:int=300, # Seconds for one process, after which it is said not to finish
    out:str='', # Folder of the results
):
    "Measure what dead channels bring when they are taken out, side by side with Torch-Pruning"
    out = Path(out or (tempfile.mkdtemp() if quick else HERE.parent/'results'/'compact'))
    out.mkdir(parents=True, exist_ok=True)
    print(f'results go to {out}')
    file,env = out/'runs.jsonl',environment()
    runs = [json.loads(l) for l in file.read_text().splitlines()] if file.exists() else []
    if not find_spec('torch_pruning'): print("Torch-Pruning is not installed, and left out; pip install -e '.[bench]' adds it")
    known = [r for r in plan(quick, large) if r[1] != 'Torch-Pruning' or find_spec('torch_pruning')]
    order,there = {r[:2]: i for i,r in enumerate(known)},{(r['name'], r['arm']) for r in runs}
    todo = [r for r in known if re.search(only, r[0]) and (again or r[:2] not in there)]
    done,start = 0,time.time()
    for bundle in bundles(todo):
        _,arm,case,settings = bundle[0]
        names = [r[0].split('/', 1)[1] for r in bundle]
        for (name,*_),figures in zip(bundle, measure(case, names, settings | {'arm': arm}, limit)):
            r,done = {**figures, 'name': name, 'arm': arm, 'settings': settings, 'env': env},done+1
            runs = sorted([o for o in runs if (o['name'], o['arm']) != (name, arm)] + [r], key=lambda r: order.get((r['name'], r['arm']), len(order)))
            print(f'{done}/{len(todo)}  {name}  {arm}  {shown(r)}  (about {(time.time()-start)/done*(len(todo)-done)/60:.0f} minutes remain)', flush=True)
        file.write_text(''.join(json.dumps(r) + '\n' for r in runs))
    if not runs: raise SystemExit(f'nothing has {only!r} in its name')
    write(out, runs)
    print(f"{out/'README.md'}, {out/'compact.png'}")
