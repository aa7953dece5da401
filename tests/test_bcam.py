"BCAM (BRINet): the official code's values, and what the sheet of the method asks for."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.model.losses import downsample_mask
from lts_nb.rivals.bcam import AXES, BCAM, GBFM, BCAMConfig, BCAMMethod, BRINet, FourMaps, choose_words, flat, gather_cells
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
