"Hostile and broken REFER files, and the twelve images of RefCOCO where they are at hand."
import copy, json, os, pickle, struct, subprocess, sys
from pathlib import Path
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco_mask
from lts_nb.errors import KitError
from lts_nb.data.refer import Refer, check_dataset, decode_rle, decode_segmentation, load_restricted_pickle, write_refer

MICRO = Path(os.environ.get('LTS_MICRO', Path(__file__).parents[2]/'shared'/'refcoco_micro'))
needs_micro = pytest.mark.skipif(not MICRO.is_dir(), reason=f'the twelve images of RefCOCO are not at {MICRO}')

REFS = [dict(ref_id=k, ann_id=k, image_id=1, category_id=1, split=split, sentences=[
    dict(sent_id=10*k, sent='left square', raw='left square', tokens=['left', 'square'])]) for k, split in ((1, 'train'), (2, 'val'))]
INSTANCES = dict(images=[dict(id=1, file_name='1.png', width=20, height=10)], categories=[dict(id=1, name='square')],
    annotations=[dict(id=k, image_id=1, category_id=1, iscrowd=0, bbox=[1, 1, 5, 5], segmentation=[[k, 1, k+5, 1, k+5, 6, k, 6]]) for k in (1, 2)])

@pytest.fixture
def data(tmp_path):
    write_refer(tmp_path, 'refshapes', 'unc', REFS, INSTANCES)
    (tmp_path/'images/refshapes').mkdir(parents=True)
    PIL.Image.new('RGB', (20, 10), 'navy').save(tmp_path/'images/refshapes/1.png')
    return tmp_path

def test_reads_what_was_written(data):
    refer = Refer(data, 'refshapes')
    assert refer.splits() == ['train', 'val'] and refer.by == 'unc'
    assert refer.mask(1).sum() == 25 and refer.open_image(1).shape == (10, 20, 3)
    assert refer.image_path(1) == data/'images/refshapes/1.png'

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize('f, name', [(eval, 'eval'), (exec, 'exec'), (os.system, 'system'), (getattr, 'getattr'), (np.array, 'array')])
@pytest.mark.parametrize('protocol', range(6))
def test_import_in_a_pickle_is_refused_by_name(tmp_path, f, name, protocol):
    p = tmp_path/'refs(unc).p'
    p.write_bytes(pickle.dumps([{'ref_id': Call(f, f'open({str(tmp_path / "owned")!r}, "w")')}], protocol))
    with pytest.raises(KitError, match=name): load_restricted_pickle(p)
    assert not (tmp_path/'owned').exists()

@pytest.mark.parametrize('raw', [
    b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b'(cos\nsystem\no.', b'\x80\x02\x82\x01.', b'\x80\x02P1\n.', b'', b'\x80', b'[1, 2]',
    b'\x80\x02]q\x00(', b'\x80\x04\x8d' + struct.pack('<Q', 2**60) + b'.', b'(' * 5000, b'\x80\x02X\x08\x00\x00\x00ab.'])
def test_broken_or_hostile_bytes_are_a_sentence(tmp_path, raw):
    p = tmp_path/'refs(unc).p'
    p.write_bytes(raw)
    with pytest.raises(KitError): load_restricted_pickle(p)

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pickles_never_escape(tmp_path_factory, data):
    raw = bytearray(pickle.dumps(REFS, 2))
    for _ in range(data.draw(st.integers(1, 4))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    p = tmp_path_factory.getbasetemp()/'damaged.p'
    p.write_bytes(raw)
    try: load_restricted_pickle(p)
    except KitError: pass

@pytest.mark.skipif(sys.platform != 'linux', reason='reads the process\'s memory as Linux tells it')
@pytest.mark.parametrize('raw', [b'(lp%d\n.' % 10**8, b']r' + struct.pack('<I', 10**8) + b'.', b'\x8e' + struct.pack('<Q', 2**34) + b'.',
    b'\x96' + struct.pack('<Q', 2**34) + b'.', b'\x95' + struct.pack('<Q', 2**34) + b'.', b'\x8b' + struct.pack('<I', 2**31 - 1) + b'.'],
    ids=['put', 'long_binput', 'binbytes8', 'bytearray8', 'frame', 'long4'])
def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path, raw):
    "The compiled unpickler keeps its memo as an array: `p100000000` alone takes 1.6 GB there."
    (tmp_path/'refs.p').write_bytes(raw)
    code = ('import resource, sys\nfrom lts_nb.data.refer import KitError, load_restricted_pickle\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'try: load_restricted_pickle(sys.argv[1])\nexcept KitError: pass\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)')
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'refs.p'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) < 50_000, (done.stdout, done.stderr)  # KiB

