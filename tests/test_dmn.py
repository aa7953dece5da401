"DMN against values that its official code computed, and the checks of its lesson at full length."
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lts_nb.errors import KitError
from lts_nb.model.method import METHODS, count_flops
from lts_nb.rivals.cells import coordinates
from lts_nb.rivals.dmn import (DMN, DMNConfig, SRU, Mix, SRULayer, Upsampling, WordFilters, prefix_scan, reading, remember,
                               remember_across)
from lts_nb.training.config import load_methods

load_methods()
method = METHODS['dmn']
EXACT = dict(rtol=0, atol=1e-9)
CHANNELS = 12, 10, 6


@pytest.fixture(autouse=True)
def double():
    "Everything in float64."
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


def tensor(array): return torch.tensor(array)


def fill(layer, weight, bias):
    "The official SRU's weights, whose columns stand unit by unit, in our blocks."
    n, columns = weight.shape
    blocks = weight.reshape(n, layer.d, columns//layer.d).transpose(2, 1, 0).reshape(columns, n)
    with torch.no_grad():
        layer.project.weight.copy_(tensor(blocks))
        layer.bias.copy_(tensor(bias.reshape(2, layer.d)))
    return layer


def fill_stack(sru, arrays, prefix):
    for i, layer in enumerate(sru.layers):
        fill(layer, arrays[f'{prefix}.rnn_lst.{i}.weight'], arrays[f'{prefix}.rnn_lst.{i}.bias'])
    return sru


def fill_linear(layer, weight, bias):
    with torch.no_grad():
        layer.weight.copy_(tensor(weight).reshape(layer.weight.shape))
        layer.bias.copy_(tensor(bias))


def part(arrays, name): return {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}


# ---------------------------------------------------------------- golden values

@pytest.mark.parametrize('name', ['sru_eq', 'sru_ne'])
def test_golden_layer(golden, name):
    g = part(golden('dmn'), f'{name}/')
    layer = fill(SRULayer(int(g['hyper/n_in']), int(g['hyper/n_out'])), g['weight/weight'], g['weight/bias'])
    x, c0, kept = tensor(g['in/x']), tensor(g['in/c0']), []

    def memory(f, u, c=None):
        kept.append(remember(f, u, c)[-1])
        return remember(f, u, c)
    torch.testing.assert_close(layer(layer.project(x), x, memory), tensor(g['out/h']), **EXACT)
    torch.testing.assert_close(layer(layer.project(x), x, lambda f, u: memory(f, u, c0)), tensor(g['out/h_from_c0']), **EXACT)
    torch.testing.assert_close(kept[0], tensor(g['out/c_last']), **EXACT)
    torch.testing.assert_close(kept[1], tensor(g['out/c_last_from_c0']), **EXACT)


def test_golden_stack(golden):
    g = part(golden('dmn'), 'sru_stack/')
    sru = fill_stack(SRU(4, 6, 3), {'x.' + k.removeprefix('weight/'): v for k, v in g.items()}, 'x')
    torch.testing.assert_close(sru(tensor(g['in/x'])), tensor(g['out/h']), **EXACT)


def official(g, **changes):
    "Our network with the golden weights: 7 channels, 12 words, grid 4×4."
    cfg = DMNConfig(**dict(emb_dim=6, d_lang=5, filters=3, d_mix=6, d_state=8, order='scan', stage='low', aligned=True) | changes)
    net = DMN(cfg, (7, 3, 3), 12)
    with torch.no_grad(): net.words.embed.weight.copy_(tensor(g['weight/emb.weight']))
    fill_stack(net.words.sru, g, 'weight/lang_model')
    fill_stack(net.synthesis.memory, g, 'weight/mrnn')
    fill_linear(net.synthesis.filters.make, g['weight/adaptative_filter.weight'], g['weight/adaptative_filter.bias'])
    fill_linear(net.synthesis.mix.linear, g['weight/comb_conv.weight'], g['weight/comb_conv.bias'])
    if net.collapse is not None:
        fill_linear(net.collapse, g['weight/output_collapse.weight'], g['weight/output_collapse.bias'])
    return net.eval()


def golden_case(g):
    vis = tensor(g['in/vis'])
    return vis, tensor(g['in/words']), torch.tensor([int(g['hyper/L'])])


def test_golden_coordinates(golden):
    g = golden('dmn')
    torch.testing.assert_close(coordinates(4, 4).double(), tensor(g['net_low/out/spatial']).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(coordinates(3, 5).double(), tensor(g['spatial/out/h3w5']).double(), rtol=0, atol=1e-7)


def test_golden_network_in_the_official_order(golden):
    g = part(golden('dmn'), 'net_low/')
    high = tensor(golden('dmn')['net_high/out/y'])
    net = official(g)
    vis, words, lengths = golden_case(g)
    with torch.no_grad():
        r, mask = net.words(words, lengths)
        torch.testing.assert_close(r[0, :, 6:], tensor(g['out/lang'])[:, 0], **EXACT)
        sm = net.synthesis
        torch.testing.assert_close(sm.filters.kernels(r)[0], tensor(g['out/filters']), **EXACT)
        V = torch.cat([vis, coordinates(4, 4, like=vis)], 1).flatten(2).transpose(1, 2)
        found = sm.filters(V, r)
        torch.testing.assert_close(found[:, 0].transpose(1, 2).unflatten(-1, (4, 4)), tensor(g['out/response']), **EXACT)
        # M itself, through a layer that projects nothing away
        eye = SRULayer(6, 6)
        M = sm.mix(V, r, found, eye)[1]
        torch.testing.assert_close(M[:, 0].transpose(1, 2).unflatten(-1, (4, 4)), tensor(g['out/m']), **EXACT)
        # all states, cell after cell
        product, M = sm.mix(V, r, found, sm.memory.layers[0])
        h = sm.memory(M, remember_across, product)
        torch.testing.assert_close(h[:, 0].transpose(0, 1).flatten(0, 1)[:, None], tensor(g['out/seq_out']), **EXACT)
        R5 = sm(vis, r, mask)
        torch.testing.assert_close(R5, high, **EXACT)
        torch.testing.assert_close(net.collapse(R5), tensor(g['out/y']), **EXACT)
        # the answer of the low-resolution network is this map, larger
        grids = vis, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16)
        out = net(grids, words, lengths).mask
        assert out.shape == (1, 1, 32, 32)
        for grid in (True, False):
            larger = F.interpolate(tensor(g['out/y']), size=(32, 32), mode='bilinear', align_corners=grid)
            torch.testing.assert_close(official(g, aligned=grid)(grids, words, lengths).mask, larger, **EXACT)
        # per cell it is another map
        assert (official(g, order='pixel').synthesis(vis, r, mask) - high).abs().max() > .1


def test_golden_network_in_a_batch(golden):
    "The same sentence stands between a shorter and a longer one."
    g = part(golden('dmn'), 'net_low/')
    vis, words, lengths = golden_case(g)
    net = official(g)
    tokens = torch.tensor([[5, 6, 0, 0, 0, 0], [*words[0].tolist(), 0, 0], [1, 2, 3, 4, 5, 6]])
    maps = torch.cat([vis.flip(2), vis, 2*vis])
    with torch.no_grad(): R5 = net.synthesis(maps, *net.words(tokens, torch.tensor([2, 4, 6])))
    torch.testing.assert_close(R5[1:2], tensor(golden('dmn')['net_high/out/y']), **EXACT)


@pytest.mark.parametrize('name', ['um0', 'um1'])
@pytest.mark.parametrize('aligned', [True, False])
def test_golden_upsampling(golden, name, aligned):
    g = part(golden('dmn'), f'{name}/')
    um = Upsampling(8, (5, 4, 3), g['hyper/widths'].tolist(), act=name == 'um1', aligned=aligned)
    for i in range(3):
        fill_linear(um.convs[i], g[f'weight/convs.{i}.1.weight'], g[f'weight/convs.{i}.1.bias'])
        if name == 'um1': um.acts[i].weight.data.copy_(tensor(g[f'weight/convs.{i}.2.weight']))
    fill_linear(um.out, g['weight/out_layer.weight'], g['weight/out_layer.bias'])
    out = um(tensor(g['in/x']), [tensor(g[f'in/i{k}']) for k in (5, 4, 3)])
    torch.testing.assert_close(out, tensor(g[f"out/y_{'aligned' if aligned else 'half_pixel'}"]), **EXACT)


# ---------------------------------------------------------------- the cell

def slow_layer(layer, x, c0=0.):
    "One layer as the sheet writes it, number by number: x (T, n)."
    T, d = len(x), layer.d
    W = layer.project.weight.unflatten(0, (-1, d))
    h = torch.empty(T, d)
    for j in range(d):
        c = c0
        for t in range(T):
            fresh = sum(W[0, j, i]*x[t, i] for i in range(layer.n))
            f = torch.sigmoid(sum(W[1, j, i]*x[t, i] for i in range(layer.n)) + layer.bias[0, j])
            r = torch.sigmoid(sum(W[2, j, i]*x[t, i] for i in range(layer.n)) + layer.bias[1, j])
            other = x[t, j] if layer.n == d else sum(W[3, j, i]*x[t, i] for i in range(layer.n))
            c = f*c + (1 - f)*fresh
            h[t, j] = r*torch.tanh(c) + (1 - r)*other
    return h


def random_layer(n, d, act='tanh'):
    torch.manual_seed(1)
    layer = SRULayer(n, d, act)
    torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize('n,d', [(4, 4), (3, 4)])
def test_sru_against_a_scalar_loop(n, d):
    layer = random_layer(n, d)
    assert layer.project.weight.shape == ((3 if n == d else 4)*d, n)
    x = torch.randn(5, n)
    torch.testing.assert_close(layer(layer.project(x), x), slow_layer(layer, x), rtol=0, atol=1e-12)
    x = x[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(layer.project(x), x), x)


@pytest.mark.parametrize('n,d', [(4, 4), (3, 4)])
def test_the_limits_of_its_gates(n, d):
    layer, x = random_layer(n, d), torch.randn(5, n)
    product = layer.project(x)
    fresh, *_, last = product.split(d, -1)
    highway = x if n == d else last
    with torch.no_grad(): layer.bias[1] = -1e3
    torch.testing.assert_close(layer(product, x), highway)
    with torch.no_grad(): layer.bias[1], layer.bias[0] = 1e3, -1e3
    torch.testing.assert_close(layer(product, x), fresh.tanh())
    with torch.no_grad(): layer.bias[0] = 1e3
    torch.testing.assert_close(layer(product, x), torch.zeros(5, d))


def test_weights_start_as_the_official_ones():
    torch.manual_seed(0)
    layer = SRULayer(300, 50)
    assert layer.project.weight.abs().max() <= .1 and abs(layer.project.weight.std()*3**.5 - .1) < 1e-3
    assert not layer.bias.any() and layer.project.bias is None


def test_without_tanh():
    layer = random_layer(4, 4, 'none')
    with torch.no_grad(): layer.bias[1], layer.bias[0] = 1e3, -1e3
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(layer.project(x), x), layer.project(x)[:, :4])


