"""Draws the maps under nbs/images.

They are the paper's Figures 2 and 3 with this kit's names and shapes, and small maps that say where a reader is.
`python tools/draw_maps.py` writes all of them."""
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent/'nbs'/'images'

# What leaves each part of the full model at an input of 416; a test holds it to the real one.
SHAPES = dict(
    image='3×416×416',
    F_v1='1024×13×13', F_v2='512×26×26', F_v3='256×52×52',
    h_t='15×1024', f_text='1024',
    F_m1='1024×13×13', F_m2='1024×26×26', F_m3='1024×52×52',
    K='1024', H_mask='1×52×52', joined='1025×52×52',
    branch='256×52×52', five='1280×52×52', aspp='256×52×52', deconv='256×104×104',
    P_mask='1×104×104')

# Where a box leads: an address as it is on the reading site from a page in start/.
ROOMS = dict(
    data='../data/01_refer.html', image='../data/04_letterbox.html', sentence='../data/03_text.html',
    darknet='../model/01_darknet.html', language='../model/02_language.html', fusion='../model/03_fusion.html',
    locate='../model/04_locate.html', segment='../model/05_segment.html', losses='../model/06_losses.html',
    lts='../model/08_lts.html', method='../model/07_method.html', training='../training/02_fit.html',
    prediction='../start/02_first_prediction.html')

COLOURS = dict(  # name -> (pale, strong)
    data=('#e2e8f0', '#475569'), language=('#dbeafe', '#1d4ed8'), darknet=('#dcfce7', '#15803d'),
    fusion=('#ede9fe', '#6d28d9'), locate=('#ffedd5', '#c2410c'), segment=('#ffe4e6', '#be123c'),
    losses=('#fef9c3', '#854d0e'), training=('#e2e8f0', '#475569'), method=('#cffafe', '#0e7490'),
    lts=('#f8fafc', '#334155'))
INK, LINE, PLATE, EDGE = '#0f172a', '#475569', '#f8fafc', '#cbd5e1'
RATES = 6, 12, 18


def text(x, y, words, size=15, anchor='middle', weight=None, colour=INK, mono=False):
    "One line of text; x is its middle, its start or its end, as `anchor` says."
    family = 'monospace' if mono else 'sans-serif'
    bold = f' font-weight="{weight}"' if weight else ''
    return (f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" text-anchor="{anchor}"'
            f'{bold} fill="{colour}">{escape(words)}</text>')


def code(x, y, words, anchor='middle'): return text(x, y, words, 15, anchor, mono=True)


def link(room, *parts):
    "Parts of a drawing that lead to a notebook's page."
    opened = f'<a href="{ROOMS[room]}" aria-label="notebook: {room}">'
    return '\n'.join([opened, *parts, '</a>'])


def rect(x, y, w, h, fill, stroke, width=2, dash=None, radius=9):
    dashed = f' stroke-dasharray="{dash}"' if dash else ''
    return (f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}"'
            f' stroke="{stroke}" stroke-width="{width}"{dashed}/>')


def arrow(*points, head=True, dash=None, colour=LINE):
    "A line through (x, y) points with a head at its end."
    path = ' '.join(f'{"L" if i else "M"}{x} {y}' for i, (x, y) in enumerate(points))
    dashed = f' stroke-dasharray="{dash}"' if dash else ''
    line = f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'
    return line + (arrow_head(points[-2], points[-1], colour) if head else '')


def arrow_head(before, at, colour):
    "A triangle at the end of a line that runs along an axis."  # a marker's id would clash on a page
    (x0, y0), (x, y) = before, at
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    corners = (x, y), (x - 9*dx - 5*dy, y - 9*dy - 5*dx), (x - 9*dx + 5*dy, y - 9*dy + 5*dx)
    points = ' '.join(f'{a},{b}' for a, b in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def dot(x, y): return f'<circle cx="{x}" cy="{y}" r="4" fill="{LINE}"/>'


def drawing(width, height, title, description, parts):
    "A whole SVG file: a pale plate, so that it can be read on a dark page, and the parts."
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lts-map" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img">',
        f'<title>{escape(title)}</title>',
        f'<desc>{escape(description)}</desc>',
        '<style>.lts-map a:hover rect, .lts-map a:focus rect { stroke-width: 4 }</style>',
        rect(1, 1, width - 2, height - 2, PLATE, EDGE, 1, radius=14),
        *parts, '</svg>', ''])


# ---- small pictures ----

PEOPLE = ((22, 60, '#d62828'), (62, 52, '#2d5adc'), (103, 62, '#28a03c'))  # x, y of the feet's middle, colour


