"The package as a whole: its two configuration files, what importing it costs, and what must not be written in it"
import configparser, json, re, subprocess, sys
from pathlib import Path
import pytest
import fastsparse
try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10

root = Path(__file__).resolve().parent.parent
modules = sorted(f'fastsparse.{p.stem}' for p in (root/'fastsparse').glob('*.py') if not p.stem.startswith('__'))
may_be_heavy = {'fastsparse.callback', 'fastsparse.learner', 'fastsparse.all'} | {f'fastsparse.{m}' for m in ('measure', 'sensitivity', 'distill', 'tickets')}
heavy = {'fastai', 'matplotlib', 'pandas', 'torchvision', 'sklearn', 'safetensors', 'onnx', 'onnxscript', 'onnxruntime', 'torchao'}


def test_settings_ini_says_what_pyproject_says():
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    parser = configparser.ConfigParser()
    parser.read(root/'settings.ini')
    settings = parser['DEFAULT']
    assert settings['lib_name'] == project['name']
    assert settings['version'] == fastsparse.__version__
    assert settings['description'] == project['description']
    assert f">={settings['min_python']}" == project['requires-python']
    assert settings['keywords'].split() == [k.replace(' ', '-') for k in project['keywords']]
    assert settings['author'] == project['authors'][0]['name']
    assert settings['requirements'].split() == project['dependencies']
    assert {k.removesuffix('_requirements'): v.split() for k,v in settings.items() if k.endswith('_requirements')} == extras
    assert dict(s.split('=') for s in settings['console_scripts'].split()) == project['scripts']


def loaded(names):
    "The heavy libraries that are there after importing `names` in a fresh interpreter, with the module that brought them"
    code = f"import sys\nfor m in {['fastsparse', *names]!r}:\n    __import__(m)\n    for h in {sorted(heavy)!r}:\n        if h in sys.modules: print(h, m)"
    out = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = {}
    for line in out.stdout.splitlines(): found.setdefault(*line.split())
    return found


def test_modules_load_nothing_heavier_than_torch():
    light = [m for m in modules if m not in may_be_heavy]
    assert len(light) >= 10
    assert loaded(light) == {}


def test_that_test_can_fail():
    assert loaded(['fastsparse.mask', 'fastsparse.callback'])['fastai'] == 'fastsparse.callback'


def test_every_notebook_is_in_the_sidebar_of_the_docs():
    listed = re.findall(r'- (\S+\.ipynb)', (root/'nbs/sidebar.yml').read_text())
    assert sorted(listed) == sorted(p.name for p in (root/'nbs').glob('*.ipynb'))


def measured(text):
    "The rows of the tables, and the quotations, under the headings 'What it costs ...' and 'What to expect'"
    parts = re.split(r'^## ', text, flags=re.M)
    return [row.removeprefix('> ') for p in parts if p.startswith(('What it costs','What to expect')) for row in p.splitlines() if row.startswith(('|','> '))]

def test_what_the_readme_says_of_speed_and_accuracy_was_measured_by_the_benchmarks():
    results = {row for f in (root/'benchmarks/results').glob('*/README.md') for row in f.read_text(encoding='utf-8').splitlines()}
    rows = measured((root/'README.md').read_text(encoding='utf-8'))
    assert len(rows) >= 10 and [row for row in rows if row not in results] == []


def test_a_row_that_was_not_measured_is_seen():
    assert measured('# x\n\n## What it costs in speed\n\n| fastsparse | 1 s |\n\n> It takes 1 s.\n\n## More\n\n| a | b |\n') == ['| fastsparse | 1 s |','It takes 1 s.']


# Folders of the machine that it was written on; the lookbehind leaves the paths of web addresses alone
machine_path = re.compile(r'(?<![\w.~-])/(work|root|tmp|home|Users)/')

def texts(path):
    "What a reader sees of a file; of a notebook without its pictures, whose base64 may look like anything"
    if path.suffix != '.ipynb': return path.read_text(encoding='utf-8')
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    shown = [c['source'] for c in cells] + [{k: v for k,v in o.items() if k != 'data'} for o in outputs]
    shown += [{k: v for k,v in o.get('data', {}).items() if not k.startswith('image/')} for o in outputs]
    return json.dumps(shown)

@pytest.mark.parametrize('pattern', ['nbs/*.ipynb', 'fastsparse/*.py', 'tests/*.py', '*.md', '*.toml', '*.txt', 'Makefile'])
def test_no_path_of_a_machine(pattern):
    files = list(root.glob(pattern))
    assert files
    assert {p.name: m[0] for p in files if (m := machine_path.search(texts(p)))} == {}


def test_machine_paths_are_seen():
    assert machine_path.search('saved in ' + '/'.join(['', 'tmp', 'x.png']))
    assert not machine_path.search('https://example.org/' + 'home/page')


def test_a_star_import_takes_nothing_from_fastai():
    "Names of `fastsparse.all` that `fastai.vision.all` has too would change meaning in a notebook"
    import fastai.vision.all as theirs
    import fastsparse.all as ours
    names = [n for n in vars(ours) if not n.startswith('_')]
    assert 'SparsifyCallback' in names and 'agp' in names and 'large_final' in names
    assert not [n for n in names if getattr(theirs, n, None) is not None and getattr(theirs, n) is not getattr(ours, n)]
