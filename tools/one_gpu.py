"""Measures training on one GPU and writes reports/gpu/throughput.csv.

    python tools/one_gpu.py [--preset paper] [--methods lts mcn] [--steps 100] [--pictures 240] [--out DIR] [--device cpu]

Each method is trained in each way: on cached features by loader processes, and on pictures that lie on the device or in
pinned memory, with and without torch.compile. Scenes are made here and weights are drawn, since neither changes the time
of a step. A line tells sentences a second, the share of the card's own rate for a product of two large matrices in the
same precision, the peak of its memory, and how often a step waits for the device. The file is written anew after every
line, so what was measured stays when the time runs out. `--device cpu` tries the script itself; it needs `--out`."""
import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch

from lts_nb.data.refer import Refer
from lts_nb.data.shapes import Recipe, make_family
from lts_nb.data.text import build_vocab
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import preset_of, run_config
from lts_nb.manual.throughput import COCO_SIDES
from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.model.method import blank_sample, count_flops
from lts_nb.training.features import LiveFeatures, build_features
from lts_nb.training.one_device import Steps, Table, open_pictures, train_on_pictures
from lts_nb.training.opening import set_up
from lts_nb.training.run import Run, environment, peak_memory_mb
from lts_nb.training.train import cut_rows, train_model

ROOT = Path(__file__).resolve().parents[1]
WORDS = 10_000   # of a published data set; an embedding as large as theirs
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'no': torch.float32}
COLUMNS = ['device', 'torch', 'preset', 'method', 'size', 'batch', 'precision', 'way', 'place', 'compile', 'sentences_s', 'GFLOP', 'share',
           'matrix_TFLOPs', 'memory_gb', 'waits', 'steps', 'note']


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def matrix_rate(device, dtype):
    "Operations a second of a product of two large matrices."
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        for _ in range(4): a@b
        wait(device)
        times.append((time.perf_counter() - began)/4)
    return 2*n**3/statistics.median(times[3:])


def opened(config, folder, pictures):
    "A run on scenes made here, with drawn weights; like `run.prepare`."
    root, b = folder/'data', config.backbone
    side = (preset_of(config.preset)['recipe'] or {}).get('side', COCO_SIDES)
    recipe = Recipe(seed=1, train=pictures, val=2, testA=1, testB=1, side=tuple(side))
    make_family(root, recipe, workers=os.cpu_count())
    run = Run(config, root, folder/'out')
    run.acc, run.refer = set_up(config.compute, 0), Refer(root, 'refshapes')
    run.vocab, run.fingerprint = build_vocab(run.refer), 'scenes:1'
    net = Darknet53(b.width, b.depths, b.neck).eval().requires_grad_(False)
    run.backbone, run.tail = split_backbone(net, b.tail)
    run.channels = net.channels
    return run


def network(run):
    "A new network, drawn, with a published set's number of words."
    torch.manual_seed(0)
    words = WORDS if run.config.preset in ('paper', 'gpu') else len(run.vocab)
    for p in run.tail.parameters(): p.requires_grad_(True)
    return run.method.build(run.config.model, run.channels, range(words), tail=run.tail).to(run.acc.device)


def operations(run):
    "GFLOP of the frozen backbone, and of a forward pass behind it, for one sentence."
    device, model = run.acc.device, network(run).eval()
    image, batch = blank_sample(model, run.config.data.size, run.config.data.max_len)
    body, features = count_flops(run.backbone.to(device), image)
    batch |= run.method.inputs(run.config.model, [['word']*run.config.data.max_len])
    rest, _ = count_flops(run.method.forward, model, features, batch)
    return body/1e9, rest/1e9


def per_second(run, train, steps, rounds):
    "Sentences a second: the median of some rounds of so many steps, after one to become warm."
    t = run.config.train
    config = run.config.replace(train=t.replace(epoch_refs=steps*t.batch, epochs=rounds + 1))
    ends = []
    def ended(epoch, history):
        wait(run.acc.device)
        ends.append(time.perf_counter())
    history = train(network(run), config, ended)
    return history[-1]['samples']/statistics.median(b - a for a, b in zip(ends, ends[1:]))


