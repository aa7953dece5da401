"""Lang2seg: regional filters, captioner and losses against slow ways, and what the method owes.

Official values, where there are some, are read by name from `lang2seg.npz`; the tests skip without them."""
import math

import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.rivals.lang2seg import (REGIONS, Captioner, Lang2seg, Lang2segConfig, Lang2segMethod, RegionFilters, SentenceEnds,
                                    caption_cells, caption_loss, inside, modulate, referred, regional_response, regions, surest)
from lts_nb.rivals.proposals import dynamic_masks

TOL = dict(rtol=0, atol=1e-10)
close = lambda a, b, **kind: torch.testing.assert_close(a, b, **(TOL | kind))
draw = lambda *shape, seed=0: torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


# the seven regions

def in_region(k, y, x, h, w):
    "The sheet's inequalities, one cell at a time."
    return [True, y < h//2, y >= h//2, x < w//2, x >= w//2, h//4 <= y < 3*h//4, w//4 <= x < 3*w//4][k]


@pytest.mark.parametrize('h,w', [(8, 8), (5, 5), (4, 7), (26, 26), (1, 3), (13, 20)])
def test_regions_are_the_inequalities(h, w):
    found = regions(h, w)
    assert found.shape == (7, h, w) == (len(REGIONS), h, w)
    for k in range(7):
        for y in range(h):
            for x in range(w): assert bool(found[k, y, x]) == in_region(k, y, x, h, w)


def test_five_rows():
    rows = lambda k: regions(5, 5)[k].any(1).nonzero().flatten().tolist()
    assert (rows(1), rows(2), rows(5)) == ([0, 1], [2, 3, 4], [1, 2])


@pytest.mark.parametrize('h,w', [(8, 8), (5, 7), (4, 3)])
def test_the_response_is_seven_zeroed_copies_and_seven_convolutions(h, w):
    cells, d, r = draw(3, 6, h, w), draw(3, 7, 6, seed=1), draw(3, 7, seed=2)
    slow = []
    for b in range(3):
        answers = []
        for k in range(7):
            copy = cells[b:b + 1].clone()
            for y in range(h):
                for x in range(w):
                    if not in_region(k, y, x, h, w): copy[:, :, y, x] = 0
            answers.append(F.conv2d(copy, d[b, k].view(1, 6, 1, 1)))
        slow.append(F.conv2d(torch.cat(answers, 1), r[b].view(1, 7, 1, 1)))
    close(regional_response(cells, d, r), torch.cat(slow))


def test_with_one_kernel_it_is_the_filter_of_lts():
    from lts_nb.model.locate import filter_map
    cells, d, r = draw(2, 6, 5, 5), draw(2, 7, 6, seed=1), draw(2, 7, seed=2)
    d[:, 1:] = 0
    close(regional_response(cells, d, r), r[:, :1, None, None]*filter_map(cells, d[:, :1]))


def test_a_mirrored_picture_with_left_and_right_exchanged_is_the_mirrored_answer():
    cells, d, r = draw(2, 6, 5, 8), draw(2, 7, 6, seed=1), draw(2, 7, seed=2)
    swap = [0, 1, 2, 4, 3, 5, 6]
    plain, turned = regional_response(cells, d, r), regional_response(cells.flip(-1), d[:, swap], r[:, swap])
    close(turned, plain.flip(-1))
    assert not torch.allclose(regional_response(cells.flip(-1), d, r), plain.flip(-1))


def test_a_region_is_blind_outside():
    cells, d, r = draw(1, 6, 8, 8), draw(1, 7, 6, seed=1), draw(1, 7, seed=2)
    other = cells.clone()
    other[:, :, 4:] = draw(1, 6, 4, 8, seed=3)
    def share(k, f):
        only = torch.zeros_like(r)
        only[:, k] = r[:, k]
        return regional_response(f, d, only)
    close(share(1, cells), share(1, other))
    assert not share(1, cells)[:, :, 4:].any()
    moved = (share(2, cells) - share(2, other)).abs()
    assert moved[:, :, 4:].min() > 0 and not moved[:, :, :4].any()


def test_kernels_and_weights_are_tanh_of_linear_maps():
    torch.manual_seed(0)
    m, h = RegionFilters(10, 6).double(), draw(3, 10)
    d, r = m(h)
    W, b = m.kernels.weight.view(7, 6, 10), m.kernels.bias.view(7, 6)
    for k in range(7): close(d[:, k], (h @ W[k].T + b[k]).tanh())
    close(r, (h @ m.weights.weight.T + m.weights.bias).tanh())


# the sentence

def test_the_sentence_is_its_last_states_whatever_stands_behind():
    torch.manual_seed(0)
    m = SentenceEnds(20, 5, 4).double().eval()
    one = torch.tensor([[3, 7, 9]])
    many = torch.tensor([[3, 7, 9, 0, 0], [4, 5, 6, 7, 8]])
    with torch.no_grad():
        alone, beside = m(one, torch.tensor([3])), m(many, torch.tensor([3, 5]))
        x = m.mix(m.embed(one)).relu()
        states, _ = m.lstm(x)
    close(alone[0], beside[0])
    # forward: behind the last word; backward: before the first
    close(alone, torch.cat([states[:, -1, :4], states[:, 0, 4:]], 1))
    with pytest.raises(KitError, match='no word'): m(many, torch.tensor([0, 5]))


# the captioner

def slow_captioner(m, X, tokens):
    "The sheet's equations for one sentence, word after word, one cell at a time."
    u = m.query.weight.shape[0]
    E = [(m.see.weight @ x + m.see.bias).relu() for x in X]
    P = [m.key.weight @ e + m.key.bias for e in E]
    h, c, out = X.new_zeros(u), X.new_zeros(u), []
    for w in [0, *tokens]:
        x = m.embed.weight[w].relu()
        scores = [float(m.energy.weight[0] @ (p + m.query.weight @ h).tanh()) for p in P]
        exps = [math.exp(s) for s in scores]
        z = sum(e*cell for e, cell in zip(exps, E))/sum(exps)
        s = m.from_word.weight @ x + m.from_word.bias + m.from_state.weight @ h
        i, f, o = s[:u].sigmoid(), s[u:2*u].sigmoid(), s[2*u:3*u].sigmoid()
        pair = s[3*u:] + m.from_picture.weight @ z
        g = torch.maximum(pair[:u], pair[u:])
        c = f*c + i*g
        h = o*c.tanh()
        out.append(m.word.weight @ h + m.word.bias)
    return torch.stack(out)


def test_the_captioner_is_its_equations():
    torch.manual_seed(0)
    m = Captioner(12, 6, 5).double().eval()
    X, sentences = draw(2, 9, 6), [[3, 4, 5], [7]]
    tokens = torch.tensor([[3, 4, 5], [7, 0, 0]])
    with torch.no_grad():
        out = m(X, tokens)
        for b, s in enumerate(sentences): close(out[b, :len(s) + 1], slow_captioner(m, X[b], s))


def test_the_captioner_does_not_see_the_word_that_it_must_say():
    torch.manual_seed(0)
    m = Captioner(12, 6, 5).double().eval()
    X = draw(1, 9, 6)
    with torch.no_grad(): a, b = (m(X, torch.tensor([[3, w, 5]])) for w in (4, 8))
    close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])


