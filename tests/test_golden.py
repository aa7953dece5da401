"""The smoke preset's LTS, trained anew, is what it has always been.

`tests/golden/smoke_lts.json` was recorded before the notebooks moved into parts. On the processor and the torch that
it names, weights and scores agree to the byte; elsewhere additions happen in another order, and the losses must agree
within a stated tolerance. `python tests/test_golden.py` records it anew, after a change that is meant to change numbers.
"""
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent/'golden'/'smoke_lts.json'


# what was scored when the bytes were recorded; curves and other finishes came later
RECORDED = {'sent_id', 'ref_id', 'image_id', 'sentence', 'area', 'same', 'intersection', 'union', 'hit', 'other_i',
            'other_u'}


def digest(arrays):
    "SHA-256 over names, types, shapes and bytes of arrays, in the order of their names."
    h = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        a = np.ascontiguousarray(a)
        h.update(f'{name} {a.dtype.str} {a.shape}'.encode())
        h.update(a.tobytes())
    return h.hexdigest()


def machine():
    "What decides in which order additions happen."
    from lts_nb.training.run import environment
    cpu = environment()['hardware']['cpu']
    return dict(cpu=cpu, vector=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__.split('+')[0])


def smoke_lts(folder):
    "Pretrain, train and score the smoke preset's LTS; what came out, and on what machine."
    from lts_nb.evidence.experiments import run_config
    from lts_nb.training.opening import ensure_backbone, ensure_data
    from lts_nb.training.run import prepare, score_run
    from lts_nb.training.train import train_model
    config = run_config('lts', 'refshapes', 'smoke')
    root, out = folder/'data', folder/'out'
    ensure_data(config, root)
    ensure_backbone(config, root, out)
    run = prepare(config, root, out)
    history = train_model(run.model, run.samples('train'), run.source, config, run.acc, run.checkpoint)
    score_run(run)
    run.lock.release()
    saved = torch.load(run.checkpoint, weights_only=True)['model']
    scores = {}
    for path in sorted(run.folder.glob('samples-*.npz')):
        with np.load(path) as z: scores |= {f'{path.stem}/{k}': z[k] for k in z if k in RECORDED}
    return dict(machine=machine(), weights=digest({k: v.numpy() for k, v in saved.items()}), scores=digest(scores),
                losses=[h['loss'] for h in history])


@pytest.fixture(scope='module')
def trained(tmp_path_factory): return smoke_lts(tmp_path_factory.mktemp('golden'))


def test_the_losses_are_the_recorded_ones(trained):
    np.testing.assert_allclose(trained['losses'], json.loads(GOLDEN.read_text())['losses'], rtol=.02)


def test_on_the_recorded_machine_every_byte_is_the_recorded_one(trained):
    golden = json.loads(GOLDEN.read_text())
    if golden['machine'] != trained['machine']:
        pytest.skip(f'recorded on {golden["machine"]}, this is {trained["machine"]}')
    assert {k: trained[k] for k in ('weights', 'scores', 'losses')} == {k: golden[k] for k in ('weights', 'scores', 'losses')}


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parent.parent))
    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder: GOLDEN.write_text(json.dumps(smoke_lts(Path(folder)), indent=1) + '\n')
