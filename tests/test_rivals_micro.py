"""Every method on genuine expressions: two short epochs on photographs, scored with each of its finishes, and a prediction."""
import os
import shutil

import numpy as np
import pytest
import torch
from test_paper_preset import write_data
from test_rivals import RIVALS

from lts_nb.data.dataset import Samples
from lts_nb.data.refer import Refer
from lts_nb.data.text import build_vocab, tokenize
from lts_nb.evidence.experiments import run_config, run_hashes
from lts_nb.manual.predict import load_run, predict
from lts_nb.model.darknet import Darknet53
from lts_nb.training.features import LiveFeatures
from lts_nb.training.opening import ensure_backbone, loader, on_device
from lts_nb.training.pretrain import save_backbone
from lts_nb.training.run import prepare, score_run, write_result
from lts_nb.training.train import train_model


@pytest.fixture(scope='module')
def place(micro, tmp_path_factory):
    "The excerpt with a training split, and a report's folder that all methods share."
    base = tmp_path_factory.mktemp('micro')
    write_data(micro, base/'data')
    return base/'data', base/'out'


def config_of(name):
    "A method at smoke widths on RefCOCO at 128 pixels: a backbone of random weights, no vectors, no parser."
    small = run_config(name, 'refcoco', 'smoke')
    # free text has no grammar of ours, and a parser is an optional extra
    model = small.model.replace(tree='chain') if 'tree' in type(small.model).model_fields else small.model
    data = small.data.replace(dataset='refcoco', recipe=None, size=128)
    return small.replace(dataset='refcoco', data=data, model=model, splits=('val', 'testA'),
                         train=small.train.replace(epochs=2, epoch_refs=8, batch=4),
                         backbone=small.backbone.replace(weights='random.safetensors'),
                         compute=small.compute.replace(cache_gb=0))


@pytest.mark.parametrize('name', RIVALS)
def test_a_method_trains_scores_and_predicts_on_photographs(name, place):
    root, out = place
    config = config_of(name)
    path = root/'random.safetensors'
    if not path.exists():
        torch.manual_seed(0)
        save_backbone(Darknet53(config.backbone.width, config.backbone.depths, config.backbone.neck), path)
    ensure_backbone(config, root, out)
    run = prepare(config, root, out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    result = write_result(run, history, score_run(run), run_hashes(config))
    assert np.isfinite([h['loss'] for h in history]).all()
    assert result['metrics']['val']['n'] == 45 and set(result['finishes']) == set(config.finishes[1:])
    for finish in result['finishes'].values(): assert finish['val']['n'] == 45
    opened, refer = load_run(run.folder, root), Refer(root, 'refcoco')
    ref, sentence = refer.sentences_of('val')[0]
    picture = refer.open_image(ref.image_id)
    mask, _ = predict(opened, picture, sentence.sent)
    assert mask.shape == picture.shape[:2] and mask.dtype == bool
    shutil.rmtree(run.folder)


@pytest.mark.skipif(not os.environ.get('LTS_SLOW'), reason='full widths take minutes: LTS_SLOW=1 runs them')
@pytest.mark.parametrize('name', ['lts', *RIVALS, 'cmpc-seg'])
def test_published_widths_on_two_photographs(name, micro):
    "Darknet-53 of random weights, the method at its published widths, 416 pixels: a step, and two answers."
    config = run_config(name, 'refcoco', 'paper')
    method, cfg = config_method(config)
    refer = Refer(micro, 'refcoco')
    vocab = build_vocab([tokenize(s.sent) for _, s in refer.sentences_of('val')])
    samples = Samples(refer, 'val', vocab, 15, 416, targets=method.needs, inputs=lambda words: method.inputs(cfg, words))
    torch.manual_seed(0)
    net = Darknet53().eval().requires_grad_(False)
    source, rows = LiveFeatures(refer, net, 416), [0, len(samples) - 1]
    features, batch = on_device(next(iter(loader(samples, source, [rows]))), source, 'cpu')
    model = method.build(cfg, net.channels, vocab)
    optimiser = torch.optim.Adam(model.train().parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss, _ = method.loss(cfg, method.forward(model, features, batch), batch)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[1] != losses[0]
    with torch.no_grad(): answer = method.probability(method.forward(model.eval(), features, batch))
    side = 416//method.stride(cfg)
    assert answer.shape == (2, 1, side, side) and torch.isfinite(answer).all()


def config_method(config):
    "A run's method and settings, with trees that need no parser."
    from lts_nb.training.config import method_of
    model = config.model
    return method_of(config.method), model.replace(tree='chain') if 'tree' in type(model).model_fields else model
