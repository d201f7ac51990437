"""Several teachers: each pixel listens to the one that knows it."""

import pytest
import torch
from torch import nn

from kdsr.models import build_model
from kdsr.objectives import Ensemble, build_objective
from kdsr.pairs import PairBatch
from kdsr.spec import EdsrSpec
from kdsr.terms import AttentionTerm, OutputTerm, TapPair


class Says(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, lr):
        return self.answer.expand(len(lr), -1, -1, -1)


LEFT = torch.cat([torch.full((1, 3, 8, 4), 0.5), torch.full((1, 3, 8, 4), 0.9)], dim=3)
RIGHT = LEFT.flip(3)
TRUTH = torch.full((1, 3, 8, 8), 0.5)
LR = torch.rand(1, 3, 4, 4)


def test_where_hr_is_known_the_nearer_teacher_is_heard():
    mixed = Ensemble([Says(LEFT), Says(RIGHT)], temperature=0.01).knowing(LR, TRUTH)
    assert (mixed - TRUTH).abs().max() < 1e-6
    patient = Ensemble([Says(LEFT), Says(RIGHT)], temperature=1e6).knowing(LR, TRUTH)
    assert torch.allclose(patient, (LEFT + RIGHT) / 2, atol=1e-5)


def test_where_it_is_not_the_majority_is_heard():
    answers = [Says(TRUTH), Says(TRUTH + 0.01), Says(torch.ones_like(TRUTH))]
    mixed = Ensemble(answers, temperature=0.01)(LR)
    assert (mixed - TRUTH).abs().max() < 0.02
    assert (torch.stack([answer(LR) for answer in answers]).mean(dim=0) - TRUTH).min() > 0.1


def test_answers_beyond_the_range_are_brought_back_first():
    assert Ensemble([Says(5 * TRUTH), Says(5 * TRUTH)], temperature=0.01)(LR).max() == 1


def test_the_output_term_asks_all_and_features_are_those_of_the_first():
    torch.manual_seed(0)
    spec = EdsrSpec(scale=2, num_features=4, num_blocks=1)
    student, first = build_model(spec), build_model(spec)
    pair = PairBatch(lr=LR, hr=TRUTH)
    both = Ensemble([first, Says(TRUTH)], temperature=1e-4)
    losses = build_objective(student, [OutputTerm()], teacher=both)(pair)
    assert losses["output_l1"].item() == pytest.approx((student(LR) - TRUTH).abs().mean().item(), rel=1e-4)
    attention = AttentionTerm(taps=(TapPair(student="trunk", teacher="trunk"),))
    alone, mixed = (
        build_objective(student, [attention], teacher=teacher)(pair)["attention"].item()
        for teacher in (first, both)
    )
    assert alone == pytest.approx(mixed)
