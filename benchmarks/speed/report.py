"""Tables and a plot of what was measured"""
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import pandas as pd

TOOLS = dict(limit='limit: one pass over the weights', copy='limit: copy the weights', fastsparse='fastsparse', fasterai='fasterai', prune='torch.nn.utils.prune', ao='torch.ao.pruning (layer by layer, Linear only)',
             plain='no callback', hold='fastsparse, only holding 90 %', touch='every weight times 1 after each step', beside='fastsparse next to a foreign callback')
COLORS = dict(limit='0.45', fastsparse='#0072b2', beside='#56b4e9', hold='#009e73', touch='0.6', fasterai='#d55e00', prune='#cc79a7', ao='#e69f00')

TEXTS = {
    'selection': ('Selection', """Prune once, by magnitude, all Conv2d and Linear weights of one model together, to 70 %: masks made and applied.
The limit is one pass `w.mul_(w.abs() > t)`, warmed up. torch.ao.pruning cannot rank layers together nor prune convolutions, so it prunes each Linear to 70 %."""),
    'growth': ('Growth', 'The same of a stack of 1024×1024 Linears. A billion weights are left out where less than 16 GB of memory are free.'),
    'other': ('Other selections', """To 70 % (2:4: to 50 %), unless it says otherwise; each against a limit in its own dtype. With filters, kernels and 2:4 of a ResNet only the Conv2d are pruned.
fasterai budgets filters where fastsparse budgets weights, so they do not end at the same sparsity."""),
    'step': ('Training', """A ResNet-18 on random images in batches of 32, one epoch of `fit_one_cycle` with fastai's Adam; to 90 %, global, fasterai with its agp, everything else as each tool has it by default.
*Loop* is the whole training loop. *In the callback* is the time in all events of the callback, before and after the fit included; it is exact where the difference of two loops is lost in their spread.
An epoch this short has far more updates of the masks per batch than real training, where fastsparse makes about 100 in all; *only holding* is what remains between them.
A foreign callback is one that fastsparse knows nothing about, and so has to guard against."""),
    'import': ('Import', 'A fresh Python process that imports these modules, from start to end.'),
    'gpu selection': ('Selection on the GPU', 'The limit is a copy of all weights on the device, `x.copy_(y)`.'),
    'gpu step': ('Training on the GPU', 'As above, with `learn.to_fp16()`. The time in the callback is that of the host, which does not wait for the device.'),
}

def number(x): return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'
def exact(x): return f'{x:.2f}'

def spread(x, number=number):
    "Median (smallest–largest)"
    x = x.dropna()
    if x.empty: return '—'
    low,mid,high = (number(v) for v in (x.min(), x.median(), x.max()))
    return mid if low == mid == high else f'{mid} ({low}–{high})'

def ratio(x, base): return x/base.reindex(x.index) # within the same repeat

def markdown(rows):
    "A table from a list of dicts"
    lines = [list(rows[0]), ['--:' if k.strip() else '---' for k in rows[0]], *[r.values() for r in rows]]
    return '\n'.join(f"| {' | '.join(l)} |" for l in lines)

def select_row(runs, base):
    total = runs.total if runs.arm.iloc[0] not in ('limit','copy') else runs.total[:0] # they construct nothing
    return {'prune, s': spread(runs.pruned), '× limit': spread(ratio(runs.pruned, base.pruned)), 'with construction, s': spread(total), '× limit ': spread(ratio(total, base.pruned)),
            'extra memory, × weights': spread(runs.memory, exact), 'zeros, %': spread(runs.zeros, exact)}

def step_row(runs, base):
    return {'loop, ms/batch': spread(1000*runs.loop), '× no callback': spread(ratio(runs.loop, base.loop)), 'in the callback, ms/batch': spread(1000*runs.inside), '% of no callback': spread(100*ratio(runs.inside, base.loop)),
            'updates': spread(runs.updates), 'ms/update': spread(1000*runs['update']), 'kept in the fit, × weights': spread(runs.during, exact), 'after it': spread(runs.after, exact), 'zeros, %': spread(runs.zeros, exact)}

def import_row(runs, base): return {'s': spread(runs.loop), 'more than the first, s': spread(runs.loop - base.loop.reindex(runs.index))}

def work(runs):
    "What a comparison compares"
    name,size = runs.comparison.iloc[0].split('/', 1)[1],runs.weights.median()
    if runs.case.iloc[0] == 'step': return f"{name}, {runs.settings.iloc[0]['batches']} batches"
    return name if runs.section.iloc[0] == 'growth' or pd.isna(size) else f'{name}, {number(size/1e6)} M weights'

def table(runs):
    "One row for each arm of each comparison"
    row,rows = dict(select=select_row, step=step_row, imports=import_row)[runs.case.iloc[0]],[]
    for _,group in runs.groupby('comparison', sort=False):
        arms = {arm: g.set_index('repeat') for arm,g in group.groupby('arm', sort=False)}
        base = next(iter(arms.values()))
        for arm,g in arms.items():
            crashed = g.error.dropna()
            note = f" (crashed in {len(crashed)} of {len(g)}: {crashed.iloc[0]})".replace('|', '/') if len(crashed) else ''
            rows.append({'': work(group) if g is base else '', ' ': TOOLS.get(arm, f'`import {arm}`') + note, **row(g, base)})
    if row is import_row: rows = [{k: v for k,v in r.items() if k} for r in rows]
    return markdown(rows)

