"""A data set whose sentences, words and categories are markup, all the way through: training notebook, tables, page, report notebook, predictions."""
import json
import pickle
import subprocess
import sys

import pytest

from conftest import ROOT
from lts_nb.manual import batch
from lts_nb.evidence.experiments import run_config, runs_for
from lts_nb.training.opening import ensure_backbone, ensure_data

EVIL = ['<img src=x onerror=alert(1)>', '</script><script>alert(2)</script>', '\\input{/etc/passwd} $x_1$', '| a | b |\n|---|---|', '=cmd()', '\x1b]0;mine\x07 [link](javascript:alert(3))']
RAW = '<img src=x', '<script>alert', '</script><script', '\x1b]0;mine', '\\input{/etc'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "One smoke run on such a set, by its notebook, and its report, by its own."
    base = tmp_path_factory.mktemp('hostile')
    root, out = base/'data', base/'out'
    config = run_config('lts', 'refshapes', 'smoke')
    ensure_data(config, root)
    for path in root.glob('refshapes*/refs*.p'):
        refs = pickle.loads(path.read_bytes())
        for k, r in enumerate(refs):
            for s in r['sentences']: s['sent'] = s['raw'] = f'{EVIL[k % len(EVIL)]} {s["sent"]}'
        path.write_bytes(pickle.dumps(refs, 2))
    for path in root.glob('refshapes*/instances.json'):
        instances = json.loads(path.read_text())
        for k, c in enumerate(instances['categories']): c['name'] = f'{EVIL[k % len(EVIL)]}{k}'
        path.write_text(json.dumps(instances))
    ensure_backbone(config, root, out)
    subprocess.run([sys.executable, '-m', 'papermill', ROOT/'nbs'/'runs'/'train.ipynb', out/'train.ipynb', '--cwd', ROOT/'nbs'/'runs', '-k', 'python3', '--no-progress-bar',
                    '-p', 'out', out, '-p', 'root', root, '-p', 'dataset', 'refshapes'], check=True, capture_output=True)
    (out/'plan.json').write_text(json.dumps(plan := batch.make_plan(runs_for('smoke', ['4']), ['4'], 1, out, root)))
    batch.make_report(out, plan)
    return out


def shown(notebook):
    "What Jupyter would render as markup: HTML, Markdown, LaTeX, SVG, scripts."
    outputs = [o for c in json.loads(notebook.read_text())['cells'] for o in c.get('outputs', [])]
    return '\n'.join(''.join(v) for o in outputs for kind, v in o.get('data', {}).items() if kind not in ('text/plain', 'image/png'))


def test_the_page_shows_it_as_text(made):
    page = (made/'index.html').read_text()
    assert [r for r in RAW if r in page and r[0] != '\\'] == [], 'a page is no LaTeX'
    assert '&lt;img src=x onerror' in page or '&lt;script&gt;' in page, 'such sentences are shown at all'
    assert 'href="javascript' not in page and '<script' not in page


def test_tables_hold_no_markup_of_the_data_set(made):
    for path in [*made.glob('*.md'), *made.glob('*.tex'), *made.glob('*.csv')]:
        text = path.read_text()
        assert [r for r in RAW if r in text] == [], path.name
        assert not any(cell.startswith('=') for line in text.splitlines() for cell in line.split(',')), path.name


def test_notebooks_show_it_as_text(made):
    for notebook in (made/'train.ipynb', made/'report.ipynb'): assert [r for r in RAW if r in shown(notebook)] == [], notebook.name


def test_a_data_frame_of_sentences_is_escaped():
    "pandas does it; a version that did not would let sentences through in every lesson that shows one."
    import pandas as pd
    assert '&lt;img src=x' in pd.DataFrame({'sentence': EVIL})._repr_html_()
