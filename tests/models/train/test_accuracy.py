"""What the report of a classifier has and warns of."""

import torch

from models.train.accuracy import accuracies, doubts
from models.train.examples import Examples


def test_the_line_is_the_share_of_the_commonest_label() -> None:
    ids = torch.tensor([7, 7, 1, 9, 0, 9, 1, 9, 1], dtype=torch.int32)
    scored = torch.tensor([False, False, True, False, True, False, True, False, True])
    found = accuracies((0.25, 0.5), Examples(ids, scored, torch.tensor([0, 3, 5, 7, 9])))
    assert found == {"accuracy_before": 0.25, "accuracy_after": 0.5, "majority_share": 0.75}


def test_an_accuracy_that_says_little_is_warned_of() -> None:
    assert doubts(0.9, 0.6, 100) == []
    assert "no more than always saying the commonest would (60.0%)" in doubts(0.6, 0.6, 100)[0]
    assert doubts(0.9, 0.6, 25) == [
        "the accuracy was measured on 25 examples, so that chance alone moves it by some 10%; give more, or a text of "
        "its own as evaluation.source"
    ]
