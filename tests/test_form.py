"""The report's form: one document, a page and a PDF; the user's notes; runs as pages; links, alternative texts, sizes, a phone."""
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import nbformat
import pandas as pd
import pikepdf
import pytest
from bs4 import BeautifulSoup

from conftest import ROOT
from lts_nb.errors import KitError
from lts_nb.evidence import form, kept, pages, report
from lts_nb.evidence.experiments import run_config
from lts_nb.evidence.form import Document, Section, frame_block
from test_docs import ask  # a headless Chromium, where there is one
from test_tables import EVIL, fake_run

HOSTILE = [EVIL, '#read("/etc/passwd")', '#panic("read as markup")', '*x* _y_ $z$ `c` @ref <label>', '</style><script>alert(1)</script>', ']#(', '\\', '= Heading', '{{ 7*7 }}{% x %}', '\x1b]0;mine\x07']
RUNS = [('lts', 'refcoco', 0), ('lts', 'refcoco', 1), ('lts-n2', 'refcoco', 0), ('cgan', 'refcoco', 0), ('lts', 'refcoco+', 0)]
SECRET = '/home/somebody/secret/out'


def executed(folder):
    "An executed notebook as a run leaves it, with hostile output."
    v4 = nbformat.v4
    outputs = [v4.new_output('display_data', data={'text/html': '<script>alert(1)</script><table><tr><td onclick="x()">61.2</td></tr></table>'}),
               v4.new_output('display_data', data={'image/svg+xml': '<svg><script>alert(2)</script></svg>', 'text/plain': 'drawn'}),
               v4.new_output('display_data', data={'application/javascript': 'alert(3)'})]
    cells = [v4.new_markdown_cell('# One run\n\n<iframe src="https://example.org"></iframe> [x](javascript:alert(4))'), v4.new_code_cell(f'out = "{SECRET}"', outputs=outputs)]
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata['papermill'] = {'parameters': {'out': SECRET}}
    nbformat.write(notebook, folder/'train.ipynb')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A report of a few runs, two of which kept their notebook."
    out = tmp_path_factory.mktemp('form')
    for e, d, s in RUNS: fake_run(out, run_config(e, d, 'smoke', s))
    for run in ('lts-n2-refshapes-smoke-s0', 'lts-refshapes-smoke-s0', 'lts-refshapes+-smoke-s0'): executed(out/'runs'/run)
    report.write_report(out, 'smoke', ['1', '5'])
    return out


@pytest.fixture(scope='module')
def soup(made): return BeautifulSoup((made/'index.html').read_text(), 'html.parser')


def small(parts, **more): return Document(title='T', about='A', warnings=[], sections=[Section('s', 'S', parts)], **more)


# --- one source, same bytes ---

def test_the_same_runs_give_the_same_page_and_pdf(made, tmp_path):
    shutil.copytree(made/'runs', tmp_path/'elsewhere'/'runs')
    report.write_report(tmp_path/'elsewhere', 'smoke', ['1', '5'])
    names = ['index.html', 'report.pdf', 'notes.md', 'table1.tex', *(f'pages/{p.name}' for p in (made/'pages').iterdir()), *(f'figures/{p.name}' for p in (made/'figures').iterdir())]
    assert [n for n in names if (made/n).read_bytes() != (tmp_path/'elsewhere'/n).read_bytes()] == []


def test_the_pdf_has_words_structure_and_no_date(made):
    kept, plain = (made/'report.pdf').read_bytes(), io.BytesIO()
    with pikepdf.open(made/'report.pdf') as paper: paper.save(plain, object_stream_mode=pikepdf.ObjectStreamMode.disable)
    plain = plain.getvalue()
    assert kept.startswith(b'%PDF') and b'/StructTreeRoot' in plain and b'/Lang' in plain and b'/Alt' in plain and plain.count(b'/TD') > 100
    assert b'CreationDate' not in plain or b'D:1970' in plain
    assert b'/TD' not in kept and len(kept) < .7*len(plain), 'a tag for each cell, packed'


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text_is_set_as_text(text, tmp_path):
    frame = pd.DataFrame({text: [text], 'number': [1.]})
    parts = [dict(kind='heading', text=text), dict(kind='text', text=text), dict(kind='warning', text=text), dict(kind='list', lines=[dict(text=text, code=text)]),
             dict(kind='table', block=frame_block(frame, title=text, running=[text])), dict(kind='codes', text=text, lines=[dict(text=text)]), dict(kind='note', title=text, whose=text, text=text)]
    document = small(parts)._replace(title=text, about=text, warnings=[text], foot=text)
    assert form.paper_of(document, tmp_path).startswith(b'%PDF'), 'typst would stop at a command that it cannot do'
    page = form.page_of(document)
    assert '<script' not in page and '<img' not in page and 'onerror=alert(1)>' not in page and '49' not in page
    assert len(BeautifulSoup(page, 'html.parser').find_all(['script', 'img', 'iframe', 'object'])) == 0


