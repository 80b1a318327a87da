"""Zeros that are not multiplied: dense, masked, compacted and accelerated models in turns; tables and a plot go to `benchmarks/results/engines`.

    python benchmarks/engines

goes on where it stopped. `--quick` sees in a minute that everything works, `--only resnet18 --again` measures anew what has 'resnet18' in its name.
With an NVIDIA GPU there is a part about 2:4.
"""
import json, os, platform, re, subprocess, sys, tempfile, time
from datetime import date
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from report import shown, write

HERE = Path(__file__).parent

def plan(quick=False, gpu=False):
    "All runs as {name: settings}: a name is its section, what is measured, and on what"
    percents,batches = ((95,), (1,)) if quick else ((90, 95, 98), (1, 8))
    small = dict(size=64, seconds=.3) if quick else {}
    linears,models = ((256,), ('resnet18',)) if quick else ((1024, 4096), ('resnet18','resnet50'))
    runs = {f'linear/{n} × {n}, {p} %, batch {b}': dict(case='linear', n=n, percent=p, batch=b, **small) for n in linears for p in percents for b in batches}
    runs |= {f'model/{m}, {p} %, batch {b}': dict(case='model', model=m, percent=p, batch=b, **small) for m in models for p in percents for b in batches}
    runs |= {f'channels/{m}, {p} %, batch {b}': dict(case='model', model=m, percent=p, granularity='coupled', batch=b, **small) for m in models[:1] for p in (50,) for b in batches}
    if not gpu: return runs
    runs |= {f'gpu/{n} × {n}, 2:4, batch {b}': dict(case='linear', n=n, batch=b, device='cuda', **small) for n in linears for b in (*batches, 128, 1024)}
    return runs | {f'gpu/vit_b_16, 2:4, batch {b}': dict(case='model', model='vit_b_16', batch=b, device='cuda', **small | {'size': 224}) for b in (*batches, 32)}

def measure(settings, limit):
    "The figures of one run in a fresh process, or its error"
    try: done = subprocess.run([sys.executable, HERE/'measure.py', json.dumps(settings)], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: return dict(error=f'not finished after {limit:.0f} s')
    if done.returncode < 0: return dict(error=f'killed by signal {-done.returncode}')
    if done.returncode: return dict(error=(done.stderr.strip().splitlines() or ['?'])[-1][:160])
    return json.loads(done.stdout.splitlines()[-1])

def _cpu():
    try: return next(l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

def environment(threads):
    packages = ', '.join(f'{p} {version(p)}' for p in ('torch','torchvision','fastsparse'))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return f'{date.today()}, Python {platform.python_version()}, {packages}, {threads} of {os.cpu_count()} cores of {_cpu()}, {gpu}'

@call_parse
def main(
    quick:bool=False, # Small sizes, into a temporary folder
    only:str='', # Regular expression: run only what has it in its name, as in "model/resnet18" or "gpu"
    again:bool=False, # Measure anew what is there already
    threads:int=1, # Of torch on the CPU
    limit:int=600, # Seconds for one process, after which it is said not to finish
    out:str='', # Folder of the results
):
    "Measure what zeros bring that are left out of the arithmetic"
    out = Path(out or (tempfile.mkdtemp() if quick else HERE.parent/'results'/'engines'))
    out.mkdir(parents=True, exist_ok=True)
    print(f'results go to {out}')
    file,env = out/'runs.jsonl',environment(threads)
    runs = {r['name']: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    known = plan(quick, torch.cuda.is_available())
    if not torch.cuda.is_available(): print('There is no GPU here: the part about 2:4 is left out')
    todo,start = {n: s for n,s in known.items() if re.search(only, n) and (again or n not in runs)},time.time()
    for i,(name,settings) in enumerate(todo.items(), 1):
        runs[name] = dict(name=name, env=env, settings=settings, **measure(settings | dict(threads=threads), limit))
        order = {n: k for k,n in enumerate(known)}
        runs = dict(sorted(runs.items(), key=lambda r: order.get(r[0], len(order))))
        file.write_text(''.join(json.dumps(r) + '\n' for r in runs.values()))
        print(f'{i}/{len(todo)}  {name}  {shown(runs[name])}  (about {(time.time()-start)/i*(len(todo)-i)/60:.0f} minutes remain)', flush=True)
    if not runs: raise SystemExit(f'nothing has {only!r} in its name')
    write(out, list(runs.values()))
    print(f"{out/'README.md'}, {out/'engines.png'}")
