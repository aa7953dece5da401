"""Builds every method at its published widths, takes one training step at 416×416, and writes reports/full_size.csv.

    python tools/full_size.py [NAME ...]

The features are drawn, because a step costs the same on any. Each method runs in a process of its own, so that its
peak memory is its own. Beside our counts stand those of a hand count that was made before the code was written."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/'reports'/'full_size.csv'
CHANNELS, WORDS, BATCH = (1024, 512, 256), 15, 2
# name -> (parameters in millions without the embedding, GFLOP of the head at 15 words), counted by hand
BY_HAND = {'lts': (None, 52.05), 'rmi': (12.1, 89), 'rrn': (16.2, 30.5), 'dmn': (36, 68), 'cmsa': (25, 809),
           'bcam': (48, 261), 'cmpc': (70, 167), 'cmpc-seg': (None, 194), 'lscm': (58, 161), 'mcn': (20, 31),
           'cgan': (14, 27), 'lang2seg': (24, 19),
           # these two were counted anew afterwards, since the first count took a product and its sum as one operation:
           # 490 cells of ten things through two layers, and 23.4 million weights of the trees at 15 nodes
           'mattnet': (11, 1.7), 'nmtree': (27, .7)}
THINGS = 10  # of a picture, for methods that choose among them


def one(name):
    "Measure one method; printed as JSON."
    import torch
    from lts_nb.evidence.experiments import run_config
    from lts_nb.model.method import count_flops
    from lts_nb.training.config import method_of
    from lts_nb.training.run import peak_memory_mb
    method, cfg = method_of(name), run_config(name, 'refcoco', 'paper').model
    # a parse changes no count, and the parser need not be installed
    if 'tree' in type(cfg).model_fields: cfg = cfg.replace(tree='chain')
    torch.manual_seed(0)
    model = method.build(cfg, CHANNELS, range(1000))
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    features = tuple(torch.rand(BATCH, c, 416//s, 416//s) for c, s in zip(CHANNELS, (32, 16, 8)))
    batch = dict(tokens=torch.randint(2, 1000, (BATCH, WORDS)), lengths=torch.tensor([WORDS, 4]))
    if method.things: features = (*features, *things(), *things())
    batch |= method.inputs(cfg, [['word']*WORDS, ['word']*4])
    single = {k: v[:1] for k, v in batch.items()}
    flops, _ = count_flops(method.forward, model.eval(), tuple(f[:1] for f in features), single)
    batch |= targets(method, batch)
    optimiser = torch.optim.Adam(model.train().parameters(), lr=1e-4)
    began = time.perf_counter()
    losses = []
    for _ in range(2):
        loss, _ = method.loss(cfg, method.forward(model, features, batch), batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    print(json.dumps(dict(
        method=name, parameters=sum(p.numel() for p in model.parameters()) - embedding, GFLOPs=round(flops/1e9, 2),
        loss_before=round(losses[0], 3), loss_after=round(losses[1], 3),
        step_seconds=round((time.perf_counter() - began)/2, 2), peak_memory_mb=peak_memory_mb())))


def things():
    "Candidates: boxes anywhere, their masks full."
    import torch
    from lts_nb.rivals.proposals import Things
    corner = 416*torch.rand(BATCH, THINGS, 2)/2
    boxes = torch.cat([corner, corner + 40 + 100*torch.rand(BATCH, THINGS, 2)], -1)
    return Things(boxes, torch.arange(THINGS).expand(BATCH, -1) % 3, torch.ones(BATCH, THINGS),
                  torch.ones(BATCH, THINGS, 104, 104, dtype=torch.bool))


def targets(method, batch):
    "What the method asks for: a disc on its grids, its box, and one thing against another."
    import torch
    known = dict(
        mask=disc(104), prior=disc(52), box=torch.tensor([[.5, .5, .4, .4]]*BATCH),
        target=torch.zeros(BATCH, dtype=torch.long), other_object=torch.tensor([[0, 1], [1, 2]]),
        other_sentence=batch['tokens'].flip(0), attributes=torch.zeros(BATCH, 50),
        attribute_weights=torch.ones(50))
    return {name: known[name] for name in method.needs}


def disc(side):
    "A disc in the middle of a map, (BATCH, 1, side, side)."
    import torch
    at = (torch.arange(side) + .5)/side - .5
    inside = (at[:, None]**2 + at**2 < .04).float()
    return inside.expand(BATCH, 1, side, side)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: sys.exit(one(sys.argv[2]))
    lines = []
    for name in sys.argv[1:] or BY_HAND:
        done = subprocess.run([sys.executable, __file__, '--one', name], capture_output=True, text=True)
        if done.returncode: sys.exit(f'{name}: {done.stderr[-800:]}')
        line = json.loads(done.stdout.splitlines()[-1])
        by_hand = BY_HAND.get(name, (None, None))
        lines.append(line | {'parameters by hand': by_hand[0] and round(1e6*by_hand[0]), 'GFLOPs by hand': by_hand[1]})
        print(lines[-1], flush=True)
    frame = pd.DataFrame(lines)
    if OUT.exists():
        known = pd.read_csv(OUT)
        frame = pd.concat([known[~known.method.isin(frame.method)], frame])
    frame.to_csv(OUT, index=False)
