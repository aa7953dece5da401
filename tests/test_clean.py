"What is generated agrees with the notebooks; the notebooks are clean and short; no photograph has slipped in."
import ast, hashlib, json, re, shutil, statistics, subprocess, sys
from pathlib import Path

import pytest

from parts import modules, notebooks, rooms
from readme import readme

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = notebooks()


# cells that are one long list or table of data, where a cut would only hide half of it
TALL = {'02_experiments': 64, '07_method': 95, '08_lts': 38, '08_scoring': 40}  # a class that is read in one piece


def fixed(line):
    "A line that cannot be cut: the docment of a parameter or of a result."
    return bool(re.match(r'\s*(\)->.*|\):.*|\*{0,2}\w+(:[^#]*)?(=[^#]*)?,?)\s+# ', line))


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
def test_cells_are_narrow_and_short(path):
    cells = json.loads(path.read_text())['cells']
    wide, tall, n = [], [], 0
    for i, c in enumerate(cells):
        if c['cell_type'] != 'code': continue
        lines = [line for line in ''.join(c['source']).splitlines() if line.strip() and not line.startswith('#|')]
        if len(lines) > TALL.get(path.stem, 35): tall.append((i, len(lines)))
        n += len(lines)
        wide += [(i, line) for line in lines if len(line) > 100 and not fixed(line)]
    assert tall == [], 'cells (counted from 0) of more than 35 lines'
    assert len(wide) <= max(1, n//50), f'lines of more than 100 characters: {wide}'
    assert all(o['output_type'] != 'error' for c in cells for o in c.get('outputs', [])), 'a cell shows an error'


def test_of_all_lines_one_in_a_hundred_is_wide():
    lines = []
    for path in NOTEBOOKS:
        for c in json.loads(path.read_text())['cells']:
            if c['cell_type'] == 'code': lines += ''.join(c['source']).splitlines()
    assert sum(len(line) > 100 for line in lines) <= .01*len(lines)


def test_lessons_have_more_text_than_code_and_checks():
    "Over the parts that teach: two pictures a notebook, a check in a third of the cells, no line of code without words."
    lessons = [p for part in ('start', 'data', 'model', 'training') for p in rooms()[part]]
    code, words, checked, pictures = [], 0, 0, 0
    for path in lessons:
        for c in json.loads(path.read_text())['cells']:
            source = ''.join(c['source'])
            pictures += sum(any(k.startswith('image/') for k in o.get('data', {})) for o in c.get('outputs', []))
            if c['cell_type'] == 'markdown':
                words += len(source.split())
                pictures += source.count('![')
                continue
            lines = [l for l in source.splitlines() if l.strip() and not l.startswith('#|')]
            if not lines: continue
            code.append(len(lines))
            checked += bool(re.search(r'\bassert\b|raise AssertionError|assert_close|assert_allclose', source))
    assert statistics.median(code) <= 10
    assert 3*checked >= len(code)
    assert pictures >= 2*len(lessons)
    assert words >= 3*sum(code)


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


@pytest.mark.parametrize('path', modules(), ids=lambda p: p.stem)
def test_every_exported_name_is_documented(path):
    assert list(undocumented(path)) == []


def test_no_file_of_the_excerpt_is_in_the_repository(micro):
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True)
    if listed.returncode: pytest.skip('not a git checkout')
    digest = lambda path: hashlib.sha256(path.read_bytes()).digest()
    foreign = {digest(p) for p in micro.rglob('*') if p.is_file()}
    files = [ROOT/f for f in listed.stdout.decode().split('\0') if f]
    assert [name(f) for f in files if f.is_file() and digest(f) in foreign] == []