def test_python_2_strings(tmp_path):
    p = tmp_path/'a.p'
    p.write_bytes(b"(lp0\nS'caf\\xc3\\xa9 \\xff'\np1\naV\\u2603\np2\na.")
    assert load_restricted_pickle(p) == ['café \ufffd', '☃']

def change(what):
    refs, instances = copy.deepcopy(REFS), copy.deepcopy(INSTANCES)
    what(refs, instances)
    return refs, instances

@pytest.mark.parametrize('what, word', [
    (lambda r, i: r[0].pop('ref_id'), 'ref_id'), (lambda r, i: r[0].update(split=3), 'split'), (lambda r, i: r[0].update(ann_id='1'), 'ann_id'),
    (lambda r, i: r[0].update(sentences=[1]), 'tokens'), (lambda r, i: r[0].update(ann_id=77), '77'), (lambda r, i: r[0].update(ref_id=2), 'twice'),
    (lambda r, i: r.clear(), 'no list'), (lambda r, i: i.pop('images'), 'images'), (lambda r, i: i['images'][0].update(file_name='../../x'), 'outside'),
    (lambda r, i: i['images'][0].update(width=0), 'cannot be'), (lambda r, i: i['annotations'].append(i['annotations'][0]), 'twice'),
    (lambda r, i: i['annotations'][0].update(segmentation='x'), 'segmentation'), (lambda r, i: r[0]['sentences'][0].update(tokens=[1]), 'tokens')])
def test_wrong_structure_is_named(data, what, word):
    write_refer(data, 'refshapes', 'unc', *change(what))
    with pytest.raises(KitError, match=word): Refer(data, 'refshapes')

def test_missing_data_names_path_and_command(data):
    for dataset, command in (('refshapes+', 'lts data make refshapes'), ('refcoco', 'lts data fetch refcoco')):
        with pytest.raises(KitError) as e: Refer(data, dataset)
        assert str(data/dataset) in str(e.value) and command in str(e.value)
    with pytest.raises(KitError, match='unc'): Refer(data, 'refshapes', by='google')
    with pytest.raises(KitError, match='refcoco'): Refer(data, 'refcocoo')
    (data/'refshapes/instances.json').write_text('{"images":')
    with pytest.raises(KitError, match='no JSON'): Refer(data, 'refshapes')
    (data/'refshapes/instances.json').unlink()
    with pytest.raises(KitError, match='instances.json'): Refer(data, 'refshapes')

def test_images_missing_truncated_corrupt_or_of_another_size(data):
    refer, path = Refer(data, 'refshapes'), data/'images/refshapes/1.png'
    raw = path.read_bytes()
    for content, word in ((raw[:50], 'truncated'), (b'no image', 'no image'), (b'', 'no image'), (raw[:40] + b'\0'*8 + raw[48:], 'image')):
        path.write_bytes(content)
        with pytest.raises(KitError, match=word): refer.open_image(1)
    PIL.Image.new('RGB', (10, 20)).save(path)
    with pytest.raises(KitError, match='10×20'): refer.open_image(1)
    path.unlink()
    with pytest.raises(KitError, match='missing'): refer.open_image(1)
    with pytest.raises(KitError, match='no image 7'): refer.open_image(7)

def test_grey_and_transparent_images_become_rgb(data):
    for mode in ('L', 'RGBA', 'P', '1'):
        PIL.Image.new(mode, (20, 10)).save(data/'images/refshapes/1.png')
        assert Refer(data, 'refshapes').open_image(1).shape == (10, 20, 3)

NAN = float('nan')
@pytest.mark.parametrize('segmentation, word', [
    ([[1, 1, 5, 5]], 'fewer than three'), ([[1, 1, 5, 5, 9]], 'flat list'), ([[1, 1, 5, 5, 9, NAN]], 'finite'), ([[1, 1, 5, 5, 9, 10**400]], 'finite'),
    ([[1, 1, 5, 5, 9, '3']], 'finite'), ([[50, 50, 60, 50, 60, 60]], 'outside'), ([[-9, -9, -2, -9, -2, -2]], 'outside'),
    ([[1, 1, 5, 1, 5e6, 5]], 'far outside'), ([[1, 1, 1, 1, 1, 1]], 'empty'), ([], 'no outline'), (None, 'no outline'), ([1, 2, 3], 'flat list'),
    ({'size': [10, 20], 'counts': [200]}, 'empty'), ({'size': [20, 10], 'counts': [0, 200]}, 'size'), ({'size': [10, 20], 'counts': [0, 201]}, 'cannot be'),
    ({'size': [10, 20], 'counts': [0, 199]}, '199'), ({'size': [10, 20], 'counts': [-1, 201]}, 'cannot be'), ({'size': [10, 20], 'counts': [0, 1.5]}, 'cannot be'),
    ({'size': [10, 20], 'counts': '~~~'}, 'broken'), ({'size': [10, 20], 'counts': 'PPPPPPPPPPPP'}, 'broken'), ({'size': [10, 20], 'counts': ''}, '0 pixels'),
    ({'size': [10, 20], 'counts': 'o' * 50}, 'broken'), ({'size': [10, 20], 'counts': 'é'}, 'broken'), ({'size': [10, 20]}, 'needs'),
    ({'size': 10, 'counts': [200]}, 'size'), ({'size': [10, 20], 'counts': 3}, 'neither')])
