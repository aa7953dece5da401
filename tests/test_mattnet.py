"""MAttNet, held against numbers that parts of its official code computed, and against slow code that reads like the equations."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lts_nb.model.method import METHODS
from lts_nb.rivals.mattnet import (ATTRIBUTES, MAttNet, MAttNetConfig, Matching, NEAR, Phrases, Subject, Tower, attribute_loss,
                                   attribute_words, best_neighbour, box_offsets, box_places, class_weights, draw_other,
                                   falls, is_neighbour, known_of, mean_of_windows, nearest, places_of, ranking_loss, windows)
from lts_nb.rivals.proposals import Things, roi_crop
from lts_nb.training.config import load_methods

def close(a, b, atol=1e-9): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


@pytest.fixture(scope='module')
def official(golden):
    "part -> {kind/name: tensor} of the official code."
    arrays = golden('mattnet')
    def part(name): return {k[len(name) + 1:]: torch.as_tensor(v) for k, v in arrays.items() if k.startswith(name + '/')}
    return part


# the official numbers

def with_weights(g):
    "Our network with the official weights."
    w = {k.removeprefix('weight/'): v for k, v in g.items() if k.startswith('weight/')}
    cfg = MAttNetConfig(emb_dim=5, d_word=6, hidden=4, d=7, word_dropout=0., att_dropout=0., dropout=0.)
    net = MAttNet(cfg, (6, 5, 1), 11).double()
    net.subject = Subject(5, 6, 6, 7, 3, 0.).double()
    mine = {'phrases.embed.weight': w['rnn_encoder.embedding.weight'],
            'phrases.weigh.weight': w['weight_fc.weight'], 'phrases.weigh.bias': w['weight_fc.bias']}
    for kind in ('weight', 'bias'):
        mine[f'phrases.word.0.{kind}'] = w[f'rnn_encoder.mlp.0.{kind}']
        mine[f'phrases.attend.{kind}'] = torch.cat([w[f'{m}_attn.fc.{kind}'] for m in ('sub', 'loc', 'rel')])
        for ours, theirs in (('fuse', 'att_fuse.0'), ('norm', 'att_fuse.1'), ('attributes', 'att_fc'), ('score', 'attn_fuse.2')):
            mine[f'subject.{ours}.{kind}'] = w[f'sub_encoder.{theirs}.{kind}']
        for ours, theirs in (('location', 'loc_encoder'), ('relation', 'rel_encoder')):
            mine[f'{ours}.out.{kind}'] = w[f'{theirs}.fc.{kind}']
    mine |= {f'phrases.lstm.{k.removeprefix("rnn_encoder.rnn.")}': v for k, v in w.items() if '.rnn.' in k}
    mine['subject.see.weight'], mine['subject.read.weight'] = w['sub_encoder.attn_fuse.0.weight'].split([13, 6], 1)
    mine['subject.see.bias'] = w['sub_encoder.attn_fuse.0.bias']
    scales = {'subject.fine': 'sub_encoder.pool5', 'subject.deep': 'sub_encoder.fc7', 'subject.fused': 'sub_encoder.att',
              'subject.phrase': 'sub_encoder.phrase', 'location.own': 'loc_encoder.lfeat', 'location.alike': 'loc_encoder.dif_lfeat',
              'relation.look': 'rel_encoder.vis_feat', 'relation.place': 'rel_encoder.lfeat'}
    mine |= {f'{ours}.s': w[f'{theirs}_normalizer.weight'][0] for ours, theirs in scales.items()}
    for stat in ('running_mean', 'running_var'): mine[f'subject.norm.{stat}'] = w[f'sub_encoder.att_fuse.1.{stat}']
    for k, name in enumerate(('sub', 'loc', 'rel')):
        mine |= towers({n.removeprefix(f'{name}_matching.'): v for n, v in w.items() if n.startswith(f'{name}_matching.')}, f'match.{k}.')
    missing, unexpected = net.load_state_dict(mine, strict=False)
    assert not unexpected and all(m.endswith('num_batches_tracked') for m in missing), (missing, unexpected)
    return net


def towers(w, front=''):
    "Both towers of a matching, under our names."
    places = {'0': 'first', '1': 'norm', '4': 'last', '5': 'last_norm'}
    out = {}
    for name, v in w.items():
        side, place, kind = name.split('.')
        out[f'{front}{"seen" if side.startswith("vis") else "said"}.{places[place]}.{kind}'] = v
    return out


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_the_network_is_the_official_one(official, mode):
    g = official('joint')
    net = with_weights(g).train(mode == 'train')
    out, mid = ({k.removeprefix(f'{what}_{mode}/'): v for k, v in g.items() if k.startswith(f'{what}_{mode}/')} for what in ('out', 'mid'))
    x = {k.removeprefix('in/'): v for k, v in g.items() if k.startswith('in/')}
    q, weights, words = net.phrases(x['labels'])
    for k, name in enumerate(('sub', 'loc', 'rel')):
        close(q[:, k], mid[f'q_{name}'])
        close(words[:, k], out[f'{name}_attn'])
    close(weights, out['weights'])
    fine, deep = (x[k].flatten(2).transpose(1, 2) for k in ('pool5', 'fc7'))
    # running statistics move in training: each normalisation once
    cells, logits = net.subject.cells(fine, deep)
    close(logits, out['att_scores'])
    v, alpha = net.subject(cells, q[:, 0])
    close(v, mid['v_sub']); close(alpha, out['sub_grid_attn'])
    close(net.location(x['lfeats'], x['dif_lfeats']), mid['v_loc'])
    r = net.relation(x['cxt_fc7'], x['cxt_lfeats'])
    close(r, mid['r'])
    real = is_neighbour(x['cxt_lfeats'])
    close(real, mid['mu'])
    close(net.match[0](v, q[:, 0]), mid['s_sub'][:, 0])
    close(net.match[1](net.location(x['lfeats'], x['dif_lfeats']), q[:, 1]), mid['s_loc'][:, 0])
    cosines = (net.match[2].seen(r)*net.match[2].said(q[:, 2])[:, None]).sum(-1)
    close(best_neighbour(cosines, real), mid['s_rel'][:, 0])
    close(net.pairs(cells, [x[k] for k in ('lfeats', 'dif_lfeats', 'cxt_fc7', 'cxt_lfeats')], q, weights), out['scores'])


def test_the_floor_of_the_relationship_is_the_official_one(official):
    g = official('rel_floor')
    matching = Matching(4, 4, 4, 0.).double().eval()
    matching.load_state_dict(towers({k.removeprefix('weight/'): v for k, v in g.items() if k.startswith('weight/')}), strict=False)
    cosines = (matching.seen(g['in/v'])*matching.said(g['in/q'])[:, None]).sum(-1)
    close(cosines, g['out/cos'])
    real = g['in/mask'] > 0
    close(best_neighbour(cosines, real), g['out/s'][:, 0])
    without = best_neighbour(cosines, real, floor=False)
    some = real.any(1) & ~real.all(1)
    assert some.any() and (without[some] < 0).all() and (without[~real.any(1)] == 0).all()


@pytest.mark.parametrize('case', ['v1l1', 'v1l0'])
def test_the_loss_is_the_official_one(official, case):
    g = official('loss')
    n = int(g['hyper/n'])
    scores = g['in/scores'].clone().requires_grad_()
    right, object_, sentence = scores.split(n)
    margin = float(g['hyper/margin'])
    loss = ranking_loss(right, object_, sentence, margin) if case == 'v1l1' else (margin + object_ - right).relu().mean()
    close(loss, g[f'{case}/loss'])
    loss.backward()
    close(scores.grad[:len(g[f'{case}/grad'])], g[f'{case}/grad'])


def padded(g):
    "The official boxes, a row a picture."
    image, boxes = g['in/image'], g['in/boxes_xywh'].double()
    edges = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    most = int(image.bincount().max())
    out, kinds = torch.zeros(2, most, 4, dtype=torch.double), torch.full((2, most), -1)
    for p in range(2):
        mine = image == p
        out[p, :mine.sum()], kinds[p, :mine.sum()] = edges[mine], g['in/category'][mine]
    return out, kinds, [(image == p).nonzero()[:, 0] for p in range(2)]


def test_places_and_neighbours_are_the_official_ones(official):
    g = official('loc')
    boxes, kinds, ids = padded(g)
    for p, mine in enumerate(ids):
        W, H = g['in/image_wh'][p].tolist()
        found = places_of(boxes, kinds, (W, H))
        n = len(mine)
        # single precision there
        for ours, theirs in ((found.own, 'lfeats'), (found.alike, 'dif_lfeats'), (found.context, 'cxt_lfeats')):
            want = g[f'out/{theirs}'][mine]
            close(ours[p, :n]/want.abs().clamp_min(1), want/want.abs().clamp_min(1), atol=1e-7)
        which = torch.where(found.real[p, :n], mine[found.which[p, :n].clamp_max(n - 1)], -1)
        assert torch.equal(which, g['out/cxt_ids'][mine])


def test_class_weights_are_the_official_ones(official):
    g = official('att_weight')
    close(class_weights(g['counts']), g['weights'], atol=1e-6)


# parts against slow code

def test_windows_are_the_shared_crop():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 3, 4, generator=generator).double()*128
    boxes = torch.cat([boxes[..., :2] - 10, boxes[..., :2] + boxes[..., 2:] + 1], -1)  # some reach out of the picture
    for cells in (4, 16):
        maps = torch.rand(2, 5, cells, cells, generator=generator).double()
        for side in (7, 3):
            shared = roi_crop(maps, boxes, 128, side).flatten(3).transpose(2, 3)
            close(windows(maps, boxes, 128, side), shared)
            close(mean_of_windows(maps, boxes, 128, side), shared.mean(2))
