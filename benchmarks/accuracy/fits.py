"One fit, in a process of its own"
import platform, time, warnings
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
import torch
from torch import nn
from arms import ARMS, TRIED
from summary import KEY

@dataclass(frozen=True)
class Task:
    trainings:tuple # Names of fit methods, without their `fit_`
    epochs:int
    lr:float # The highest
    seeds:int # Of the table
    seeds_tried:int # Of what else was tried
    percents:tuple=(80, 90, 95, 98)

TASKS = {'cifar10': Task(('one_cycle',), 2, .05, 3, 1), 'digits': Task(('one_cycle','flat_cos'), 5, .01, 5, 5),
         'vit': Task(('one_cycle',), 6, 3e-3, 3, 3, (50, 80))}

def zeros(model):
    "Percent of zeros among the weights of all convolutions and Linears"
    ws = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return 100*sum(int((w == 0).sum()) for w in ws)/sum(w.numel() for w in ws)

@cache
def _data(folder): # decoded once in each process
    from task import load_images
    return load_images(images_in(folder)),torch.load(folder/'resnet20-cifar10.pt')

def images_in(folder): return next((p for p in (folder/'cifar10-jpg.tgz', folder/'cifar10', folder) if p.exists()), None)

def fit(run, folder):
    "One fit on one thread, and everything that is known about it"
    warnings.filterwarnings('ignore')
    import fastai.callback.schedule # noqa: F401 (adds fit_one_cycle to Learner)
    from fastsparse.demo import digits_learner
    from task import make_learner, vit_learner
    task,training,seed,arm,percent = run
    torch.set_num_threads(1)
    learn = digits_learner(seed) if task == 'digits' else vit_learner(seed) if task == 'vit' else make_learner(*_data(folder), seed)
    callbacks,settings = {**ARMS, **TRIED}[arm](percent, task, learn.model)
    began = time.process_time()
    with learn.no_bar(),learn.no_logging(): getattr(learn, f'fit_{training}')(TASKS[task].epochs, TASKS[task].lr, cbs=callbacks)
    seconds = time.process_time() - began
    return dict(zip(KEY, run), accuracy=100*learn.recorder.values[-1][2], zeros=zeros(learn.model), seconds=seconds, settings=settings, epochs=TASKS[task].epochs, lr=TASKS[task].lr, n_train=len(learn.dls.train_ds),
                date=str(date.today()), python=platform.python_version(), versions={p: version(p) for p in ('fastsparse','fasterai','fastai','torch')})
