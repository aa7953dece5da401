"Things, the head that finds them, what is kept for all runs, and a small method that chooses."
import json, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lts_nb.errors import KitError
from lts_nb.evidence import experiments
from lts_nb.evidence.experiments import module_hashes, run_config, run_modules
from lts_nb.model.method import METHODS, register
from lts_nb.rivals import proposals
from lts_nb.rivals.proposals import (Chooser, ChooserNet, Head, HeadConfig, KeptThings, Things, annotated_things, candidates,
                                     control_count, dynamic_masks, enough, focal_loss, giou_loss, dice_loss, instance_losses, location_targets,
                                     locations, matrix_nms, no_things, pack_things, roi_crop, theta_for, winner)

SMALL = HeadConfig(**experiments.SMALL_HEAD)


class DotNet(ChooserNet):
    "The mean of a thing's window and its box, times the mean of the words."
    def __init__(self, channels, words):
        super().__init__()
        self.words, self.cell = nn.Embedding(words, 16), nn.Linear(channels[2] + 4, 16)
    def look(self, maps, things):
        seen = roi_crop(maps[2], things.boxes, 128).mean((-1, -2))
        return (self.cell(torch.cat([seen, things.boxes/128], -1)),)
    def scores(self, regions, things, tokens, lengths, inputs):
        return (regions[0]*self.words(tokens).mean(1)[:, None]).sum(-1).masked_fill(things.kinds < 0, -math.inf)


class Dot(Chooser):
    name, title, notes = 'dot', 'Dot', ('Only a test.',)
    def network(self, cfg, channels, vocab, vectors=None): return DotNet(channels, len(vocab))
    def loss(self, cfg, out, batch): return F.cross_entropy(out.scores, batch['target']), {}


@pytest.fixture
def dot(monkeypatch):
    monkeypatch.setitem(METHODS, 'dot', Dot())
    monkeypatch.setitem(experiments.EXPERIMENTS, 'dot', dict(method='dot'))


# targets