# ---------------------------------------------------------------- the walk

def walk(f, g):
    "All words of cell 0, then all of cell 1: one step after the other."
    T, B, P, d = f.shape
    c, out = torch.zeros(B, d), torch.empty(T, B, P, d)
    for p in range(P):
        for t in range(T):
            c = f[t, :, p]*c + g[t, :, p]
            out[t, :, p] = c
    return out


@pytest.mark.parametrize('cells', [1, 2, 5, 8, 13])
@pytest.mark.parametrize('kind', ['random', 'hard'])
def test_prefix_scan_equals_the_loop(cells, kind):
    torch.manual_seed(cells)
    f, g = torch.rand(3, 2, cells, 4), torch.randn(3, 2, cells, 4)
    if kind == 'hard': f = torch.randint(0, 3, f.shape)/2  # exactly 0, ½ or 1
    torch.testing.assert_close(remember_across(f, g), walk(f, g), rtol=0, atol=1e-12)
    one = walk(f[:1], g[:1])[0]
    torch.testing.assert_close(prefix_scan(f[0], g[0]), one, rtol=0, atol=1e-12)
    f, g = f[:2, :1, :5].requires_grad_(), g[:2, :1, :5].requires_grad_()
    assert torch.autograd.gradcheck(remember_across, (f, g))


