"BCAM (BRINet): the official code's values, and what the sheet of the method asks for."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.model.losses import downsample_mask
from lts_nb.rivals.bcam import (AXES, GBFM, BCAMConfig, BCAMMethod, BRINet, FourMaps, Relate, choose_words, flat,
                                gather_cells)
from lts_nb.rivals.cells import conv, coordinates

METHOD = BCAMMethod()
H, W, T = 8, 9, 6
# BRINet.py as it stands
OFFICIAL = dict(emb_dim=5, width=6, hidden=4, context=3, encoder='lstm', sentence='last', axis='receiver', leak=True,
                max_len=T, loss_grid=8, size=64)


def tensor(array): return torch.from_numpy(np.ascontiguousarray(array)).double()


def layer(name, into):
    "TensorFlow's two names of a convolution -> ours."
    return {f'{name}/DW': f'{into}.weight', f'{name}/biases': f'{into}.bias'}


def whole_names():
    "Official variables that are ours under another name."
    names = {'embedding': 'reader.encoder.embed.weight', **layer('out_feature', 'fusion.mix'), **layer('conv2_g', 'last')}
    for i, level in enumerate((5, 4, 3)):
        ours = f'levels.{i}'
        names |= layer(f'conv_{level}', f'look.laterals.maps.{i}') | layer(f'conv_sum{level}', f'aux.{i}')
        names |= layer(f'x{level}/conv_C1', f'{ours}.join') | layer(f'x{level}/conv_final_out', f'{ours}.out')
        names[f'x{level}/W_a'] = f'{ours}.relate.keys.weight'
        for k, rate in enumerate((1, 3, 5, 7)): names |= layer(f'x{level}/atrous_C_{rate}', f'{ours}.around.{k}')
    for theirs, unit in dict(l_34='t34', l_45='t45', left='t', r_34='b34', r_45='b45', right='b').items():
        names |= layer(f'{theirs}/feature', f'fusion.g.{unit}.feature') | layer(f'{theirs}/gate', f'fusion.g.{unit}.gate')
    return names


def ours_from(g, part):
    "Official arrays (weights or gradients: `part`) -> our parameters' names."
    of = {k[len(part):]: tensor(v) for k, v in g.items() if k.startswith(part)}
    out = {ours: of[theirs] for theirs, ours in whole_names().items()}
    for i, level in enumerate((5, 4, 3)):
        ours, x = f'levels.{i}', f'x{level}'
        out[f'{ours}.relate.of_words.weight'], out[f'{ours}.relate.of_cells.weight'] = of[f'{x}/W_q'].T, of[f'{x}/W_v'].T
        # [q, V, place]: the first C inputs are the sentence's
        joint = torch.cat([of[f'{x}/conv_v{k}/DW'] for k in (1, 2, 3, 4)])
        out[f'{ours}.relate.four.sentence.weight'] = joint[:, :6, 0, 0]
        out[f'{ours}.relate.four.cells.weight'] = joint[:, 6:]
        out[f'{ours}.relate.four.cells.bias'] = torch.cat([of[f'{x}/conv_v{k}/biases'] for k in (1, 2, 3, 4)])
    # i, j, f, o of one kernel over [x; h] -> i, f, g, o of torch's two
    kernel, bias = of['lstm/kernel'], of['lstm/bias']
    order = torch.arange(24).view(4, 6)[[0, 2, 1, 3]].flatten()
    out['reader.encoder.lstm.lstm.weight_ih_l0'], out['reader.encoder.lstm.lstm.weight_hh_l0'] = kernel[order, :5], kernel[order, 5:]
    out['reader.encoder.lstm.lstm.bias_ih_l0'] = bias[order]
    return out


@pytest.fixture(scope='module')
def g(golden): return golden('bcam')


