"""One run in two processes (gloo, CPU) is the run of one process: in double precision to ten digits.

Single precision would hide a mistake: Adam divides each gradient by its size, so that a last digit grows into a fourth
one within some steps. All cases of two processes share one start of these processes, because importing torch takes
longer than all of them.
"""
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lts_nb.errors import KitError
from lts_nb.training.fit import fit, load_checkpoint

ROOT = Path(__file__).parent.parent
EXPERIMENTS = 'lts', 'lts-n2', 'lts-trans', 'fusion-filter', 'mcn'


# --- a network with everything that looks at the whole batch, draws for it, or has no gradient ---------------------

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6))
        self.drop, self.linear = nn.Dropout(.3), nn.Linear(6, 5, bias=False)
        self.norm, self.end = nn.BatchNorm1d(5), nn.Linear(5, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x): return self.end(self.norm(self.linear(self.drop(self.conv(x).mean((2, 3))))))


class Rows:
    "Twenty-three samples: batches of ten leave a last one of three, too small for two processes."
    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(23, 2, 4, 4, generator=g).double(), torch.randn(23, 1, generator=g).double()

    def cut(self, epoch):
        order = torch.randperm(23, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[i:i + 10] for i in range(0, 23, 10)]

    def batch(self, rows): return dict(x=self.x[rows], y=self.y[rows], rows=rows)


def small(path, group=None, acc=None, epochs=4, ask_at=None, bad_rank=None, config=None, weight_decay=.1, seed=0):
    "Train `Net`; after `ask_at` steps one process is asked to stop."
    from lts_nb.training.distributed import share_of
    torch.manual_seed(seed)
    net, data, steps = Net().double(), Rows(), [0]
    called = net if group is None else group.wrap(net, acc)
    def batches(epoch, skip):
        out = []
        for rows in data.cut(epoch)[skip:]:
            share = None if group is None else share_of(len(rows), group.rank, group.world)
            out.append(data.batch(rows) if share is None else data.batch(rows[share.mine]) | dict(share=share))
        return out
    def loss_of(b):
        steps[0] += 1
        if steps[0] == ask_at:
            if group is None: raise KeyboardInterrupt
            if group.rank == 1: os.kill(os.getpid(), signal.SIGTERM)
        loss = nn.functional.mse_loss(called(b['x']), b['y'])
        if bad_rank is not None and group.rank == bad_rank: loss = loss*float('nan')
        return loss, {'half': loss.detach()/2}
    history = fit(net, loss_of, batches, epochs, .02, 3, path, config or {'train': {'batch': 10}}, acc, weight_decay, every=0, group=group)
    return history, net.state_dict()


class Doubled:
    "A feature source in double precision."
    def __init__(self, source): self.source = source
    def __call__(self, ids): return tuple(m.double() for m in self.source(ids))


def settings(experiment):
    "The smoke run with twenty sentences an epoch: nine, nine, and a last batch of two."
    from lts_nb.evidence.experiments import run_config
    config = run_config(experiment, 'refshapes', 'smoke')
    model = config.model.replace(**({'text_dropout': .2} if experiment == 'lts' else {}))
    return config.replace(model=model, train=config.train.replace(batch=9, epochs=2, epoch_refs=20))


def real(experiment, root, out, group=None, acc=None):
    "Train a method of the kit in double precision."
    from lts_nb.training.run import prepare
    from lts_nb.training.train import train_model
    run = prepare(settings(experiment), root, out, acc)
    run.model.double()
    history = train_model(run.model, run.samples('train'), Doubled(run.source), run.config, run.acc, group=group)
    if acc is None: run.lock.release()
    return history, run.model.state_dict()


# --- what each of the two processes does ---------------------------------------------------------------------------

def said(act):
    "The sentence of a failure."
    try: act()
    except KitError as e: return f'{type(e).__name__}: {e}'
    return 'nothing was said'


def process(rank, port, root, folder):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                       MASTER_PORT=port, OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    from lts_nb.training import distributed as d
    acc = d.join_group(settings('lts'), timeout=60)
    def group(): return d.Group(acc)
    kept = {name: real(name, root, folder, group(), acc) for name in EXPERIMENTS}
    kept['small'] = small(folder/'small.pt', group(), acc)
    kept['from one'] = small(folder/'one.pt', group(), acc, seed=7)
    try: small(folder/'two.pt', group(), acc, ask_at=5)
    except KeyboardInterrupt: kept['interrupted'] = True
    words = {'nan': said(lambda: small(folder/'nan.pt', group(), acc, bad_rank=1)),
             'foreign': said(lambda: small(folder/'small.pt', group(), acc, config={'train': {'batch': 20}})),
             'settings': said(lambda: d._same_settings(settings('lts').replace(train=settings('lts').train.replace(batch=9 + 9*rank))))}
    torch.save(kept, folder/f'kept-{rank}.pt')
    # at last the other one is alive and silent
    quick = torch.distributed.new_group(timeout=timedelta(seconds=2))
    if rank == 0: words['silent'] = said(lambda: ask(quick))
    else: time.sleep(5)
    (folder/f'words-{rank}.json').write_text(json.dumps(words))


def ask(group):
    "A question to a process that does not answer."
    from lts_nb.training.distributed import _answered
    with _answered('run', 2): torch.distributed.all_reduce(torch.ones(1), group=group)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Data and backbone of the smoke preset."
    from lts_nb.training.opening import ensure_backbone, ensure_data
    folder = tmp_path_factory.mktemp('smoke')
    ensure_data(settings('lts'), folder/'data')
    ensure_backbone(settings('lts'), folder/'data', folder/'out')
    real('lts', folder/'data', folder/'out')  # and the features
    return folder/'data', folder/'out'


