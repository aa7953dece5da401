"Bad input through the command line: exit status 2, one sentence that says what, where and how to mend it, no traceback."
import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import PIL.Image
import pytest

from lts_nb.evidence.experiments import Cells
from lts_nb.manual import batch, cli
from lts_nb.errors import KitError
from lts_nb.training.metrics import write_predictions
from lts_nb.data.refer import Refer, write_refer

REFS = [dict(ref_id=k, ann_id=k, image_id=k, category_id=1, split=split, sentences=[dict(sent_id=10*k, sent='left square', raw='left square', tokens=['left', 'square'])])
        for k, split in ((1, 'train'), (2, 'val'))]
INSTANCES = dict(images=[dict(id=k, file_name=f'{k}.png', width=20, height=10) for k in (1, 2)], categories=[dict(id=1, name='square')],
    annotations=[dict(id=k, image_id=k, category_id=1, iscrowd=0, bbox=[1, 1, 5, 5], segmentation=[[k, 1, k+5, 1, k+5, 6, k, 6]]) for k in (1, 2)])


def write(root, change=lambda refs, instances: None):
    refs, instances = copy.deepcopy(REFS), copy.deepcopy(INSTANCES)
    change(refs, instances)
    write_refer(root, 'refshapes', 'unc', refs, instances)


@pytest.fixture
def data(tmp_path):
    "A data set of two images, sound, and perfect predictions for it."
    write(tmp_path/'data')
    (tmp_path/'data'/'images'/'refshapes').mkdir(parents=True)
    for k in (1, 2): PIL.Image.new('RGB', (20, 10), 'navy').save(tmp_path/'data'/'images'/'refshapes'/f'{k}.png')
    write_predictions(tmp_path/'p.json', [(20, Refer(tmp_path/'data', 'refshapes').mask(2))])
    return tmp_path/'data'


@pytest.fixture
def lts(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr('sys.argv', ['lts', *map(str, args)])
        status = 0
        try: cli.main()
        except SystemExit as e: status = e.code or 0
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())
    return call


def assert_sentence(said, *words, status=2):
    assert said.status == status, said
    assert 'Traceback' not in said.err + said.out and said.out == ''
    assert said.err.startswith('lts: ') and said.err.endswith('.\n') and said.err.count('\n') == 1 and '..' not in said.err.replace('/..', ''), said.err
    for word in words: assert word in said.err, said.err


NOWHERE = ('--root', '/nonexistent')
@pytest.mark.parametrize('args, words', [
    (['plan', '--preset', 'cpuu'], ['preset', 'cpu']), (['reproduce', '--preset', 'papr'], ['paper']), (['report', '--preset', 'smok'], ['smoke']),
    (['data', 'make', 'refshapes', '--preset', 'gpuu'], ['gpu']), (['plan', '--table', '9'], ['table', '7']), (['reproduce', '--table', '8'], ['table']), (['reproduce', '--method', 'mcm'], ['mcn']),
    (['report', '--table', '8'], ['table']), (['plan', '--table', '5', '--method', 'mcn'], ['no row of these tables', 'table 5: mcn', 'Leave out']),
    (['reproduce', '--table', '5', '--method', 'mcn'], ['no row of these tables']), (['data', 'make', 'refshape+'], ['refshapes+']), (['data', 'make', 'refcoco'], ['refcoco', 'refshapes']),
    (['data', 'make', 'refshapes', '--preset', 'paper'], ['published data', 'smoke']), (['data', 'check', 'refcocogg', *NOWHERE], ['refcocog']),
    (['data', 'check', 'refshapes', *NOWHERE], ['/nonexistent/refshapes', 'lts data make refshapes']), (['data', 'check', 'refcoco', *NOWHERE], ['lts data fetch refcoco']),
    (['score', 'none.json', '--dataset', 'refshapes', '--split', 'val', *NOWHERE], ['not there']),
    (['evaluate', '--run', 'none', '--dataset', 'refcoco', '--split', 'val', *NOWHERE], ['not there']),
    (['predict', '--run', 'none', '--image', 'a.png', '--expression', 'ball', '--out', 'm.png'], ['none/result.json', 'lts plan']),
    (['reproduce', '--preset', 'paper', *NOWHERE], ['yolov3.weights', 'lts data fetch darknet', 'lts data fetch refcocog', '--only-needed', 'lts data fetch glove']), (['report', '--preset', 'smoke', '--out', '/nonexistent'], ['lts reproduce']),
    (['compare', '/nonexistent', '/nonexistent'], ['results.csv', 'lts reproduce'])], ids=lambda v: ' '.join(v)[:40])