def official(g, **changes):
    "Our network with the official weights."
    net = BRINet(BCAMConfig(**OFFICIAL | changes), (8, 7, 5), 12, grid=(H, W)).double()
    weights = ours_from(g, 'bcam/weight/')
    # BasicLSTMCell adds 1 to its forget gate; in torch the 1 stands in the bias
    weights['reader.encoder.lstm.lstm.bias_ih_l0'][6:12] += 1
    for name, key in {'weight_ih_l0': 'weight_ih_l0', 'weight_hh_l0': 'weight_hh_l0', 'bias_ih_l0': 'bias_ih_l0'}.items():
        torch.testing.assert_close(weights[f'reader.encoder.lstm.lstm.{name}'], tensor(g[f'bcam/weight/torch_lstm/{key}']))
    weights['reader.encoder.lstm.lstm.bias_hh_l0'] = torch.zeros(24)
    net.load_state_dict(weights)
    return net


def inputs(g, *cases):
    "Features and words of some cases as one batch; our padding stands at the end."
    features = [tensor(g[f'bcam/in/res{k}']).expand(len(cases), -1, -1, -1) for k in (5, 4, 3)]
    said = [[w for w in g[f'{case}/in/words'][0].tolist() if w] for case in cases]
    tokens = torch.zeros(len(cases), max(map(len, said)), dtype=torch.long)
    for i, s in enumerate(said): tokens[i, :len(s)] = torch.tensor(s)
    return features, tokens, torch.tensor([len(s) for s in said])


def near(ours, theirs): torch.testing.assert_close(ours, tensor(theirs).reshape(ours.shape), rtol=0, atol=1e-9)


def test_three_sentences_in_one_batch_answer_like_the_official_code(g):
    with torch.no_grad(): out = official(g)(*inputs(g, 'n4', 'n6', 'n1'))
    for i, case in enumerate(('n4', 'n6', 'n1')):
        near(out.mask[i], g[f'{case}/out/pred'])
        for aux, level in zip(out.aux, (5, 4, 3)): near(aux[i], g[f'{case}/out/aux{level}'])


def test_every_stage_is_the_official_one(g):
    net = official(g)
    features, tokens, lengths = inputs(g, 'n4')
    near(coordinates(H, W, features[0]), g['bcam/in/coord'])
    with torch.no_grad():
        words, q, mask, pads = net.read(tokens, lengths)
        near(words[0], g['n4/out/H'][2:])
        near(q[0], g['n4/out/H'][-1])
        V = net.look(features)
        B = []
        for i, level in enumerate((5, 4, 3)):
            near(V[i], g[f'n4/out/V{level}'])
            r = net.levels[i].relate(V[i], words, q, mask, pads)
            B.append(net.levels[i](V[i], words, q, mask, pads))
            near(B[-1], g[f'n4/out/B{level}'])
            if level == 3: continue
            u = net.levels[i].joined(r)
            for name, value in dict(z=r.z, l=r.l, u=u).items(): near(value, g[f'n4/out/{name}{level}'])
            if level == 4: continue
            near(r.alpha[0], g['n4/out/alpha5'][:, 2:])
            near(r.a[0], g['n4/out/a5'])
            near(r.R[0], g['n4/out/R5'].T)
            near(net.levels[i].surroundings(u)[:, :12], g['n4/out/context5'])
        u = net.fusion.g
        t34, t45, b34, b45 = u['t34'](B[1], B[2]), u['t45'](B[0], B[1]), u['b34'](B[2], B[1]), u['b45'](B[1], B[0])
        pairs = dict(t34=(B[1], B[2]), t45=(B[0], B[1]), b34=(B[2], B[1]), b45=(B[1], B[0]), t=(t45, t34), b=(b34, b45))
        for name, (x, y) in pairs.items(): near(u[name].opening(x, y), g[f'n4/out/gate_{name}'])


def test_the_padding_has_the_weights_of_zero_words(g):
    net = official(g)
    features, tokens, lengths = inputs(g, 'n4')
    with torch.no_grad(): words, q, mask, pads = net.read(tokens, lengths)
    with torch.no_grad(): alpha = net.levels[0].relate(net.look(features)[0], words, q, mask, pads).alpha[0]
    near(1 - alpha.sum(1), g['n4/out/alpha5'][:, :2].sum(1))


def batch_of(g, n):
    truth = torch.from_numpy(g['bcam/in/target_fine']).float().expand(n, -1, -1, -1)
    small = downsample_mask(truth, (H, W), 'nearest').double()
    return dict(mask=downsample_mask(truth, (2*H, 2*W)), prior=small)


