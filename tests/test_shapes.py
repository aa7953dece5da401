"RefShapes on disk: the same bytes for a seed, and every sentence means one object, as judged by an evaluator of its own."
import hashlib, json, math, pickle, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from lts_nb.data import shapes
from lts_nb.data.refer import Refer
from lts_nb.data.shapes import FAMILY, Recipe, fingerprint, make_family, make_image

WORDS = {'refshapes': 3.5, 'refshapes+': 3.5, 'refshapesg': 8.4}  # a sentence, as RefCOCO's sets have them
TINY = dict(seed=0, train=5, val=3, testA=3, testB=3)
GOLDEN = {'refshapes': 'c1db9e9b734243e5', 'refshapes+': '7fd22bb1f8655668', 'refshapesg': '8cc0f0b61990e9c1'}  # of the frozen generator: change it only where RefShapes itself is meant to change
SEEDS = (0, 1, 2, 3)
EACH = dict(train=560, val=80, testA=80, testB=80)


# What the sentences say, in plain geometry over what the files hold.

NOUNS = {'person': 'person', 'guy': 'person', 'ball': 'ball', 'circle': 'ball', 'box': 'box', 'square': 'box',
         'star': 'star', 'tree': 'tree', 'cup': 'cup', 'mug': 'cup'}
COLOURS = {'red', 'green', 'blue', 'yellow', 'pink', 'white'}
SIZE_WORDS, PATTERN_WORDS = {'small', 'big'}, {'striped', 'plain'}
RELATIONS = ('to the left of', 'to the right of', 'above', 'below', 'closest to')
EDGE = {'left': lambda o: o['x'], 'right': lambda o: -o['x'], 'top': lambda o: o['y'], 'bottom': lambda o: -o['y']}


class NotUnderstood(Exception): pass


def scene_objects(annotations, categories):
    "Objects of an image as the files describe them; the place is the centre of the bounding box, pixels."
    return [dict(id=a['id'], category=categories[a['category_id']], colour=a['colour'], size=a['size_word'], pattern=a['pattern'],
                 x=a['bbox'][0] + a['bbox'][2]/2, y=a['bbox'][1] + a['bbox'][3]/2) for a in annotations]


def described(phrase, objects):
    "The objects that a noun phrase without a place describes."
    looks, wanted = re.sub(r'^(the|a) ', '', phrase), {}
    def want(key, value):
        if key in wanted: raise NotUnderstood(phrase)
        wanted[key] = value
    if m := re.fullmatch(r'(.+) with(out)? stripes', looks):
        looks = m[1]
        want('pattern', 'plain' if m[2] else 'striped')
    if m := re.fullmatch(r'(.+) in (\w+)', looks):
        if m[2] not in COLOURS: raise NotUnderstood(phrase)
        looks = m[1]
        want('colour', m[2])
    *adjectives, noun = looks.split()
    if noun not in NOUNS: raise NotUnderstood(phrase)
    want('category', NOUNS[noun])
    for word in adjectives:
        for key, words in (('colour', COLOURS), ('size', SIZE_WORDS), ('pattern', PATTERN_WORDS)):
            if word in words: want(key, word); break
        else: raise NotUnderstood(phrase)
    return [o for o in objects if all(o[k] == v for k, v in wanted.items())]


def nth(objects, side, n):
    "The n-th object counted from a side, alone unless another is exactly as far."
    at = sorted(map(EDGE[side], objects))
    return [o for o in objects if len(at) > n and EDGE[side](o) == at[n]]


def in_corner(objects, vertical, horizontal, width, height):
    "The objects whose centre lies in a quarter of the picture."
    left = lambda o: o['x'] < width/2 if horizontal == 'left' else o['x'] > width/2
    up = lambda o: o['y'] < height/2 if vertical == 'top' else o['y'] > height/2
    return [o for o in objects if left(o) and up(o)]


def middle(objects):
    "The one of three that has one on its left and one on its right."
    return nth(objects, 'left', 1) if len(objects) == 3 else []


def related(objects, relation, anchor):
    "Those of the objects that stand in a relation to another one."
    objects = [o for o in objects if o is not anchor]
    if relation == 'to the left of': return [o for o in objects if o['x'] < anchor['x']]
    if relation == 'to the right of': return [o for o in objects if o['x'] > anchor['x']]
    if relation == 'above': return [o for o in objects if o['y'] < anchor['y']]
    if relation == 'below': return [o for o in objects if o['y'] > anchor['y']]
    far = [math.hypot(o['x'] - anchor['x'], o['y'] - anchor['y']) for o in objects]
    return [o for o, d in zip(objects, far) if d == min(far)]


