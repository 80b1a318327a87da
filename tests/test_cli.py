"The command line: what it counts and writes, what it refuses, and that nothing in a file is ever executed"
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from core_helpers import small_net
from fastsparse import Bounded, Count, MACs, Sparsifier, load_sparse, save_sparse
from fastsparse.cli import UsageError, diff_states, main, prune_state, read_state, state_report

root = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(small_net().state_dict(), 'net.pth')
    return tmp_path


def run(capsys, *args):
    "Exit code, and what went to stdout and to stderr"
    try: code = main(list(args))
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def same(a, b): return list(a) == list(b) and diff_states(a, b) == {}


# -- files of all kinds

def test_from_dense_to_small_and_back(here, capsys):
    code, out, err = run(capsys, 'prune', 'net.pth', '--sparsity', '90', '--out', 'sparse.pt')
    assert (code, err) == (0, '') and 'sparse.pt' in out and '90.' in out
    for command in (['pack', 'sparse.pt', 'small.safetensors'], ['unpack', 'small.safetensors', 'plain.safetensors'], ['unpack', 'small.safetensors', 'back.pth'],
                    ['diff', 'sparse.pt', 'back.pth'], ['diff', 'sparse.pt', 'plain.safetensors'], ['diff', 'small.safetensors', 'plain.safetensors']):
        assert run(capsys, *command)[0] == 0
    net = small_net()
    net.load_state_dict(torch.load('back.pth', weights_only=True))
    assert diff_states(load_file('plain.safetensors'), load_sparse('small.safetensors')) == {}
    assert sum(int((p == 0).sum()) for p in net.parameters() if p.dim() > 1) == round(.9*sum(p.numel() for p in net.parameters() if p.dim() > 1))
    assert os.path.getsize('small.safetensors') < os.path.getsize('sparse.pt')/2


def test_kinds_are_told_by_content(here):
    state = small_net().state_dict()
    save_sparse(state, 'a.pth')
    save_file(state, 'b.pth')
    torch.save(state, 'c.safetensors')
    torch.save(state, 'd.pth', _use_new_zipfile_serialization=False)
    assert [read_state(f)[1] for f in ('a.pth', 'b.pth', 'c.safetensors', 'd.pth')] == ['packed', 'safetensors', 'torch.save', 'torch.save']
    assert all(diff_states(read_state(f)[0], state) == {} for f in ('a.pth', 'b.pth', 'c.safetensors', 'd.pth'))


@pytest.mark.parametrize('with_opt', [True, False])
def test_what_fastai_saves(with_opt, here):
    from fastai_helpers import sparse_learner
    learn, cb = sparse_learner(80)
    learn.path = here
    assert same(read_state(learn.save('m', with_opt=with_opt))[0], learn.model.state_dict())
    report = state_report(read_state(here/'models'/'m.pth')[0])
    assert report.zeros == cb.report.zeros and report.weights == cb.report.weights


def test_checkpoints_and_whole_models(here):
    net = small_net()
    net.model = nn.Linear(2, 2) # a module of that name is not the whole
    for key in ('state_dict', 'model_state_dict', 'model'):
        torch.save({key: net.state_dict(), 'epoch': 3}, 'f')
        assert same(read_state('f')[0], net.state_dict())
    torch.save(net, 'f')
    with pytest.raises(ValueError, match='it asks for torch.nn.modules.container.Sequential.*--unsafe-pickle'): read_state('f')
    assert same(read_state('f', unsafe_pickle=True)[0], net.state_dict())


def test_what_holds_a_model(here):
    net = small_net()
    torch.save(SimpleNamespace(model=net, dls=3), 'f')
    with pytest.raises(ValueError, match='it asks for types.SimpleNamespace'): read_state('f')
    assert same(read_state('f', unsafe_pickle=True)[0], net.state_dict())


def test_reading_does_not_touch_the_file(here, capsys):
    save_file(small_net().state_dict(), 'a.safetensors')
    before = (here/'a.safetensors').read_bytes()
    assert run(capsys, 'prune', 'a.safetensors', '--sparsity', '50', '--out', 'b.safetensors')[0] == 0
    assert (here/'a.safetensors').read_bytes() == before
    assert run(capsys, 'prune', 'a.safetensors', '--sparsity', '50', '--out', 'a.safetensors', '--force')[0] == 0
    assert (here/'a.safetensors').read_bytes() == (here/'b.safetensors').read_bytes()