def test_notes_of_any_markdown_are_set(tmp_path):
    text = '# A\n\n#### B\n\n> q\n> > r\n\n1. one\n2. two\n   - *in* **it**\n\n```py\n#panic()\n```\n\n    code\n\n---\n\na<br>b  \nc `d` [e](https://x.y/?a=1&b=2) [f]() [](https://x.y) ![g](https://x.y/z.png) <https://x.y> [h](javascript:alert(1))\n\n&copy; \\*'
    document = small([dict(kind='note', title='N', whose='W', text=text)])
    assert form.paper_of(document, tmp_path).startswith(b'%PDF')
    page = form.page_of(document)
    assert '<h4>A</h4>' in page and '<img' not in page and 'a&lt;br&gt;b' in page and 'href="javascript' not in page


def test_no_template_is_a_sentence(made, monkeypatch, tmp_path):
    whole = form.TEMPLATES
    for name in ('report.html.j2', 'report.typ', 'table.html.j2', 'notes.md'):
        lacking = tmp_path/name.replace('.', '-')
        shutil.copytree(whole, lacking)
        (lacking/name).unlink()
        monkeypatch.setattr(form, 'TEMPLATES', lacking)
        with pytest.raises(KitError, match=re.escape(name)):
            form.read_notes(tmp_path/f'new-{name}')
            document = small([dict(kind='table', block=frame_block(pd.DataFrame({'a': [1]})))])
            form.page_of(document), form.paper_of(document, tmp_path)


def test_a_wheel_holds_the_templates(tmp_path):
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/'lts_nb', tmp_path/'lts_nb', ignore=shutil.ignore_patterns('__pycache__'))
    build = 'from setuptools import build_meta; print(build_meta.build_wheel("dist"))'
    subprocess.run([sys.executable, '-c', build], cwd=tmp_path, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next((tmp_path/'dist').glob('*.whl'))).namelist())
    assert {f'lts_nb/templates/{p.name}' for p in form.TEMPLATES.iterdir() if p.is_file()} <= names


def test_typst_is_pinned_and_no_browser_is_asked_for():
    wanted = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['dependencies']
    pinned = (ROOT/'constraints.txt').read_text()
    for name in ('typst', 'pikepdf', 'markdown-it-py', 'bleach'): assert any(w.startswith(name) for w in wanted) and f'\n{name}==' in pinned, name
    for path in (ROOT/'lts_nb').rglob('*.py'): assert 'chromium' not in path.read_text().lower(), path


# --- the user's notes ---

def test_notes_are_asked_for_once_and_never_overwritten(made, tmp_path):
    assert (made/'notes.md').read_text() == form.template('notes.md')
    own = tmp_path/'notes.md'
    own.write_text('## What was easy\n\nThe *numbers* <script>alert(1)</script> <b>bold</b>\n\n## My own\n\nWords of mine.\n')
    report.write_report(tmp_path, 'smoke', ['5'])
    assert own.read_text().startswith('## What was easy\n\nThe *numbers*')
    page = (tmp_path/'index.html').read_text()
    assert '<em>numbers</em>' in page and '&lt;script&gt;alert(1)' in page and '&lt;b&gt;bold' in page and '<script' not in page and '<b>bold' not in page
    assert 'Words of mine.' in page and page.count('Not written yet') == 3, 'difficult, contact, discussion'


@pytest.mark.parametrize('spoil, said', [(lambda p: p.write_bytes('## Größe'.encode('latin-1')), 'not UTF-8'), (lambda p: p.mkdir(), 'cannot be read'),
                                         (lambda p: p.write_bytes(b'\xff\xfe#\0#\0'), 'not UTF-8'), (lambda p: p.write_text('x'*300_000), 'longer than')])
def test_bad_notes_are_a_sentence(spoil, said, tmp_path):
    spoil(tmp_path/'notes.md')
    with pytest.raises(KitError, match=said) as e: report.write_report(tmp_path, 'smoke', ['5'])
    assert 'notes.md' in str(e.value)


def test_a_heading_in_code_cuts_nothing():
    found = form.note_sections('## A\n\n```\n## no\n```\n\n## B ##\nb')
    assert list(found) == ['A', 'B'] and '## no' in found['A']


def test_new_notes_make_the_report_anew(tmp_path):
    before = form.form_digest(tmp_path)
    form.read_notes(tmp_path)
    assert form.form_digest(tmp_path) == before, 'the questions alone change nothing'
    with open(tmp_path/'notes.md', 'a') as f: f.write('more')
    assert form.form_digest(tmp_path) != before


