"""MAttNet, held against numbers that parts of its official code computed, and against slow code that reads like the equations."""
import numpy as np
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

def close(a, b, atol=1e-9):
    a, b = (x.double() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.double) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope='module')
def official(golden_parts):
    "part -> {kind/name: tensor} of the official code."
    return golden_parts('mattnet')


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


def slow_offsets(a, b):
    x, y, w, h = a[0], a[1], a[2] - a[0], a[3] - a[1]
    cx, cy = x + w/2, y + h/2
    return [(b[0] - cx)/w, (b[1] - cy)/h, (b[2] - cx)/w, (b[3] - cy)/h, (b[2] - b[0])*(b[3] - b[1])/(w*h)]


def scene(K, kinds, seed, real=None):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(1, K, 2, generator=generator).double()*80
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, K, 2, generator=generator).double()*40], -1)
    drawn = torch.randint(0, kinds, (1, K), generator=generator)
    if real is not None: drawn[:, real:], boxes[:, real:] = -1, 0
    return boxes, drawn


@pytest.mark.parametrize('K, kinds, real', [(1, 1, None), (4, 2, 3), (9, 2, None), (12, 3, 10)])
def test_neighbours_against_a_loop(K, kinds, real):
    boxes, kind = scene(K, kinds, K, real)
    found = places_of(boxes, kind, (128, 96))
    b, n = boxes[0].tolist(), real or K
    for i in range(n):
        middle = lambda k: ((b[k][0] + b[k][2])/2, (b[k][1] + b[k][3])/2)
        far = lambda k: sum((p - q)**2 for p, q in zip(middle(i), middle(k)))
        others = [k for k in range(n) if k != i]
        alike = sorted((k for k in others if kind[0, k] == kind[0, i]), key=far)
        context = sorted((k for k in others if kind[0, k] != kind[0, i]), key=far) + alike
        want = [v for k in alike[:5] for v in slow_offsets(b[i], b[k])]
        close(found.alike[0, i], want + [0.]*(25 - len(want)))
        want = [slow_offsets(b[i], b[k]) for k in context[:5]]
        close(found.context[0, i], want + [[0.]*5]*(5 - len(want)))
        assert found.which[0, i][found.real[0, i]].tolist() == context[:5]
        x0, y0, x1, y1 = b[i]
        close(found.own[0, i], [x0/128, y0/96, (x1 - 1)/128, (y1 - 1)/96, (x1 - x0)*(y1 - y0)/(128*96)])


def test_moving_the_content_leaves_offsets_and_scaling_leaves_all_but_a_pixel():
    boxes, kinds = scene(6, 2, 0)
    before = places_of(boxes, kinds, (128, 128))
    moved = places_of(boxes + torch.tensor([9., -4, 9, -4]), kinds, (128, 128))
    close(moved.alike, before.alike); close(moved.context, before.context)
    larger = places_of(3*boxes, kinds, (384, 384))
    close(larger.alike, before.alike); close(larger.context, before.context)
    change = (larger.own - before.own).abs()
    close(change[..., [0, 1, 4]], torch.zeros(1, 6, 3)); close(change[..., 2:4], torch.full((1, 6, 2), 1/128 - 1/384))


def test_a_thing_alone_and_the_floor():
    cosines = torch.tensor([[-.4, -.1, .9, .9, .9], [.3, .9, .9, .9, .9], [.9]*5], requires_grad=True)
    real = torch.tensor([[True, True, False, False, False], [True] + [False]*4, [False]*5])
    for floor, want in ((True, [0., .3, 0.]), (False, [-.1, .3, 0.])):
        best = best_neighbour(cosines, real, floor)
        close(best, want, atol=1e-6)
        grad, = torch.autograd.grad(best.sum(), cosines)
        assert torch.isfinite(grad).all() and not grad[2].any()


def test_words_are_weighed_as_without_padding():
    from lts_nb.rivals.mattnet import PhraseEncoder
    torch.manual_seed(0)
    encoder = PhraseEncoder(20, 8, 6, 5).double().eval()
    tokens = torch.tensor([[4, 5, 6, 0, 0], [7, 0, 0, 0, 0], [8, 9, 10, 11, 12]])
    q, weights, words = encoder(tokens)
    for i, n in enumerate((3, 1, 5)):
        e = encoder.word(encoder.embed(tokens[i:i + 1, :n]))
        states, (last, _) = encoder.lstm(e)
        a = encoder.attend(states).softmax(1)[0].T
        close(words[i, :, :n], a); close(words[i, :, n:], torch.zeros(3, 5 - n))
        close(q[i], a @ e[0]); close(weights[i], encoder.weigh(torch.cat([last[0], last[1]], -1)).softmax(-1)[0])
    close(encoder(tokens.view(3, 1, 5)).q[:, 0], q)


