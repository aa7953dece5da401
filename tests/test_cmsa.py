"""CMSA against loops over its equations, in double precision; and what holds of it by construction.

The loops (`slow_level`, `slow_fusion`, `slow`) never see our modules: they read weights by the official code's names
(`CMSA/conv3d/kernel` …, conv kernels as (out, in, ...), see the golden values' README) and maps as arrays.
`load` fills our network from the same names. So official values, once somebody has them, need one file: cmsa.npz with
`net/weight/NAME`, `net/in/X5`, `X4`, `X3` (1, C, h, w), `nN/in/words` (ids, padded in front), `nN/out/pred` and
perhaps `nN/grad/NAME` for N words; `test_golden` reads it and skips until then."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lts_nb.errors import KitError
from lts_nb.model.method import METHODS
from lts_nb.rivals.cells import coordinates, unit
from lts_nb.rivals.cmsa import CMSA, CMSAConfig, GatedFusion, PairMap, attend, mean_over_words, pool_pairs

LEVELS, TF_LEVEL = (5, 4, 3), {5: 'CMSA', 4: 'CMSA_C4', 3: 'CMSA_C3'}
CHANNELS, E, WORDS = (7, 6, 5), 6, 12
SMALL = dict(emb_dim=E, lateral=5, reduced=(7, 6), d=(4, 3, 3), width=5)
SIZES = dict(zip(LEVELS, zip((5, *CHANNELS[1:]), (0, 7, 6), (4, 3, 3))))


def official_names():
    "Our parameter -> the official code's variable, without text_objseg/."
    names = {'embed.weight': 'embedding', 'lateral.weight': 'mlp_c5/DW', 'lateral.bias': 'mlp_c5/biases',
             'score.weight': 'score/DW', 'score.bias': 'score/biases'}
    for i, level in enumerate(LEVELS):
        pairs = {f'levels.{i}.{ours}': f'{TF_LEVEL[level]}/{theirs}' for ours, theirs in
                 [('query', 'conv3d'), ('key', 'conv3d_1'), ('value', 'conv3d_2'), ('back', 'conv3d_3')]}
        pairs[f'levels.{i}.last'] = ('conv2d', 'conv2d_1', 'conv2d_2')[i]
        if level < 5: pairs[f'levels.{i}.reduce'] = {4: 'conv3d', 3: 'conv3d_1'}[level]
        pairs[f'fusion.maps.{i}'] = f'mgate/x{i + 1}/conv2d'
        for ours, theirs in pairs.items():
            names |= {f'{ours}.weight': f'{theirs}/kernel', f'{ours}.bias': f'{theirs}/bias'}
    return names


def shares(): return [f'mgate/x{i}/Variable' for i in (1, 2, 3)]


def load(model, weights):
    "Official weights, by name, into our network. Their map gives u, m, r in this order, and so does ours."
    weights = {k: torch.as_tensor(v, dtype=torch.double) for k, v in weights.items()}
    state = {ours: weights[theirs].reshape(model.get_parameter(ours).shape) for ours, theirs in official_names().items()}
    state['fusion.share'] = torch.stack([weights[n].reshape(()) for n in shares()])
    model.load_state_dict(state)
    return model


def drawn(seed=0, scale=1.):
    "Weights by the official names, large enough that the softmax is far from uniform."
    torch.manual_seed(seed)
    model = CMSA(CMSAConfig(**SMALL), CHANNELS, WORDS).double()
    g = torch.Generator().manual_seed(seed + 1)
    def draw(p, s): return torch.randn(p.shape, generator=g, dtype=torch.double)*s
    out = {}
    for ours, theirs in official_names().items():
        p = model.get_parameter(ours)
        wide = 4. if any(f'.{k}.weight' in ours for k in ('query', 'key')) else 1.2
        out[theirs] = draw(p, .3 if p.ndim == 1 else scale*wide/math.sqrt(p[0].numel()))
    out['embedding'] = draw(model.embed.weight, 1.)
    return out | {n: torch.tensor(v, dtype=torch.double) for n, v in zip(shares(), (.3, .6, .8))}


def relu(v): return v.clamp_min(0)


def length_one(v): return v/v.norm()


def affine(weights, name, v):
    kernel = weights[f'{name}/kernel']
    return kernel.reshape(len(kernel), -1) @ v + weights[f'{name}/bias']


def block_of(t, y, x, n, h, w, side, deep):
    "The members of a block of pairs whose first one is (t, y, x), as far as they exist."
    return itertools.product(range(t, min(t + deep, n)), range(y, min(y + side, h)), range(x, min(x + side, w)))


def blocks(n, h, w, side, deep):
    for t, y, x in itertools.product(range(0, n, deep), range(0, h, side), range(0, w, side)):
        yield list(block_of(t, y, x, n, h, w, side, deep))


def slow_level(weights, level, cells, words, qkv='relu', pool=2, pool_words=True, scale=False):
    "One sentence's real words (n, E), one map of unit vectors (C, h, w): X (width, h, w), pair by pair."
    (C, h, w), n, name = cells.shape, len(words), TF_LEVEL[level]
    end = (lambda v: v) if qkv == 'linear' else relu
    places = coordinates(h, w, cells)[0]
    # every pair's vector, joined
    g = {}
    for t, y, x in itertools.product(range(n), range(h), range(w)):
        f = torch.cat([cells[:, y, x], words[t], places[:, y, x]])
        g[t, y, x] = f if level == 5 else relu(affine(weights, {4: 'conv3d', 3: 'conv3d_1'}[level], f))
    theta, phi, gamma = [{p: end(affine(weights, f'{name}/conv3d{k}', v)) for p, v in g.items()} for k in ('', '_1', '_2')]
    # the largest of each block, channel by channel
    keys, values = [], []
    for block in blocks(n, h, w, pool, pool if pool_words else 1):
        keys.append(torch.stack([phi[p] for p in block]).amax(0))
        values.append(torch.stack([gamma[p] for p in block]).amax(0))
    keys, values = torch.stack(keys), torch.stack(values)
    d = keys.shape[1]
    y_all = {}
    for p in g:
        logits = keys @ theta[p]
        if scale: logits = logits/math.sqrt(d)
        o = end(affine(weights, f'{name}/conv3d_3', logits.softmax(0) @ values))
        y_all[p] = g[p] + o
    last = {5: 'conv2d', 4: 'conv2d_1', 3: 'conv2d_2'}[level]
    rows = []
    for y in range(h):
        means = [torch.stack([y_all[t, y, x] for t in range(n)]).mean(0) for x in range(w)]
        rows.append(torch.stack([relu(affine(weights, last, m)) for m in means], 1))
    return torch.stack(rows, 1)


def slow_conv(kernel, bias, x):
    "A 3×3 convolution with zeros outside, tap by tap."
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    h, w = x.shape[1:]
    out = bias[:, None, None].expand(-1, h, w).clone()
    for i, j in itertools.product(range(3), range(3)):
        out = out + torch.einsum('oc,chw->ohw', kernel[:, :, i, j], padded[:, i:i + h, j:j + w])
    return out


def sigmoid(x): return 1/(1 + (-x).exp())


def slow_fusion(weights, X):
    "The gates, level by level; X is {5: …, 4: …, 3: …}."
    total = 0
    for i, (level, (j, k)) in enumerate({5: (4, 3), 4: (5, 3), 3: (5, 4)}.items()):
        made = slow_conv(weights[f'mgate/x{i + 1}/conv2d/kernel'], weights[f'mgate/x{i + 1}/conv2d/bias'], X[level])
        width = len(X[level])
        u, m, r = made[:width], sigmoid(made[width:2*width] + 1), sigmoid(made[2*width:] + 1)
        a = weights[f'mgate/x{i + 1}/Variable']
        c = a*m*X[j] + (1 - a)*m*X[k] + (1 - m)*u
        total = total + r*torch.tanh(c) + (1 - r)*X[level]
    return total


def slow(weights, maps, ids, **how):
    "res5, res4, res3 (C, h, w) of one grid and one sentence's ids, without padding: the logits (1, h, w)."
    kernel = weights['mlp_c5/DW']
    V5 = torch.einsum('oc,chw->ohw', kernel.reshape(len(kernel), -1), maps[0]) + weights['mlp_c5/biases'][:, None, None]
    words = torch.stack([length_one(weights['embedding'][t]) for t in ids])
    X = {}
    for level, V in zip(LEVELS, (V5, *maps[1:])):
        cells = V/V.norm(dim=0, keepdim=True)
        X[level] = slow_level(weights, level, cells, words, **how)
    return slow_conv(weights['score/DW'], weights['score/biases'], slow_fusion(weights, X))


SENTENCES = [[2, 3, 4, 5, 6], [7, 8], [9], [2, 10, 3, 11]]


def made_up(sentences=SENTENCES, grid=(3, 4), seed=4):
    "Maps on one grid, as the official code has them, and padded sentences."
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(len(sentences), c, *grid, generator=g, dtype=torch.double) for c in CHANNELS]
    tokens = torch.zeros(len(sentences), max(map(len, sentences)), dtype=torch.long)
    for i, s in enumerate(sentences): tokens[i, :len(s)] = torch.tensor(s)
    return maps, tokens, torch.tensor([len(s) for s in sentences])


def network(weights=None, **changes):
    torch.manual_seed(0)
    model = CMSA(CMSAConfig(**SMALL | dict(loss_grid=8) | changes), CHANNELS, WORDS).double().eval()
    return load(model, weights) if weights else model


HOW = [{}, dict(qkv='linear'), dict(pool=1), dict(qkv='linear', pool=1), dict(pool_words=False), dict(scale=True)]


@pytest.mark.parametrize('how', HOW, ids=str)
def test_the_network_is_its_loops(how):
    "Four sentences of 5, 2, 1 and 4 words in one batch against each one alone, pair by pair."
    weights = drawn()
    maps, tokens, lengths = made_up()
    with torch.no_grad(): fast = network(weights, **how)(maps, tokens, lengths).mask
    for i, s in enumerate(SENTENCES):
        alone = slow(weights, [m[i] for m in maps], s, **how)
        torch.testing.assert_close(fast[i], alone, rtol=0, atol=1e-11)
    assert fast.std() > .01


def test_every_switch_that_changes_attention_changes_the_answer():
    weights = drawn()
    maps, tokens, lengths = made_up()
    with torch.no_grad(): answers = [network(weights, **how)(maps, tokens, lengths).mask for how in HOW]
    for a, b in itertools.combinations(answers, 2): assert (a - b).abs().max() > 1e-4


def test_gradients_are_those_of_the_loops():
    weights = {k: v.clone().requires_grad_() for k, v in drawn(3).items()}
    maps, tokens, lengths = made_up()
    model = network({k: v.detach() for k, v in weights.items()})
    g = torch.Generator().manual_seed(1)
    target = torch.randn(4, 1, 3, 4, generator=g, dtype=torch.double)
    (model(maps, tokens, lengths).mask*target).sum().backward()
    sum((slow(weights, [m[i] for m in maps], s)*target[i]).sum() for i, s in enumerate(SENTENCES)).backward()
    for ours, theirs in official_names().items():
        p = model.get_parameter(ours)
        torch.testing.assert_close(p.grad, weights[theirs].grad.reshape(p.shape), rtol=0, atol=1e-10, msg=ours)
    share = torch.stack([weights[n].grad for n in shares()])
    torch.testing.assert_close(model.fusion.share.grad, share, rtol=0, atol=1e-10)


def test_golden(golden):
    "Official weights and outputs, where somebody has run the official code (see the top of this file)."
    try: arrays = golden('cmsa')
    except FileNotFoundError: pytest.skip('no golden values of CMSA')
    weights = {k.removeprefix('net/weight/'): v for k, v in arrays.items() if k.startswith('net/weight/')}
    cases = sorted({k.split('/')[0] for k in arrays if k.endswith('/in/words')})
    maps = [torch.as_tensor(arrays[f'net/in/X{level}'], dtype=torch.double) for level in LEVELS]
    channels = [m.shape[1] for m in maps]
    kernel = {k: np.shape(v) for k, v in weights.items()}
    cfg = CMSAConfig(emb_dim=kernel['embedding'][1], lateral=kernel['mlp_c5/DW'][0], width=kernel['conv2d/kernel'][0],
                     reduced=(kernel['conv3d/kernel'][0], kernel['conv3d_1/kernel'][0]), loss_grid=8,
                     d=tuple(kernel[f'{TF_LEVEL[level]}/conv3d/kernel'][0] for level in LEVELS))
    model = load(CMSA(cfg, channels, kernel['embedding'][0]).double(), weights)
    ids = [[int(t) for t in np.ravel(arrays[f'{c}/in/words']) if t] for c in cases]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for i, s in enumerate(ids): tokens[i, :len(s)] = torch.tensor(s)
    out = model([m.expand(len(ids), -1, -1, -1) for m in maps], tokens, torch.tensor([len(s) for s in ids])).mask
    for i, c in enumerate(cases):
        torch.testing.assert_close(out[i], torch.as_tensor(arrays[f'{c}/out/pred'])[0], rtol=0, atol=1e-9)
        grads = torch.autograd.grad(out[i].sum(), list(model.parameters()), retain_graph=True)
        named = dict(zip([n for n, _ in model.named_parameters()], grads))
        for ours, theirs in official_names().items():
            if f'{c}/grad/{theirs}' not in arrays: continue
            wanted = torch.as_tensor(arrays[f'{c}/grad/{theirs}']).reshape(named[ours].shape)
            torch.testing.assert_close(named[ours], wanted, rtol=0, atol=1e-9)


def test_golden_values_are_read_by_their_names(tmp_path, monkeypatch):
    "A file of that form, made by the loops, passes; a single exchanged weight does not."
    weights = drawn(5)
    maps, _, _ = made_up()
    arrays = {f'net/weight/{k}': v.numpy() for k, v in weights.items()}
    arrays |= {f'net/in/X{level}': m[:1].numpy() for level, m in zip(LEVELS, maps)}
    for s in SENTENCES[:3]:
        arrays[f'n{len(s)}/in/words'] = np.array([[0]*(6 - len(s)) + s])
        arrays[f'n{len(s)}/out/pred'] = slow(weights, [m[0] for m in maps], s)[None].numpy()
    test_golden(lambda name: arrays)
    swapped = arrays | {'net/weight/CMSA/conv3d/kernel': arrays['net/weight/CMSA/conv3d_1/kernel']}
    with pytest.raises(AssertionError): test_golden(lambda name: swapped)


def test_a_joined_vector_is_mapped_by_its_parts():
    torch.manual_seed(0)
    layer = PairMap(4, 3, 6).double()
    nn.init.normal_(layer.bias)
    cells, words, places = torch.randn(2, 5, 4).double(), torch.randn(2, 3, 3).double(), torch.randn(1, 5, 8).double()
    joined = torch.cat([cells[:, None].expand(-1, 3, -1, -1), words[:, :, None].expand(-1, -1, 5, -1),
                        places[:, None].expand(2, 3, -1, -1)], -1)
    torch.testing.assert_close(layer(cells, words, places), nn.functional.linear(joined, layer.weight, layer.bias))


def factorised(level, cells, words):
    "The linear attention of one sentence as a softmax over cells times a softmax over words: P + n keys."
    C, E = cells.shape[0], words.shape[1]
    V = torch.cat([cells.flatten(1).mT, coordinates(*cells.shape[1:], cells)[0].flatten(1).mT], 1)
    def parts(layer):
        W_v, W_e, W_s = layer.weight.split([C, E, 8], 1)
        return V @ torch.cat([W_v, W_s], 1).mT, words @ W_e.mT
    (x, y), (u, w), (a, b) = parts(level.query), parts(level.key), parts(level.value)
    rows = []
    for y_t in y:
        queries = x + y_t + level.query.bias
        over_cells, over_words = (queries @ u.mT).softmax(-1), (queries @ w.mT).softmax(-1)
        rows.append(over_cells @ a + over_words @ b + level.value.bias)
    return torch.stack(rows)


@pytest.mark.parametrize('qkv', ['linear', 'relu'])
def test_linear_attention_at_level_5_is_one_over_cells_and_one_over_words(qkv):
    model = network(drawn(), qkv=qkv, pool=1)
    level, words = model.levels[0], unit(torch.randn(1, 3, E, dtype=torch.double), -1)
    cells, real = unit(torch.randn(1, 5, 3, 4, dtype=torch.double)), torch.ones(1, 3, dtype=torch.bool)
    sides = cells.flatten(2).mT, words, coordinates(3, 4, cells).flatten(2).mT
    with torch.no_grad():
        _, *rest = level.triple(sides, real, (3, 4))
        error = (attend(*rest)[0] - factorised(level, cells[0], words[0])).abs().max()
    assert error < 1e-12 if qkv == 'linear' else error > 1e-2


@pytest.mark.parametrize('level,joint', [(5, False), (4, True), (3, True)])
def test_the_weights_of_linear_attention_are_a_product_only_where_the_input_is_a_sum(level, joint):
    model = network(drawn(), qkv='linear', pool=1)
    i = LEVELS.index(level)
    torch.manual_seed(2)
    cells = unit(torch.randn(1, SIZES[level][0], 3, 4, dtype=torch.double))
    words, real = unit(torch.randn(1, 3, E, dtype=torch.double), -1), torch.ones(1, 3, dtype=torch.bool)
    sides = cells.flatten(2).mT, words, coordinates(3, 4, cells).flatten(2).mT
    with torch.no_grad():
        _, theta, phi, _, _ = model.levels[i].triple(sides, real, (3, 4))
        A = torch.einsum('btpd,bkd->btpk', theta, phi).softmax(-1).unflatten(-1, (3, 12))
        product = A.sum(-2, keepdim=True)*A.sum(-1, keepdim=True)
    far = (A - product).abs().max()
    assert far > 1e-3 if joint else far < 1e-14


def pred(model, sentence, grid=(4, 4)):
    maps, tokens, lengths = made_up([sentence], grid)
    with torch.no_grad(): return model(maps, tokens, lengths).mask


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5])
def test_without_pooling_of_words_order_does_not_matter(n):
    s = [2, 3, 4, 5, 6][:n]
    for how in (dict(pool=1), dict(pool_words=False)):
        model = network(drawn(), **how)
        torch.testing.assert_close(pred(model, s[::-1]), pred(model, s), rtol=0, atol=1e-12)


def test_with_pooling_only_the_pairing_of_words_matters():
    model = network(drawn())
    said = pred(model, [2, 3, 4, 5, 6])
    for same in ([3, 2, 4, 5, 6], [4, 5, 2, 3, 6], [5, 4, 3, 2, 6]):
        torch.testing.assert_close(pred(model, same), said, rtol=0, atol=1e-12)
    for other in ([2, 4, 3, 5, 6], [6, 2, 3, 4, 5]):
        assert (pred(model, other) - said).abs().max() > 1e-4


def test_words_of_a_gru_know_their_order():
    model = network(words='gru', gru_dim=3, pool=1)
    assert (pred(model, [2, 3, 4]) - pred(model, [4, 3, 2])).abs().max() > 1e-6
    assert not hasattr(model, 'embed')


@pytest.mark.parametrize('width', [4, 16])
def test_logits_are_not_divided_unless_they_are_asked_to_be(width):
    "Every channel twice: the logits double. Divided by √d they would grow by √2."
    g = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(*s, width, generator=g, dtype=torch.double) for s in ((1, 2, 3), (1, 5), (1, 5))]
    valid = torch.ones(1, 5, dtype=torch.bool)
    twice, thrice = torch.cat([q, q], -1), torch.cat([k, k], -1)
    def by_hand(factor): return (factor*q.flatten(1, 2) @ k.mT).softmax(-1) @ v
    def both(scale): return attend(twice, thrice, torch.cat([v, v], -1), valid, scale)[..., :width].flatten(1, 2)
    torch.testing.assert_close(both(False), by_hand(2.))
    torch.testing.assert_close(both(True), by_hand(2/math.sqrt(2*width)))


@pytest.mark.parametrize('side,with_words', [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize('n', [1, 2, 3])
def test_pooling_is_the_largest_of_each_block(side, with_words, n):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3*5, 2, generator=g, dtype=torch.double)
    real = torch.arange(4)[None] < n
    keys, valid = pool_pairs(x, real, (3, 5), side, with_words)
    wanted = [torch.stack([x[0, t, 5*row + column] for t, row, column in block]).amax(0)
              for block in blocks(n, 3, 5, side, side if with_words else 1)]
    torch.testing.assert_close(keys[valid], torch.stack(wanted))
    assert valid.sum() == len(wanted) and (keys[~valid] == 0).all()


def fusion_at(memory=0., reset=0., gate='code'):
    "A fusion whose gates are where the biases put them, and maps of two channels."
    torch.manual_seed(0)
    fusion = GatedFusion(2, gate).double()
    for layer in fusion.maps:
        with torch.no_grad():
            n = 2 if gate == 'code' else 1
            layer.weight[-2*n:] = 0
            layer.bias[-2*n:-n], layer.bias[-n:] = memory, reset
    return fusion, [torch.rand(1, 2, 3, 3, dtype=torch.double) for _ in range(3)]


@pytest.mark.parametrize('gate', ['code', 'paper'])
def test_closed_gates_add_the_levels_and_open_ones_mix_the_others(gate):
    fusion, X = fusion_at(-60., -60., gate)
    torch.testing.assert_close(fusion(X), sum(X))
    fusion, X = fusion_at(60., 60., gate)
    with torch.no_grad(): fusion.share.copy_(torch.tensor([.2, .5, .9]))
    a = fusion.share.detach()
    if gate == 'code': mixed = [a[0]*X[1] + (1 - a[0])*X[2], a[1]*X[0] + (1 - a[1])*X[2], a[2]*X[0] + (1 - a[2])*X[1]]
    else: mixed = [a[1]*X[1] + a[2]*X[2], a[0]*X[0] + a[2]*X[2], a[0]*X[0] + a[1]*X[1]]
    torch.testing.assert_close(fusion(X), sum(c.tanh() for c in mixed))


def test_the_gradient_of_the_share_is_the_equations():
    fusion, X = fusion_at(.7, -.4)
    fusion(X).sum().backward()
    m, r = torch.tensor([1.7, .6], dtype=torch.double).sigmoid()
    for i, (j, k) in enumerate([(1, 2), (0, 2), (0, 1)]):
        u = fusion.maps[i](X[i])[:, :2]
        c = .5*m*X[j] + .5*m*X[k] + (1 - m)*u
        wanted = (m*(X[j] - X[k])*r*(1 - c.tanh()**2)).sum()
        torch.testing.assert_close(fusion.share.grad[i], wanted)


def test_the_papers_gate_belongs_to_the_sender():
    "One number a cell: what level 5 takes of level 4 follows level 4's memory gate, not its own."
    torch.manual_seed(0)
    fusion = GatedFusion(2, 'paper').double()
    assert fusion.maps[0].out_channels == 2 and GatedFusion(2).maps[0].out_channels == 6
    X = [torch.rand(1, 2, 3, 3, dtype=torch.double) for _ in range(3)]
    made = [layer(x) for layer, x in zip(fusion.maps, X)]
    m, r = [(y[:, :1] + 1).sigmoid() for y in made], [(y[:, 1:] + 1).sigmoid() for y in made]
    total = 0
    for i in range(3):
        c = (1 - m[i])*X[i] + sum(.5*m[j]*X[j] for j in range(3) if j != i)
        total = total + r[i]*c.tanh() + (1 - r[i])*X[i]
    torch.testing.assert_close(fusion(X), total)


def kit_maps(B=2, side=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(B, c, side//s, side//s, generator=g) for c, s in zip(CHANNELS, (32, 16, 8))]


@pytest.mark.parametrize('changes,side', [({}, 32), (dict(loss_grid=8), 16), (dict(own_grid=True), 32)])
def test_it_answers_on_the_grid_it_trains_on(changes, side):
    method, cfg = METHODS['cmsa'], CMSAConfig(**SMALL | changes)
    model = method.build(cfg, CHANNELS, range(WORDS))
    out = method.forward(model, kit_maps(), dict(tokens=torch.tensor([[2, 3, 4], [5, 0, 0]]), lengths=torch.tensor([3, 1])))
    assert method.probability(out).shape == (2, 1, side, side) and 128//method.stride(cfg) == side


def test_each_level_attends_on_its_own_grid_where_it_is_asked_to():
    shared, own = network(), network(own_grid=True)
    maps = [m.double() for m in kit_maps()]
    assert [tuple(m.shape[-2:]) for m in shared.levels_of(maps)] == [(16, 16)]*3
    assert [tuple(m.shape[-2:]) for m in own.levels_of(maps)] == [(4, 4), (8, 8), (16, 16)]
    for m in shared.levels_of(maps) + own.levels_of(maps): assert (m.norm(dim=1) - 1).abs().max() < 1e-9


def test_a_black_cell_is_no_trouble():
    "A cell whose channels are all zero has no direction: it stays zero, and so do its gradients."
    model = network()
    maps = [torch.zeros_like(m).double() for m in kit_maps()]
    out = model(maps, torch.tensor([[2, 3], [4, 5]]), torch.tensor([2, 2])).mask
    out.sum().backward()
    assert torch.isfinite(out).all() and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_tail_of_the_backbone_is_applied_to_the_coarsest_map():
    tail = nn.Conv2d(CHANNELS[0], CHANNELS[0], 1).double()
    torch.manual_seed(0)
    model = CMSA(CMSAConfig(**SMALL), CHANNELS, WORDS, tail=tail).double()
    maps, (tokens, lengths) = [m.double() for m in kit_maps()], (torch.tensor([[2, 3], [4, 5]]), torch.tensor([2, 2]))
    with_tail = model(maps, tokens, lengths).mask
    with_tail.sum().backward()
    assert tail.weight.grad.abs().max() > 0
    model.tail = nn.Identity()
    torch.testing.assert_close(model([tail(maps[0]), *maps[1:]], tokens, lengths).mask, with_tail)


def test_half_precision_is_near_single():
    torch.manual_seed(0)
    model = CMSA(CMSAConfig(**METHODS['cmsa'].widths['smoke']), CHANNELS, WORDS).eval()
    batch = torch.tensor([[2, 3, 4], [5, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        exact = model(kit_maps(), *batch).mask
        with torch.autocast('cpu', torch.bfloat16): rough = model(kit_maps(), *batch).mask
    assert (exact - rough.float()).abs().max() < .05*max(1., exact.abs().max().item())


def test_mean_over_words_does_not_see_the_padding():
    x = torch.tensor([1., 3., 100.]).view(1, 3, 1, 1)
    assert mean_over_words(x, torch.tensor([[True, True, False]])).item() == 2


def test_its_refusals_are_sentences():
    maps, _, _ = made_up([[2], [3]])
    with pytest.raises(KitError, match='no word'): network()(maps, torch.zeros(2, 1, dtype=torch.long), torch.tensor([1, 0]))
    for wrong, said in [(dict(qkv='sigmoid'), 'qkv'), (dict(pool=3), 'pool'), (dict(gate='open'), 'gate'),
                        (dict(reduced=(4,)), 'reduced'), (dict(d=(4, 4, 0)), '1 or more'), (dict(loss_grid=2), 'loss_grid')]:
        with pytest.raises(KitError, match=said): CMSAConfig(**wrong)


def test_published_widths_cost_what_they_cost():
    "25 million weights beside the embedding, and 809 GFLOP at 416 pixels and 15 words, nearly all of them attention."
    from lts_nb.model.method import count_flops
    method = METHODS['cmsa']
    with torch.no_grad(), torch.device('meta'):
        model = method.build(CMSAConfig(), (1024, 512, 256), range(10)).eval()
        maps = [torch.empty(1, c, 416//s, 416//s) for c, s in zip((1024, 512, 256), (32, 16, 8))]
        words, real = torch.empty(1, 15, 300), torch.ones(1, 15, dtype=torch.bool)
        flops = 0
        model.requires_grad_(False)
        for level, cells in zip(model.levels, model.levels_of(maps)): flops += count_flops(level, cells, words, real)[0]
        X = torch.empty(1, 500, 52, 52)
        flops += count_flops(model.fusion, [X]*3)[0]
    assert sum(p.numel() for p in model.parameters()) - 10*300 == pytest.approx(25.3e6, rel=.01)
    assert flops == pytest.approx(809e9, rel=.01)
