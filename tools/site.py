"""What mkdocs does not do by itself: a lesson's page without the editor around its cells, API pages from the docments,
mathematics as MathML, drawings whose boxes are links, and links that stay within the site.

Everything that a page shows is in the site's folder, so that it reads the same without a network.
"""
import ast
import html as html_text
import importlib
import inspect
import json
import posixpath
import re
import sys
from pathlib import Path

from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbdev.showdoc import show_doc

sys.path.insert(0, str(Path(__file__).parent))
from parts import OTHERS, modules, notebooks, read_parts, rooms, title_of

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT))
MODULES = [str(p.relative_to(ROOT/'lts_nb').with_suffix('')) for p in modules()]  # 'model/fusion'
MATHS = re.compile(r'\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])', re.S)
LINK = re.compile(r'\]\(([^)#\s]+)')


# Navigation and files

def short(title):
    "A notebook's title as the navigation shows it: what stands before a colon or a comma, without `code` marks."
    return re.split(r'[:,]\s', title.replace('`', ''))[0]


def documented(thing):
    "Whether an exported name has a signature to show."
    return inspect.isfunction(thing) or inspect.isclass(thing)


def api_page(module):
    "Markdown of a module's page: what it is for, then every exported name with its docments."
    m = importlib.import_module('lts_nb.' + module.replace('/', '.'))
    values = [name for name in m.__all__ if not documented(getattr(m, name))]
    parts = [show_doc(getattr(m, name))._repr_markdown_() for name in m.__all__ if name not in values]
    text = (ROOT/'lts_nb'/f'{module}.py').read_text()
    source = re.search(r'File to edit: (?:\.\./)+nbs/(\S+)\.ipynb', text).group(1)
    up = '../'*(module.count('/') + 1)
    lesson, _ = title_of(NBS/f'{source}.ipynb')
    head = f'# lts_nb.{module.replace("/", ".")}\n\n{m.__doc__}\n\nThe lesson that defines it: [{lesson}]({up}{source}.ipynb).\n'
    listed = ['Values:\n\n' + '\n'.join(f'- `{name}`' for name in values)] if values else []
    return '\n\n'.join([head, *listed, *parts]) + '\n'


def api_nav():
    "The modules, those of one part together."
    titles = {part['name']: part['title'] for part in read_parts()['part']}
    groups = {}
    for module in MODULES:
        folder, _, name = module.rpartition('/')
        groups.setdefault(titles.get(folder, folder), []).append({name: f'api/{module}.md'})
    ground = groups.pop('', [])
    return [*ground, *({title: groups[title]} for title in titles.values() if title in groups)]


def on_config(config):
    "Navigation: the parts in the order of reading, then what is no part, then the modules."
    page = lambda path: {short(title_of(path)[0]): str(path.relative_to(NBS))}
    nav = [{'Home': 'index.ipynb'}]
    for part in read_parts()['part']:
        if paths := rooms()[part['name']]: nav.append({part['title']: [page(p) for p in paths]})
    for folder in OTHERS:
        if paths := sorted((NBS/folder).glob('*.ipynb')): nav.append({folder.capitalize(): [page(p) for p in paths]})
    nav.append({'API': api_nav()})
    config['nav'] = nav
    return config


def shown_markdown(cell):
    "The Markdown that a cell shows: its source, or what its code printed as Markdown."
    if cell['cell_type'] == 'markdown': return ''.join(cell['source'])
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', []))


def linked_files():
    "Files of the repository that notebooks link to or show and that are no notebooks."
    found = set()
    for notebook in notebooks():
        text = '\n'.join(map(shown_markdown, json.loads(notebook.read_text())['cells']))
        links = [link for link in LINK.findall(text) if not re.match(r'\w+:|/', link)]
        found |= {(notebook.parent/link).resolve() for link in links}
    # a report leads to the pages of its runs
    reports = [path for path in found if path.name == 'index.html' and (path.parent/'pages').is_dir()]
    for report in reports: found |= set((report.parent/'pages').glob('*.html'))
    return sorted(p.relative_to(ROOT) for p in found if not p.is_relative_to(NBS))


def on_files(files, config):
    "Add the API pages, and under repository/ what the notebooks link to."
    for module in MODULES: files.append(File.generated(config, f'api/{module}.md', content=api_page(module)))
    for path in linked_files():
        if not (ROOT/path).is_file(): raise FileNotFoundError(f'a notebook links to {path}, which is not there')
        files.append(File.generated(config, f'repository/{path}', abs_src_path=str(ROOT/path)))
    return files


# Cells

NOTES = {'slow': 'takes minutes, so <code>make test</code> leaves it out',
         'cuda': 'wants a GPU, so <code>make test</code> leaves it out',
         'eval: false': 'shown, not run'}  # a directive, in words


def read_code(cell):
    "Lines of a highlighted block as (text, HTML) without the directives, and the directives."
    lines, directives = [], []
    for marked in cell.find('pre').decode_contents().removeprefix('<span></span>').rstrip('\n').split('\n'):
        text = html_text.unescape(re.sub('<[^>]+>', '', marked))
        if text.startswith('#|'): directives.append(text[2:].strip())
        elif lines or text.strip(): lines.append((text, marked))
    return lines, directives


