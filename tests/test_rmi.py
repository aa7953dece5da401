"RMI: against what the official code computed, against loops, and the checks of its lesson."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.rivals.rmi import RMI, MultimodalLSTM, RMIConfig, RMIMethod, VisualEntry, artanh_readout, single
from lts_nb.rivals.words import ForwardLSTM, glorot_parts, softmax_over_words

CASES = 'four', 'one', 'full'
WIDTHS = dict(emb_dim=4, d_word=6, d_visual=7, width=5)
PARTS = {'rmi_deeplab': dict(visual='v1'), 'rmi_resnet': dict(visual='scores'), 'baseline_lstm': dict(visual='v1', meet='sentence')}


def t(array): return torch.from_numpy(np.array(array))


def kernel(dw): return t(dw).permute(3, 2, 0, 1)


def part_of(values, part, kind='weight'):
    "The arrays below a prefix, by what follows it."
    prefix = f'{part}/{kind}/'
    return {k[len(prefix):]: v for k, v in values.items() if k.startswith(prefix)}


def lstm_rows(kernel):
    "TensorFlow's columns i, j, f, o as torch's rows i, f, g, o."
    i, j, f, o = kernel.split(kernel.shape[-1]//4, -1)
    return torch.cat([i, f, j, o], -1)


def official_model(values, part):
    "Our network with the official weights, float64, and the names by which to find their gradients."
    w = part_of(values, part)
    cfg = RMIConfig(**WIDTHS, **PARTS[part])
    model = RMI(cfg, (7 if part == 'rmi_resnet' else 11, 3, 2), 9).double()
    word = 'RNN/WLSTM' if 'RNN/WLSTM/multi_rnn_cell/cell_0/basic_lstm_cell/kernel' in w else 'RNN'
    cell = '{}/multi_rnn_cell/cell_0/basic_lstm_cell/{}'
    with torch.no_grad():
        model.reader.embed.weight.copy_(t(w['embedding']))
        k = t(w[cell.format(word, 'kernel')])
        lstm = model.reader.lstm.lstm
        lstm.weight_ih_l0.copy_(lstm_rows(k[:4]).T)
        lstm.weight_hh_l0.copy_(lstm_rows(k[4:]).T)
        b = t(w[cell.format(word, 'bias')]).clone()
        b[12:18] += 1     # TensorFlow adds 1 to the forget gate
        lstm.bias_ih_l0.copy_(lstm_rows(b))
        lstm.bias_hh_l0.zero_()
        if 'conv0/DW' in w:
            model.visual.maps[0].weight.copy_(kernel(w['conv0/DW']))
            model.visual.bias.copy_(t(w['conv0/biases'])[:, None, None])
        if part == 'baseline_lstm':
            # officially [v; l; s], ours [v; s; l]
            v, l, s = kernel(w['conv1/DW']).split([7, 6, 8], 1)
            model.memory.hidden.weight.copy_(torch.cat([v, s, l], 1))
            model.memory.hidden.bias.copy_(t(w['conv1/biases']))
        else:
            # officially [v; e; l; s; h]
            v, e, l, s, h = t(w[cell.format('RNN/ALSTM', 'kernel')]).T.split([7, 4, 6, 8, 5], 1)
            model.memory.cell.weight.copy_(torch.cat([v, s], 1)[:, :, None, None])
            model.memory.word.weight.copy_(torch.cat([e, l], 1))
            model.memory.belief.weight.copy_(h[:, :, None, None])
            model.memory.cell.bias.copy_(t(w[cell.format('RNN/ALSTM', 'bias')]))
        model.score.weight.copy_(kernel(w['conv2/DW']))
        model.score.bias.copy_(t(w['conv2/biases']))
    return model


def gradients(model, part):
    "Our gradients in the official layout and under the official names."
    word = 'RNN' if part == 'baseline_lstm' else 'RNN/WLSTM'
    cell = '{}/multi_rnn_cell/cell_0/basic_lstm_cell/{}'

    def official_columns(rows):
        i, f, g, o = rows.chunk(4)
        return torch.cat([i, g, f, o]).T
    lstm = model.reader.lstm.lstm
    g = {'embedding': model.reader.embed.weight.grad,
         cell.format(word, 'kernel'): torch.cat([official_columns(lstm.weight_ih_l0.grad), official_columns(lstm.weight_hh_l0.grad)]),
         cell.format(word, 'bias'): official_columns(lstm.bias_ih_l0.grad[:, None])[0],
         'conv2/DW': model.score.weight.grad.permute(2, 3, 1, 0), 'conv2/biases': model.score.bias.grad}
    if len(model.visual.maps):
        g['conv0/DW'] = model.visual.maps[0].weight.grad.permute(2, 3, 1, 0)
        g['conv0/biases'] = model.visual.bias.grad.flatten()
    if part == 'baseline_lstm':
        v, s, l = model.memory.hidden.weight.grad.split([7, 8, 6], 1)
        g['conv1/DW'] = torch.cat([v, l, s], 1).permute(2, 3, 1, 0)
        g['conv1/biases'] = model.memory.hidden.bias.grad
    else:
        m = model.memory
        v, s = m.cell.weight.grad[:, :, 0, 0].split([7, 8], 1)
        e, l = m.word.weight.grad.split([4, 6], 1)
        # after one word nobody has read a belief
        h = torch.zeros(20, 5).double() if m.belief.weight.grad is None else m.belief.weight.grad[:, :, 0, 0]
        g[cell.format('RNN/ALSTM', 'kernel')] = torch.cat([v, e, l, s, h], 1).T
        g[cell.format('RNN/ALSTM', 'bias')] = m.cell.bias.grad
    return g


def official_inputs(values, part, cases=CASES):
    "Features, tokens padded behind the words, and lengths, of some cases as one batch."
    name = 'logits' if part == 'rmi_resnet' else 'res5c'
    maps = torch.cat([t(values[f'{part}/{case}/in/{name}']).permute(0, 3, 1, 2) for case in cases])
    words = [[int(n) for n in values[f'{part}/{case}/in/words'][0]] for case in cases]
    n_pad = [next(i for i, n in enumerate(row) if n) for row in words]
    tokens = torch.tensor([row[p:] + [0]*p for row, p in zip(words, n_pad)])
    lengths = torch.tensor([6 - p for p in n_pad])
    B, _, h, w = maps.shape
    return [maps, torch.zeros(B, 3, h, w).double(), torch.zeros(B, 2, h, w).double()], tokens, lengths


def legacy_up(x, factor):
    "TensorFlow's old bilinear resizing: pixel p reads place p/factor, the last cell is repeated."
    def along(x):
        n = x.shape[-1]
        place = torch.arange(n*factor).double()/factor
        low = place.floor().long()
        high = (low + 1).clamp_max(n - 1)
        part = place - low
        return x[..., low]*(1 - part) + x[..., high]*part
    return along(along(x).transpose(-1, -2)).transpose(-1, -2)


def close(ours, official): torch.testing.assert_close(ours, t(official), rtol=0, atol=1e-9)


@pytest.mark.parametrize('part', PARTS)
def test_a_batch_of_three_gives_what_the_official_code_gave_one_by_one(golden, part):
    values = golden('rmi')
    model = official_model(values, part)
    features, tokens, lengths = official_inputs(values, part)
    assert lengths.tolist() == [4, 1, 6]
    with torch.no_grad():
        logits = model(features, tokens, lengths).mask
        _, raw, _ = model.reader(tokens, lengths)
        beliefs = model.beliefs(features, tokens, lengths)
    up = legacy_up(logits, 8)
    for b, (case, n) in enumerate(zip(CASES, lengths.tolist())):
        out = part_of(values, f'{part}/{case}', 'out')
        close(logits[b].permute(1, 2, 0)[None], out['pred'])
        close(up[b].permute(1, 2, 0)[None], out['up'])
        close(up[b].permute(1, 2, 0)[None].sigmoid(), out['sigm'])
        close(raw[b, :n, None], out['h_words' if part == 'baseline_lstm' else 'h_WLSTM'])
        if part == 'baseline_lstm': continue
        close(beliefs[b].flatten(1).T, out['h_ALSTM'][-1])
        close(artanh_readout(beliefs[b:b + 1]).permute(0, 2, 3, 1), np.maximum(out['artanh'], 0))


@pytest.mark.parametrize('part', ['rmi_deeplab', 'rmi_resnet'])
def test_the_belief_after_each_word_is_the_official_one(golden, part):
    "The first n words alone give the state after n words, because nothing is read from right to left."
    values = golden('rmi')
    model = official_model(values, part)
    for case in CASES:
        features, tokens, lengths = official_inputs(values, part, [case])
        for n in range(1, int(lengths) + 1):
            with torch.no_grad(): h = model.beliefs(features, tokens, torch.tensor([n]))
            close(h[0].flatten(1).T, values[f'{part}/{case}/out/h_ALSTM'][n - 1])


@pytest.mark.parametrize('part', PARTS)
def test_loss_and_gradients_are_the_official_ones(golden, part):
    values = golden('rmi')
    for case in CASES:
        model = official_model(values, part)
        features, tokens, lengths = official_inputs(values, part, [case])
        target = t(values[f'{part}/{case}/out/target']).permute(0, 3, 1, 2)
        batch = dict(prior=target, mask=target.new_zeros(1, 1, 6, 8))
        loss, _ = RMIMethod().loss(RMIConfig(), model(features, tokens, lengths), batch)
        loss.backward()
        close(loss.detach(), values[f'{part}/{case}/out/cls_loss'])
        ours = gradients(model, part)
        official = part_of(values, f'{part}/{case}', 'grad')
        assert sorted(ours) == sorted(official)
        for name, g in official.items(): close(ours[name], g)


# -- without golden values --------------------------------------------------------------------------------------------

def slow_beliefs(memory, cells, words):
    "One sentence, cell after cell, with the whole vector put together each time."
    W = torch.cat([memory.cell.weight[:, :, 0, 0], memory.word.weight, memory.belief.weight[:, :, 0, 0]], 1)
    c, height, width = cells.shape
    out = []
    for cell in cells.reshape(c, -1).T:
        h = state = torch.zeros(len(W)//4).double()
        for word in words:
            i, j, f, o = (W @ torch.cat([cell, word, h]) + memory.cell.bias).chunk(4)
            state = torch.sigmoid(f + 1)*state + torch.sigmoid(i)*torch.tanh(j)
            h = torch.sigmoid(o)*torch.tanh(state)
        out.append(h)
    return torch.stack(out, 1).view(-1, height, width)


@pytest.mark.parametrize('lengths', [[2, 7, 1], [7, 7, 7], [1, 1, 1], [3, 5, 5], [7, 1, 4]])
def test_the_fast_memory_is_the_slow_one(lengths):
    torch.manual_seed(0)
    memory = MultimodalLSTM(6, 5, 4).double()
    torch.nn.init.normal_(memory.cell.bias)
    cells, words = torch.randn(3, 6, 2, 3).double(), torch.randn(3, 7, 5).double()
    fast = memory(cells, words, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        torch.testing.assert_close(fast[b], slow_beliefs(memory, cells[b], words[b, :n]), rtol=0, atol=1e-10)


def built(seed=0, preset='smoke', channels=(5, 4, 3), **changes):
    torch.manual_seed(seed)
    cfg = RMIConfig(**RMIMethod.widths[preset] | changes)
    return RMIMethod().build(cfg, channels, range(20)).double().eval()


def maps_at_stride_8(n=1, seed=1, channels=(5, 4, 3), side=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, c, side, side, generator=generator, dtype=torch.double) for c in channels]


SAID, FOUR = torch.tensor([[5, 6, 7, 8]]), torch.tensor([4])


@torch.no_grad()
def test_a_cell_depends_on_itself_alone():
    model, maps = built(), maps_at_stride_8()
    z = model(maps, SAID, FOUR).mask
    for row, column in ((0, 0), (1, 2), (3, 3)):
        changed = [m.clone() for m in maps]
        for m in changed: m[0, :, row, column] += 1
        difference = (model(changed, SAID, FOUR).mask - z)[0, 0]
        assert (difference != 0).nonzero().tolist() == [[row, column]]


@torch.no_grad()
def test_cells_may_be_exchanged_together_with_their_places(monkeypatch):
    model, maps = built(), maps_at_stride_8()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))

    def permuted(x): return x.flatten(2)[:, :, order].view(x.shape)
    z = model(maps, SAID, FOUR).mask
    assert (model([permuted(m) for m in maps], SAID, FOUR).mask - permuted(z)).abs().max() > 1e-6, 'places count'
    from lts_nb.rivals import rmi
    usual = rmi.coordinates
    monkeypatch.setattr(rmi, 'coordinates', lambda *a, **k: permuted(usual(*a, **k)))
    torch.testing.assert_close(model([permuted(m) for m in maps], SAID, FOUR).mask, permuted(z), rtol=0, atol=1e-12)


