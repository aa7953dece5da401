"""The `lts` command: what it prints, and that a mistake gets one sentence and exit status 2."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lts_nb.manual import cli
from lts_nb.evidence.experiments import run_config, run_hashes
from lts_nb.training.metrics import write_predictions
from lts_nb.data.refer import Refer
from lts_nb.training.opening import ensure_backbone, ensure_data
from lts_nb.training.run import prepare, score_run, write_result
from lts_nb.training.train import train_model


@pytest.fixture
def lts(monkeypatch, capsys):
    "Call the command; gives status, out and err."
    def call(*args):
        monkeypatch.setattr('sys.argv', ['lts', *map(str, args)])
        try: status = cli.main() or 0
        except SystemExit as e: status = e.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err)
    return call


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A smoke run, made once."
    out = tmp_path_factory.mktemp('trained')
    config = run_config('lts', 'refshapes', 'smoke')
    ensure_data(config, out/'data')
    ensure_backbone(config, out/'data', out)
    run = prepare(config, out/'data', out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    result = write_result(run, history, score_run(run), run_hashes(config))
    refer = Refer(out/'data', 'refshapes')
    return SimpleNamespace(folder=run.folder, root=out/'data', out=out, result=result, refer=refer, image=refer.image_path(1))


def is_a_sentence(said, *words):
    assert said.status == 2, said
    assert 'Traceback' not in said.err + said.out
    line = said.err.strip().splitlines()[-1]
    assert line.startswith('lts: ') and line.endswith('.'), line
    for word in words: assert word in line, line


def test_micro_data_check(lts, micro):
    said = lts('data', 'check', 'refcoco', '--root', micro)
    assert said.status == 0, said.err
    rows = {line.split()[0]: line.split() for line in said.out.splitlines() if line.startswith(('val', 'testA', 'testB', 'all', 'total'))}
    assert [rows[s][1:4] for s in ('val', 'testA', 'testB')] == [['5', '16', '45'], ['2', '6', '18'], ['5', '11', '33']]
    assert '0 problems.' in said.out


def test_perfect_masks_score_a_hundred(lts, micro, tmp_path):
    refer = Refer(micro, 'refcoco')
    write_predictions(tmp_path/'p.json', [(s.sent_id, refer.mask(r.ann_id)) for r, s in refer.sentences_of('testB')])
    said = lts('score', tmp_path/'p.json', '--dataset', 'refcoco', '--split', 'testB', '--root', micro, '--json')
    metrics = json.loads(said.out)
    assert list(metrics) == ['n', 'oIoU', 'mIoU', 'prec@0.5', 'prec@0.6', 'prec@0.7', 'prec@0.8', 'prec@0.9']
    assert metrics['n'] == 33 and all(v == 100 for k, v in metrics.items() if k != 'n')


def test_evaluate_and_score_agree(lts, trained, tmp_path):
    where = ('--dataset', 'refshapes', '--split', 'testA', '--root', trained.root)
    said = lts('evaluate', '--run', trained.folder, *where, '--predictions', tmp_path/'p.json')
    assert said.status == 0, said.err
    scored = json.loads(lts('score', tmp_path/'p.json', *where, '--json').out)
    assert f"{scored['oIoU']:.2f}" in said.out and f"{scored['mIoU']:.2f}" in said.out


def test_evaluate_on_genuine_photographs(lts, trained, micro):
    said = lts('evaluate', '--run', trained.folder, '--dataset', 'refcoco', '--split', 'val', '--root', micro)
    assert said.status == 0 and 'n         45' in said.out, said


def test_predict_writes_three_pictures(lts, trained, tmp_path):
    said = lts('predict', '--run', trained.folder, '--image', trained.image, '--expression', 'left purple ball', '--out', tmp_path/'m.png')
    assert said.status == 0 and 'purple' in said.err
    sizes = {Image.open(tmp_path/f).size for f in ('m.png', 'm-overlay.png', 'm-prior.png')}
    assert sizes == {Image.open(trained.image).size}
    assert set(np.unique(np.asarray(Image.open(tmp_path/'m.png')))) <= {0, 255}


def test_data_make_and_check(lts, tmp_path):
    made = lts('data', 'make', 'refshapes+', '--preset', 'smoke', '--root', tmp_path/'d')
    assert made.status == 0 and 'fingerprint' in made.out
    assert lts('data', 'make', 'refshapes', '--preset', 'smoke', '--root', tmp_path/'d').out == made.out, 'a second call changes nothing'
    assert lts('data', 'check', 'refshapes', '--root', tmp_path/'d').status == 0
    is_a_sentence(lts('data', 'make', 'refshapes', '--preset', 'smoke', '--seed', 5, '--root', tmp_path/'d'), 'another RefShapes family')


def test_unknown_names_get_their_neighbours(lts, trained, tmp_path):
    is_a_sentence(lts('reproduce', '--preset', 'cqu'), 'cpu')
    is_a_sentence(lts('plan', '--preset', 'smok'), 'smoke')
    is_a_sentence(lts('reproduce', '--preset', 'smoke', '--table', '8', '--out', tmp_path), 'table')
    is_a_sentence(lts('reproduce', '--preset', 'smoke', '--method', 'mcm', '--out', tmp_path), 'mcn')
    is_a_sentence(lts('reproduce', '--preset', 'smoke', '--table', '9', '--out', tmp_path), 'table')
    is_a_sentence(lts('data', 'make', 'refshape'), 'refshapes')
    is_a_sentence(lts('data', 'check', 'refcocco', '--root', tmp_path), 'refcoco')
    is_a_sentence(lts('evaluate', '--run', trained.folder, '--dataset', 'refshapes', '--split', 'vall', '--root', trained.root), 'val')


def test_missing_things_are_named(lts, trained, tmp_path):
    is_a_sentence(lts('reproduce', '--preset', 'paper', '--root', tmp_path, '--out', tmp_path/'o'), 'refcoco', 'yolov3.weights', 'glove')
    is_a_sentence(lts('data', 'check', 'refshapes', '--root', tmp_path/'none'), 'lts data make')
    is_a_sentence(lts('predict', '--run', tmp_path, '--image', trained.image, '--expression', 'x', '--out', tmp_path/'m.png'), 'result.json')
    is_a_sentence(lts('predict', '--run', trained.folder, '--image', tmp_path/'no.png', '--expression', 'ball', '--out', tmp_path/'m.png'), 'no.png')
    is_a_sentence(lts('compare', tmp_path, tmp_path), 'results.csv')


@pytest.mark.parametrize('expression', ['', '   ', '?!', '…'])
def test_an_empty_expression_is_a_sentence(lts, trained, tmp_path, expression):
    is_a_sentence(lts('predict', '--run', trained.folder, '--image', trained.image, '--expression', expression, '--out', tmp_path/'m.png'))


def test_an_expression_of_500_words_is_cut(lts, trained, tmp_path):
    assert lts('predict', '--run', trained.folder, '--image', trained.image, '--expression', 'left ball ' * 250, '--out', tmp_path/'m.png').status == 0


def test_bad_pictures_are_sentences(lts, trained, tmp_path):
    whole = trained.image.read_bytes()
    (tmp_path/'cut.png').write_bytes(whole[:len(whole)//2])
    (tmp_path/'text.png').write_text('no picture')
    for name in ('cut.png', 'text.png'):
        is_a_sentence(lts('predict', '--run', trained.folder, '--image', tmp_path/name, '--expression', 'ball', '--out', tmp_path/'m.png'), name)
    shutil.copy(trained.image, tmp_path/'own.png')
    is_a_sentence(lts('predict', '--run', trained.folder, '--image', tmp_path/'own.png', '--expression', 'ball', '--out', tmp_path/'own.png'), 'over the picture')


def test_a_damaged_run_is_a_sentence(lts, trained, tmp_path):
    copy = tmp_path/'out'
    shutil.copytree(trained.out, copy, ignore=shutil.ignore_patterns('data', 'features'))
    folder = copy/'runs'/trained.folder.name
    weights = next((copy/'shared').glob('backbone-*.safetensors'))
    predict = lambda: lts('predict', '--run', folder, '--image', trained.image, '--expression', 'ball', '--out', tmp_path/'m.png')
    assert predict().status == 0
    whole = (folder/'checkpoint.pt').read_bytes()
    (folder/'checkpoint.pt').write_bytes(whole[:1000])
    is_a_sentence(predict(), 'checkpoint')
    (folder/'checkpoint.pt').write_bytes(whole)
    weights.write_bytes(weights.read_bytes()[:500])
    is_a_sentence(predict(), 'backbone')
    (folder/'result.json').write_text('{')
    is_a_sentence(predict(), 'result.json')


def test_a_hostile_checkpoint_is_refused(lts, trained, tmp_path):
    import pickle
    copy = tmp_path/'out'
    shutil.copytree(trained.out, copy, ignore=shutil.ignore_patterns('data', 'features'))
    target = tmp_path/'touched'
    class Evil:
        def __reduce__(self): return (open, (str(target), 'w'))
    (copy/'runs'/trained.folder.name/'checkpoint.pt').write_bytes(pickle.dumps({'model': Evil()}))
    is_a_sentence(lts('predict', '--run', copy/'runs'/trained.folder.name, '--image', trained.image, '--expression', 'ball', '--out', tmp_path/'m.png'), 'checkpoint')
    assert not target.exists()