def in_long_fits(runs, batches=5000, updates=100):
    "What the medians of `runs` mean for a fit of as many batches"
    median = runs.groupby(['arm','comparison']).median(numeric_only=True)
    if not {'plain','hold','fastsparse'} <= set(runs.arm): return ''
    hold,lines = median.loc['hold'].inside.median(),[]
    for name,row in median.loc['fastsparse'].iterrows():
        each,plain = hold + updates*row['update']/batches,median.loc[('plain', name)].loop
        lines.append(f"{1000*each:.3g} ms, {100*each/plain:.2g} % of a plain batch, at {name.split('/')[1]}")
    return f"Computed from these medians: with {updates} updates in {batches:,} such batches, holding included, the callback takes {' and '.join(lines)}."

def plot(runs, file):
    "Selection against size, and the time in the callbacks"
    fig,(left,right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.1), layout='constrained')
    growth = runs[runs.section == 'growth']
    for arm,g in growth.groupby('arm', sort=False):
        g = g.groupby('weights').pruned
        mid = g.median()
        left.errorbar(mid.index, mid, [mid - g.min(), g.max() - mid], color=COLORS[arm], marker='o', ms=4, capsize=2, ls='--' if arm == 'limit' else '-', label=TOOLS[arm])
    for arm,g in runs[(runs.section == 'selection') & (runs.arm != 'limit')].groupby('arm', sort=False):
        left.plot(g.weights.median(), g.pruned.median(), '*', ms=12, color=COLORS[arm], mec='k', mew=.5, ls='', label=f"{TOOLS[arm].split(' (')[0]}, {g.comparison.iloc[0].split('/')[1]}")
    left.set(xscale='log', yscale='log', xlabel='weights', ylabel='seconds', title='Pruning to 70 %, once')
    left.grid(alpha=.3)
    if left.lines: left.legend(fontsize=8, frameon=False)
    steps,labels = runs[runs.section == 'step'],[]
    for _,group in steps.groupby('comparison', sort=False):
        arms = {arm: g.set_index('repeat') for arm,g in group.groupby('arm', sort=False)}
        labels.append(work(group))
        for arm,g in arms.items():
            x = (100*ratio(g.inside, arms['plain'].loop)).dropna() if 'plain' in arms else g.inside[:0]
            if not len(x): continue
            right.barh(len(labels), x.median(), color=COLORS[arm], xerr=[[x.median() - x.min()], [x.max() - x.median()]], capsize=2, height=.7)
            right.annotate(f'{number(x.median())} %', (x.max(), len(labels)), (5, 0), textcoords='offset points', va='center', fontsize=9)
            labels.append(TOOLS[arm])
    right.set_yticks(range(len(labels)), labels, fontsize=9)
    right.tick_params(axis='y', length=0)
    for tick in right.get_yticklabels():
        if tick.get_text() not in TOOLS.values(): tick.set_fontweight('bold')
    right.set_ylim(len(labels) - .5, -.7)
    right.set(xlabel='time in the callback, % of the training loop without it', title='ResNet-18 in training, to 90 %')
    right.margins(x=.15)
    right.grid(axis='x', alpha=.3)
    right.set_axisbelow(True)
    for ax in (left, right): ax.spines[['top','right']].set_visible(False)
    fig.savefig(file, dpi=150)

def write(out, runs):
    "`README.md` and `speed.png` in the folder `out`"
    runs = pd.DataFrame(runs)
    for column in ('error','weights','pruned','total','memory','zeros','loop','inside','updates','update','during','after'):
        runs[column] = runs[column] if column == 'error' and column in runs else pd.to_numeric(runs[column]) if column in runs else float('nan')
    runs['section'] = runs.comparison.str.split('/').str[0]
    parts = ['# Speed and memory', """Written by `python benchmarks/speed`. Each figure comes from a fresh process; in a comparison all tools take turns, and the table has the median (smallest–largest) of the repeats.
Ratios are taken within a repeat. Everything is loaded and warmed up on a small model before it is timed. Extra memory is the peak, construction included, above what the process held before. Raw figures are in `runs.jsonl`."""]
    envs = runs.groupby('env', sort=False).section.unique()
    parts += ['\n'.join(f"* {env}" + (f": {', '.join(TEXTS[s][0].lower() for s in sections)}" if len(envs) > 1 else '') for env,sections in envs.items()), '![](speed.png)']
    if runs.env.str.contains('no fasterai').any(): parts.append("fasterai was not installed; `pip install -e '.[bench]'` adds it.")
    for section,(title,text) in TEXTS.items():
        rows = runs[runs.section == section]
        if len(rows): parts += [f'## {title}', text, table(rows)] + ([in_long_fits(rows)] if section == 'step' else [])
        elif section == 'gpu selection': parts += ['## GPU', 'No GPU here.']
    (out/'README.md').write_text('\n\n'.join(parts) + '\n')
    plot(runs, out/'speed.png')