@torch.no_grad()
def test_order_of_words_counts_and_the_length_of_the_maps_does_not():
    model, maps = built(), maps_at_stride_8()
    z = model(maps, SAID, FOUR).mask
    assert (model(maps, SAID[:, [1, 0, 2, 3]], FOUR).mask - z).abs().max() > 1e-6
    torch.testing.assert_close(model([10*m for m in maps], SAID, FOUR).mask, z, rtol=0, atol=1e-10)
    model.reader.embed.weight.mul_(10)
    assert (model(maps, SAID, FOUR).mask - z).abs().max() > 1e-4, 'words are not normalised'


def test_one_word_uses_no_recurrence_and_two_words_do():
    for n, used in ((1, False), (2, True)):
        model = built()
        model(maps_at_stride_8(), SAID[:, :n], torch.tensor([n])).mask.sum().backward()
        grad = model.memory.belief.weight.grad
        assert (grad is not None and grad.abs().max().item() > 0) == used


def test_the_readout_is_artanh_finite_and_steep_at_the_ends():
    h = torch.tensor([-1, -.5, 0, 1e-3, .5, .999, 1.], dtype=torch.double, requires_grad=True)
    r = artanh_readout(h)
    torch.testing.assert_close(r, (h/1.001).atanh().relu())
    assert abs(r[-1].item() - 3.8006) < 1e-3 and r.isfinite().all()
    slope, = torch.autograd.grad(r.sum(), h)
    assert slope[:2].tolist() == [0, 0] and abs(slope[3].item() - 1/1.001) < 1e-5 and abs(slope[-1].item() - 500.25) < .1


