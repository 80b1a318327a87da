"""Tables and a plot of what was measured"""
import re, statistics
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt

OURS,THEIRS = 'fastsparse','Torch-Pruning'
COLORS,MARKS = {OURS: '#0072b2', THEIRS: '#d55e00'},{OURS: 'o', THEIRS: 'D'}
TOLERANCE = 1e-4 # of how far the outputs of two inputs are apart

TEXTS = {
    'coupled': ('Half of the channels of each layer', """
Where layers are added, their channels can only go together. Half of the channels of each such set are zero in all of its layers;
both tools see the same zeros."""),
    'filter': ('Half of the filters of each convolution', """
`Sparsifier(model, 'filter', 'local').prune_model(50)`, each layer for itself: a channel can go where all layers
that are added happen to have it dead, or where what is left of it is constant. Linears keep all their outputs."""),
    'edge': ('Edge cases', """
Small modules of which half of the channels are dead. *Cut to* is the share of the weights that is left, *kept* that nothing was removed.
Outputs are compared in float32. Torch-Pruning was told as above which channels are zero; it cannot know what an operation makes of a zero."""),
    'growth': ('Time of the analysis', """
In units of one plain forward of the example. `flow` only looks which channels belong together; `compact` looks, cuts, and compares outputs."""),
    'large': ('A large model', 'A decoder of attention and MLPs in bfloat16: the peak of memory above what was there before, by the memory of the weights.'),
}
INTRO = f"""Written by `python benchmarks/compact`. Models of torchvision and fastai, untrained, with every parameter and running statistic stirred
so that all of them make a difference. Zeros are put in, the running statistics are made to fit them, as training would, and each tool makes the model smaller.
Each tool has a process of its own for each model, with one thread and a time limit.

* *Equal*: outputs on two new batches of two images, in float64, differ by at most {TOLERANCE:g} of how far the outputs of the two batches are apart.
* *Weights* are all parameters, *multiply-adds* those that torch's `FlopCounterMode` counts for convolutions and matrix products on one image.
* *× faster*: dense and smaller model take turns in one process; the median of the ratios of the rounds, with their quartiles.
* Torch-Pruning (TP) does not look at numbers: it is told which channels to remove. It was told those that are zero in the filters, biases and norms
of all layers that it couples, with an equal number in each group of a grouped convolution,
and not to touch the layers that give the outputs. Everything after that is its own.

Raw figures, with all settings, are in `runs.jsonl`."""

def number(x): return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'
def millions(n): return f'{n/1e6:,.2f}' if n < 1e8 else f'{n/1e6:,.0f}'

def markdown(rows):
    "A table from a list of dicts"
    lines = [list(rows[0]), ['---', *['--:']*(len(rows[0])-1)], *[r.values() for r in rows]]
    return '\n'.join(f"| {' | '.join(str(v).replace('|', '/') for v in l)} |" for l in lines)

def off(r):
    "How far the outputs are from those of the dense model, by how far they vary; None if they have other shapes"
    if r.get('difference') is None: return None
    return r['difference']/r['varies'] if r['varies'] else float('inf')

def equal(r): return bool(r) and not r.get('error') and (d := off(r)) is not None and d <= TOLERANCE

def verdict(r):
    "Whether the outputs are right, in words"
    if not r: return 'not run'
    if r.get('error'): return f"fails: {r['error']}"
    if equal(r): return 'equal'
    return 'other shapes' if off(r) is None else f'**wrong outputs ({off(r):.2g})**'

def outcome(r):
    "What became of an edge case"
    if not equal(r): return verdict(r)
    a,b = r['dense'][0],r['small'][0]
    return f'cut to {100*b/a:.0f} %, equal' if b < a else 'kept, equal'

def faster(r, batch):
    "Median and quartiles of the ratio dense/small, or None"
    if not r or batch not in r.get('latency', {}): return None
    ratios = [a/b for a,b in zip(*r['latency'][batch])]
    low,_,high = statistics.quantiles(ratios, n=4, method='inclusive')
    return statistics.median(ratios),low,high

def speed(r, batch):
    f = faster(r, batch)
    return '—' if f is None else f'{f[0]:.2f} ({f[1]:.2f}–{f[2]:.2f})'

def batches(runs): return sorted({b for r in runs for b in r.get('latency', {})}, key=int)

def arms(runs):
    "{what was measured: {arm: run}}"
    found = {}
    for r in runs: found.setdefault(r['name'].split('/', 1)[1], {})[r['arm']] = r
    return found

def small(r, k): # weights (0) or multiply-adds (1) that a tool left
    if not r or 'small' not in r: return '—'
    a,b = r['dense'][k],r['small'][k]
    return f'{millions(b)} ({a/b:.2f}× fewer)' if b < a else millions(b)