def test_the_two_readings():
    "The known trap: 100·word + cell, flattened cell after cell, of which the last P are the map."
    L, P = 3, 4
    made = 100*torch.arange(L)[:, None] + torch.arange(P)
    official = made.T.flatten()[-P:]
    assert official.tolist() == [202, 3, 103, 203]
    for order, expected in (('scan', [202, 3, 103, 203]), ('pixel', [200, 201, 202, 203])):
        word, cell = reading(order, torch.tensor([L, 1, 2]), P)
        assert made[word[0], cell[0]].tolist() == expected
        assert word[1].tolist() == [0]*P and cell[1].tolist() == list(range(P))
    word, cell = reading('scan', torch.tensor([2]), P)
    assert (100*word + cell)[0].tolist() == made[:2].T.flatten()[-P:].tolist()


# ---------------------------------------------------------------- the network

def network(seed=0, **changes):
    torch.manual_seed(seed)
    cfg = DMNConfig(**dict(emb_dim=6, d_lang=8, filters=3, d_mix=7, d_state=9, um=(6, 5, 4)) | changes)
    net = DMN(cfg, CHANNELS, 20)
    for name, p in net.named_parameters():
        if 'bias' in name: torch.nn.init.normal_(p, std=.3)
    return net


def case(B=3, side=3):
    generator = torch.Generator().manual_seed(7)
    maps = tuple(torch.randn(B, c, s*side, s*side, generator=generator) for c, s in zip(CHANNELS, (1, 2, 4)))
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])[:B]
    return maps, tokens, (tokens > 0).sum(1)


