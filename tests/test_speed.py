"""The paper-size model at 416 on the CPU against a matrix product of as many operations."""
import torch

from lts_nb.model.darknet import Darknet53, split_backbone
from lts_nb.model.lts import LTS, LTSConfig, speed_ratio


def test_one_pass_against_a_matrix_product():
    "With all threads; on a machine busy with other work, where threads wait for each other, with one."
    full, threads, ratios = Darknet53(), torch.get_num_threads(), {}
    frozen, tail = split_backbone(full, 2)
    model = LTS(LTSConfig(), full.channels, 10_000, tail=tail)
    try:
        for n in (threads, 1):
            torch.set_num_threads(n)
            ratios[n] = speed_ratio(model, frozen)[0]
            if ratios[n] <= 1.25: break
    finally: torch.set_num_threads(threads)
    assert min(ratios.values()) <= 1.25, f'times as long, by number of threads: {ratios}'
