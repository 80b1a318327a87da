"Write README.md, and the pictures it shows, from nbs/index.ipynb; with --check only say whether they are up to date"
import base64, posixpath, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent
images = root/'nbs/images'
hidden = re.compile(r'^#\|\s*(hide|default_exp)\b', re.M)

def link(m): # relative to nbs/ in the notebook, to the top folder in the README
    path = posixpath.normpath(f'nbs/{m[1]}')
    return f']({path})' if (root/path).exists() else m[0]

def tidy(out, pictures):
    "`out` as a README can show it, or None; its pictures are added to `pictures`"
    if out.output_type == 'error': raise SystemExit(f'nbs/index.ipynb has an error among its outputs: {out.evalue}')
    if out.output_type == 'stream': return out if out.name == 'stdout' else None
    if 'text/html' in out.data: # no styles, which GitHub would print, and no blank lines, which would end the HTML
        html = re.sub(r'<(style|progress).*?</\1>|<!--.*?-->', '', out.data['text/html'], flags=re.S)
        out.data['text/html'] = '\n'.join(line.strip() for line in html.splitlines() if line.strip())
        if not out.data['text/html']: return None
    elif 'image/png' in out.data:
        name = f'index_{len(pictures)+1}.png'
        pictures[images/name] = base64.b64decode(out.data['image/png'])
        out.metadata.filenames = {'image/png': f'nbs/images/{name}'}
    return out

def render():
    "What README.md and its pictures should be, as {path: bytes}"
    nb,pictures = nbformat.read(root/'nbs/index.ipynb', as_version=4),{}
    nb.metadata.language_info = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not hidden.search(c.source)]
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = re.sub(r'\]\(([^)\s:#]+)\)', link, c.source)
        if c.cell_type == 'code': c.outputs = [o for out in c.outputs if (o := tidy(out, pictures))]
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    exporter = MarkdownExporter(config=Config(ExtractOutputPreprocessor={'enabled': False})) # `tidy` did that, with names that stay the same
    text = exporter.from_notebook_node(nb)[0]
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'^[ \t]+$', '', text, flags=re.M)).strip() + '\n'
    return {root/'README.md': text.encode(), **pictures}

if __name__ == '__main__':
    wanted = render()
    stale = set(images.glob('index_*')) - set(wanted)
    wrong = sorted(str(p.relative_to(root)) for p in stale | {p for p,b in wanted.items() if not p.exists() or p.read_bytes() != b})
    if '--check' in sys.argv:
        if wrong: sys.exit(f"{', '.join(wrong)}: not what nbs/index.ipynb says; run make prepare")
    else:
        images.mkdir(exist_ok=True)
        for p in stale: p.unlink()
        for p,b in wanted.items(): p.write_bytes(b)