def plain_state(net, v, tokens):
    "SM of one sentence as its equations stand, without any shortcut: v (C, h, w), tokens (L,)."
    cfg, sm = net.cfg, net.synthesis
    h, w = v.shape[1:]
    V = torch.cat([v[None], coordinates(h, w, like=v)], 1)
    e = net.words.embed(tokens)
    x = e
    for layer in net.words.sru.layers: x = slow_layer(layer, x)
    M = []
    for r in torch.cat([e, x], 1):
        weight = sm.filters.make(r).view(cfg.filters, -1, 1, 1)
        if cfg.filter_act == 'sigmoid': weight = weight.sigmoid()
        found = F.conv2d(V, weight)/(V.shape[1] if cfg.filter_scale else 1)
        joined = torch.cat([V, r[None, :, None, None].expand(-1, -1, h, w), found], 1)
        M.append(F.conv2d(joined, sm.mix.linear.weight[..., None, None], sm.mix.linear.bias)[0].flatten(1))
    M = torch.stack(M)                                  # (L, M, P)
    if cfg.order == 'pixel':
        states = []
        for p in range(h*w):
            x = M[..., p]
            for layer in sm.memory.layers: x = slow_layer(layer, x)
            states.append(x[-1])
        return torch.stack(states, 1).view(-1, h, w)
    x = M.permute(2, 0, 1).flatten(0, 1)                # cell after cell
    for layer in sm.memory.layers: x = slow_layer(layer, x)
    return x[-h*w:].T.reshape(-1, h, w)


@pytest.mark.parametrize('changes', [{}, {'order': 'scan'}, {'d_state': 7}, {'filter_act': 'none', 'filter_scale': True}],
                         ids=['pixel', 'scan', 'M as wide as R', 'filters'])
