"Run by test_trust_distributed.py in two processes: fits on the CPU, and says on each rank what came out"
import hashlib
import json
import sys
from pathlib import Path

import torch
from fastai import distributed as fastai_distributed
from fastai_helpers import Journal, learner, loaders, momentum, net, percent, quiet
from torch import distributed, nn

from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.plan import MACs


def on_cpu(self, t, rank): # fastai's own sends the indices through a GPU
    t = torch.LongTensor(t)
    distributed.broadcast(t, rank)
    return t.tolist()


fastai_distributed.DistributedDL._broadcast = on_cpu


def digest(tensors): return hashlib.sha1(b''.join(t.detach().contiguous().float().numpy().tobytes() for t in tensors)).hexdigest()


def main(folder):
    folder, results = Path(folder), {}
    rank = fastai_distributed.rank_distrib()
    cases = dict(large_final={}, random_score={}, movement={}, updating_movmag={}, filters=dict(granularity='filter', layers=nn.Conv2d), tickets=dict(schedule='iterative', lth=True, save_tickets=folder/'tickets'),
                 taylor={}, wanda={}, channels_last={}, rigl=dict(grow='rigl', update_every=2), set=dict(grow='set', update_every=2), coupled=dict(sparsity=MACs(60), granularity='coupled', criteria='random_score'))
    for name, kwargs in cases.items():
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        items = loaders(6).train.dataset
        learn = learner(dls=DataLoaders(DataLoader(items[:64], bs=8, shuffle=True), DataLoader(items[64:], bs=16)), model=net(), opt_func=momentum, path=folder)
        torch.manual_seed(rank + 1) # ranks draw different random numbers
        if name == 'channels_last': learn.model.to(memory_format=torch.channels_last)
        cb = SparsifyCallback(kwargs.pop('sparsity', 80), **({'criteria': name} if name not in ('filters', 'tickets', 'channels_last', 'coupled', 'rigl', 'set') else {}), **kwargs)
        journal = Journal(cb)
        with learn.distrib_ctx(sync_bn=False, in_notebook=False, cpu=True), quiet(learn): learn.fit(2, cbs=[cb, journal])
        want = cb.current_sparsity
        if name == 'large_final':
            learn.save('sparse')
            with learn.distrib_ctx(sync_bn=False, in_notebook=False, cpu=True), quiet(learn): learn.fit(1, cbs=KeepSparsityCallback())
        evidence = [t for kind in cb.sparsifier._gathers for t in cb.sparsifier._memory[kind].values()]
        results[name] = dict(evidence=digest(evidence), weights=digest(learn.model.parameters()), masks=digest(cb.sparsifier.masks.values()), percent=percent(learn.model), current=want, keys=list(learn.model.state_dict()),
                             kind=type(learn.model).__name__, regrown=journal.regrown, state=journal.dense_state, steps=journal.steps)
    (folder/f'rank{rank}.json').write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == '__main__': main(sys.argv[1])
