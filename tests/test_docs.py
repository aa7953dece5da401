"The reading site: built strictly, complete without a network, every link and formula in order, and opened in a browser."
import functools
import http.server
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
from urllib.parse import unquote

import pytest
import websocket  # comes with JupyterLab
from bs4 import BeautifulSoup

from parts import notebooks

ROOT = Path(__file__).parent.parent
LESSONS = [p.relative_to(ROOT/'nbs') for p in notebooks()]
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
    assert {Path('api')/p.relative_to(ROOT/'lts_nb').with_suffix('.html') for p in (ROOT/'lts_nb').rglob('*.py') if not p.name.startswith('_')} <= set(pages)


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


@pytest.mark.parametrize('lesson', [p for p in LESSONS if p.parent.name != 'runs'], ids=str)
def test_formulas_are_mathml(lesson, pages):
    text = '\n\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/lesson).read_text())['cells'] if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    wanted = len(re.findall(r'\$\$.+?\$\$', text, re.S))
    soup = pages[lesson.with_suffix('.html')]
    assert len([m for m in soup('math') if m['display'] == 'block']) == wanted
    left = [t for cell in soup(class_='jp-MarkdownOutput') for t in cell(string=re.compile(r'\$|\\(frac|sum|sigma|text)\b')) if not t.find_parent(('code', 'pre'))]
    assert left == [], 'mathematics that stayed as it was typed'


def test_pictures_have_a_text(pages):
    assert [str(p) for p, soup in pages.items() for img in soup('img') if not img.get('alt')] == []


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
    "Opens an address in a headless Chromium that reaches nothing but this machine, and evaluates a script there until it gives something."
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

    def opened(url, script, seconds=20):
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
