"The square, its inverse, and images of every shape."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from lts_nb.errors import KitError
from lts_nb.data.letterbox import letterbox_geometry, letterbox_image, letterbox_mask, predict_mask, undo_letterbox

sides = st.integers(1, 300)

@settings(max_examples=150, deadline=None)
@given(sides, sides, st.sampled_from([32, 96, 128]), st.booleans())
def test_every_shape_fits(h, w, size, stretch):
    g = letterbox_geometry(h, w, size, stretch)
    assert 1 <= g.new_h <= size and 1 <= g.new_w <= size and max(g.new_h, g.new_w) == size
    assert 0 <= g.top <= size - g.new_h and abs(size - g.new_h - 2*g.top) <= 1
    image = letterbox_image(np.full((h, w, 3), 255, np.uint8), size, stretch)
    mask = letterbox_mask(np.ones((h, w), bool), size, stretch)
    assert image.shape == (3, size, size) and image.dtype == np.float32
    assert ((image[0] == 1) == mask).all() and mask.sum() == g.new_h*g.new_w
    back = undo_letterbox(torch.from_numpy(mask).float(), g)
    assert back.shape == (h, w) and torch.allclose(back, torch.ones(h, w))

def test_golden_geometry():
    g = letterbox_geometry(480, 640, 416)
    assert (g.scale, g.top, g.left, g.new_h, g.new_w) == (.65, 52, 0, 312, 416)
    assert letterbox_geometry(640, 427, 416).new_w == 278

@pytest.mark.parametrize('h, w, size', [(0, 5, 32), (5, 0, 32), (5, 5, 0)])
def test_nothing_cannot_be_fitted(h, w, size):
    with pytest.raises(KitError): letterbox_geometry(h, w, size)

def test_mask_is_nearest_exact():
    mask = np.random.default_rng(0).random((120, 77)) < .5
    g = letterbox_geometry(120, 77, 64)
    expected = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=(g.new_h, g.new_w), mode='nearest-exact')[0, 0].bool().numpy()
    assert (letterbox_mask(mask, 64)[g.top:g.top+g.new_h, g.left:g.left+g.new_w] == expected).all()

def test_inference_by_hand():
    g = letterbox_geometry(20, 40, 32)
    prob = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    square = F.interpolate(prob[None, None], size=32, mode='bilinear', align_corners=False)
    by_hand = F.interpolate(square[:, :, 8:24], size=(20, 40), mode='bilinear', align_corners=False)[0, 0]
    assert torch.equal(undo_letterbox(prob, g), by_hand)
    assert (predict_mask(prob, g) == (by_hand > .25).numpy()).all() and predict_mask(prob, g).dtype == bool
    assert not predict_mask(torch.full((8, 8), .25), g).any(), 'the threshold itself is background'
    assert torch.equal(undo_letterbox(prob.half(), g), undo_letterbox(prob.half().float(), g))