def moved(x, y, *parts): return '\n'.join([f'<g transform="translate({x} {y})">', *parts, '</g>'])


def person(x, y, colour):
    return (f'<circle cx="{x}" cy="{y - 30}" r="8" fill="{colour}"/>'
            f'<path d="M{x - 12} {y - 20}h24v16h-6v20h-12v-20h-6z" fill="{colour}"/>')


def scene(x, y):
    "Three people on a ground, 126 × 90."
    people = [person(px, py, colour) for px, py, colour in PEOPLE]
    return moved(x, y, rect(0, 0, 126, 90, '#b8c4b0', LINE, 1, radius=4), *people)


def mask(x, y):
    "The mask of the second person from the left, 126 × 90."
    second = person(PEOPLE[1][0], PEOPLE[1][1], '#ffffff')
    return moved(x, y, rect(0, 0, 126, 90, '#1e293b', LINE, 1, radius=4), second)


def heat(x, y, w=76, h=54):
    "A position prior: coarse, bright where the second person from the left stands."
    cx, cy = .49*w, .55*h
    rings = (20, 25, '#6a176e'), (14, 19, '#bc3754'), (9, 13, '#f98e09'), (4, 7, '#fcffa4')
    spots = [f'<ellipse cx="{cx:.1f}" cy="{cy:.1f}" rx="{rx}" ry="{ry}" fill="{fill}"/>' for rx, ry, fill in rings]
    return moved(x, y, rect(0, 0, w, h, '#140b34', LINE, 1, radius=4), *spots)


# ---- the paper's Figure 2 ----

def part(room, x, y, w, h, title, lines, at=None):
    "A box of Figure 2 with its title and lines below it."
    pale, strong = COLOURS[room]
    at = y + 26 if at is None else at
    rows = [text(x + w/2, at + 22*(i + 1), line, 15) for i, line in enumerate(lines) if line]
    head = text(x + w/2, at, title, 18, weight='bold', colour=strong)
    return link(room, rect(x, y, w, h, pale, strong), head, *rows)


def named(x, y, name, anchor='middle', gap=20):
    "A map's name above a line and its shape below it."
    return code(x, y - 8, name, anchor) + code(x, y + gap, SHAPES[name], anchor)