def is_import(source):
    "Whether a cell does nothing but import, and set up what it imports by calls such as `torch.manual_seed(0)`."
    try: statements = ast.parse(source).body
    except SyntaxError: return False  # a cell with a magic command
    imports = [s for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]
    calls = [s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    return bool(imports) and len(imports) + len(calls) == len(statements)


def as_block(lines):
    "A highlighted block; a line that is wrapped goes on four characters to the right of where it began."
    wrapped = []
    for text, marked in lines:
        indent = len(text) - len(text.lstrip()) + 4
        wrapped.append(f'<span class="line" style="--indent:{indent}ch">{marked}\n</span>')
    return f'<div class="highlight"><pre><code>{"".join(wrapped)}</code></pre></div>'


def as_outputs(cell):
    "What a code cell shows, without prompts and without the styles that notebooks bring along."
    shown = []
    for output in cell(class_='jp-OutputArea-output'):
        for style in output(['style', 'script']): style.decompose()
        for table in output('table'): table.attrs = {}
        kind = ' '.join(output.get('class', []))
        inner = output.decode_contents().strip()
        if 'jp-RenderedText' in kind: shown.append(f'<div class="output output-text">{inner}</div>')
        elif 'jp-RenderedMarkdown' in kind: shown.append(f'<div class="output output-markdown">{inner}</div>')
        elif output.find(['img', 'svg']) and not output.find('table'): shown.append(f'<div class="output output-picture">{inner}</div>')
        else: shown.append(f'<div class="output output-html">{inner}</div>')
    return '\n'.join(shown)


def exported_to(module, page):
    "The line under a cell that belongs to the package."
    up = '../'*page.file.src_uri.count('/')
    return f'exported to <a href="{up}api/{module.replace(".", "/")}.html"><code>lts_nb.{module}</code></a>'


def plain_page(soup, page):
    """The cells of a notebook as a page that is read: text, code, what it shows; the rest folded or left out.

    A second value holds the highlighted code. The page has a comment in its place, which `with_code` replaces: thousands of
    coloured words need not be parsed again."""
    module, imports, body, code = None, [], [], []

    def block_of(lines):
        "The comment that stands for a highlighted block."
        code.append(as_block(lines))
        return f'<!--code {len(code) - 1}-->'

    def put(piece):
        "Add a piece; imports that stood together before it come first, folded into one line."
        if imports:
            body.append(f'<details class="fold"><summary>Imports</summary>{block_of(imports)}</details>')
            imports.clear()
        body.append(piece)

    for cell in soup(id=re.compile('^cell-id=')):
        if text := cell.find(class_='jp-MarkdownOutput'):
            for block in text(class_='highlight'):
                block.replace_with(BeautifulSoup(block_of(read_code(block)[0]), 'html.parser'))
            put(f'<div class="jp-MarkdownOutput">{text.decode_contents()}</div>')
            continue
        lines, directives = read_code(cell)
        module = next((d.split()[1] for d in directives if d.startswith('default_exp')), module)
        outputs = as_outputs(cell)
        if page.file.src_uri == 'index.ipynb': lines = []
        if not lines and not outputs or 'hide' in directives and not outputs: continue
        if not outputs and is_import('\n'.join(text for text, _ in lines)):
            imports += lines
            continue
        notes = [NOTES[d] for d in directives if d in NOTES]
        exported = any(d.split()[0] in ('export', 'exporti', 'exports') for d in directives if d) and module
        if exported: notes.append(exported_to(module, page))
        block = block_of(lines) if lines else ''
        if notes: block += f'<p class="note">{" · ".join(notes)}</p>'
        if lines and {'hide', 'hide_input', 'echo: false'} & set(directives):
            block = f'<details class="fold"><summary>Code of what follows</summary>{block}</details>'
        put(f'<div class="cell{" exported" if exported else ""}">{block}{outputs}</div>')
    put('')
    return BeautifulSoup('\n'.join(body), 'html.parser'), code


def with_code(html, code):
    "A page whose comments are the highlighted blocks that they stand for."
    return re.sub(r'<!--code (\d+)-->', lambda m: code[int(m[1])], html)


# Links, formulas, drawings

def with_mathml(text):
    "A text with its $…$ and $$…$$ as MathML; None where there is none."
    if not MATHS.search(text): return None
    escape = lambda s: s.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    out, at = [], 0
    for m in MATHS.finditer(text):
        formula = re.sub(r'_\{([A-Za-z]{3,})\}', r'_{\\text{\1}}', m[1] or m[2])  # f_{text}: a word, not a product
        out += [escape(text[at:m.start()]), convert(formula, display='block' if m[1] else 'inline')]
        at = m.end()
    return BeautifulSoup(''.join([*out, escape(text[at:])]), 'html.parser')


def target(href, page):
    "Where a link of a notebook's page leads on the site."
    if re.match(r'\w+:|#|/', href): return href
    if re.search(r'\.ipynb(#|$)', href): return re.sub(r'\.ipynb(?=#|$)', '.html', href)
    depth = page.file.src_uri.count('/')
    if href.startswith('../'*(depth + 1)):  # out of nbs/
        there = '../'*depth + 'repository/' + href[3*(depth + 1):]
        return re.sub(r'\.md$', '.html', re.sub(r'README\.md$', 'index.md', there))
    return href


def flat(toc):
    "Entries of a table of contents, parents before children."
    return [entry for item in toc for entry in (item, *flat(item.children))]


def correct_contents(toc, soup):
    "Titles and anchors of a notebook's headings: mkdocs-jupyter leaves out what stands in `code`."
    texts = soup(class_='jp-MarkdownOutput')
    headings = [h for text in texts for h in text(re.compile('^h[1-6]$')) if h.get('id')]
    for entry, h in zip(flat(toc), headings):
        if entry.level == int(h.name[1]): entry.id, entry.title = h['id'], h.get_text().rstrip('¶')


def drawing(path, page, text=''):
    "An SVG of nbs/images/ as part of the page, so that its links work; they start at nbs/start/, wherever it is shown."
    svg = BeautifulSoup(path.read_text(), 'html.parser').find('svg')
    here = posixpath.dirname(page.file.src_uri) or '.'
    for a in svg('a', href=True):
        if re.match(r'\w+:|#|/', a['href']): continue
        there = posixpath.normpath(f"start/{a['href']}")
        a['href'] = target(posixpath.relpath(there, here), page)
    svg['role'] = 'group'  # an `img` would hide its links from a screen reader
    if text: svg['aria-label'] = text
    for key in ('width', 'height'): svg.attrs.pop(key, None)  # as wide as the page allows
    return svg


def with_links(image, page):
    "The drawing that an image shows, where it is one of nbs/images/ with links; else None."
    path = (NBS/page.file.src_uri).parent/image['src']
    if path.suffix != '.svg' or not path.is_file() or '<a ' not in path.read_text(): return None
    return drawing(path, page, image.get('alt', ''))


# Pages

def welcome(soup, page):
    "The first page opens with the kit's name, ways in, and Figure 2 as a map, where it has been drawn."
    title, motto = soup.find('h1'), soup.find('blockquote')
    ways = [(short(title_of(p)[0]), str(p.relative_to(NBS))) for p in rooms()['start'][:2]]
    if Path('reports/cpu/index.html') in linked_files(): ways.append(('What was measured', '../reports/cpu/index.html'))
    buttons = ''.join(f'<a class="md-button{"" if i else " md-button--primary"}" href="{target(href, page)}">{name}</a>'
                      for i, (name, href) in enumerate(ways))
    hero = BeautifulSoup(f'<div class="hero"><img class="hero-logo" src="assets/logo.svg" alt="">'
                         f'<div class="hero-text"></div><p class="hero-ways">{buttons}</p></div>', 'html.parser')
    hero.find(class_='hero-text').extend([title.extract(), motto.extract()])
    soup.insert(0, hero)
    figure = NBS/'images'/'figure2.svg'
    if not figure.is_file(): return
    caption = 'Figure 2 of the paper, as the way in: each box opens the lesson that builds it.'
    piece = BeautifulSoup(f'<figure class="way-in"><figcaption>{caption}</figcaption></figure>', 'html.parser')
    piece.find('figcaption').insert_before(drawing(figure, page, caption))
    soup.find('h2').insert_before(piece)


def mark_frames(soup):
    "Tables whose header is empty lose it; the frame of a lesson (Question, Needs, Time …) may look like one."
    for table in soup('table'):
        head = table.find('thead')
        if not head or head.get_text(strip=True): continue
        head.decompose()
        if table.get_text(strip=True).startswith('Question'): table['class'] = 'frame'


def on_page_content(html, page, config, files):
    "A notebook's page: its cells without the editor, mathematics, drawings, links."
    if not page.file.src_uri.endswith('.ipynb'): return html
    html = re.sub(r'<(style|script)\b.*?</\1>', '', html, flags=re.S)  # the editor's; nothing of it is needed
    soup, code = plain_page(BeautifulSoup(html, 'html.parser'), page)
    page.title = short(title_of(NBS/page.file.src_uri)[0])
    correct_contents(page.toc, soup)
    mark_frames(soup)
    for a in soup('a', href=True): a['href'] = target(a['href'], page)
    for img in soup('img', src=True):
        if img['src'].startswith('data:'): img['alt'] = 'output of the code above'
        elif (svg := with_links(img, page)) is not None: img.replace_with(svg)
        else: img['src'] = target(img['src'], page)
    for text in soup(string=lambda s: '$' in s):
        if text.find_parent(('code', 'pre')) or not text.find_parent(class_='jp-MarkdownOutput'): continue
        if (new := with_mathml(str(text))) is not None: text.replace_with(new)
    if page.file.src_uri == 'index.ipynb':
        page.title, page.meta['hide'] = 'Home', ['navigation', 'toc']
        welcome(soup, page)
    return with_code(str(soup), code)
