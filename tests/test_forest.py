"The forest plot, the dot plot of methods and their order's agreement: what is drawn, what is said, what is missing."
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lts_nb.errors import KitError
from lts_nb.evidence import claims as of_claims
from lts_nb.evidence import forest
from lts_nb.evidence.claims import MARGIN, NO_DIFFERENCE, VERDICTS
from lts_nb.evidence.experiments import run_config
from lts_nb.evidence.figures import save_figure
from lts_nb.evidence.report import wanted_rows
from lts_nb.evidence.tables import image_totals, load_results, paper_table
from test_tables import fake_run

METHODS = ('rmi', 'dmn', 'cmpc', 'mcn', 'lscm', 'cgan', 'lts')


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def made(*lines):
    "Claims as `claims_frame` gives them."
    columns = ['claim', 'dataset', 'split', 'published', 'effect', 'low', 'high', 'seeds', 'verdict']
    frame = pd.DataFrame(lines, columns=columns)
    return frame.assign(source='', why='', look=0, p=.5).astype({'seeds': 'Int64'})


FEW = made(
    ('Fusion helps, with Seg', 'refshapes', 'val', 1.4, 15., 12., 18., 3, 'reproduced'),
    ('L_loc helps', 'refshapes', 'val', .4, -.3, -.8, .2, 5, NO_DIFFERENCE),
    ('The prior points into the object', 'refshapes', 'val', 81.74, 79.5, 77.9, 81.1, 3, 'inconclusive'),
    ('LTS beats RMI', 'refshapes', 'val', 20., 50., 48., 52., 3, 'reproduced'),
    ('LTS beats RMI', 'refshapes', 'testA', 20., -3., -5., -1., 3, 'not reproduced'),
    ('LTS beats RMI', 'refshapes+', 'val', 20., np.nan, np.nan, np.nan, pd.NA, 'not tested'))


def marks(ax, shape):
    "x of the marks of one shape, from top to bottom."
    found = [line for line in ax.lines if line.get_marker() == shape]
    return [float(line.get_xdata()[0]) for line in sorted(found, key=lambda line: line.get_ydata()[0])]


def test_each_verdict_has_a_shape_and_a_colour_of_its_own():
    assert set(forest.MARKS) == set(VERDICTS)
    shapes, colours = zip(*forest.MARKS.values())
    assert len(set(shapes)) == len(set(colours)) == len(VERDICTS) and 'D' not in shapes


def contrast(colour):
    "WCAG's contrast with white."
    channels = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in matplotlib.colors.to_rgb(colour)]
    return 1.05/(.05 + np.dot(channels, [.2126, .7152, .0722]))


def test_every_mark_stands_out_from_the_paper():
    assert min(contrast(colour) for _, colour in forest.MARKS.values()) >= 3, 'what WCAG asks of graphics'
    small = [t.get_color() for t in forest.forest_plot(FEW).axes[0].texts]
    assert min(map(contrast, small)) >= 4.5, 'what WCAG asks of small text'


def test_the_forest_shows_value_interval_verdict_and_seeds():
    fig = forest.forest_plot(FEW)
    top, bottom = fig.axes
    assert marks(top, 'D') == pytest.approx([1.4, .4, 0, 20, 20]), 'the paper; a value is its distance to the printed one'
    assert marks(top, '^') == [15, 50] and marks(top, 'v') == [-3] and marks(top, 's') == [-.3]
    assert marks(top, 'o') == pytest.approx([79.5 - 81.74])
    bars = [tuple(line.get_xdata()) for line in top.lines if line.get_marker() == 'None' and np.ptp(line.get_ydata()) == 0 and np.ptp(line.get_xdata())]
    assert np.allclose(bars, [(12, 18), (-.8, .2), (77.9 - 81.74, 81.1 - 81.74), (48, 52), (-5, -1)])
    assert [t.get_text() for t in top.texts] == ['3', '5', '3', '3', '3', 'RefShapes: 2 reproduced, 1 no difference that matters, 1 inconclusive, 1 not reproduced', 'seeds']
    labels = [t.get_text() for t in top.get_yticklabels()]
    assert labels == ['Fusion helps, with Seg', 'L_loc helps', 'The prior points into the object', 'LTS beats RMI,  val', 'testA']
    band = top.patches[0].get_extents().transformed(top.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-MARGIN, MARGIN))
    assert marks(bottom, 'D') == [20] and not any(marks(bottom, s) for s in '^vso'), 'not tested: the paper alone'
    assert [t.get_text() for t in bottom.texts] == ['×', 'RefShapes+: 1 not tested', 'seeds']


def test_all_that_is_drawn_lies_within_the_axis():
    fig = forest.forest_plot(FEW)
    low, high = fig.axes[0].get_xlim()
    assert low < -5 and high > 52


