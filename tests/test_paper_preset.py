"""The paper's preset at its full size on genuine expressions: Darknet-53 from a .weights file, vectors from a GloVe file, two steps, scores, report.

The excerpt has no training split; one of its test splits plays that role here. Weights and vectors are drawn: nothing is learnt in two steps."""
import json
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lts_nb.manual import batch
from lts_nb.manual.cli import app
from lts_nb.model.darknet import Darknet53, darknet_floats, save_darknet_weights
from lts_nb.evidence.experiments import run_config, run_hashes, runs_for
from lts_nb.data.refer import Refer
from lts_nb.data.text import build_vocab, tokenize
from lts_nb.training.opening import ensure_backbone, ensure_data
from lts_nb.training.run import prepare, score_run, write_result
from lts_nb.training.train import train_model

lts = lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def write_data(micro, root):
    "RefCOCO as the preset expects it, with testB as training split."
    (root/'refcoco').mkdir(parents=True)
    refs = pickle.loads((micro/'refcoco'/'refs(unc).p').read_bytes())
    for r in refs: r['split'] = {'testB': 'train'}.get(r['split'], r['split'])
    (root/'refcoco'/'refs(unc).p').write_bytes(pickle.dumps(refs, 2))
    shutil.copy(micro/'refcoco'/'instances.json', root/'refcoco')
    (root/'images').symlink_to(micro/'images')


def write_weights(path):
    "Random weights of the size of yolov3.weights up to its neck, with normalisations that fit them."
    torch.manual_seed(0)
    net = Darknet53()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): net.train()(torch.rand(2, 3, 96, 96))
    save_darknet_weights(net, path)
    assert path.stat().st_size == 20 + 4*darknet_floats(net)[1]


def write_vectors(path, words):
    "As glove.840B.300d.txt: 300 numbers, a word of two parts among the others."
    g = torch.Generator().manual_seed(0)
    path.parent.mkdir()
    with open(path, 'w') as f:
        for w in [*words, 'at name@domain.com']: f.write(w + ' ' + ' '.join(f'{x:.4f}' for x in torch.randn(300, generator=g).tolist()) + '\n')


@pytest.fixture(scope='module')
def made(micro, tmp_path_factory):
    "Data, weights and vectors; one run of two steps, scored; its report."
    base = tmp_path_factory.mktemp('paper')
    root, out = base/'data', base/'out'
    write_data(micro, root)
    train = Refer(root, 'refcoco').sentences_of('train')
    words = build_vocab([tokenize(s.sent) for _, s in train]).words[2:]
    (root/'darknet').mkdir()
    write_weights(root/'darknet'/'yolov3.weights')
    write_vectors(root/'glove'/'glove.840B.300d.txt', words[::2])
    config = run_config('lts', 'refcoco', 'paper')
    config = config.replace(train=config.train.replace(epochs=1, epoch_refs=8, batch=4), splits=['val', 'testA'],
                            compute=config.compute.replace(threads=1, score_batch=8))
    ensure_data(config, root), ensure_backbone(config, root, out)
    run = prepare(config, root, out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    result = write_result(run, history, score_run(run), run_hashes(config))
    (out/'plan.json').write_text(json.dumps(plan := batch.make_plan(runs_for('paper', ['2']), ['2'], 1, out, root)))
    batch.make_report(out, plan)
    return SimpleNamespace(root=root, out=out, run=run, config=config, result=result, words=words)


def test_two_steps_at_full_size(made):
    assert made.config.data.size == 416 and made.result['parameters'] > 70e6
    assert [h['samples'] for h in made.result['history']] == [8]
    assert {s: m['n'] for s, m in made.result['metrics'].items()} == {'val': 45, 'testA': 18}
    assert all(0 <= m['oIoU'] <= 100 for m in made.result['metrics'].values())
    assert 85 < made.result['ceiling']['val']['oIoU'] <= 100, 'the grid of H/4 at 416'
    assert made.result['backbone']['file'] == 'yolov3.weights' and made.result['fingerprint']


def test_vectors_are_the_files_and_train(made):
    excerpt, = (made.out/'shared'/'vectors').iterdir()
    assert len(excerpt.read_text().splitlines()) == len(made.words[::2])
    assert made.run.model.language.embed.weight.shape == (len(made.words) + 2, 300)


def test_features_of_the_set_alone(made):
    folder, = (p for p in (made.out/'shared'/'features').iterdir() if p.is_dir())
    assert len(json.loads((folder/'images.json').read_text())) == 12


def test_the_report_says_what_there_is(made):
    page = (made.out/'index.html').read_text()
    assert 'epoch_refs' in page, 'where the configuration departs from the preset'
    assert 'Not the published splits' in page and 'refcoco val 45 of 10,834' in page
    assert (made.out/'table2.csv').exists() and (made.out/'results.csv').read_text().count('\n') > 10


def test_the_plan_misses_nothing_for_this_table(made):
    said = lts('plan', '--preset', 'paper', '--table', 2, '--out', made.out, '--root', made.root).output
    assert 'missing (' not in said and 'stale' in said and '--measure' not in said
    assert 'refcocog is missing' in lts('plan', '--preset', 'paper', '--out', made.out, '--root', made.root).output


def test_it_is_evaluated_and_predicts_by_command(made, micro, tmp_path):
    run = made.out/'runs'/made.config.run
    said = lts('evaluate', '--run', run, '--root', made.root, '--dataset', 'refcoco', '--split', 'testA')
    assert said.exit_code == 0 and abs(float(re.search(r'oIoU +([\d.]+)', said.output)[1]) - made.result['metrics']['testA']['oIoU']) < .2
    picture = next((micro/'images').rglob('*.jpg'))
    said = lts('predict', '--run', run, '--image', picture, '--expression', 'the second zebra from the left', '--root', made.root, '--out', tmp_path/'p.png')
    assert said.exit_code == 0 and (tmp_path/'p.png').stat().st_size > 1000
