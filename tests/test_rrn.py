"RRN and its memory: against what the official code computed, against the equations, and the checks of their lessons."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.rivals.cells import unit
from lts_nb.rivals.convlstm import ConvLSTM, map_norm, walk
from lts_nb.rivals.rrn import RRN, OneFusion, RRNConfig, RRNMethod
from test_rmi import CASES, close, kernel, legacy_up, lstm_rows, part_of, t

CELL = 'RNN/multi_rnn_cell/cell_0/basic_lstm_cell/'
MEMORY = 'rnn/conv_lstm_cell/'
# the official names of the five norms, in the order in which the code makes them
NORMS = {'j': 'LayerNorm', 'i': 'LayerNorm_1', 'f': 'LayerNorm_2', 'o': 'LayerNorm_3', 'c': 'LayerNorm_4'}
PEEP = {'i': 'W_ci', 'f': 'W_cf', 'o': 'W_co'}


def official_model(values):
    "Our network with the official weights, float64, on a grid of 3×4."
    w = part_of(values, 'net')
    cfg = RRNConfig(emb_dim=4, d_word=6, d_visual=7, width=5, loss_grid=8)
    model = RRN(cfg, (11, 10, 9), 9)
    model.memory = ConvLSTM(5, 5, (3, 4))
    model = model.double()
    with torch.no_grad():
        model.reader.embed.weight.copy_(t(w['embedding']))
        k, b = t(w[CELL + 'kernel']), t(w[CELL + 'bias']).clone()
        b[12:18] += 1     # TensorFlow adds 1 to the forget gate
        lstm = model.reader.lstm.lstm
        lstm.weight_ih_l0.copy_(lstm_rows(k[:4]).T)
        lstm.weight_hh_l0.copy_(lstm_rows(k[4:]).T)
        lstm.bias_ih_l0.copy_(lstm_rows(b))
        lstm.bias_hh_l0.zero_()
        # officially [v; l; s]
        v, l, s = kernel(w['fusion/DW']).split([7, 6, 8], 1)
        fusion = model.fusion
        fusion.visual.weight.copy_(kernel(w['mlp0/DW']))
        fusion.visual.bias.copy_(t(w['mlp0/biases']))
        fusion.picture.weight.copy_(v)
        fusion.sentence.weight.copy_(l[:, :, 0, 0])
        fusion.place.weight.copy_(s)
        fusion.place.bias.copy_(t(w['fusion/biases']))
        for layer, level in zip(model.laterals, (5, 4, 3)):
            layer.weight.copy_(kernel(w[f'c{level}_lateral/DW']))
            layer.bias.copy_(t(w[f'c{level}_lateral/biases']))
        memory = model.memory
        x, h = kernel(w[MEMORY + 'kernel']).split([5, 5], 1)
        memory.x.weight.copy_(x)
        memory.h.weight.copy_(h)
        for gate, name in NORMS.items():
            memory.norms[gate].weight.copy_(t(w[f'{MEMORY}{name}/gamma']))
            memory.norms[gate].bias.copy_(t(w[f'{MEMORY}{name}/beta']))
        for gate, name in PEEP.items(): memory.peep[gate].copy_(t(w[MEMORY + name]).permute(2, 0, 1)[None])
        model.score.weight.copy_(kernel(w['score/DW']))
        model.score.bias.copy_(t(w['score/biases']))
    return model


def gradients(model):
    "Our gradients in the official layout and under the official names."
    def columns(rows):
        i, f, g, o = rows.chunk(4)
        return torch.cat([i, g, f, o]).T

    def tf(weight): return weight.permute(2, 3, 1, 0)
    lstm, fusion, memory = model.reader.lstm.lstm, model.fusion, model.memory
    joint = torch.cat([fusion.picture.weight.grad, fusion.sentence.weight.grad[:, :, None, None], fusion.place.weight.grad], 1)
    g = {'embedding': model.reader.embed.weight.grad,
         CELL + 'kernel': torch.cat([columns(lstm.weight_ih_l0.grad), columns(lstm.weight_hh_l0.grad)]),
         CELL + 'bias': columns(lstm.bias_ih_l0.grad[:, None])[0],
         'mlp0/DW': tf(fusion.visual.weight.grad), 'mlp0/biases': fusion.visual.bias.grad,
         'fusion/DW': tf(joint), 'fusion/biases': fusion.place.bias.grad,
         'score/DW': tf(model.score.weight.grad), 'score/biases': model.score.bias.grad,
         MEMORY + 'kernel': tf(torch.cat([memory.x.weight.grad, memory.h.weight.grad], 1))}
    for layer, level in zip(model.laterals, (5, 4, 3)):
        g[f'c{level}_lateral/DW'], g[f'c{level}_lateral/biases'] = tf(layer.weight.grad), layer.bias.grad
    for gate, name in NORMS.items():
        g[f'{MEMORY}{name}/gamma'], g[f'{MEMORY}{name}/beta'] = memory.norms[gate].weight.grad, memory.norms[gate].bias.grad
    for gate, name in PEEP.items(): g[MEMORY + name] = memory.peep[gate].grad[0].permute(1, 2, 0)
    return g


