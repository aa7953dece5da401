"Planned looks: the error of repeated looks, intervals that belong to a look, and a suite that spends seeds on open claims only."
import functools
import json
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import ROOT
from lts_nb.errors import KitError
from lts_nb.evidence import claims, looks, report
from lts_nb.evidence.experiments import method_hashes, run_config, runs_for
from lts_nb.evidence.looks import LEVELS, LOOKS
from lts_nb.evidence.tables import bootstrap_interval, load_results
from lts_nb.manual import batch, until
from test_tables import fake_run

sys.path.insert(0, str(ROOT/'tools'))


# the statistic

def test_all_looks_together_err_as_rarely_as_they_say():
    t = np.abs(looks.null_walks(400_000, seed=7))
    for alpha in LEVELS:
        critical = [looks.critical_t(k, alpha) for k in range(1, 7)]
        assert (t > critical).any(1).mean() == pytest.approx(alpha, rel=.06, abs=1.5e-4), alpha
    naive = stats.t.isf(.025, np.array(LOOKS) - 1)
    assert .18 < (t > naive).any(1).mean() < .21, 'what the kit does not do'


def test_walks_are_what_single_seeds_give():
    "The short cut over means and squares draws the same t as seed by seed."
    d = np.random.default_rng(0).standard_normal((40_000, LOOKS[-1]))
    t = looks.null_walks(40_000, 1)
    for k, n in enumerate(LOOKS):
        slow = d[:, :n].mean(1)/d[:, :n].std(1, ddof=1)*np.sqrt(n)
        assert stats.ks_2samp(slow, t[:, k]).pvalue > .001
    both = [np.corrcoef(np.arctan(x), rowvar=False)[0, 1] for x in (t[:, [3, 4]], np.stack([
        d[:, :n].mean(1)/d[:, :n].std(1, ddof=1)*np.sqrt(n) for n in LOOKS[3:5]], 1))]
    assert both[0] == pytest.approx(both[1], abs=.02)


def test_a_smaller_error_is_stricter_at_every_look():
    alphas = np.geomspace(.0005, .05, 60)
    for k in range(1, 7): assert (np.diff(looks.critical_t(k, alphas)) < 0).all()


def test_p_is_where_the_interval_touches_the_border():
    for look in range(1, 7):
        low, high = looks.look_interval(1., .2, look, .3, .4)
        p = looks.p_of(1. - low + 1e-9, .2, look, .3)
        assert p == pytest.approx(.05, rel=.03), 'a border at the end of the interval'
        assert looks.p_of((1. - low)*.99, .2, look, .3) == 1
        assert looks.p_of(50., .2, look, .3) == pytest.approx(.0005)


def test_holm_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(8)*.03
        holds = looks.holm(p)
        order, m = np.argsort(p), 8
        first = next((j for j in range(m) if p[order[j]] > .05/(m - j)), m)
        assert set(np.flatnonzero(holds)) == set(order[:first])
    assert looks.holm([]).tolist() == []


# the claims

def test_the_interval_over_images_is_that_of_image_rows():
    "Counting how often an image was drawn gives what drawing its row gives."
    rng = np.random.default_rng(0)
    pairs = list(claims.simulate_suite(rng, [2.], seeds=5, images=80)[0].values())
    def slow(rows, n): return np.mean([claims._value(a[rows], 'oIoU') - claims._value(b[rows], 'oIoU') for a, b in pairs[:n]], 0)[..., None]
    lows, highs = claims.image_interval(pairs, draws=300, at=(3, 5), level=.97)
    for k, n in enumerate((3, 5)):
        low, high = bootstrap_interval(lambda rows: slow(rows, n), 80, 300, level=.97)
        assert (lows[k], highs[k]) == pytest.approx((low[0], high[0]))
    values = [(a, 80.) for a, _ in pairs]
    assert claims.image_interval(values, draws=100)[1] == pytest.approx(claims.image_interval([(a, 0.) for a, _ in pairs], draws=100)[1] - 80)