# losses

def test_the_ranking_loss_is_zero_where_both_margins_hold_and_pulls_twice_where_none_does():
    right = torch.tensor([.5, .1], dtype=torch.double, requires_grad=True)
    loss = ranking_loss(right, torch.tensor([.3, .2], dtype=torch.double), torch.tensor([.39, .1], dtype=torch.double))
    close(loss, (.2 + .1)/2)
    close(torch.autograd.grad(loss, right)[0], [0., -1.])
    assert ranking_loss(torch.tensor([.1]), torch.tensor([0.]), torch.tensor([-.5]), .1) == 0


def test_attributes_count_where_some_are_known_and_by_their_weight():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator).double().requires_grad_()
    labels = torch.tensor([[1., 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).double()
    weights = torch.tensor([1., 2, 0, 10])
    loss, p = attribute_loss(logits, labels, weights), logits.sigmoid()
    want = sum(-w*(p[i, a].log() if labels[i, a] else (1 - p[i, a]).log()) for i in (0, 2) for a, w in enumerate(weights))/8
    close(loss, want)
    grad, = torch.autograd.grad(loss, logits)
    assert not grad[1].any() and not grad[:, 2].any() and grad[0].any()
    nothing = attribute_loss(logits, 0*labels, weights)
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_weights_of_words_that_do_not_exist_are_zero():
    close(class_weights([100, 25, 0, 0]), [1., 10., 0., 0.])
    close(class_weights([7, 7, 0]), [1., 1., 0.])
    assert not class_weights([0, 0]).any()


def test_the_rate_is_that_of_the_official_code():
    for step in (0, 4000, 8000, 12000, 16000, 30000):
        official = 4e-4 if step <= 8000 else 4e-4*.1**((step - 8000)/8000)
        assert 4e-4*falls(step/30000) == pytest.approx(official, rel=1e-9)


# targets

@pytest.fixture(scope='module')
def split(tiny_family):
    from lts_nb.data.dataset import Samples
    from lts_nb.data.refer import Refer
    from lts_nb.data.text import build_vocab
    refer = Refer(tiny_family, 'refshapes')
    load_methods()
    return Samples(refer, 'train', build_vocab(refer), size=128, targets=METHODS['mattnet'].needs)


def test_wrong_objects_and_sentences_are_wrong_and_drawn_by_place_alone(split):
    rows = split.epoch_rows(0, 3)
    batch, seen = split.batch(rows), set()
    for i, row in enumerate(rows):
        ref = split.rows[row][0]
        at, k = batch['other_object'][i].tolist()
        other = split.objects_of(split.rows[rows[at]][0].image_id)[k]
        assert other != ref.ann_id
        # in the same picture, where there is one of another category
        kinds = {split.refer.annotations[a].category_id for a in split.objects_of(ref.image_id)}
        if len(kinds) > 1: assert at == i
        said = [t for t in batch['other_sentence'][i].tolist() if t]
        about = {r.ann_id for (r, _), ids in zip(split.rows, split.ids) if list(ids) == said}
        assert about and about != {ref.ann_id}
        seen.add(at == i)
    half = split.batch(rows[4:9])
    assert torch.equal(half['other_object'][:, 1][half['other_object'][:, 0] == torch.arange(5)],
                       batch['other_object'][4:9, 1][half['other_object'][:, 0] == torch.arange(5)])
    split.epoch_rows(0, 4)
    again = split.batch(rows)
    assert not torch.equal(again['other_object'], batch['other_object']), 'another epoch draws anew'
    split.epoch_rows(0, 3)
    assert torch.equal(split.batch(rows)['other_object'], batch['other_object'])


def test_three_wrong_objects_of_ten_are_of_the_category():
    from types import SimpleNamespace
    kinds = {1: 0, 2: 0, 3: 0, 4: 1, 5: 2}
    samples = SimpleNamespace(refer=SimpleNamespace(annotations={a: SimpleNamespace(category_id=c) for a, c in kinds.items()}))
    rng = np.random.default_rng(0)
    drawn = [draw_other(rng, samples, 1, [2, 3, 4, 5]) for _ in range(4000)]
    assert np.mean([kinds[d] == 0 for d in drawn]) == pytest.approx(.3, abs=.03)
    assert {draw_other(rng, samples, 1, [2, 3, 4, 5], 1.) for _ in range(50)} == {2, 3}
    # only like objects, and the coin says another kind: the whole data set is asked
    assert None in [draw_other(rng, samples, 1, [2, 3]) for _ in range(50)]
    assert draw_other(rng, samples, 4, []) is None


def test_attributes_are_the_words_of_all_sentences_of_an_object(split):
    words = attribute_words(split)
    assert set(words) <= {'red', 'green', 'blue', 'yellow', 'pink', 'white', 'small', 'big', 'plain', 'striped'} and len(words) > 5
    assert list(words.values()) == sorted(words.values(), reverse=True)
    batch, names = split.batch(range(len(split))), list(words)
    assert batch['attributes'].shape == (len(split), ATTRIBUTES) and batch['attribute_weights'].shape == (ATTRIBUTES,)
    for row, (ref, _) in enumerate(split.rows):
        said = {w for (other, s), ws in zip(split.rows, split.words) if other.ann_id == ref.ann_id for w in ws}
        assert {names[k] for k in batch['attributes'][row].nonzero()[:, 0].tolist()} == said & set(names)


# the network

def made(K=4, **changes):
    load_methods()
    method = METHODS['mattnet']
    cfg = method.config(**method.widths['smoke'] | changes)
    torch.manual_seed(0)
    model = method.build(cfg, (12, 10, 6), range(20)).double()
    generator = torch.Generator().manual_seed(1)
    maps = tuple(torch.rand(3, c, s, s, generator=generator).double() for c, s in ((12, 4), (10, 8), (6, 16)))
    boxes = torch.cat([scene(K, 2, s)[0] for s in range(3)])
    kinds = torch.cat([scene(K, 2, s)[1] for s in range(3)])
    things = Things(boxes, kinds, torch.ones(3, K), torch.rand(3, K, 32, 32, generator=generator) > .5)
    tokens = torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0]])
    return method, cfg, model, maps, things, tokens