def test_single_seeds_come_from_the_effects_of_the_look_that_decided():
    effects = pd.DataFrame([
        ('L_loc helps', 'refshapes', 'val', -.1, 3, '-0.10 -0.20 +0.00'),
        ('L_loc helps', 'refshapes', 'val', -.3, 5, '-0.10 -0.20 +0.00 -0.60 -0.60'),
        ('L_loc helps', 'refshapes', 'testA', -.3, 5, '+9.00 +9.00 +9.00 +9.00 +9.00')],
        columns=['claim', 'dataset', 'split', 'effect', 'seeds', 'each'])
    lines = forest.forest_lines(FEW.assign(seeds=pd.NA), effects)
    line = lines[lines.claim == 'L_loc helps'].iloc[0]
    assert line.each == [-.1, -.2, 0, -.6, -.6] and line.seeds == 5
    assert lines.each.map(len).sum() == 5


@pytest.mark.parametrize('claims', [FEW[:0], FEW[:1], FEW[5:], FEW.drop(columns=['seeds', 'split']),
                                    FEW.assign(low=np.nan, high=np.nan), pd.concat([FEW]*40)], ids=['none', 'one', 'untested', 'old', 'no interval', 'many'])
def test_any_report_has_a_forest(claims):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        forest.forest_plot(claims).canvas.draw()
    assert forest.forest_text(claims)


def test_a_split_can_be_asked_for():
    assert len(forest.forest_lines(FEW, splits=('testA',))) == 1
    assert len(forest.forest_plot(FEW, splits=('val',)).axes) == 2


def test_words_of_a_stranger_stay_words(tmp_path):
    evil = made(('$\\frac{a$ <b>', 'refshapes', 'val', 1., 2., 1., 3., 3, 'reproduced'))
    save_figure(forest.forest_plot(evil), tmp_path/'a.png')
    save_figure(forest.forest_plot(evil), tmp_path/'b.png')
    assert (tmp_path/'a.png').read_bytes() == (tmp_path/'b.png').read_bytes()


def test_the_forest_in_words_has_every_number():
    text = forest.forest_text(FEW).splitlines()
    assert text[0] == ('Forest plot of 6 verdicts, effects in points of IoU. RefShapes: 2 reproduced, 1 no difference that matters, '
                       '1 inconclusive, 1 not reproduced. RefShapes+: 1 not tested.')
    assert text[1] == 'RefShapes. Fusion helps, with Seg, val: reproduced, +15.0 [+12.0, +18.0], published +1.4, 3 seeds.'
    assert text[2] == 'RefShapes. L_loc helps, val: no difference that matters, −0.3 [−0.8, +0.2], published +0.4, 5 seeds.'
    assert text[-1] == 'RefShapes+. LTS beats RMI, val: not tested.' and len(text) == 7


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "Seven methods with three seeds each, RRN with one, and their Table 1."
    out = tmp_path_factory.mktemp('forest')
    for name in (*METHODS, 'rrn'):
        for s in range(1 if name == 'rrn' else 3): fake_run(out, run_config(name, 'refshapes', 'smoke', s))
    results = load_results(out, 'smoke')
    return results, paper_table('1', wanted_rows('smoke', ['1']), results)


def test_an_interval_of_a_method_is_that_of_claims(report):
    results, table1 = report
    intervals = forest.method_intervals(table1, results, draws=200).set_index(['row', 'dataset', 'split'])
    assert len(intervals) == 8*3
    lts = intervals.loc[('LTS', 'refcoco', 'val')]
    totals = forest.seed_totals(results, 'lts', 'refshapes', 'val')
    values = [100*t[:, 0].sum()/t[:, 1].sum() for t in totals.values()]
    assert lts.ours == pytest.approx(np.mean(values)) and lts.seeds == 3
    over_seeds = of_claims.seed_interval(values)
    over_images = of_claims.image_interval([(t, 0.) for t in totals.values()], draws=200)
    assert (lts.low, lts.high) == pytest.approx((min(over_seeds[0], over_images[0]), max(over_seeds[1], over_images[1])))
    rrn = intervals.loc[('RRN', 'refcoco', 'val')]
    one, = forest.seed_totals(results, 'rrn@crf', 'refshapes', 'val').values()
    assert (rrn.low, rrn.high) == pytest.approx(of_claims.image_interval([(one, 0.)], draws=200)), 'one seed: images alone'


def test_the_dot_plot_has_thirteen_lines_in_the_papers_order(report):
    results, table1 = report
    intervals = forest.method_intervals(table1, results, draws=100)
    fig = forest.methods_plot(table1, intervals, 'refshapes')
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['val', 'testA', 'testB']
    val = fig.axes[0]
    names = [t.get_text() for t in val.get_yticklabels()]
    assert len(names) == 13 and (names[0], names[-1]) == ('LTS', 'RMI')
    assert marks(val, 'D') == sorted(marks(val, 'D'), reverse=True) and len(marks(val, 'D')) == 13
    assert len(marks(val, 'o')) == 7 and len(marks(val, 's')) == 1, 'ours, LTS apart'
    said = [t.get_text() for t in val.texts]
    assert said.count('not run') == 5 and sum('→' in s for s in said) == 8
    red = next(line for line in val.lines if line.get_marker() == 's')
    assert red.get_color() == '#b3261e'


