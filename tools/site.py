"""What mkdocs does not do by itself: API pages from the docments, mathematics as MathML, and links that stay within the site.

Everything that a page shows is in the site's folder, so that it reads the same without a network.
"""
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbdev.showdoc import show_doc

sys.path.insert(0, str(Path(__file__).parent))
from parts import OTHERS, notebooks, read_parts, rooms, title_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODULES = sorted(str(p.relative_to(ROOT/'lts_nb').with_suffix('')) for p in (ROOT/'lts_nb').rglob('*.py')
                 if not p.name.startswith('_'))  # 'model/fusion'
MATHS = re.compile(r'\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])', re.S)
LINK = re.compile(r'\]\(([^)#\s]+)')


def api_page(module):
    "Markdown of a module's page: what it is for, then every exported name with its docments."
    m = importlib.import_module('lts_nb.' + module.replace('/', '.'))
    own = {name: inspect.isfunction(getattr(m, name)) or inspect.isclass(getattr(m, name)) for name in m.__all__}
    parts = [show_doc(getattr(m, name))._repr_markdown_() for name in own if own[name]]
    values = [f'- `{name}`' for name in own if not own[name]]
    source = re.search(r'File to edit: (?:\.\./)+nbs/(\S+)\.ipynb', (ROOT/'lts_nb'/f'{module}.py').read_text()).group(1)
    up = '../'*(module.count('/') + 1)
    head = f'# lts_nb.{module.replace("/", ".")}\n\n{m.__doc__}\n\nThe lesson that defines it: [{source}]({up}{source}.ipynb).\n'
    return '\n\n'.join([head, *([('Values:\n\n' + '\n'.join(values))] if values else []), *parts]) + '\n'


def linked_files():
    "Files of the repository that notebooks link to and that are no notebooks."
    found = set()
    for notebook in notebooks():
        cells = json.loads(notebook.read_text())['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        found |= {(notebook.parent/link).resolve() for link in LINK.findall(text) if not re.match(r'\w+:|/', link)}
    return sorted(p.relative_to(ROOT) for p in found if not p.is_relative_to(ROOT/'nbs'))


def on_config(config):
    "Navigation: the parts in the order of reading, then what is no part, then the modules."
    page = lambda path: {title_of(path)[0]: str(path.relative_to(ROOT/'nbs'))}
    nav = [{'LTS kit': 'index.ipynb'}]
    for part in read_parts()['part']:
        if paths := rooms()[part['name']]: nav.append({part['title']: [page(p) for p in paths]})
    for folder in OTHERS:
        if paths := sorted((ROOT/'nbs'/folder).glob('*.ipynb')): nav.append({folder.capitalize(): [page(p) for p in paths]})
    nav.append({'API': [{m.replace('/', '.'): f'api/{m}.md'} for m in MODULES]})
    config['nav'] = nav
    return config


def on_files(files, config):
    "Add the API pages, and under repository/ what the notebooks link to."
    for module in MODULES: files.append(File.generated(config, f'api/{module}.md', content=api_page(module)))
    for path in linked_files():
        if not (ROOT/path).is_file(): raise FileNotFoundError(f'a notebook links to {path}, which is not there')
        files.append(File.generated(config, f'repository/{path}', abs_src_path=str(ROOT/path)))
    return files


def with_mathml(text):
    "A text with its $…$ and $$…$$ as MathML; None where there is none."
    if not MATHS.search(text): return None
    escape = lambda s: s.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    out, at = [], 0
    for m in MATHS.finditer(text):
        out += [escape(text[at:m.start()]), convert(m[1] or m[2], display='block' if m[1] else 'inline')]
        at = m.end()
    return BeautifulSoup(''.join([*out, escape(text[at:])]), 'html.parser')


def target(href, page):
    "Where a link of a notebook's page leads on the site."
    if re.match(r'\w+:|#|/', href): return href
    if re.search(r'\.ipynb(#|$)', href): return re.sub(r'\.ipynb(?=#|$)', '.html', href)
    depth = page.file.src_uri.count('/')
    if href.startswith('../'*(depth + 1)):  # out of nbs/
        return re.sub(r'\.md$', '.html', re.sub(r'README\.md$', 'index.md', '../'*depth + 'repository/' + href[3*(depth + 1):]))
    return href


def flat(toc):
    "Entries of a table of contents, parents before children."
    return [entry for item in toc for entry in (item, *flat(item.children))]


def correct_contents(toc, soup):
    "Titles and anchors of a notebook's headings: mkdocs-jupyter leaves out what stands in `code`."
    headings = [h for cell in soup(class_='jp-MarkdownOutput') for h in cell(re.compile('^h[1-6]$')) if h.get('id')]
    for entry, h in zip(flat(toc), headings):
        if entry.level == int(h.name[1]): entry.id, entry.title = h['id'], h.get_text().rstrip('¶')


def on_page_content(html, page, config, files):
    "Mathematics, links and scripts of a notebook's page."
    if not page.file.src_uri.endswith('.ipynb'): return html
    soup = BeautifulSoup(html, 'html.parser')
    for script in soup('script'):  # MathJax and mermaid from elsewhere; neither is needed
        if 'mathjax' in str(script).lower() or 'mermaid' in str(script).lower() or script.get('src') == '': script.decompose()
    correct_contents(page.toc, soup)
    for a in soup('a', href=True): a['href'] = target(a['href'], page)
    for img in soup('img', src=True):
        if not img['src'].startswith('data:'): img['src'] = target(img['src'], page)
        if not img.get('alt'): img['alt'] = 'output of the code above'
    for text in soup(string=lambda s: '$' in s):
        if text.find_parent(('code', 'pre', 'script', 'style')) or not text.find_parent(class_='jp-MarkdownOutput'): continue
        if (new := with_mathml(str(text))) is not None: text.replace_with(new)
    return str(soup)
