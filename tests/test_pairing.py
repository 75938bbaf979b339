"""Both ways of drawing draw from the policy, and the race agrees as often as theory says."""

import pytest
import torch

from crlhf.engine.files import stream
from figures.pairing import WAYS


@pytest.mark.parametrize("way", WAYS)
def test_a_way_draws_from_the_distribution(way):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)
    noise = torch.rand(20_000, 4, generator=stream(0, "n")).log_().neg_()
    shares = torch.bincount(WAYS[way](logits, noise), minlength=4) / 20_000
    assert torch.allclose(shares, logits[0].exp(), atol=0.015)


def test_the_race_agrees_within_its_bounds_and_the_inverse_does_not():
    p = torch.rand(2000, generator=stream(0, "p")).softmax(0)
    q = (p.log() + 0.05 * torch.randn(2000, generator=stream(0, "q"))).softmax(0)
    tv = 0.5 * (p - q).abs().sum().item()
    noise = torch.rand(5000, 2000, generator=stream(0, "n")).log_().neg_()
    equal = {
        name: (way(p.log().repeat(5000, 1), noise) == way(q.log().repeat(5000, 1), noise)).float().mean().item()
        for name, way in WAYS.items()
    }
    assert (1 - tv) / (1 + tv) - 0.01 < equal["race"] < 1 - tv + 0.01
    assert equal["inverse"] < 1 - 5 * tv
