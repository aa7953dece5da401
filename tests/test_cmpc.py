"CMPC against values that its official code computed, against slow twins of its equations, and its switches."
import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.model.losses import bce
from lts_nb.model.method import METHODS
from lts_nb.rivals.cells import coordinates, unit
from lts_nb.rivals.cmpc import (CMPC, CMPCConfig, Context, Edges, Level, Reasoning, Round,
                                sentence_of)
from lts_nb.rivals.convlstm import ConvLSTM, map_norm
from lts_nb.rivals.mutan import Mutan
from test_rivals import made_up, settings_of

CASES = 'four', 'one', 'full'
CLOSE = dict(rtol=0, atol=1e-9)


# --- official values -------------------------------------------------------------------------------------------------

def tensor(a): return torch.from_numpy(a).double()


def channels_first(a):
    "(B,h,w,C) of TensorFlow as (B,C,h,w)."
    return tensor(a).permute(0, 3, 1, 2)


def kernel(a):
    "(kh,kw,in,out) of TensorFlow as (out,in,kh,kw)."
    return tensor(a).permute(3, 2, 0, 1)


def translated(arrays, part, shift=0.):
    "Official variables, or their gradients, under our names; `shift` is added to the LSTM's forget bias."
    w = {k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)}
    ours = {}
    def layer(name, official, linear=False):
        k = kernel(w[f'{official}/DW'])
        ours[f'{name}.weight'] = k[:, :, 0, 0] if linear else k
        ours[f'{name}.bias'] = tensor(w[f'{official}/biases'])
    def norm(name, official):
        ours[f'{name}.weight'], ours[f'{name}.bias'] = (tensor(w[f'{official}/{x}']) for x in ('gamma', 'beta'))
    # words: columns i, j, f, o become rows i, f, g, o
    ours['reader.language.embed.weight'] = tensor(w['Variable'])
    lstm, E = 'RNN/multi_rnn_cell/cell_0/basic_lstm_cell', w['Variable'].shape[1]
    def gates(a): return torch.cat([tensor(a).chunk(4, -1)[k] for k in (0, 2, 1, 3)], -1)
    joint, bias = gates(w[f'{lstm}/kernel']), gates(w[f'{lstm}/bias'])
    bias[len(bias)//4:len(bias)//2] += shift
    mine = 'reader.language.lstm.lstm'
    ours |= {f'{mine}.weight_ih_l0': joint[:E].T, f'{mine}.weight_hh_l0': joint[E:].T, f'{mine}.bias_ih_l0': bias}
    ours[f'{mine}.bias_hh_l0'] = torch.zeros_like(bias)
    layer('reader.types.first', 'words_parse_1', True)
    layer('reader.types.second', 'words_parse_2', True)
    for i in range(3):
        c, at = f'c{3 + i}', f'levels.levels.{i}'
        layer(f'levels.laterals.maps.{2 - i}', f'{c}_lateral')
        heads = [f'{c}_head{k}' for k in range(1, 6)]
        ours[f'{at}.entities.picture.weight'] = torch.cat([kernel(w[f'vis_trans_{h}/DW']) for h in heads])
        ours[f'{at}.entities.picture.bias'] = torch.cat([tensor(w[f'vis_trans_{h}/biases']) for h in heads])
        said = torch.cat([kernel(w[f'lang_trans_{h}/DW']) for h in heads])
        ours[f'{at}.entities.sentence.weight'] = said[:, :, 0, 0]
        ours[f'{at}.entities.sentence.bias'] = torch.cat([tensor(w[f'lang_trans_{h}/biases']) for h in heads])
        layer(f'{at}.reasoning.edges.word', f'words_trans_{c}', True)
        layer(f'{at}.reasoning.edges.cell', f'spa_graph_trans2_{c}')
        layer(f'{at}.reasoning.update', f'gconv_update_spa_graph_{c}')
        norm(f'{at}.reasoning.heard', f'gconv_feat_ln_spa_graph_{c}')
        norm(f'{at}.reasoning.updated', f'gconv_update_ln_spa_graph_{c}')
        # [M; G; q; S] becomes [M; G; S] and q
        joined, C = kernel(w[f'fusion_{c}/DW']), w[f'{c}_lateral/biases'].size
        D = joined.shape[1] - 2*C - 8
        ours[f'{at}.cells.weight'] = torch.cat([joined[:, :2*C], joined[:, 2*C + D:]], 1)
        ours[f'{at}.cells.bias'] = tensor(w[f'fusion_{c}/biases'])
        ours[f'{at}.sentence.weight'] = joined[:, 2*C:2*C + D, 0, 0]
        layer(f'answer.early.{i}', f'score_{c}')
        for r in range(2):
            t, o = f'tgfe.{r}.levels.{i}', c + ('_2' if r else '')
            # the key's bias does nothing and is not ours
            ours[f'{t}.context.key.weight'] = kernel(w[f'spa_graph_key_{o}gv_f1/DW'])
            layer(f'{t}.context.query', f'lang_query_{o}gv_f1', True)
            layer(f'{t}.context.both', f'gv_lang_{o}gv_f1', True)
            for j in range(2):
                layer(f'{t}.gates.{j}', f'lang_feat_{o}_f{j + 1}', True)
                layer(f'{t}.carried.{j}', f'trans_feat_{o}_f{j + 1}')
    cell = 'rnn/conv_lstm_cell'
    joint, M = kernel(w[f'{cell}/kernel']), w[f'{cell}/W_ci'].shape[-1]
    ours |= {'memory.x.weight': joint[:, :M], 'memory.h.weight': joint[:, M:]}
    for gate, k in zip('jifoc', ('', '_1', '_2', '_3', '_4')): norm(f'memory.norms.{gate}', f'{cell}/LayerNorm{k}')
    for gate in 'ifo': ours[f'memory.peep.{gate}'] = tensor(w[f'{cell}/W_c{gate}']).permute(2, 0, 1)[None]
    layer('answer.score', 'score')
    return ours


def official(arrays):
    "Our network with the official weights, and the three sentences as one batch."
    h, w, C, D, M, _, E, vocab = arrays['net/hyper/widths_h_w_C_D_M_T_E_vocab'].tolist()
    cfg = CMPCConfig(size=32, text='lstm', emb_dim=E, gru_dim=D//2, type_hidden=9, width=C, out=M)
    levels = 'res5c_relu', 'res4b22_relu', 'res3b3_relu'
    channels = [arrays[f'net/four/in/{n}'].shape[-1] for n in levels]
    model = CMPC(cfg, channels, vocab).double()
    model.memory = ConvLSTM(M, M, (h, w)).double()
    model.load_state_dict(translated(arrays, 'net/weight/', shift=1.))
    features = [torch.cat([channels_first(arrays[f'net/{c}/in/{n}']) for c in CASES]) for n in levels]
    words = [arrays[f'net/{c}/in/words'][0] for c in CASES]
    lengths = torch.tensor([int((row != 0).sum()) for row in words])
    # padding in front becomes padding at the end
    tokens = torch.zeros(3, len(words[0]), dtype=torch.long)
    for i, row in enumerate(words): tokens[i, :lengths[i]] = torch.from_numpy(row[row != 0])
    return model, features, tokens, lengths


def watched(model, *args):
    "What every submodule answered: name -> list of outputs, one a call."
    seen, hooks = {}, []
    for name, module in model.named_modules():
        def keep(_, inputs, out, name=name): seen.setdefault(name, []).append((inputs, out))
        hooks.append(module.register_forward_hook(keep))
    out = model(*args)
    for hook in hooks: hook.remove()
    return out, seen


def legacy(logits, size):
    "TensorFlow 1's bilinear resizing: the source of row y is y·h/H, without half pixels."
    h, w = logits.shape[-2:]
    def ends(n, N):
        source = torch.arange(N, dtype=torch.double)*n/N
        low = source.floor().long()
        return low, (low + 1).clamp(max=n - 1), source - low
    (y0, y1, ty), (x0, x1, tx) = ends(h, size[0]), ends(w, size[1])
    rows = logits[..., y0, :]*(1 - ty)[:, None] + logits[..., y1, :]*ty[:, None]
    return rows[..., x0]*(1 - tx) + rows[..., x1]*tx


@pytest.fixture(scope='module')
def held(golden):
    "Official arrays, our network, and what each of its parts answered to the batch of three."
    arrays = golden('cmpc')
    model, *batch = official(arrays)
    with torch.no_grad(): out, seen = watched(model, *batch)
    return arrays, model, batch, out, seen


def same(arrays, name, ours, squeeze=False):
    "Our batch of three against each official single result that was stored. How many were."
    found = 0
    for i, c in enumerate(CASES):
        if f'net/{c}/out/{name}' not in arrays: continue
        theirs = tensor(arrays[f'net/{c}/out/{name}'])
        mine = ours[i:i + 1].reshape(theirs.shape) if squeeze else ours[i:i + 1]
        torch.testing.assert_close(mine, theirs, **CLOSE)
        found += 1
    assert found, f'no official value named {name}'


def last(x):
    "(B,C,h,w) as TensorFlow has it."
    return x.permute(0, 2, 3, 1)


def test_words_and_types_are_the_official_ones(held):
    arrays, model, (_, _, lengths), _, seen = held
    words, types, mask = seen['reader'][0][1]
    for i, c in enumerate(CASES):
        n = int(lengths[i])
        torch.testing.assert_close(words[i, :n], tensor(arrays[f'net/{c}/out/words_norm'][0]), **CLOSE)
        torch.testing.assert_close(types[i, :n], tensor(arrays[f'net/{c}/out/build_lang_parser'][0, 0]), **CLOSE)
    q = seen['levels.levels.2'][0][0][3]
    same(arrays, 'c5/valid_lang', q, True)
    same(arrays, 'nec_lang', sentence_of(words, 1 - types[..., 3], mask), True)


@pytest.mark.parametrize('i', range(3))
def test_each_level_is_the_official_one(held, i):
    arrays, model, (_, _, lengths), _, seen = held
    c, at = f'c{3 + i}', f'levels.levels.{i}'
    inputs, Y = seen[at][0]
    same(arrays, f'{c}/X', last(inputs[0]))
    same(arrays, f'{c}/mutan_fusion', last(seen[f'{at}.entities'][0][1]))
    P, V = seen[f'{at}.reasoning.edges'][0][1]
    n = int(lengths[0])
    same(arrays, f'{c}/P_words', P[:1, :, :n])
    same(arrays, f'{c}/V_cells', V[:1, :, :n])
    same(arrays, f'{c}/adj', P @ V.transpose(1, 2))
    before = last(seen[f'{at}.reasoning.updated'][0][1].relu())
    same(arrays, f'{c}/graph_conv', before, True)
    same(arrays, f'{c}/build_spa_graph', last(seen[f'{at}.reasoning'][0][1]))
    same(arrays, f'{c}/build_lang2vis', last(Y))


def test_exchange_and_memory_are_the_official_ones(held):
    arrays, model, _, _, seen = held
    for r in range(2):
        after = seen[f'tgfe.{r}'][0][1]
        for i in range(3):
            c, end = f'c{3 + i}', '_2' if r else ''
            (Y, s), g = seen[f'tgfe.{r}.levels.{i}.context'][0]
            a = model.tgfe[r].levels[i].context.attend(Y, s)
            same(arrays, f'tgfe_attn_{c}{end}', a, True)
            same(arrays, f'global_vec_{c}{end}gv_f1', g, True)
            same(arrays, f'exg{r + 1}_{c}', last(after[i]))
    maps, state = seen['tgfe.1'][0][1], None
    for k, Y in enumerate(maps):
        with torch.no_grad(): state = model.memory.step(model.memory.x(Y), state)
        same(arrays, f'convlstm/h{k}', last(state[0]))
        if k < 2: same(arrays, f'convlstm/c{k}', last(state[1]))
    torch.testing.assert_close(state[0], seen['memory'][0][1], **CLOSE)


def official_logits(seen):
    "The main score and the three auxiliary ones (of c3, c4, c5) on the cells."
    return seen['answer.score'][0][1], [seen[f'answer.early.{i}'][0][1] for i in range(3)]


def test_scores_and_losses_are_the_official_ones(held):
    arrays, _, _, out, seen = held
    main, early = official_logits(seen)
    same(arrays, 'pred', last(main))
    same(arrays, 'up', last(legacy(main, (16, 32))))
    truth = torch.cat([channels_first(arrays[f'net/{c}/in/mask']) for c in CASES])
    def loss(i, logits): return bce(legacy(logits[i:i + 1], (16, 32)), truth[i:i + 1])
    for k, logits in enumerate(early): same(arrays, f'up_c{3 + k}', last(legacy(logits, (16, 32))))
    weights = METHODS['cmpc'].main, METHODS['cmpc'].aux
    assert arrays['net/hyper/aux_weights_main_c5_c4_c3'].tolist() == [weights[0], *3*[weights[1]]]
    for i, c in enumerate(CASES):
        losses = [loss(i, logits) for logits in (main, *early)]
        for name, mine in zip(('cls_loss', 'cls_loss_c3', 'cls_loss_c4', 'cls_loss_c5'), losses):
            torch.testing.assert_close(mine, tensor(arrays[f'net/{c}/out/{name}']), rtol=1e-11, atol=0)
        total = weights[0]*losses[0] + weights[1]*sum(losses[1:])
        torch.testing.assert_close(total, tensor(arrays[f'net/{c}/out/cls_loss_all']), rtol=1e-11, atol=0)
    # what leaves is the score, twice as fine
    assert out.mask.shape == (3, 1, 4, 8) and len(out.aux) == 3 and out.prior is None


def test_gradients_are_the_official_ones(golden):
    arrays = golden('cmpc')
    model, features, tokens, lengths = official(arrays)
    one = [f[:1] for f in features], tokens[:1, :4], lengths[:1]
    _, seen = watched(model, *one)
    main, early = official_logits(seen)
    truth = channels_first(arrays['net/four/in/mask'])
    losses = [bce(legacy(logits, (16, 32)), truth) for logits in (main, *early)]
    (.7*losses[0] + .1*sum(losses[1:])).backward()
    theirs = translated(arrays, 'net/four/grad/')
    compared = 0
    for name, p in model.named_parameters():
        if not p.requires_grad: continue
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f'{name}: {m}')
        compared += 1
    assert compared == len(theirs) - 1  # all but the LSTM's second bias, which is not trained
    # why the key's bias is not ours
    for name in (k for k in arrays if k.startswith('net/four/grad/spa_graph_key') and k.endswith('biases')):
        assert abs(arrays[name]).max() < 1e-12


# --- slow twins ------------------------------------------------------------------------------------------------------

def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.fixture
def toy():
    "A map of 2×3 cells, words, types and a mask with one padded place: (cells, S, words, types, mask)."
    torch.manual_seed(0)
    words = unit(some(2, 4, 10, seed=1), -1)
    mask = torch.tensor([[True]*4, [True, True, True, False]])
    words = words*mask[..., None]
    cells = unit(some(2, 6, 2, 3, seed=2))
    return cells, coordinates(2, 3, cells).expand(2, -1, -1, -1), words, some(2, 4, 4, seed=3).softmax(-1), mask


def test_reasoning_equals_the_whole_adjacency_cell_by_cell(toy):
    cells, _, words, types, mask = toy
    r, relation = Reasoning(6, 10).double(), 5*types[..., 2]
    with torch.no_grad():
        for p in r.parameters(): p.copy_(some(*p.shape, seed=p.numel()))
        ours = r(cells, words, relation, mask)
        for b in range(2):
            n = int(mask[b].sum())
            flat = cells[b].flatten(1).T                                   # (N,C)
            u = words[b, :n] @ r.edges.word.weight.T + r.edges.word.bias
            adj = torch.zeros(6, 6, dtype=torch.double)
            B = torch.zeros(6, n, dtype=torch.double)
            for i in range(6):
                m = r.edges.cell.weight[:, :, 0, 0] @ flat[i] + r.edges.cell.bias
                for t in range(n): B[i, t] = m @ u[t]/6**.5*relation[b, t]
            for i in range(6):
                for j in range(6):
                    for t in range(n): adj[i, j] += B[i].softmax(0)[t]*B[:, t].softmax(0)[j]
            torch.testing.assert_close(adj.sum(1), torch.ones(6, dtype=torch.double))
            assert adj.std(0).mean() > 1e-3, 'far from uniform, or this test says nothing'
            def norm(x, layer):
                x = (x - x.mean())/(x.var(correction=0) + 1e-12).sqrt()
                return x*layer.weight + layer.bias
            Z = (flat + norm(adj @ flat, r.heard)).relu()
            G = norm(Z @ r.update.weight[:, :, 0, 0].T + r.update.bias, r.updated).relu()
            G = G/G.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()
            torch.testing.assert_close(ours[b].flatten(1).T, G, **CLOSE)


def test_without_relations_everybody_hears_the_mean_and_words_count_only_through_the_map(toy):
    cells, _, words, _, mask = toy
    r, none = Reasoning(6, 10).double(), torch.zeros(2, 4, dtype=torch.double)
    P, V = r.edges(cells, words, none, mask)
    flat = cells.flatten(2).transpose(1, 2)
    heard = P @ (V.transpose(1, 2) @ flat)
    torch.testing.assert_close(heard, flat.mean(1, keepdim=True).expand_as(heard), **CLOSE)
    # a word that is no relation keeps the score 0: it still takes part
    torch.testing.assert_close(P[1, 0], torch.tensor([1/3, 1/3, 1/3, 0], dtype=torch.double), **CLOSE)
    torch.testing.assert_close(r(cells, words, none, mask), r(cells, -words, none, mask), **CLOSE)
    assert not torch.allclose(r(cells, words, none + 1, mask), r(cells, -words, none + 1, mask), atol=1e-6)


def test_one_word_is_one_message(toy):
    cells, _, words, types, mask = toy
    P, V = Edges(6, 10).double()(cells, words[:, :1], types[:, :1, 2], mask[:, :1])
    adj = P @ V.transpose(1, 2)
    torch.testing.assert_close(adj, adj[:, :1].expand_as(adj), **CLOSE)


def test_the_multimodal_map_does_not_see_a_relation_but_the_exchange_does(toy):
    cells, S, words, types, mask = toy
    types = types.clone()
    types[:, 1] = torch.tensor([0., 0., 1., 0.])
    other = words.clone()
    other[:, 1] = unit(some(2, 10, seed=9), -1)
    entity, attribute, _, unnecessary = types.unbind(-1)
    fusion = Mutan(14, 10, 6).double()
    both = torch.cat([cells, S], 1)
    one, two = (fusion(both, sentence_of(w, entity + attribute, mask)) for w in (words, other))
    assert torch.equal(one, two)
    s, t = (sentence_of(w, 1 - unnecessary, mask) for w in (words, other))
    assert not torch.allclose(s, t, atol=1e-3)
    # padding is in neither, whatever stands there
    torch.testing.assert_close(sentence_of(words[1:] + ~mask[1:, :, None], entity[1:], mask[1:]),
                               sentence_of(words[1:, :3], entity[1:, :3], mask[1:, :3]), **CLOSE)


@pytest.mark.parametrize('join', ['multimodal', 'visual'])
def test_a_level_equals_one_kernel_over_everything(toy, join):
    cells, S, words, types, mask = toy
    level = Level(6, 10, 5, 3, join).double()
    q, relation = unit(some(2, 10, seed=4)), types[..., 2]
    M = level.entities(torch.cat([cells, S], 1), q)
    G = level.reasoning(M, words, relation, mask)
    tiled = q[:, :, None, None].expand(-1, -1, 2, 3)
    kernel = torch.cat([level.cells.weight[:, :12], level.sentence.weight[:, :, None, None],
                        level.cells.weight[:, 12:]], 1)
    everything = torch.cat([M if join == 'multimodal' else cells, G, tiled, S], 1)
    literal = F.conv2d(everything, kernel, level.cells.bias).relu()
    torch.testing.assert_close(level(cells, S, words, q, relation, mask), literal, **CLOSE)


def test_the_exchange_equals_loops_over_levels_and_cells():
    torch.manual_seed(0)
    r = Round(4, 7).double()
    with torch.no_grad():
        for p in r.parameters(): p.copy_(some(*p.shape, seed=p.numel()))
    maps, s = [some(2, 4, 2, 3, seed=k) for k in range(3)], some(2, 7, seed=5)
    with torch.no_grad(): ours = r(maps, s)
    for b in range(2):
        for i, level in enumerate(r.levels):
            c, flat = level.context, maps[i][b].flatten(1).T
            query = c.query.weight @ s[b] + c.query.bias
            scores = torch.stack([(c.key.weight[:, :, 0, 0] @ y) @ query/4**.5 for y in flat])
            a = scores.softmax(0)
            g = c.both.weight @ torch.cat([(a[:, None]*flat).sum(0), s[b]]) + c.both.bias
            g = g/g.norm()
            for n, y in enumerate(flat):
                total = y.clone()
                for k, j in enumerate(j for j in range(3) if j != i):
                    gate = (level.gates[k].weight @ g + level.gates[k].bias).sigmoid()
                    carry = level.carried[k]
                    other = maps[j][b].flatten(1).T[n]
                    total += gate*(carry.weight[:, :, 0, 0] @ other + carry.bias).relu()
                torch.testing.assert_close(ours[i][b].flatten(1).T[n], total/total.norm(), **CLOSE)


def test_a_bias_of_the_key_would_change_nothing():
    c = Context(4, 7).double()
    Y, s = some(2, 4, 2, 3), some(2, 7, seed=1)
    shifted = (c.key(Y) + some(4, seed=2)[:, None, None])*c.query(s)[..., None, None]
    torch.testing.assert_close((shifted.sum(1).flatten(1)/2).softmax(-1), c.attend(Y, s), **CLOSE)


def test_the_norms_are_over_the_whole_map_and_have_tensorflows_epsilon(toy):
    cells = toy[0]
    loud = cells.clone()
    loud[..., 0, 0] *= 100
    norm = map_norm(6).double()
    assert norm.eps == 1e-12 and not torch.allclose(norm(loud)[..., 1, :], norm(cells)[..., 1, :], atol=.1)
    model = METHODS['cmpc'].build(settings_of('cmpc')[1], (12, 10, 6), range(40))
    assert all(m.eps == 1e-12 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))
    assert not [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.BatchNorm2d)]


