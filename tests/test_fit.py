"""The loop and the feature cache under bad luck: a loss that is not finite, a damaged checkpoint, a full disk."""
import errno
import os
import signal

import pytest
import torch
from torch import nn

from lts_nb.training import features
from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.errors import KitError, atomic_path
from lts_nb.training.features import LiveFeatures, build_features
from lts_nb.training.fit import Adam, fit, load_checkpoint
from lts_nb.data.refer import Refer


def train(path, bad_at=None, config='a'):
    torch.manual_seed(0)
    net, seen = nn.Linear(4, 1), [0]
    def batches(epoch, skip): return [dict(x=torch.full((2, 4), float(epoch + i)), rows=[0, 1]) for i in range(4)][skip:]
    def loss_of(b):
        seen[0] += 1
        return net(b['x']).square().mean()*(float('nan') if seen[0] == bad_at else 1), {}
    return net, fit(net, loss_of, batches, epochs=3, decay=2, lr=1e-3, checkpoint=path, config=config, every=0)


def test_nan_stops_with_a_sentence_and_keeps_the_last_good_step(tmp_path):
    with pytest.raises(KitError, match='the loss became nan in epoch 2, step 3'): train(tmp_path/'c.pt', bad_at=7)
    kept = torch.load(tmp_path/'c.pt', weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept['model'].values())
    assert (kept['progress']['epoch'], kept['progress']['step']) == (1, 2)


def test_damaged_checkpoint_is_a_sentence(tmp_path):
    train(tmp_path/'c.pt')
    whole = (tmp_path/'c.pt').read_bytes()
    for cut in (0, 10, len(whole)//2, len(whole) - 1):
        (tmp_path/'c.pt').write_bytes(whole[:cut])
        with pytest.raises(KitError, match='checkpoint'): load_checkpoint(tmp_path/'c.pt', 'a')


def test_another_configuration_is_set_aside_not_overwritten(tmp_path):
    train(tmp_path/'c.pt')
    before = (tmp_path/'c.pt').read_bytes()
    train(tmp_path/'c.pt', config='b')
    aside = [f for f in tmp_path.glob('c.*.pt')]
    assert len(aside) == 1 and aside[0].read_bytes() == before
    assert load_checkpoint(tmp_path/'c.pt', 'b')['epoch'] == 3


def test_checkpoints_come_by_the_clock_also_when_epochs_are_short(tmp_path, monkeypatch):
    now, seen = [0.], []
    monkeypatch.setattr('lts_nb.training.fit.time.monotonic', lambda: now[0])
    net = nn.Linear(4, 1)
    def loss_of(b):
        now[0] += 10
        seen.append((tmp_path/'c.pt').exists())
        return net(torch.ones(2, 4)).square().mean(), {}
    fit(net, loss_of, lambda epoch, skip: [dict(rows=[0, 1])]*2, epochs=10, checkpoint=tmp_path/'c.pt', every=60)
    assert seen.index(True) == 7, 'epochs of 20 seconds, a checkpoint after a minute'


def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path/'a').write_text('old')
    with pytest.raises(KitError, match='no space'):
        with atomic_path(tmp_path/'a') as tmp:
            tmp.write_text('new')
            monkeypatch.setattr(os, 'fsync', full)
    assert (tmp_path/'a').read_text() == 'old' and [f.name for f in tmp_path.iterdir()] == ['a']


def test_full_disk_while_features_are_written(tiny_family, tmp_path, monkeypatch):
    frozen, _ = split_backbone(Darknet53(.125, (1, 1, 1, 1, 1), False), 0)
    refer = Refer(tiny_family, 'refshapes')
    monkeypatch.setattr(features, '_reserve', full)
    with pytest.raises(KitError, match='no space'): build_features(tmp_path, LiveFeatures(refer, frozen, 64), sorted(refer.images), 'k', progress=False)
    monkeypatch.undo()
    made = build_features(tmp_path, LiveFeatures(refer, frozen, 64), sorted(refer.images), 'k', progress=False)
    assert made([1])[0].shape[0] == 1


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_within_a_forward_pass_changes_no_byte(number, tmp_path):
    "Statistics and draws of a step that is computed again would count twice."
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(.5), torch.nn.Linear(4, 1))
    rows = [{'rows': range(6), 'x': torch.randn(6, 3, generator=torch.Generator().manual_seed(i))} for i in range(4)]

    def train(model, checkpoint=None, interrupt_at=None):
        calls = []
        def loss_of(batch):
            out = model(batch['x']).square().sum()
            calls.append(1)
            if len(calls) == interrupt_at: os.kill(os.getpid(), number)
            return out, {}
        return fit(model, loss_of, lambda epoch, skip: rows[skip:], 2, checkpoint=checkpoint, config={})

    whole, cut = network(), network()
    torch.manual_seed(1)
    history = train(whole)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt): train(cut, tmp_path/'c.pt', interrupt_at=3)
    again = network()
    assert [h['loss'] for h in train(again, tmp_path/'c.pt')] == [h['loss'] for h in history]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()): assert torch.equal(a, b), name


def walk(how, stop=None, path=None, lr=.05):
    "Three epochs of four steps; `stop` interrupts at a step."
    torch.manual_seed(0)
    net, seen = nn.Linear(3, 1), [0]
    data = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    def batches(epoch, skip): return [dict(x=x*(epoch + 1), rows=[0]*5) for x in data][skip:]
    def loss_of(b):
        seen[0] += 1
        if seen[0] == stop: raise KeyboardInterrupt
        return (net(b['x']) - 3).square().mean(), {}
    history = fit(net, loss_of, batches, 3, lr=lr, decay=2, checkpoint=path, config='walk', every=0, how=how)
    return net, history


def by_hand(how, lr=.05):
    "The same in ten lines."
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    data = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(net.parameters(), betas=how.betas, fused=True)
    for epoch in range(3):
        for i, x in enumerate(data):
            optimiser.zero_grad()
            (net(x*(epoch + 1)) - 3).square().mean().backward()
            if how.clip:
                for p in net.parameters(): p.grad.clamp_(-how.clip, how.clip)
            rate = lr*(1 if epoch < 2 else .1) if how.schedule is None else lr*how.schedule((4*epoch + i)/12)
            for g in optimiser.param_groups: g['lr'] = rate
            optimiser.step()
    return net


WAYS = [Adam(), Adam(betas=(.8, .99)), Adam(clip=.01), Adam(schedule=lambda share: 1 - share), Adam((.5, .9), .5, lambda share: .1**share)]


@pytest.mark.parametrize('how', WAYS)
def test_the_ways_of_the_optimiser(how):
    net, history = walk(how)
    for a, b in zip(net.parameters(), by_hand(how).parameters()): assert torch.equal(a, b)
    if how != Adam():
        for a, b in zip(net.parameters(), walk(Adam())[0].parameters()): assert not torch.equal(a, b)
    assert history[1]['lr'] == pytest.approx(.05*(1 if how.schedule is None else how.schedule(1/3)))


@pytest.mark.parametrize('how', WAYS[3:])
def test_a_rate_that_falls_all_the_time_goes_on_where_it_stood(tmp_path, how):
    whole, _ = walk(how)
    with pytest.raises(KeyboardInterrupt): walk(how, stop=7, path=tmp_path/'c.pt')
    resumed, _ = walk(how, path=tmp_path/'c.pt')
    for a, b in zip(whole.parameters(), resumed.parameters()): assert torch.equal(a, b)