def figure2():
    "Picture and sentence to mask, as in Figure 2 of the paper."
    fusion = COLOURS['fusion'][1]
    levels = 256, 326, 396
    maps = []
    for i, y in enumerate(levels):
        maps += [rect(522, y - 20, 136, 40, '#ffffff', fusion, 1, radius=6),
                 code(590, y - 4, f'F_m{i + 1}'), code(590, y + 14, SHAPES[f'F_m{i + 1}'])]
    inputs = []
    for i, y in enumerate(levels): inputs += [arrow((362, y), (522, y)), named(436, y, f'F_v{i + 1}')]
    ups = []
    for upper, lower in zip(levels, levels[1:]):
        ups += [arrow((590, upper + 20), (590, lower - 20), colour=fusion),
                text(602, (upper + lower)/2 + 5, '×2', 15, 'start')]
    parts = [
        # the model's outline
        arrow((216, 16), (986, 16), (986, 174), (1164, 174), (1164, 458), (216, 458), (216, 15),
              head=False, dash='7 5'),
        link('lts', rect(240, 4, 208, 25, PLATE, PLATE, radius=4),
             text(344, 22, 'LTS: the whole model', 17, weight='bold', colour=LINE)),
        # inputs
        link('sentence', rect(24, 58, 126, 70, '#ffffff', LINE, 1, radius=6),
             text(87, 89, '“second guy'), text(87, 109, 'from the left”')),
        text(87, 148, 'sentence', 15),
        link('image', scene(24, 281)), text(87, 392, 'picture'), code(87, 412, SHAPES['image']),
        # language
        arrow((150, 93), (232, 93)), text(190, 85, '15', 15), text(190, 112, 'words', 15),
        part('language', 232, 48, 150, 90, 'Language', ('embedding,', 'bi-GRU, eq. 1–4'), at=76),
        arrow((382, 93), (819, 93), (819, 188)), dot(640, 93),
        code(470, 85, 'f_text'), code(470, 113, SHAPES['f_text']),
        code(833, 140, 'K = f_text·W_k', 'start'), code(833, 161, SHAPES['K'], 'start'),
        # vision
        arrow((150, 326), (232, 326)),
        part('darknet', 232, 188, 130, 250, 'Darknet-53', ('the backbone,', '§3.1')),
        text(297, 289, 'stride 32', 15), text(297, 331, 'stride 16', 15), text(297, 401, 'stride 8', 15),
        *inputs,
        # fusion
        link('fusion', rect(510, 188, 160, 250, *COLOURS['fusion']),
             text(566, 215, 'Fusion', 18, weight='bold', colour=fusion),
             *maps, text(590, 433, 'eq. 5–7', 15)), arrow((640, 93), (640, 236)),
        text(650, 172, 'multiplies', 15, 'start'), *ups,
        # locate
        part('locate', 744, 188, 150, 112, 'Locate', ('relevance', 'filtering, eq. 8'), at=228),
        arrow((658, 396), (1000, 396)), named(744, 396, 'F_m3'), dot(819, 396),
        arrow((819, 396), (819, 300)),
        arrow((894, 244), (1000, 244)), heat(905, 178), named(945, 244 + 30, 'H_mask', gap=12),
        # segment
        part('segment', 1000, 188, 150, 250, 'Segment',
             ('', 'join the maps,', 'ASPP at rates', ' · '.join(map(str, RATES)), 'deconvolution ×2', '', 'eq. 10')),
        arrow((1075, 188), (1075, 131)),
        code(1084, 147, 'P_mask', 'start'), code(1084, 166, SHAPES['P_mask'], 'start'),
        link('prediction', mask(1012, 40)), text(1075, 30, 'mask: > 0.25 at full size', 15),
        # losses
        arrow((945, 294), (945, 480), dash='4 4', colour=COLOURS['losses'][1]),
        arrow((1144, 142), (1180, 142), (1180, 509), (1104, 509), dash='4 4', colour=COLOURS['losses'][1]),
        part('losses', 744, 480, 360, 58, 'Losses, in training', ('L = L_seg + 0.1 · L_loc, eq. 11–13',), 504),
    ]
    return drawing(1200, 550, 'Figure 2: locate then segment',
        'A sentence goes through the language encoder and becomes f_text. A picture goes through '
        'Darknet-53 and becomes the maps F_v1, F_v2 and F_v3. Fusion multiplies f_text into F_v1 and '
        'joins the finer maps to F_m3. Locate filters F_m3 with a kernel made of f_text and gives the '
        'position prior H_mask. Segment joins F_m3 and H_mask and gives the mask P_mask. '
        'Two losses compare H_mask and P_mask with the truth.', parts)


# ---- the paper's Figure 3 ----

def step(room, x, y, w, h, title, lines=()):
    "A box of Figure 3."
    pale, strong = COLOURS[room]
    top = y + h/2 + 5 - 10*len(lines)
    rows = [text(x + w/2, top + 20*(i + 1), line, 15, mono='×' in line) for i, line in enumerate(lines)]
    return link(room, rect(x, y, w, h, '#ffffff' if room == 'segment' else pale, strong, 1.5),
                text(x + w/2, top, title, 16, weight='bold', colour=strong), *rows)


def figure3():
    "The segmentation module, as in Figure 3 of the paper."
    rose = COLOURS['segment']
    rows = 86, 146, 206, 266, 326
    names = ('1×1 convolution', *(f'3×3, rate {r}' for r in RATES), 'mean of the map')
    branches = []
    for y, name in zip(rows, names):
        into = [(342, 206), (402, 206)] if y == 206 else [(372, 206), (372, y), (402, y)]
        out = [(544, 206), (606, 206)] if y == 206 else [(544, y), (576, y), (576, 206)]
        branches += [arrow(*into), step('segment', 402, y - 21, 142, 42, name), arrow(*out, head=y == 206)]
    parts = [
        rect(356, 22, 400, 346, rose[0], rose[1], 1.5, '7 5', 16),
        text(473, 50, 'ASPP', 18, weight='bold', colour=rose[1]),
        step('fusion', 22, 116, 124, 56, 'F_m3', (SHAPES['F_m3'],)),
        step('locate', 22, 240, 124, 56, 'σ(H_mask)', (SHAPES['H_mask'],)),
        arrow((146, 144), (184, 144), (184, 206), (222, 206)),
        arrow((146, 268), (184, 268), (184, 206), head=False),
        step('segment', 222, 178, 120, 56, 'join', (SHAPES['joined'],)),
        *branches,
        text(588, 96, 'each branch', 15, 'start'), code(588, 117, SHAPES['branch'], 'start'),
        step('segment', 606, 166, 134, 80, 'join, 1×1', (SHAPES['five'], '→ ' + SHAPES['aspp'])),
        arrow((740, 206), (788, 206)),
        step('segment', 788, 158, 150, 96, 'deconvolution', ('4×4, stride 2', SHAPES['deconv'])),
        arrow((938, 206), (966, 206)),
        step('segment', 966, 178, 76, 56, '1×1', ('conv.',)),
        arrow((1042, 206), (1072, 206)),
        step('segment', 1072, 178, 112, 56, 'P_mask', (SHAPES['P_mask'],)),
        text(1128, 262, 'σ, then > 0.25', 15),
    ]
    return drawing(1200, 390, 'Figure 3: the segmentation module',
        'F_m3 and the position prior are joined to 1025 channels. Five branches of ASPP read them: a 1×1 '
        'convolution, three 3×3 convolutions of rates 6, 12 and 18, and the mean of the map. Their outputs '
        'are joined and reduced to 256 channels, a '
        'deconvolution doubles the map, and a last 1×1 convolution gives P_mask.', parts)