# --- from a number to its run ---

def test_every_link_leads_somewhere(made, soup):
    ids = {t['id'] for t in soup.find_all(id=True)}
    hrefs = [a['href'] for a in soup.find_all('a', href=True)]
    for href in hrefs:
        if href.startswith('#'): assert href[1:] in ids, href
        else: assert (made/href.replace('%2B', '+')).is_file(), href
    assert len(ids) == len(soup.find_all(id=True)), 'no id twice'


def row_of(soup, section, label):
    "The cells of a row, by its section and its first cell."
    return next(tr for tr in soup.find(id=section).find_all('tr') if tr.find('th') and tr.find('th').text == label)


def test_a_number_leads_to_its_run_or_to_the_line_that_lists_them(made, soup):
    one = {a['href'] for a in row_of(soup, 'table5', 'LTS n=2').find_all('a')}
    assert one == {'pages/lts-n2-refshapes-smoke-s0.html'}, 'one seed: its page'
    assert {a['href'] for a in row_of(soup, 'table5', 'LTS n=1').find_all('a')} == {'#of-lts-refshapes'}, 'two seeds: the line'
    line = soup.find(id='of-lts-refshapes')
    assert {a.text: a['href'] for a in line.find_all('a')} == {'seed 0': 'pages/lts-refshapes-smoke-s0.html', 'seed 1': '#run-lts-refshapes-smoke-s1'}
    assert 'papermill' in soup.find(id='run-lts-refshapes-smoke-s1').text, 'no page: the command'
    cgan = {a['href'] for a in row_of(soup, 'table1', 'CGAN').find_all('a')}
    assert cgan == {'#run-cgan-refshapes-smoke-s0'}


def test_every_number_of_ours_is_a_link(soup):
    for section in ('table1', 'table5'):
        for table in soup.find(id=section).find_all('table'):
            heads = [c.text for c in table.find_all('tr')[1].find_all(['th', 'td'])]
            for tr in table.tbody.find_all('tr'):
                for head, cell in zip(heads, tr.find_all(['th', 'td'])):
                    if head in ('ours', 'Δ', 'mIoU') and cell.text != '–': assert cell.find('a'), (head, cell)
                    if head == 'paper': assert not cell.find('a')


def test_a_run_is_a_page_that_does_nothing(made):
    text = (made/'pages'/'lts-refshapes-smoke-s0.html').read_text()
    soup = BeautifulSoup(text, 'html.parser')
    assert not soup.find_all(['script', 'iframe', 'svg', 'object', 'link']) and 'onclick' not in str(soup.find_all('td')) and not soup.find('a', href=re.compile('^javascript'))
    assert '61.2' in text and SECRET not in text and '<out>' in soup.text, 'the table stays, the path goes'
    assert len(soup.find_all('h1')) == 1 and soup.find('main') and 'papermill' in soup.header.text
    assert soup.header.a['href'] == '../index.html#run-lts-refshapes-smoke-s0'
    assert 'http' not in re.sub(r'http-equiv', '', text.split('<main')[0]) and '¶' not in text


def test_a_damaged_notebook_costs_its_page_only(tmp_path):
    fake_run(tmp_path, run_config('lts', 'refcoco', 'smoke'))
    (tmp_path/'runs'/'lts-refshapes-smoke-s0'/'train.ipynb').write_text('{"cells": 3}')
    report.write_report(tmp_path, 'smoke', ['5'])
    page = (tmp_path/'index.html').read_text()
    assert 'No page for lts-refshapes-smoke-s0' in page and 'href="#run-lts-refshapes-smoke-s0"' in page


def test_pages_stay_when_their_notebooks_are_gone(made, tmp_path):
    "A report that is recomputed from kept evidence."
    out = tmp_path/'kept'
    shutil.copytree(made, out)
    for p in out.glob('runs/*/train.ipynb'): p.unlink()
    report.write_report(out, 'smoke', ['1', '5'])
    assert (out/'index.html').read_bytes() == (made/'index.html').read_bytes()


def test_a_result_that_calls_itself_a_path_writes_no_page_elsewhere(tmp_path):
    fake_run(tmp_path, run_config('lts', 'refcoco', 'smoke'))
    folder = tmp_path/'runs'/'lts-refshapes-smoke-s0'
    executed(folder)
    result = dict(run='../../evil', folder=folder)
    pages.write_pages(tmp_path, [result], {})
    assert [p.name for p in tmp_path.rglob('*.html')] == ['lts-refshapes-smoke-s0.html']


# --- its form ---