def test_the_fourth_verdict():
    assert claims.verdict('greater', -.9, .9) == claims.NO_DIFFERENCE == claims.verdict('rising', -.9, .9)
    assert claims.verdict('greater', -1.1, .9) == claims.verdict('greater', -.9, 1.) == 'inconclusive'
    for test in ('comparable', 'no better', 'at least'): assert claims.verdict(test, -.9, .9) == 'reproduced'
    assert claims.verdict('greater', np.nan, np.nan) == 'inconclusive'


def test_a_thousand_suites_are_committed_and_keep_the_promise():
    f = pd.read_csv(ROOT/'reports'/'looks'/'suites.csv')
    ours, naive = f[f.rule == 'looks'], f[f.rule == 'naive']
    assert f.suites.min() >= 1000 and set(f.rule) == set(claims.RULES)
    assert ours.held.min() >= 95 and ours.wrong.max() <= 5
    assert naive.held.min() < 90 and naive.wrong.max() > 10


def test_suites_again(monkeypatch):
    "A hundred suites of today's code say what the committed thousand say."
    import looks as tool
    known = pd.read_csv(ROOT/'reports'/'looks'/'suites.csv').query("rule == 'looks'").set_index('effect')
    said = []
    for seed in range(60):
        for effect, pairs in zip((0., 2.5), claims.simulate_suite(np.random.default_rng(seed), (0., 2.5))):
            said.append(dict(effect=effect) | claims.follow(pairs, 'looks', 100))
    made = tool.summary(pd.DataFrame(said)).set_index('effect')
    assert (made.held >= 90).all() and made.seeds[2.5] == pytest.approx(known.seeds[2.5], abs=1.2)
    assert made.reproduced[2.5] == 100 and made['no difference'][0.] == pytest.approx(known['no difference'][0.], abs=12)


def test_a_summary_counts_what_was_said():
    import looks as tool
    lines = pd.DataFrame([(0., 'reproduced', .1, 2., 3), (0., claims.NO_DIFFERENCE, -.5, .5, 21), (1., claims.NO_DIFFERENCE, -.5, .9, 34), (1., 'inconclusive', -.2, 3., 34)],
                         columns=['effect', 'verdict', 'low', 'high', 'seeds'])
    f = tool.summary(lines).set_index('effect')
    assert f.held.tolist() == [50, 50] and f.wrong.tolist() == [50, 50] and f.open.tolist() == [0, 50]
    assert f.seeds.tolist() == [12, 34] and f.suites.tolist() == [2, 2]


# a suite in looks, with made-up runs

@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    "Sixty images need no two thousand draws of the bootstrap."
    monkeypatch.setattr(until, 'effects_frame', lambda *of, **named: claims.effects_frame(*of, draws=100, **named))

GAINS = {'lts': .0, 'fusion-filter-seg': .0, 'fusion-filter': -.2, 'fusion': -.4, 'filter': -.4, 'fusion-seg': -.2, 'filter-seg': -.2}


@functools.cache
def hashes(method): return method_hashes([SimpleNamespace(method=method)])[method]


def scored_run(out, config, gains=GAINS, sd=.03):
    "A finished run whose sentences score by its experiment's gain and its seed's luck."
    folder = out/'runs'/config.run
    if folder.exists(): return
    fake_run(out, config)
    rng = np.random.default_rng([config.seed, sum(map(ord, config.experiment))])
    iou = .6 + gains.get(config.experiment, 0.) + sd*rng.standard_normal() + .02*rng.standard_normal(60)
    for path in folder.glob('samples-*.npz'):
        z = dict(np.load(path))
        z |= dict(union=np.full(60, 10_000), intersection=(10_000*np.clip(iou, 0, 1)).astype(int), image_id=np.arange(60))
        np.savez(path, **z)
    result = json.loads((folder/'result.json').read_text())
    result['code']['modules'] = hashes(config.method)
    (folder/'result.json').write_text(json.dumps(result))


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Table 2 of the smoke preset after its first look: large effects, and one of nothing."
    out = tmp_path_factory.mktemp('looks')
    for config in runs_for('smoke', ['2'], 3): scored_run(out, config)
    (out/'looks.json').write_text('{}')
    return out


