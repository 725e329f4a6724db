import pytest

from common.ends import finish_reason
from dejavu.params import SamplingParams

EOS = (2, 3)


@pytest.mark.parametrize(
    ("params", "token_id", "num_output_tokens", "reason"),
    [
        ({}, 7, 1, None),
        ({}, 2, 1, "stop"),
        ({}, 3, 16, "stop"),
        ({}, 7, 16, "length"),
        ({"max_tokens": 1}, 7, 1, "length"),
        ({"ignore_eos": True}, 2, 1, None),
        ({"ignore_eos": True}, 2, 16, "length"),
        ({"stop_token_ids": [7]}, 7, 1, "stop"),
        ({"stop_token_ids": [2], "ignore_eos": True}, 2, 1, "stop"),
        ({"min_tokens": 4}, 2, 4, None),
        ({"min_tokens": 4}, 2, 5, "stop"),
        ({"min_tokens": 4, "stop_token_ids": [7]}, 7, 4, None),
        ({"min_tokens": 4, "stop_token_ids": [7]}, 7, 5, "stop"),
        ({"min_tokens": 16}, 2, 16, "length"),
    ],
)
def test_finish_reason(params: dict[str, object], token_id: int, num_output_tokens: int, reason: str | None) -> None:
    assert finish_reason(SamplingParams.from_mapping(params), EOS, token_id, num_output_tokens) == reason