# --- switches, loss, errors ------------------------------------------------------------------------------------------

SENTENCES = [[5, 6, 7], [8]]


def answered(name='cmpc', **changes):
    "Settings, network and answer of a small network for two sentences at 128 pixels."
    method, cfg = settings_of(name, **changes)
    torch.manual_seed(0)
    model = method.build(cfg, (12, 10, 6), range(40)).double()
    features, words = made_up(SENTENCES)
    return method, cfg, model, method.forward(model, features, words)


def test_the_switches_change_the_network():
    _, _, plain, out = answered()
    for changes in (dict(join='visual'), dict(rounds=1), dict(rounds=0), dict(peephole='none'), dict(text='lstm')):
        _, _, model, other = answered(**changes)
        assert not torch.allclose(out.mask, other.mask), changes
    assert len(answered(rounds=0)[2].tgfe) == 0 and len(answered(rounds=3)[2].tgfe) == 3
    assert not answered(peephole='none')[2].memory.peep


def test_peepholes_of_a_place_hold_a_network_to_its_size_and_those_of_a_channel_do_not():
    features, words = made_up(SENTENCES, size=64)
    with pytest.raises(KitError, match='peepholes'): METHODS['cmpc'].forward(answered()[2], features, words)
    out = METHODS['cmpc'].forward(answered(peephole='channel')[2], features, words)
    assert out.mask.shape == (2, 1, 16, 16)


