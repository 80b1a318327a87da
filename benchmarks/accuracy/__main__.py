"Accuracy against sparsity, beside fasterai: `python benchmarks/accuracy FOLDER`"
import json, platform, time, warnings
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
import torch
from fastcore.script import call_parse
from torch import nn
import fastai.callback.schedule # noqa: F401 (adds fit_one_cycle to Learner)
from arms import ARMS
from summary import write_summary
from task import load_images, make_learner

HERE = Path(__file__).parent
PERCENTS,EPOCHS,LR = (80, 90, 95, 98),2,.05

def plan(seeds):
    "All runs of the table, one seed after the other, so that a first table is there early"
    return [(seed, arm, percent) for seed in range(seeds) for arm,percent in [('dense', 0), *product([a for a in ARMS if a != 'dense'], PERCENTS)]]

def zeros(model):
    "Percent of zeros among the weights of all convolutions and Linears"
    ws = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return 100*sum(int((w == 0).sum()) for w in ws)/sum(w.numel() for w in ws)

def fit(images, weights, seed, arm, percent, n_train, epochs):
    "One fit of the task, and everything that is known about it"
    learn = make_learner(images, weights, seed, n_train)
    callbacks,settings = ARMS[arm](percent)
    began = time.process_time()
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, LR, cbs=callbacks)
    seconds = time.process_time() - began
    return dict(arm=arm, percent=percent, seed=seed, accuracy=100*learn.recorder.values[-1][2], zeros=zeros(learn.model), seconds=seconds, settings=settings,
                task=dict(n_train=n_train, epochs=epochs, lr=LR), date=str(date.today()), threads=torch.get_num_threads(), python=platform.python_version(),
                versions={p: version(p) for p in ('fastsparse','fasterai','fastai','torch')})

@call_parse
def main(
    data:str, # Folder with cifar10-jpg.tgz, or with cifar10/train and cifar10/test, and resnet20-cifar10.pt
    out:str=str(HERE.parent/'results'/'accuracy'), # Where runs are kept
    seeds:int=3, # Seeds of each arm
    only:str='', # Run only what has this in its name, as in "95_fastsparse"
    n_train:int=25_000, # Training images
    epochs:int=EPOCHS, # Epochs
    summarise:bool=False, # Only write table and plot of what is there
):
    "Fit whatever is not there yet, then write the table and the plot"
    warnings.filterwarnings('ignore')
    data,out = Path(data).expanduser(),Path(out)
    runs = {out/'runs'/f'''{seed}_{percent}_{arm.replace(' ', '_')}.json''': (seed, arm, percent) for seed,arm,percent in plan(seeds)}
    todo = [] if summarise else [f for f in runs if only in f.stem and not f.exists()]
    if todo:
        images = next((p for p in (data/'cifar10-jpg.tgz', data/'cifar10', data) if p.exists()), None)
        if images is None or not (data/'resnet20-cifar10.pt').exists():
            raise SystemExit(f'{data} has to hold cifar10-jpg.tgz (or the folders cifar10/train/<class> and cifar10/test/<class> of JPEGs, as untar_data(URLs.CIFAR) gives) '
                             'and resnet20-cifar10.pt, the state_dict of a ResNet-20 pretrained on CIFAR-10')
        try: version('fasterai')
        except PackageNotFoundError: raise SystemExit('fasterai is what we compare with: pip install -e ".[bench]"') from None
        images,weights = load_images(images),torch.load(data/'resnet20-cifar10.pt')
        (out/'runs').mkdir(parents=True, exist_ok=True)
    for i,file in enumerate(todo):
        if file.exists(): continue # another process was faster
        seed,arm,percent = runs[file]
        print(f'{i+1}/{len(todo)} seed {seed}, {arm}{f", {percent} %" if percent else ""}: ', end='', flush=True)
        run = fit(images, weights, seed, arm, percent, n_train, epochs)
        file.write_text(json.dumps(run, indent=1) + '\n')
        print(f'{run["accuracy"]:.2f} % right, {run["zeros"]:.2f} % zero, {run["seconds"]:.0f} s', flush=True)
    print(write_summary(out))