def test_synthesis_against_its_equations(changes):
    net = network(mix_layers=2, lang_layers=2, **changes)
    maps, tokens, lengths = case(side=2)
    with torch.no_grad():
        R5 = net.synthesis(maps[0], *net.words(tokens, lengths))
        for i in range(3):
            slow = plain_state(net, maps[0][i], tokens[i, :lengths[i]])
            torch.testing.assert_close(R5[i], slow, rtol=0, atol=1e-10)


def test_filters_are_a_convolution_with_each_words_own_kernel():
    torch.manual_seed(0)
    filters = WordFilters(5, 4, 3)
    V, r = torch.randn(2, 5, 2, 3), torch.randn(2, 4, 4)
    made, found = filters.kernels(r), filters(V.flatten(2).transpose(1, 2), r)
    assert made.shape == (2, 4, 3, 5) and 0 < made.min() and made.max() < 1
    for b in range(2):
        for t in range(4):
            own = F.conv2d(V[b:b + 1], made[b, t][..., None, None])[0].flatten(1).T
            torch.testing.assert_close(found[t, b], own, rtol=0, atol=1e-12)


@pytest.mark.parametrize('state', [6, 9])
def test_the_split_product_equals_the_plain_chain(state):
    torch.manual_seed(0)
    mix, layer = Mix(5, 4, 3, 6), SRULayer(6, state)
    V, r, found = torch.randn(2, 7, 5), torch.randn(2, 3, 4), torch.randn(3, 2, 7, 3)
    product, M = mix(V, r, found, layer)
    plain = mix.linear(torch.cat([V.expand(3, -1, -1, -1), r.transpose(0, 1)[:, :, None].expand(-1, -1, 7, -1), found], -1))
    torch.testing.assert_close(product, layer.project(plain), rtol=0, atol=1e-12)
    if state == 6: torch.testing.assert_close(M, plain, rtol=0, atol=1e-12)
    else: assert M is None


@pytest.mark.parametrize('order', ['pixel', 'scan'])
def test_padding_and_neighbours_change_nothing(order):
    net = network(order=order).eval()
    maps, tokens, lengths = case()
    with torch.no_grad():
        together = net(maps, tokens, lengths).mask
        longer = net(maps, F.pad(tokens, (0, 3)), lengths).mask
        torch.testing.assert_close(longer, together, rtol=0, atol=1e-12)
        for i, n in enumerate(lengths):
            alone = net(tuple(m[i:i + 1] for m in maps), tokens[i:i + 1, :n], lengths[i:i + 1]).mask
            torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-12)


def reached(net, cell):
    "Cells of R₅ that change with one cell of V: (h·w,) of bool, for a sentence of two words."
    maps, tokens, lengths = case()
    other = maps[0].clone()
    other.flatten(2)[..., cell] += 1
    with torch.no_grad():
        r, mask = net.words(tokens, lengths)
        change = net.synthesis(other, r, mask) - net.synthesis(maps[0], r, mask)
    return change.abs().amax(1).flatten(1)[1] > 1e-12


def test_each_cell_is_alone_and_the_official_order_carries_on():
    assert reached(network(), 4).tolist() == [p == 4 for p in range(9)]
    # two words: places 0 … 8 read the states 9 … 17, which belong to the cells 4, 5, 5, 6, 6 …
    assert reached(network(order='scan'), 3).all()
    assert reached(network(order='scan'), 5).tolist() == [False, *[True]*8]
    assert reached(network(order='scan'), 8).tolist() == [*[False]*7, True, True]


@pytest.mark.parametrize('order', ['pixel', 'scan'])
def test_the_order_of_words_matters(order):
    net = network(order=order)
    maps, tokens, lengths = case(1)
    with torch.no_grad(): assert (net(maps, tokens, lengths).mask - net(maps, tokens.flip(1), lengths).mask).abs().max() > 1e-4


