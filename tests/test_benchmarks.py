"What the benchmarks say of given figures; nothing is measured here"
import importlib
import sys
from pathlib import Path

import pytest

folder = Path(__file__).resolve().parent.parent/'benchmarks/compact'
names = ('__main__', 'edges', 'measure', 'report', 'tools', 'zoo')


@pytest.fixture
def bench(monkeypatch):
    "Import a module of `benchmarks/compact`"
    monkeypatch.syspath_prepend(folder)
    saved = {n: sys.modules.pop(n, None) for n in names if n != '__main__'}
    def load(name):
        if name != '__main__': return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location('compact_main', folder/'__main__.py')
        spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
        return m
    yield load
    for n, m in saved.items():
        sys.modules.pop(n, None)
        if m is not None: sys.modules[n] = m


def row(name, arm='fastsparse', small=(50, 500), difference=1e-7, **more):
    figures = dict(dense=[10**8, 2*10**9], small=[s*10**6 for s in small], difference=difference, varies=.1, forward=.1, analysis=.5, example=[1, 3, 8, 8],
                   latency={'1': [[.2, .2, .2], [.1, .1, .1]], '16': [[.9, .9, .9], [.3, .3, .3]]})
    return figures | dict(name=name, arm=arm, env='here') | more


def failed(name, arm='Torch-Pruning', error='ValueError: no | such thing'): return dict(name=name, arm=arm, env='here', error=error, varies=.1)


def test_tables_of_given_figures(bench, tmp_path):
    runs = [row('coupled/a'), row('coupled/a', 'Torch-Pruning', small=(40, 400)), row('coupled/b'), failed('coupled/b'), row('coupled/c'), row('coupled/c', 'Torch-Pruning', difference=.05),
            row('edge/cut'), failed('edge/cut'), row('edge/kept', small=(100, 2000)), row('edge/kept', 'Torch-Pruning', difference=None),
            dict(name='growth/r', arm='fastsparse', env='here', forward=.1, flow=.2, analysis=1.),
            dict(name='large/d', arm='fastsparse', env='here', dense=[10**9], bytes=2*2**30, example=[1, 32], **{k: dict(seconds=2., memory=.25) for k in ('forward', 'flow', 'prune', 'compact')})]
    bench('report').write(tmp_path, runs)
    text = (tmp_path/'README.md').read_text(encoding='utf-8')
    lines = text.splitlines()
    assert (tmp_path/'compact.png').stat().st_size > 1000
    assert '| a | 100 | 2,000 | 50.00 (2.00× fewer) | 500 (4.00× fewer) | 2.00 (2.00–2.00) | 3.00 (3.00–3.00) | equal | 40.00 (2.50× fewer) | 400 (5.00× fewer) | 2.00 (2.00–2.00) | 3.00 (3.00–3.00) | equal |' in lines
    assert any(line.startswith('| b |') and line.endswith('| — | — | — | — | fails: ValueError: no / such thing |') for line in lines)
    assert any(line.startswith('| c |') and line.endswith('**wrong outputs (0.5)** |') for line in lines)
    assert 'Of 3 models, 1 have equal outputs with both tools. Among these, fastsparse leaves more weights or multiply-adds than Torch-Pruning in: 1 (a). Torch-Pruning leaves more than fastsparse in: none.' in text
    assert 'Outputs not equal, or no result: fastsparse none, Torch-Pruning 2 (b, c).' in text
    assert '| cut | cut to 50 %, equal | fails: ValueError: no / such thing |' in lines and '| kept | kept, equal | other shapes |' in lines
    assert '| r | 0.1 | 0.2 | 2.0 | 1 | 10.0 |' in lines and '| flow | 2 | 0.25 |' in lines


def test_numbers_that_are_none_are_not_equal(bench):
    report = bench('report')
    assert not report.equal(row('edge/x', difference=float('nan'))) and report.outcome(row('edge/x', difference=float('nan'))).startswith('**wrong')
    assert not report.equal(row('edge/x', difference=0., varies=0.)) and not report.equal(None) and report.equal(row('edge/x', difference=0.))


def test_a_crash_or_a_hang_costs_no_more_than_the_case_it_is_in(bench):
    calls = []
    def run(case, names, settings, limit):
        calls.append(names)
        got = names[:names.index('bad')] if 'bad' in names else names
        return [dict(name=n) for n in got], 'killed'
    got = list(bench('__main__').measure('edge', ['a', 'bad', 'c', 'bad', 'bad', 'd'], {}, 1, run))
    assert got == [dict(name='a'), dict(error='killed'), dict(name='c'), dict(error='killed'), dict(error='killed'), dict(name='d')]
    assert len(calls) == 4


