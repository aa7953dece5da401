"""The report's page and pictures where something is missing, hostile or in the way."""
import base64
import io
import re

import pytest
from PIL import Image

from lts_nb.evidence import report
from lts_nb.errors import KitError
from lts_nb.evidence.experiments import run_config
from test_tables import fake_run


@pytest.fixture
def two_seeds(tmp_path):
    "Two seeds of LTS, one of LTS with two filterings."
    for e, s in (('lts', 0), ('lts', 1), ('lts-n2', 0)): fake_run(tmp_path, run_config(e, 'refcoco', 'smoke', s))
    return tmp_path


def test_missing_seeds_are_named(two_seeds):
    missing = report.write_report(two_seeds, 'smoke', ['5'])['missing']
    assert 'lts-n2-refshapes-smoke-s1' in missing and 'lts-n3-refshapes-smoke-s0' in missing
    assert not {'lts-refshapes-smoke-s0', 'lts-refshapes-smoke-s1', 'lts-n2-refshapes-smoke-s0'} & set(missing)


def test_page_says_where_a_configuration_departs(two_seeds):
    report.write_report(two_seeds, 'smoke', ['5'])
    page = (two_seeds/'index.html').read_text()
    row = re.search(r'<th scope="row">lts-n2</th><td class="running">([^<]*model\.n=2[^<]*)</td>', page)
    assert row and 'threads' not in row[1], 'how many threads ran it is no part of what was run'


def test_pictures_are_embedded_whole(two_seeds):
    report.write_report(two_seeds, 'smoke', ['5'])
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', (two_seeds/'index.html').read_text())
    assert len(pictures) >= 3
    for p in pictures: Image.open(io.BytesIO(base64.b64decode(p))).load()


def test_a_failed_run_is_named_with_its_notebook(two_seeds):
    report.write_report(two_seeds, 'smoke', ['5'], failed=['lts-n3-refshapes-smoke-s0'])
    assert 'runs/lts-n3-refshapes-smoke-s0/train.ipynb' in (two_seeds/'index.html').read_text()


def test_something_in_the_way_of_the_figures_is_a_sentence(two_seeds):
    (two_seeds/'figures').write_text('a file, not a folder')
    with pytest.raises(KitError, match='figures'): report.write_report(two_seeds, 'smoke', ['5'])


def test_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(KitError, match='lts reproduce'): report.write_report(tmp_path/'nowhere', 'smoke')