def test_one_word_still_tells_the_orders_apart():
    maps, tokens, lengths = case(1)
    lengths = torch.tensor([1])
    with torch.no_grad(): a, b = (network(order=o)(maps, tokens[:, :1], lengths).mask for o in ('pixel', 'scan'))
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize('changes,affine', [({}, True), ({'up_first': False}, True), ({'aligned': True}, True), ({'um_act': True}, False)])
def test_upsampling_is_affine_without_an_activation(changes, affine):
    net = network(**changes)
    torch.manual_seed(3)
    def some(): return [torch.randn(1, 9, 3, 3), *(m[:1] for m in case()[0])]
    def u(x): return net.up(x[0], x[1:])
    a, b = some(), [torch.randn_like(m) for m in some()]
    zero = [torch.zeros_like(m) for m in a]
    with torch.no_grad(): defect = (u([x + y for x, y in zip(a, b)]) - u(a) - u(b) + u(zero)).abs().max()
    assert (defect < 1e-10) if affine else (defect > 1e-3)
    # two sentences of one picture differ by the same map, whatever the finer maps hold
    maps, tokens, lengths = case(1)
    finer = maps[0], 3*maps[1].flip(2), maps[2].cos()
    def difference(m):
        with torch.no_grad(): return net(m, tokens, lengths).mask - net(m, tokens.flip(1), lengths).mask
    moved = (difference(maps) - difference(finer)).abs().max()
    assert (moved < 1e-10) if affine else (moved > 1e-4)


SWITCHES = [{'order': 'scan'}, {'level': 2}, {'stage': 'low'}, {'text': 'kit'}, {'filter_act': 'none'}, {'filter_scale': True},
            {'sru_act': 'none'}, {'up_first': False}, {'um_act': True}, {'aligned': True}]