def scores_of(model, maps, things, tokens):
    with torch.no_grad():
        return model.eval().scores(model.look(model.maps(maps), things), things, tokens, None)


def test_all_at_once_is_pair_by_pair():
    method, cfg, model, maps, things, tokens = made()
    found = scores_of(model, maps, things, tokens)
    size = 128
    with torch.no_grad():
        for i in range(3):
            q, weights, _ = model.phrases(tokens[i:i + 1])
            for k in range(4):
                one = [m[i:i + 1] for m in maps]
                cells, _ = model.subject.cells(*(c[:, 0] for c in model.crops(one, things.boxes[i:i + 1, k:k + 1], size)))
                places, looks = model.surroundings(one, Things(*(x[i:i + 1] for x in things)), size)
                around = [x[:, k] for x in (places.own, places.alike, looks, places.context)]
                close(found[i, k], model.pairs(cells, around, q, weights)[0])
    assert found.abs().max() <= 1


def test_the_order_of_the_things_and_a_far_one_change_nothing():
    method, cfg, model, maps, things, tokens = made(K=16)
    # two kinds, and one thing far from all others
    things = things._replace(kinds=torch.arange(16).remainder(2).expand(3, 16), boxes=things.boxes.clone())
    things.boxes[:, 15] += 500
    found = scores_of(model, maps, things, tokens)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    mixed = scores_of(model, maps, Things(*(x[:, order] for x in things)), tokens)
    close(found[:, order], mixed)
    same, is_same, near, is_near = nearest(things.boxes, things.kinds)
    tried = 0
    for p in range(3):
        asked = set(same[p][is_same[p]].tolist()) | set(near[p][is_near[p]].tolist())
        for alone in set(range(16)) - asked:
            rest = [k for k in range(16) if k != alone]
            fewer = scores_of(model, maps, Things(*(x[:, rest] for x in things)), tokens)
            close(found[p, rest], fewer[p])
            tried += 1
    assert tried


def targets():
    return {'target': torch.tensor([0, 1, 2]), 'other_object': torch.tensor([[0, 2], [1, 0], [1, 3]]),
            'other_sentence': torch.tensor([[9, 4, 4, 5], [4, 0, 0, 0], [8, 8, 0, 0]])}


