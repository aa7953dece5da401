"""Claims, intervals and verdicts: the paper's own differences, cases with a known answer, and how often the intervals hold the truth."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lts_nb.evidence import claims, failures
from lts_nb.evidence.experiments import rows, run_config, runs_for
from lts_nb.evidence.paper import published
from lts_nb.evidence.tables import bootstrap_interval, image_totals, load_results, metrics_of
from test_tables import fake_run


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = claims.coverage(tables=600, images=500, seeds=3, draws=500)
    assert 93 <= held['images'] <= 97 and 93 <= held['seeds'] <= 97, held
    assert held['envelope'] >= 95, 'both kinds of chance at once'
    assert held['percentile over seeds'] < 85, 'what the kit does not do'


def test_seed_interval_is_students_t():
    d = np.random.default_rng(0).normal(1, 2, (200, 4))
    for x in d:
        assert claims.seed_interval(x) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(.95))
    assert np.isnan(claims.seed_interval([3.])).all()
    assert claims.seed_interval([2., 2., 2.]) == (2., 2.)


def test_image_interval_against_the_formula():
    "For many equal images the bootstrap of a mean is the normal interval."
    rng = np.random.default_rng(1)
    a, b = rng.normal(.6, .1, 4000), rng.normal(.5, .1, 4000)
    image, none = np.arange(4000), np.zeros(4000)
    totals = lambda v: image_totals(dict(image_id=image, intersection=v, union=np.ones_like(v), hit=none))
    low, high = claims.image_interval([(totals(a), totals(b))])
    half = 196*np.std(a - b)/np.sqrt(len(a))
    assert (low + high)/2 == pytest.approx(100*np.mean(a - b), abs=.1*half) and (high - low)/2 == pytest.approx(half, rel=.1)


def test_sentences_of_one_image_are_not_independent():
    "Ten copies of each sentence do not make the interval narrower."
    rng = np.random.default_rng(2)
    one = dict(image_id=np.arange(300), intersection=rng.integers(0, 100, 300), union=np.full(300, 100), hit=np.ones(300, int))
    ten = {k: np.repeat(v, 10) for k, v in one.items()}
    width = lambda s: np.ptp([e[0] for e in bootstrap_interval(lambda r, t=image_totals(s): metrics_of(t[r])[..., :1], 300)])
    assert width(ten) == pytest.approx(width(one))


def test_every_claim_is_about_rows_that_the_paper_prints():
    p = published()
    ours = set(rows().row)
    for c in claims.CLAIMS:
        known = set(p[p.table == c.table].row)
        assert set(c.rows) <= (known | ours if c.ours else known), c
        assert np.isnan(claims.printed_effect(c, 'refcoco')) == c.ours, c
        assert c.test in claims._sides


def test_the_papers_own_numbers_bear_its_claims_out():
    "Where they do not, the claim's source says so (CGAN on testA)."
    for c in claims.CLAIMS:
        if c.ours: continue
        d = claims.printed_effect(c, 'refcoco')
        low = high = d - (c.printed or 0)
        assert claims.verdict(c.test, low, high) == 'reproduced', c
    assert claims.printed_effect(next(c for c in claims.CLAIMS if 'CGAN' in c.rows), 'refcoco', 'testA') < 0


@pytest.fixture(scope='module')
def frames(tmp_path_factory):
    out = tmp_path_factory.mktemp('claims')
    for s in (0, 1, 2):
        for c in runs_for('smoke', None, 1): fake_run(out, run_config(c.experiment, c.dataset, 'smoke', s))
    results = load_results(out, 'smoke')
    effects = claims.effects_frame(results, 'smoke', draws=200)
    return results, effects, claims.claims_frame(results, 'smoke', effects)


def test_every_claim_that_can_be_tested_is(frames):
    _, effects, made = frames
    untested = made[made.verdict == 'not tested']
    assert untested.why.str.contains('not in the kit').all() and not made.drop(untested.index).effect.isna().any()
    assert set(made.verdict) <= {'reproduced', 'not reproduced', 'inconclusive', 'not tested'}
    assert set(made.dataset) == {'refshapes', 'refshapes+', 'refshapesg'} and (effects.seeds == 3).all()
    assert not made.duplicated(['claim', 'dataset', 'split']).any()
    beats = made[made.claim == 'LTS beats RMI']
    assert list(zip(beats.dataset, beats.split)) == [(d, s) for d in ('refshapes', 'refshapes+') for s in ('val', 'testA', 'testB')]
    assert made[made.claim == 'LTS beats the best earlier method, CGAN'].query('dataset == "refshapesg"').split.tolist() == ['val', 'test']
    crf = made[made.claim == 'The dense CRF helps RMI']
    assert crf.published.isna().all() and (crf.split == 'val').all() and (crf.verdict == 'not reproduced').all(), 'half the intersections'


def test_rising_needs_every_step(frames):
    results, effects, made = frames
    line = made[made.claim == 'IoU rises with resolution'].iloc[0]
    steps = effects[(effects.claim == 'IoU rises with resolution') & (effects.split == 'val')]
    assert len(steps) == 5
    up = effects.assign(low=effects.low.where(effects.claim != 'IoU rises with resolution', 1.), high=effects.high.where(effects.claim != 'IoU rises with resolution', 2.))
    verdict = lambda e: claims.claims_frame(results, 'smoke', e).set_index('claim').verdict['IoU rises with resolution']
    assert verdict(up) == 'reproduced'
    up.loc[steps.index[2], ['low', 'high']] = -1., 3.
    assert verdict(up) == 'inconclusive'
    up.loc[steps.index[2], ['low', 'high']] = -3., -1.
    assert verdict(up) == 'not reproduced' and line.verdict != 'reproduced'


def test_only_shared_seeds_are_compared(frames, tmp_path):
    for e, s in (('lts', 0), ('lts', 1), ('fusion-filter-seg', 1), ('fusion-filter-seg', 2)): fake_run(tmp_path, run_config(e, 'refcoco', 'smoke', s))
    results = load_results(tmp_path, 'smoke')
    effects = claims.effects_frame(results, 'smoke', draws=100)
    assert (effects[effects.claim == 'L_loc helps'].seeds == 1).all()
    why = claims.claims_frame(results, 'smoke', effects).set_index(['claim', 'dataset']).why
    assert 'one seed' in why[('L_loc helps', 'refshapes')] and '--table 5' in why[('Filtering twice beats once', 'refshapes')]


def test_kinds_of_genuine_expressions(micro):
    from lts_nb.data.refer import Refer
    kinds = pd.Series([failures.expression_kind(s.sent) for _, s in Refer(micro, 'refcoco').sentences_of('val')]).value_counts()
    assert kinds.sum() == 45 and kinds.get('place', 0) > 10, kinds


def test_shares_add_up(frames):
    results, *_ = frames
    table = failures.failures_frame(results, [('refshapes', 'val')])
    assert len(table) == 1 and (table.localisation + table.segmentation).round(6).eq(100).all() and (table['another object'] <= table.localisation).all()
