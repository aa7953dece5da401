"DMN against values that its official code computed, and the checks of its lesson at full length."
import pytest
import torch
import torch.nn.functional as F

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
        # the answer of the low-resolution network is this map, larger: its corners keep their values
        grids = vis, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16)
        out = net(grids, words, lengths).mask
        assert out.shape == (1, 1, 32, 32)
        torch.testing.assert_close(out[..., ::31, ::31], tensor(g['out/y'])[..., ::3, ::3], **EXACT)
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