def official_inputs(values, cases=CASES):
    "Features, tokens padded behind the words, and lengths, of some cases as one batch."
    features = [torch.cat([t(values[f'net/{case}/in/{name}']).permute(0, 3, 1, 2) for case in cases])
                for name in ('res5c_relu', 'res4b22_relu', 'res3b3_relu')]
    words = [[int(n) for n in values[f'net/{case}/in/words'][0]] for case in cases]
    n_pad = [next(i for i, n in enumerate(row) if n) for row in words]
    tokens = torch.tensor([row[p:] + [0]*p for row, p in zip(words, n_pad)])
    return features, tokens, torch.tensor([6 - p for p in n_pad])


def channels_last(x): return x.permute(1, 2, 0)[None]


def test_a_batch_of_three_gives_what_the_official_code_gave_one_by_one(golden):
    values = golden('rrn')
    model = official_model(values)
    features, tokens, lengths = official_inputs(values)
    assert lengths.tolist() == [4, 1, 6]
    with torch.no_grad():
        logits = model(features, tokens, lengths).mask
        sentence = unit(model.reader(tokens, lengths)[2])
        maps = model.maps(features, tokens, lengths)
        states = walk(model.memory, maps)
        last = model.memory(maps)
        visual = model.fusion.visual(features[0])
    up = legacy_up(logits, 8)
    for b, case in enumerate(CASES):
        out = part_of(values, f'net/{case}', 'out')
        close(channels_last(visual[b]), out['mlp0'])
        close(sentence[b], out['lang_norm'][0, 0, 0])
        for k in range(4):
            close(channels_last(maps[k][b]), out['sequence'][:, k])
            close(channels_last(states[k][0][b]), out[f'convlstm/h{k}'])
            close(channels_last(states[k][1][b]), out[f'convlstm/c{k}'])
        close(channels_last(last[b]), out['convlstm/h3'])
        close(channels_last(logits[b]), out['pred'])
        close(channels_last(up[b]), out['up'])
        close(channels_last(up[b]).sigmoid(), out['sigm'])


def test_loss_and_gradients_are_the_official_ones(golden):
    "On the grid of the input, where the official code has its loss; the sum of three files is a batch."
    values = golden('rrn')
    together = official_model(values)
    features, tokens, lengths = official_inputs(values)
    target = torch.cat([t(values[f'net/{case}/in/mask']).permute(0, 3, 1, 2) for case in CASES])
    logits = legacy_up(together(features, tokens, lengths).mask, 8)
    F.binary_cross_entropy_with_logits(logits, target, reduction='sum').backward()
    added = {}
    for case in CASES:
        model = official_model(values)
        features, tokens, lengths = official_inputs(values, [case])
        target = t(values[f'net/{case}/in/mask']).permute(0, 3, 1, 2)
        logits = legacy_up(model(features, tokens, lengths).mask, 8)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction='sum')
        loss.backward()
        close(loss.detach(), values[f'net/{case}/out/cls_loss'])
        ours, official = gradients(model), part_of(values, f'net/{case}', 'grad')
        assert sorted(ours) == sorted(official)
        for name, g in official.items():
            close(ours[name], g)
            added[name] = added.get(name, 0) + g
    ours = gradients(together)
    for name, g in added.items(): close(ours[name], g)


# -- the memory, without golden values --------------------------------------------------------------------------------

def slow_norm(x, norm):
    x = (x - x.mean())/x.var(correction=0).sqrt()
    return norm.weight[:, None, None]*x + norm.bias[:, None, None]


