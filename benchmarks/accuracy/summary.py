"Table and plot of all runs that are there"
import json
from pathlib import Path
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pandas as pd

COLOURS = {'fastsparse': '#d1495b', 'fasterai tuned': '#edae49', 'fasterai': '#00798c'}

def read_runs(out:Path) -> pd.DataFrame:
    "One row for each run"
    rows = [json.loads(f.read_text()) for f in sorted((out/'runs').glob('*.json'))]
    if not rows: raise SystemExit(f'no runs in {out}')
    return pd.DataFrame(rows)

def spread(values) -> str:
    "Mean and, with more than one seed, standard deviation"
    return f'{values.mean():.1f}' + (f' ± {values.std():.1f}' if len(values) > 1 else '')

def table(runs:pd.DataFrame) -> str:
    "Accuracy for each sparsity and arm, in Markdown"
    arms = [a for a in COLOURS if a in set(runs.arm)]
    cells = runs[runs.arm != 'dense'].groupby(['percent','arm']).accuracy.apply(spread).unstack('arm').reindex(columns=arms).fillna('')
    lines = ['| zeros asked for | ' + ' | '.join(arms) + ' |', '|---|' + '---|'*len(arms)]
    lines += [f'| {p} % | ' + ' | '.join(f'**{c}**' if a == 'fastsparse' else c for a,c in row.items()) + ' |' for p,row in cells.iterrows()]
    return '\n'.join(lines)

def plot(runs:pd.DataFrame, file:Path):
    "Accuracy against sparsity, with the range over the seeds"
    fig,ax = plt.subplots(figsize=(6, 3.8), layout='constrained')
    dense = runs[runs.arm == 'dense'].accuracy
    if len(dense): ax.axhline(dense.mean(), color='grey', ls='--', lw=1); ax.text(80, dense.mean()-.6, f'dense, {dense.mean():.1f} %', color='grey', va='top')
    for arm,colour in COLOURS.items():
        by = runs[runs.arm == arm].groupby('percent').accuracy
        if not len(by): continue
        m = by.mean()
        ax.errorbar(m.index, m, [m-by.min(), by.max()-m], color=colour, label=arm, marker='o', ms=4, capsize=3)
    ax.set(xlabel='weights that are zero (%)', ylabel='right on 10,000 test images (%)', xticks=sorted(set(runs.percent) - {0}))
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False, loc='lower left')
    fig.savefig(file, dpi=150)
    plt.close(fig)

def write_summary(out:Path) -> str:
    "Write `README.md` and `accuracy.png` beside the runs"
    runs = read_runs(out)
    plot(runs, out/'accuracy.png')
    dense,last = runs[runs.arm == 'dense'].accuracy,runs.iloc[-1]
    task,versions = last.task,', '.join(f'{k} {v}' for k,v in last.versions.items())
    zeros = runs[runs.arm != 'dense'].groupby(['percent','arm']).zeros.agg(['min','max'])
    reached = '\n'.join(f'| {p} % | {arm} | {z["min"]:.2f} to {z["max"]:.2f} % | {settings} |' for (p,arm),z in zeros.iterrows()
                        for settings in [runs[(runs.percent == p) & (runs.arm == arm)].settings.iloc[0]])
    text = f"""# Accuracy against sparsity

A ResNet-20 pretrained on CIFAR-10 is fine-tuned on {task['n_train']:,} of the training images (stored as JPEGs) for {task['epochs']} epochs, `fit_one_cycle({task['epochs']}, {task['lr']})`, with SGD (momentum 0.9, weight decay 1e-4), random flips and
crops, batches of 128; percent right of the 10,000 test images, mean ± standard deviation over {runs.seed.nunique()} seeds. Dense: {spread(dense) if len(dense) else 'not run'}.

{table(runs)}

![](accuracy.png)

Made by `python benchmarks/accuracy FOLDER`, {min(runs.date)} to {max(runs.date)}, Python {last.python}, {versions}; one file for each run in `runs/`.

## What was set, and the zeros that are there

Zeros are counted after the fit, among the weights of all convolutions and the Linear. fasterai prunes convolutions only, by default.

| asked for | | zeros | settings |
|---|---|---|---|
{reached}
"""
    (out/'README.md').write_text(text)
    return table(runs)