def brief(r, room=60): # errors are long
    text = verdict(r)
    return text if len(text) <= room else text[:room].rstrip() + '…'

def model_row(name, by, sizes):
    "What both tools made of one model"
    dense = next((r['dense'] for r in by.values() if 'dense' in r), None)
    row = {'': name, **{f'dense: {k}': millions(dense[i]) if dense else '—' for i,k in enumerate(('weights, M','multiply-adds, M'))}}
    for tool,short in ((OURS, OURS), (THEIRS, 'TP')):
        r = by.get(tool)
        row |= {f'{short}: weights, M': small(r, 0), f'{short}: multiply-adds, M': small(r, 1)}
        row |= {f'{short}: × faster, batch {b}': speed(r, b) for b in sizes} | {f'{short}: outputs': brief(r)}
    return row

def standing(found):
    "Where one tool leaves more than the other, with equal outputs"
    both = {n: by for n,by in found.items() if equal(by.get(OURS)) and equal(by.get(THEIRS))}
    left = lambda by,tool: by[tool]['small']
    more = lambda a,b: [n for n,by in both.items() if any(x > y for x,y in zip(left(by, a), left(by, b)))]
    failed = lambda tool: [n for n,by in found.items() if tool in by and not equal(by[tool])]
    listed = lambda names: f"{len(names)} ({', '.join(names)})" if names else 'none'
    ours_ = [off(by[OURS]) for by in found.values() if equal(by.get(OURS))]
    lines = [f'* Of {len(found)} models, {len(both)} have equal outputs with both tools. Among these, fastsparse leaves more weights or multiply-adds '
             f'than Torch-Pruning in: {listed(more(OURS, THEIRS))}. Torch-Pruning leaves more than fastsparse in: {listed(more(THEIRS, OURS))}.',
             f'* Outputs not equal, or no result: fastsparse {listed(failed(OURS))}, Torch-Pruning {listed(failed(THEIRS))}.']
    return '\n'.join(lines + [f'* The largest difference among the equal ones of fastsparse: {max(ours_):.1g} of the variation.']*bool(ours_))

def analysis_row(name, by):
    some = [r for r in by.values() if 'forward' in r]
    row = {'': name, 'example': ' × '.join(map(str, some[0]['example'])), 'forward, ms': number(1000*statistics.median(r['forward'] for r in some))}
    for tool in (OURS, THEIRS):
        r = by.get(tool, {})
        taken = (number(r['analysis']), f"{r['analysis']/r['forward']:.1f}") if 'analysis' in r else ('—', '—')
        row |= dict(zip((f'{tool}, s', f'{tool}, forwards'), taken))
    return row

def short_row(name, by):
    "The same in a few words, for a reader in a hurry"
    r,times = by[OURS],lambda k: f"{by[OURS]['dense'][k]/by[OURS]['small'][k]:.2f}×"
    faster_ = {f'faster, batch {b}': f'{f[0]:.2f}×' if (f := faster(r, b)) else '—' for b in batches([r])}
    told = {'equal': 'the same' if by.get(THEIRS, {}).get('small') == r['small'] else 'equal, larger'}
    return {'model': name, 'fewer weights': times(0), 'fewer multiply-adds': times(1), **faster_, 'outputs': verdict(r),
            'Torch-Pruning': told.get(verdict(by.get(THEIRS)), verdict(by.get(THEIRS)).split(':')[0])}

SHORT = ('resnet18','resnet50','densenet121','mobilenet_v3_large','convnext_tiny','vit_b_16','DynamicUnet resnet18')

def in_short(found): return markdown([short_row(n, found[n]) for n in SHORT if 'small' in found.get(n, {}).get(OURS, {})])

def models(runs):
    found,sizes = arms(runs),batches(runs)
    there = {n: by for n,by in found.items() if any('forward' in r for r in by.values())}
    text = [markdown([model_row(n, by, sizes) for n,by in found.items()]), standing(found)]
    if runs[0]['name'].startswith('coupled') and any(n in found for n in SHORT): text += ['In short:', in_short(found)]
    if there: text.append('Time to make the smaller model, measured once: `compact`, or graph and pruning.')
    if there: text.append(markdown([analysis_row(n, by) for n,by in there.items()]))
    return text

def edges(runs):
    found = arms(runs)
    count = lambda tool,test: sum(test(outcome(by[tool])) for by in found.values() if tool in by)
    kinds = {'cut, equal': ('cut',), 'kept, equal': ('kept',), 'wrong outputs': ('**','other'), 'fails': ('fails',)}
    sums = [{'': kind, **{t: count(t, lambda o: o.startswith(starts)) for t in (OURS, THEIRS)}} for kind,starts in kinds.items()]
    return [markdown(sums), markdown([{'': n, **{t: outcome(by.get(t)) for t in (OURS, THEIRS)}} for n,by in found.items()])]

