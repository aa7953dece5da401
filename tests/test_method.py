"""A method in its own lines: registered here, trained on smoke, scored, predicted with, and shown in a table."""
import json

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from lts_nb.data.dataset import TARGETS
from lts_nb.data.refer import Refer
from lts_nb.errors import KitError
from lts_nb.evidence import experiments
from lts_nb.evidence.experiments import Row, run_config, run_hashes, run_modules, runs_for
from lts_nb.evidence.report import wanted_rows, write_report
from lts_nb.evidence.tables import load_results, paper_table
from lts_nb.manual import batch
from lts_nb.manual.predict import evaluate_run, load_run, predict
from lts_nb.model.losses import bce
from lts_nb.model.method import METHODS, Method, register
from lts_nb.settings import Config
from lts_nb.training.opening import ensure_backbone, ensure_data
from lts_nb.training.run import prepare, score_run, write_result
from lts_nb.training.train import train_model


class ToyConfig(Config):
    "Settings of the toy."
    part = 'toy'
    width: int = Field(8, ge=1, le=64, description='channels')


class ToyNet(nn.Module):
    "One product of sentence and picture, and a box that nobody asked LTS for."
    def __init__(self, cfg, channels, words):
        super().__init__()
        self.embed = nn.Embedding(words, cfg.width, padding_idx=0)
        self.look = nn.Conv2d(channels[1], cfg.width, 1)
        self.box = nn.Linear(cfg.width, 4)
    def forward(self, features, tokens, lengths):
        sentence = self.embed(tokens).sum(1)
        cells = self.look(features[1])
        product = (cells*sentence[:, :, None, None]).sum(1, keepdim=True)
        return nn.functional.interpolate(product, scale_factor=2), self.box(sentence).sigmoid()