def test_half_precision_is_kept_out_of_what_adds_up():
    assert single(torch.zeros(1, dtype=torch.bfloat16)).dtype == single(torch.zeros(1, dtype=torch.half)).dtype == torch.float32
    assert single(torch.zeros(1).double()).dtype == torch.float64
    near = torch.tensor([.998], dtype=torch.bfloat16)
    torch.testing.assert_close(artanh_readout(near), artanh_readout(near.float()))
    model, maps = built().float(), [m.float() for m in maps_at_stride_8()]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        h = model.beliefs(maps, SAID, FOUR)
    assert h.dtype == torch.float32
    with torch.no_grad(): exact = model.beliefs(maps, SAID, FOUR)
    assert (h - exact).abs().max() < .02


def test_each_switch_changes_the_network():
    maps = maps_at_stride_8(2)
    tokens, lengths = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])
    seen = {}
    for name, value in dict(word_in=False, readout='raw', visual='v1', text='kit', meet='sentence').items():
        model = built(**{name: value})
        with torch.no_grad(): seen[name] = model(maps, tokens, lengths).mask
        assert seen[name].shape == (2, 1, 4, 4)
    usual = built()
    with torch.no_grad(): z = usual(maps, tokens, lengths).mask
    # the same weights with another read-out
    raw = built(readout='raw')
    raw.load_state_dict(usual.state_dict())
    with torch.no_grad():
        h = usual.beliefs(maps, tokens, lengths)
        torch.testing.assert_close(raw(maps, tokens, lengths).mask, usual.score(h))
        torch.testing.assert_close(z, usual.score((h/1.001).atanh().relu()))
    assert all((other - z).abs().max() > 1e-6 for other in seen.values())
    assert built(word_in=False).memory.word.in_features == 16 and usual.memory.word.in_features == 32
    assert len(built(visual='v1').visual.maps) == 1 and len(usual.visual.maps) == 3
    scores = built(visual='scores')
    assert not len(scores.visual.maps) and scores.memory.cell.in_channels == 5 + 8
    with torch.no_grad(): assert scores(maps, tokens, lengths).mask.std() > 0
    # an odd width is made even where two directions share it
    assert built(text='kit', d_word=15).reader.width == 16
    assert not any('hidden' in n for n, _ in usual.named_parameters())


