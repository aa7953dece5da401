"RMI: against what the official code computed, against loops, and the checks of its lesson."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.model.losses import bce
from lts_nb.rivals.rmi import RMI, MultimodalLSTM, RMIConfig, RMIMethod, VisualEntry, artanh_readout, single

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
