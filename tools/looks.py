"""What the lesson on planned looks shows: `levels` prints its table of levels, `suites` writes reports/looks/suites.csv."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lts_nb.evidence.claims import NO_DIFFERENCE, RULES, follow, is_wrong, simulate_suite
from lts_nb.evidence.looks import LEVELS, LOOKS, boundary, null_walks, spent
from lts_nb.evidence.tables import write_csv

ROOT = Path(__file__).resolve().parent.parent
EFFECTS = -1., 0., .3, .6, 1., 1.5, 2.5, 4.  # points


def levels(
    millions:int=40, # of walks
)->dict:             # alpha -> the level of each look
    "The levels at which the looks together err with alpha, from many walks without an effect."
    freedom = np.array(LOOKS) - 1
    far = stats.t.isf(.0125, freedom)  # no critical value lies nearer
    kept = []
    for chunk in range(millions):
        t = null_walks(10**6, chunk)
        kept.append(t[(np.abs(t) > far).any(1)].astype(np.float32))
    kept, out = np.concatenate(kept), {}
    for alpha in LEVELS:
        critical = boundary(kept, spent(LOOKS, alpha), millions*10**6)
        critical[0] = stats.t.isf(spent(LOOKS[0], alpha)/2, freedom[0])  # known without simulation
        out[alpha] = 2*stats.t.sf(critical, freedom)
    return out


def summary(
    lines:pd.DataFrame, # effect, verdict, low, high, seeds: one a claim
)->pd.DataFrame:        # a line an effect, percent
    "How often each verdict was given, was wrong, and what it took."
    lines = lines.assign(
        held=(lines.low <= lines.effect) & (lines.effect <= lines.high),
        wrong=[is_wrong(v, e) for v, e in zip(lines.verdict, lines.effect)],
        **{name: lines.verdict == said for name, said in {
            'reproduced': 'reproduced', 'not reproduced': 'not reproduced',
            'no difference': NO_DIFFERENCE, 'open': 'inconclusive'}.items()})
    by = lines.drop(columns=['verdict', 'low', 'high']).groupby('effect')
    shares = 100*by[['held', 'reproduced', 'not reproduced', 'no difference', 'open', 'wrong']].mean()
    return shares.assign(seeds=by.seeds.mean(), suites=by.size()).reset_index()


def suites(
    many:int=1000, # suites
):
    "Write reports/looks/suites.csv: every rule on the same suites."
    said = {rule: [] for rule in RULES}
    for seed in range(many):
        models = simulate_suite(np.random.default_rng(seed), EFFECTS)
        for effect, pairs in zip(EFFECTS, models):
            for rule in RULES: said[rule].append(dict(effect=effect) | follow(pairs, rule))
        if seed % 100 == 99: print(f'{seed + 1} suites', flush=True)
    tables = [summary(pd.DataFrame(lines)).assign(rule=rule) for rule, lines in said.items()]
    write_csv(ROOT/'reports'/'looks'/'suites.csv', pd.concat(tables))


if __name__ == '__main__':
    if sys.argv[1:2] == ['levels']:
        for alpha, of_looks in levels(*map(int, sys.argv[2:])).items(): print(alpha, *(f'{v:.3g}' for v in of_looks))
    elif sys.argv[1:2] == ['suites']: suites(*map(int, sys.argv[2:]))
    else: sys.exit(__doc__)