def test_losses_and_gradients_are_the_official_ones(g):
    net = official(g)
    out = net(*inputs(g, 'n4'))
    batch = batch_of(g, 1)
    near(batch['prior'], g['n4/out/target'])
    loss, parts = METHOD.loss(net.cfg, out, batch)
    near(parts['seg'], g['n4/out/cls_loss'])
    for level in (5, 4, 3): near(parts[f'aux{level}'], g[f'n4/out/mid_loss_{level}'])
    near(loss.detach() + float(g['n4/out/reg_loss']), g['n4/out/cost'])
    loss.backward()
    # the file's gradients are those of the loss with its weight decay, which lies on convolutions' kernels alone
    grads, decay = ours_from(g, 'n4/grad/'), float(g['bcam/hyper/weight_decay'])
    learnt = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert set(grads) == set(learnt)
    decayed = {n for n, p in learnt.items() if p.ndim == 4 or n.endswith('four.sentence.weight')}
    near(decay/2*sum(learnt[n].detach().square().sum() for n in decayed), g['n4/out/reg_loss'])
    for name, p in learnt.items(): near(p.grad + decay*p.detach()*(name in decayed), grads[name])


def test_the_loss_of_three_sentences_is_the_mean_of_their_losses(g):
    net = official(g)
    loss, _ = METHOD.loss(net.cfg, net(*inputs(g, 'n4', 'n6', 'n1')), batch_of(g, 3))
    costs = [float(g[f'{case}/out/cost'] - g[f'{case}/out/reg_loss']) for case in ('n4', 'n6', 'n1')]
    near(loss.detach(), np.mean(costs))


@pytest.mark.parametrize('which', ['closed', 'open'])
def test_gates_that_are_closed_or_open(g, which):
    net = official(g)
    for unit in net.fusion.g.values(): torch.nn.init.constant_(unit.gate.bias, float(g[f'gates_{which}/hyper/gate_bias']))
    with torch.no_grad(): near(net(*inputs(g, 'n4')).mask[0], g[f'gates_{which}/out/pred'])


VARIANTS = {'source': dict(axis='source'), 'masked': dict(leak=False), 'source_masked': dict(axis='source', leak=False),
            'rates1234': dict(rates=(1, 2, 3, 4))}


@pytest.mark.parametrize('name', VARIANTS)
def test_the_other_readings(g, name):
    "Not official: our equations with one option changed, computed by those who ran the official code."
    with torch.no_grad(): out = official(g, **VARIANTS[name])(*inputs(g, 'n4'))
    near(out.mask[0], g[f'var_{name}/out/pred'])
    near(out.aux[0][0], g[f'var_{name}/out/aux5'])


# -- the sheet's checks

def loops(M1, M2, M3, H, W_q, W_v, W_a, axis):
    "Both attentions by loops over receivers p, sources q and words."
    P = len(M1)
    score, z = torch.zeros(P, P).double(), torch.zeros_like(M3)
    for p in range(P):
        weights = [math.exp(float(M1[p] @ h)) for h in H]
        l = sum(w*h for w, h in zip(weights, H))/sum(weights)
        a = torch.tanh(l @ W_q + M2[p] @ W_v)
        for q in range(P): score[p, q] = W_a[q] @ a
    for p in range(P):
        for q in range(P):
            rivals = score[p] if axis == 'source' else score[:, q]
            z[p] += score[p, q].exp()/rivals.exp().sum()*M3[q]
    return z


@pytest.mark.parametrize('axis', AXES)
def test_the_slow_twin_agrees(axis):
    torch.manual_seed(0)
    relate = Relate(5, 6, 4, 6, axis).double()
    V, q, words = torch.randn(2, 6, 3, 2).double(), torch.randn(2, 5).double(), torch.randn(2, 4, 6).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    with torch.no_grad():
        z = relate(V, words*mask[..., None], q, mask).z
        M1, M2, M3, _ = map(flat, relate.four(V, q))
        for i in range(2):
            H = words[i, :int(mask[i].sum())]
            slow = loops(M1[i], M2[i], M3[i], H, relate.of_words.weight.T, relate.of_cells.weight.T, relate.keys.weight, axis)
            torch.testing.assert_close(flat(z)[i], slow, rtol=0, atol=1e-6)


