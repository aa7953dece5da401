"The drawings and the front door: links that lead somewhere, and the shapes of the real model."
import json
import re
import xml.etree.ElementTree as ET
from unittest.mock import patch

import pytest
import torch

from draw_maps import IMAGES, RATES, ROOMS, SHAPES, drawings
from lts_nb.model import fusion
from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.model.lts import LTS, LTSConfig
from parts import ROOT, rooms

COMING = {'method'}  # rooms that a drawing knows before their notebook stands
DRAWN = drawings()
WORDS, SIZE = 15, 416
SVG = '{http://www.w3.org/2000/svg}'


def as_text(t): return '×'.join(str(n) for n in t.shape[1:])


@pytest.fixture(scope='module')
def real():
    "Shapes in the paper's full model, by the names of the drawings."
    backbone = Darknet53()
    frozen, tail = split_backbone(backbone, 2)
    model = LTS(LTSConfig(), backbone.channels, 100, tail=tail).eval()
    image, upsampled = torch.zeros(1, 3, SIZE, SIZE), []
    seen = {'image': as_text(image)}

    def reads(name, module):
        module.register_forward_hook(lambda m, ins, out: seen.update({name: as_text(ins[0])}))

    def writes(name, module):
        module.register_forward_hook(lambda m, ins, out: seen.update({name: as_text(out)}))

    def upsample_to(x, size):
        upsampled.append(x)
        return plain(x, size)
    plain = fusion.upsample_to
    reads('F_v1', model.fusion.v1)
    reads('F_v2', model.fusion.v2)
    reads('F_v3', model.fusion.v3)
    writes('F_m3', model.fusion)
    writes('K', model.locate.W_k[0])
    writes('H_mask', model.locate)
    reads('joined', model.segment.aspp)
    for branch in model.segment.aspp.branches: writes('branch', branch)
    reads('five', model.segment.aspp.project)
    writes('aspp', model.segment.aspp)
    writes('deconv', model.segment.up[0])
    writes('P_mask', model.segment)
    def writes_text(m, ins, out): seen.update(h_t=as_text(out[0]), f_text=as_text(out[1]))
    model.language.register_forward_hook(writes_text)
    with torch.inference_mode(), patch.object(fusion, 'upsample_to', upsample_to):
        # the equations as they stand: the model itself keeps F_m3 in two halves
        model.by_equations(frozen(image), torch.full((1, WORDS), 2), torch.tensor([WORDS]))
    seen['F_m1'], seen['F_m2'] = map(as_text, upsampled)
    return seen


def words_of(name): return [t.text for t in ET.fromstring(DRAWN[name]).iter(f'{SVG}text')]


def test_the_shapes_on_the_arrows_are_those_of_the_real_model(real):
    assert SHAPES == real
    words = ' '.join(word for name in DRAWN for word in words_of(name))
    drawn = set(re.findall(r'\d+(?:×\d+){2}', words))
    assert {s for s in SHAPES.values() if s.count('×') == 2} - drawn == set(), 'a shape that no drawing shows'
    assert drawn <= set(real.values()), 'a drawing shows a shape that the model does not have'
    assert RATES == LTSConfig().aspp_rates


def test_the_files_are_what_the_script_draws():
    found = {p.name: p.read_text(encoding='utf-8') for p in IMAGES.glob('*.svg')
             if p.name.startswith(('figure', 'map-'))}
    assert found == DRAWN, 'python tools/draw_maps.py'


@pytest.mark.parametrize('room', sorted(ROOMS))
def test_a_box_leads_to_a_notebook(room):
    path = (ROOT/'nbs'/'start'/ROOMS[room]).resolve().with_suffix('.ipynb')
    if room in COMING and not path.exists(): pytest.skip('not there yet')
    assert path.is_file(), f'no notebook behind {ROOMS[room]}'


@pytest.mark.parametrize('name', sorted(DRAWN))
def test_a_drawing_says_what_it_shows_and_can_be_read(name):
    svg = ET.fromstring(DRAWN[name])
    assert svg.find(f'{SVG}title').text and svg.find(f'{SVG}desc').text
    width = float(svg.get('viewBox').split()[2])
    texts = list(svg.iter(f'{SVG}text'))
    smallest = min(float(t.get('font-size')) for t in texts)
    assert smallest*900/width >= 11, 'too small where the drawing is shown 900 pixels wide'
    assert {t.get('font-family') for t in texts} <= {'sans-serif', 'monospace'}
    assert {a.get('href') for a in svg.iter(f'{SVG}a')} <= set(ROOMS.values())


@pytest.mark.parametrize('room', [n[4:-4] for n in DRAWN if n.startswith('map-')])
def test_a_small_map_lights_one_box(room):
    boxes = ET.fromstring(DRAWN[f'map-{room}.svg']).iter(f'{SVG}rect')
    assert sum(box.get('stroke-width') == '3' for box in boxes) == 1


DOOR = ROOT/'nbs'/'start'/'01_front_door.ipynb'


def door():
    "The front door's text with what its cells show."
    cells = json.loads(DOOR.read_text(encoding='utf-8'))['cells']
    shown = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    for c in cells:
        shown += [''.join(o.get('data', {}).get('text/markdown', '')) for o in c.get('outputs', [])]
    return '\n'.join(shown)


def test_the_front_door_leads_somewhere():
    links = [link for link in re.findall(r'\]\(([^)#]+)', door()) if '://' not in link]
    assert [link for link in links if not (DOOR.parent/link).is_file()] == []


def test_the_front_door_lists_every_room():
    listed = {(DOOR.parent/link).resolve() for link in re.findall(r'\]\(([^)]+\.ipynb)', door())}
    missing = {path for paths in rooms().values() for path in paths} - listed
    assert missing == set(), 'run the front door again, and keep its outputs'


def test_equation_1_stands_near_the_front_door():
    before, found, _ = ''.join(door()).partition(r'\quad (1)$$')
    assert found and len(before.split()) <= 2000
    assert '(8)$$' in door()