def test_what_is_read_does_not_follow_the_file(here):
    save_file({'w': torch.ones(9)}, 'f')
    state, _ = read_state('f')
    with open('f', 'rb+') as f: f.write(bytes(os.path.getsize('f')))
    assert state['w'].tolist() == [1]*9


def test_unpacked_for_others(here, capsys):
    w = torch.randn(4, 3, 2, 2)
    torch.save({'w': w, 'tied': w, 'last': w.to(memory_format=torch.channels_last)}, 'f.pth')
    assert run(capsys, 'unpack', 'f.pth', 'f.safetensors')[0] == 0 and diff_states(load_file('f.safetensors'), read_state('f.pth')[0]) == {}
    torch.save({'w': w, 'version': 3}, 'g.pth')
    assert run(capsys, 'pack', 'g.pth', 'g.safetensors')[0] == 0 and run(capsys, 'unpack', 'g.safetensors', 'h.pth')[0] == 0 and run(capsys, 'diff', 'g.pth', 'h.pth')[0] == 0
    code, _, err = run(capsys, 'unpack', 'g.safetensors', 'h.safetensors')
    assert code == 1 and "'version' is no tensor" in err and not Path('h.safetensors').exists()


# -- counting and comparing

def test_report_counts_as_the_model_does(here, capsys):
    net = small_net()
    Sparsifier(net).prune_model(70)
    torch.save(net.state_dict(), 'f.pth')
    code, out, _ = run(capsys, 'report', 'f.pth', '--json')
    said, counted = json.loads(out), Sparsifier(net).report()
    assert code == 0 and (said['kind'], said['bytes']) == ('torch.save', os.path.getsize('f.pth'))
    assert (said['zeros'], said['weights'], said['percent']) == (counted.zeros, counted.weights, counted.sparsity)
    assert {t['name']: t['zeros'] for t in said['tensors']} == {l.name + '.weight': l.zeros for l in counted.layers}
    assert said['all_weights'] == sum(t.numel() for t in net.state_dict().values() if t.is_floating_point())


def test_report_of_odd_tensors():
    w = torch.tensor([[0., -0., 1.], [float('nan'), 2., 0.]])
    r = state_report({'w': w, 'tied': w, 'part': w[:1].clone(), 'fp8': w.to(torch.float8_e4m3fn), 'ints': torch.zeros(3, 3, dtype=torch.long), 'b': torch.zeros(4), 'text': 'x'})
    assert [(l.name, l.zeros, l.weights) for l in r.layers] == [('w', 3, 6), ('part', 2, 3)]
    assert r.all_weights == 6 + 3 + 6 + 4
    assert state_report({}).weights == 0 and str(state_report({}))


def test_differences(here, capsys):
    a = {'same': torch.tensor([1., float('nan')]), 'minus': torch.tensor([0., 1.]), 'w': torch.tensor([[1., 2., 0.]]), 'shape': torch.ones(2), 'dtype': torch.ones(2),
         'gone': torch.ones(1), 'inf': torch.tensor([float('inf'), 1.]), 'int': torch.tensor([3, 4])}
    b = {'same': torch.tensor([1., float('nan')]), 'minus': torch.tensor([-0., 1.]), 'w': torch.tensor([[1., 2.5, 0.]]), 'shape': torch.ones(2, 1), 'dtype': torch.ones(2).half(),
         'new': torch.ones(1), 'inf': torch.tensor([0., 1.]), 'int': torch.tensor([3, 6])}
    torch.save(a, 'a.pt')
    torch.save(b, 'b.pt')
    code, out, _ = run(capsys, 'diff', 'a.pt', 'b.pt')
    assert code == 1 and out.splitlines() == ['minus: 1 of 2 differ by at most 0; zeros 1 in A, 1 in B', 'w: 1 of 3 differ by at most 0.5; zeros 1 in A, 1 in B',
        'shape: float32 2 in A, float32 2×1 in B', 'dtype: float32 2 in A, float16 2 in B', 'gone: only in A', 'inf: 1 of 2 differ by at most 0; zeros 0 in A, 1 in B',
        'int: 1 of 2 differ by at most 2; zeros 0 in A, 0 in B', 'new: only in B']
    code, out, _ = run(capsys, 'diff', 'a.pt', 'b.pt', '--json')
    said = json.loads(out)
    assert code == 1 and not said['same'] and said['differences']['w'] == {'differ': 1, 'of': 3, 'largest': .5, 'zeros': [1, 1]}
    assert run(capsys, 'diff', 'a.pt', 'a.pt') == (0, 'no difference\n', '')