@pytest.mark.parametrize('seg, aux, prior', [('none', 3, False), ('prior', 4, True), ('replace', 3, False)])
def test_seg_and_its_loss(seg, aux, prior):
    method, cfg, model, out = answered('cmpc-seg', seg=seg)
    assert out.mask.shape == (2, 1, 32, 32) and len(out.aux) == aux and (method.prior(out) is not None) == prior
    g = torch.Generator().manual_seed(0)
    batch = {'mask': (torch.rand(2, 1, 32, 32, generator=g) > .8).float(),
             'prior': (torch.rand(2, 1, 16, 16, generator=g) > .8).float()}
    loss, parts = method.loss(cfg, out, batch)
    def summed(logits, name):
        return F.binary_cross_entropy_with_logits(logits, batch[name].double(), reduction='sum')/2
    wanted = .7*summed(out.mask, 'mask') + .1*sum(summed(a, 'mask') for a in out.aux[:3])
    if prior: wanted = wanted + .1*summed(out.prior, 'prior')
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_seg_reads_the_memory_and_the_score():
    _, _, model, out = answered('cmpc-seg')
    model.eval()
    features, words = made_up(SENTENCES)
    out, seen = watched(model, features, words['tokens'], words['lengths'])
    (memory, score), mask = seen['answer.segment'][0]
    assert torch.equal(memory, seen['memory'][0][1]) and torch.equal(score, out.prior) and torch.equal(mask, out.mask)
    # auxiliary masks are drawn before the exchange
    for i in range(3): assert torch.equal(seen[f'answer.early.{i}'][0][0][0], seen['levels'][0][1][i])