def slow_caption_loss(logits, sentences):
    "A loop over words with lists."
    costs = []
    for row, s in zip(logits.tolist(), sentences):
        for scores, w in zip(row, [*s, 0]): costs.append(math.log(sum(map(math.exp, scores))) - scores[w])
    return sum(costs)/len(costs)


def test_the_caption_loss_counts_every_word_and_the_end():
    sentences = [[3, 4, 5], [7], [2, 9]]
    tokens = torch.tensor([[3, 4, 5], [7, 0, 0], [2, 9, 0]])
    lengths, logits = torch.tensor([3, 1, 2]), draw(3, 4, 12)
    loss = caption_loss(logits, tokens, lengths)
    assert loss.item() == pytest.approx(slow_caption_loss(logits, sentences), abs=1e-12)
    # what stands behind the end does not count
    behind = logits.clone()
    behind[1, 2:] = 50*draw(2, 12, seed=5)
    close(caption_loss(behind, tokens, lengths), loss)
    longer, more = F.pad(logits, (0, 0, 0, 3), value=9.), F.pad(tokens, (0, 3))
    close(caption_loss(longer, more, lengths), loss)
    # the end does
    ended = logits.clone()
    ended[1, 1, 0] += 3
    assert caption_loss(ended, tokens, lengths) < loss
    # whoever spells the sentence and stops has no loss
    right = 60*F.one_hot(F.pad(tokens, (0, 1)), 12).double()
    assert caption_loss(right, tokens, lengths) < 1e-12