def growth(runs):
    ok = [r for r in runs if not r.get('error')]
    both = lambda r,k,what: {f'{what}, s': number(r[k]), f'{what}, forwards': f"{r[k]/r['forward']:.1f}"}
    rows = [{'': r['name'].split('/', 1)[1], 'forward, s': number(r['forward'])} | both(r, 'flow', 'flow') | both(r, 'analysis', 'compact') for r in ok]
    return ([markdown(rows)] if ok else []) + [f"{r['name']}: {verdict(r)}" for r in runs if r.get('error')]

def large(runs):
    r = runs[-1]
    if r.get('error'): return [f"{r['name']}: {verdict(r)}"]
    memory = lambda m: '—' if m is None else f'{m:.2f}'
    rows = [{'': k, 's': number(r[k]['seconds']), 'extra memory, × weights': memory(r[k]['memory'])} for k in ('forward','flow','prune','compact')]
    return [f"{r['dense'][0]/1e6:,.0f} M weights, {r['bytes']/2**30:.2f} GiB; the example has {' × '.join(map(str, r['example']))} tokens.", markdown(rows)]

SECTIONS = dict(coupled=models, filter=models, edge=edges, growth=growth, large=large)

def plot(runs, file):
    "How many times faster, by model and batch"
    found,sizes = arms([r for r in runs if r['name'].startswith('coupled/')]),batches(runs) or ['1']
    key = lambda n: (faster(found[n].get(OURS), sizes[-1]) or (0,))[0]
    names = sorted(found, key=key)
    fig,axs = plt.subplots(1, len(sizes), figsize=(5.4*len(sizes), 1.6 + .27*len(names)), sharey=True, sharex=True, layout='constrained', squeeze=False)
    for ax,b in zip(axs.flat, sizes):
        for tool,shift in ((OURS, .14), (THEIRS, -.14)):
            at = [(i + shift, f) for i,n in enumerate(names) if (f := faster(found[n].get(tool), b))]
            mid = [f[0] for _,f in at]
            error = [[f[0]-f[1] for _,f in at], [f[2]-f[0] for _,f in at]]
            fill = COLORS[tool] if tool == OURS else 'white'
            ax.errorbar(mid, [y for y,_ in at], xerr=error, fmt=MARKS[tool], ms=5, color=COLORS[tool], mfc=fill, label=tool, elinewidth=1)
        bad = [i for i,n in enumerate(names) if THEIRS in found[n] and not equal(found[n][THEIRS])]
        ax.plot([.8]*len(bad), [i - .14 for i in bad], 'x', color=COLORS[THEIRS], label='Torch-Pruning: no model with equal outputs' if bad else None)
        ax.axvline(1, color='.6', lw=1, ls='--')
        ax.set(xlabel='times faster than dense (one thread)', title=f"batch of {b}", yticks=range(len(names)), yticklabels=names, ylim=(-.8, len(names) - .2))
        ax.grid(axis='x', alpha=.3)
        ax.grid(axis='y', alpha=.15)
        ax.set_axisbelow(True)
        ax.tick_params(axis='y', length=0)
        ax.spines[['top','right']].set_visible(False)
    axs.flat[0].legend(fontsize=8, frameon=True, loc='lower right')
    fig.suptitle('Half of the channels gone', fontsize=11)
    fig.savefig(file, dpi=150)
    plt.close(fig)

def machines(runs):
    "Versions and machine, and what ran there where there is more than one"
    envs = {}
    for r in runs: envs.setdefault(r['env'], set()).add(r['name'].split('/')[0])
    return '\n'.join(f'* {e}' + (f": {', '.join(s for s in SECTIONS if s in there)}" if len(envs) > 1 else '') for e,there in envs.items())

def write(out, runs):
    "`README.md` and `compact.png` in the folder `out`"
    parts = ['# Zeros that pay', INTRO, machines(runs)]
    if any(re.search('no torch-pruning', r['env']) for r in runs): parts.append("Torch-Pruning was not installed; `pip install -e '.[bench]'` adds it.")
    parts.append('![](compact.png)')
    for section,(title,text) in TEXTS.items():
        rows = [r for r in runs if r['name'].startswith(section + '/')]
        if rows: parts += [f'## {title}', text.strip(), *SECTIONS[section](rows)]
    (out/'README.md').write_text('\n\n'.join(parts) + '\n')
    plot(runs, out/'compact.png')