def test_the_baseline_reads_the_last_state_alone():
    model, maps = built(meet='sentence'), maps_at_stride_8()
    states = torch.randn(1, 4, 16).double()
    cells = torch.randn(1, 24, 4, 4).double()
    changed = states.clone()
    changed[:, :3] += 1
    with torch.no_grad():
        z = model.memory(cells, states, FOUR)
        assert (model.memory(cells, changed, FOUR) == z).all()
        assert (model.memory(cells, changed, torch.tensor([3])) != model.memory(cells, states, torch.tensor([3]))).any()


def test_the_entry_is_one_matrix_over_the_joined_maps():
    torch.manual_seed(0)
    entry = VisualEntry((5, 4, 3), 7).double()
    torch.nn.init.normal_(entry.bias)
    maps = [torch.rand(2, c, s, s).double() for c, s in ((5, 2), (4, 4), (3, 8))]
    joined = torch.cat([F.interpolate(m, size=(8, 8), mode='bilinear') for m in maps], 1)
    slow = F.conv2d(joined, torch.cat([m.weight for m in entry.maps], 1), entry.bias.flatten())
    torch.testing.assert_close(entry(maps), F.normalize(slow, dim=1), rtol=0, atol=1e-12)


def test_refuses_in_sentences():
    with pytest.raises(KitError, match='no word'):
        built()(maps_at_stride_8(), SAID, torch.tensor([0]))
    for wrong in (dict(readout='tanh'), dict(meet='never'), dict(width=0), dict(visual='v2'), dict(emb_dim=-1)):
        with pytest.raises(KitError): RMIConfig(**wrong)


