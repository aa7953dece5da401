"What several test files share."
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a shell tells its background jobs to ignore Ctrl-C; tests may be such a job, and the programs that they start must hear it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module', autouse=True)
def own_threads():
    "A run of a large preset takes four threads and keeps them; threads that wait for a processor cost minutes."
    yield
    if torch := sys.modules.get('torch'): torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())))


@pytest.fixture(scope='session')
def micro():
    "Root of the small excerpt of RefCOCO, which is not part of the repository."
    path = Path(os.environ.get('LTS_MICRO') or ROOT.parent/'shared'/'refcoco_micro')
    if not path.is_dir(): pytest.skip(f'no RefCOCO excerpt at {path}; LTS_MICRO may name another place')
    return path


@pytest.fixture(scope='session')
def tiny_family(tmp_path_factory):
    "Root of a RefShapes family of a dozen images; read it, never write to it."
    from lts_nb.data.shapes import Recipe, make_family
    root = tmp_path_factory.mktemp('tiny_family')
    make_family(root, Recipe(seed=0, train=5, val=3, testA=3, testB=3))
    return root


@pytest.fixture(scope='session')
def golden():
    "A function: name -> arrays that an official code computed; the files are not part of the repository."
    import numpy as np
    path = Path(os.environ.get('LTS_GOLDEN') or ROOT.parent/'shared'/'golden')
    if not path.is_dir(): pytest.skip(f'no golden values at {path}; LTS_GOLDEN may name another place')
    def load(name):
        with np.load(path/f'{name}.npz', allow_pickle=False) as arrays: return dict(arrays)
    return load


@pytest.fixture(scope='session')
def golden_parts(golden):
    "A function: file -> (part -> {kind/name: tensor}), of an official code that was run part by part."
    import torch
    def of_file(file):
        arrays = golden(file)
        def part(name):
            own = {k: v for k, v in arrays.items() if k.startswith(name + '/')}
            return {k.removeprefix(name + '/'): torch.as_tensor(v) for k, v in own.items()}
        return part
    return of_file