def test_every_run_has_its_own_name_and_edge_cases_share_a_process(bench):
    main = bench('__main__')
    runs = main.plan(large=True)
    assert len({r[:2] for r in runs}) == len(runs) and len(list(main.bundles(runs))) == sum(r[2] != 'edge' for r in runs) + 2
    assert {r[0].split('/')[0] for r in runs} == set(bench('report').SECTIONS)


def test_no_number_hides_in_another_output(bench):
    import torch
    a, nan = torch.ones(2), torch.tensor([1., float('nan')])
    apart = bench('measure').apart
    assert apart([a, a], [a, a]) == 0 and apart([nan, a], [a, a]) != apart([nan, a], [a, a]) and apart([a, nan], [a, a]) != apart([a, nan], [a, a])
    assert apart([a], [a, a]) is None and apart([a[:1]], [a]) is None and apart([a*1.5], [a]) == .5


@pytest.mark.filterwarnings('ignore')
def test_every_edge_case_is_right(bench):
    edges, measure, report = bench('edges'), bench('measure'), bench('report')
    runs = {name: measure.edge(name, 'fastsparse') for name in edges.CASES}
    assert {n: report.outcome(r) for n, r in runs.items() if not report.equal(r) or not r['varies']} == {}
    assert report.outcome(runs['GroupNorm']) == 'kept, equal' and report.outcome(runs['a frozen model']) == 'cut to 50 %, equal'


# -- benchmarks/engines

@pytest.fixture
def engines(monkeypatch):
    "Import a module of `benchmarks/engines`"
    folder = Path(__file__).resolve().parent.parent/'benchmarks/engines'
    monkeypatch.syspath_prepend(folder)
    saved = {n: sys.modules.pop(n, None) for n in ('report', 'measure')}
    def load(name):
        spec = importlib.util.spec_from_file_location('engines_' + name, folder/f'{name}.py')
        spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
        return m
    yield load
    for n, m in saved.items():
        sys.modules.pop(n, None)
        if m is not None: sys.modules[n] = m


def engine_run(name, **seconds):
    rows = {n: dict(name=n, memory=10**6, macs=2*10**6, bytes=4*10**6, file=None) for n in seconds}
    return dict(name=name, env='here', seconds=seconds, rows=rows, done=1, layers=2, difference=1e-7)


def test_tables_of_engines(engines, tmp_path):
    runs = [engine_run('linear/64 × 64, 90 %, batch 1', dense=[.2]*5, masked=[.2]*5, accelerated=[.1]*5), engine_run('model/net, 95 %, batch 8', dense=[.2]*5, masked=[.2]*5),
            dict(name='model/net, 98 %, batch 8', env='here', error='ValueError: no | such'),
            engine_run('channels/net, 50 %, batch 1', dense=[.2]*5, masked=[.2]*5, compacted=[.05]*5), engine_run('gpu/64 × 64, 2:4, batch 1', dense=[.2]*5, masked=[.2]*5, accelerated=[.1]*5)]
    engines('report').write(tmp_path, runs)
    lines = (tmp_path/'README.md').read_text(encoding='utf-8').splitlines()
    assert '| 64 × 64 | 90 % | 1 | 200 ms (200–200) | no gain here (1.00–1.00, unrest 1.00) | 2.00× (2.00–2.00) |' in lines
    assert '| net | 95 % | 8 | 200 ms (200–200) | no gain here (1.00–1.00, unrest 1.00) | nothing turned over |' in lines
    assert '| net | 98 % | 8 | fails: ValueError: no / such | — | — |' in lines
    assert '| net | 50 % | 1 | 200 ms (200–200) | no gain here (1.00–1.00, unrest 1.00) | 4.00× (4.00–4.00) | nothing turned over |' in lines
    assert '| 64 × 64 | 2:4 | 1 | 1 of 2 | 2.00 → 2.00 | 4.00 → 4.00 | 1.00 → 1.00 | 1e-07 |' in lines
    assert (tmp_path/'engines.png').stat().st_size > 1000


def test_every_engine_run_has_a_section_and_a_gpu_has_its_own(engines):
    plan,sections = engines('__main__').plan,engines('report').TEXTS
    without,with_ = plan(),plan(gpu=True)
    assert {n.split('/')[0] for n in with_} == set(sections) and {n for n in with_ if n not in without} == {n for n in with_ if n.startswith('gpu/')}
    assert all(s.get('device') == ('cuda' if n.startswith('gpu/') else None) for n,s in with_.items())
