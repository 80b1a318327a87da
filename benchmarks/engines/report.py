"""Tables and a plot of what was measured"""
import re
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from fastsparse.timing import Timing, ratios, verdict

TEXTS = {
    'linear': ('Linear layers', 'Scattered zeros, so many percent of the weights. `accelerated` stores them in compressed sparse rows.'),
    'model': ('Convolutional networks', """
Scattered zeros, so many percent in each layer, images of 224×224. `accelerated` turns over the layers that were faster by a tenth on this machine."""),
    'channels': ('Whole channels', 'Half of the channels that can only go together are zero: `compacted` cuts them out, `accelerated` leaves them out where that pays.'),
    'gpu': ('2:4 on a GPU', 'Two of every four weights of each `Linear`, in float16: `accelerated` has them as semi-structured tensors.'),
}
INTRO = """Written by `python benchmarks/engines`. Models of torchvision, untrained, with every parameter stirred so that all of them make a difference.
Each run has a process of its own, in which all forms of a model take turns.

* *dense* is the model without zeros: random numbers stand in their places. *masked* is the model with its zeros, computed as ever. *accelerated* is what `accelerate` makes of it, *compacted* what `compact` cuts out of it.
* *× faster* than dense: the median of the ratios of the rounds, with their quartiles; `no gain here` where these overlap the unrest, by which the time of dense changes from one round to the next, in the median.
* *multiply-adds* are those of the weights that are stored, *memory* is that of parameters and buffers, *peak* that of all tensors of a forward beside them.
* Outputs are compared on a new random input: the largest difference, by the largest output.

Raw figures, with all settings, are in `runs.jsonl`."""
FORMS = ('masked','compacted','accelerated')

def markdown(rows):
    "A table from a list of dicts"
    lines = [list(rows[0]), ['---', *['--:']*(len(rows[0])-1)], *[r.values() for r in rows]]
    return '\n'.join(f"| {' | '.join(str(v).replace('|', '/') for v in l)} |" for l in lines)

def timing(r, form): return Timing(tuple(r['seconds'][form]))

def faster(r, form):
    "What may be said of a form beside dense"
    if form not in r.get('seconds', {}): return 'nothing turned over' if form == 'accelerated' else '—'
    return verdict(timing(r, 'dense'), timing(r, form)).replace(' faster', '')

def shown(r):
    "The figures of one run in a line"
    if r.get('error'): return f"fails: {r['error']}"
    return ', '.join([f"dense {timing(r, 'dense')}", *(f'{f}: {faster(r, f)}' for f in FORMS if f in r['seconds'])])

def row(r):
    what,percent,batch = re.fullmatch(r'\w+/(.*), (.*), batch (\d+)', r['name']).groups()
    found = {'': what, 'zeros': percent, 'batch': batch}
    if r.get('error'): return found | {'dense': f"fails: {r['error']}"}
    return found | {'dense': str(timing(r, 'dense'))} | {f'{f}, × faster': faster(r, f) for f in FORMS if f != 'compacted' or r['name'].startswith('channels')}

def more(r):
    "Beside the time"
    what,percent,batch = re.fullmatch(r'\w+/(.*), (.*), batch (\d+)', r['name']).groups()
    found,last = {'': what, 'zeros': percent, 'batch': batch, 'layers turned over': f"{r['done']} of {r['layers']}"},r['rows'].get('accelerated')
    mega = lambda n: '—' if n is None else f'{n/1e6:,.2f}'
    for k,title in (('macs','multiply-adds, M'),('bytes','memory, MB'),('peak','peak, MB')):
        get = lambda row: mega(row.get('memory' if k == 'peak' else k)) if row else '—'
        found[title] = f"{get(r['rows']['dense'])} → {get(last)}"
    return found | {'outputs differ by': f"{r['difference']:.0e}" if last else '—'}

def section(runs):
    rows = [row(r) for r in runs]
    keys = list(dict.fromkeys(k for r in rows for k in r))
    ok = [more(r) for r in runs if not r.get('error')]
    return [markdown([{k: r.get(k, '—') for k in keys} for r in rows]), *([markdown(ok)] if ok else [])]

def in_short(runs):
    "How many times faster `accelerate` makes them, for a reader in a hurry"
    found = {}
    for r in runs:
        if r.get('error') or not r['name'].startswith(('linear/','model/')): continue
        what,percent,batch = re.fullmatch(r'\w+/(.*), (.*), batch (\d+)', r['name']).groups()
        at = found.setdefault(('`Linear` ' if r['name'].startswith('linear') else '') + what, {})
        at[f'{percent} zeros, batch {batch}'] = faster(r, 'accelerated').split(' (')[0]
    columns = dict.fromkeys(k for at in found.values() for k in sorted(at, key=lambda k: int(k.split()[-1])))
    return markdown([{'accelerated': n, **{k: at.get(k, '—') for k in columns}} for n,at in found.items()])

def plot(runs, file):
    "How many times faster than dense, by sparsity"
    lines = {}
    for r in runs:
        if r.get('error') or not r['name'].startswith(('linear/','model/')): continue
        what,percent,batch = re.fullmatch(r'\w+/(.*), (\d+) %, batch (\d+)', r['name']).groups()
        form = 'accelerated' if 'accelerated' in r['seconds'] else 'masked'
        lines.setdefault((r['name'].split('/')[0], what, int(batch)), []).append((int(percent), *ratios(timing(r, 'dense'), timing(r, form))))
    fig,axs = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for ax,kind,title in zip(axs, ('linear','model'), ('Linear layers','Networks')):
        names = list(dict.fromkeys(w for k,w,_ in lines if k == kind))
        for (k,what,batch),points in lines.items():
            if k != kind: continue
            at,mid,low,high = zip(*sorted(points))
            error = [[m - l for m,l in zip(mid, low)], [h - m for m,h in zip(mid, high)]]
            color,style = f'C{names.index(what)}','-' if batch == 1 else '--'
            ax.errorbar(at, mid, yerr=error, ls=style, marker='o', ms=4, color=color, label=f'{what}, batch {batch}')
        ax.axhline(1, color='.6', lw=1, ls=':')
        ax.set(title=title, xlabel='zeros, %', ylabel='times faster than dense')
        ax.grid(alpha=.3)
        if names: ax.legend(fontsize=8, loc='upper left')
    fig.savefig(file, dpi=150)
    plt.close(fig)

def write(out, runs):
    "`README.md` and `engines.png` in the folder `out`"
    parts = ['# Zeros that are not multiplied', INTRO, '\n'.join(f'* {e}' for e in dict.fromkeys(r['env'] for r in runs)), '![](engines.png)']
    for name,(title,text) in TEXTS.items():
        some = [r for r in runs if r['name'].startswith(name + '/')]
        if some: parts += [f'## {title}', text.strip(), *section(some)]
    if any(not r.get('error') and r['name'].startswith(('linear/','model/')) for r in runs): parts += ['## In short', in_short(runs)]
    (out/'README.md').write_text('\n\n'.join(parts) + '\n')
    plot(runs, out/'engines.png')