def test_it_has_the_form_of_a_reproducibility_report(soup):
    titles = [h.text for h in soup.find_all('h2')]
    order = ['At a glance', 'Summary', 'What of the paper holds here?', 'Model and data', 'Hyper-parameters', 'Setup and compute', 'Table 1: against the state of the art',
             'What the record says', 'Discussion', 'Checklist', 'How each number was made']
    assert [t for t in titles if t in order] == order
    summary = [h.text for h in soup.find(id='summary').find_all('h3')]
    assert summary == ['Scope', 'Methodology', 'Results', 'What was easy', 'What was difficult', 'Contact with the authors']
    compute = soup.find(id='compute').text
    for word in ('hours', 'operations', 'memory', 'energy', 'unknown'): assert word in compute


def test_pictures_come_first_and_say_what_they_show(soup):
    first = soup.find('main').find('section', id='glance')
    assert first.find('img') and soup.find('main').find_all('section')[1] == first, 'after what must be known first'
    for img in soup.find_all('img'):
        assert len(img['alt']) > 40 and re.search(r'\d', img['alt']), img['alt']
        assert img['alt'] != img.find_parent('figure').figcaption.text and img['width'] and img['height']


def test_a_screen_reader_finds_its_way(soup):
    assert soup.html['lang'] == 'en' and len(soup.find_all('h1')) == 1 and len(soup.find_all('main')) == 1 and soup.find('nav')['aria-label'] and soup.find('header') and soup.find('footer')
    levels = [int(h.name[1]) for h in soup.find_all(re.compile('^h[1-6]$'))]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), 'no level is skipped'
    for table in soup.find_all('table'):
        assert all(th.get('scope') in ('col', 'colgroup', 'row') for th in table.find_all('th')) and table.find('th')
        assert table.find_parent(attrs={'role': 'region'})['aria-label'], 'what scrolls has a name, and the keyboard reaches it'
    assert not soup.find_all(['script', 'link', 'iframe'])


def test_every_file_is_light(made):
    assert [p for p in made.rglob('*') if p.is_file() and 'runs' not in p.parts and p.stat().st_size > 2_000_000] == []


def test_the_committed_reports_are_light():
    "A repository is cloned by people who read one page of it."
    sizes = {p: p.stat().st_size for p in (ROOT/'reports').rglob('*') if p.is_file()}
    assert sum(sizes.values()) < 25e6
    assert [p for p, size in sizes.items() if size > (10e6 if p.name == 'evidence.parquet' else 2e6)] == []


def test_the_committed_evidence_can_be_read():
    "Code that writes another form of evidence comes with evidence of that form."
    files = sorted((ROOT/'reports').rglob('evidence.parquet'))
    assert files and all(kept.read_evidence(f).note['runs'] for f in files)


def test_latex_is_booktabs_with_spans_and_bold(made):
    tex = (made/'table1.tex').read_text()
    for word in (r'\toprule', r'\midrule', r'\bottomrule', r'\multicolumn{6}{c}{val}', r'\textbf{', r'$\Delta$'): assert word in tex, word
    assert tex.count('{tabular}') == 6 and '−' not in tex and '–' not in tex and '✓' not in tex


# --- as a browser shows it ---

OVERFLOW = """(() => { if (document.readyState != 'complete') return null
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, .pan, pre, .output_area, .rendered_html, .skip') && e.getBoundingClientRect().right > innerWidth + 1)
  return {page: document.documentElement.scrollWidth, inner: innerWidth, wide: wide.map(e => e.tagName + ' ' + e.textContent.slice(0, 40))} })()"""
CONTRAST = """(() => { if (document.readyState != 'complete') return null
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number)
  const lum = ([r, g, b]) => [r, g, b].map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
  const ground = e => { while (e) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; e = e.parentElement } return [255, 255, 255] }
  const bad = []
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue
    const a = lum(rgb(getComputedStyle(e).color)), b = lum(ground(e))
    const ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05)
    if (ratio < 4.5) bad.push(e.tagName + ' ' + e.className + ' ' + ratio.toFixed(2) + ' ' + e.textContent.slice(0, 30))
  }
  return {bad: bad.slice(0, 5), ground: rgb(getComputedStyle(document.body).backgroundColor)[0]} })()"""
PLACES = ('index.html', 'pages/lts-refshapes-smoke-s0.html')


@pytest.mark.parametrize('place', PLACES)
def test_a_phone_scrolls_in_one_direction(made, ask, place):
    size = ask((made/place).as_uri(), OVERFLOW, width=390)
    assert size['page'] <= size['inner'] and size['wide'] == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('place', PLACES)
def test_it_can_be_read_in_light_and_dark(made, ask, place, scheme):
    seen = ask((made/place).as_uri(), CONTRAST, scheme=scheme)
    assert seen['bad'] == [] and (seen['ground'] < 60) == (scheme == 'dark')
