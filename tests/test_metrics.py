"Golden numbers, and prediction files as they come from strangers."
import json, os
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from lts_nb.errors import KitError
from lts_nb.data.letterbox import letterbox_geometry
from lts_nb.training.metrics import ceiling, encode_rle, intersection_union, pointing_hit, read_predictions, score_predictions, summarise, write_predictions
from lts_nb.data.refer import Refer, decode_rle, write_refer

MICRO = Path(os.environ.get('LTS_MICRO', Path(__file__).parents[2]/'shared'/'refcoco_micro'))
needs_micro = pytest.mark.skipif(not MICRO.is_dir(), reason=f'the twelve images of RefCOCO are not at {MICRO}')

def test_exactly_half_does_not_count():
    s = summarise([5, 6, 7, 8, 9, 10], [10] * 6)
    assert [round(s[f'prec@0.{t}']*6/100) for t in (5, 6, 7, 8, 9)] == [5, 4, 3, 2, 1]

@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), min_size=1))
def test_metrics_are_consistent(pairs):
    i, u = zip(*[(min(a, b), b) for a, b in pairs])
    s = summarise(i, u)
    prec = [s[f'prec@0.{t}'] for t in (5, 6, 7, 8, 9)]
    assert s['n'] == len(pairs) and prec == sorted(prec, reverse=True) and 0 <= s['oIoU'] <= 100
    ious = np.array(i)/np.array(u)*100
    assert ious.min() - 1e-6 <= s['oIoU'] <= ious.max() + 1e-6 and s['mIoU'] == pytest.approx(ious.mean())

@pytest.mark.parametrize('i, u', [([], []), ([1], [0]), ([1, 2], [3])])
def test_nothing_to_summarise(i, u):
    with pytest.raises(KitError): summarise(i, u)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_encode_rle_round_trip(h, w, seed):
    mask = np.random.default_rng(seed).random((h, w)) < .4
    assert (decode_rle(json.loads(json.dumps(encode_rle(mask))), h, w) == mask).all()

@pytest.fixture
def data(tmp_path):
    sentence = lambda i: dict(sent_id=i, sent='left square', raw='left square', tokens=['left', 'square'])
    write_refer(tmp_path, 'refshapes', 'unc',
        [dict(ref_id=k, ann_id=k, image_id=1, category_id=1, split=s, sentences=[sentence(10*k), sentence(10*k+1)]) for k, s in ((1, 'val'), (2, 'val'), (3, 'train'))],
        dict(images=[dict(id=1, file_name='1.png', width=20, height=10)], categories=[dict(id=1, name='square')],
             annotations=[dict(id=k, image_id=1, category_id=1, iscrowd=0, bbox=[], segmentation=[[3*k, 1, 3*k+5, 1, 3*k+5, 6, 3*k, 6]]) for k in (1, 2, 3)]))
    refer = Refer(tmp_path, 'refshapes')
    masks = {s.sent_id: refer.mask(r.ann_id) for r, s in refer.sentences_of('val')}
    write_predictions(tmp_path/'p.json', masks.items())
    return refer, tmp_path/'p.json'

def test_perfect_and_empty_predictions(data):
    refer, path = data
    assert score_predictions(path, refer, 'val') == {'n': 4, 'oIoU': 100, 'mIoU': 100, **{f'prec@0.{t}': 100 for t in (5, 6, 7, 8, 9)}}
    write_predictions(path, [(i, np.zeros((10, 20), bool)) for i in read_predictions(path)])
    assert score_predictions(path, refer, 'val')['oIoU'] == 0

def test_plain_run_lengths_are_accepted(data):
    refer, path = data
    rows = json.loads(path.read_text())
    rows[0]['segmentation'] = {'size': [10, 20], 'counts': [0, 200]}
    path.write_text(json.dumps(rows))
    assert 0 < score_predictions(path, refer, 'val')['oIoU'] < 100

def bad_rle(counts, size=(10, 20)): return {'size': list(size), 'counts': counts}

@pytest.mark.parametrize('change, word', [
    (lambda p: p.pop(), 'sent_id 21'), (lambda p: p.append(p[0] | {'sent_id': 30}), '30'), (lambda p: p.append(p[0]), 'twice: 10'),
    (lambda p: p.append(p[0] | {'sent_id': '10'}), 'entry 4'), (lambda p: p.append(p[0] | {'sent_id': True}), 'entry 4'), (lambda p: p.append(7), 'entry 4'),
    (lambda p: p[1].update(segmentation=None), 'entry 1'), (lambda p: p[1].update(segmentation={}), 'sent_id 11'),
    (lambda p: p[1].update(segmentation=bad_rle([0, 200], (20, 10))), 'sent_id 11.*size'), (lambda p: p[1].update(segmentation=bad_rle('~')), 'sent_id 11.*broken'),
    (lambda p: p[1].update(segmentation=bad_rle('P' * 10**5)), 'sent_id 11'), (lambda p: p[1].update(segmentation=bad_rle([0, 2**40])), 'sent_id 11'),
    (lambda p: p[1].update(segmentation=bad_rle([True] * 200)), 'sent_id 11'), (lambda p: p.clear(), '4 of 4')])
def test_wrong_files_are_named_never_skipped(data, change, word):
    refer, path = data
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(KitError, match=word): score_predictions(path, refer, 'val')

@pytest.mark.parametrize('text', ['', '[', '{}', 'null', '[' * 100000, '\x00'])
def test_no_json(data, text):
    refer, path = data
    path.write_text(text)
    with pytest.raises(KitError): score_predictions(path, refer, 'val')

def test_binary_missing_and_folder(data):
    refer, path = data
    path.write_bytes(b'\xff\xfe\x00')
    for p in (path, path.with_name('none.json'), path.parent):
        with pytest.raises(KitError): score_predictions(p, refer, 'val')
    with pytest.raises(KitError, match='val'): score_predictions(path, refer, 'vall')

def test_sizes_must_agree():
    with pytest.raises(KitError, match='size'): intersection_union(np.ones((2, 3), bool), np.ones((3, 2), bool))

def test_pointing_ignores_the_padding():
    g = letterbox_geometry(8, 32, 32)
    truth = np.zeros((8, 32), bool); truth[:, :16] = True
    prior = torch.zeros(4, 4); prior[0, 3] = 9.; prior[1, 0] = 1.; prior[2, 0] = 1.
    assert pointing_hit(prior, g, truth)

def test_ceiling_of_a_mask_that_fills_the_image():
    i, u = ceiling(np.ones((96, 96), bool), 64, 16)
    assert i == u == 96*96

@needs_micro
def test_ceiling_on_genuine_masks():
    refer = Refer(MICRO, 'refcoco')
    masks = [refer.mask(r.ann_id) for r in refer.refs.values()]
    for cell, known in ((4, 94.9), (8, 91.1)):
        assert summarise(*zip(*[ceiling(m, 416, 416//cell) for m in masks]))['oIoU'] == pytest.approx(known, abs=.1)

@needs_micro
def test_micro_predictions_round_trip(tmp_path):
    refer = Refer(MICRO, 'refcoco')
    write_predictions(tmp_path/'p.json', [(s.sent_id, refer.mask(r.ann_id)) for r, s in refer.sentences_of('testA')])
    assert score_predictions(tmp_path/'p.json', refer, 'testA') | {'n': 0} == {'n': 0, 'oIoU': 100, 'mIoU': 100, **{f'prec@0.{t}': 100 for t in (5, 6, 7, 8, 9)}}
