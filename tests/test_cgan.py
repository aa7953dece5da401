"CGAN, our reading of it: what its sheet asks, and where it must agree with MCN."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lts_nb.model.losses import bce
from lts_nb.model.method import METHODS
from lts_nb.rivals.cgan import CGAN, CGANConfig, CGANOutput, WordQuery, attention_mass, ila_loss
from lts_nb.rivals.mcn import MCN, MCNConfig
from lts_nb.training.config import load_methods

load_methods()
METHOD = METHODS['cgan']


def made(seed=0, **changes):
    cfg = METHOD.config(**METHOD.widths['smoke'] | changes)
    torch.manual_seed(seed)
    model = METHOD.build(cfg, (12, 10, 6), range(20)).double()
    generator = torch.Generator().manual_seed(1)
    features = tuple(torch.rand(3, c, s, s, generator=generator).double() for c, s in ((12, 4), (10, 8), (6, 16)))
    batch = dict(tokens=torch.tensor([[4, 5, 6], [7, 8, 0], [9, 0, 0]]), lengths=torch.tensor([3, 2, 1]),
                 prior=(torch.rand(3, 1, 16, 16, generator=generator) > .8).double(),
                 mask=(torch.rand(3, 1, 32, 32, generator=generator) > .8).double())
    return cfg, model, features, batch


def run(model, features, batch): return METHOD.forward(model, features, batch)


def test_its_row_says_that_it_is_our_reading():
    assert METHOD.title == 'CGAN (our reading)' and 'our reading' in METHOD.notes[0].replace('\n', ' ')
    assert METHOD.finishes == ('plain',) and METHOD.threshold == .35


@pytest.mark.parametrize('steps', [1, 2, 3])
@pytest.mark.parametrize('groups', [1, 2, 8])
def test_any_number_of_steps_and_groups_gives_equal_shapes(steps, groups):
    cfg, model, features, batch = made(steps=steps, groups=groups)
    out = run(model, features, batch)
    assert out.mask.shape == (3, 1, 16, 16) and len(out.maps) == len(out.collect) == steps and out.words == ()
    assert all(m.shape == (3, 1, 16, 16) for m in out.maps) and all(r.shape == (3, groups, 16, 16) for r in out.collect)
    assert torch.equal(METHOD.prior(out), out.maps[-1].float())


def test_shared_maps_have_fewer_weights_by_the_square_of_the_groups():
    count = lambda **kind: sum(getattr(made(**kind)[1].steps[0].garan, m).weight.numel() for m in ('collect', 'value', 'distribute', 'query'))
    assert count(groups=8, shared=False) == 64*count(groups=8) == count(groups=1)


def test_one_step_of_two_groups_without_supervision_is_mcns_attention():
    widths = {k: v for k, v in METHOD.widths['smoke'].items()}
    cfg = CGANConfig(**widths, steps=1, groups=2, mu=0., pool='channel')
    torch.manual_seed(0)
    ours, mcn = CGAN(cfg, (12, 10, 6), 20), MCN(MCNConfig(**widths, groups=2), (12, 10, 6), 20)
    for part in ('language', 'pool', 'trunk', 'mask'): getattr(ours, part).load_state_dict(getattr(mcn, part).state_dict())
    ours.steps[0].garan.load_state_dict(mcn.garan.state_dict())
    _, _, features, batch = made()
    features = tuple(f.float() for f in features)
    seen = []
    for g in (ours.steps[0].garan, mcn.garan): g.register_forward_hook(lambda m, x, y: seen.append(y.map))
    with torch.no_grad():
        a, b = (m.eval()(features, batch['tokens'], batch['lengths']) for m in (ours, mcn))
    assert torch.equal(*seen) and torch.equal(a.mask, b.mask) and a.mask.std() > 0


def test_a_constant_on_the_logits_changes_the_map_alone():
    "Why there is an offset: the softmax does not see it."
    cfg, model, features, batch = made()
    before = run(model.eval(), features, batch)
    for step in model.steps: nn.init.constant_(step.offset, 5.)
    after = run(model, features, batch)
    torch.testing.assert_close(after.mask, before.mask, rtol=0, atol=0)
    for a, b in zip(after.maps, before.maps): torch.testing.assert_close(a, b + 5, rtol=0, atol=1e-9)


def test_supervision_reaches_every_step_and_nothing_behind_the_last_map():
    cfg, model, features, batch = made()
    out = run(model, features, batch)
    ila_loss(out, batch['prior'], 'bce').backward()
    for i, step in enumerate(model.steps):
        g = step.garan
        assert g.collect.weight.grad.abs().max() > 0 and step.offset.grad.abs() > 0 and step.scale.grad.abs() > 0
        for name in ('value', 'distribute'):
            grad = getattr(g, name).weight.grad
            if i == 2: assert grad is None or grad.abs().max() == 0
            else: assert grad.abs().max() > 0
    assert all(p.grad is None for p in model.mask.parameters())


def test_it_has_no_notion_of_place():
    "Permuted cells give permuted maps: 'left' can only come from the trunk."
    cfg, model, *_ = made()
    torch.manual_seed(3)
    x, f = torch.randn(2, 16, 6, 6).double(), torch.randn(2, 32).double()
    order = torch.randperm(36)
    permuted = lambda m: m.flatten(2)[..., order].view_as(m)
    def cascade(x):
        found = x.new_zeros(2, 16)
        for step in model.eval().steps:
            seen, where, _ = step(x, f, None, None, found)
            x, found = seen.map, seen.found
        return x, where
    (a, ra), (b, rb) = cascade(x), cascade(permuted(x))
    torch.testing.assert_close(permuted(a), b, rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted(ra), rb, rtol=0, atol=1e-12)
    assert (a - b).abs().max() > .1