# -- the reader of the room `words` -----------------------------------------------------------------------------------

def test_the_forward_lstm_is_the_equations_and_starts_as_tensorflow_does():
    torch.manual_seed(0)
    lstm = ForwardLSTM(6, 5).double()
    x, mask = torch.randn(2, 4, 6).double(), torch.arange(4) < torch.tensor([[4], [2]])
    states, last = lstm(x, mask)
    W = torch.cat([lstm.lstm.weight_ih_l0, lstm.lstm.weight_hh_l0], 1)
    for b, n in enumerate((4, 2)):
        h = c = torch.zeros(5).double()
        for word in x[b, :n]:
            i, f, j, o = (W @ torch.cat([word, h])).chunk(4)      # torch keeps i, f, g, o
            c = torch.sigmoid(f + 1)*c + torch.sigmoid(i)*torch.tanh(j)
            h = torch.sigmoid(o)*torch.tanh(c)
        torch.testing.assert_close(last[b], h, rtol=0, atol=1e-12)
        assert (states[b, n:] == 0).all()
    bound = (6/(20 + 11))**.5
    assert .9*bound < W.abs().max() < bound and not lstm.lstm.bias_hh_l0.requires_grad
    assert lstm.lstm.bias_ih_l0.tolist() == [0]*5 + [1]*5 + [0]*10 and not lstm.lstm.bias_hh_l0.any()


def test_a_matrix_is_cut_at_the_joints_and_drawn_as_one():
    torch.manual_seed(0)
    parts = glorot_parts(40, 30, 10)
    assert [tuple(p.shape) for p in parts] == [(40, 30), (40, 10)]
    bound = (6/80)**.5
    assert all(.9*bound < p.abs().max() < bound for p in parts)


def test_padding_takes_no_part_in_a_softmax():
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    logits = torch.randn(3, 4)
    weights = softmax_over_words(logits, mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert (weights[~mask] == 0).all() and weights[1, 0] == 1
    torch.testing.assert_close(weights[2, :3], logits[2, :3].softmax(0))
