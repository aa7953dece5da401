"""models/cpu/ from a finished run: weights as safetensors, words, record and card.

    python tools/ship_model.py out/cpu/runs/lts-refshapes-cpu-s0

The run must stand on the shipped backbone; a new backbone (`lts reproduce --pretrain`) is first put there with --backbone.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CARD = '''# LTS on RefShapes: the model that the kit ships

The `cpu` preset's LTS (*Locate then Segment*, CVPR 2021, rebuilt by this kit) with its backbone. `lts predict` and the
notebooks use it where no other run is named, and `lts reproduce` trains the tables' rows on the same backbone, as the paper
took a published one.

| | |
|---|---|
| method | LTS as in the paper (fusion, relevance filtering once, segmentation module, L_loc), {parameters:,} parameters |
| backbone | Darknet of a quarter of Darknet-53's width, residual blocks {depths}, {backbone_parameters:,} parameters, pretrained on RefShapes' training pictures (category and colour of every cell), then frozen |
| input | a picture, letterboxed to {size}×{size}, and an expression of at most {max_len} words |
| trained on | {dataset}, training split, fingerprint `{fingerprint}` |
| preset, seed | `{preset}`, seed {seed}: {epochs} epochs of {epoch_refs} objects, Adam at {lr}, a tenth of it from epoch {decay} |
| words | {words}: those of RefShapes |
| torch | {torch} |
| licence | Apache-2.0, like the kit; the training pictures are generated, so nobody else's rights are touched |

## What it reaches

| split | sentences | overall IoU | mean IoU | prec@0.5 | pointing game | against another object |
|---|---:|---:|---:|---:|---:|---:|
{rows}

"Against another object" holds each mask against another described object of the same picture: a model that ignored the
sentence would score as high there. These are one seed's numbers; what more seeds reach stands in
[reports/cpu](../../reports/cpu/index.html). The report's run of this seed may differ by half a point: this model was trained
by the code of commit {commit}, and later code adds the same numbers in another order.

## What it does not know

- **Photographs.** It has seen flat figures on plain ground and nothing else. On a photograph its answer means nothing.
- **Words** beyond the {words} of RefShapes. `lts predict` says which words of a sentence it never met.
- **"None".** It always answers with a mask, also where no such object is in the picture.
- Fine outlines: its grid has cells of 4×4 pixels, so even a perfect answer would reach an overall IoU of {ceiling:.1f} on val.

## Files

| file | holds |
|---|---|
| `backbone.safetensors` | the backbone |
| `model.safetensors` | everything else of the network |
| `vocab.json` | the words, in the order of the embedding |
| `result.json` | the run's record: configuration, metrics, code, machine |

Made by `tools/ship_model.py`; a test holds the model to this card (`tests/test_shipped.py`).
'''


def card(result, backbone_parameters):
    "The model card as Markdown."
    config = result['config']
    rows = []
    for split in config['splits']:
        m = result['metrics'][split]
        swapped = result['controls'][split]['swapped']['oIoU']
        rows.append(f"| {split} | {m['n']:,} | {m['oIoU']:.1f} | {m['mIoU']:.1f} | {m['prec@0.5']:.1f} "
                    f"| {m['pointing']:.1f} | {swapped:.1f} |")
    train = config['train']
    return CARD.format(
        parameters=result['parameters'] - backbone_parameters, backbone_parameters=backbone_parameters,
        depths='-'.join(map(str, config['backbone']['depths'])), size=config['data']['size'],
        max_len=config['data']['max_len'], dataset=config['dataset'], fingerprint=result['fingerprint'],
        preset=config['preset'], seed=config['seed'], epochs=train['epochs'], epoch_refs=train['epoch_refs'],
        lr=train['lr'], decay=train['decay'], words=result['vocabulary'] - 2, torch=result['versions']['torch'],
        rows='\n'.join(rows), ceiling=result['ceiling']['val']['oIoU'], commit=result['code']['commit'])


def ship(run, target):
    "Write the files of a run that `lts predict` needs."
    from lts_nb.training.fit import read_checkpoint
    result = json.loads((run/'result.json').read_text())
    if result['config']['backbone']['weights'] != 'shipped': sys.exit('this run does not stand on the shipped backbone')
    if (result['code']['commit'] or '+').endswith('+'): sys.exit('this run was made by code that no commit holds: commit it, and train the run again')
    weights = read_checkpoint(run/'checkpoint.pt')['model']
    save_file({k: v.contiguous() for k, v in weights.items()}, target/'model.safetensors')
    shutil.copy(run/'vocab.json', target/'vocab.json')
    (target/'result.json').write_text(json.dumps(result, indent=1, sort_keys=True) + '\n')
    (target/'README.md').write_text(card(result, result['parts']['backbone']['parameters']), encoding='utf-8')


if __name__ == '__main__':
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument('run', type=Path)
    arguments.add_argument('--backbone', type=Path, help='put this backbone there first')
    given = arguments.parse_args()
    from lts_nb.training.opening import SHIPPED
    SHIPPED.mkdir(parents=True, exist_ok=True)
    if given.backbone: shutil.copy(given.backbone, SHIPPED/'backbone.safetensors')
    ship(given.run, SHIPPED)