def meant(sentence, objects, width, height):
    "The objects that an English reader may take a sentence to mean."
    if m := re.fullmatch(rf'((?:the|a) .+?) (?:that is |standing )?({"|".join(RELATIONS)}) (the .+)', sentence):
        anchors = described(m[3], objects)
        return related(described(m[1], objects), m[2], anchors[0]) if len(anchors) == 1 else []
    side, corner = '(left|right|top|bottom)', '(top|bottom) (left|right)'
    if m := re.fullmatch(rf'second (.+) from the {side}', sentence): return nth(described(m[1], objects), m[2], 1)
    if m := re.fullmatch(rf'(.+) second from {side}', sentence): return nth(described(m[1], objects), m[2], 1)
    if m := re.fullmatch(r'middle (.+)', sentence): return middle(described(m[1], objects))
    if m := re.fullmatch(r'(.+) in the middle', sentence): return middle(described(m[1], objects))
    if m := re.fullmatch(rf'{corner} (.+)', sentence): return in_corner(described(m[3], objects), m[1], m[2], width, height)
    if m := re.fullmatch(rf'(.+) in the {corner}', sentence): return in_corner(described(m[1], objects), m[2], m[3], width, height)
    if m := re.fullmatch(rf'(?:far )?{side} (.+)', sentence): return nth(described(m[2], objects), m[1], 0)
    if m := re.fullmatch(rf'(.+) on (?:the )?{side}', sentence): return nth(described(m[1], objects), m[2], 0)
    if m := re.fullmatch(rf'the (.+) to the {side}', sentence): return nth(described(m[1], objects), m[2], 0)
    return described(sentence, objects)


def thing(id, x, y, category='ball', colour='red', size='big', pattern='plain'):
    return dict(id=id, x=x, y=y, category=category, colour=colour, size=size, pattern=pattern)


@pytest.mark.parametrize('sentence,ids', [
    ('left ball', [0]), ('far right circle', [2]), ('ball on top', [1]), ('the red ball to the bottom', [2]), ('middle ball', [1]),
    ('second ball from the right', [1]), ('ball second from left', [1]), ('top left ball', []), ('star in the bottom right', [3]),
    ('the ball above the star', [0, 1, 2]), ('a ball that is closest to the star', [2]), ('the blue circle', [1]), ('a small circle', []),
    ('the ball to the right of the blue ball', [2]), ('the star without stripes', [3]), ('striped ball', []), ('the ball below the cup', [])])
def test_the_evaluator_reads_english(sentence, ids):
    objects = [thing(0, 10, 70), thing(1, 50, 20, colour='blue'), thing(2, 90, 80), thing(3, 80, 90, 'star')]
    assert [o['id'] for o in meant(sentence, objects, 100, 100)] == ids


@pytest.mark.parametrize('sentence', ['left dog', 'the ball near the star', 'purple ball', 'red blue ball', 'ball in striped'])
def test_the_evaluator_refuses_what_it_does_not_know(sentence):
    with pytest.raises(NotUnderstood): meant(sentence, [thing(0, 10, 10)], 100, 100)


# The families that are judged.

@pytest.fixture(scope='module')
def families(tmp_path_factory):
    "Roots of several families, by seed."
    roots = {seed: tmp_path_factory.mktemp(f'shapes{seed}') for seed in SEEDS}
    for seed, root in roots.items(): make_family(root, Recipe(seed=seed, **EACH), workers=2)
    return roots


def read(root, name):
    "A set's files as they lie on disk: refs, images by id, annotations by image id, category names."
    found = json.loads((root/name/'instances.json').read_text())
    refs = pickle.loads(next((root/name).glob('refs(*).p')).read_bytes())
    annotations = {i['id']: [] for i in found['images']}
    for a in found['annotations']: annotations[a['image_id']].append(a)
    return refs, {i['id']: i for i in found['images']}, annotations, {c['id']: c['name'] for c in found['categories']}


@pytest.mark.parametrize('name', FAMILY)
def test_every_sentence_means_its_object_alone(families, name):
    wrong, scenes, sentences = [], 0, 0
    for seed, root in families.items():
        refs, images, annotations, categories = read(root, name)
        objects = {i: scene_objects(a, categories) for i, a in annotations.items()}
        scenes += len(images)
        for ref in refs:
            image = images[ref['image_id']]
            for s in ref['sentences']:
                sentences += 1
                ids = [o['id'] for o in meant(s['sent'], objects[image['id']], image['width'], image['height'])]
                if ids != [ref['ann_id']]: wrong.append((seed, image['file_name'], s['sent'], ref['ann_id'], ids))
    assert scenes >= 3000 and sentences >= 2*scenes
    assert not wrong, f'{len(wrong)} of {sentences} sentences do not mean their object alone: {wrong[:5]}'


@pytest.mark.parametrize('name', FAMILY)
def test_scenes_are_what_the_sets_promise(families, name):
    every = []
    for seed, root in families.items():
        refs, images, annotations, categories = read(root, name)
        assert min(map(len, annotations.values())) >= 4
        for ref in refs:
            person = categories[ref['category_id']] == 'person'
            assert {'testA': person, 'testB': not person}.get(ref['split'], True)
            assert 2 <= len(ref['sentences']) <= 3 and len({s['sent'] for s in ref['sentences']}) == len(ref['sentences'])
            assert all(s['tokens'] == s['sent'].split() for s in ref['sentences'])
            every += [len(s['tokens']) for s in ref['sentences']]
        assert all(any(a['id'] == ref['ann_id'] and a['category_id'] == ref['category_id'] for a in annotations[ref['image_id']]) for ref in refs)
    assert abs(np.mean(every) - WORDS[name]) < .5 and max(every) <= 15 + 5*(name == 'refshapesg')