def ran(look): return {(r.experiment, r.seed) for r in look.todo}


def test_only_open_claims_go_on_with_their_controls(three):
    look = until.next_look('smoke', ['2'], three)
    verdicts = look.claims.set_index('claim').verdict
    still = set(verdicts.index[verdicts == 'inconclusive'])
    assert look.number == 2 and 'L_loc helps' in still and verdicts['Seg helps Fusion'] == 'reproduced'
    behind = until.runs_behind('smoke', ['2'])
    needed = {e for claim in still for e, _ in behind[claim, 'refshapes']}
    assert ran(look) == {(e, s) for e in needed for s in (3, 4)} and 'blind' in needed
    assert len({r.run for r in look.runs}) == len(look.runs), 'shared rows once'
    assert needed < {r.experiment for r in look.runs}, 'some rows have done their duty'


def test_looks_go_on_where_they_were_stopped_and_end(three, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(three, out)
    seen = []
    for _ in range(30):
        look = until.next_look('smoke', ['2'], out, most=8)
        if not look.todo: break
        seen.append((look.number, len(look.todo)))
        half = len(look.todo)//2 + 1
        for r in look.todo[:half]: scored_run(out, r)  # then Ctrl-C
    numbers = [n for n, _ in seen]
    assert numbers == sorted(numbers) and set(numbers) == {2, 3}
    assert all(b[1] == a[1] - a[1]//2 - 1 for a, b in zip(seen, seen[1:]) if a[0] == b[0])
    seeds = {r['seed'] for r in load_results(out)}
    assert max(seeds) == 7, 'never more than --max-seeds'
    # a result that is lost is the next thing to be made
    shutil.rmtree(out/'runs'/'lts-refshapes-smoke-s4')
    assert ran(until.next_look('smoke', ['2'], out, most=8)) == {('lts', 4)}


def test_a_claim_stays_decided_whatever_other_claims_bring(three, tmp_path):
    "More seeds of its rows do not change the look at which a claim was decided."
    out = tmp_path/'out'
    shutil.copytree(three, out)
    before, _ = until.judge('smoke', ['2'], out)
    for config in runs_for('smoke', ['2'], 8): scored_run(out, config)
    after, effects = until.judge('smoke', ['2'], out)
    decided = before.verdict != 'inconclusive'
    same = ['claim', 'effect', 'low', 'high', 'seeds', 'look', 'verdict']
    pd.testing.assert_frame_equal(before[decided][same], after[decided][same])
    assert set(effects['look']) == {1, 2, 3} and (after.look[~decided] > 1).all()


def test_a_failed_run_stops_its_claims_alone(three, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(three, out)
    look = until.next_look('smoke', ['2'], out)
    lost = 'fusion-filter-seg-refshapes-smoke-s4'
    assert lost in {r.run for r in look.todo}
    for r in look.todo:
        if r.run != lost: scored_run(out, r)
    after = until.next_look('smoke', ['2'], out, given_up=[lost])
    assert 'fusion-filter-seg' not in {e for e, _ in ran(after)}


def test_the_report_shows_seeds_looks_and_correction(three, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(three, out)
    for r in until.next_look('smoke', ['2'], out).todo: scored_run(out, r)
    made = report.write_report(out, 'smoke', ['2'])
    f = pd.read_csv(out/'claims.csv', keep_default_na=False).query("dataset == 'refshapes' and verdict != 'not tested'")
    assert set(f.seeds.astype(float)) == {3, 5} and set(f['look'].astype(float)) == {1, 2}
    assert set(f['holds after correction']) <= {'yes', 'no'} and f.p.astype(float).between(0, 1).all()
    page = (out/'index.html').read_text()
    assert 'holds after correction' in page and 'The chance that any of the looks gives a claim a wrong verdict is 5 %' in page and 'look 2 of 6' in page
    assert made['missing'] == [], 'rows that needed fewer seeds lack nothing'
    assert pd.read_csv(out/'effects.csv').groupby(['claim', 'step', 'split'])['look'].apply(list).map(lambda v: v == list(range(1, len(v) + 1))).all()


def test_the_readmes_table_tells_seeds_and_looks(three, tmp_path):
    report.write_report(three, 'smoke', ['2'])
    index = json.loads((ROOT/'nbs'/'index.ipynb').read_text())
    cells = [''.join(c['source']) for c in index['cells'] if c['cell_type'] == 'code']
    code = [c for c in cells if 'def verdicts(' in c or 'def told(' in c]
    scope = dict(pd=pd, cpu=three, CLAIMS=claims.CLAIMS, NO_DIFFERENCE=claims.NO_DIFFERENCE, Markdown=str)
    for c in code: exec(c, scope)
    table = scope['verdicts']()
    assert '| seeds (looks) |' in table.splitlines()[0]
    assert re.search(r'\| Seg helps Fusion \|.*\| 3 \(1\) \|', table), table
    widths = {line.count('|') for line in table.splitlines() if line.startswith('|')}
    assert widths == {6}


def test_before_the_first_look_nothing_is_said(tmp_path):
    for config in runs_for('smoke', ['2'], 2): scored_run(tmp_path, config)
    made, _ = until.judge('smoke', ['2'], tmp_path)
    assert (made.verdict == 'inconclusive').all() and made.low.isna().all() and (made['look'] == 0).all()
    assert made.why.str.contains('2 of the 3 seeds of the first look').all()


def test_a_report_of_fixed_seeds_is_as_it_was(three, tmp_path):
    "Without planned looks the interval is the envelope, and no look is spoken of."
    out = tmp_path/'out'
    shutil.copytree(three, out)
    (out/'looks.json').unlink()
    report.write_report(out, 'smoke', ['2'])
    f = pd.read_csv(out/'claims.csv').query("dataset == 'refshapes' and verdict != 'not tested'")
    assert (f['look'] == 0).all() and 'Looks were planned' not in (out/'index.html').read_text()
    e = pd.read_csv(out/'effects.csv')
    assert (e.low == e[['image_low', 'seed_low']].min(axis=1)).all()


# the command

@pytest.fixture
def quick(monkeypatch):
    "`lts reproduce --until-decided` with runs that are made up instead of trained."
    asked = []
    def bring_up(runs, wanted, seeds, out, root, cores, place, end, order, warm):
        asked.append(order)
        assert warm is not None, 'runs would start cold'
        if end is not None and time.time() > end: return batch.Brought({}, [], None, True)
        for r in runs: scored_run(out, r)
        return batch.Brought(dict(preset='smoke', wanted={'tables': ['2']}), [], None, False)
    monkeypatch.setattr(until, 'bring_up', bring_up)
    monkeypatch.setattr(until, 'make_report', lambda *of: '')
    monkeypatch.setattr(until, 'say_where', lambda *of: None)
    bring_up.orders = asked
    return bring_up


def test_the_command_ends_when_all_is_decided_or_the_seeds_are_used_up(quick, tmp_path, capsys):
    assert until.reproduce_until_decided('smoke', ['2'], 13, out=tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in said if line.startswith('Look')] == ['Look 1', 'Look 2', 'Look 3', 'Look 4', 'Looks '], said
    assert 'nothing to do' in said[-2] or 'stayed open' in said[-1]
    per_row = pd.Series([r['experiment'] for r in load_results(tmp_path)]).value_counts()
    assert per_row['fusion'] == 3 and per_row['lts'] == 13 == per_row['fusion-filter-seg'] == per_row['blind']
    assert (tmp_path/'looks.json').exists()
    # the second time there is nothing left
    until.reproduce_until_decided('smoke', ['2'], 13, out=tmp_path)
    assert 'nothing to do' in capsys.readouterr().out.splitlines()[0]


def test_hours_that_are_used_up_leave_the_verdicts(quick, three, tmp_path, capsys):
    out = tmp_path/'out'
    shutil.copytree(three, out)
    assert until.reproduce_until_decided('smoke', ['2'], hours=1e-9, out=out) == 0
    said = capsys.readouterr().out
    assert 'The hours are used up at look 2 (5 seeds)' in said and 'verdicts so far stand' in said


def test_few_hours_go_where_they_decide_most(quick, three, tmp_path, capsys):
    out = tmp_path/'out'
    shutil.copytree(three, out)
    until.reproduce_until_decided('smoke', ['2'], 5, hours=1, out=out)
    look2 = quick.orders[0]
    assert look2 and len(set(look2)) == len(look2) and not [run for run in look2 if run.startswith('blind')]
    # at the first look all claims promise the same, and no control decides one
    shutil.rmtree(out)
    quick.orders.clear()
    until.reproduce_until_decided('smoke', ['2'], 3, hours=1, out=out)
    first = quick.orders[0]
    assert first and not [run for run in first if run.startswith('blind')]
    # without a limit all runs are done, and the longest go first
    shutil.rmtree(out)
    shutil.copytree(three, out)
    quick.orders.clear()
    until.reproduce_until_decided('smoke', ['2'], 5, out=out)
    assert quick.orders and set(quick.orders) == {None}


def made_up_look(*rows):
    "Runs of some rows, one seed each, and how long they take."
    todo = [run_config(row, 'refshapes', 'cpu', 5) for row, _ in rows]
    return todo, {r.run: s for r, (_, s) in zip(todo, rows)}


def test_the_claim_that_promises_most_for_its_time_comes_first():
    behind = {('a', 'refshapes'): [('lts', 'refshapes'), ('lts-star', 'refshapes'), ('blind', 'refshapes')],
              ('b', 'refshapes'): [('lts', 'refshapes'), ('fusion', 'refshapes'), ('blind', 'refshapes')],
              ('c', 'refshapes'): [('lts-star', 'refshapes'), ('filter', 'refshapes')]}
    todo, seconds = made_up_look(('lts', 60), ('lts-star', 400), ('fusion', 30), ('filter', 30), ('blind', 50))
    def order(**hopes): return [run.split('-refshapes')[0] for run in until.promising({(k, 'refshapes'): v for k, v in hopes.items()}, behind, todo, seconds)]
    # b has the same promise for a fifth of the time; then a lacks lts-star only, which makes c cheap
    assert order(a=1., b=1., c=.5) == ['lts', 'fusion', 'lts-star', 'filter']
    # eight times the promise is worth five times the time
    assert order(a=8., b=1., c=.5) == ['lts', 'lts-star', 'fusion', 'filter']
    assert order(b=.5) == ['lts', 'fusion'] and order() == []
    # times that nobody knows are the usual one, and a row that is done costs nothing
    assert until.promising({('b', 'refshapes'): 1., ('c', 'refshapes'): .1}, behind, todo[2:], dict.fromkeys(seconds)) == [todo[2].run, todo[3].run]


def test_no_hours_at_all_are_not_endless(quick, tmp_path, capsys):
    until.reproduce_until_decided('smoke', ['2'], hours=0, out=tmp_path)
    assert 'The hours are used up at look 1' in capsys.readouterr().out


def test_a_run_that_failed_is_not_tried_at_every_look(quick, tmp_path, monkeypatch):
    tried = []
    def bring_up(runs, *rest):
        tried.append({r.run for r in runs})
        bad = [r.run for r in runs if r.experiment == 'fusion' and r.seed == 0]
        made = quick([r for r in runs if r.run not in bad], *rest)
        return made._replace(failed=bad)
    monkeypatch.setattr(until, 'bring_up', bring_up)
    assert until.reproduce_until_decided('smoke', ['2'], 5, out=tmp_path) == 1
    assert len(tried) > 1
    assert ['fusion-refshapes-smoke-s0' in runs for runs in tried] == [True, *[False]*(len(tried) - 1)]


def test_the_time_is_up_within_a_look():
    class Process:
        def poll(self): return None
    with pytest.raises(batch.TimeIsUp): batch._watch(Process(), {}, time.time(), ROOT/'nowhere', {}, 1, time.time() - 1)


def test_the_plan_says_what_a_look_costs_and_promises(three):
    said = until.describe_looks('smoke', ['2'], cores=2, out=three, root=three)
    first, *lines = said.splitlines()
    assert re.match(r'Look 2 of 6, after 5 seeds: \d+ of 8 claims open, \d+ runs to do; about .* left', first), first
    assert any(re.match(r' *\d+%  L_loc helps \(refshapes val\): −?\d', line) for line in lines), said
    assert re.search(r'this look decides about \d+\.\d of these \d+\.', said) and said.splitlines()[-1].startswith('So far: ')
    chance = until.chances(until.next_look('smoke', ['2'], three)).chance
    assert chance.between(0, 1).all() and chance.is_monotonic_decreasing


def test_options_that_contradict_each_other_are_sentences():
    from typer.testing import CliRunner
    from lts_nb.manual.cli import app
    for words in (['plan', '--until-decided', '--seeds', '3'], ['reproduce', '--hours', '2'], ['plan', '--preset', 'smoke', '--until-decided', '--max-seeds', '2'],
                  ['reproduce', '--max-seeds', '5'], ['plan', '--max-seeds', '5'], ['plan', '--until-decided', '--gpus', '4']):
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, KitError), (words, result.output)


# beyond seeds

def test_variance_split_finds_what_was_put_in():
    from lts_nb.evidence.beyond import variance_split
    rng = np.random.default_rng(3)
    b, d, s = 200, 200, 3
    y = .5 + 2*rng.standard_normal((b, 1, 1)) + rng.standard_normal((1, d, 1)) + .7*rng.standard_normal((b, d, 1)) + .4*rng.standard_normal((b, d, s))
    index = pd.MultiIndex.from_product([range(b), range(d), range(s)], names=['backbone', 'data', 'seed'])
    frame = pd.Series(y.ravel(), index, name='effect').reset_index()
    split = variance_split(frame)
    assert split['mean'] == pytest.approx(y.mean())
    for name, sd in dict(backbone=2, data=1, both=.7, seed=.4).items(): assert split[name] == pytest.approx(sd, rel=.15), name
    same = variance_split(frame[frame.seed < 2].assign(effect=1.))
    assert [round(v, 9) for v in same.values()] == [1, 0, 0, 0, 0]
    with pytest.raises(KitError, match='holes'): variance_split(frame.iloc[1:])


def test_beyond_goes_through_the_grid(monkeypatch, tmp_path, capsys):
    "Two backbones, two data sets, two seeds, with runs that are made up: one effect depends on the backbone, one on nothing."
    made = []
    def bring_up(runs, wanted, seeds, out, root, cores, place, warm):
        made.append((out.name, root.name, sorted(p.name for p in (root/'backbones').iterdir())))
        for r in runs:
            b = int(r.preset.partition('-b')[2][0])
            scored_run(out, r, {'fusion-filter-seg': -.1 - .1*b, 'filter-seg': -.3 - .1*b}, 1e-9)
        return batch.Brought({}, [], None, False)
    weights = tmp_path/'w'
    weights.touch()
    monkeypatch.setattr(until, 'bring_up', bring_up)
    monkeypatch.setattr(until, 'backbone_of', lambda *of: weights)
    frame = until.beyond('smoke', (0, 1), (4, 5), 2, ['L_loc helps', 'Fusion helps, with Seg'], out=tmp_path/'out', root=tmp_path/'data')
    assert [m[:2] for m in made] == [('b0-d4', 'data-d4'), ('b0-d5', 'data-d5'), ('b1-d4', 'data-d4'), ('b1-d5', 'data-d5')]
    assert made[-1][2] == ['0.safetensors', '1.safetensors']
    f = frame.set_index('claim')
    assert f['mean'].round(0).tolist() == [15, 20] and f.agree.tolist() == ['4 of 4', '4 of 4']
    assert f.backbone['L_loc helps'] == pytest.approx(10/np.sqrt(2), abs=.5) and f.backbone['Fusion helps, with Seg'] < .5
    assert pd.read_csv(tmp_path/'out'/'beyond.csv').claim.tolist() == list(f.index) and len(pd.read_csv(tmp_path/'out'/'beyond_runs.csv')) == 16


def test_a_variant_differs_from_its_preset_in_backbone_and_data_alone():
    base, other = run_config('lts', 'refcoco', 'cpu').plain(), run_config('lts', 'refcoco', 'cpu-b1-d2022').plain()
    assert {k for k in base if base[k] != other[k]} == {'run', 'preset', 'data', 'backbone'}
    assert {k for k in base['data'] if base['data'][k] != other['data'][k]} == {'recipe'}
    assert {k for k in base['backbone'] if base['backbone'][k] != other['backbone'][k]} == {'weights', 'pretrain'}
    for name in ('paper-b1-d2022', 'cpq-b1-d2022', 'cpu-b1'):
        with pytest.raises(KitError, match='preset'): run_config('lts', 'refcoco', name)


def test_what_beyond_cannot_do_is_a_sentence():
    with pytest.raises(KitError, match='published'): until.beyond('paper')
    with pytest.raises(KitError, match='cannot differ from itself'): until.beyond('smoke', data=[4])
    with pytest.raises(KitError, match='Nearest: L_loc helps'): until.beyond_runs('smoke', 0, 1, 1, ['L_loc help'])


def test_runs_that_were_asked_for_come_before_the_longest(tmp_path, monkeypatch):
    runs = runs_for('smoke', ['4'])
    monkeypatch.setattr(batch, '_snakemake', lambda *of: 0)
    monkeypatch.setattr(batch, '_say_failures', lambda *of: None)
    monkeypatch.setattr(batch, 'run_seconds', lambda runs, *of: {r.run: 1000.*(k + 1) for k, r in enumerate(runs)})
    def queue(order):
        batch.bring_up(runs, ['4'], 1, tmp_path, tmp_path/'data', 2, order=order)
        priority = json.loads((tmp_path/'plan.json').read_text())['priority']
        return sorted(priority, key=priority.get, reverse=True)
    names = [r.run for r in runs]
    assert queue(None) == queue([]) == names[::-1], 'the longest first'
    assert queue(names[:2]) == [*names[:2], *names[:1:-1]], 'those that were asked for, then the longest'


def test_what_outlived_snakemake_does_not_go_on_beside_the_report(tmp_path, monkeypatch):
    runs, said = runs_for('smoke', ['4']), []
    warm = SimpleNamespace(start=lambda *of: said.append('start'), stop=lambda: said.append('stop'))
    monkeypatch.setattr(batch, '_say_failures', lambda *of: None)
    def ends(how):
        def snakemake(*of):
            if isinstance(how, int): return how
            raise how
        said.clear()
        monkeypatch.setattr(batch, '_snakemake', snakemake)
        return batch.bring_up(runs, ['4'], 1, tmp_path, tmp_path/'data', 2, warm=warm)
    for status in (0, 1):
        ends(status)
        assert said == ['start'], 'the report is a copy, too'
    ends(-9)
    assert said == ['start', 'stop']
    assert ends(batch.TimeIsUp()).late and said == ['start', 'stop']
    # a cluster's jobs have machines of their own
    batch.bring_up(runs, ['4'], 1, tmp_path, tmp_path/'data', 2, batch.Place(cluster=True), warm=warm)
    assert 'start' not in said[2:]