# ---- you are here ----

PLACES = dict(  # room -> (x, y, width, height, title, second line)
    data=(14, 28, 92, 104, 'Data', 'data/'),
    language=(152, 28, 112, 46, 'Language', 'eq. 1–4'), darknet=(152, 86, 112, 46, 'Darknet-53', '§3.1'),
    fusion=(312, 86, 92, 46, 'Fusion', 'eq. 5–7'), locate=(452, 86, 92, 46, 'Locate', 'eq. 8–9'),
    segment=(592, 86, 92, 46, 'Segment', 'eq. 10'),
    method=(716, 28, 78, 46, 'Method', 'a contract'), losses=(716, 86, 78, 46, 'Losses', 'eq. 11–13'),
    training=(814, 28, 74, 104, 'Training', 'training/'))


def small_map(here):
    "The strip of boxes with one of them lit."
    parts = []
    for room, (x, y, w, h, title, second) in PLACES.items():
        pale, strong = COLOURS[room]
        fill, ink = (strong, '#ffffff') if room == here else (pale, INK)
        middle = y + h/2
        parts.append(link(room, rect(x, y, w, h, fill, strong, 3 if room == here else 1, radius=7),
                          text(x + w/2, middle - 2, title, 14, weight='bold', colour=ink),
                          text(x + w/2, middle + 15, second, 12, colour=ink)))
    strong = COLOURS['lts'][1]
    frame, label, ink = (('#e2e8f0', strong, 3, None), (strong, strong), '#ffffff')
    if here != 'lts': frame, label, ink = (('none', strong, 1, '5 4'), (PLATE, PLATE), LINE)
    outline = link('lts', rect(136, 13, 562, 156, *frame, 12), rect(578, 20, 110, 22, *label, radius=6),
                   text(633, 36, 'LTS, the model', 13, weight='bold', colour=ink))
    lines = [
        arrow((106, 51), (152, 51)), arrow((106, 109), (152, 109)),
        arrow((264, 109), (312, 109)), arrow((404, 109), (452, 109)),
        arrow((544, 109), (592, 109)), arrow((684, 109), (716, 109)),
        arrow((264, 51), (498, 51), (498, 86)), arrow((358, 51), (358, 86)),
        text(308, 46, 'f_text', 12, mono=True), text(288, 103, 'F_v', 12, mono=True),
        text(428, 103, 'F_m3', 12, mono=True), text(568, 103, 'H', 12, mono=True),
        arrow((755, 86), (755, 74)), arrow((794, 51), (814, 51)),
        # Segment reads the features too, and a loss compares the prior with the truth
        arrow((358, 132), (358, 146), (620, 146), (620, 132)), text(428, 142, 'F_m3', 12, mono=True),
        arrow((524, 132), (524, 160), (755, 160), (755, 132), dash='5 4'),
        text(664, 156, 'H', 12, mono=True)]
    title = {'lts': 'the whole model', 'darknet': 'Darknet-53'}.get(here, here)
    return drawing(900, 178, f'You are here: {title}',
        'Data, then language and Darknet-53, then fusion, locate and segment, then losses, method and '
        f'training. Segment reads F_m3 and H. The losses compare H and the mask with the truth. '
        f'The lit one is {title}.', [outline, *lines, *parts])


def drawings():
    "File name -> content, for every drawing."
    maps = {f'map-{room}.svg': small_map(room) for room in [*PLACES, 'lts']}
    return {'figure2.svg': figure2(), 'figure3.svg': figure3(), **maps}


if __name__ == '__main__':
    IMAGES.mkdir(exist_ok=True)
    for name, content in drawings().items(): (IMAGES/name).write_text(content, encoding='utf-8')