def test_the_object_on_a_coarser_grid_holds_half_of_a_cell():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :2], mask[..., 4:, 5:] = 1, 1        # half a cell in the columns 0–3, three quarters in 4–7
    assert inside(mask, (2, 2)).squeeze().tolist() == [[1, 0], [0, 1]]
    mask[..., 0, 0] = 0
    assert inside(mask, (2, 2)).squeeze().tolist() == [[0, 0], [0, 1]]


def test_cells_of_the_captioner_are_averages_in_reading_order():
    a, b = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1)
    X = caption_cells(a, b, 4)
    assert X.shape == (2, 16, 6)
    close(X[1, 6], torch.cat([a[1, :, 2:4, 4:6].mean((1, 2)), b[1, :, 2:4, 4:6].mean((1, 2))]))


# official values, by name: lang2seg.npz, if somebody has run parts of the official code. Names as in the kit's other files:
# filters/weight/d0.weight … d6.bias, r.weight, r.bias; filters/in/h (B,D_h), in/map (B,D,h,w); filters/out/response (B,1,h,w)
# captioner/weight/NAME (torch's names of att2in2: embed.0, att_embed.0, ctx2att, logit, core.i2h, core.h2h, core.a2c,
# core.attention.h2att, core.attention.alpha_net); captioner/in/att (B,N,C), in/tokens (B,T); captioner/out/logits (B,T+1,V+1)

def filters_state(w):
    "Seven layers below each other."
    state = {f'kernels.{k}': torch.cat([w[f'd{i}.{k}'] for i in range(7)]) for k in ('weight', 'bias')}
    return state | {f'weights.{k}': w[f'r.{k}'] for k in ('weight', 'bias')}


def captioner_state(w):
    "The official captioner's weights by our names: biases that stand in one sum are one, and a softmax does not see its own."
    u = w['core.h2h.weight'].shape[1]
    also = torch.cat([torch.zeros(3*u, dtype=w['core.a2c.bias'].dtype), w['core.a2c.bias']])
    return {'embed.weight': w['embed.0.weight'], 'see.weight': w['att_embed.0.weight'], 'see.bias': w['att_embed.0.bias'],
            'key.weight': w['ctx2att.weight'], 'key.bias': w['ctx2att.bias'] + w['core.attention.h2att.bias'],
            'query.weight': w['core.attention.h2att.weight'], 'energy.weight': w['core.attention.alpha_net.weight'],
            'from_word.weight': w['core.i2h.weight'], 'from_word.bias': w['core.i2h.bias'] + w['core.h2h.bias'] + also,
            'from_state.weight': w['core.h2h.weight'], 'from_picture.weight': w['core.a2c.weight'],
            'word.weight': w['logit.weight'], 'word.bias': w['logit.bias']}