def test_equal_values_stay_equal_on_one_axis_only():
    scores, values = torch.randn(2, 12, 12).double(), torch.full((2, 12, 3), 2.).double()
    z, R = gather_cells(scores, values, 'source')
    torch.testing.assert_close(z, values)
    torch.testing.assert_close(R.sum(2), torch.ones(2, 12).double())
    z, R = gather_cells(scores, values, 'receiver')
    torch.testing.assert_close(R.sum(1), torch.ones(2, 12).double())
    torch.testing.assert_close(z, 2*R.sum(2, keepdim=True).expand(-1, -1, 3))
    assert z.std(1).min() > .1
    with pytest.raises(KitError, match='axis'): gather_cells(scores, values, 'sender')


def test_by_source_it_is_fused_attention_of_scale_one():
    a, keys, values = torch.randn(2, 12, 4), torch.randn(12, 4), torch.randn(2, 12, 6)
    fused = F.scaled_dot_product_attention(a, keys.expand(2, -1, -1), values, scale=1.)
    torch.testing.assert_close(gather_cells(a @ keys.T, values)[0], fused, rtol=1e-4, atol=1e-5)


def test_what_a_cell_gathers_does_not_depend_on_what_the_others_show():
    torch.manual_seed(0)
    for axis, known in (('source', 1), ('receiver', 6)):
        relate = Relate(5, 6, 4, 6, axis).double()
        # both maps of the questions are leaves
        m1, m2, words = torch.randn(1, 6, 6).double(), torch.randn(1, 6, 6).double(), torch.randn(1, 3, 6).double()
        m1.requires_grad_(), m2.requires_grad_()
        l, _ = choose_words(m1, words, torch.ones(1, 3).bool())
        a = (relate.of_words(l) + relate.of_cells(m2)).tanh()
        _, R = gather_cells(relate.keys(a), torch.zeros(1, 6, 1).double(), axis)
        for grad in torch.autograd.grad(R[0, 2, 4], (m1, m2)):
            touched = (grad[0].abs().sum(1) > 0).nonzero().flatten().tolist()
            assert len(touched) == known and 2 in touched


def small(**changes):
    torch.manual_seed(0)
    cfg = METHOD.config(**METHOD.widths['smoke'], size=64).replace(**changes)
    return BRINet(cfg, (7, 6, 5), 20).double().eval()


def maps(n, grid=8):
    torch.manual_seed(1)
    return [torch.randn(1, c, grid//k, grid//k).double().expand(n, -1, -1, -1) for c, k in ((7, 4), (6, 2), (5, 1))]


SAID = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])


@pytest.mark.parametrize('changes', [{}, dict(leak=True), dict(axis='receiver'), dict(attend='embed'), dict(sentence='last'),
                                     dict(encoder='lstm'), dict(encoder='lstm', attend='embed', sentence='last', leak=True)],
                         ids=str)
def test_padding_and_neighbours_change_nothing_under_any_switch(changes):
    net = small(**changes)
    with torch.no_grad():
        both = net(maps(2), SAID, torch.tensor([4, 2])).mask
        torch.testing.assert_close(net(maps(1), SAID[1:, :2], torch.tensor([2])).mask[0], both[1], rtol=0, atol=1e-9)
        # and each switch changes something
        if changes: assert (both - small()(maps(2), SAID, torch.tensor([4, 2])).mask).abs().max() > 1e-4


def test_the_zero_words_draw_a_short_sentence_towards_zero():
    words, cells, mask = torch.randn(1, 2, 6), torch.randn(1, 5, 6), torch.ones(1, 2).bool()
    length = [choose_words(cells, words, mask, torch.tensor([n]))[0].norm() for n in (0, 3, 13)]
    assert length[0] > 1.1*length[1] > 1.2*length[2]
    torch.testing.assert_close(length[0], choose_words(cells, words, mask)[0].norm())


