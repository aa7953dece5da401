"What nbs/parts.toml says: the parts, their notebooks in the order of reading, and which part may import which."
import json
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHERS = 'tutorials', 'solutions', 'runs'  # folders of nbs/ that are no part: they export nothing


def read_parts(
    root=ROOT, # folder of a checkout
)->dict:       # ground, imports, part: as in the file
    "The file itself."
    return tomllib.loads((Path(root)/'nbs'/'parts.toml').read_text(encoding='utf-8'))


def rooms(
    root=ROOT, # folder of a checkout
)->dict:       # part's name -> paths of its notebooks, in the order of reading
    "The notebooks of every part."
    return {p['name']: sorted((Path(root)/'nbs'/p['name']).glob('[0-9]*.ipynb')) for p in read_parts(root)['part']}


def notebooks(
    root=ROOT, # folder of a checkout
)->list:       # paths
    "Every notebook of the kit: the index, the parts in their order, then tutorials, solutions and runs."
    nbs = Path(root)/'nbs'
    of_parts = [path for paths in rooms(root).values() for path in paths]
    others = [path for folder in OTHERS for path in sorted((nbs/folder).glob('*.ipynb'))]
    return [nbs/'index.ipynb', *of_parts, *others]


def lessons(
    root=ROOT, # folder of a checkout
)->list:       # paths
    "The notebooks whose cells a test runs: all but the index, which is the README, and runs, which papermill starts."
    return [path for path in notebooks(root) if path.parent.name not in ('runs', 'nbs')]


def modules(
    root=ROOT, # folder of a checkout
)->list:       # paths of lts_nb's modules, sorted
    "Every module of the package that a notebook exports."
    return sorted(p for p in (Path(root)/'lts_nb').rglob('*.py') if not p.name.startswith('_'))


def title_of(
    path,   # of a notebook
)->tuple:   # (title, subtitle)
    "What stands first in a notebook: `# Title` and `> subtitle`."
    first = ''.join(json.loads(Path(path).read_text(encoding='utf-8'))['cells'][0]['source'])
    title, _, rest = first.partition('\n')
    subtitle = next((l for l in rest.splitlines() if l.startswith('>')), '')
    return title.removeprefix('#').strip(), subtitle.removeprefix('>').strip()
