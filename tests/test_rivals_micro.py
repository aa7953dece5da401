"""Every method on genuine expressions: two short epochs on photographs, scored with each of its finishes, and a prediction."""
import json
import shutil

import numpy as np
import pytest
from test_paper_preset import write_data
from test_rivals import RIVALS

from lts_nb.data.refer import Refer
from lts_nb.evidence.experiments import run_config, run_hashes
from lts_nb.manual.predict import load_run, predict
from lts_nb.training.opening import ensure_backbone
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


@pytest.mark.parametrize('name', [*RIVALS])
def test_a_method_trains_scores_and_predicts_on_photographs(name, place):
    root, out = place
    config = config_of(name)
    path = root/'random.safetensors'
    if not path.exists():
        import torch
        from lts_nb.model.darknet import Darknet53
        from lts_nb.training.pretrain import save_backbone
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