class Toy(Method):
    "Everything that this file adds to the kit."
    name, title, config = 'toy', 'Toy', ToyConfig
    needs, threshold, notes = ('prior', 'box'), .4, ('It learns from boxes too.',)
    widths = {'smoke': {'width': 4}}
    seen, letters = [], []
    def build(self, cfg, channels, vocab, vectors=None, tail=None): return ToyNet(cfg, channels, len(vocab))
    def loss(self, cfg, out, batch):
        masks, boxes = bce(out[0], batch['prior']), (out[1] - batch['box']).abs().mean()
        self.seen.append(sorted(k for k in batch if k in TARGETS))
        return masks + boxes, {'masks': masks.detach(), 'boxes': boxes.detach()}
    def probability(self, out): return out[0].float().sigmoid()
    def stride(self, cfg): return 8
    finishes = 'strip', 'plain'
    def inputs(self, cfg, sentences): return {'letters': torch.tensor([len(''.join(s)) for s in sentences])}
    def forward(self, model, features, batch):
        # a summary has no words, so it has no inputs either
        if 'letters' in batch: self.letters.append(batch['letters'].shape == batch['lengths'].shape)
        return super().forward(model, features, batch)
    def finish(self, cfg, name, out, size):
        assert name == 'strip'
        # a strip at the left edge is always object: nobody else would do that
        big = nn.functional.interpolate(self.probability(out), size=(size, size), mode='bilinear')
        big[..., :size//4] = 1.
        return big


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The toy as a row of Table 1: one registered method, one line of experiments, one line of rows."
    out = tmp_path_factory.mktemp('toy')
    patch = pytest.MonkeyPatch()
    patch.setitem(METHODS, 'toy', Toy())
    patch.setitem(experiments.EXPERIMENTS, 'toy', {'method': 'toy'})
    patch.setattr(experiments, 'ROWS', [*experiments.ROWS, Row('1', 'Toy', 'toy', ('refcoco',)),
                                           Row('1', 'Toy, no strip', 'toy@plain', ('refcoco',))])
    config = run_config('toy', 'refcoco', 'smoke')
    ensure_data(config, out/'data'), ensure_backbone(config, out/'data', out)
    run = prepare(config, out/'data', out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    write_result(run, history, score_run(run), run_hashes(config))
    yield out, config, history
    patch.undo()


def test_its_configuration_is_its_own(made):
    _, config, _ = made
    assert config.model == ToyConfig(width=4) and config.method == 'toy'
    with pytest.raises(KitError, match='Nearest: width'): config.replace(model={'widht': 3})


def test_it_trained_on_the_targets_that_it_asked_for(made):
    _, _, history = made
    assert history[-1]['loss'] < history[0]['loss'] and {'masks', 'boxes'} <= set(history[0])
    assert Toy.seen and all(targets == ['box', 'prior'] for targets in Toy.seen)
    assert len(Toy.letters) > len(Toy.seen) and all(Toy.letters), 'training and scoring hand it its inputs'


def test_its_result_tells_what_it_is(made):
    out, config, _ = made
    result = json.loads((out/'runs'/config.run/'result.json').read_text())
    assert set(result['metrics']) == {'val', 'testA', 'testB'} and result['metrics']['val']['pointing'] is None
    assert set(result['parts']) == {'backbone', 'toy', 'total'} and result['ceiling']['val']['oIoU'] < 90
    assert 'model.lts' not in run_modules('toy'), 'an edit to LTS does not make it stale'
    assert batch.run_state(config, out, run_hashes(config))[0] == 'done'


def test_its_row_stands_in_table_1_with_its_note(made):
    out, config, _ = made
    assert config.run in [r.run for r in runs_for('smoke', ['1'])]
    table = paper_table('1', wanted_rows('smoke', ['1']), load_results(out, 'smoke'))
    row = table[(table.row == 'Toy') & (table.split == 'val')]
    assert row.ours.notna().all() and len(row) == 1
    other = table[(table.row == 'Toy, no strip') & (table.split == 'val')]
    assert len(other) == 1 and other.ours.notna().all() and other.ours.item() != row.ours.item()
    assert table.row.tolist().index('Toy, no strip') > table.row.tolist().index('Toy')
    write_report(out, 'smoke', ['1'])
    for page in (out/'table1.md', out/'index.html'):
        text = page.read_text()
        assert 'Toy' in text and 'It learns from boxes too.' in text, page


def test_its_other_finish_is_scored_too(made):
    out, config, _ = made
    result = json.loads((out/'runs'/config.run/'result.json').read_text())
    own, plain = result['metrics']['val'], result['finishes']['plain']['val']
    assert plain['n'] == own['n'] and plain['oIoU'] != own['oIoU'] and set(result['finishes']) == {'plain'}
    curve = result['thresholds']['val']
    assert len(curve) == 39 and abs(curve['0.4'] - own['oIoU']) < .05 and result['threshold'] == .4


def test_it_predicts_with_its_threshold_and_its_post_processing(made):
    out, config, _ = made
    run, refer = load_run(out/'runs'/config.run), Refer(out/'data', 'refshapes')
    ref, sentence = refer.sentences_of('val')[0]
    mask, prior = predict(run, refer.open_image(ref.image_id), sentence.sent)
    assert prior is None and mask[:, 0].all()
    assert evaluate_run(out/'runs'/config.run, out/'data', 'refshapes', 'val')['n'] == len(refer.sentences_of('val'))


def test_a_name_is_taken_once():
    class Other(Method): name = 'lts'
    from lts_nb.training.config import method_of
    method_of('lts')
    with pytest.raises(KitError, match='taken'): register(Other())
    with pytest.raises(KitError, match='needs a name'): register(Method())
    with pytest.raises(KitError, match='Nearest: lts'): method_of('ltss')


def test_targets_are_what_they_say(tiny_family):
    from lts_nb.data.dataset import Samples
    from lts_nb.data.text import build_vocab
    refer = Refer(tiny_family, 'refshapes')
    samples = Samples(refer, 'train', build_vocab(refer), size=64, targets=tuple(TARGETS))
    b = samples.batch([0, 1, 2])
    for i in range(3):
        rows, columns = torch.nonzero(b['mask'][i, 0], as_tuple=True)
        x, y, w, h = (64*b['box'][i]).tolist()  # middle and size, in pixels of the input
        assert x - w/2 - 4 <= 4*columns.min() and 4*columns.max() <= x + w/2 + 4
        assert y - h/2 - 4 <= 4*rows.min() and 4*rows.max() <= y + h/2 + 4
        objects = b['objects'][i]
        assert (objects[0] - b['box'][i]).abs().max() < 1e-6, 'the object itself comes first'
        image_id = samples.rows[i][0].image_id
        assert len(objects) == sum(a.image_id == image_id and not a.iscrowd for a in refer.annotations.values())
    with pytest.raises(KitError, match='Nearest: box'): Samples(refer, 'train', build_vocab(refer), targets=('boxes',))


def test_an_object_without_a_mask_has_no_box(tiny_family, monkeypatch):
    from lts_nb.data.dataset import Samples
    from lts_nb.data.text import build_vocab
    refer = Refer(tiny_family, 'refshapes')
    samples = Samples(refer, 'train', build_vocab(refer), size=64, targets=('box',))
    monkeypatch.setattr(refer, 'mask', lambda ann_id: np.zeros((64, 64), bool))
    with pytest.raises(KitError, match='empty mask'): samples.batch([0])