def hold(part):
    "Our modules with a part's weights, against its outputs."
    w, seen, out = ({k.removeprefix(kind + '/'): v for k, v in part.items() if k.startswith(kind + '/')} for kind in ('weight', 'in', 'out'))
    if 'response' in out:
        D, d_text = w['d0.weight'].shape
        filters = RegionFilters(d_text, D).double()
        filters.load_state_dict(filters_state(w))
        close(regional_response(seen['map'], *filters(seen['h'])), out['response'], atol=1e-9)
    else:
        (V, u), C = w['embed.0.weight'].shape, w['att_embed.0.weight'].shape[1]
        captioner = Captioner(V, C, u).double().eval()
        captioner.load_state_dict(captioner_state(w))
        close(captioner(seen['att'], seen['tokens']).log_softmax(-1), out['logits'].log_softmax(-1), atol=1e-9)


@pytest.mark.parametrize('part', ['filters', 'captioner'])
def test_official_values(golden, part):
    try: arrays = golden('lang2seg')
    except FileNotFoundError: pytest.skip('no lang2seg.npz among the golden values')
    hold({k.removeprefix(part + '/'): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(part + '/')})


def official_captioner(w, X, tokens):
    "att2in2 of one sentence with all its biases, from the weights by their official names."
    lin = lambda name, x: w[name + '.weight'] @ x + w[name + '.bias']
    u = w['core.h2h.weight'].shape[1]
    E = [lin('att_embed.0', x).relu() for x in X]
    h, c, out = X.new_zeros(u), X.new_zeros(u), []
    for t in [0, *tokens]:
        x = w['embed.0.weight'][t].relu()
        e = torch.stack([lin('core.attention.alpha_net', (lin('ctx2att', v) + lin('core.attention.h2att', h)).tanh())[0] for v in E])
        z = sum(a*v for a, v in zip(e.softmax(0), E))
        s = lin('core.i2h', x) + lin('core.h2h', h)
        i, f, o = s[:3*u].sigmoid().chunk(3)
        g = torch.maximum(*(s[3*u:] + lin('core.a2c', z)).chunk(2))
        c = f*c + i*g
        h = o*c.tanh()
        out.append(lin('logit', h))
    return torch.stack(out)


def test_official_values_are_read_by_their_names():
    "The reader of official values, on values that the equations give; it must notice a wrong one."
    V, u, C, D, d_text = 9, 4, 6, 5, 7
    shapes = {'att_embed.0': (u, C), 'ctx2att': (u, u), 'core.i2h': (5*u, u), 'core.h2h': (5*u, u), 'core.a2c': (2*u, u),
              'core.attention.h2att': (u, u), 'core.attention.alpha_net': (1, u), 'logit': (V, u)}
    w = {'embed.0.weight': draw(V, u, seed=99)}
    for k, (name, shape) in enumerate(shapes.items()): w |= {name + '.weight': draw(*shape, seed=k), name + '.bias': draw(shape[0], seed=k + 20)}
    X, tokens = draw(2, 4, C), torch.tensor([[3, 4], [7, 8]])
    logits = torch.stack([official_captioner(w, x, t.tolist()) for x, t in zip(X, tokens)])
    part = {f'weight/{k}': v for k, v in w.items()} | {'in/att': X, 'in/tokens': tokens, 'out/logits': logits}
    hold(part)
    for name in ('core.a2c.bias', 'core.h2h.bias', 'ctx2att.bias', 'core.attention.h2att.bias'):
        with pytest.raises(AssertionError): hold(part | {f'weight/{name}': w[name] + 1})
    w = {f'd{i}.{k}': draw(*s, seed=i + len(s)*10) for i in range(7) for k, s in (('weight', (D, d_text)), ('bias', (D,)))}
    w |= {'r.weight': draw(7, d_text, seed=50), 'r.bias': draw(7, seed=51)}
    h, cells = draw(2, d_text, seed=52), draw(2, D, 5, 4, seed=53)
    r, R = (h @ w['r.weight'].T + w['r.bias']).tanh(), 0
    for i in range(7):
        d = (h @ w[f'd{i}.weight'].T + w[f'd{i}.bias']).tanh()
        R = R + (r[:, i, None, None]*(cells*regions(5, 4, cells)[i]*d[..., None, None]).sum(1))[:, None]
    part = {f'weight/{k}': v for k, v in w.items()} | {'in/h': h, 'in/map': cells, 'out/response': R}
    hold(part)
    with pytest.raises(AssertionError): hold(part | {'weight/d3.weight': w['d4.weight']})


