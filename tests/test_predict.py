"A run used outside its own tables: moved, damaged, on other data, on pictures of every kind."
import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageOps

from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config, run_hashes
from lts_nb.training.metrics import score_predictions
from lts_nb.manual.predict import evaluate_run, load_run, overlay, predict, predict_file, read_picture, reading_notes
from lts_nb.data.refer import Refer, decode_rle
from lts_nb.training.opening import ensure_backbone, ensure_data
from lts_nb.training.run import prepare, score_run, write_result
from lts_nb.training.train import train_model


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two smoke runs, made once: the whole model, and one without a position prior."
    out, folders = tmp_path_factory.mktemp('runs'), {}
    for experiment in ('lts', 'fusion-seg'):
        config = run_config(experiment, 'refshapes', 'smoke')
        ensure_data(config, out/'data')
        ensure_backbone(config, out/'data', out)
        run = prepare(config, out/'data', out)
        history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
        write_result(run, history, score_run(run), run_hashes(config))
        folders[experiment] = run.folder
    refer = Refer(out/'data', 'refshapes')
    return SimpleNamespace(out=out, root=out/'data', lts=folders['lts'], plain=folders['fusion-seg'], refer=refer,
                           picture=refer.image_path(1), run=load_run(folders['lts']))


@pytest.fixture
def copy(made, tmp_path):
    "A copy of the report's folder, to be damaged; gives the run's folder in it."
    shutil.copytree(made.out, tmp_path/'moved', ignore=shutil.ignore_patterns('data', 'features'))
    return tmp_path/'moved'/'runs'/made.lts.name


@pytest.mark.parametrize('which, dataset, split', [('lts', 'refshapes', 'val'), ('plain', 'refshapes', 'testB'), ('lts', 'refshapesg', 'val'), ('lts', 'refshapes+', 'testA')])
def test_evaluation_says_what_its_own_file_scores(made, tmp_path, which, dataset, split):
    metrics = evaluate_run(getattr(made, which), made.root, dataset, split, predictions=tmp_path/'new'/'p.json')
    scored = score_predictions(tmp_path/'new'/'p.json', Refer(made.root, dataset), split)
    assert {k: v for k, v in metrics.items() if k != 'pointing'} == scored
    assert (metrics['pointing'] is None) == (which == 'plain')


def test_predicting_is_what_evaluation_does(made, tmp_path):
    evaluate_run(made.lts, made.root, 'refshapes', 'testB', predictions=tmp_path/'p.json')
    found = {p['sent_id']: p['segmentation'] for p in json.loads((tmp_path/'p.json').read_text())}
    for ref, s in made.refer.sentences_of('testB')[:12]:
        mask, _ = predict(made.run, made.refer.open_image(ref.image_id), s.sent)
        assert (mask != decode_rle(found[s.sent_id], *mask.shape)).mean() < 1e-3


def test_a_run_is_found_by_a_relative_path_and_after_a_move(made, copy, monkeypatch):
    monkeypatch.chdir(copy)
    assert load_run('.').folder == copy
    monkeypatch.chdir(copy.parent)
    moved, ours = load_run(copy.name).model.state_dict(), made.run.model.state_dict()
    assert all(torch.equal(moved[k], ours[k]) for k in ours)


def test_no_gradient_and_no_training_mode(made):
    assert not any(m.training for m in [*made.run.model.modules(), *made.run.backbone.modules()])
    a, b = (predict(made.run, made.refer.open_image(1), 'left ball')[1] for _ in range(2))
    assert (a == b).all() and isinstance(a, np.ndarray)


def damage(name, content):
    def do(folder): (folder/name).write_bytes(content)
    return do

def edit(change):
    def do(folder):
        result = json.loads((folder/'result.json').read_text())
        change(result)
        (folder/'result.json').write_text(json.dumps(result))
    return do

