"""What needs a CUDA device: a training step at the paper's size, and that the small model says there what it says here."""
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.training.fit import fit
from lts_nb.model.losses import lts_loss
from lts_nb.model.lts import LTS, LTSConfig

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]


def batch(n, size, words=8):
    g = torch.Generator().manual_seed(0)
    pixels, tokens = torch.rand(n, 3, size, size, generator=g), torch.randint(2, 100, (n, words), generator=g)
    return dict(pixels=pixels, tokens=tokens, lengths=torch.full((n,), words), mask=torch.rand(n, 1, size//4, size//4, generator=g).round(),
                prior=torch.rand(n, 1, size//8, size//8, generator=g).round(), rows=list(range(n)))


def models(cfg=LTSConfig(), **darknet):
    torch.manual_seed(0)
    frozen, tail = split_backbone(Darknet53(**darknet), 2)
    return frozen, LTS(cfg, frozen.channels, 100, tail=tail)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_a_training_step_at_the_papers_size(precision, capsys):
    # an accelerator of another precision may have been made in this process
    AcceleratorState._reset_state(reset_partial_state=True)
    acc = Accelerator(mixed_precision=precision)
    frozen, model = models()
    frozen, model = frozen.to(acc.device, memory_format=torch.channels_last), model.to(acc.device, memory_format=torch.channels_last)
    b = batch(18, 416)
    def loss_of(b):
        with torch.no_grad(): features = frozen(b['pixels'].to(acc.device, memory_format=torch.channels_last))
        out = model(tuple(f.float() for f in features), b['tokens'].to(acc.device), b['lengths'])
        return lts_loss(out, b['mask'].to(acc.device), b['prior'].to(acc.device))
    torch.cuda.reset_peak_memory_stats()
    steps = lambda n: fit(model, loss_of, lambda epoch, skip: [b]*n, 1, accelerator=acc)
    first = steps(3)[0]['loss']
    began = time.perf_counter()
    last = steps(10)[0]['loss']
    torch.cuda.synchronize()
    with capsys.disabled(): print(f'\n{precision}: {180/(time.perf_counter() - began):.0f} sentences/s, {torch.cuda.max_memory_allocated()/2**30:.1f} GiB')
    assert last < first


def test_cpu_and_cuda_agree():
    frozen, model = models(LTSConfig(emb_dim=16, gru_dim=16, d_m1=32, d_half=16, aspp_width=8, aspp_rates=(2, 4, 6)), width=.125, depths=(1, 1, 1, 1, 1))
    b = batch(3, 128)
    frozen.eval(), model.eval()
    with torch.no_grad():
        here = model(frozen(b['pixels']), b['tokens'], b['lengths'])
        there = model.cuda()(frozen.cuda()(b['pixels'].cuda()), b['tokens'].cuda(), b['lengths'])
    for x, y in zip(here, there): assert torch.allclose(x, y.cpu(), atol=2e-3, rtol=1e-2)


def test_the_papers_throughput_is_measured(capsys):
    "What `lts plan --preset paper --measure` keeps: the rates to quote, and to commit as reports/paper/throughput.json."
    from lts_nb.manual.throughput import measure
    rates = measure('paper')
    with capsys.disabled(): print('\n', {k: v for k, v in rates.items() if k != 'gflops'})
    assert rates['gpu'] and rates['precision'] == 'bf16' and rates['train'] > 20