def some_things(P=2, K=4, size=128, seed=0):
    "Boxes filled with their object, the last place of the second picture padding."
    g = torch.Generator().manual_seed(seed)
    at = torch.randint(0, 20, (P, K, 2), generator=g)
    sides = torch.randint(2, 12, (P, K, 2), generator=g)
    masks = torch.zeros(P, K, size//4, size//4, dtype=torch.bool)
    for p in range(P):
        for k in range(K):
            (x, y), (w, h) = at[p, k].tolist(), sides[p, k].tolist()
            masks[p, k, y:y + h, x:x + w] = True
    boxes = 4*torch.cat([at, (at + sides).clamp_max(32)], -1).float()
    kinds = torch.randint(0, 6, (P, K), generator=g)
    kinds[1, -1] = -1
    return Things(boxes, kinds, torch.ones(P, K), masks)


def levels(size=128, n=2):
    places = [locations(size//s, size//s, s) for s in (8, 16, 32)[:n]]
    return torch.cat(places), torch.cat([torch.full((len(p),), s) for p, s in zip(places, (8, 16, 32))])


@pytest.mark.parametrize('n', [1, 2, 3])
def test_targets_are_those_of_a_double_loop(n):
    things, (places, strides) = some_things(4, 6), levels(n=n)
    t = location_targets(places, strides, things)
    for p in range(4):
        for i, ((x, y), s) in enumerate(zip(places.tolist(), strides.tolist())):
            best, area = -1, math.inf
            for k in range(6):
                mask = things.masks[p, k]
                if things.kinds[p, k] < 0 or mask.sum() < 4: continue
                ys, xs = mask.nonzero().T
                cx, cy = 4*(xs.float().mean() + .5), 4*(ys.float().mean() + .5)
                x0, y0, x1, y1 = things.boxes[p, k].tolist()
                sides = x - x0, y - y0, x1 - x, y1 - y
                if min(sides) <= 0 or max(abs(x - cx), abs(y - cy)) >= 1.5*s: continue
                if s > 8 and max(sides) <= 4*s or s < 8 << (n - 1) and max(sides) > 8*s: continue
                if (x1 - x0)*(y1 - y0) < area: best, area, own = k, (x1 - x0)*(y1 - y0), sides
            assert t.which[p, i] == best
            if best < 0: continue
            l, u, r, d = own
            wanted = math.sqrt(min(l, r)/max(l, r)*min(u, d)/max(u, d))
            assert abs(float(t.centre[p, i]) - wanted) < 1e-5 and torch.allclose(t.boxes[p, i], torch.tensor(own))


def test_of_nested_objects_the_smaller_answers():
    boxes = torch.tensor([[[0., 0, 64, 64], [20, 20, 44, 44]]])
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.bool)
    masks[0, 0, :16, :16] = masks[0, 1, 5:11, 5:11] = True
    t = location_targets(*levels(), Things(boxes, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), masks))
    places = levels()[0]
    inside = ((places > 20) & (places < 44)).all(1) & (t.which[0] >= 0)
    assert inside.any() and (t.which[0][inside] == 1).all()


def test_nothing_is_asked_within_a_crowd():
    things, (places, strides) = some_things(), levels()
    crowd = torch.ones(2, 32, 32, dtype=torch.bool)
    plain, ignoring = (location_targets(places, strides, things, ignored=c) for c in (None, crowd))
    assert ((plain.which == -1) == (ignoring.which == -2)).all() and not (ignoring.which == -1).any()
    out = made_up_answers(2)
    quiet = instance_losses(out, things, crowd)
    out.logits[ignoring.which == -2] = 20.
    assert torch.equal(instance_losses(out, things, crowd)['class'], quiet['class'])
    assert instance_losses(out, things)['class'] > 10*quiet['class']


# losses, masks, suppression

def made_up_answers(P, seed=0):
    torch.manual_seed(seed)
    head = Head(SMALL, (256, 128, 64), 6).eval()
    maps = [torch.randn(P, c, s, s) for c, s in ((256, 4), (128, 8), (64, 16))]
    with torch.no_grad(): return head(maps)


def test_losses_of_a_perfect_answer_are_next_to_nothing():
    truth = torch.tensor([[3., 4, 5, 6]])
    assert giou_loss(truth, truth) == 0 and giou_loss(torch.tensor([[1., 1, 1, 1]]), truth) > .8
    q = torch.zeros(1, 8, 8); q[0, :4] = 1
    assert dice_loss(40*(q - .5), q) < 1e-4 and dice_loss(-40*(q - .5), q) > .99
    z = torch.tensor([4., -4.])
    assert focal_loss(z, torch.tensor([1., 0.])).sum() < 1e-4 < .1 < focal_loss(z, torch.tensor([0., 1.])).sum()


def test_every_weight_of_the_head_gets_a_gradient():
    torch.manual_seed(0)
    head = Head(SMALL, (256, 128, 64), 6).train()
    maps = [torch.randn(8, c, s, s) for c, s in ((256, 4), (128, 8), (64, 16))]
    sum(instance_losses(head(maps), some_things(8, 4)).values()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_a_dynamic_mask_head_is_three_linear_layers():
    torch.manual_seed(0)
    features, controls = torch.randn(2, 8, 6, 6), torch.randn(3, control_count(8, 8))
    picture, places, strides = torch.tensor([0, 1, 1]), torch.tensor([[12., 20], [4, 4], [40, 24]]), torch.tensor([8, 16, 8])
    got = dynamic_masks(features, controls, picture, places, strides)
    assert controls.shape[1] == 169
    for m in range(3):
        w, at = controls[m], 0
        layers = []
        for i, o in ((10, 8), (8, 8), (8, 1)):
            layers.append((w[at:at + i*o].view(o, i), w[at + i*o:at + i*o + o]))
            at += i*o + o
        cells = torch.zeros(6, 6)
        for r in range(6):
            for c in range(6):
                way = (places[m] - torch.tensor([8*c + 4., 8*r + 4.]))/(8*strides[m])
                x = torch.cat([features[picture[m], :, r, c], way])
                for k, (weight, bias) in enumerate(layers):
                    x = F.linear(x, weight, bias)
                    if k < 2: x = x.relu()
                cells[r, c] = x
        torch.testing.assert_close(got[m], F.interpolate(cells[None, None], scale_factor=2, mode='bilinear')[0, 0], rtol=1e-4, atol=1e-4)


def test_enlarged_masks_stay_where_they_were():
    coarse = locations(16, 16, 8).T.view(2, 16, 16)
    fine = F.interpolate(coarse[None], scale_factor=2, mode='bilinear')[0]
    wanted = locations(32, 32, 4).T.view(2, 32, 32)
    assert torch.equal(fine[:, 1:-1, 1:-1], wanted[:, 1:-1, 1:-1])


def literal_nms(masks, kinds, scores):
    def iou(a, b): return float((a & b).sum()/max(1, (a | b).sum()))
    def pair(i, j): return iou(masks[i], masks[j]) if kinds[i] == kinds[j] else 0.
    f = lambda u: math.exp(-2*u*u)
    out = []
    for j in range(len(masks)):
        decay = 1.
        for i in range(j):
            own = max([pair(k, i) for k in range(i)], default=0.)
            decay = min(decay, f(pair(i, j))/f(own))
        out.append(float(scores[j])*decay)
    return torch.tensor(out)


def test_matrix_nms_is_the_loop_over_pairs():
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(12, 40, generator=g) > .5
    kinds = torch.randint(0, 2, (12,), generator=g)
    scores = torch.rand(12, generator=g).sort(descending=True).values
    torch.testing.assert_close(matrix_nms(masks, kinds, scores), literal_nms(masks, kinds, scores))
    same, other = torch.ones(2, 9, dtype=torch.bool), torch.tensor([0, 1])
    torch.testing.assert_close(matrix_nms(same, torch.zeros(2), torch.tensor([.9, .8])), torch.tensor([.9, .8*math.exp(-2)]))
    torch.testing.assert_close(matrix_nms(same, other, torch.tensor([.9, .8])), torch.tensor([.9, .8]))
    # a chain: the third overlaps the second alone, which the first has suppressed
    chain = torch.zeros(3, 30, dtype=torch.bool)
    chain[0, :10] = chain[1, 2:12] = chain[2, 10:20] = True
    alone = matrix_nms(chain[1:], torch.zeros(2), torch.tensor([.8, .7]))[1]
    assert matrix_nms(chain, torch.zeros(3), torch.tensor([.9, .8, .7]))[2] > alone


# windows

def test_windows_show_their_places():
    x = (torch.arange(16) + .5)*8
    places = torch.stack(torch.meshgrid(x, x, indexing='xy'))[None].repeat(2, 1, 1, 1)
    boxes = torch.tensor([[[20., 30, 90, 65], [8, 8, 120, 120]]]).repeat(2, 1, 1)
    seen = roi_crop(places, boxes, 128)
    assert seen.shape == (2, 2, 2, 7, 7)
    torch.testing.assert_close(seen[1, 0, 0, 3], 20 + 10*(torch.arange(7) + .5))
    torch.testing.assert_close(seen[1, 1, 1, :, 2], 8 + 16*(torch.arange(7) + .5))


def test_a_window_over_the_whole_map_is_its_mean_and_borders_are_nothing():
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(1, 3, 3, 3), size=(14, 14), mode='bilinear')
    seen = roi_crop(smooth, torch.tensor([[[0., 0, 112, 112]]]), 112)
    torch.testing.assert_close(seen[0, 0], F.adaptive_avg_pool2d(smooth, 7)[0], rtol=0, atol=1e-5)
    assert roi_crop(smooth, torch.tensor([[[300., 300, 400, 400]]]), 112).abs().max() == 0


# things on disk, choosing

def test_things_come_back_from_disk_as_they_went():
    g = torch.Generator().manual_seed(0)
    def thing(): return np.arange(4.), 2, .5, (torch.rand(8, 8, generator=g) > .5).numpy()
    pictures = {7: [thing(), thing()], 3: [], 5: [thing()]}
    kept = KeptThings(pack_things(pictures), 32)
    got = kept([5, 3, 7, 99])
    assert got.boxes.shape == (4, 2, 4) and got.kinds.tolist() == [[2, -1], [-1, -1], [2, 2], [-1, -1]]
    assert (got.masks[2, 1].numpy() == pictures[7][1][3]).all() and not got.masks[1].any()
    for name, wrong in dict(first=np.array([0, 1]), masks=np.zeros((3, 5), np.uint8), scores=np.full(3, np.nan, np.float32),
                            boxes=np.zeros((2, 4), np.float32)).items():
        with pytest.raises(KitError, match='Delete the folder'): KeptThings(pack_things(pictures) | {name: wrong}, 32)


def test_theta_falls_until_a_candidate_remains():
    assert [enough(np.array([.9, .7, .2]), t) for t in (.95, .7, .1)] == [1, 2, 3] and enough(np.array([]), .5) == 0
    assert .3 < theta_for([np.array([.9, .8, .3]), np.array([.7, .6, .1])], 2) <= .6


def test_the_winner_is_no_padding():
    masks = torch.zeros(3, 2, 4, 4, dtype=torch.bool); masks[:, 1] = True
    scores = torch.tensor([[1., 2], [2, 1], [-math.inf, -math.inf]])
    assert winner(scores, masks).flatten(1).sum(1).tolist() == [16, 0, 0]


def test_candidates_are_sorted_and_tight():
    for boxes, kinds, scores, masks in candidates(made_up_answers(3)):
        assert (scores.diff() <= 0).all() and len(scores) == len(boxes)
        for box, mask in zip(boxes, masks):
            ys, xs = mask.nonzero().T
            assert box.tolist() == [4*xs.min(), 4*ys.min(), 4*xs.max() + 4, 4*ys.max() + 4]


# a run that chooses, from data to result

def test_a_run_that_chooses(dot, tmp_path):
    from lts_nb.data.dataset import Samples
    from lts_nb.training.opening import ensure_backbone, ensure_data
    from lts_nb.training.run import prepare, score_run, write_result
    from lts_nb.training.train import train_model
    config = run_config('dot', 'refcoco', 'smoke').replace(splits=('val', 'testA'))
    assert config.head and type(config).read(json.loads(json.dumps(config.plain())), 'x') == config
    assert 'head' not in run_config('lts', 'refcoco', 'smoke').plain()
    ensure_data(config, tmp_path/'data'), ensure_backbone(config, tmp_path/'data', tmp_path)
    run = prepare(config, tmp_path/'data', tmp_path)
    # things of a batch: as many rows as pictures, in the order of `objects_of`
    samples = run.samples('train')
    image = samples.rows[0][0].image_id
    things = Things(*run.source([image])[7:])
    known = samples.objects_of(image)
    assert (things.kinds[0] >= 0).sum() == len(known)
    assert all((things.masks[0, k].numpy() == samples.grid(a, 4)).all() for k, a in enumerate(known))
    # every picture has a candidate
    detected = Things(*run.source(sorted({r.image_id for r in run.refer.refs.values()}))[3:7])
    assert (detected.kinds[:, 0] >= 0).all()
    history = train_model(run.model, samples, run.source, config, run.acc, run.checkpoint)
    scored = score_run(run)
    result = write_result(run, history, scored, {})
    assert set(result['things']) >= {'head', 'theta'} and 'truth' in result['finishes']
    assert set(result['choices']['val']) == {'oracle', 'random', 'confident', 'recall'}
    with np.load(run.folder/'samples-val.npz') as kept: assert {'oracle_i', 'best', 'truth_i', 'candidates'} <= set(kept.files)
    from lts_nb.evidence.tables import load_results, settings_frame
    table = settings_frame(load_results(tmp_path))
    assert list(table.split) == list(config.splits) and (table.oracle >= table.detected).all() and table.truth.notna().all()
    # live features give the same scores
    live = config.replace(compute=config.compute.replace(cache_gb=0), run='dot-live')
    again = prepare(live, tmp_path/'data', tmp_path)
    again.model.load_state_dict(run.model.state_dict())
    assert score_run(again).metrics == scored.metrics


def test_only_runs_that_choose_depend_on_the_candidates(dot):
    assert 'training.candidates' in run_modules('dot') and 'training.candidates' not in run_modules('lts')
    assert 'rivals.proposals' not in run_modules('lts')


def test_what_candidates_allow_is_counted_by_sentence(dot, tmp_path):
    from lts_nb.data.dataset import Samples
    from lts_nb.data.refer import Refer
    from lts_nb.data.shapes import Recipe, make_family
    from lts_nb.data.text import build_vocab
    from lts_nb.training.candidates import choice_metrics, choice_scores
    make_family(tmp_path, Recipe(seed=5, train=16, val=4, testA=2, testB=2))
    refer = Refer(tmp_path, 'refshapes')
    samples = Samples(refer, 'val', build_vocab(refer), size=128)
    known = annotated_things(refer, sorted(refer.images), 128)
    found = choice_scores(samples, KeptThings(known, 128))
    area = np.array([refer.mask(ref.ann_id).mean() for ref, _ in samples.rows])
    told = choice_metrics(found, area)
    # true masks are the best candidates, and chance finds less
    assert told['recall']['recall@0.5'] == 100 and told['oracle']['oIoU'] > 85 > told['random']['oIoU']
    assert (found['oracle_i'] >= found['random_i']).all() or (found['best'] > .6).all()
    assert told['recall']['candidates'] == pytest.approx(np.mean([len(samples.objects_of(r.image_id)) for r, _ in samples.rows]))
    # without its object the oracle fails
    ref = samples.rows[0][0]
    line = KeptThings(known, 128).lines(ref.image_id).start + samples.objects_of(ref.image_id).index(ref.ann_id)
    masks = known['masks'].copy(); masks[line] = 0
    less = choice_scores(samples, KeptThings(known | {'masks': masks}, 128))
    assert less['best'][0] < .5 < found['best'][0]


def test_a_killed_training_of_the_head_goes_on_with_the_same_weights(tmp_path):
    from lts_nb.training.candidates import CandidatesConfig, train_head
    ids = list(range(12))
    things = some_things(12, 3, seed=3)
    table = pack_things({i: [(things.boxes[i, k].numpy(), int(things.kinds[i, k]) % 6, 1., things.masks[i, k].numpy()) for k in range(3)] for i in ids})
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(12, c, s, s, generator=g) for c, s in ((8, 4), (8, 8), (8, 16))]
    cfg = CandidatesConfig(head=HeadConfig(width=8, levels=2, depth=1, shared=True, mask_depth=1), images=48, batch=6, epochs=3, decay=2)
    def trained(checkpoint, dies_at=None):
        calls = []
        def source(some):
            calls.append(some)
            if len(calls) == dies_at: raise KeyboardInterrupt
            return tuple(m[some] for m in maps)
        torch.manual_seed(1)
        head = Head(cfg.head, (8, 8, 8), 6)
        train_head(head, ids, source, KeptThings(table, 128), cfg, checkpoint=checkpoint)
        return head.state_dict()
    whole = trained(tmp_path/'a.pt')
    with pytest.raises(KeyboardInterrupt): trained(tmp_path/'b.pt', dies_at=4)
    rest = trained(tmp_path/'b.pt')
    assert all(torch.equal(whole[k], rest[k]) for k in whole)


