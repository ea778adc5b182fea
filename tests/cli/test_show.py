"""What the report of a job says on a terminal, of parts that few jobs have."""

import pytest

from squeeze.cli import show
from squeeze.reports.report import Report
from tests.client.service import REPORT


def test_domains_are_told_with_their_losses_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    data = {
        **{"origin": "file-a", "held_out_origin": "file-a", "records": 90, "held_out_records": 10, "examples": 90},
        **{"held_out_examples": 10, "tokens": 900, "learned_tokens": 800, "sha256": "a", "held_out_sha256": "b"},
    }
    prose = {
        **{"name": "prose", "tokens": 12_345, "sequences": 25, "drawn": 1040, "measured_tokens": 900},
        **{"weight_before": 0.25, "weight_after": 0.4321, "loss_reference": 2.125, "loss_before": 4.0},
    }
    training = {
        **{"method": "full", "precision": "fp32", "trainable_parameters": 1234, "trained_modules": 3, "data": data},
        **{"sequence_length": 64, "packed": True, "sequences": 15, "filled": 0.9, "measured_examples": 10},
        **{"measured_tokens": 80, "steps": 2, "planned_steps": 2, "best_step": 2, "loss_before": 3.1},
        **{"loss_after": 1.0, "curve": [], "tokens_per_second": 90.0, "held_out": []},
        **{"domains": [prose | {"loss_after": 3.0}]},
    }
    show.report(Report.model_validate(REPORT | {"training": training}))
    told = " ".join(capsys.readouterr().out.split())
    assert "domain prose held-out loss 4.000 -> 3.000 (-25.00%), of the original 2.125" in told
    assert "share 25.0% -> 43.2%, 1,040 sequences drawn of 25" in told