def out_of(maps=(), collect=()): return CGANOutput(torch.zeros(2, 1, 8, 8), tuple(maps), tuple(collect), ())


def test_a_perfect_map_costs_nothing_and_a_perfect_softmax_could_not():
    target = torch.zeros(2, 1, 52, 52)
    target[:, :, 10:30, 10:25] = 1
    perfect = (2*target - 1)*20
    assert ila_loss(out_of([perfect]), target, 'bce') < .01
    alpha = target/target.sum((2, 3), keepdim=True)           # all attention on the object, evenly
    by_probability = F.binary_cross_entropy(alpha.clamp(1e-7, 1), target, reduction='sum')/2
    assert by_probability > 1000
    assert ila_loss(out_of(collect=[perfect]), target, 'mass') < .01


def test_the_loss_is_the_mean_over_steps_and_its_weight_is_mu():
    cfg, model, features, batch = made()
    out = run(model, features, batch)
    total, parts = METHOD.loss(cfg, out, batch)
    each = [bce(m, batch['prior']) for m in out.maps]
    torch.testing.assert_close(total, bce(out.mask, batch['prior']) + .1*sum(each)/3)
    assert list(parts) == ['seg', 'ila'] and not parts['ila'].requires_grad
    for how in ('bce', 'mass', 'none'):
        with_mu, _ = METHOD.loss(cfg.replace(ila=how), out, batch)
        without, _ = METHOD.loss(cfg.replace(ila=how, mu=0.), out, batch)
        assert (with_mu > without) == (how != 'none')


def test_the_mass_is_what_it_says():
    torch.manual_seed(0)
    r, target = torch.randn(2, 3, 4, 4).double(), torch.zeros(2, 1, 4, 4).double()
    target[:, :, 1:3, 1:3] = 1
    slow = 0
    for b in range(2):
        inside = [float(r[b, k].flatten().softmax(0)[target[b].flatten() > 0].sum()) for k in range(3)]
        slow -= torch.tensor(sum(inside)/3 + 1e-6).double().log()/2
    torch.testing.assert_close(attention_mass(r, target), slow, rtol=0, atol=1e-7)


@pytest.mark.parametrize('ila', ['mass', 'none'])
def test_scale_and_offset_rest_where_no_loss_reads_them(ila):
    cfg, model, features, batch = made(ila=ila)
    loss, _ = METHOD.loss(cfg, run(model, features, batch), batch)
    loss.backward()
    for step in model.steps: assert not step.scale.requires_grad and not step.offset.requires_grad
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_words_as_query_see_no_padding_and_differ_from_step_to_step():
    cfg, model, features, batch = made(query='words')
    out = run(model.eval(), features, batch)
    assert len(out.words) == 3
    for weights in out.words:
        torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
        assert (weights[1, 2:] == 0).all() and (weights[2, 1:] == 0).all()
    assert (out.words[0] - out.words[1]).abs().max() > 1e-4
    # the second step asks with what the first has read
    words, f, mask = model.language(batch['tokens'], batch['lengths'])
    x = model.trunk(*features, f)[-1]
    seen, _, first = model.steps[0](x, f, words, mask, torch.zeros(3, 16).double())
    second, unread = (model.steps[1].ask(words, mask, f, found)[1] for found in (seen.found, torch.zeros(3, 16).double()))
    torch.testing.assert_close(out.words[1], second)
    assert (second - unread).abs().max() > 1e-5
    alone = run(model, tuple(f[1:2] for f in features), dict(tokens=batch['tokens'][1:2, :2], lengths=batch['lengths'][1:2]))
    torch.testing.assert_close(alone.mask, out.mask[1:2], rtol=0, atol=1e-9)
    loss, _ = METHOD.loss(cfg, run(model.train(), features, batch), batch)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_a_query_of_words_is_the_loop():
    torch.manual_seed(0)
    ask = WordQuery(6, 4).double()
    words, f, z = torch.randn(1, 3, 6).double(), torch.randn(1, 6).double(), torch.randn(1, 4).double()
    query, weights = ask(words, torch.tensor([[True, True, False]]), f, z)
    u = ask.asked.weight@torch.cat([f[0], z[0]]) + ask.asked.bias
    a = torch.stack([(ask.words.weight@words[0, t])@u for t in range(2)]).softmax(0)
    torch.testing.assert_close(weights[0], torch.cat([a, torch.zeros(1).double()]))
    torch.testing.assert_close(query[0], a[0]*words[0, 0] + a[1]*words[0, 1])


def test_the_head_of_lts_answers_at_stride_4():
    cfg, model, features, batch = made(head='seg')
    out = run(model, features, batch)
    assert METHOD.stride(cfg) == 4 and out.mask.shape == (3, 1, 32, 32) and out.maps[-1].shape == (3, 1, 16, 16)
    loss, parts = METHOD.loss(cfg, out, batch)
    loss.backward()
    torch.testing.assert_close(parts['seg'], bce(out.mask, batch['mask']).detach())
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('change', [dict(steps=2), dict(groups=2), dict(shared=False), dict(query='words'), dict(pool='channel'), dict(norm_eps=1e-2)])
def test_every_switch_changes_the_answer(change):
    cfg, model, features, batch = made()
    _, other, *_ = made(**change)
    state, mine = model.state_dict(), other.state_dict()
    other.load_state_dict({k: v for k, v in state.items() if k in mine and v.shape == mine[k].shape}, strict=False)
    with torch.no_grad(): a, b = (run(m.eval(), features, batch).mask for m in (model, other))
    assert a.shape == b.shape and (a - b).abs().max() > 1e-7
