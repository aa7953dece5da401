"""Weight files that are broken, and the original's sizes."""
import os

import numpy as np
import pytest
import torch

from lts_nb.model.darknet import (YOLOV3_FLOATS, Darknet53, _blocks, _tensors, darknet_floats, load_darknet_weights, read_darknet_header,
                            save_darknet_weights, split_backbone)
from lts_nb.errors import KitError

DEPTHS = (1, 1, 1, 1, 1)


def small(neck=True, seed=0):
    torch.manual_seed(seed)
    backbone = Darknet53(1/16, DEPTHS, neck)
    for t in _tensors(_blocks(backbone)): t.data.uniform_(.1, 1)
    return backbone


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(_tensors(_blocks(a)), _tensors(_blocks(b))))


@pytest.fixture
def path(tmp_path):
    save_darknet_weights(small(), tmp_path/'w.weights')
    return tmp_path/'w.weights'


def refused(backbone, path, words):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(KitError, match=words) as e: load_darknet_weights(backbone, path)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), 'changed by a bad file'
    return str(e.value)


def test_file_order_is_bias_scale_mean_variance_kernel(path):
    backbone, values = small(), np.fromfile(path, '<f4', offset=20)
    bn, conv = backbone.stem[1], backbone.stem[0]
    n = bn.num_features
    for i, t in enumerate((bn.bias, bn.weight, bn.running_mean, bn.running_var)):
        assert np.array_equal(values[i*n:(i+1)*n], t.detach().numpy())
    assert np.array_equal(values[4*n:4*n + conv.weight.numel()], conv.weight.detach().numpy().ravel())


@pytest.mark.parametrize('version, header', [((0, 2, 0), 20), ((0, 2, 5), 20), ((1, 0, 0), 20), ((0, 1, 0), 16), ((0, 0, 0), 16)])
def test_both_headers(tmp_path, version, header):
    a, b = small(), small(seed=1)
    save_darknet_weights(a, tmp_path/'w', version, seen=12345)
    assert os.path.getsize(tmp_path/'w') == header + 4*darknet_floats(a)[1]
    assert load_darknet_weights(b, tmp_path/'w') == (version, 12345) and same(a, b)


def test_more_than_two_thousand_million_images_seen(tmp_path):
    save_darknet_weights(small(), tmp_path/'w', seen=3_000_000_000)
    assert read_darknet_header(tmp_path/'w')[1] == 3_000_000_000


@pytest.mark.parametrize('cut', [1, 3, 4, 1000])
def test_too_short(path, cut):
    size = os.path.getsize(path)
    os.truncate(path, size - cut)
    text = refused(small(seed=1), path, 'too short')
    assert f'{size:,}' in text and f'{size-cut:,}' in text


@pytest.mark.parametrize('more', [1, 4, 1000])
def test_too_long(path, more):
    size = os.path.getsize(path)
    with open(path, 'ab') as f: f.write(b'\0'*more)
    text = refused(small(seed=1), path, 'too long')
    assert f'{size:,}' in text and f'{size+more:,}' in text


@pytest.mark.parametrize('size', [0, 7, 15, 19])
def test_ends_in_the_header(path, size):
    os.truncate(path, size)
    refused(small(seed=1), path, f'after {size} bytes')


@pytest.mark.parametrize('page', [b'<!DOCTYPE html><html>', b'\n  <html><head><title>404</title></head></html>'])
def test_a_web_page(path, page):
    path.write_bytes(page)
    assert 'hank-ai' in refused(small(seed=1), path, 'web page')


def test_another_kind_of_file(path):
    path.write_bytes(b'PK\3\4' + os.urandom(8).replace(b'\0', b'\1') + b'\xff'*2000)
    refused(small(seed=1), path, 'Darknet|too')


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_not_finite(path, value):
    with open(path, 'r+b') as f:
        f.seek(20 + 4*500)
        np.array([value], '<f4').tofile(f)
    refused(small(seed=1), path, 'not finite')


def test_missing_or_a_folder(tmp_path):
    refused(small(), tmp_path/'nothing.weights', 'cannot be read')
    refused(small(), tmp_path, 'cannot be read')


def test_body_alone_wants_the_neck_off(tmp_path):
    body, fresh = small(neck=False), small(neck=False, seed=1)
    save_darknet_weights(body, tmp_path/'body')
    refused(small(seed=1), tmp_path/'body', 'neck off')
    load_darknet_weights(fresh, tmp_path/'body')
    assert same(body, fresh)


def test_neck_off_takes_a_file_with_neck(path):
    fresh = small(neck=False, seed=1)
    load_darknet_weights(fresh, path)
    assert same(fresh, small())


def test_another_width(path):
    refused(Darknet53(1/8, DEPTHS), path, 'too short')
    refused(Darknet53(1/16, (1, 2, 1, 1, 1)), path, 'too short')


def test_no_disk(path):
    with pytest.raises(KitError): save_darknet_weights(small(), path/'below'/'a.weights')
    assert os.path.getsize(path) == 20 + 4*darknet_floats(small())[1]


def test_whole_yolov3_and_nothing_between(tmp_path):
    full, path = Darknet53(), tmp_path/'yolov3.weights'
    assert darknet_floats(full) == (40_620_640, 56_367_712)
    save_darknet_weights(full, path)
    os.truncate(path, 20 + 4*YOLOV3_FLOATS)
    assert os.path.getsize(path) == 248_007_048
    fresh = Darknet53()
    load_darknet_weights(fresh, path)
    assert same(fresh, full)
    os.truncate(path, 248_007_044)
    with pytest.raises(KitError, match='too short.*225,470,868 or 248,007,048.*248,007,044'): load_darknet_weights(fresh, path)


@pytest.mark.parametrize('n', [0, 1, 2, 6])
def test_split_computes_the_same(n):
    backbone, image = small().eval(), torch.rand(1, 3, 64, 96)
    whole = backbone(image)
    frozen, tail = split_backbone(backbone, n)
    v1, *rest = frozen(image)
    assert v1.shape[1] == frozen.channels[0]
    for a, b in zip((tail(v1), *rest), whole): torch.testing.assert_close(a, b)


@pytest.mark.parametrize('n', [-1, 7])
def test_no_such_tail(n):
    with pytest.raises(KitError, match='no such tail'): split_backbone(small(), n)