def test_last_is_where_each_direction_ends():
    net = small(sentence='last')
    h, _, mask = net.reader.encoder(SAID, torch.tensor([4, 2]))
    _, hidden = net.reader.encoder.gru(net.reader.encoder.embed(SAID[1:, :2]))
    torch.testing.assert_close(net.reader.last(h, mask)[1], torch.cat([hidden[0, 0], hidden[1, 0]]))


def test_the_sentence_need_not_be_copied():
    four, V, q = FourMaps(5, 6).double(), torch.randn(2, 6, 3, 4).double(), torch.randn(2, 5).double()
    kernel = torch.cat([four.sentence.weight[..., None, None], four.cells.weight], 1)
    place = coordinates(3, 4, V).expand(2, -1, -1, -1)
    plain = F.conv2d(torch.cat([q[:, :, None, None].expand(-1, -1, 3, 4), V, place], 1), kernel, four.cells.bias).relu()
    torch.testing.assert_close(torch.cat(four(V, q), 1), plain)
    # each of the four starts within the bounds of its own 1×1 convolution over the whole concatenation
    bound = conv(5 + 6 + 8, 6).weight.abs().max()
    assert kernel.abs().max() <= 1.05*(6/(19 + 6))**.5 and abs(kernel.abs().max() - bound) < .05


def test_gates_at_their_ends_and_the_levels_in_reverse():
    torch.manual_seed(0)
    fusion = GBFM(6).double()
    B5, B4, B3 = torch.randn(3, 2, 6, 4, 5).double()
    with torch.no_grad():
        there = fusion.both_ways(B5, B4, B3)
        turned = GBFM(6).double()
        for mine, theirs in dict(t34='b45', t45='b34', t='b', b34='t45', b45='t34', b='t').items():
            turned.g[mine].load_state_dict(fusion.g[theirs].state_dict())
        torch.testing.assert_close(turned.both_ways(B3, B4, B5), there[::-1])
        for bias, wanted in ((-100., (B3, B5)), (100., 2*(B3 + 2*B4 + B5,))):
            for unit in fusion.g.values(): torch.nn.init.constant_(unit.gate.bias, bias)
            torch.testing.assert_close(fusion.both_ways(B5, B4, B3), wanted)


def test_the_grid_of_the_loss_and_the_weight_of_the_small_masks():
    lengths = torch.tensor([4, 2])
    batch = dict(mask=torch.zeros(2, 1, 16, 16), prior=torch.zeros(2, 1, 8, 8))
    out = small()(maps(2), SAID, lengths)
    assert out.mask.shape[-1] == 16 and [a.shape[-1] for a in out.aux] == [8, 8, 8]
    assert METHOD.stride(small().cfg) == 4
    half, parts = METHOD.loss(small(aux=.5).cfg, out, batch)
    torch.testing.assert_close(half, parts['seg'] + .5*(parts['aux5'] + parts['aux4'] + parts['aux3']))
    coarse = small(loss_grid=8, aux=0.)
    out = coarse(maps(2), SAID, lengths)
    assert out.mask.shape[-1] == 8 and out.aux == () and METHOD.stride(coarse.cfg) == 8
    assert set(METHOD.loss(coarse.cfg, out, batch)[1]) == {'seg'}


def test_another_size_is_a_sentence():
    with pytest.raises(KitError, match=r'the maps are \(4, 4\), LVAM has one row of weights'): small()(maps(1, 4), SAID[:1], torch.tensor([4]))
    with pytest.raises(KitError, match='no word'): small()(maps(1), SAID[:1], torch.tensor([0]))
    with pytest.raises(KitError, match='no word'): small(encoder='lstm')(maps(1), SAID[:1], torch.tensor([0]))
    for wrong in (dict(axis='sender'), dict(rates=()), dict(loss_grid=2), dict(aux=-1.)):
        with pytest.raises(KitError): BCAMConfig(**wrong)


def test_half_precision_changes_little():
    net = small().float()
    features, lengths = [m.float() for m in maps(2)], torch.tensor([4, 2])
    with torch.no_grad():
        full = net(features, SAID, lengths).mask
        with torch.autocast('cpu', torch.bfloat16): half = net(features, SAID, lengths).mask
    assert torch.isfinite(half).all() and (half.float() - full).abs().max() < .05*full.abs().max()
