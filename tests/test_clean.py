"What is generated agrees with the notebooks; the notebooks are clean and short; no photograph has slipped in."
import ast, hashlib, json, re, shutil, statistics, subprocess, sys
from pathlib import Path

import pytest

from parts import notebooks
from readme import readme

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = notebooks()


def name(path): return str(path.relative_to(ROOT))


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the notebooks, exported afresh and cleaned."
    root = tmp_path_factory.mktemp('clean')
    for path in [*NOTEBOOKS, ROOT/'settings.ini', ROOT/'pyproject.toml', ROOT/'lts_nb'/'__init__.py']:
        target = root/path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for command in (['nbdev_export'], ['nbdev_clean', '--fname', 'nbs']):
        subprocess.run([BIN/command[0], *command[1:]], cwd=root, check=True)
    return root


def test_the_modules_are_what_the_notebooks_export(copy):
    ours, fresh = ({str(p.relative_to(root)): p.read_text() for p in (root/'lts_nb').rglob('*.py')} for root in (ROOT, copy))
    assert sorted(ours) == sorted(fresh), 'a module without its notebook, or a notebook without its module: make export'
    assert [m for m in ours if ours[m] != fresh[m]] == [], 'these modules differ from their notebooks: make export'


def test_the_notebooks_are_clean(copy):
    assert [name(p) for p in NOTEBOOKS if p.read_bytes() != (copy/p.relative_to(ROOT)).read_bytes()] == [], 'not clean: make export'


def test_the_readme_is_what_the_index_makes():
    assert (ROOT/'README.md').read_text() == readme(ROOT), 'README.md differs from nbs/index.ipynb: make readme'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_a_notebook_is_short_and_so_are_its_cells(path):
    cells = json.loads(path.read_text())['cells']
    code = {i: [line for line in ''.join(c['source']).splitlines() if line.strip() and not line.startswith('#|')]
            for i, c in enumerate(cells) if c['cell_type'] == 'code'}
    assert len(cells) <= 60
    assert {i: len(lines) for i, lines in code.items() if len(lines) > 25} == {}, 'cells (counted from 0) of more than 25 lines'
    assert all(o['output_type'] != 'error' for c in cells for o in c.get('outputs', [])), 'a cell shows an error'


def test_the_notebooks_of_the_modules_are_lessons():
    "Short cells, at least as many texts as half the code cells, a check in a third of them."
    cells = [c for p in NOTEBOOKS if re.match(r'\d\d_', p.name) for c in json.loads(p.read_text())['cells']]
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    length = sorted(n for c in code if (n := sum(bool(l.strip()) and not l.startswith('#|') for l in c.splitlines())))
    checked = sum(bool(re.search(r'\bassert\b|raise AssertionError|\btest_(eq|close|fail)\(|assert_close|assert_allclose', c)) for c in code)
    assert statistics.median(length) <= 6
    assert length[int(.9*len(length))] <= 16
    assert 2*sum(c['cell_type'] == 'markdown' for c in cells) >= len(code)
    assert 3*checked >= len(length)


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent.name != 'runs'], ids=name)
def test_a_lesson_shows_what_teaches_and_no_noise(path):
    notebook = json.loads(path.read_text())
    cells = notebook['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert not [o['text'] for o in outputs if o.get('name') == 'stderr'], 'warnings and progress bars: run the notebook with TQDM_DISABLE=1, delete what is left'
    assert not any('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for o in outputs) and 'widgets' not in notebook['metadata'], 'a widget is dead once it is saved: make export'
    text = ''.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    if path.name != 'index.ipynb': assert '## Exercises' in text


def undocumented(path):
    "Exported names of a module without a docstring, and their parameters without a docment on their line."
    source = path.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    exported = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
    for n in tree.body:
        if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name not in exported: continue
        if not ast.get_docstring(n): yield n.name
        maker = n if isinstance(n, ast.FunctionDef) else next((m for m in n.body if getattr(m, 'name', '') == '__init__'), None)
        for a in [*maker.args.args, *maker.args.kwonlyargs] if maker else []:
            if a.arg != 'self' and '#' not in lines[a.lineno - 1] and 'help=' not in ast.unparse(a) and path.stem != 'cli': yield f'{n.name}({a.arg})'


@pytest.mark.parametrize('path', sorted(p for p in (ROOT/'lts_nb').rglob('*.py') if not p.name.startswith('_')), ids=lambda p: p.stem)
def test_every_exported_name_is_documented(path):
    assert list(undocumented(path)) == []


def test_no_file_of_the_excerpt_is_in_the_repository(micro):
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True)
    if listed.returncode: pytest.skip('not a git checkout')
    digest = lambda path: hashlib.sha256(path.read_bytes()).digest()
    foreign = {digest(p) for p in micro.rglob('*') if p.is_file()}
    files = [ROOT/f for f in listed.stdout.decode().split('\0') if f]
    assert [name(f) for f in files if f.is_file() and digest(f) in foreign] == []