# -- pruning

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), percent=st.one_of(st.just(0), st.floats(1, 100)), method=st.sampled_from(['global', 'local']), ties=st.booleans())
def test_exactly_as_many_and_the_smallest(seed, percent, method, ties):
    torch.manual_seed(seed)
    state = {'a': torch.randn(7, 9), 'b': torch.randn(3, 2, 4)*2, 'bias': torch.randn(5), 'n': torch.tensor(3)}
    if ties: state = {n: t.round() if t.is_floating_point() else t for n, t in state.items()}
    before = {n: t.clone() for n, t in state.items()}
    pruned = prune_state(state, percent, method)
    assert same(state, before) and pruned['bias'] is state['bias'] and pruned['n'] is state['n']
    sizes = {n: pruned[n].numel() for n in 'ab'}
    asked = {n: percent*k/100 for n, k in sizes.items()}
    gone = {n: (pruned[n] == 0) & (before[n] != 0) for n in 'ab'}
    zeros = {n: int((pruned[n] == 0).sum()) for n in 'ab'}
    already = {n: int((before[n] == 0).sum()) for n in 'ab'}
    full = percent == 100
    if method == 'local':
        for n in 'ab': assert zeros[n] == max(already[n], sizes[n] if full else min(round(asked[n]), sizes[n]-1))
    else:
        most = sum(sizes.values()) - (0 if full else 2)
        assert abs(sum(zeros.values()) - max(sum(already.values()), min(sum(asked.values()), most))) <= .5
    for n in 'ab':
        kept = (pruned[n] != 0)
        assert torch.equal(pruned[n][kept], before[n][kept])
        if gone[n].any() and kept.any(): assert before[n][gone[n]].abs().max() <= before[n][kept].abs().min()


def test_like_a_sparsifier(here, capsys):
    net = small_net()
    net.load_state_dict(torch.load('net.pth', weights_only=True))
    assert run(capsys, 'prune', 'net.pth', '--sparsity', '75', '--method', 'local', '--exclude', '8,0.*', '--out', 'x.pth')[0] == 0
    Sparsifier(net, method='local', layers='3').prune_model(75)
    assert same(torch.load('x.pth', weights_only=True), net.state_dict())
    assert run(capsys, 'prune', 'net.pth', '--sparsity', '75', '--out', 'y.pth')[0] == 0
    net.load_state_dict(torch.load('net.pth', weights_only=True))
    Sparsifier(net).prune_model(75)
    assert same(torch.load('y.pth', weights_only=True), net.state_dict())


def test_tied_weights_stay_tied():
    w = torch.randn(9, 9)
    pruned = prune_state({'embed': w, 'head': w}, 50)
    assert pruned['embed'] is pruned['head'] and int((pruned['head'] == 0).sum()) in (40, 41)


def test_half_precision_and_layouts():
    state = {'a': torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), 'b': torch.randn(16, 16).bfloat16(), 'fp8': torch.randn(9, 9).to(torch.float8_e4m3fn)}
    pruned = prune_state(state, 50)
    assert state_report(pruned).zeros == (288 + 256)//2 and pruned['a'].stride() == state['a'].stride() and pruned['fp8'] is state['fp8']


@given(st.integers(0, 5112), st.sampled_from(['global', 'local', 'owl']))
@settings(deadline=None, derandomize=True, max_examples=20, database=None)
def test_so_many_weights(n, method):
    state = small_net().state_dict()
    n = min(n, state_report(state).weights)
    assert state_report(prune_state(state, Count(n), method)).zeros == n


# -- refused

@pytest.mark.parametrize('sparsity,method', [({'0': 50}, 'local'), (MACs(50), 'global'), (50, 'per_output'), (50, Bounded('global', 60)), (Count(10**9), 'global')])
def test_what_needs_the_layers_is_refused(sparsity, method):
    with pytest.raises(UsageError, match='by layers|than there is'): prune_state(small_net().state_dict(), sparsity, method)