def test_names_and_places(lts, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    assert_sentence(lts(*args), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('change, word', [
    (lambda r, i: i['annotations'][1].update(segmentation=[[50, 50, 60, 50, 60, 60]]), 'outside the image'),
    (lambda r, i: i['annotations'][1].update(segmentation=[[1, 1, 5, 5]]), 'fewer than three'),
    (lambda r, i: i['annotations'][1].update(segmentation=[[1, 1, 1, 1, 1, 1]]), 'mask is empty'),
    (lambda r, i: i['annotations'][1].update(segmentation={'size': [10, 20], 'counts': '~~'}), 'broken')])
def test_outlines(lts, data, change, word):
    write(data, change)
    assert_sentence(lts('score', data.parent/'p.json', '--dataset', 'refshapes', '--split', 'val', '--root', data), word, 'annotation 2', 'instances.json')
    said = lts('data', 'check', 'refshapes', '--root', data)
    assert said.status == 1 and 'Traceback' not in said.err and 'PROBLEM: ' in said.err and word in said.err and 'annotation 2' in said.err
    assert said.out.strip().endswith('1 problem.')


@pytest.mark.parametrize('do, word', [
    (lambda p: p.unlink(), 'missing'), (lambda p: p.write_bytes(p.read_bytes()[:45]), 'truncated'), (lambda p: p.write_text('<html>'), 'no image'),
    (lambda p: PIL.Image.new('RGB', (9, 9)).save(p), '9×9')])
def test_images(lts, data, do, word):
    do(data/'images'/'refshapes'/'2.png')
    said = lts('data', 'check', 'refshapes', '--root', data)
    assert said.status == 1 and '2.png' in said.err and word in said.err and 'Traceback' not in said.err


def test_an_empty_sentence_is_a_problem(lts, data):
    write(data, lambda r, i: r[1]['sentences'][0].update(sent='', tokens=[]))
    said = lts('data', 'check', 'refshapes', '--root', data)
    assert said.status == 1 and 'sentence 20 (ref 2) is empty' in said.err


def test_a_sound_data_set(lts, data):
    said = lts('data', 'check', 'refshapes', '--root', data)
    assert said.status == 0 and said.err == '' and '0 problems' in said.out
    said = lts('score', data.parent/'p.json', '--dataset', 'refshapes', '--split', 'val', '--root', data, '--json')
    assert json.loads(said.out) == {'n': 1, 'oIoU': 100, 'mIoU': 100, **{f'prec@0.{t}': 100 for t in (5, 6, 7, 8, 9)}} and said.err == ''


@pytest.mark.parametrize('rows, words', [
    ([], ['1 of 1', 'sent_id 20']), ([{'sent_id': 21, 'segmentation': {}}], ['sent_id 20']), ([{'sent_id': 20}], ['entry 0']),
    ([{'sent_id': 20, 'segmentation': {'size': [20, 10], 'counts': [200]}}], ['sent_id 20', 'size']),
    ([{'sent_id': 20, 'segmentation': {'size': [10, 20], 'counts': '~'}}], ['sent_id 20', 'broken']), ({}, ['no list'])])
def test_predictions_of_strangers(lts, data, rows, words):
    (data.parent/'p.json').write_text(json.dumps(rows))
    assert_sentence(lts('score', data.parent/'p.json', '--dataset', 'refshapes', '--split', 'val', '--root', data), 'p.json', *words)


def test_a_pickle_that_runs_code_is_refused(lts, data):
    (data/'refshapes'/'refs(unc).p').write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert_sentence(lts('data', 'check', 'refshapes', '--root', data), 'os.system')


def test_damage_to_the_manifest(lts, tmp_path):
    (tmp_path/'refshapes.json').write_text('{')
    assert_sentence(lts('data', 'make', 'refshapes', '--preset', 'smoke', '--root', tmp_path), 'refshapes.json', 'lts data make')


@pytest.mark.parametrize('args', [['data', 'make', 'refshapes', '--root', 'DIR'], ['reproduce', '--out', 'DIR']], ids=' '.join)
def test_a_folder_that_cannot_be_made(lts, tmp_path, args):
    (tmp_path/'file').write_text('')
    assert_sentence(lts(*[str(tmp_path/'file'/'d') if a == 'DIR' else a for a in args], '--preset', 'smoke'), str(tmp_path/'file'))


def test_a_worker_process_that_cannot_write(lts, tmp_path):
    (tmp_path/'images'/'refshapes'/'RefShapes_000001.png').mkdir(parents=True)
    said = lts('data', 'make', 'refshapes', '--preset', 'smoke', '--root', tmp_path)
    assert said.status == 2 and said.err.startswith('lts: writing failed') and said.err.count('\n') == 1 and 'images/refshapes' in said.err
    assert not (tmp_path/'refshapes.json').exists()


def test_an_error_from_a_worker_process_reads_the_same():
    e = KitError('the folder cannot be written', '/somewhere', 'Choose another')
    assert str(pickle.loads(pickle.dumps(e))) == str(e)


@pytest.mark.parametrize('number, word', [(errno.ENOSPC, 'no space'), (errno.EROFS, 'cannot be written')])
def test_the_disk_refuses_anywhere(lts, monkeypatch, number, word):
    def refuse(*args): raise OSError(number, os.strerror(number), '/somewhere/file')
    monkeypatch.setattr(batch, 'reproduce', refuse)
    assert_sentence(lts('reproduce'), word, '/somewhere/file')


def test_ctrl_c(lts, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(batch, 'reproduce', interrupt)
    assert_sentence(lts('reproduce'), 'Run the same command again', status=130)


def test_a_mistake_of_ours_is_not_hidden(lts, monkeypatch):
    def fail(*args): raise ZeroDivisionError
    monkeypatch.setattr(batch, 'reproduce', fail)
    with pytest.raises(ZeroDivisionError): lts('reproduce')


@pytest.mark.parametrize('status', [0, 1])
def test_the_status_of_the_runs_is_the_status_of_the_command(lts, monkeypatch, status):
    seen = []
    monkeypatch.setattr(batch, 'reproduce', lambda *args: seen.append(args) or status)
    assert lts('reproduce', '--table', '4', '--table', '1', '--seeds', '3', '--cores', '2').status == status
    assert seen == [('cpu', Cells(tables=('4', '1')), 3, 2, None, None, False)]


def test_planning_changes_nothing(lts, tmp_path):
    said = lts('plan', '--preset', 'smoke', '--out', tmp_path/'out', '--root', tmp_path/'data')
    assert said.status == 0 and 'missing' in said.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize('args', [['nonsense'], ['plan', '--seeds', '0'], ['plan', '--cores', 'two'], ['score'], ['data', 'check', 'refcoco'], ['plan', '--nonsense']], ids=' '.join)
def test_usage(lts, args):
    said = lts(*args)
    assert said.status == 2 and said.err.startswith('Usage: ') and 'Traceback' not in said.err


def test_the_help_is_quick_and_plain():
    code = "import sys; from lts_nb.manual import cli; sys.argv = ['lts', '--help']\ntry: cli.main()\nfinally: print([m for m in ('torch', 'pandas', 'matplotlib', 'rich') if m in sys.modules], file=sys.stderr)"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'FORCE_COLOR': '1', 'COLUMNS': '80'})
    assert said.returncode == 0 and said.stderr.strip() == '[]', said.stderr
    assert '\x1b' not in said.stdout and all(c in said.stdout for c in ('reproduce', 'plan', 'compare', 'data', 'evaluate', 'score', 'predict'))


def test_the_version(lts):
    import lts_nb
    assert lts('--version').out.strip() == lts_nb.__version__
