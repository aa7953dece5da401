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