WRONG = {
    'nothing': ([], 'a command is missing'), 'no command': (['prun', 'net.pth'], "did you mean 'prune'"), 'no argument': (['report'], 'required: file'),
    'no such option': (['report', 'net.pth', '--jsno'], 'unrecognized'), 'no percentage': (['prune', 'net.pth', '--out', 'x.pth'], '--sparsity is missing'),
    'a fraction': (['prune', 'net.pth', '--sparsity', '.9', '--out', 'x.pth'], 'did you mean 90'), 'too much': (['prune', 'net.pth', '--sparsity', '900', '--out', 'x.pth'], 'out of range'),
    'nan': (['prune', 'net.pth', '--sparsity', 'nan', '--out', 'x.pth'], 'out of range'), 'no out': (['prune', 'net.pth', '--sparsity', '90'], '--out is missing'),
    'ending': (['prune', 'net.pth', '--sparsity', '90', '--out', 'x.onnx'], 'end it with .pth or .pt or .safetensors'), 'packed ending': (['pack', 'net.pth', 'x.pth'], 'end it with .safetensors'),
    'method': (['prune', 'net.pth', '--sparsity', '90', '--out', 'x.pth', '--method', 'globl'], "did you mean 'global'"),
    'exclude': (['prune', 'net.pth', '--sparsity', '90', '--out', 'x.pth', '--exclude', '0,head'], '--exclude head: no such tensor; there are 0.weight, 3.weight'),
    'exclude all': (['prune', 'net.pth', '--sparsity', '90', '--out', 'x.pth', '--exclude', '*'], 'nothing to prune'), 'values': (['pack', 'net.pth', 'x.safetensors', '--values', 'half'], 'choose float16'),
    'folder': (['unpack', 'net.pth', 'no/x.pth'], 'no is not a folder'), 'exists': (['unpack', 'net.pth', 'there.pth'], 'there.pth exists; --force'),
    'a link': (['unpack', 'net.pth', 'link.pth'], 'exists'), 'a folder': (['unpack', 'net.pth', 'dir.pth', '--force'], 'exists'),
}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_requests(what, here, capsys):
    (here/'there.pth').write_bytes(b'precious')
    (here/'dir.pth').mkdir()
    (here/'link.pth').symlink_to('nowhere.pth')
    before = sorted(os.listdir())
    code, out, err = run(capsys, *WRONG[what][0])
    assert (code, out) == (2, '') and WRONG[what][1] in err
    assert sorted(os.listdir()) == before and (here/'there.pth').read_bytes() == b'precious'


def test_forced(here, capsys):
    (here/'precious.pth').write_bytes(b'precious')
    (here/'link.pth').symlink_to('precious.pth')
    assert run(capsys, 'unpack', 'net.pth', 'link.pth', '--force')[0] == 0
    assert (here/'precious.pth').read_bytes() == b'precious' and not (here/'link.pth').is_symlink()
    assert run(capsys, 'unpack', 'net.pth', 'precious.pth', '--force')[0] == 0 and run(capsys, 'diff', 'precious.pth', 'net.pth')[0] == 0


class Evil:
    "A pickle that writes a file when it is loaded"
    def __reduce__(self): return os.mkdir, ('executed',)


def zip_bomb(path):
    "A zip whose table of contents says that 2 GiB are in it"
    torch.save({'w': torch.zeros(9)}, path)
    with zipfile.ZipFile(path, 'a') as z: z.infolist()[0].file_size,z._didModify = 2**31,True


