"The model that the kit ships: its size, its card, and what it says of sentences it has never seen."
import json
import re
import time

import pytest
import torch
from typer.testing import CliRunner

from lts_nb.data.refer import Refer
from lts_nb.data.shapes import Recipe, make_family
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from lts_nb.manual import predict
from lts_nb.manual.cli import app
from lts_nb.training.config import RunConfig
from lts_nb.training import opening
from parts import ROOT

SHIPPED = ROOT/'models'/'cpu'


@pytest.fixture(scope='module')
def val(tmp_path_factory):
    "RefShapes val of the graded seed: an image depends on seed, split and index alone, so the others may be few."
    root = tmp_path_factory.mktemp('val')
    make_family(root, Recipe(seed=2021, train=2, val=500, testA=2, testB=2), workers=2)
    return root


def test_it_is_small_and_complete():
    assert {p.name for p in SHIPPED.iterdir()} == {'README.md', 'backbone.safetensors', 'model.safetensors', 'result.json', 'vocab.json'}
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 8e6


def test_it_is_a_run_of_the_cpu_preset():
    "The settings are today's; the record also says on which commit they were."
    result = json.loads((SHIPPED/'result.json').read_text())
    # how its masks are finished beside their own way is no part of what was trained
    now = run_config('lts', 'refshapes', 'cpu').plain()
    then = result['config'] | {'finishes': now['finishes']}
    # settings that are younger than the record have their defaults
    assert RunConfig(**then).plain() == now


def test_the_shipped_model_is_what_its_card_says(val):
    torch.set_num_threads(1)
    card = (SHIPPED/'README.md').read_text()
    row = re.search(r'^\| val \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$', card, re.M)
    said = [float(x.replace(',', '')) for x in row.groups()]
    metrics = predict.evaluate_run(None, val, 'refshapes', 'val')
    found = [metrics[k] for k in ('n', 'oIoU', 'mIoU', 'prec@0.5', 'pointing')]
    # live features in single precision against cached ones in half, and other processors
    assert found == pytest.approx(said, abs=.3), (said, found)


def test_the_cards_numbers_are_the_records():
    result, card = json.loads((SHIPPED/'result.json').read_text()), (SHIPPED/'README.md').read_text()
    for split, m in result['metrics'].items():
        assert f"| {split} | {m['n']:,} | {m['oIoU']:.1f} | {m['mIoU']:.1f} |" in card
    assert result['fingerprint'] in card and 'Apache-2.0' in card and 'Photographs' in card


def test_a_fresh_clone_predicts_with_one_command(tiny_family, tmp_path):
    refer = Refer(tiny_family, 'refshapes')
    ref, sentence = refer.sentences_of('val')[0]
    began = time.perf_counter()
    said = CliRunner().invoke(app, ['predict', '--image', str(refer.image_path(ref.image_id)), '--expression', sentence.sent,
                                    '--out', str(tmp_path/'mask.png')])
    assert said.exit_code == 0, said.output
    assert (tmp_path/'mask.png').exists() and (tmp_path/'mask-prior.png').exists()
    assert 'models/cpu' in said.output, 'whose answer it is'
    print(f'{time.perf_counter() - began:.1f} s')


def test_without_its_files_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(opening, 'SHIPPED', tmp_path)
    config = run_config('lts', 'refshapes', 'cpu')
    with pytest.raises(KitError, match='--pretrain'): opening.ensure_backbone(config, tmp_path, tmp_path)
    monkeypatch.setattr(predict, 'SHIPPED', tmp_path)
    with pytest.raises(KitError, match='not there'): predict.load_run()
