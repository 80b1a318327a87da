"""Every measurement of speed and memory, side by side with the peers; tables and a plot go to `benchmarks/results/speed`.

    python benchmarks/speed

`--quick` sees in a few minutes that everything works, `--only growth` measures anew what has 'growth' in its name and keeps the rest.
"""
import json, os, platform, re, subprocess, sys, tempfile, time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from fastcore.script import call_parse
from report import write

HERE = Path(__file__).parent
CONVS = dict(kinds=['Conv2d'])

def comparisons(quick, gpu, memory, batches):
    "Name -> case, its settings, and its arms: the first one is what the others are compared with"
    vit,vit_b,resnet = ('tiny_vit','tiny_vit','resnet18') if quick else ('vit_l_16','vit_b_16','resnet50')
    def select(arms, **settings): return 'select',settings,arms.split()
    def step(arms, **settings): return 'step',settings,arms.split()
    all_ = {f'selection/{vit}': select('limit fastsparse fasterai prune ao', model=vit)}
    sizes = [1e6, 3e6] if quick else [1e6, 3e6, 1e7, 3e7, 1e8, 3e8] + [1e9]*(memory > 3*5.2e9)
    all_ |= {f'growth/{n/1e6:,.0f} M': select('limit fastsparse', model=f'{n:.0e}') for n in sizes}
    others = {
        'weight, local': ('fasterai prune', dict(method='local')),
        'filter, global': ('fasterai', dict(granularity='filter', **CONVS)),
        'filter, local': ('fasterai prune', dict(granularity='filter', method='local', **CONVS)),
        'kernel, global': ('fasterai', dict(granularity='kernel', **CONVS)),
        'weight, global, movement': ('fasterai', dict(criteria='movement')),
        'weight, global, 70 then 80 %': ('fasterai', dict(percents=[70, 80])),
        'weight, global, bfloat16': ('fasterai prune', dict(dtype='bfloat16')),
        'weight, global, float16': ('fasterai', dict(dtype='float16')),
        '2:4': ('fasterai', dict(granularity='2:4', method='local', percents=[50], **CONVS)),
    }
    all_ |= {f'other/{resnet}: {name}': select(f'limit fastsparse {peers}', model=resnet, **settings) for name,(peers,settings) in others.items()}
    all_[f'other/{vit_b}: 2:4'] = select('limit fastsparse ao', model=vit_b, granularity='2:4', method='local', percents=[50], kinds=['Linear'])
    large = 64 if quick else 224
    all_['step/32x32'] = step('plain fastsparse beside hold touch fasterai', size=32, batches=batches)
    all_[f'step/{large}x{large}'] = step('plain fastsparse fasterai', size=large, batches=max(batches//4, 8))
    modules = ['torch','torch, fastsparse','fastai.vision.all','fastai.vision.all, fastsparse.callback','fastai.vision.all, fasterai.sparse.all']
    all_ |= {'import/torch': ('imports', {}, modules[:2]), 'import/fastai': ('imports', {}, modules[2:])}
    if gpu:
        all_[f'gpu selection/{vit}'] = select('copy fastsparse fasterai prune ao', model=vit, device='cuda')
        all_['gpu step/224x224'] = step('plain fastsparse beside hold touch fasterai', size=224, batches=batches, half=True, device='cuda')
    return all_

def measure(case, settings):
    "The figures of one run in a fresh process, or its error"
    try: done = subprocess.run([sys.executable, HERE/'cases.py', case, json.dumps(settings)], capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired: return dict(error='not finished after 10 minutes')
    if done.returncode < 0: return dict(error=f'killed by signal {-done.returncode}')
    if done.returncode: return dict(error=(done.stderr.strip().splitlines() or ['?'])[-1][:160])
    return json.loads(done.stdout.splitlines()[-1])

def _line(file, start): # of a table in /proc
    try: return next((l.split(':')[1].strip() for l in Path(file).read_text().splitlines() if l.startswith(start)), '')
    except OSError: return ''

def _version(package):
    try: return f'{package} {version(package)}'
    except ModuleNotFoundError: return f'no {package}'

def environment(machine):
    packages = ', '.join(_version(p) for p in ('torch','torchvision','fastai','fasterai','fastsparse'))
    return (f"{date.today()}, Python {platform.python_version()}, {packages}, {os.cpu_count()} cores of {_line('/proc/cpuinfo', 'model name') or platform.processor() or platform.machine()}, "
            f"torch with {machine['threads']} of them, {machine['cuda'] or 'no GPU'}")

def shown(figures):
    "The figures of one run in a line"
    if 'error' in figures: return f"crashed: {figures['error']}"
    names = dict(loop='{:.4g} s', inside='{:.3g} s in the callback', pruned='{:.4g} s', memory='{:.3g} x the weights', zeros='{:.2f} % zeros')
    return ', '.join(text.format(figures[k]) for k,text in names.items() if figures.get(k) is not None)

@call_parse
def main(
    quick:bool=False, # Small sizes and one repeat, into a temporary folder
    repeats:int=3, # How often each tool runs
    batches:int=400, # Of training at 32x32; a quarter as many at 224x224
    only:str='', # Regular expression: measure only what has it in its name, and keep the other results
    out:str='', # Folder of the results
):
    "Measure speed and memory side by side with the peers"
    out = Path(out or (tempfile.mkdtemp() if quick else HERE.parent/'results'/'speed'))
    out.mkdir(parents=True, exist_ok=True)
    print(f'results go to {out}')
    machine = measure('machine', {})
    env,file = environment(machine),out/'runs.jsonl'
    runs = [json.loads(l) for l in file.read_text().splitlines()] if only and file.exists() else []
    free = 1024*int((_line('/proc/meminfo', 'MemAvailable') or '0').split()[0])
    known = comparisons(quick, machine['cuda'], free, 8 if quick else batches)
    order,todo = {n: i for i,n in enumerate(known)},{n: c for n,c in known.items() if re.search(only, n)}
    there = bool(find_spec('fasterai'))
    if not there: print("fasterai is not installed, and left out; pip install -e '.[bench]' adds it")
    todo = {n: (case, settings, [a for a in arms if there or 'fasterai' not in a]) for n,(case,settings,arms) in todo.items()}
    repeats = 1 if quick else repeats
    total,done,start = repeats*sum(len(arms) for *_,arms in todo.values()),0,time.time()
    for name,(case,settings,arms) in todo.items():
        new = []
        for repeat,arm in product(range(repeats), arms): # every arm once, then every arm again
            figures,done = measure(case, {**settings, 'arm': arm}),done+1
            new.append(dict(comparison=name, arm=arm, repeat=repeat, case=case, settings=settings, env=env, **figures))
            print(f'{done}/{total}  {name}  {arm}  {shown(figures)}  ({total-done} remain, about {(time.time()-start)/done*(total-done)/60:.0f} minutes)', flush=True)
        runs = sorted([r for r in runs if r['comparison'] != name] + new, key=lambda r: order.get(r['comparison'], len(order)))
        file.write_text(''.join(json.dumps(r) + '\n' for r in runs))
    write(out, runs)
    print(f"{out/'README.md'}, {out/'speed.png'}")
