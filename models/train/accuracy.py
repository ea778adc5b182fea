"""How well a classifier tells labels, as the report has it, and what to think of that."""

import math

from models.train.examples import Examples
from squeeze.report import Training

LEAST_MEASURED = 100  # examples


def accuracies(told: tuple[float, float], held_out: Examples) -> dict[str, float]:
    """The report's fields. told: before and after. held_out: each ends with the number of its label."""
    labels = held_out.ids[held_out.starts[1:] - 1]
    return {
        "accuracy_before": told[0],
        "accuracy_after": told[1],
        "majority_share": int(labels.bincount().max()) / len(labels),
    }


def doubts(training: Training) -> list[str]:
    """What the report of a classifier should warn of."""
    found, share, count = [], training.majority_share, training.measured_examples
    assert training.accuracy_after is not None and share is not None, "it is a classifier"
    if training.accuracy_after <= share:
        found.append(
            f"{training.accuracy_after:.1%} of the held-out labels are told, no more than always saying the commonest "
            f"would ({share:.1%}): train for longer (`epochs`), at another learning_rate, train `layers` of the model "
            "too, or give more examples"
        )
    if count < LEAST_MEASURED:
        found.append(
            f"the accuracy was measured on {count} examples, so that chance alone moves it by some "
            f"{math.sqrt(0.25 / count):.0%}; give more, or a text of its own as evaluation.source"
        )
    return found