def test_other_versions_of_the_code_find_new_candidates(dot, tmp_path):
    from lts_nb.training.candidates import ensure_things
    from lts_nb.training.opening import ensure_backbone, ensure_data
    config = run_config('dot', 'refcoco', 'smoke')
    ensure_data(config, tmp_path/'data'), ensure_backbone(config, tmp_path/'data', tmp_path)
    def made(version):
        shared = ensure_things(config, tmp_path/'data', tmp_path, {'rivals.proposals': version})
        return shared, shared.weights.stat().st_mtime_ns, shared.weights.read_bytes()
    (shared, first, content), (_, second, _), (_, third, again) = made('one'), made('one'), made('two')
    assert first == second < third and content == again
    assert shared.stand() and ensure_things(run_config('lts', 'refcoco', 'smoke'), tmp_path/'data', tmp_path) is None


def test_the_plan_names_the_step_and_a_head_is_shared_by_all_sets_and_seeds(dot, tmp_path):
    from lts_nb.manual import batch
    runs = [run_config('dot', d, 'smoke', s) for d in ('refcoco', 'refcoco+') for s in (0, 1)]
    runs.append(run_config('lts', 'refcoco', 'smoke'))
    plan = batch.make_plan(runs, ['1'], 2, tmp_path, tmp_path/'data')
    (step, told), = plan['things'].items()
    assert told['runs'] == [r.run for r in runs[:4]] and told['threads'] == 1
    assert batch.things_step(runs[0]) == step and batch.things_step(runs[-1]) is None
    assert 'training.candidates' in plan['modules']['things'] and 'rivals.proposals' in plan['modules']['things']
