"The reading site: built strictly, complete without a network, every link and formula in order, and opened in a browser."
import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import websocket  # comes with JupyterLab
from bs4 import BeautifulSoup

from parts import modules, notebooks

ROOT = Path(__file__).parent.parent
LESSONS = [p.relative_to(ROOT/'nbs') for p in notebooks()]
FIGURES = list((ROOT/'nbs'/'images').glob('figure*.svg'))
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('docs')/'site'
    built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', folder], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site): BeautifulSoup(p.read_text(), 'html.parser') for p in site.rglob('*.html') if 'reports' not in p.parts}


def test_every_notebook_and_module_has_its_page(pages):
    assert {p.with_suffix('.html') for p in LESSONS} <= set(pages)
    assert {Path('api')/p.relative_to(ROOT/'lts_nb').with_suffix('.html') for p in modules()} <= set(pages)


def test_every_exported_function_is_on_its_api_page(pages):
    source = (ROOT/'lts_nb'/'data'/'refer.py').read_text()
    defined = set(re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', source, re.S)[1])) & set(re.findall(r'^(?:def|class) (\w+)', source, re.M))
    titles = {h.get_text().strip('¶ ') for h in pages[Path('api/data/refer.html')]('h3')}
    assert defined <= titles and len(defined) > 10
    assert 'a name in `SPLIT_FILES`' in pages[Path('api/data/refer.html')].get_text(), 'a docment'


def test_nothing_is_fetched_from_elsewhere(pages):
    fetched = {(str(p), e.get('src') or e.get('href')) for p, soup in pages.items() for e in soup(['script', 'link', 'img', 'iframe'])}
    assert [f for f in fetched if f[1] and re.match(r'(https?:)?//', f[1])] == []
    assert [str(p) for p, soup in pages.items() if re.search(r'from .https?://|import\(.https?://', str(soup('script')))] == []


def test_every_link_leads_somewhere(site, pages):
    broken = []
    for page, soup in pages.items():
        if page.name == '404.html': continue
        for a in soup('a', href=True):
            path, _, anchor = a['href'].partition('#')
            if re.match(r'\w+:', path): continue
            there = (site/page.parent/unquote(path)).resolve() if path else site/page
            if there.is_dir(): there /= 'index.html'
            if not there.exists(): broken.append((str(page), a['href']))
            elif anchor and there.suffix == '.html' and (known := pages.get(there.relative_to(site))) is not None and not known.find(id=unquote(anchor)):
                broken.append((str(page), a['href']))
    assert broken == []


def test_a_report_in_the_site_leads_to_the_pages_of_its_runs(site):
    reports = list((site/'repository'/'reports').glob('*/index.html'))
    assert reports
    for report in reports:
        links = {unquote(a['href'].partition('#')[0]) for a in BeautifulSoup(report.read_text(), 'html.parser')('a', href=True)}
        assert [link for link in links - {''} if not re.match(r'\w+:', link) and not (report.parent/link).exists()] == []


@pytest.mark.parametrize('lesson', [p for p in LESSONS if p.parent.name != 'runs'], ids=str)
def test_formulas_are_mathml(lesson, pages):
    text = '\n\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/lesson).read_text())['cells'] if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    wanted = len(re.findall(r'\$\$.+?\$\$', text, re.S))
    soup = pages[lesson.with_suffix('.html')]
    assert len([m for m in soup('math') if m['display'] == 'block']) == wanted
    left = [t for cell in soup(class_='jp-MarkdownOutput') for t in cell(string=re.compile(r'\$|\\(frac|sum|sigma|text)\b')) if not t.find_parent(('code', 'pre'))]
    assert left == [], 'mathematics that stayed as it was typed'


def code_lines(soup): return [line.get_text() for line in soup.select('.cell .line, .fold .line')]


def test_the_first_page_shows_no_code_that_makes_it(pages):
    assert code_lines(pages[Path('index.html')]) == []
    assert 'read_csv' not in pages[Path('index.html')].get_text()
    assert pages[Path('index.html')].select('.output img'), 'what that code shows stays'


@pytest.mark.parametrize('lesson', [p for p in LESSONS if p.name != 'index.ipynb'], ids=str)
def test_a_page_shows_neither_directives_nor_prompts(lesson, pages):
    soup = pages[lesson.with_suffix('.html')]
    lines = code_lines(soup)
    assert lines and not [line for line in lines if line.startswith('#|')]
    assert not re.search(r'\b(In|Out) ?\[[ \d]*\]:', soup.find('article').get_text())
    assert not soup(class_=re.compile('prompt'))


def test_code_is_whole_but_for_its_directives(pages):
    "What a reader copies is what the notebook holds."
    cells = json.loads((ROOT/'nbs'/'model'/'03_fusion.ipynb').read_text())['cells']
    exported = [''.join(c['source']) for c in cells if ''.join(c['source']).startswith('#| export')]
    shown = ''.join(code_lines(pages[Path('model/03_fusion.html')]))
    for source in exported: assert source.removeprefix('#| export').strip() in shown
    notes = pages[Path('model/03_fusion.html')](class_='note')
    assert {n.get_text() for n in notes} == {'exported to lts_nb.model.fusion'}


@pytest.fixture(scope='module')
def kit():
    "tools/site.py, whose name Python's own `site` has taken."
    spec = importlib.util.spec_from_file_location('kit_site', ROOT/'tools'/'site.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


CELL = """<div class="jp-Cell" id="cell-id={}"><div class="highlight-ipynb"><pre><span></span>{}
</pre></div>{}</div>"""
SHOWN = '<div class="jp-RenderedText jp-OutputArea-output"><pre>shown</pre></div>'


def plain(kit, cells):
    "A page of these cells, its code in its place."
    page = SimpleNamespace(file=SimpleNamespace(src_uri='model/03_fusion.ipynb'))
    soup, code = kit.plain_page(BeautifulSoup(cells, 'html.parser'), page)
    return BeautifulSoup(kit.with_code(str(soup), code), 'html.parser')


@pytest.mark.parametrize('source, output, folded, seen', [
    ('import torch\ntorch.manual_seed(0)', '', 'Imports', True),
    ('import torch\nx = torch.zeros(2)', '', None, True),
    ('import torch\ntorch.zeros(2)', SHOWN, None, True),
    ('#| export\nfrom torch import nn', '', 'Imports', True),
    ('#| hide\nassert True', '', None, False),
    ('#| hide\nprint(1)', SHOWN, 'Code of what follows', True),
    ('#| default_exp model.fusion', '', None, False)])
def test_cells_that_are_noise_are_folded_or_left_out(kit, source, output, folded, seen):
    page = plain(kit, CELL.format(1, source, output))
    summary = page.find('summary')
    assert (summary and summary.get_text()) == folded
    assert bool(page.get_text(strip=True)) == seen and '#|' not in page.get_text()
    assert ('shown' in page.get_text()) == bool(output)


def test_imports_that_stand_together_are_one_fold(kit):
    cells = CELL.format(1, '#| export\nimport torch', '') + CELL.format(2, 'import numpy', '')
    page = plain(kit, cells)
    assert len(page('details')) == 1 and page.find('code').get_text() == 'import torch\nimport numpy\n'


@pytest.mark.parametrize('page, wanted', [('index.ipynb', 'model/03_fusion.html'), ('start/01_front_door.ipynb', '../model/03_fusion.html'),
                                          ('model/04_locate.ipynb', '03_fusion.html')])
def test_the_boxes_of_a_drawing_lead_on_from_every_page(kit, monkeypatch, tmp_path, page, wanted):
    (tmp_path/'images').mkdir()
    box = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="9"><a href="../model/03_fusion.{}"><rect/></a></svg>'
    monkeypatch.setattr(kit, 'NBS', tmp_path)
    for ending in ('ipynb', 'html'):
        (tmp_path/'images'/'figure2.svg').write_text(box.format(ending))
        (tmp_path/page).parent.mkdir(exist_ok=True)
        there = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        image = {'src': os.path.relpath(tmp_path/'images'/'figure2.svg', (tmp_path/page).parent), 'alt': 'the map'}
        svg = kit.with_links(image, there)
        assert svg.find('a')['href'] == wanted and svg['aria-label'] == 'the map' and not svg.get('width')
    (tmp_path/'images'/'figure2.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    assert kit.with_links(image, there) is None, 'a drawing without links stays an image'


@pytest.mark.skipif(not FIGURES, reason='nbs/images/ has no Figure 2 yet')
def test_figure_2_is_the_way_in(pages):
    boxes = pages[Path('index.html')].select('figure.way-in svg a')
    lessons = {Path(a['href']).with_suffix('.ipynb') for a in boxes}
    assert lessons <= set(LESSONS) and len([p for p in lessons if p.parent.name == 'model']) >= 5


def test_readme_is_a_page_that_one_reads():
    assert len((ROOT/'README.md').read_text().split()) <= 1500


def test_pictures_have_a_text(pages):
    assert [str(p) for p, soup in pages.items() for img in soup('img') if img.get('alt') is None] == []
    bare = [str(p) for p, soup in pages.items() for img in soup.select('article img:not(.hero-logo)') if not img['alt']]
    assert bare == [], 'an empty text is for what only adorns' 


@pytest.fixture(scope='module')
def address(site):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def ask(tmp_path_factory):
    "Opens an address in a headless Chromium that reaches nothing but this machine, and evaluates a script until it gives something."
    if not BROWSER: pytest.skip('no Chromium is installed (apt-get install chromium)')
    profile = tmp_path_factory.mktemp('chromium')
    flags = ['--headless', '--disable-gpu', '--no-first-run', '--remote-debugging-port=0', '--remote-allow-origins=*', f'--user-data-dir={profile}',
             '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', *(['--no-sandbox'] if os.geteuid() == 0 else [])]
    process = subprocess.Popen([BROWSER, *flags], stderr=subprocess.DEVNULL)
    wait = time.time() + 30
    while not (profile/'DevToolsActivePort').exists() and time.time() < wait: time.sleep(.1)
    port = (profile/'DevToolsActivePort').read_text().split()[0]
    pages = json.loads(urllib.request.urlopen(f'http://127.0.0.1:{port}/json').read())
    socket = websocket.create_connection(next(p['webSocketDebuggerUrl'] for p in pages if p['type'] == 'page'), timeout=30)

    def call(method, **params):
        socket.send(json.dumps(dict(id=1, method=method, params=params)))
        while (answer := json.loads(socket.recv())).get('id') != 1: pass
        return answer.get('result', {})

    def opened(url, script, seconds=20, width=1300, scheme='light'):
        call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        call('Page.navigate', url=url)
        value, ends = None, time.time() + seconds
        while not value and time.time() < ends:
            time.sleep(.2)
            value = call('Runtime.evaluate', expression=script, returnByValue=True).get('result', {}).get('value')
        return value
    yield opened
    socket.close(); process.kill(); process.wait()


def test_the_search_finds(address, ask):
    found = ask(f'{address}/index.html?q=kernel', "[...document.querySelectorAll('a.md-search-result__link')].map(a => a.pathname)")
    assert '/model/04_locate.html' in (found or []), 'the lesson about the kernel'


def test_formulas_are_drawn(site, ask):
    sizes = ask((site/'model'/'04_locate.html').as_uri(), "document.readyState == 'complete' && [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width)")
    assert len(sizes) > 10 and min(sizes) > 3, 'from a folder, without a server'


# A line of 100 characters in the first code cell, measured: how many lines high it is, whether it scrolls, and what is beside it.
MEASURE = """(() => {
  if (document.readyState != 'complete') return null
  const code = document.querySelector('.cell .highlight code')
  const line = text => { code.innerHTML = `<span class="line" style="--indent:4ch">${text}\\n</span>`; return code.clientHeight }
  const one = line('x'), hundred = line('x = '.repeat(24) + 'wxyz'), long = line('x = '.repeat(60))
  const shown = s => { const e = document.querySelector(s); return !!e && e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().left >= 0 }
  return {one, hundred, long, scrolls: code.scrollWidth > code.clientWidth, page: document.documentElement.scrollWidth > innerWidth,
          navigation: shown('.md-sidebar--primary'), contents: shown('.md-sidebar--secondary')}
})()"""


def test_a_hundred_characters_fit_beside_the_navigation(address, ask):
    size = ask(f'{address}/model/03_fusion.html', MEASURE, width=1300)
    assert size['navigation'] and size['contents']
    assert size['hundred'] == size['one'] and not size['scrolls'] and not size['page']


def test_long_lines_wrap_on_a_phone(address, ask):
    size = ask(f'{address}/model/03_fusion.html', MEASURE, width=390)
    assert size['long'] > size['hundred'] > size['one'] and not size['scrolls'] and not size['page']


@pytest.mark.parametrize('width', [390, 1300])
@pytest.mark.parametrize('lesson', ['index', 'data/02_shapes', 'evidence/03_tables', 'api/model/fusion'])
def test_no_page_is_wider_than_its_window(lesson, width, address, ask):
    found = ask(f'{address}/{lesson}.html', "document.readyState == 'complete' && [document.documentElement.scrollWidth, innerWidth]", width=width)
    assert found[0] <= width and found[1] == width


# Contrast of every piece of text against the ground it stands on, as WCAG counts it; 4.5 is wanted, 3 for large letters.
CONTRAST = """(() => {
  if (document.readyState != 'complete' || document.body.dataset.mdColorScheme != 'SCHEME') return null
  const parse = c => c.match(/[\\d.]+/g).map(Number)
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b }
  const over = (c, below) => c.slice(0, 3).map((v, i) => v*(c[3] ?? 1) + below[i]*(1 - (c[3] ?? 1)))
  const ground = e => { if (!e) return [255, 255, 255]; const c = parse(getComputedStyle(e).backgroundColor)
    return (c[3] ?? 1) == 1 ? c.slice(0, 3) : over(c, ground(e.parentElement)) }
  const poor = new Set(), seen = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  let number = 0
  while (seen.nextNode()) {
    const e = seen.currentNode.parentElement, style = getComputedStyle(e)
    if (!seen.currentNode.data.trim() || e.closest('svg, .hero, .headerlink, .anchor-link, .md-search, .md-skip, .md-top, script, style')) continue
    if (!e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue
    const below = ground(e), above = over(parse(style.color), below), [a, b] = [light(above), light(below)].sort((x, y) => y - x)
    number++
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700)
    if ((a + .05)/(b + .05) < (large ? 3 : 4.5)) poor.add(`${e.tagName}.${e.className} ${style.color}: ${((a + .05)/(b + .05)).toFixed(2)}`)
  }
  return {number, poor: [...poor]}
})()"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('lesson', ['index', 'model/03_fusion', 'evidence/06_claims', 'api/model/fusion'])
def test_text_stands_out_from_its_ground(lesson, scheme, address, ask):
    script = CONTRAST.replace('SCHEME', {'light': 'default', 'dark': 'slate'}[scheme])
    found = ask(f'{address}/{lesson}.html', script, scheme=scheme)
    assert found['number'] > 30 and found['poor'] == []


def test_code_is_copied_as_it_stands(address, ask):
    "By hand and by the button: a wrapped line stays a line, and no empty ones come in between."
    script = """document.readyState == 'complete' && (() => {
      const code = document.querySelector('.cell .highlight code'), range = document.createRange()
      range.selectNodeContents(code); getSelection().removeAllRanges(); getSelection().addRange(range)
      const byHand = getSelection().toString()
      code.setAttribute('data-md-copying', ''); const byButton = code.innerText
      return [code.textContent, byHand, byButton] })()"""
    source, by_hand, by_button = ask(f'{address}/model/03_fusion.html', script)
    assert by_hand.rstrip() == source.rstrip() and by_button.rstrip() == source.rstrip() and source.count('\n') > 2


def test_the_readmes_picture_is_where_its_command_puts_it():
    from lts_nb.data.shapes import Recipe
    from lts_nb.manual.batch import KIT, default_root
    picture = re.search(r'--image (\S+)', (ROOT/'README.md').read_text()).group(1)
    assert Path(picture).parent == default_root('cpu').relative_to(KIT)/'images'/'refshapes'
    of_all = sum(getattr(Recipe(), split) for split in ('train', 'val', 'testA', 'testB'))
    assert int(Path(picture).stem.rpartition('_')[2]) <= of_all