def test_places_count_only_what_both_have(report):
    results, table1 = report
    lines = forest.method_lines(table1, None, 'refshapes').query("split == 'val'").dropna(subset='ours')
    assert sorted(lines['place in the paper']) == list(range(1, 9))
    assert lines.sort_values('ours').row.iloc[-1] == lines.row[lines['place here'] == 1].iloc[0]


def test_the_dot_plot_stands_what_is_missing(report):
    _, table1 = report
    for frame in (table1[:0], table1[table1.row == 'LTS'], table1.assign(ours=np.nan), table1[table1.split == 'testA']):
        forest.methods_plot(frame, None, 'refshapes').canvas.draw()
        assert forest.methods_text(frame, None, 'refshapes')


def test_the_dot_plot_in_words(report):
    results, table1 = report
    text = forest.methods_text(table1, forest.method_intervals(table1, results, draws=50), 'refshapes').splitlines()
    assert text[0] == 'Dot plot of 13 methods of Table 1 on RefCOCO in the paper and on RefShapes here, 8 of them run here. Overall IoU in percent.'
    assert len(text) == 4 and text[1].startswith('val: LTS published 65.4, here ') and 'Lang2seg published 58.9, not run' in text[1]


def test_coefficients_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 30, 9)).astype(float)
    assert forest.tau_b(a, b) == pytest.approx([stats.kendalltau(x, y).statistic for x, y in zip(a, b)])
    assert forest.spearman(a, b) == pytest.approx([stats.spearmanr(x, y).statistic for x, y in zip(a, b)])
    assert np.isnan(forest.tau_b(np.ones(4), np.arange(4.))), 'all ties: no order'


def test_a_known_order_gives_a_known_agreement(report):
    results, table1 = report
    exact = forest.rank_correlation(table1.assign(ours=table1.paper), [])
    assert (exact.tau == 1).all() and (exact.rho == 1).all() and exact['tau low'].isna().all()
    assert forest.rank_correlation(table1.assign(ours=-table1.paper), []).tau.eq(-1).all()


def test_agreement_with_an_interval(report):
    results, table1 = report
    ranks = forest.rank_correlation(table1, results, draws=300)
    assert list(zip(ranks.dataset, ranks.split)) == [('refshapes', s) for s in ('val', 'testA', 'testB')]
    assert ranks.methods.eq(8).all() and ranks.seeds.eq('1 to 3').all()
    assert (ranks['tau low'] <= ranks['tau high']).all() and ranks.own.between(-1, 1).all()
    val = table1.query("split == 'val' and metric == 'IoU'").dropna(subset=['paper', 'ours'])
    assert ranks.tau[0] == pytest.approx(stats.kendalltau(val.paper, val.ours).statistic)
    assert ranks.equals(forest.rank_correlation(table1, results, draws=300)), 'the same draws, the same numbers'
    assert ranks['LTS in the paper'].tolist()[0] == 1


def scores(share, seed=0, images=300):
    rng = np.random.default_rng(seed)
    union = np.full(images, 100.)
    return image_totals(dict(image_id=np.arange(images), intersection=union*(rng.random(images) < share), union=union, hit=np.full(images, -1)))


def test_methods_meet_the_same_images():
    "A copy of a method never changes places with it; drawn apart it would, half of the time."
    a = scores(.5)
    drawn = forest.drawn_values([{0: a}, {0: a + 0}], 200)
    assert (drawn[:, 0] == drawn[:, 1]).all()


def test_drawn_values_scatter_as_images_and_seeds_do():
    "Images: the binomial's spread. Seeds: the standard error, not the (n − 1)/n of it that a bootstrap of three gives."
    image_sd = forest.drawn_values([{0: scores(.5)}], 4000).std()
    assert image_sd == pytest.approx(100*np.sqrt(.25/300), rel=.1)
    same = np.ones((300, 11))*100
    seeds = {}
    for s, share in enumerate((.4, .5, .6)):
        seeds[s] = same.copy()
        seeds[s][:, 0] = 100*share
    drawn = forest.drawn_values([seeds], 20_000)
    assert drawn.mean() == pytest.approx(50, abs=.3) and drawn.std() == pytest.approx(10/np.sqrt(3), rel=.03)


def test_other_images_are_refused(report):
    results, table1 = report
    def cut(results, experiment, dataset, split):
        seeds = whole(results, experiment, dataset, split)
        return {s: t[:-1] for s, t in seeds.items()} if experiment == 'lts' else seeds
    whole = forest.seed_totals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, 'seed_totals', cut)
        with pytest.raises(KitError, match='was scored on'): forest.rank_correlation(table1, results, draws=10)


def test_two_methods_have_no_order(report):
    results, table1 = report
    assert forest.rank_correlation(table1[table1.row.isin(['LTS', 'CGAN'])], results).empty
