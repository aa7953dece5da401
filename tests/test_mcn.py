"""GARAN and MCN against the official Keras code's own numbers, and what both owe."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lts_nb.data.letterbox import letterbox_geometry, undo_letterbox
from lts_nb.errors import KitError
from lts_nb.model.method import METHODS
from lts_nb.rivals.cells import to_grid
from lts_nb.rivals.garan import GARAN
from lts_nb.rivals.mcn import (MCN, OFFICIAL_ANCHORS, Agreement, MCNConfig, MCNMethod, MeanPool, WordPool, asnls, best_box, box_as_logits,
                               box_iou, box_loss, corners, decode, kmeans_anchors, set_norm_eps, shape_iou, smooth_l1)
from lts_nb.training.config import load_methods

TOL = dict(rtol=0, atol=1e-9)
close = lambda a, b, **kind: torch.testing.assert_close(a, b, **(TOL | kind))


@pytest.fixture(scope='module')
def official(golden_parts):
    "part -> {kind/name: tensor} of the official code."
    return golden_parts('mcn')


def garan_state(w, prefix=''):
    "The official weights by our names; the collecting bias does not exist here."
    names = {'collect.weight': 'w_collect.weight', 'value.weight': 'w_value.weight', 'value.bias': 'w_value.bias',
             'distribute.weight': 'w_distribute.weight', 'distribute.bias': 'w_distribute.bias',
             'query.weight': 'w_query.weight', 'query.bias': 'w_query.bias'}
    names |= {f'norm.0.{k}': f'bn.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var')}
    return {ours: w[f'weight/{prefix}{theirs}'] for ours, theirs in names.items()}


def fill(module, state):
    "All weights of a module from a dictionary; only the count of batches may be missing."
    missing, extra = module.load_state_dict(state, strict=False)
    assert not extra and all(m.endswith('num_batches_tracked') for m in missing), (missing, extra)
    return module.double()


def no_momentum(module):
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): m.momentum = 0.
    return module


# GARAN

@pytest.fixture
def garan(official):
    g = official('keras_garan')
    module = fill(GARAN(8, 12, int(g['hyper/K'])), garan_state(g))
    set_norm_eps([module], float(g['hyper/bn_eps']))
    return g, no_momentum(module)


def test_garan_is_the_official_one(garan):
    g, module = garan
    out = module.eval()(g['in/x'], g['in/f'])
    close(out.added, g['out/att'])
    close(out.map, g['out/y_eval'])
    close(module.train()(g['in/x'], g['in/f']).map, g['out/y_train'])
    assert module.root == pytest.approx(float(g['hyper/root']), abs=1e-12)


def literal_garan(module, x, f):
    "The equations as they stand, group after group, with a bias on the collecting map if asked."
    B, d, h, w = x.shape
    K, c = module.groups, d//module.groups
    added, r_all = torch.zeros(B, d, h*w).to(x), []
    for b in range(B):
        cells = x[b].flatten(1).T                                       # (N,d)
        for k in range(K):
            if module.shared:
                X, maps = cells[:, k*c:(k + 1)*c], [module.collect, module.value, module.distribute]
                a, v, e = [m(X) for m in maps]
                u = module.query(f[b].chunk(K)[k])
            else:
                rows = slice(k*c, (k + 1)*c)
                a, v, e = [m(cells)[:, rows] for m in (module.collect, module.value, module.distribute)]
                u = module.query(f[b])[rows]
            r = a@u/module.root
            z = r.softmax(0)@v
            added[b, k*c:(k + 1)*c] = torch.outer(z, (e@u/module.root).sigmoid())
            r_all.append(r)
    return added.view_as(x), torch.stack(r_all).view(B, K, h, w)


@pytest.mark.parametrize('shared', [True, False])
def test_folded_garan_is_the_literal_one_and_of_rank_one(shared):
    torch.manual_seed(0)
    module = GARAN(12, 18, 3, shared).double().eval()
    x, f = torch.randn(2, 12, 5, 4).double(), torch.randn(2, 18).double()
    out = module(x, f)
    added, r = literal_garan(module, x, f)
    close(out.added, added, atol=1e-12)
    close(out.collect, r, atol=1e-12)
    for group in out.added.flatten(2).chunk(3, 1):
        s = torch.linalg.svdvals(group)
        assert (s[:, 1] < 1e-12).all() and (s[:, 0] > 1e-3).all()
    assert out.found.shape == (2, 12) and out.give.shape == (2, 3, 5, 4)
    assert 0 < out.give.min() and out.give.max() < 1


def test_a_bias_of_the_collecting_map_would_change_nothing(garan):
    g, module = garan
    assert g['weight/w_collect.bias'].abs().max() > .1  # the official one is there, and is left out
    x, f = g['in/x'], g['in/f']
    bias = g['weight/w_collect.bias'].clone().requires_grad_()
    cells = x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)  # (B,K,N,c)
    u = module.query(f.view(2, 2, 6))
    logits = ((cells@module.collect.weight.T + bias)*u[:, :, None]).sum(-1)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    (logits.softmax(-1)*weights).sum().backward()
    assert bias.grad.abs().max() < 1e-12


def test_shared_maps_are_smaller_by_the_square_of_the_groups():
    small, large = GARAN(24, 24, 4), GARAN(24, 24, 4, shared=False)
    for name in ('collect', 'value', 'distribute', 'query'):
        assert 16*getattr(small, name).weight.numel() == getattr(large, name).weight.numel()
    with pytest.raises(KitError, match='do not divide'): GARAN(10, 12, 4)


def test_groups_that_do_not_divide_are_refused_as_a_sentence():
    with pytest.raises(KitError, match='does not divide'): MCNConfig(groups=3)


# words

def test_pooling_of_words_is_the_official_one(official):
    g = official('keras_pool')
    pool = fill(WordPool(6, pads=True), {'logits.weight': g['weight/att.weight'], 'logits.bias': g['weight/att.bias']})
    close(pool(g['in/h'], None), g['out/f'])


def test_padding_does_not_enter_the_sentence_and_does_in_the_official_code():
    torch.manual_seed(0)
    pool, official = WordPool(6).double(), WordPool(6, pads=True).double()
    official.load_state_dict(pool.state_dict())
    words = torch.randn(1, 5, 6).double()
    short, long = words, F.pad(words, (0, 0, 0, 10))
    mask = torch.arange(15)[None] < 5
    close(pool(short, mask[:, :5]), pool(long, mask), atol=1e-14)
    assert (official(short, None) - official(long, None)).abs().max() > .1
    one = words[:, :1]
    close(pool(F.pad(one, (0, 0, 0, 4)), mask[:, :5] & (torch.arange(5) < 1)), one[:, 0], atol=1e-14)
    close(MeanPool()(long, mask), short.mean(1), atol=1e-14)


def test_no_word_weighs_much_more_than_another():
    pool = WordPool(4)
    nn.init.normal_(pool.logits.weight, std=100)
    words = torch.randn(3, 6, 4)
    a = pool.logits(words).tanh().softmax(1)
    assert (a.amax(1)/a.amin(1)).max() <= math.e**2*1.0001


# the whole head

def conv_state(w, ours, theirs, bn='bn'):
    "A block of convolution and batch normalisation."
    out = {f'{ours}.0.weight': w[f'weight/{theirs}.conv.weight']}
    return out | {f'{ours}.1.{k}': w[f'weight/{theirs}.bn.{k}'] for k in ('weight', 'bias', 'running_mean', 'running_var')}


def bn_state(w, ours, theirs):
    return {f'{ours}.{k}': w[f'weight/{theirs}.{k}'] for k in ('weight', 'bias', 'running_mean', 'running_var')}


@pytest.fixture
def head(official):
    "Our network with the official head's weights; its encoders are not used."
    g = official('keras_head')
    cfg = MCNConfig(emb_dim=4, gru_dim=6, d_m=16, d=8, aspp_width=int(g['hyper/aspp_width']), aspp_rates=tuple(g['hyper/rates'].tolist()),
                    groups=int(g['hyper/K']), norm_eps=float(g['hyper/bn_eps']))
    model = MCN(cfg, (16, 6, 4), 10)
    state = {}
    blocks = {'trunk.picture.0.block.0': 'fusion.res1', 'trunk.picture.0.block.1': 'fusion.res2', 'trunk.side2': 'mid.lateral',
              'trunk.mid': 'mid.out', 'trunk.side3': 'down.lateral', 'trunk.down': 'down.out', 'mask.branches.0': 'aspp.b0_1x1',
              'mask.branches.1': 'aspp.b1_rate6', 'mask.branches.2': 'aspp.b2_rate12', 'mask.branches.3': 'aspp.b3_rate18',
              'box.to_mid.1': 'box.d2_1x1', 'box.to_mid.2': 'box.d2_3x3', 'box.narrow': 'box.d1_pre', 'box.to_fused.1': 'box.d1_1x1',
              'box.to_fused.2': 'box.d1_3x3', 'box.top': 'box.top'}
    for ours, theirs in blocks.items(): state |= conv_state(g, ours, theirs)
    pool = conv_state(g, 'x', 'aspp.b4_pool')
    state |= {k.replace('x.0', 'mask.pool.1').replace('x.1', 'mask.pool.2'): v for k, v in pool.items()}
    state |= bn_state(g, 'trunk.text.1', 'fusion.text_bn') | bn_state(g, 'trunk.fused.0', 'fusion.out_bn')
    state['trunk.text.0.weight'] = g['weight/fusion.text.weight']
    # a bias in front of a normalisation: the stored mean holds it
    state['trunk.text.1.running_mean'] = state['trunk.text.1.running_mean'] - g['weight/fusion.text.bias']
    for ours, theirs in (('garan', 'garan_seg'), ('box.garan', 'garan_det')):
        state |= {f'{ours}.{k}': v for k, v in garan_state(g, theirs + '.').items()}
    for ours, theirs in (('mask.out', 'aspp.out'), ('box.out', 'box.out')):
        state |= {f'{ours}.{k}': g[f'weight/{theirs}.{k}'] for k in ('weight', 'bias')}
    for branch, theirs in (('mask', 'seg'), ('box', 'det')): state[f'agreement.{branch}.weight'] = g[f'weight/cem.{theirs}.weight']
    used = {n for n in model.state_dict() if not n.startswith(('language', 'pool')) and not n.endswith('num_batches_tracked')}
    assert used == set(state)
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra
    return g, no_momentum(model.double())


def test_the_whole_head_is_the_official_one(head):
    g, model = head
    maps, f = [g[f'in/f{i}'] for i in (1, 2, 3)], g['in/f']
    seen = {}
    for name, module in (('d2', model.box.narrow), ('d1', model.box.top)):
        module.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
    for name, module in (('a_seg', model.garan), ('a_det', model.box.garan)):
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.added}))
    for mode in ('eval', 'train'):
        model.train(mode == 'train')
        out = model.heads(maps, f)
        close(out.mask, g[f'out_{mode}/mask_logits'])
        close(out.box, g[f'out_{mode}/box'])
        close(out.agree[:, None], g[f'out_{mode}/c'])
        if mode == 'eval':
            for name, value in zip(('fused', 'mid', 'down'), model.trunk(*maps, f)): close(value, g[f'out_eval/{name}'])
            for name, value in seen.items(): close(value, g[f'out_eval/{name}'])
    assert len(seen) == 4


# agreement

@pytest.fixture
def cem(official):
    g = official('keras_cem')
    module = fill(Agreement(6), {'mask.weight': g['weight/seg.weight'], 'box.weight': g['weight/det.weight']})
    return g, module


def test_agreement_is_the_official_one(cem):
    g, module = cem
    agree, e_mask, e_box = module(g['in/a_seg'], g['in/a_det'])
    close(agree[:, None], g['out/c'])
    close(-(agree + 1e-6).log().sum(), g['out/loss_sum'])
    close(e_mask.sum((1, 2, 3)), torch.ones(2).double())
    close(e_box.sum((1, 2, 3)), torch.ones(2).double())


def test_folded_agreement_is_the_double_sum(cem):
    g, module = cem
    a, b = g['in/a_seg'], g['in/a_det']
    agree, e_mask, e_box = module(a, b)
    cosine = F.normalize(a.flatten(2), dim=1).transpose(1, 2) @ F.normalize(b.flatten(2), dim=1)
    table = ((cosine + 1)/2).clamp(1e-6, 1 - 1e-6)
    double = (e_mask.flatten(1)[:, None] @ table @ e_box.flatten(1)[..., None])[:, 0, 0]
    close(agree, double, atol=2e-6)
    assert (agree > 0).all() and (agree <= 1).all()


def test_biases_of_the_energies_would_change_nothing(cem):
    "So they are left out; the official ones are there."
    g, module = cem
    bias = g['weight/seg.bias'].clone().requires_grad_()
    a = g['in/a_seg']
    logits = (F.conv2d(a, g['weight/seg.weight'], bias)).flatten(2)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    (logits.softmax(-1)*weights).sum().backward()
    assert bias.grad.abs() < 1e-12 and bias.abs() > .1


def test_agreement_sees_directions_and_not_lengths(cem):
    g, module = cem
    nn.init.zeros_(module.mask.weight), nn.init.zeros_(module.box.weight)  # the energies would see them
    a, b = g['in/a_seg'], g['in/a_det']
    assert a.norm(dim=1).min() > 1e-2
    close(module(a, b)[0], module(7*a, .5*b)[0], atol=1e-12)
    # below a length of 1e-3 nothing is normalised, as in Keras
    assert (module(a, b)[0] - module(1e-5*a, b)[0]).abs().max() > 1e-3
    same = a[:, :, :1, :1].expand(-1, -1, 2, 2)
    close(module(same, same)[0], torch.ones(2).double(), atol=2e-6)
    close(module(same, -same)[0], torch.zeros(2).double(), atol=2e-6)


def test_all_directions_of_an_attention_lie_in_a_space_of_as_many_dimensions_as_groups():
    torch.manual_seed(0)
    out = GARAN(16, 12, 2).double()(torch.randn(2, 16, 6, 6).double(), torch.randn(2, 12).double())
    directions = F.normalize(out.added.flatten(2), dim=1)
    assert (torch.linalg.svdvals(directions)[:, 2:] < 1e-12).all()


# boxes

def test_boxes_are_decoded_like_the_official_ones(official):
    g = official('keras_decode')
    size = int(g['hyper/input'])
    anchors = g['in/anchors']/size
    boxes, t_o = decode(g['in/raw'], anchors)
    by_cell = boxes.permute(0, 2, 3, 1, 4)
    close(by_cell[..., :2], g['out/xy'])
    close(by_cell[..., 2:], g['out/wh'])
    close(t_o.permute(0, 2, 3, 1)[..., None].sigmoid(), g['out/conf'])
    best = best_box(g['in/raw'], anchors)
    close(best[:, 4:].sigmoid(), g['out/best_score'])
    left, top, right, bottom = (size*corners(best[:, :4])).T
    close(torch.stack([top, left, bottom, right], 1), g['out/best_yxyx_px'])


def test_the_loss_is_the_official_one(official):
    g = official('keras_loss')
    size = int(g['hyper/input'])
    anchors, px = g['in/anchors']/size, g['in/boxes_xyxy_px']
    # the official code floors the middle to a whole pixel before anything else
    middle = ((px[:, :2] + px[:, 2:])/2).floor()
    boxes = (torch.cat([middle, px[:, 2:] - px[:, :2]], 1)/size).float().double()
    truth = g['out/y_true'].double().flatten(1, 3)
    close(boxes, truth[truth[..., 4] > 0][:, :4], atol=1e-7)
    parts = box_loss(g['in/raw'], boxes, anchors, float(g['hyper/ignore']))
    seg = F.binary_cross_entropy_with_logits(g['in/mask_logits'], g['in/mask'], reduction='sum')/3
    cem = -(g['in/c'] + 1e-6).log().sum()/3
    total = float(g['hyper/seg_weight'])*seg + sum(parts.values()) + cem
    close(total, g['out/total'])
    method = MCNMethod()
    from lts_nb.rivals.mcn import MCNOutput
    out = MCNOutput(g['in/mask_logits'], g['in/raw'], g['in/c'][:, 0], None, None, None)
    cfg = MCNConfig(anchors=tuple(map(tuple, anchors.tolist())), seg_weight=float(g['hyper/seg_weight'])*16**2)
    loss, said = method.loss(cfg, out, {'prior': g['in/mask'], 'box': boxes})
    close(loss, total)
    assert list(said) == ['seg', 'xy', 'wh', 'obj', 'cem'] and not any(v.requires_grad for v in said.values())


def encoded(box, anchors, h, w):
    "Raw numbers that decode to a box at its responsible cell, by brute force."
    overlaps = [float(shape_iou(box[2:], torch.tensor(a, dtype=torch.double))) for a in anchors]
    a = overlaps.index(max(overlaps))
    x, y = min(int(box[0]*w), w - 1), min(int(box[1]*h), h - 1)
    raw = torch.full((1, 5*len(anchors), h, w), -20.).double()
    raw[:, :] = raw.view(1, len(anchors), 5, h, w).index_fill(2, torch.arange(4), 0.).view_as(raw)
    offset = torch.stack([box[0]*w - x, box[1]*h - y])
    raw[0, 5*a:5*a + 2, y, x] = offset.logit()
    raw[0, 5*a + 2:5*a + 4, y, x] = (box[2:]/torch.tensor(anchors[a], dtype=torch.double)).log()
    raw[0, 5*a + 4, y, x] = 20.
    return raw


def test_encode_and_decode_return_the_box_and_its_loss_is_small():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        box = torch.rand(4, generator=generator).double()*.9 + .05
        raw = encoded(box, OFFICIAL_ANCHORS, 3, 5)
        close(best_box(raw, OFFICIAL_ANCHORS)[0, :4], box)
        parts = box_loss(raw, box[None], OFFICIAL_ANCHORS)
        # cross-entropy against a fraction has a floor: its entropy
        p = torch.stack([box[0]*5 % 1, box[1]*3 % 1])
        floor = -(p*p.log() + (1 - p)*(1 - p).log()).sum()*(2 - box[2:].prod())
        close(parts['xy'], floor, atol=1e-9)
        assert parts['wh'] < 1e-9 and parts['obj'] < 1e-6


def test_a_middle_on_the_last_edge_stays_in_the_grid():
    box = torch.tensor([[1., 1., .2, .2], [0., 0., .2, .2]]).double()
    parts = box_loss(torch.zeros(2, 15, 4, 4).double(), box, OFFICIAL_ANCHORS)
    assert all(torch.isfinite(v) for v in parts.values())


def test_a_good_box_elsewhere_is_no_mistake_and_the_target_always_is_asked():
    box = torch.tensor([[.5, .5, .5, .5]]).double()
    raw = torch.zeros(1, 10, 1, 1).double()
    anchors = (.5, .5), (.48, .48)  # the second is nearly as good in the same cell
    raw[:, 9] = 20.
    few = float(box_loss(raw, box, anchors)['obj'])
    many = float(box_loss(raw, box, anchors, ignore=1.)['obj'])
    assert many > few + 15
    assert float(box_loss(raw, box, anchors, ignore=1e-9)['obj']) >= math.log(2) - 1e-9  # the target's own


def test_the_size_loss_is_continuous_where_it_changes():
    edge = torch.tensor([1/9 - 1e-9, 1/9 + 1e-9]).double()
    a, b = smooth_l1(edge)
    assert abs(float(a - b)) < 1e-8
    assert float(smooth_l1(torch.tensor(2.))) == pytest.approx(2 - 1/18, abs=1e-6)
    assert float(smooth_l1(torch.tensor(-.1))) == pytest.approx(4.5*.01, abs=1e-6)


def test_iou_of_boxes_against_pixels():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        xs, ys = (torch.randint(0, 20, (2, 2), generator=generator).sort(1).values for _ in 'xy')
        masks = [torch.zeros(20, 20, dtype=torch.bool) for _ in range(2)]
        boxes = []
        for m, (x0, x1), (y0, y1) in zip(masks, xs.tolist(), ys.tolist()):
            m[y0:y1 + 1, x0:x1 + 1] = True
            boxes.append(torch.tensor([(x0 + x1 + 1)/2, (y0 + y1 + 1)/2, x1 - x0 + 1., y1 - y0 + 1.]).double())
        expected = float((masks[0] & masks[1]).sum()/(masks[0] | masks[1]).sum())
        assert float(box_iou(*boxes)) == pytest.approx(expected, abs=1e-6)


def test_iou_of_shapes_is_that_of_boxes_with_one_middle():
    a, b = torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(0)).double() + .1
    middle = torch.zeros(9, 2).double()
    close(shape_iou(a, b), box_iou(torch.cat([middle, a], 1), torch.cat([middle, b], 1)))
    close(shape_iou(a, a), torch.ones(9).double())


# suppression

def test_a_box_beside_the_picture_is_brought_to_its_edge():
    m = torch.ones(1, 1, 4, 4).double()
    out = asnls(m, torch.tensor([[-6., 0., -3., 9.]]), torch.tensor([.5]).double())[0, 0]
    assert (out[:, 0] == 1.5).all() and (out[:, 1:] == .5).all()
    assert (asnls(m, torch.tensor([[7., 0., 9., 9.]]), torch.tensor([.5]).double()) == .5).all()


def test_suppression_is_the_official_one(official):
    g = official('keras_asnls')
    m = g['in/m'][None, None]
    for b, (top, left, bottom, right) in enumerate(g['in/boxes_yxyx'].tolist()):
        box = torch.tensor([[left, top, right, bottom]]).double()
        close(asnls(m, box, torch.ones(1), 'hard')[0, 0], g['out/hard'][b])
        for s, score in enumerate(g['in/scores']):
            close(asnls(m, box, score[None])[0, 0], g['out/m'][b, s], atol=2e-7)


def test_suppression_equals_a_loop_over_pixels_and_what_it_leaves():
    generator = torch.Generator().manual_seed(0)
    m = torch.rand(4, 1, 9, 7, generator=generator).double()
    boxes = torch.tensor([[1.2, 2.5, 4.49, 6.5], [-3., -3., 2., 2.], [5.6, 7., 30., 30.], [3., 3., 3., 3.]]).double()
    score = torch.tensor([.2, .35, .7, 1.], dtype=torch.double)
    out = asnls(m, boxes, score)
    for b in range(4):
        left, top, right, bottom = [math.floor(v + .5) for v in boxes[b].tolist()]
        for y in range(9):
            for x in range(7):
                inside = max(left, 0) <= x <= min(right, 7) and max(top, 0) <= y <= min(bottom, 9)
                factor = 2 - score[b] if inside else score[b]
                assert out[b, 0, y, x] == m[b, 0, y, x]*factor
    close(out[3:], m[3:], atol=0)                                   # s = 1: nothing happens
    y, x = torch.arange(9)[:, None], torch.arange(7)
    outside = ~((x <= 2) & (y <= 2))
    assert not (out[1, 0] > .35)[outside].any()                     # s = 0.35: nothing is left outside
    close(out[0, 0, 7, 4], m[0, 0, 7, 4]*1.8)                         # the box's last row and column belong to it


def test_the_finish_is_the_official_way_from_logits_to_mask(official):
    from lts_nb.rivals.mcn import MCNOutput
    g = official('keras_post')
    top, left, bottom, right = (g['in/box_yxyx']/64).tolist()
    score = float(g['in/score'])
    best = torch.tensor([[(left + right)/2, (top + bottom)/2, right - left, bottom - top, math.log(score/(1 - score))]]).double()
    out = MCNOutput(g['in/logits'][None, None], None, None, None, None, best)
    method, cfg = MCNMethod(), MCNConfig()
    full = method.finish(cfg, 'asnls', out, 64)
    assert full.shape == (1, 1, 64, 64) and full.dtype == torch.float32
    assert g['out/after_nls'].max() > 1.3 and full.max() == 1  # a map of the kit ends at 1, the official score does not
    close(full[0, 0], g['out/after_nls'].clamp_max(1), atol=1e-6)
    h, w = g['in/orig_hw'].tolist()
    # the official code rounds the picture's place in the square in another way than the kit
    left, top, new_w, new_h = g['out/crop_xywh'].tolist()
    place = replace(letterbox_geometry(h, w, 64), left=left, top=top, new_w=new_w, new_h=new_h)
    assert torch.equal(undo_letterbox(full[0, 0], place) > method.threshold, g['out/mask'])
    # without the cut every value is the official one
    box, s = 64*corners(best[:, :4]), best[:, 4].sigmoid().float()
    score = asnls(to_grid(method.probability(out), (64, 64)), box, s)
    close(score[0, 0], g['out/after_nls'], atol=1e-6)
    close(undo_letterbox(score[0, 0], place), g['out/final'], atol=1e-6)


def test_confidence_passes_the_sigmoid_once(official):
    from lts_nb.rivals.mcn import MCNOutput
    best = torch.tensor([[.5, .5, .2, .2, 4.]])
    out = MCNOutput(torch.zeros(1, 1, 8, 8), None, None, None, None, best)
    full = MCNMethod().finish(MCNConfig(), 'asnls', out, 64)
    assert float(full.min()) == pytest.approx(.982*.5, abs=1e-3) and float(full.max()) == pytest.approx(1.018*.5, abs=1e-3)
    hard = MCNMethod().finish(MCNConfig(nls='hard'), 'asnls', out, 64)
    assert hard.min() == 0 and float(hard.max()) == .5


# the method

@pytest.mark.parametrize('name', ['mcn', 'cgan'])
def test_half_precision_gives_finite_losses_and_nearly_the_same_maps(name):
    load_methods()
    method, (_, _, _, features, batch) = METHODS[name], made()
    cfg = method.config(**method.widths['smoke'])
    torch.manual_seed(0)
    model = method.build(cfg, (12, 10, 6), range(20)).eval()
    features = tuple(f.float() for f in features)
    batch = batch | dict(prior=batch['prior'].float(), mask=torch.zeros(3, 1, 32, 32))
    full = method.probability(method.forward(model, features, batch))
    with torch.autocast('cpu', torch.bfloat16):
        out = method.forward(model, features, batch)
        loss, parts = method.loss(cfg, out, batch)
    loss.backward()
    half = method.probability(out)
    assert half.dtype == torch.float32 and torch.isfinite(loss) and (half - full).abs().max() < .05
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for finish in method.finishes[1:]: assert torch.isfinite(method.finish(cfg, finish, out, 128)).all()


def test_it_is_registered_and_says_that_it_learns_from_boxes():
    load_methods()
    method = METHODS['mcn']
    assert method.finishes == ('asnls', 'plain') and method.threshold == .35 and method.needs == ('prior', 'box')
    assert any('boxes' in note for note in method.notes)


def made(**changes):
    method = METHODS['mcn']
    cfg = method.config(**method.widths['smoke'] | changes)
    torch.manual_seed(0)
    model = method.build(cfg, (12, 10, 6), range(20)).double()
    generator = torch.Generator().manual_seed(1)
    features = tuple(torch.rand(3, c, s, s, generator=generator).double() for c, s in ((12, 4), (10, 8), (6, 16)))
    batch = dict(tokens=torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0]]), lengths=torch.tensor([3, 2, 1]),
                 prior=(torch.rand(3, 1, 16, 16, generator=generator) > .8).double(),
                 box=torch.tensor([[.5, .5, .3, .3], [.2, .3, .2, .4], [.9, .9, .2, .2]]))
    return method, cfg, model, features, batch


@pytest.mark.parametrize('change', [dict(pool='mean'), dict(pads=True), dict(shared=False), dict(groups=4), dict(norm_eps=1e-2),
                                    dict(aspp_rates=(1, 2))])
def test_every_switch_changes_the_answer(change):
    method, cfg, model, features, batch = made()
    _, other_cfg, other, *_ = made(**change)
    weights = model.state_dict()
    other.load_state_dict({k: v for k, v in weights.items() if k in other.state_dict() and v.shape == other.state_dict()[k].shape}, strict=False)
    with torch.no_grad(): a, b = (method.forward(m.eval(), features, batch).mask for m in (model, other))
    assert a.shape == b.shape and (a - b).abs().max() > 1e-6


def test_without_agreement_its_loss_and_its_parameters_rest():
    method, cfg, model, features, batch = made(cem=False)
    loss, parts = method.loss(cfg, method.forward(model, features, batch), batch)
    loss.backward()
    assert 'cem' not in parts and not any(p.requires_grad for p in model.agreement.parameters())
    method, cfg, model, features, batch = made()
    loss, parts = method.loss(cfg, method.forward(model, features, batch), batch)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.agreement.parameters()) and 'cem' in parts


def test_the_box_points_at_its_middle():
    method, cfg, model, features, batch = made()
    out = method.forward(model.eval(), features, batch)
    prior = method.prior(out)
    assert prior.shape == (3, 1, 16, 16) and prior.dtype == torch.float32
    best = torch.tensor([[.3, .7, .25, .5, 1.5]])
    logits = box_as_logits(best, (20, 20))[0, 0]
    y, x = divmod(int(logits.argmax()), 20)
    assert abs((x + .5)/20 - .3) <= .026 and abs((y + .5)/20 - .7) <= .026
    at = lambda cx, cy: float(box_as_logits(torch.tensor([[cx, cy, .25, .5, 1.5]]), (1, 1)))
    assert float(box_as_logits(torch.tensor([[.5, .5, 1., 1., 1.5]]), (1, 1))) == 1.5


def test_one_sentence_cannot_be_trained_on():
    method, cfg, model, features, batch = made()
    one = dict(tokens=batch['tokens'][:1], lengths=batch['lengths'][:1])
    with pytest.raises(KitError, match='one sentence'): model.train()(tuple(f[:1] for f in features), **one)


def test_a_tail_is_applied_to_the_coarsest_map_and_keeps_its_own_eps():
    method, cfg, model, features, batch = made()
    tail = nn.Sequential(nn.Conv2d(7, 12, 1), nn.BatchNorm2d(12, eps=.125))
    cfg = cfg.replace(norm_eps=1e-3)
    model = method.build(cfg, (12, 10, 6), range(20), tail=tail).double()
    out = method.forward(model, (torch.rand(3, 7, 4, 4).double(), *features[1:]), batch)
    assert out.mask.shape == (3, 1, 16, 16) and tail[1].eps == .125 and model.trunk.fused[0].eps == 1e-3


def test_a_large_size_of_a_box_does_no_harm():
    raw = torch.zeros(1, 15, 2, 2)
    raw[:, 2::5], raw[:, 3::5] = 200., -200.
    best = best_box(raw, OFFICIAL_ANCHORS)
    parts = box_loss(raw, torch.tensor([[.5, .5, .2, .2]]), OFFICIAL_ANCHORS)
    out = asnls(torch.ones(1, 1, 8, 8), 8*corners(best[:, :4]), best[:, 4].sigmoid())
    assert all(torch.isfinite(v) for v in parts.values()) and torch.isfinite(out).all()
    assert torch.isfinite(box_as_logits(best, (4, 4))).all()


# anchors

def test_anchors_are_found_and_kept():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[10., 30], [40, 40], [90, 30]])
    sizes = centres.repeat(100, 1) + torch.rand(300, 2, generator=generator)
    found = kmeans_anchors(sizes)
    close(found, (centres + .5).double()[centres.prod(1).argsort()], atol=.2)
    assert torch.equal(found, kmeans_anchors(sizes)) and found.dtype == torch.float64
    with pytest.raises(KitError, match='too few'): kmeans_anchors(sizes[:2])


def test_anchors_survive_json():
    import json
    cfg = MCNConfig(**METHODS['mcn'].widths['cpu'])
    assert MCNConfig(**json.loads(json.dumps(cfg.plain()))) == cfg
