"The house's order: an import never leads from an earlier part to a later one."
import ast
import os
import re

import pytest

from lts_nb.evidence.experiments import code_digest, imported_modules
from parts import ROOT, modules, notebooks, read_parts, rooms

PARTS = read_parts()
MODULES = [str(p.relative_to(ROOT/'lts_nb').with_suffix('')).replace('/', '.') for p in modules()]


def backwards(module, imported):
    "Those of a module's imports that lead to a later part."
    order = PARTS['imports']
    part = module.partition('.')[0]
    if part in PARTS['ground']: return sorted(set(imported) - set(PARTS['ground']))
    return [m for m in sorted(imported) if m not in PARTS['ground'] and order.index(m.partition('.')[0]) > order.index(part)]


@pytest.mark.parametrize('module', MODULES)
def test_no_import_leads_to_a_later_part(module):
    assert backwards(module, imported_modules(module)) == []


def test_an_import_that_leads_to_a_later_part_is_found():
    assert backwards('data.refer', {'errors', 'data.text', 'training.fit'}) == ['training.fit']
    assert backwards('errors', {'data.refer'}) == ['data.refer']


def test_within_a_part_imports_lead_to_earlier_rooms():
    later = []
    for part, paths in rooms().items():
        names = [f'{part}.{p.stem[3:]}' for p in paths]
        for i, name in enumerate(names):
            if name not in MODULES: continue
            later += [(name, m) for m in imported_modules(name) if m in names[i + 1:]]
    assert later == []


def test_no_notebook_stands_outside_the_parts():
    found = set((ROOT/'nbs').rglob('*.ipynb'))
    found = {p for p in found if '.ipynb_checkpoints' not in p.parts}
    assert found == set(notebooks()), 'a notebook that nbs/parts.toml does not know'
    assert {p['name'] for p in PARTS['part']} == set(PARTS['imports'])


def test_notebook_and_module_have_one_name():
    made = {re.search(r'File to edit: (?:\.\./)+nbs/(\S+)\.ipynb', (ROOT/'lts_nb'/(m.replace('.', '/') + '.py')).read_text())[1]: m
            for m in MODULES}
    for notebook, module in made.items():
        part, name = notebook.split('/')
        assert module in (f'{part}.{name[3:]}', name[3:])


# ---- which code made a run

def test_a_digest_is_the_same_on_every_python():
    "Two machines must agree about the code; this one was computed on 3.11, 3.12 and 3.13."
    source = '''"""A module."""
import os  # a comment
def f(x: int = 1, *, y='a') -> str:
    "A docstring."
    return f"{x:>{len(y)}.2f} {y!r}" 'tail' if x else None
async def g(): return [z async for z in h() if z]
class C(D, k=1): pass
match f:
    case {'a': [1, *rest]} | C(b=2): raise E from None
'''
    assert code_digest(ast.parse(source)) == '0a8d88883404'
    assert code_digest(ast.parse(source.replace('  # a comment', '').replace('A docstring', 'Another'))) == '0a8d88883404'
    assert code_digest(ast.parse(source.replace("y='a'", "y='b'"))) != '0a8d88883404'


def test_a_module_is_read_again_where_it_has_changed(tmp_path):
    from lts_nb.evidence.experiments import _parsed
    file = tmp_path/'m.py'
    file.write_text('x = 1')
    one = code_digest(_parsed(file))
    file.write_text('x = 2')
    os.utime(file, ns=(1, 1))
    assert code_digest(_parsed(file)) != one