def test_two_rows_with_their_thresholds():
    cmpc, plus = METHODS['cmpc'], METHODS['cmpc-seg']
    assert (cmpc.threshold, cmpc.finishes, cmpc.config().seg) == (.5, ('plain', 'crf'), 'none')
    assert (plus.threshold, plus.finishes, plus.config().seg) == (.25, ('plain',), 'prior')
    assert cmpc.main == .7 and cmpc.aux == .1 and cmpc.stride(cmpc.config()) == 4


def test_a_trainable_tail_is_used():
    method, cfg = settings_of('cmpc')
    features, words = made_up(SENTENCES)
    tail = torch.nn.Conv2d(3, 12, 1).double()
    model = method.build(cfg, (12, 10, 6), range(40), tail=tail).double()
    short = (features[0][:, :3], *features[1:])
    method.loss(cfg, method.forward(model, short, words), {'mask': torch.ones(2, 1, 32, 32)})[0].backward()
    assert tail.weight.grad.abs().max() > 0


def test_half_precision_stays_near():
    method, cfg, model, out = answered()
    model.float()
    features, words = made_up(SENTENCES)
    features = [f.float() for f in features]
    with torch.autocast('cpu', torch.bfloat16): half = method.forward(model, features, words)
    assert torch.isfinite(half.mask).all()
    apart = (method.probability(half) - method.probability(out)).abs().max()
    assert apart < .05


def test_published_widths():
    method = METHODS['cmpc']
    with torch.device('meta'): model = method.build(method.config(), (1024, 512, 256), range(10_000))
    assert round(sum(p.numel() for p in model.parameters())/1e6, 1) == 73.2
    assert sum(p.numel() for p in model.memory.peep.parameters()) == 3*52*52*500


def test_settings_are_refused_with_a_sentence():
    for wrong, said in ((dict(seg='more'), 'seg'), (dict(size=100), 'size'), (dict(join='both'), 'join'),
                        (dict(rounds=-1), 'rounds'), (dict(peephole='cell'), 'peephole')):
        with pytest.raises(KitError, match=said): CMPCConfig(**wrong)
    model, (features, words) = answered()[2], made_up(SENTENCES)
    words['lengths'][1] = 0
    with pytest.raises(KitError, match='no word'): METHODS['cmpc'].forward(model, features, words)
    lstm = answered(text='lstm')[2]
    with pytest.raises(KitError, match='no word'): METHODS['cmpc'].forward(lstm, features, words)
