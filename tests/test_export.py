"A run as an ONNX file: every method, and that nothing wrong or half is left behind."
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from lts_nb.manual import export
from lts_nb.manual.predict import load_run
from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.training.config import method_of
from lts_nb.training.opening import build_model
from test_cli import is_a_sentence, lts  # noqa: F401 (a fixture)

pytest.importorskip('onnxruntime')
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def shipped(): return load_run(device='cpu')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The shipped run as a file, made once by the command's function, with its latencies."
    path = tmp_path_factory.mktemp('onnx')/'new'/'lts.onnx'
    off, files, frame = export.export_run(None, path, latency=True)
    return SimpleNamespace(path=path, off=off, files=files, frame=frame, session=export.open_session(path))


def untrained(experiment, vocab, **switches):
    "A run of the smoke preset with random weights; its normalisations have seen something."
    torch.manual_seed(0)
    config = run_config(experiment, 'refshapes', 'smoke')
    config = config.replace(model=config.model.replace(**switches))
    b, method = config.backbone, method_of(config.method)
    net = Darknet53(b.width, b.depths, b.neck)
    frozen, tail = split_backbone(net, b.tail)
    model = build_model(config, vocab, net.channels, tail).eval()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 1.5)
    return SimpleNamespace(config=config, method=method, vocab=vocab, model=model, backbone=frozen, size=config.data.size,
                           threshold=.5, stretch=False, folder=Path('a run'), device='cpu')


# what is particular to drawing: every place for words, loops, recurrences, further inputs, boxes
CASES = {'lts-word': dict(), 'lts-trans': dict(n=2), 'rmi': dict(), 'dmn': dict(order='scan'), 'bcam': dict(encoder='lstm', sentence='last'),
         'lscm': dict(), 'mcn': dict()}


@pytest.mark.parametrize('experiment', CASES)
def test_a_file_answers_as_torch_does(shipped, tmp_path, experiment):
    run = untrained(experiment, shipped.vocab, **CASES[experiment])
    off = export.write_onnx(run, tmp_path/'m.onnx')
    inputs, lengths = export.example(run, export.check_sentences(15)[:1]*2)
    inputs['tokens'] = torch.stack([inputs['tokens'][0], inputs['tokens'][0].flip(0)])
    first, second = export.by_torch(run, inputs, lengths)[0]
    # untrained weights hardly listen to the sentence, so rounding is held against what the order of words changes
    assert off < 1e-5 and off < .05*max(np.abs(first - second).max(), 1e-5)
    assert [f.name for f in tmp_path.iterdir()] == ['m.onnx']


def test_the_command_writes_file_script_and_latencies(made):
    assert made.off < 1e-5
    assert [f.name for f in made.files] == ['lts.onnx', 'lts-predict.py', 'lts-latency.csv'] and all(f.stat().st_size for f in made.files)
    assert sorted(made.frame.index) == [('onnxruntime', 1), ('onnxruntime', 2), ('torch', 1), ('torch', 2)]
    assert str(ROOT).encode() not in made.path.read_bytes(), "the folders of whoever drew it are nobody's business"


def test_a_file_says_what_its_user_needs(made, shipped):
    about = json.loads(made.session.get_modelmeta().custom_metadata_map['lts'])
    assert about['words'] == list(shipped.vocab.words) and about['threshold'] == shipped.threshold and about['size'] == shipped.size
    assert [i.name for i in made.session.get_inputs()] == about['inputs'] == ['image', 'tokens']


def test_padding_and_what_stands_behind_the_longest_sentence_change_nothing(made, shipped):
    inputs, _ = export.example(shipped, export.check_sentences(15))
    image, tokens = inputs['image'].numpy(), inputs['tokens'].numpy()
    together = made.session.run(None, dict(image=image, tokens=tokens))
    wider = np.concatenate([tokens, np.zeros((5, 9), np.int64)], 1)
    wider[tokens.all(1), -3:] = 5
    for a, b in zip(together, made.session.run(None, dict(image=image, tokens=wider))): assert np.abs(a - b).max() < 1e-6
    nothing = made.session.run(None, dict(image=image[:1], tokens=np.zeros((1, 4), np.int64)))
    assert all(np.isfinite(a).all() for a in nothing)
    with pytest.raises(ValueError, match='no word'): export.segment(made.session, np.zeros((9, 9, 3), np.uint8), '?!')


def test_another_programs_file_is_a_sentence():
    stranger = SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}))
    with pytest.raises(ValueError, match='not one that `lts export` wrote'): export.segment(stranger, np.zeros((9, 9, 3), np.uint8), 'ball')


class Drawn:
    "Stands for a graph: writes a few bytes."
    def save(self, path, external_data): Path(path).write_bytes(b'a graph')


@pytest.mark.parametrize('ends', [0.2, float('nan'), KeyboardInterrupt()])
def test_what_was_there_stays_where_the_check_fails(shipped, monkeypatch, tmp_path, ends):
    def deviation(run, session):
        if isinstance(ends, BaseException): raise ends
        return ends
    monkeypatch.setattr(export, 'graph_of', lambda run: Drawn())
    monkeypatch.setattr(export, 'open_session', lambda path: None)
    monkeypatch.setattr(export, 'deviation', deviation)
    (tmp_path/'lts.onnx').write_bytes(b'an older one')
    with pytest.raises((KitError, KeyboardInterrupt)): export.write_onnx(shipped, tmp_path/'lts.onnx')
    assert [f.name for f in tmp_path.iterdir()] == ['lts.onnx'] and (tmp_path/'lts.onnx').read_bytes() == b'an older one'


def test_a_method_that_cannot_be_drawn_is_a_sentence(shipped):
    class Reads(nn.Module):
        def forward(self, features, tokens, lengths): return tokens[:int(lengths[0])]
    run = SimpleNamespace(**vars(shipped) | {'model': Reads()})
    with pytest.raises(KitError, match="'lts' cannot be written as a graph .*lts predict"): export.graph_of(run)


def test_mistakes_of_the_command_are_sentences(lts, made, tmp_path, monkeypatch):  # noqa: F811
    before = made.path.read_bytes()
    is_a_sentence(lts('export', '--onnx', made.path), 'exists already', '--force')
    is_a_sentence(lts('export', '--onnx', tmp_path/'lts.pt'), '.onnx')
    is_a_sentence(lts('export', '--run', tmp_path/'nothing', '--onnx', tmp_path/'lts.onnx'), 'result of the run')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    is_a_sentence(lts('export', '--onnx', tmp_path/'lts.onnx'), 'onnxruntime', 'pip install', '[onnx]')
    assert made.path.read_bytes() == before and not list(tmp_path.iterdir())