@pytest.mark.parametrize('changes', SWITCHES, ids=lambda c: str(c))
def test_every_switch_changes_the_answer_and_all_its_weights_learn(changes):
    maps, tokens, lengths = case()
    net = network(**changes)
    out = net(maps, tokens, lengths).mask
    assert out.shape == (3, 1, 24, 24)
    other = network()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if k in other.state_dict()
                           and v.shape == other.state_dict()[k].shape}, strict=False)
    assert (out - other(maps, tokens, lengths).mask).abs().max() > 1e-4
    (out*torch.randn(24, 24)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_every_cell_of_the_network_has_the_switched_activation():
    for act in ('tanh', 'none'):
        acts = {m.act for m in network(sru_act=act).modules() if isinstance(m, SRULayer)}
        assert acts == {act}


def test_the_words_of_lts_come_with_their_embeddings():
    net = network(text='kit')
    _, tokens, lengths = case()
    r, mask = net.words(tokens, lengths)
    assert torch.equal(r[..., :6], net.words.kit.embed(tokens)) and torch.equal(mask, tokens > 0)
    assert torch.equal(r[..., 6:], net.words.kit(tokens, lengths)[0])


def test_reduction_sum_or_mean():
    maps, tokens, lengths = case()
    net = network()
    batch = {'mask': torch.randint(0, 2, (3, 1, 24, 24))}
    out = net(maps, tokens, lengths)
    total, mean = (method.loss(net.cfg.replace(reduction=how), out, batch)[0] for how in ('sum', 'mean'))
    torch.testing.assert_close(total, 576*mean)


def test_the_tail_and_the_vectors_are_used():
    torch.manual_seed(0)
    vectors, tail = torch.randn(20, 6), torch.nn.Conv2d(5, 12, 1)
    cfg = DMNConfig(emb_dim=6, d_lang=8, filters=3, d_mix=7, d_state=9, um=(6, 5, 4))
    net = DMN(cfg, CHANNELS, 20, vectors, tail)
    assert torch.equal(net.words.embed.weight, vectors)
    maps, tokens, lengths = case()
    net((torch.randn(3, 5, 3, 3), *maps[1:]), tokens, lengths).mask.square().sum().backward()
    assert tail.weight.grad.abs().max() > 0


def test_sides_that_are_no_multiple():
    net = network()
    maps = torch.randn(2, 12, 4, 4), torch.randn(2, 10, 8, 7), torch.randn(2, 6, 15, 14)
    assert net(maps, *case(2)[1:]).mask.shape == (2, 1, 30, 28)


def test_the_widths_of_the_official_code():
    "The operations and parameters that the lesson states: at 416 pixels, with 512 channels of F_v1 and words of 300."
    torch.set_default_dtype(torch.float32)
    channels = 512, 512, 256
    with FakeTensorMode():  # shapes without numbers
        net = DMN(DMNConfig(), channels, 3).eval()
        maps = [torch.rand(1, c, 416//s, 416//s) for c, s in zip(channels, (32, 16, 8))]
        r, mask = torch.rand(1, 15, 1300), torch.ones(1, 15, dtype=torch.bool)
        words, _ = count_flops(net.words.sru, torch.rand(15, 1, 300))
        synthesis, R5 = count_flops(net.synthesis, maps[0], r, mask)
        up, logits = count_flops(net.up, R5, maps)
    assert logits.shape == (1, 1, 104, 104)
    assert [round(x/1e9, 1) for x in (words, synthesis, up, words + synthesis + up)] == [.2, 32.9, 35., 68.1]
    assert round(sum(p.numel() for n, p in net.named_parameters() if 'embed' not in n)/1e6, 1) == 35.8


@pytest.mark.parametrize('order', ['pixel', 'scan'])
def test_half_precision_is_near(order):
    torch.set_default_dtype(torch.float32)
    net = network(order=order).float().eval()
    maps, tokens, lengths = case()
    maps = tuple(m.float().abs() for m in maps)
    with torch.no_grad():
        full = net(maps, tokens, lengths).mask
        with torch.autocast('cpu', torch.bfloat16): half = net(maps, tokens, lengths).mask
    assert (half.float() - full).abs().max() < .05*full.std() + .05


def test_long_sums_and_memories_are_never_in_half_precision():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    filters, V, r = WordFilters(2000, 8), 3*torch.rand(1, 9, 2000), torch.randn(1, 4, 8)
    layer, x = SRULayer(8, 8), torch.randn(300, 1, 8)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        made, found = filters.kernels(r).float(), filters(V, r)
        product = layer.project(x)
        h = layer(product, x)
    assert found.dtype == h.dtype == torch.float32 and product.dtype == torch.bfloat16
    # half precision has steps of 16 at these sums
    sums = (V[0] @ made[0].flatten(0, 1).T).unflatten(-1, (4, 10)).transpose(0, 1)
    assert sums.min() > 1000
    torch.testing.assert_close(found[:, 0], sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(h, layer(product.float(), x), rtol=0, atol=1e-6)


def test_what_it_says_of_itself():
    cfg = method.config()
    assert method.threshold is None and method.stride(cfg) == 4 and method.finishes == ('plain',)
    assert any('threshold' in note for note in method.notes) and any('DPN-92' in note for note in method.notes)
    out = network()(*case())
    p = method.probability(out)
    assert p.shape == (3, 1, 24, 24) and p.dtype == torch.float32 and method.prior(out) is None


def test_errors_are_sentences():
    with pytest.raises(KitError, match="d_lang=9 is odd.*Make d_lang even"): DMNConfig(text='kit', d_lang=9)
    with pytest.raises(KitError, match='Nearest.*scan'): DMNConfig(order='scann')
    with pytest.raises(KitError, match='filters must be 1 or more, not 0'): DMNConfig(filters=0)
    with pytest.raises(KitError, match='no word .number 1 of the batch'):
        network()(case(2)[0], torch.tensor([[3], [0]]), torch.tensor([1, 0]))
    assert DMNConfig(**DMNConfig(um=[3, 2, 1]).plain()).um == (3, 2, 1)