def test_bad_outlines_are_named(segmentation, word):
    with pytest.raises(KitError, match=word): decode_segmentation(segmentation, 10, 20)

def test_a_bad_outline_names_its_annotation(data):
    write_refer(data, 'refshapes', 'unc', *change(lambda r, i: i['annotations'][0].update(segmentation=[[1, 2]])))
    with pytest.raises(KitError, match='annotation 1'): Refer(data, 'refshapes').mask(1)

def test_polygons_are_clipped_and_united():
    assert decode_segmentation([[-30, -30, 60, -30, 60, 60, -30, 60]], 10, 20).all()
    left = decode_segmentation([[-5, 0, 4, 0, 4, 10, -5, 10]], 10, 20)
    assert left[:, :4].all() and not left[:, 5:].any()
    two = decode_segmentation([[0, 0, 8, 0, 8, 8, 0, 8], [4, 4, 12, 4, 12, 10, 4, 10]], 10, 20)
    assert two[5, 5] and two[1, 1] and two[8, 10] and not two[1, 10]

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_rle_round_trip(h, w, seed, p):
    mask = np.random.default_rng(seed).random((h, w)) < p
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert (decode_rle(packed, h, w) == mask).all()
    assert (decode_rle({'size': [h, w], 'counts': packed['counts'].decode()}, h, w) == mask).all()

@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40))
def test_hostile_rle_strings_never_reach_c(counts):
    try: assert decode_rle({'size': [6, 9], 'counts': counts}, 6, 9).shape == (6, 9)
    except KitError: pass

def test_crowd_annotations(data):
    def crowd(r, i): i['annotations'][0].update(iscrowd=1, segmentation={'size': [10, 20], 'counts': [10, 30, 160]})
    write_refer(data, 'refshapes', 'unc', *change(crowd))
    refer = Refer(data, 'refshapes')
    assert refer.mask(1).sum() == 30 and refer.annotations[1].iscrowd == 1

def test_check_tells_overlap_except_where_it_is_meant(data):
    _, problems = check_dataset(Refer(data, 'refshapes'))
    assert problems == ['train and val share 1 image']
    for name in ('refs(google).p', 'refs(umd).p'): (data/'refshapes'/name).write_bytes(pickle.dumps(REFS, 2))
    table, problems = check_dataset(Refer(data, 'refshapes', by='google'))
    assert problems == [] and 'by design' in table.attrs['notes'][0]

def test_published_counts_of_both_partitions(data):
    write_refer(data, 'refcocog', 'umd', *change(lambda r, i: r[0].update(split='val')))
    (data/'images/train2014').mkdir()
    (data/'images/refshapes/1.png').rename(data/'images/train2014/1.png')
    table, problems = check_dataset(Refer(data, 'refcocog'))
    assert problems == [] and table.loc['all', 'images published'] == 25799
    assert any('26,711' in n for n in table.attrs['notes'])

def test_repeated_sentences_are_a_problem(data):
    def repeat(r, i): r[1].update(split='train', sentences=r[0]['sentences'])
    write_refer(data, 'refshapes', 'unc', *change(repeat))
    assert check_dataset(Refer(data, 'refshapes'))[1] == ['1 sent_ids occur twice']

def test_read_only_folder(data):
    (data/'locked').write_text('a file where a folder should be')
    with pytest.raises(KitError): write_refer(data/'locked', 'refshapes', 'unc', REFS, INSTANCES)

def test_same_bytes_for_same_records(data, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    write_refer(other, 'refshapes', 'unc', REFS, INSTANCES)
    for name in ('refs(unc).p', 'instances.json'): assert (other/'refshapes'/name).read_bytes() == (data/'refshapes'/name).read_bytes()

@needs_micro
def test_micro_refcoco():
    refer = Refer(MICRO, 'refcoco')
    table, problems = check_dataset(refer)
    assert problems == []
    assert table.loc['all', ['images', 'refs', 'sentences']].tolist() == [12, 33, 96]
    assert {s: len(refer.sentences_of(s)) for s in refer.splits()} == {'val': 45, 'testA': 18, 'testB': 33}
    assert table.loc['val', 'sentences published'] == 10834

@needs_micro
def test_micro_masks_agree_with_cocos_areas():
    refer = Refer(MICRO, 'refcoco')
    for r in refer.refs.values():
        assert refer.mask(r.ann_id).sum() == pytest.approx(refer.annotations[r.ann_id].extra['area'], rel=.1)