@pytest.mark.parametrize('do, word', [
    (lambda f: (f/'result.json').unlink(), 'not finished'), (lambda f: shutil.rmtree(f), 'result of the run is not there'),
    (lambda f: (f/'vocab.json').unlink(), 'vocabulary of the run is not there'), (lambda f: (f/'checkpoint.pt').unlink(), 'checkpoint of the run is not there'),
    (lambda f: next((f.parents[1]/'shared').glob('backbone-*.safetensors')).unlink(), 'backbone of the run is not there'),
    (damage('result.json', b''), 'cannot be read'), (damage('result.json', b'\xff\xfe'), 'cannot be read'), (damage('result.json', b'[1]'), 'no configuration'),
    (damage('vocab.json', b'\xff'), 'vocabulary of the run cannot be read'), (damage('vocab.json', b'{}'), 'vocabulary'),
    (damage('vocab.json', b'["<pad>", "<unk>", "ball"]'), 'checkpoint cannot be read'), (damage('checkpoint.pt', b''), 'checkpoint cannot be read'),
    (edit(lambda r: r.pop('config')), 'no configuration'), (edit(lambda r: r['config'].pop('backbone')), "no model of this kit.*'backbone' is missing"),
    (edit(lambda r: r['config']['model'].update(novelty=1)), 'novelty'), (edit(lambda r: r['config'].update(data=3)), 'no model of this kit.*data must be'),
    (edit(lambda r: r['config']['model'].update(gru_dim=18)), 'checkpoint cannot be read')])
def test_a_damaged_run_is_named(copy, do, word):
    do(copy)
    with pytest.raises(KitError, match=word): load_run(copy)


def test_a_file_in_place_of_a_run(tmp_path):
    (tmp_path/'run').write_text('')
    with pytest.raises(KitError, match='not there'): load_run(tmp_path/'run')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB'])
def test_pictures_of_every_mode(tmp_path, mode):
    path = tmp_path/'a.tif'
    PIL.Image.new('RGB', (7, 5), 'white').convert('RGB' if mode in ('HSV', 'LAB') else mode).save(path)
    assert read_picture(path).shape == (5, 7, 3) and read_picture(path).dtype == np.uint8 and read_picture(path).mean() > 250


def test_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(3, 0)
    PIL.Image.fromarray(ramp).save(tmp_path/'a.png')
    assert (read_picture(tmp_path/'a.png') == np.arange(256, dtype=np.uint8)[None, :, None]).all()
    PIL.Image.fromarray(ramp.astype(np.float32)).save(tmp_path/'a.tif')
    with pytest.raises(KitError, match='32-bit'): read_picture(tmp_path/'a.tif')


@pytest.mark.parametrize('turn', [0, *range(1, 9), 9, 60000])
def test_a_picture_lies_as_it_is_shown(tmp_path, turn):
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)).save(tmp_path/'a.jpg', exif=exif)
    with PIL.Image.open(tmp_path/'a.jpg') as im: shown = np.asarray(ImageOps.exif_transpose(im))
    assert (read_picture(tmp_path/'a.jpg') == shown).all()


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
def test_damaged_exif_is_a_sentence_or_none(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010e] = 6, 'a picture'
    PIL.Image.new('RGB', (9, 6)).save(tmp_path/'whole.jpg', exif=exif)
    whole, at = bytearray((tmp_path/'whole.jpg').read_bytes()), 20
    draw = np.random.default_rng(1)
    for _ in range(150):
        raw = whole.copy()
        for i in draw.integers(at, at + 60, 3): raw[i] = draw.integers(256)
        (tmp_path/'a.jpg').write_bytes(raw)
        try: assert read_picture(tmp_path/'a.jpg').shape[2] == 3
        except KitError: pass


@pytest.mark.parametrize('shape', [(1, 1), (1, 400), (400, 1), (3, 2000), (333, 500)])
def test_pictures_of_every_shape(made, shape):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    mask, prior = predict(made.run, image, 'the ball on the left')
    assert mask.shape == prior.shape == shape and 0 <= prior.min() <= prior.max() <= 1


def test_what_is_not_read_is_told(made):
    assert reading_notes(made.run, 'left ball') == []
    assert reading_notes(made.run, 'zzz ball zzz') == ['Words the run never met: zzz.']
    assert reading_notes(made.run, 'left ball ' * 250) == ['Only the first 15 of 500 words are read.']
    image = made.refer.open_image(1)
    long, cut = (predict(made.run, image, 'left ball ' * n)[1] for n in (250, 8))
    assert (long == predict(made.run, image, ('left ball ' * 8)[:-6])[1]).all() and long.shape == cut.shape


