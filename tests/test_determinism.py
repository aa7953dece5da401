"""What may not change a number: processes that load, a stop and a start; and by how much threads do."""
import numpy as np
import pytest
import torch

from lts_nb.evidence.experiments import run_config
from lts_nb.training.opening import ensure_backbone, ensure_data
from lts_nb.training.run import prepare, score_run
from lts_nb.training.train import train_model


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp('determinism')
    config = run_config('lts', 'refshapes', 'smoke')
    ensure_data(config, base/'data'), ensure_backbone(config, base/'data', base/'out')
    return base


def trained(base, name, **compute):
    "Weights and scores of a smoke run with another way of computing."
    config = run_config('lts', 'refshapes', 'smoke')
    config = config.replace(run=name, splits=['val'], compute=config.compute.replace(**compute))
    run = prepare(config, base/'data', base/'out')
    train_model(run.model, run.samples('train'), run.source, config, run.acc)
    metrics = score_run(run)[0]['val']
    run.lock.release()
    return {k: v.clone() for k, v in run.model.state_dict().items()}, metrics, dict(np.load(run.folder/'samples-val.npz'))


def test_loader_processes_change_no_bit(base):
    (a, m, s), (b, n, t) = trained(base, 'w0', workers=0), trained(base, 'w2', workers=2)
    assert all(torch.equal(a[k], b[k]) for k in a) and m == n
    assert all(np.array_equal(s[k], t[k]) for k in s)


def test_twice_is_the_same(base):
    assert all(torch.equal(x, y) for x, y in zip(trained(base, 'a')[0].values(), trained(base, 'b')[0].values()))


def test_no_room_for_the_features_changes_no_bit(base):
    "They are then computed for each batch anew."
    (a, m, _), (b, n, _) = trained(base, 'cached'), trained(base, 'live', cache_gb=0)
    assert all(torch.equal(a[k], b[k]) for k in a) and m == n


def test_threads_change_rounding_only(base):
    (a, m, _), (b, n, _) = trained(base, 't1', threads=1), trained(base, 't2', threads=2)
    torch.set_num_threads(1)
    print('threads 1 and 2:', m['oIoU'], n['oIoU'], 'equal' if all(torch.equal(a[k], b[k]) for k in a) else 'not equal to the bit')
    assert abs(m['oIoU'] - n['oIoU']) < 3