def waits(run, source, steps=4):
    "How often a step waits for the device, as PyTorch notices it. None on a processor."
    if run.acc.device.type != 'cuda': return None
    model, c = network(run).to(memory_format=torch.channels_last).train(), run.config
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    samples = run.samples('train')
    some = cut_rows(samples, c, 0)[:steps + 2]
    batches = itertools.cycle(Steps(Table(samples, source), some))
    def step():
        batch = next(batches)
        with run.acc.autocast():
            loss, _ = run.method.loss(c.model, run.method.forward(model, source.maps(batch['taken'], batch['frames']), batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    for _ in range(2): step()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            for _ in range(steps): step()
        finally: torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(w.message) for w in said)/steps


def ways(device, compiled):
    "What is measured: way, place, compile."
    yield 'cached features, loader', '', 'off'
    for place in ('device', 'host') if device.type == 'cuda' else ('host',):
        for how in ('off', 'on') if compiled else ('off',): yield 'pictures', place, how


def measured(run, way, place, how, steps, rounds, rate):
    "One line."
    device, c = run.acc.device, run.config
    run.config = c = c.replace(compute=c.compute.replace(compile=how, **({'pictures': place} if place else {})))
    if device.type == 'cuda': torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    samples, (body, rest) = run.samples('train'), operations(run)
    if place:
        source, flops = open_pictures(run, progress=False), body + 3*rest
        def train(model, config, ended): return train_on_pictures(model, samples, source, config, run.acc, after_epoch=ended)
    else:
        live = LiveFeatures(run.refer, run.backbone, c.data.size, device, c.data.stretch)
        source, flops = build_features(run.out/'features', live, sorted(run.refer.images), 'measured', progress=False), 3*rest
        # a loader hands features over on the CPU
        source.device = 'cpu'
        def train(model, config, ended): return train_model(model, samples, source, config, run.acc, after_epoch=ended)
    found = per_second(run, train, steps, rounds)
    memory = torch.cuda.max_memory_allocated()/2**30 if device.type == 'cuda' else peak_memory_mb()/2**10
    return dict(sentences_s=found, GFLOP=flops, share=found*flops*1e9/rate, memory_gb=memory, waits=waits(run, source) if place else None)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='paper', help='whose sizes, precision and batch')
    parser.add_argument('--methods', nargs='+', default=['lts'], help='names of methods')
    parser.add_argument('--steps', type=int, default=100, help='in a round')
    parser.add_argument('--rounds', type=int, default=3, help='of which the median counts')
    parser.add_argument('--pictures', type=int, default=240, help='that are made')
    parser.add_argument('--batch', type=int, help="sentences in a step; the preset's where not given")
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    parser.add_argument('--device', default='auto', choices=['auto', 'cpu'], help='cpu: to try the script')
    parser.add_argument('--out', type=Path, help='folder; reports/gpu where not given')
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available() and given.device == 'auto'
    if not on_gpu and not (given.device == 'cpu' and given.out):
        sys.exit('There is no CUDA device, and reports/gpu holds nothing else. To try the script: --device cpu --out DIR')
    out, rows = given.out or ROOT/'reports'/'gpu', []
    out.mkdir(parents=True, exist_ok=True)
    for name in given.methods:
        config = run_config(name, 'refcoco', given.preset)
        config = config.replace(data=config.data.replace(dataset='refshapes', vectors=None, recipe=None),
                                compute=config.compute.replace(device=given.device),
                                train=config.train.replace(batch=given.batch or config.train.batch))
        with tempfile.TemporaryDirectory(prefix='lts-gpu-') as folder:
            run = opened(config, Path(folder), given.pictures)
            device, precision = run.acc.device, run.acc.mixed_precision
            rate, here = matrix_rate(device, DTYPES[precision]), environment()
            for way, place, how in ways(device, on_gpu and not given.no_compile):
                row = dict(device=here['hardware']['gpu'] if on_gpu else here['hardware']['cpu'], torch=here['versions']['torch'], preset=given.preset,
                           method=name, size=config.data.size, batch=config.train.batch, precision=precision, way=way, place=place, compile=how,
                           matrix_TFLOPs=rate/1e12, steps=given.steps*given.rounds)
                try: row |= measured(run, way, place, how, given.steps, given.rounds, rate)
                except KitError as e: row['note'] = str(e)
                rows.append(row)
                pd.DataFrame(rows, columns=COLUMNS).to_csv(out/'throughput.csv', index=False, float_format='%.5g')
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in ('device', 'torch')}, flush=True)
    print(f'written to {out}/throughput.csv')