@pytest.mark.parametrize('expression', ['', ' ', '?!', '…', '-/-'])
def test_an_expression_without_words(made, tmp_path, expression):
    with pytest.raises(KitError, match='no word'): predict_file(made.run, made.picture, expression, tmp_path/'m.png')
    assert not list(tmp_path.iterdir())


def test_the_pictures_that_are_written(made, tmp_path):
    files = predict_file(made.lts, made.picture, 'left ball', tmp_path/'new'/'m.png')
    assert [f.name for f in files] == ['m.png', 'm-overlay.png', 'm-prior.png'] 
    assert len(list((tmp_path/'new').iterdir())) == 3
    mask, prior = predict(made.run, read_picture(made.picture), 'left ball')
    assert (np.asarray(PIL.Image.open(files[0])) == mask*255).all()
    assert (np.asarray(PIL.Image.open(files[1])) == overlay(read_picture(made.picture), mask)).all()
    assert len(predict_file(made.plain, made.picture, 'left ball', tmp_path/'p.png')) == 2 and not (tmp_path/'p-prior.png').exists()


@pytest.mark.parametrize('name', ['m.png', 'm-overlay.png', 'm-prior.png'])
def test_the_picture_itself_is_never_written_over(made, tmp_path, name):
    shutil.copy(made.picture, tmp_path/name)
    (tmp_path/'link.png').symlink_to(tmp_path/name)
    for given in (tmp_path/name, tmp_path/'link.png', tmp_path/'..'/tmp_path.name/name):
        with pytest.raises(KitError, match='over the picture'): predict_file(made.run, given, 'ball', tmp_path/'m.png')
    assert (tmp_path/name).read_bytes() == made.picture.read_bytes() and len(list(tmp_path.iterdir())) == 2


def test_places_that_cannot_be_written(made, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    (tmp_path/'m.png').mkdir()
    for out in (tmp_path/'file'/'m.png', tmp_path/'m.png'):
        with pytest.raises(KitError): predict_file(made.run, made.picture, 'ball', out)
    with pytest.raises(KitError, match='PNG'): predict_file(made.run, made.picture, 'ball', tmp_path/'m.jpg')
    monkeypatch.setattr('lts_nb.manual.predict.evaluate', lambda *a, **k: pytest.fail('the work was done before the place was looked at'))
    for out in (tmp_path/'file'/'p.json', tmp_path/'m.png'):
        with pytest.raises(KitError): evaluate_run(made.lts, made.root, 'refshapes', 'val', predictions=out)


def test_names_are_checked_before_the_run_is_opened(made):
    for dataset, split, word in (('refshape', 'val', 'refshapes'), ('refshapes', 'vall', 'val'), ('refcoco', 'val', 'not there')):
        with pytest.raises(KitError, match=word): evaluate_run(made.lts, made.root, dataset, split)


def test_a_truncated_image_stops_the_evaluation_by_name(made, tmp_path):
    shutil.copytree(made.root, tmp_path/'data')
    refer = Refer(tmp_path/'data', 'refshapes')
    path = refer.image_path(refer.refs_of('val')[0].image_id)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(KitError, match=path.name): evaluate_run(made.lts, tmp_path/'data', 'refshapes', 'val', predictions=tmp_path/'p.json')
    assert not (tmp_path/'p.json').exists()


def test_the_detections_are_never_written_over(made, tmp_path):
    mine = tmp_path/'mine.json'
    mine.write_text('[]')
    (tmp_path/'d').mkdir()
    with pytest.raises(KitError, match='written over the detections'):
        evaluate_run(made.lts, made.root, 'refshapes', 'val', predictions=tmp_path/'d'/'..'/'mine.json', detections=mine)
    assert mine.read_text() == '[]'


def test_a_run_that_was_merged_without_its_weights_is_not_to_be_deleted(copy):
    "Its sentences are another machine's hours."
    (copy/'vocab.json').unlink()
    with pytest.raises(KitError, match="Delete the run's folder"): load_run(copy)
    (copy/'merged.json').write_text('{}')
    with pytest.raises(KitError, match='ask for its folder'): load_run(copy)
