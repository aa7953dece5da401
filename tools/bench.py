"""Measures what the kit's minutes are made of and writes reports/bench/NAME.csv: make bench.

    python tools/bench.py [--name NAME] [--quick] [--out DIR]

Every number is the median of repeated measurements by torch.utils.benchmark, one thread, and stands beside the share of
this machine's own rate for a product of two matrices. The plain paths, which the faster ones are held against, are
measured in the same process, in turns. With --out the report of that folder is made once and timed."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TQDM_DISABLE', '1')
import pandas as pd
import torch
from torch.utils.benchmark import Timer

from lts_nb.data.refer import Refer
from lts_nb.data.shapes import Recipe, make_family
from lts_nb.evidence.experiments import RIVALS, preset_of, run_config
from lts_nb.model.darknet import Darknet53, fold_batch_norm
from lts_nb.model.method import count_flops
from lts_nb.training.config import method_of
from lts_nb.training.run import environment, peak_memory_mb

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = 7   # of RefCOCO's 7.2 a picture
LAST = dict(memory_format=torch.channels_last)
PRESETS = {'cpu': dict(size=128, batch=18, words=8), 'paper': dict(size=416, batch=2, words=15)}


def seconds(fn, least, quick):
    "Median seconds of a call."
    fn()
    return Timer('fn()', globals={'fn': fn}).blocked_autorange(min_run_time=least/4 if quick else least).median


def in_turns(ways, least, quick, rounds=5):
    "Median seconds of each way, measured in turns, so that a busy moment meets all of them."
    found = {name: [] for name in ways}
    for _ in range(2 if quick else rounds):
        for name, fn in ways.items(): found[name].append(seconds(fn, least/rounds, quick))
    return {name: statistics.median(times) for name, times in found.items()}


def matrix_rate(quick):
    "Operations a second of a product of two matrices of 2048×2048."
    a, b = torch.rand(2, 2048, 2048)
    return 2*2048**3/seconds(lambda: a@b, 4., quick)


def process_start(code, repeat):
    "Median wall seconds of a process that runs some lines."
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def opening(folder):
    "Seconds to open a data set of the cpu preset's size for the first time, and later."
    with redirect_stderr(StringIO()): make_family(folder, Recipe(seed=1), 2)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        Refer(folder, 'refshapes')
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:])


def network(name, preset):
    "A method's network with features and a batch of random numbers, as large as at the preset."
    p, config = PRESETS[preset], run_config(name, 'refcoco', preset)
    b = preset_of(preset)['backbone']
    backbone = Darknet53(b['width'], b['depths'], b['neck']).eval().requires_grad_(False)
    method, cfg = method_of(name), config.model
    if name == 'lscm': cfg = cfg.replace(tree='chain')  # random words have no grammar
    torch.manual_seed(0)
    model = method.build(cfg, backbone.channels, range(300)).to(**LAST)
    side, B, T = p['size'], p['batch'], p['words']
    features = tuple(torch.randn(B, c, side//s, side//s).contiguous(**LAST)
                     for c, s in zip(backbone.channels, (32, 16, 8)))
    lengths = torch.randint(3, T + 1, (B,))
    lengths[0] = T
    tokens = torch.randint(2, 300, (B, T))*(torch.arange(T) < lengths[:, None])
    batch = dict(tokens=tokens, lengths=lengths, box=torch.tensor([[.5, .5, .4, .4]]*B),
                 **{k: (torch.rand(B, 1, side//s, side//s) > .8).float() for k, s in (('mask', 4), ('prior', 8))})
    batch |= method.inputs(cfg, [['word']*int(n) for n in lengths])
    return method, cfg, model, backbone, features, batch


def plain_pass(model, features, batch):
    "LTS as the equations stand: whole maps, and every layer where the paper has it."
    return model.by_equations(features, batch['tokens'], batch['lengths'])


def step_of(method, cfg, model, forward, features, batch):
    "A training step as a function without arguments."
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    def step():
        model.train()
        loss, _ = method.loss(cfg, forward(model, features, batch), batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return step


def training_rows(preset, names, quick):
    "A training step of each method, and of LTS in both ways."
    for name in names:
        method, cfg, model, _, features, batch = network(name, preset)
        passes = {'training step': method.forward}
        if name == 'lts': passes['training step, equations as they stand'] = plain_pass
        # forward and backward take about three times the operations of a forward pass
        flops = {what: 3*count_flops(forward, model.train(), features, batch)[0] for what, forward in passes.items()}
        ways = {what: step_of(method, cfg, model, forward, features, batch) for what, forward in passes.items()}
        n = len(batch['tokens'])
        for what, took in in_turns(ways, 10. if preset == 'cpu' else 30., quick).items():
            yield dict(preset=preset, method=name, what=what, seconds=took, sentences=n/took, GFLOP=flops[what]/1e9)


@torch.inference_mode()
def scoring_rows(preset, quick):
    "Seven sentences about one picture: each with its picture, as the equations stand, and the picture once."
    method, cfg, model, backbone, features, batch = network('lts', preset)
    model.eval()
    backbone = fold_batch_norm(backbone).to(**LAST)
    size, words = PRESETS[preset]['size'], PRESETS[preset]['words']
    image = torch.rand(1, 3, size, size).contiguous(**LAST)
    one = dict(tokens=torch.randint(2, 300, (1, words)), lengths=torch.tensor([words]))
    many = dict(tokens=torch.randint(2, 300, (SENTENCES, words)), lengths=torch.full((SENTENCES,), words))
    first = torch.zeros(SENTENCES, dtype=torch.long)
    def alone(): return plain_pass(model, backbone(image), one)
    def shared():
        looked = method.look(model, backbone(image))
        return method.answer(model, [m[first] for m in looked], many)
    apart = plain_pass(model, [f.expand(SENTENCES, -1, -1, -1) for f in backbone(image)], many)
    deviation = float((shared().mask - apart.mask).abs().max())
    took = in_turns({'alone': alone, 'shared': shared}, 20., quick)
    flops = count_flops(alone)[0]/1e9
    yield dict(preset=preset, method='lts', what='a sentence with its picture, equations as they stand',
               seconds=took['alone'], sentences=1/took['alone'], GFLOP=flops)
    yield dict(preset=preset, method='lts', what=f'a sentence of {SENTENCES} about a picture',
               seconds=took['shared']/SENTENCES, sentences=SENTENCES/took['shared'],
               GFLOP=count_flops(shared)[0]/1e9/SENTENCES, deviation=deviation)
    picture = seconds(lambda: backbone(image), 3., quick)
    yield dict(preset=preset, what='backbone, a picture', seconds=picture, GFLOP=count_flops(lambda: backbone(image))[0]/1e9)


def rows(quick, out):
    "All lines, one after the other."
    yield dict(what='start: importing the training', seconds=process_start('import lts_nb.training.run', 3))
    yield dict(what='start: the command lts', seconds=process_start('import lts_nb.manual.cli', 3))
    with tempfile.TemporaryDirectory() as folder:
        first, later = opening(folder)
    yield dict(what='opening RefShapes for the first time', seconds=first)
    yield dict(what='opening RefShapes again', seconds=later)
    yield from training_rows('cpu', ('lts', *RIVALS), quick)
    yield from scoring_rows('cpu', quick)
    yield from training_rows('paper', ('lts',), quick)
    yield from scoring_rows('paper', quick)
    if out:
        from lts_nb.evidence.report import write_report
        began = time.perf_counter()
        write_report(out, json.loads((Path(out)/'plan.json').read_text())['preset'])
        yield dict(what='report', seconds=time.perf_counter() - began)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--name', default='laptop', help='of the machine: reports/bench/NAME.csv')
    parser.add_argument('--quick', action='store_true', help='a minute instead of some: rougher numbers')
    parser.add_argument('--out', help='a report folder whose report is made and timed')
    given = parser.parse_args()
    torch.set_num_threads(1)
    rate, found = matrix_rate(given.quick), []
    for row in rows(given.quick, given.out):
        if 'GFLOP' in row: row['share of the matrix rate'] = row['GFLOP']*1e9/row['seconds']/rate
        found.append(row | {'memory_mb': peak_memory_mb()})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in found[-1].items()}, flush=True)
    folder = ROOT/'reports'/'bench'
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(found).to_csv(folder/f'{given.name}.csv', index=False, float_format='%.6g')
    about = environment() | dict(matrix_product_GFLOPs=round(rate/1e9, 1), quick=given.quick)
    (folder/f'{given.name}.json').write_text(json.dumps(about, indent=1, sort_keys=True))
    print(f'written to {folder}/{given.name}.csv')