def test_training_scores_are_those_of_the_pairs():
    method, cfg, model, maps, things, tokens = made()
    model.eval()  # statistics at rest: a pair does not see the others
    with torch.no_grad():
        out = model(maps, things, tokens, None, targets())
        wrong = targets()
        close(out.scores[:, 0], scores_of(model, maps, things, tokens)[torch.arange(3), wrong['target']])
        row, at = wrong['other_object'].T
        elsewhere = scores_of(model, [m[row] for m in maps], Things(*(x[row] for x in things)), tokens)
        close(out.scores[:, 1], elsewhere[torch.arange(3), at])
        said = scores_of(model, maps, things, wrong['other_sentence'])
        close(out.scores[:, 2], said[torch.arange(3), wrong['target']])


def test_thrice_differs_in_the_statistics_of_a_batch_only():
    outs = {}
    for mode in (False, True):
        for thrice in (False, True):
            _, _, model, maps, things, tokens = made(thrice=thrice, word_dropout=0., att_dropout=0., dropout=0.)
            outs[mode, thrice] = model.train(mode)(maps, things, tokens, None, targets())
    close(outs[False, False].scores, outs[False, True].scores, atol=1e-12)
    assert (outs[True, False].scores - outs[True, True].scores).abs().max() > 1e-6


@pytest.mark.parametrize('change', [dict(floor=False), dict(both=False), dict(start=5.)])
def test_every_switch_changes_the_answer(change):
    *_, model, maps, things, tokens = made()
    *_, other, _, _, _ = made(**change)
    weights = model.state_dict()
    kept = {k: v for k, v in weights.items() if v.shape == other.state_dict()[k].shape and not ('start' in change and k.endswith('.s'))}
    other.load_state_dict(kept, strict=False)
    kinds = torch.tensor([[0, 1, -1, -1]]*3)  # few neighbours
    few = things._replace(kinds=kinds)
    seen = [scores_of(m, maps, few, t)[:, :2] for m in (model, other) for t in (tokens, tokens.flip(0))]
    assert max((a - b).abs().max() for a, b in zip(seen[:2], seen[2:])) > 1e-6 or 'floor' in change


def test_the_attributes_can_be_left_out():
    method, cfg, model, maps, things, tokens = made(att_weight=0.)
    batch = targets() | dict(tokens=tokens, lengths=torch.tensor([3, 2, 1]), attributes=torch.ones(3, ATTRIBUTES),
                             attribute_weights=torch.ones(ATTRIBUTES))
    out = method.forward(model.train(), (*maps, *things, *things), batch)
    loss, parts = method.loss(cfg, out, batch)
    loss.backward()
    assert 'attributes' not in parts and not any(p.requires_grad for p in model.subject.attributes.parameters())
    method, cfg, model, maps, things, tokens = made()
    loss, parts = method.loss(cfg, method.forward(model.train(), (*maps, *things, *things), batch), batch)
    loss.backward()
    assert parts['attributes'] > 0 and all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if 'embed' not in n)


def test_half_precision_gives_nearly_the_same_scores():
    method, cfg, model, maps, things, tokens = made()
    model, maps = model.float(), [m.float() for m in maps]
    things = things._replace(boxes=things.boxes.float())
    full = scores_of(model, maps, things, tokens)
    with torch.autocast('cpu', torch.bfloat16): half = scores_of(model, maps, things, tokens)
    assert half.dtype == torch.float32 and (half - full).abs().max() < .05


# learning

def test_eight_sentences_are_known_by_heart(tmp_path):
    from lts_nb.training.practice import by_heart, practice_batch, practice_set
    load_methods()
    method = METHODS['mattnet']
    cfg = method.config(**method.widths['cpu'])
    practice = practice_set(tmp_path, method, cfg)
    model, losses, ious = by_heart(method, cfg, practice, steps=200)
    features, batch = practice_batch(practice)
    with torch.no_grad(): out = method.forward(model.eval(), features, batch)
    right = (out.scores.argmax(1) == batch['target']).float().mean()
    assert right >= .9 and losses[-1] < losses[0]


def test_a_part_of_a_batch_is_padded_as_the_whole(split):
    rows = split.epoch_rows(0, 1)
    whole, part = split.batch(rows)['other_sentence'], split.batch(rows[3:5])['other_sentence']
    assert torch.equal(whole[3:5], part) and whole.shape[1] == max(map(len, split.ids))