def slow_update(memory, gates, c):
    "One sample, from the equations."
    j, i, f, o = gates.split(memory.width)
    P, N = memory.peep, memory.norms
    i, f = slow_norm(i + P['i'][0]*c, N['i']), slow_norm(f + P['f'][0]*c, N['f'])
    new = torch.sigmoid(f + 1)*c + torch.sigmoid(i)*torch.tanh(slow_norm(j, N['j']))
    o = slow_norm(o + P['o'][0]*new, N['o'])
    c = slow_norm(new, N['c'])
    return torch.sigmoid(o)*torch.tanh(c), c


def memory_of(seed=0, c_in=5, width=3, grid=(4, 6), **kw):
    "A memory in which every parameter is random."
    torch.manual_seed(seed)
    memory = ConvLSTM(c_in, width, grid, **kw).double()
    for p in memory.parameters(): torch.nn.init.normal_(p)
    return memory


def test_a_step_is_the_equations():
    memory = memory_of(grid=(2, 4))
    gates, c = torch.randn(2, 12, 2, 4).double(), torch.randn(2, 3, 2, 4).double()
    h = torch.randn(2, 3, 2, 4).double()
    fast = memory.step(gates, (h, c))
    U = memory.h.weight[:, :, 0, 0]
    for b in range(2):
        slow = slow_update(memory, gates[b] + torch.einsum('oc,chw->ohw', U, h[b]), c[b])
        for ours, theirs in zip(fast, slow): torch.testing.assert_close(ours[b], theirs, rtol=0, atol=1e-10)
    first = memory.step(gates, None)
    for b in range(2):
        for ours, theirs in zip(first, slow_update(memory, gates[b], torch.zeros(3, 2, 4).double())):
            torch.testing.assert_close(ours[b], theirs, rtol=0, atol=1e-10)


