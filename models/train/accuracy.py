"""How well a classifier tells labels, as the report has it, and what to think of that."""

import math

from models.train.examples import Examples

LEAST_MEASURED = 100  # examples


def accuracies(told: tuple[float, float], held_out: Examples) -> dict[str, float]:
    """The report's fields. told: before and after. held_out: each ends with the number of its label."""
    labels = held_out.ids[held_out.starts[1:] - 1]
    return {
        "accuracy_before": told[0],
        "accuracy_after": told[1],
        "majority_share": int(labels.bincount().max()) / len(labels),
    }


def doubts(accuracy: float, majority_share: float, examples: int) -> list[str]:
    """What the report of a classifier should warn of. examples: that the accuracy was measured on."""
    found = []
    if accuracy <= majority_share:
        found.append(
            f"{accuracy:.1%} of the held-out labels are told, no more than always saying the commonest would "
            f"({majority_share:.1%}): train for longer (`epochs`), at another learning_rate, train `layers` of the "
            "model too, or give more examples"
        )
    if examples < LEAST_MEASURED:
        found.append(
            f"the accuracy was measured on {examples} examples, so that chance alone moves it by some "
            f"{math.sqrt(0.25 / examples):.0%}; give more, or a text of its own as evaluation.source"
        )
    return found