BAD = {
    'pickle': (lambda: torch.save({'w': torch.ones(2), 'x': Evil()}, 'f'), 'mkdir); if it is'), 'old pickle': (lambda: torch.save(Evil(), 'f', _use_new_zipfile_serialization=False), 'it asks for'),
    'bare pickle': (lambda: Path('f').write_bytes(__import__('pickle').dumps(Evil())), 'no plain file of weights'), 'empty': (lambda: Path('f').touch(), 'no plain file of weights'),
    'text': (lambda: Path('f').write_text('hello'), 'no plain file of weights'), 'missing': (lambda: None, 'No such file'), 'folder': (lambda: Path('f').mkdir(), 'is a folder'),
    'half a zip': (lambda: (torch.save(small_net().state_dict(), 'g'), Path('f').write_bytes(Path('g').read_bytes()[:-300]), Path('g').unlink()), 'no plain file of weights'),
    'zip bomb': (lambda: zip_bomb('f'), 'holds tensors of 2,147,48'),
    'terabytes of one': (lambda: torch.save({'w': torch.ones(1, 1).expand(10**6, 10**6)}, 'f'), 'tensors of 4,000,000,000,000 bytes, more than'),
    'no tensors': (lambda: torch.save({'a': 1}, 'f'), 'holds a dict without tensors'), 'a tensor': (lambda: torch.save(torch.ones(2), 'f'), 'holds a Tensor without tensors'),
    'numbers for names': (lambda: torch.save({1: torch.ones(2)}, 'f'), 'holds 1 as a name'), 'sparse': (lambda: torch.save({'w': torch.eye(3).to_sparse()}, 'f'), 'to_dense'),
    'safetensors': (lambda: Path('f').write_bytes(b'\xff'*7 + b'\x7f{'), 'is no safetensors file'), 'nan': (lambda: torch.save({'w': torch.full((2, 2), float('nan'))}, 'f'), "NaN in 'w'"),
}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', BAD)
def test_bad_files(what, here, capsys):
    BAD[what][0]()
    before = sorted(os.listdir())
    for command in (['report', 'f'], ['diff', 'net.pth', 'f'], ['pack', 'f', 'x.safetensors'], ['unpack', 'f', 'x.pth'], ['prune', 'f', '--sparsity', '50', '--out', 'x.pth']):
        if what == 'nan' and command[0] != 'prune': continue # NaN can be counted, compared and packed
        code, out, err = run(capsys, *command)
        assert (code, out) == (1, '') and err.startswith('fastsparse: ') and BAD[what][1] in err
        assert sorted(os.listdir()) == before


def test_the_evil_one_works_and_needs_the_flag(here, capsys):
    torch.save({'w': torch.ones(2, 2), 'x': Evil()}, 'f')
    assert run(capsys, 'report', 'f')[0] == 1 and not Path('executed').exists()
    code, _, err = run(capsys, 'report', 'f', '--unsafe-pickle')
    assert code == 0 and Path('executed').exists() and 'runs whatever code is in f' in err


def test_names_in_files_are_never_paths(here, capsys):
    inner = here/'a'/'b'
    inner.mkdir(parents=True)
    torch.save({n: torch.randn(9, 9) for n in ('../../evil', str(here/'evil'), '..')}, inner/'f.pth')
    before = {p for p in here.rglob('*')}
    for command in (['pack', 'a/b/f.pth', 'a/b/p.safetensors'], ['unpack', 'a/b/p.safetensors', 'a/b/u.safetensors'], ['prune', 'a/b/f.pth', '--sparsity', '50', '--out', 'a/b/s.pth']):
        assert run(capsys, *command)[0] == 0
    assert {p for p in here.rglob('*')} - before == {inner/n for n in ('p.safetensors', 'u.safetensors', 's.pth')}


# -- as a command

@pytest.mark.parametrize('command', ['report', 'diff', 'pack', 'unpack', 'prune', 'demo'])
def test_help_teaches(command, capsys):
    code, out, _ = run(capsys, '--help')
    assert code == 0 and f'\n  {command} ' in out and 'Exit codes' in out
    code, out, _ = run(capsys, command, '--help')
    assert code == 0 and f'example: fastsparse {command}' in out and '--xtra' not in out


def test_in_a_shell(here):
    torch.save(small_net().state_dict(), 'other.pth')
    out = subprocess.run([sys.executable, '-c', 'import sys; from fastsparse.cli import main; sys.exit(main())', 'diff', 'net.pth', 'other.pth', '--json'],
                         capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)})
    assert out.returncode == 1 and out.stderr == '' and not json.loads(out.stdout)['same']
    assert 'fastsparse = "fastsparse.cli:main"' in (root/'pyproject.toml').read_text()


def test_a_demo(here, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr('fastsparse.demo.demo', lambda *args: asked.append(args))
    assert run(capsys, 'demo', '--sparsity', '95', '--epochs', '1')[0] == 0 and asked[0][:3] == (None, 95., 1)


def test_a_usage_error_is_a_value_error(): assert issubclass(UsageError, ValueError)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_noise_is_refused(data, tmp_path):
    (tmp_path/'f').write_bytes(data)
    with pytest.raises(ValueError): read_state(tmp_path/'f')