def test_gradients_of_two_steps_are_right():
    memory = memory_of(c_in=2, width=3, grid=(2, 2))
    maps = [torch.randn(1, 2, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *m: memory(list(m)), maps, atol=1e-5)


@pytest.mark.parametrize('kernel', [1, 3])
def test_coarse_maps_may_stay_coarse(kernel):
    memory = memory_of(grid=(8, 8), kernel=kernel)
    maps = [torch.randn(2, 5, side, side).double() for side in (8, 2, 4, 8)]
    copied = [F.interpolate(m, size=(8, 8), mode='nearest') for m in maps]
    states, slow = walk(memory, maps), walk(memory, copied)
    for (h, c), (h2, c2) in zip(states, slow):
        torch.testing.assert_close(h, h2, rtol=0, atol=1e-12)
        torch.testing.assert_close(c, c2, rtol=0, atol=1e-12)
    torch.testing.assert_close(memory(maps), states[-1][0])
    again = walk(memory, maps, order=[3, 1, 1])
    assert len(again) == 3 and (again[-1][0] - states[-1][0]).abs().max() > .01
    torch.testing.assert_close(again[-1][0], memory([maps[3], maps[1], maps[1]]))


def test_the_first_step_leaves_alone_what_looks_back():
    memory = memory_of()
    x = torch.randn(1, 5, 4, 6).double()
    (memory([x])**2).sum().backward()
    idle = {n for n, p in memory.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {'norms.f.weight', 'norms.f.bias', 'peep.i', 'peep.f', 'h.weight'}
    memory = memory_of()
    (memory([x, x])**2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in memory.parameters())


def test_the_size_of_the_kernel_is_hidden_by_the_norm_at_the_first_step():
    memory, x = memory_of(peephole='none'), torch.randn(2, 5, 4, 6).double()
    before = memory.step(memory.gates(x, (4, 6)), None)
    memory.x.weight.data.mul_(10)
    for a, b in zip(before, memory.step(memory.gates(x, (4, 6)), None)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_norm_is_over_channels_and_cells_of_each_sample_with_tensorflows_epsilon():
    torch.manual_seed(0)
    norm = map_norm(6).double()
    x = torch.randn(3, 6, 4, 5).double()*torch.tensor([1e-3, 1., 50.]).double().view(3, 1, 1, 1) + 2
    y = norm(x)
    for sample in y: assert abs(sample.mean()) < 1e-9 and abs(sample.var(correction=0) - 1) < 1e-5
    torch.testing.assert_close(norm(x[1:2]), y[1:2], rtol=0, atol=1e-12)
    assert norm.eps == 1e-12 and all(n.eps == 1e-12 for n in memory_of().norms.values())


def test_peepholes_and_norms_are_distinct_registered_and_learnt():
    memory = memory_of()
    names = sorted(n for n, _ in memory.named_parameters())
    assert names == sorted(memory.state_dict()) and len(names) == 2 + 3 + 10
    assert len({p.data_ptr() for p in memory.parameters()}) == 15
    shapes = {kind: [tuple(p.shape) for p in memory_of(peephole=kind).peep.values()] for kind in ('position', 'channel', 'none')}
    assert shapes == {'position': [(1, 3, 4, 6)]*3, 'channel': [(1, 3, 1, 1)]*3, 'none': []}


def test_only_peepholes_of_a_place_know_where_they_are():
    maps = [torch.randn(1, 5, 4, 6).double() for _ in range(3)]

    def moved(kind):
        memory = memory_of(peephole=kind)
        return (memory([m.roll(1, -1) for m in maps]) - memory(maps).roll(1, -1)).abs().max()
    assert moved('position') > .01 and moved('channel') < 1e-12 and moved('none') < 1e-12


def test_a_memory_without_norms_is_a_plain_lstm():
    memory = memory_of(peephole='none', norm=False)
    assert sorted(n for n, _ in memory.named_parameters()) == ['h.weight', 'x.weight']
    x, h, c = torch.randn(1, 5, 4, 6).double(), torch.randn(1, 3, 4, 6).double(), torch.randn(1, 3, 4, 6).double()
    j, i, f, o = (memory.x(x) + memory.h(h)).chunk(4, 1)
    new = torch.sigmoid(f + 1)*c + torch.sigmoid(i)*torch.tanh(j)
    ours = memory.step(memory.gates(x, (4, 6)), (h, c))
    torch.testing.assert_close(ours[0], torch.sigmoid(o)*torch.tanh(new))
    torch.testing.assert_close(ours[1], new)


def test_the_memory_refuses_in_sentences():
    with pytest.raises(KitError, match=r"\(4, 5\).*\(4, 6\).*channel"): memory_of()([torch.zeros(1, 5, 4, 5).double()])
    memory_of(peephole='channel')([torch.randn(1, 5, 4, 5).double()])
    with pytest.raises(KitError, match='Nearest: position'): ConvLSTM(2, 2, (2, 2), 'positon')


# -- the network ------------------------------------------------------------------------------------------------------

CHANNELS = 6, 5, 4


def built(seed=0, size=64, **changes):
    torch.manual_seed(seed)
    cfg = RRNConfig(**RRNMethod.widths['smoke'] | dict(size=size) | changes)
    return RRNMethod().build(cfg, CHANNELS, range(20)).double().eval()


def features_of(n=2, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, c, size//s, size//s, generator=generator, dtype=torch.double) for c, s in zip(CHANNELS, (32, 16, 8))]


TOKENS, LENGTHS = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])
OTHER = torch.tensor([[15, 16, 17], [18, 19, 0]])


@torch.no_grad()
def test_the_fusion_is_one_matrix_over_picture_sentence_and_place():
    torch.manual_seed(0)
    fusion = OneFusion(6, 5, 4, 7).double()
    for p in fusion.parameters(): torch.nn.init.normal_(p)
    v1, l = torch.rand(2, 6, 2, 3).double(), torch.randn(2, 4).double()
    from lts_nb.rivals.cells import coordinates
    v = F.normalize(fusion.visual(F.interpolate(v1, size=(8, 12), mode='nearest')), dim=1)
    together = torch.cat([v, l[:, :, None, None].expand(-1, -1, 8, 12), coordinates(8, 12, like=v).expand(2, -1, -1, -1)], 1)
    W = torch.cat([fusion.picture.weight, fusion.sentence.weight[:, :, None, None], fusion.place.weight], 1)
    slow = F.conv2d(together, W, fusion.place.bias).relu()
    torch.testing.assert_close(fusion(v1, l, (8, 12)), slow, rtol=0, atol=1e-12)


@torch.no_grad()
def test_enlarged_features_give_the_same_mask():
    model, features = built(), features_of()
    enlarged = [F.interpolate(f, size=(8, 8), mode='nearest') for f in features]
    torch.testing.assert_close(model(features, TOKENS, LENGTHS).mask, model(enlarged, TOKENS, LENGTHS).mask, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_order_of_the_levels_counts():
    forward, back = built(levels='543'), built(levels='345')
    state = forward.state_dict()
    for a, b in ((0, 2), (1, 1), (2, 0)):
        for kind in ('weight', 'bias'): back.state_dict()[f'laterals.{a}.{kind}'].copy_(state[f'laterals.{b}.{kind}'])
    rest = {k: v for k, v in state.items() if 'laterals' not in k}
    back.load_state_dict(rest, strict=False)
    features = features_of()
    assert (forward(features, TOKENS, LENGTHS).mask - back(features, TOKENS, LENGTHS).mask).abs().max() > .01
    maps, turned = forward.maps(features, TOKENS, LENGTHS), back.maps(features, TOKENS, LENGTHS)
    for k, m in enumerate([0, 3, 2, 1]): torch.testing.assert_close(maps[k], turned[m])


@torch.no_grad()
def test_the_sentence_lives_in_the_memory_and_in_the_state():
    model, features = built(), features_of()

    def effect(): return (model(features, TOKENS, LENGTHS).mask - model(features, OTHER, LENGTHS).mask).abs().max()
    assert effect() > 0
    for gate, bias in (('f', -1000.), ('i', 1000.)):
        torch.nn.init.zeros_(model.memory.norms[gate].weight)
        torch.nn.init.constant_(model.memory.norms[gate].bias, bias)
    assert effect() > 0, 'through the state'
    torch.nn.init.zeros_(model.memory.h.weight)
    assert effect() == 0, 'nothing is left to carry it'


@torch.no_grad()
def test_each_switch_changes_the_network():
    features = features_of()
    z = built()(features, TOKENS, LENGTHS).mask
    assert z.shape == (2, 1, 16, 16)
    for change in (dict(levels='54'), dict(levels='5'), dict(peephole='channel'), dict(peephole='none'), dict(norm=False), dict(kernel=3), dict(text='kit')):
        other = built(**change)(features, TOKENS, LENGTHS).mask
        assert other.shape == z.shape and (other - z).abs().max() > 1e-6, change
    coarse = built(loss_grid=8)(features, TOKENS, LENGTHS).mask
    torch.testing.assert_close(F.interpolate(coarse, scale_factor=2, mode='bilinear'), z)
    assert RRNMethod().stride(RRNConfig()) == 4 and RRNMethod().stride(RRNConfig(loss_grid=8)) == 8
    assert built(kernel=3).memory.x.kernel_size == (3, 3) and len(built(levels='54').laterals) == 2
    assert RRNConfig().size == 416 and RRN(RRNConfig(**RRNMethod.widths['smoke']), CHANNELS, 9).memory.grid == (52, 52)


def test_every_step_has_a_loss_where_deep_asks_for_it():
    batch = dict(mask=(torch.rand(2, 1, 16, 16) > .5).double(), prior=(torch.rand(2, 1, 8, 8) > .5).double())
    method, features = RRNMethod(), features_of()
    usual, deep = built(), built(deep=True)
    out, more = usual(features, TOKENS, LENGTHS), deep(features, TOKENS, LENGTHS)
    torch.testing.assert_close(out.mask, more.mask)
    assert out.aux == () and len(more.aux) == 3
    loss, parts = method.loss(None, more, batch)
    assert sorted(parts) == ['aux0', 'aux1', 'aux2', 'seg']
    torch.testing.assert_close(loss.detach(), sum(parts.values()))
    alone, _ = method.loss(None, out, batch)
    torch.testing.assert_close(alone.detach(), parts['seg'])


def test_refuses_in_sentences():
    with pytest.raises(KitError, match='peepholes'): built(size=96)(features_of(), TOKENS, LENGTHS)
    with pytest.raises(KitError, match='no word'): built()(features_of(), TOKENS, torch.tensor([3, 0]))
    built(size=96, peephole='channel')(features_of(), TOKENS, LENGTHS)
    for wrong in (dict(levels='6'), dict(levels=''), dict(kernel=2), dict(loss_grid=1), dict(size=8), dict(text='bert')):
        with pytest.raises(KitError): RRNConfig(**wrong)