def test_no_image_is_in_two_splits(families):
    for seed, root in families.items():
        splits = {}
        for name in FAMILY:
            refs, images, _, _ = read(root, name)
            for ref in refs: splits.setdefault(ref['image_id'], set()).add(ref['split'].replace('testA', 'test').replace('testB', 'test'))
            for split in ('testA', 'testB'):
                assert not {r['image_id'] for r in refs if r['split'] == split} & {r['image_id'] for r in refs if r['split'] != split}
        assert splits.keys() == images.keys() and all(len(s) == 1 for s in splits.values())


def test_no_picture_occurs_twice(families):
    pictures = [hashlib.sha256(p.read_bytes()).digest() for root in families.values() for p in (root/'images').rglob('*.png')]
    assert len(set(pictures)) == len(pictures) >= 3000


@pytest.mark.parametrize('name', FAMILY)
def test_masks_decode_to_the_stated_area_and_box(families, name):
    refer = Refer(families[SEEDS[0]], name)
    found = {}
    for a in list(refer.annotations.values())[::7]:
        mask = refer.mask(a.ann_id)
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == a.extra['area']
        assert tuple(a.bbox) == (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0])
        found.setdefault(a.image_id, []).append(mask)
    assert all(np.sum(masks, 0).max() == 1 for masks in found.values()), 'two objects own a pixel'


def test_no_object_is_hidden_further_than_the_recipe_says():
    recipe, shares = Recipe(seed=9), []
    for split in ('train', 'testA', 'testB'):
        for i in range(60):
            scene, pixels, _ = make_image(recipe, split, i)
            assert pixels.dtype == np.uint8 and pixels.shape == (scene.height, scene.width, 3)
            for t in scene.things:
                whole = coco_mask.decode(coco_mask.frPyObjects([t.polygon.ravel().tolist()], scene.height, scene.width)).any(2)
                assert not (t.visible & ~whole).any()
                shares.append(t.visible.sum()/whole.sum())
    assert min(shares) >= 1 - recipe.hidden
    assert .01 < np.mean(np.array(shares) < 1) < .9, 'some objects are covered, some are not'


MAKE = 'import sys, json; from lts_nb.data.shapes import *; make_family(sys.argv[1], Recipe(**json.loads(sys.argv[2])), workers=int(sys.argv[3]))'

def contents(root):
    "Every file of a family: its bytes, or what a pickle holds, since the same records may be pickled in several ways."
    return {str(p.relative_to(root)): pickle.loads(p.read_bytes()) if p.suffix == '.p' else hashlib.sha256(p.read_bytes()).hexdigest()
            for p in root.rglob('*') if p.is_file()}

def test_the_same_family_for_a_seed(tmp_path):
    recipe = json.dumps(TINY | dict(train=120))  # more than one chunk, so that three processes share the work
    for workers in ('1', '3'): subprocess.run([sys.executable, '-c', MAKE, tmp_path/workers, recipe, workers], check=True)
    one, three = contents(tmp_path/'1'), contents(tmp_path/'3')
    assert one.keys() == three.keys() and len(one) == 129 + 3*2 + 1
    assert [name for name in one if one[name] != three[name]] == []


def test_another_seed_is_another_family(tmp_path):
    a, b = (make_family(tmp_path/str(seed), Recipe(**TINY | dict(seed=seed))) for seed in (0, 1))
    assert not set(a.values()) & set(b.values())


def test_the_generator_is_the_frozen_one(tiny_family):
    assert json.loads((tiny_family/'refshapes.json').read_text())['fingerprints'] == GOLDEN


def test_the_fingerprint_sees_one_changed_pixel(tmp_path):
    make_family(tmp_path, Recipe(**TINY))
    refer = Refer(tmp_path, 'refshapes')
    before, path = fingerprint(refer, pixels=True), refer.image_path(min(refer.images))
    pixels = refer.open_image(min(refer.images)).copy()
    pixels[0, 0, 0] ^= 1
    PIL.Image.fromarray(pixels).save(path)
    assert fingerprint(refer, pixels=True) != before


def test_two_processes_that_want_a_family_make_it_once(tmp_path, monkeypatch):
    made, write = [], shapes._write_sets
    monkeypatch.setattr(shapes, '_write_sets', lambda *a: made.append(1) or write(*a))
    recipe = Recipe(seed=0, train=2, val=1, testA=1, testB=1)
    with ThreadPoolExecutor() as pool: prints = list(pool.map(lambda _: make_family(tmp_path, recipe), range(3)))
    assert len(made) == 1 and prints[0] == prints[1] == prints[2]