# the network

CHANNELS = 8, 6, 4
SMALL = dict(lam_cap=.5, emb_dim=8, lstm_dim=6, d=10, cap_units=8, cap_side=4, cap_warmup=0, aspp_width=4, aspp_rates=(2, 4),
             instance=dict(width=8, levels=2, depth=1, shared=True, controller=1, mask_depth=1))
FORMS = {'as it is': {}, 'response': dict(modulation='response'), 'scaled': dict(scale_response=True), 'dense': dict(head='dense'),
         'dense response': dict(head='dense', modulation='response'), 'silent': dict(lam_cap=0.)}


def built(seed=0, **changes):
    torch.manual_seed(seed)
    cfg = Lang2segConfig(**SMALL | changes)
    return cfg, Lang2seg(cfg, CHANNELS, 20).double()


def a_batch(n=3, side=128, seed=0):
    features = tuple(draw(n, c, side//s, side//s, seed=seed + s) for c, s in zip(CHANNELS, (32, 16, 8)))
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 0, 0, 0]])[:n]
    mask, box = torch.zeros(n, 1, side//4, side//4, dtype=torch.double), torch.zeros(n, 4)
    for i in range(n):
        mask[i, :, 4:12, 4*i + 2:4*i + 10] = 1
        box[i] = torch.tensor([(4*i + 6)*4/side, 32/side, 32/side, 32/side])
    return features, dict(tokens=tokens, lengths=(tokens > 0).sum(1), mask=mask, box=box)


@pytest.mark.parametrize('form', FORMS)
def test_every_form_learns_with_every_parameter(form):
    cfg, model = built(dropout=0., **FORMS[form])
    method, (features, batch) = Lang2segMethod(), a_batch()
    out = method.forward(model.train(), features, batch)
    loss, parts = method.loss(cfg, out, batch)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    assert ('caption' in parts) == (form != 'silent') and ('response' in parts) == ('response' in form)
    assert ('seg' in parts) == ('dense' in form) and ('class' in parts) == ('dense' not in form)
    weighed = sum(v*(cfg.lam_cap if k == 'caption' else 1) for k, v in parts.items())
    close(loss.detach(), weighed)
    assert out.mask.shape == (3, 1, 32, 32) and out.response.shape == (3, 1, 8, 8)


@pytest.mark.parametrize('form', FORMS)
def test_a_picture_looked_at_once_serves_all_its_sentences(form):
    _, model = built(**FORMS[form])
    method, (features, batch) = Lang2segMethod(), a_batch()
    model.eval()
    with torch.no_grad():
        plain = method.forward(model, features, batch)
        looked = method.look(model, features)
        assert all(len(m) == 3 for m in looked)
        shared = method.answer(model, looked, batch)
    for a, b in ((plain.mask, shared.mask), (plain.response, shared.response)): close(a, b)
    assert plain.said is None


@pytest.mark.parametrize('form', FORMS)
def test_only_the_captioner_is_told_the_truth(form):
    _, model = built(dropout=0., **FORMS[form])
    features, batch = a_batch()
    with torch.no_grad():
        outs = [model.train()(features, batch['tokens'], batch['lengths'], t) for t in (batch['mask'], batch['mask'].flip(2), None)]
    for other in outs[1:]:
        close(outs[0].mask, other.mask)
        close(outs[0].response, other.response)
    if form == 'silent': assert outs[0].said is None
    elif 'response' in form: close(outs[0].said, outs[1].said)
    else: assert not torch.allclose(outs[0].said, outs[1].said)


@pytest.mark.parametrize('modulation', ['product', 'response'])
def test_nothing_goes_past_a_closed_gate(modulation):
    "R is 0 (or a probability of 0) on the right half: what stands there in the three maps cannot change the head's answer."
    _, model = built(modulation=modulation)
    model.eval()
    features, batch = a_batch()
    changed = [f.clone() for f in features]
    for f in changed: f[..., f.shape[-1]//2:] = 7
    shut = torch.zeros(3, 1, 8, 8, dtype=torch.double)
    shut[..., :4] = 1
    with torch.no_grad():
        a, b = (model.head(modulate(maps, shut)) for maps in (features, changed))
        c = model.head(changed)
    close(a.logits, b.logits)
    close(a.features, b.features)
    assert not torch.allclose(a.logits, c.logits)


def test_the_gate_of_the_head_is_the_response():
    for modulation in ('product', 'response'):
        _, model = built(modulation=modulation)
        features, batch = a_batch()
        model.eval()
        with torch.no_grad():
            out = model(features, batch['tokens'], batch['lengths'])
            cells = model.see(features)[0]
            assert cells.min() >= 0
            R = regional_response(cells, *model.filters(model.language(batch['tokens'], batch['lengths'])))
            close(out.response, R)
            gate = R.sigmoid() if modulation == 'response' else R
            close(out.found.logits, model.head(modulate(features, gate)).logits)
            # it points at where the gate is widest open, whatever the sign
            wide = F.interpolate((R if modulation == 'response' else R.abs()).float(), scale_factor=2, mode='bilinear')
            close(Lang2segMethod().prior(out), wide, atol=1e-6)


def test_scaled_by_the_root_of_the_channels():
    (_, a), (_, b) = built(), built(scale_response=True)
    features, batch = a_batch()
    with torch.no_grad(): x, y = (m.eval()(features, batch['tokens'], batch['lengths']).response for m in (a, b))
    close(x, y*math.sqrt(10))


# the one object, and the one answer

def test_the_referred_object_is_the_only_thing():
    _, batch = a_batch()
    things = referred(batch['box'], batch['mask'])
    assert things.boxes.shape == (3, 1, 4) and things.masks.dtype == torch.bool and (things.kinds == 0).all()
    for i in range(3):
        assert things.boxes[i, 0].tolist() == pytest.approx([4*(4*i + 2), 16, 4*(4*i + 10), 48], abs=1e-4)
        assert torch.equal(things.masks[i, 0], batch['mask'][i, 0] > 0)


def test_the_surest_location_answers_however_unsure_it_is():
    _, model = built()
    features, batch = a_batch()
    with torch.no_grad():
        found = model.eval()(features, batch['tokens'], batch['lengths']).found
        found = found._replace(logits=draw(*found.logits.shape) - 30, centre=draw(*found.centre.shape, seed=1))
        masks, at = surest(found)
    assert masks.shape == (3, 1, 32, 32)
    for i in range(3):
        scores = [p.sigmoid().item()*c.sigmoid().item() for p, c in zip(found.logits[i, :, 0], found.centre[i])]
        best = max(range(len(scores)), key=lambda k: scores[k])
        assert at[i] == best and scores[best] < 1e-9
        one = dynamic_masks(found.features[i:i + 1], found.controls[i, best][None], torch.tensor([0]), found.places[best][None],
                            found.strides[best][None])
        close(masks[i], one)


def test_other_objects_are_background():
    "The loss falls where the head is sure of the object, and rises where it is sure of a place without it."
    cfg, model = built(lam_cap=0.)
    method, (features, batch) = Lang2segMethod(), a_batch()
    with torch.no_grad():
        out = method.forward(model.train(), features, batch)
        losses = []
        for x, y in ((batch['box'][0, 0]*128, batch['box'][0, 1]*128), (100., 100.)):
            logits = out.found.logits.clone()
            away = (out.found.places - torch.tensor([float(x), float(y)])).abs().sum(1)
            away[out.found.strides > 8] = 1e6
            logits[0, away.argmin()] += 6
            losses.append(method.loss(cfg, out._replace(found=out.found._replace(logits=logits)), batch)[1]['class'])
        plain = method.loss(cfg, out, batch)[1]['class']
    assert losses[0] < plain < losses[1]


# the captioner's two phases

@pytest.mark.parametrize('modulation', ['product', 'response'])
def test_the_caption_teaches_the_filters_behind_the_warm_up_only(modulation):
    cfg, model = built(cap_warmup=2, modulation=modulation, dropout=0.)
    features, batch = a_batch()
    parts = {'kernels': model.filters.kernels.weight, 'weights': model.filters.weights.weight, 'F': model.cells[0].weight,
             'lstm': model.language.lstm.weight_hh_l0, 'head': model.head.towers.to_class.weight}
    for step in range(4):
        model.zero_grad()
        out = model.train()(features, batch['tokens'], batch['lengths'], batch['mask'])
        caption_loss(out.said, batch['tokens'], batch['lengths']).backward()
        reached = {k for k, p in parts.items() if p.grad is not None and p.grad.abs().max() > 0}
        assert reached == (set() if step < 2 else {'kernels', 'weights', 'F', 'lstm'})
        if step >= 2:                                    # every one of the seven
            assert (parts['kernels'].grad.view(7, -1).abs().amax(1) > 0).all()
            assert (parts['weights'].grad.abs().amax(1) > 0).all()
        assert all(p.grad.abs().max() > 0 for p in model.captioner.parameters())


def test_the_warm_up_looks_at_the_map_without_filters():
    _, model = built(cap_warmup=1, dropout=0.)
    features, batch = a_batch()
    with torch.no_grad():
        a = model.train()(features, batch['tokens'], batch['lengths'], batch['mask']).said
        cells = model.see(features)[0]
        X = caption_cells(cells, cells*inside(batch['mask'], (8, 8)), 4)
        close(a, model.captioner(X, batch['tokens']))
        out = model(features, batch['tokens'], batch['lengths'], batch['mask'])
        F_ = cells*out.response
        close(out.said, model.captioner(caption_cells(F_, F_*inside(batch['mask'], (8, 8)), 4), batch['tokens']))


def test_the_phase_is_kept_with_the_weights():
    _, model = built(cap_warmup=5)
    features, batch = a_batch()
    for _ in range(3): model.train()(features, batch['tokens'], batch['lengths'], batch['mask'])
    model.eval()(features, batch['tokens'], batch['lengths'])
    _, other = built(cap_warmup=5, seed=1)
    other.load_state_dict(model.state_dict())
    assert int(other.steps) == 3


def test_the_loss_falls_without_any_scale():
    "The trap of the product: with 256 channels R is large; the head's group norms take it."
    cfg, model = built(d=256, lam_cap=0., dropout=0.)
    model.float()
    method, (features, batch) = Lang2segMethod(), a_batch()
    features = tuple(f.float() for f in features)
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(50):
        out = method.forward(model.train(), features, batch)
        loss, _ = method.loss(cfg, out, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < .7*losses[0] and all(map(math.isfinite, losses))


def test_settings_come_back_from_plain_values():
    cfg = Lang2segConfig(**SMALL)
    assert cfg.instance.width == 8 and Lang2segConfig.read(cfg.plain(), 'here') == cfg
    for wrong in (dict(head='mask'), dict(modulation='sum'), dict(instance=dict(depth=-1)), dict(lam_cap=-1.)):
        with pytest.raises(KitError): Lang2segConfig(**SMALL | wrong)
