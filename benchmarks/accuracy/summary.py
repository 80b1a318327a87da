"Table and plot of all runs that are there"
import json
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd
from arms import TRIED

KEY = ('task','training','seed','arm','percent')
COLOURS = {'fastsparse': '#d1495b', 'fasterai tuned': '#edae49', 'fasterai': '#00798c'}
TITLES = {('cifar10','one_cycle'): 'CIFAR-10, pretrained', ('digits','one_cycle'): 'digits from scratch', ('digits','flat_cos'): 'digits from scratch, flat_cos', ('vit','one_cycle'): 'a small ViT from scratch'}

def read_runs(file:Path) -> list[dict]:
    "All runs that are there"
    return [json.loads(l) for l in file.read_text().splitlines()] if file.exists() else []

def spread(values) -> str:
    "Mean and, with more than one seed, standard deviation"
    return f'{values.mean():.1f}' + (f' ± {values.std():.1f}' if len(values) > 1 else '')

def table(runs:pd.DataFrame, arms:list[str], bold:str='') -> str:
    "Accuracy for each of these arms that is there and each sparsity, in Markdown; an arm with fewer seeds than the others says so"
    runs = runs[runs.arm.isin(arms)]
    if runs.empty: return 'Not run.'
    cells,seeds = runs.groupby(['arm','percent']).accuracy.apply(spread).unstack('percent').fillna(''),runs.groupby('arm').seed.nunique()
    lines = ['| zeros asked for | ' + ' | '.join(f'{p} %' for p in cells) + ' |', '|---|' + '--:|'*len(cells.columns)]
    for arm in (a for a in arms if a in seeds):
        mark,few = '**' if arm == bold else '',f' ({seeds[arm]} of {max(seeds)} seeds)' if seeds[arm] < max(seeds) else ''
        lines.append(f'| {mark}{arm}{mark}{few} | ' + ' | '.join(f'{mark}{c}{mark}' if c else '' for c in cells.loc[arm]) + ' |')
    return '\n'.join(lines)

def compared(runs:pd.DataFrame) -> str:
    "The table of those that are compared"
    return table(runs, list(COLOURS), 'fastsparse')

def panel(ax, runs:pd.DataFrame, title:str):
    "Accuracy against sparsity, with the range over the seeds"
    dense = runs[runs.arm == 'dense'].accuracy
    if len(dense): ax.axhline(dense.mean(), color='grey', ls='--', lw=1, label=f'dense, {dense.mean():.1f} %')
    for arm,colour in COLOURS.items():
        by = runs[runs.arm == arm].groupby('percent').accuracy
        if not len(by): continue
        m = by.mean()
        ax.errorbar(m.index, m, [m-by.min(), by.max()-m], color=colour, label=arm, marker='o', ms=4, capsize=3)
    ax.set(xlabel='weights that are zero (%)', ylabel='right on test images (%)', title=title, xticks=sorted(set(runs.percent) - {0}))
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False, loc='best' if dense.mean() < 80 else 'lower left', fontsize=9)

def parts(runs:pd.DataFrame):
    "(title, runs) of each task and training"
    return [(title, r) for key,title in TITLES.items() if len(r := runs[(runs.task == key[0]) & (runs.training == key[1])])]

def plot(runs:pd.DataFrame):
    "A figure with a panel for each task and training"
    them = parts(runs)
    fig,axs = plt.subplots(1, len(them), figsize=(.6 + 4.4*len(them), 3.8), layout='constrained', squeeze=False)
    for ax,(title,r) in zip(axs.flat, them): panel(ax, r, title)
    return fig

def _dense(runs):
    dense = runs[runs.arm == 'dense'].accuracy
    return f'{spread(dense)} over {len(dense)} seeds' if len(dense) else 'not run'

def write_summary(out:Path) -> str:
    "Write `README.md` and `accuracy.png` beside the runs"
    runs = read_runs(out/'runs.jsonl')
    if not runs: raise SystemExit(f'no runs in {out}')
    runs = pd.DataFrame(runs)
    fig = plot(runs)
    fig.savefig(out/'accuracy.png', dpi=150)
    plt.close(fig)
    last = runs.iloc[-1]
    text = ["""# Accuracy against sparsity

Percent right of the test images, mean ± standard deviation over the seeds. *fasterai* is with its own default schedule, *fasterai tuned* with that schedule moved to where it does best, both by global magnitude.

* **CIFAR-10**: a ResNet-20, pretrained, is fine-tuned on 25,000 of the training images (stored as JPEGs, so compare with nothing but this) for 2 epochs, `fit_one_cycle(2, 0.05)`, with SGD (momentum 0.9, weight decay 1e-4), random flips and crops, batches of 128; 10,000 test images.
* **digits**: three convolutions and a Linear are trained from scratch on 1,400 of scikit-learn's digits for 5 epochs with fastai's Adam, `fit_one_cycle(5, 0.01)` or `fit_flat_cos(5, 0.01)`, batches of 64; 397 test images.
* **ViT**: torchvision's VisionTransformer (images of 8×8, patches of 2×2, 2 layers, 4 heads, 32 wide), whose classifier starts at zero, is trained from scratch on the same digits, the input projections of attention left dense by all, for 6 epochs, `fit_one_cycle(6, 0.003)`; 397 test images.

![](accuracy.png)"""]
    for title,r in parts(runs): text.append(f'## {title}\n\nDense: {_dense(r)}.\n\n{compared(r)}')
    text.append('## What else was tried\n\nIn place of the defaults of fastsparse, one at a time. With first and last layer dense, the percentage is that of the other layers, so more is left.')
    for title,r in parts(runs):
        if set(TRIED) & set(r.arm): text.append(f"### {title}\n\n{table(r, ['fastsparse', *TRIED], 'fastsparse')}")
    zeros = runs[runs.arm.isin(COLOURS)].groupby(['task','arm','percent']).agg(low=('zeros','min'), high=('zeros','max'), settings=('settings','last'))
    text.append("""## What was set, and the zeros that are there

Zeros are counted after the fit, among the weights of all convolutions and Linears. By default fasterai leaves Linears dense; on digits, where that would be half of what is kept, it was told to prune them too.

| | | asked for | zeros | settings |
|---|---|--:|--:|---|
""" + '\n'.join(f'| {task} | {arm} | {p} % | {z.low:.2f} to {z.high:.2f} % | `{z.settings}` |' for (task,arm,p),z in zeros.iterrows()))
    text.append(f"Made by `python benchmarks/accuracy FOLDER`, {min(runs.date)} to {max(runs.date)}, Python {last.python}, {', '.join(f'{k} {v}' for k,v in last.versions.items())}. `runs.jsonl` has a line for each run, with its settings, versions and seed.")
    (out/'README.md').write_text('\n\n'.join(text) + '\n')
    return '\n\n'.join(f'{title}: dense {_dense(r)}\n{compared(r)}' for title,r in parts(runs))
