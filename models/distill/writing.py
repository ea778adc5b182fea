"""Models that go on from prompts: the teacher before the training, the student on its way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@torch.no_grad()
def gone_on(
    model: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    vocabulary: int,
    drawn: Tensor | None = None,
) -> list[Tensor]:
    """What a model writes after each prompt, (m,) int64 each on the host: at most so many tokens, the one of `ends`
    that it stopped at among them. prompts: ids (t,). temperature: 0 takes what is likeliest; else torch's random
    numbers decide, or `drawn`, (prompts, new_tokens) float64 from [0, 1), so that what is written after a prompt
    doesn't depend on the others. vocabulary: tokens that may be written; rows beyond only fill the table of embeddings
    up.
    """
    device, longest = next(model.parameters()).device, max(len(one) for one in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    seen = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # what fills up stands before, so that all go on at one place
        ids[row, longest - len(prompt) :] = prompt
        seen[row, longest - len(prompt) :] = 1
    processors: list[LogitsProcessor] = [_Known(vocabulary)]
    if drawn is not None and temperature:
        processors.append(_Drawn(drawn.to(device), temperature, longest))
    how: dict[str, Any] = {"do_sample": False}
    if temperature and drawn is None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **how,
        max_new_tokens=new_tokens,
        eos_token_id=list(ends) or [vocabulary],  # which is never written; None would be what the model itself says
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        generation_config=settings,
        logits_processor=LogitsProcessorList(processors),
    )
    model.train(was_training)
    return [_ended(row, ends) for row in out[:, longest:].cpu()]


class _Known(LogitsProcessor):  # type: ignore[misc]
    """Rules out what is past the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 - transformers' signature
        scores[:, self._vocabulary :] = -torch.inf
        return scores


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row the one token at which the sum of probabilities passes a number that was drawn for it."""

    def __init__(self, drawn: Tensor, temperature: float, start: int) -> None:
        """drawn: (rows, steps). start: tokens before the first step."""
        self._drawn, self._temperature, self._start = drawn, temperature, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self._start
        passed = (scores.double() / self._temperature).softmax(-1).cumsum(-1)  # (B, V)
        chosen = torch.searchsorted(passed, self._drawn[:, step, None] * passed[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.clamp_max(scores.shape[-1] - 1), 0.0)


def ends_of(tokenizer: Any, config: Any) -> list[int]:
    """Tokens that end what a model writes."""
    told = config.get_text_config().eos_token_id
    known = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    return list(dict.fromkeys(int(one) for one in known if one is not None))


def _ended(ids: Tensor, ends: Sequence[int]) -> Tensor:
    last = [place for place, one in enumerate(ids.tolist()) if one in ends][:1]
    return ids[: last[0] + 1] if last else ids
