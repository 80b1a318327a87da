"""Accuracy against sparsity, beside fasterai; runs are kept in `benchmarks/results/accuracy`, with a table and a plot of them.

    python benchmarks/accuracy FOLDER

goes on where it stopped. Without FOLDER it does the part that needs no data but scikit-learn's digits.
"""
import json, os, time
os.environ['MPLBACKEND'] = 'agg' # pictures go to files
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from fastcore.script import call_parse
from arms import ARMS, TRIED
from fits import TASKS, fit, images_in
from summary import KEY, read_runs, write_summary

HERE = Path(__file__).parent

def plan(tasks):
    "All runs as (task, training, seed, arm, percent): one seed after the other, so that a first table is there early; what was tried comes last"
    def runs(task, arms, seeds):
        pairs = [p for a in arms for p in ([(a, 0)] if a == 'dense' else product([a], TASKS[task].percents))]
        return [(task, fit, seed, *pair) for seed,fit,pair in product(range(seeds), TASKS[task].trainings, pairs)]
    return [r for arms,seeds in ((ARMS, 'seeds'), (TRIED, 'seeds_tried')) for t in tasks for r in runs(t, arms, getattr(TASKS[t], seeds))]

@call_parse(pos=['folder'])
def main(
    folder:str='', # With cifar10-jpg.tgz, or with cifar10/train and cifar10/test, and resnet20-cifar10.pt; none: digits only
    out:str=str(HERE.parent/'results'/'accuracy'), # Where runs are kept
    jobs:int=min(os.cpu_count(), 8), # Fits at the same time, of one thread and about 1.5 GB each
    only:str='', # Run only what has this in its name, as in "cifar10 one_cycle 0 fastsparse 95"
    summarise:bool=False, # Only write table and plot of what is there
):
    "Fit whatever is not there yet, then write the table and the plot"
    out,folder = Path(out),Path(folder).expanduser() if folder else None
    file = out/'runs.jsonl'
    if folder and (images_in(folder) is None or not (folder/'resnet20-cifar10.pt').exists()):
        raise SystemExit(f'{folder} has to hold cifar10-jpg.tgz (or the folders cifar10/train/<class> and cifar10/test/<class> of JPEGs, as untar_data(URLs.CIFAR) gives) '
                         'and resnet20-cifar10.pt, the state_dict of a ResNet-20 pretrained on CIFAR-10')
    if not find_spec('fasterai'): raise SystemExit('fasterai is what we compare with: pip install -e ".[bench]"')
    done = {tuple(r[k] for k in KEY) for r in read_runs(file)}
    todo = [] if summarise else [r for r in plan(list(TASKS) if folder else ['digits','vit']) if r not in done and only in ' '.join(map(str, r))]
    if todo: out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    os.environ |= dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(2**33), MALLOC_TOP_PAD_=str(2**28)) # of the fits: memory is kept, and not given back and asked for in each batch
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) as pool:
        futures = {pool.submit(fit, run, folder): run for run in todo}
        for i,future in enumerate(as_completed(futures), 1):
            r = future.result()
            with file.open('a') as f: f.write(json.dumps(r) + '\n')
            print(f'''{i}/{len(todo)}  {' '.join(str(r[k]) for k in KEY)}: {r["accuracy"]:.2f} % right, {r["zeros"]:.2f} % zero, {r["seconds"]:.0f} s  '''
                  f'(about {(time.time()-start)/i*(len(todo)-i)/60:.0f} minutes remain)', flush=True)
    print(write_summary(out))
