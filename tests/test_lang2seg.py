"""Lang2seg: regional filters, captioner and losses against slow ways, and what the method owes.

Official values, where there are some (`lang2seg.npz`): `filters`, `captioner`; tests read them by name and skip without."""
import math

import pytest
import torch
import torch.nn.functional as F

from lts_nb.errors import KitError
from lts_nb.rivals.lang2seg import (REGIONS, Captioner, RegionFilters, SentenceEnds, caption_cells, caption_loss, inside,
                                    regional_response, regions)

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


# official values, by name

def official(golden, part):
    arrays = golden('lang2seg')
    return {k[len(part) + 1:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(part + '/')}
