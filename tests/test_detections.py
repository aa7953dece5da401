"A user's own detections: what is read, what is refused, and what a result says of them."
import hashlib
import json

import numpy as np
import pytest
import torch

from lts_nb.data.dataset import Samples
from lts_nb.data.refer import Refer
from lts_nb.data.shapes import Recipe, make_family
from lts_nb.errors import KitError
from lts_nb.evidence import experiments
from lts_nb.evidence.experiments import run_config
from lts_nb.model.method import METHODS
from lts_nb.rivals.detections import MOST, STAIN, read_detections
from lts_nb.rivals.proposals import KeptThings, annotated_things
from lts_nb.training.metrics import encode_rle
from test_proposals import Dot


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    make_family(folder, Recipe(seed=5, train=12, val=6, testA=2, testB=2))
    return Refer(folder, 'refshapes')


def val(refer): return sorted({r.image_id for r in refer.refs.values() if r.split == 'val'})


def coco(refer, ids):
    "Every annotated object of some pictures, in COCO's result format."
    out = []
    for a in refer.annotations.values():
        if a.image_id not in ids: continue
        mask = refer.mask(a.ann_id)
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        out.append(dict(image_id=a.image_id, category_id=a.category_id, score=.9, bbox=[float(v) for v in box], segmentation=encode_rle(mask)))
    return out


def mattnet(refer, records):
    "The same as MAttNet's `_masks.json`."
    return [dict(det_id=k, h5_id=k, image_id=r['image_id'], box=r['bbox'], category_id=r['category_id'], score=r['score'],
                 category_name=refer.categories[r['category_id']], rle=r['segmentation']) for k, r in enumerate(records)]


def write(folder, records):
    path = folder/'detections.json'
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize('form', ['COCO', 'MAttNet'])
def test_both_formats_give_the_annotated_things_back(form, made, tmp_path):
    records = coco(made, val(made))
    if form == 'MAttNet': records = mattnet(made, records)
    path = write(tmp_path, records)
    arrays, told = read_detections(path, made, val(made), 128)
    known = annotated_things(made, val(made), 128)
    for name in ('image_id', 'first', 'kinds', 'masks'): assert (arrays[name] == known[name]).all(), name
    np.testing.assert_allclose(arrays['boxes'], known['boxes'], atol=1e-4)
    assert told == dict(file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), format=form, pictures=len(val(made)), things=len(records), note=STAIN)
    assert read_detections(path, made, val(made), 128, clean=True)[1]['note'] == ''


def test_other_pictures_of_the_data_set_are_left_out(made, tmp_path):
    everything = coco(made, sorted(made.images))
    arrays, told = read_detections(write(tmp_path, everything), made, val(made), 128)
    assert told['pictures'] == len(val(made)) and set(arrays['image_id']) == set(val(made)) and told['things'] < len(everything)


def test_unsure_detections_are_left_out_but_for_one(made, tmp_path):
    records = coco(made, val(made))
    for k, r in enumerate(records): r['score'] = .5 if r['image_id'] == val(made)[0] else [.9, .3][k % 2]
    arrays, _ = read_detections(write(tmp_path, records), made, val(made), 128, theta=.65)
    kept = KeptThings(arrays, 128)
    assert (arrays['scores'] >= .5).all() and all(kept.lines(i).stop > kept.lines(i).start for i in val(made))
    assert kept.lines(val(made)[0]).stop - kept.lines(val(made)[0]).start > 1


def broken(made):
    "{what: (records, part of the sentence)}"
    sound = coco(made, val(made))
    def one(**changes): return [sound[0] | changes, *sound[1:]]
    def other(r, **changes): return r | {'segmentation': r['segmentation'] | changes}
    h, w = sound[0]['segmentation']['size']
    empty = other(sound[0], counts=[h*w])
    return {
        'a missing picture': ([r for r in sound if r['image_id'] != val(made)[0]], '1 of 6 pictures have no detection'),
        'turned mask': ([other(sound[0], size=[w + 1, h]), *sound[1:]], 'size'),
        'empty mask': ([empty, *sound[1:]], 'empty'),
        'broken RLE': ([other(sound[0], counts='~'), *sound[1:]], 'RLE'),
        'category': (one(category_id=91), 'unknown category'),
        'category name': (one(category_name='giraffe'), "calls category"),
        'score': (one(score=float('nan')), 'no finite score'), 'endless score': (one(score=10**400), 'no finite score'),
        'text as score': (one(score='high'), 'no finite score'), 'box': (one(bbox=[0, 0, -1, 5]), 'without a size'),
        'box of text': (one(bbox='a'), 'no box'), 'half a box': (one(bbox=[0, float('inf'), 1, 5]), 'no box'),
        'foreign picture': (one(image_id=10**9), 'does not have'), 'copy': (sound + sound[:1], 'twice'),
        'no mask': (one(segmentation=None), '_masks'), 'polygons': (one(segmentation=[[0, 0, 4, 0, 4, 4]]), 'no mask'),
        'no record': ([*sound, 7], 'is no record'), 'nothing': ([], 'no list'), 'no list': ({'a': 1}, 'no list'),
        'crowd': (sound + [r | {'score': k/10**5} for k in range(MOST + 1) for r in sound[:1]], 'more than')}