@pytest.fixture(scope='module')
def two(smoke):
    "What two processes found: (kept of each rank, words of each rank, folder)."
    from lts_nb.training.distributed import _free_port
    root, out = smoke
    with pytest.raises(KeyboardInterrupt): small(out/'one.pt', ask_at=5)
    torch.multiprocessing.spawn(process, (_free_port(), root, out), nprocs=2)
    kept = [torch.load(out/f'kept-{r}.pt', weights_only=True) for r in range(2)]
    return kept, [json.loads((out/f'words-{r}.json').read_text()) for r in range(2)], out


def same(a, b, rtol=1e-9):
    "Two histories and two networks agree."
    (history, net), (history_b, net_b) = a, b
    for h, k in zip(history, history_b, strict=True):
        assert h['samples'] == k['samples']
        for part in h.keys() - {'seconds', 'processes', 'samples'}: np.testing.assert_allclose(h[part], k[part], rtol=rtol, err_msg=part)
    for name, x in net.items():
        np.testing.assert_allclose(x.double(), net_b[name].double(), rtol=1e-6, atol=1e-9, err_msg=name)


def test_two_processes_are_one(two, tmp_path):
    kept, _, out = two
    same(small(tmp_path/'c.pt'), kept[0]['small'])
    same(kept[1]['small'], kept[0]['small'], rtol=0)
    a, b = (torch.load(p, weights_only=True) for p in (tmp_path/'c.pt', out/'small.pt'))
    assert torch.equal(a['rng'], b['rng']), 'dropout has drawn what it draws in one process'
    assert kept[0]['small'][0][0]['processes'] == 2


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_two_processes_train_a_method_as_one_does(two, smoke, experiment):
    kept, *_ = two
    one = real(experiment, *smoke)
    assert [h['samples'] for h in one[0]] == [20, 20]
    same(one, kept[0][experiment])


def test_two_go_on_where_one_stopped(two, tmp_path):
    same(small(tmp_path/'c.pt'), two[0][0]['from one'])


def test_one_goes_on_where_two_stopped(two, tmp_path):
    "One of the two was asked to stop in the fifth step; both did, and rank 0 kept it."
    kept, _, out = two
    assert kept[0]['interrupted'] and kept[1]['interrupted']
    progress = load_checkpoint(out/'two.pt', {'train': {'batch': 10}})
    assert (progress['epoch'], progress['step']) == (1, 2)
    same(small(tmp_path/'c.pt'), small(out/'two.pt', seed=7))


def test_what_goes_wrong_is_a_sentence_in_both(two):
    _, words, out = two
    for said in words:
        assert 'the loss became nan in epoch 1, step 1' in said['nan']
        assert 'made with batches of 10 sentences, and this run has 20' in said['foreign']
        assert 'have batches of 9 and 18 sentences' in said['settings']
    assert 'LostPeer' in words[0]['silent'] and 'has not answered for 2 seconds' in words[0]['silent']
    assert load_checkpoint(out/'small.pt', {'train': {'batch': 10}})['epoch'] == 4, 'the foreign checkpoint is kept'


def test_more_processes_than_a_batch_can_feed():
    from lts_nb.training.distributed import check_processes
    check_processes(settings('lts'), 4)
    with pytest.raises(KitError, match='5 processes cannot share batches of 9 sentences.*Take 4 processes or fewer'):
        check_processes(settings('lts'), 5)


SCRIPT = '''
import os, signal, sys
from pathlib import Path
from filelock import FileLock
from test_distributed import settings
from lts_nb.errors import KitError
from lts_nb.training import distributed as d
root, out, config = Path(sys.argv[1]), Path(sys.argv[2]), settings('lts')

def attempt(name, timeout=30.):
    try: d.train_together(config, root, out, 2, timeout)
    except KitError as e: print(name, '|', e)
    else: print(name, '| done')

def dies(self, batch, take=d.Group.take):
    if self.rank == 1 and self.share.whole: os.kill(os.getpid(), signal.SIGKILL)
    take(self, batch)

take, d.Group.take = d.Group.take, dies
attempt('killed')
d.Group.take = take
with FileLock(out/'runs'/config.run/'.lock'): attempt('held', 4.)
attempt('again')
'''


def test_from_a_notebook(smoke, tmp_path):
    "A process that is killed ends the others with a sentence, a run that is held is left alone, and the run then trains."
    root, out = smoke
    env = os.environ | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT/"tests"}', OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    found = subprocess.run([sys.executable, '-c', SCRIPT, root, out], env=env, capture_output=True, text=True, timeout=240)
    lines = dict(line.split(' | ') for line in found.stdout.splitlines() if ' | ' in line)
    assert 'process 1 of the run was killed' in lines['killed'], found.stdout + found.stderr
    assert 'another process is at work on this run' in lines['held']
    assert lines['again'] == 'done'
    progress = load_checkpoint(next((out/'runs').glob('lts-*/checkpoint.pt')), _key())
    assert [h['processes'] for h in progress['history']] == [2, 2]
    assert not list((out/'runs').glob('lts-*/result.json')), 'training is not the whole run'


def _key():
    from lts_nb.training.config import run_key
    return run_key(settings('lts'))


def test_without_a_launcher_the_script_says_so():
    found = subprocess.run([sys.executable, ROOT/'nbs'/'runs'/'train_together.py'], capture_output=True, text=True,
                           env={k: v for k, v in os.environ.items() if k != 'RANK'} | dict(PYTHONPATH=str(ROOT)))
    assert found.returncode == 2 and 'Start it with accelerate launch' in found.stderr and 'Traceback' not in found.stderr