@pytest.mark.parametrize('what', ['a missing picture', 'turned mask', 'empty mask', 'broken RLE', 'category', 'category name', 'score', 'endless score', 'text as score', 'box',
                                  'box of text', 'half a box', 'foreign picture', 'copy', 'no mask', 'polygons', 'no record', 'nothing', 'no list', 'crowd'])
def test_what_is_not_right_is_refused_in_a_sentence(what, made, tmp_path):
    records, said = broken(made)[what]
    path = write(tmp_path, records)
    if what == 'endless score': path.write_text(path.read_text().replace(str(10**400), '1' + '0'*400))
    with pytest.raises(KitError, match=said) as e: read_detections(path, made, val(made), 128)
    assert e.value.where == str(path)


def test_a_det_id_occurs_once(made, tmp_path):
    records = mattnet(made, coco(made, val(made)))
    records[1]['det_id'] = 0
    with pytest.raises(KitError, match='twice'): read_detections(write(tmp_path, records), made, val(made), 128)


def test_a_file_that_is_no_json(made, tmp_path):
    (tmp_path/'x').write_bytes(b'PK\3\4\xff')
    with pytest.raises(KitError, match='no JSON'): read_detections(tmp_path/'x', made, val(made), 128)
    (tmp_path/'x').write_text('['*100_000)
    with pytest.raises(KitError, match='no JSON'): read_detections(tmp_path/'x', made, val(made), 128)
    with pytest.raises(KitError, match='cannot be read'): read_detections(tmp_path/'gone', made, val(made), 128)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A finished run of a method that chooses."
    from lts_nb.training.opening import ensure_backbone, ensure_data
    from lts_nb.training.run import prepare, score_run, write_result
    from lts_nb.training.train import train_model
    patch = pytest.MonkeyPatch()
    patch.setitem(METHODS, 'dot', Dot())
    patch.setitem(experiments.EXPERIMENTS, 'dot', dict(method='dot'))
    out = tmp_path_factory.mktemp('report')
    config = run_config('dot', 'refcoco', 'smoke').replace(splits=('val',))
    ensure_data(config, out/'data'), ensure_backbone(config, out/'data', out)
    run = prepare(config, out/'data', out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    result = write_result(run, history, score_run(run), {})
    yield run, result
    patch.undo()


def test_a_run_is_evaluated_on_detections_that_it_finds_or_is_given(trained, tmp_path):
    from lts_nb.manual.predict import evaluate_run, load_run, predict
    run, result = trained
    root = run.out/'data'
    # its own candidates, found anew, give what the run has written down
    again = evaluate_run(run.folder, root, 'refshapes', 'val')
    assert again['oIoU'] == pytest.approx(result['metrics']['val']['oIoU'], abs=1e-6) and 'note' not in again
    # a detector that knows everything gives what the annotated objects give
    ids = val(run.refer)
    path = write(tmp_path, coco(run.refer, ids))
    given = evaluate_run(run.folder, root, 'refshapes', 'val', detections=path)
    assert given['oIoU'] == pytest.approx(result['finishes']['truth']['val']['oIoU'], abs=.5)
    assert given['recall@0.5'] == 100 and given['note'] == STAIN and given['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    # one picture
    mask, prior = predict(load_run(run.folder), run.refer.open_image(ids[0]), 'the ball')
    assert mask.any() and prior is None


def test_the_command_prints_the_mark(trained, tmp_path):
    from typer.testing import CliRunner
    from lts_nb.manual.cli import app
    run, _ = trained
    path = write(tmp_path, coco(run.refer, val(run.refer)))
    call = ['evaluate', '--run', str(run.folder), '--dataset', 'refshapes', '--split', 'val', '--root', str(run.out/'data'), '--detections', str(path)]
    said = CliRunner().invoke(app, call)
    assert said.exit_code == 0 and STAIN in said.output and 'sha256' in said.output
    assert STAIN not in CliRunner().invoke(app, [*call, '--clean']).output


def test_methods_that_do_not_choose_take_no_detections(made, tmp_path):
    from lts_nb.manual.predict import evaluate_run
    with pytest.raises(KitError, match='does not choose'):
        evaluate_run(None, made.root, 'refshapes', 'val', detections=write(tmp_path, coco(made, val(made))))


def test_a_run_that_rests_on_a_file(trained):
    from lts_nb.training.run import prepare
    run, _ = trained
    root = run.out/'data'
    (root/'mine.json').write_text(json.dumps(coco(run.refer, val(run.refer))))
    head = run.config.head.replace(detections='mine.json')
    config = run.config.replace(head=head, run='dot-mine')
    mine = prepare(config, root, run.out)
    assert mine.things['file'] == str(root/'mine.json') and mine.things['note'] == STAIN
    things = mine.detected(val(run.refer))
    assert (things.scores.max() == .9) and torch.equal(things.masks, mine.source.annotated(val(run.refer)).masks)
    for bad in ('/etc/passwd', '../x.json'):
        with pytest.raises(KitError): run.config.head.replace(detections=bad)
