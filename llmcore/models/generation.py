"""The generation loop: prefill the cache with the prompt, then one token at a time.

The device decides every token; the host looks at them only to stop early on eos_token_id or when the caller does.
B batch, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmcore.models.decoder import Decoder


def _penalise_repetition(logits_BV: Tensor, tokens_BT: Tensor, penalty: float) -> Tensor:
    present = logits_BV.gather(1, tokens_BT)
    return logits_BV.scatter(1, tokens_BT, torch.where(present > 0, present / penalty, present * penalty))


def _forbid_repeated_ngrams(logits_BV: Tensor, tokens_BT: Tensor, n: int) -> Tensor:
    """-inf for every token that would complete an n-gram the row already holds."""
    T = tokens_BT.shape[1]
    if T < n:
        return logits_BV
    windows_BWn = tokens_BT.unfold(1, n, 1)
    suffix_Bn = tokens_BT[:, T - n + 1 :]
    matches_BW = (windows_BWn[..., :-1] == suffix_Bn[:, None]).all(-1)
    banned_BV = torch.zeros_like(logits_BV).scatter_reduce(
        1, windows_BWn[..., -1], matches_BW.to(logits_BV.dtype), "amax"
    )
    # A row whose every token is forbidden is left as it is.
    forbidden_BV = (banned_BV > 0) & ~(banned_BV > 0).all(-1, keepdim=True)
    return logits_BV.masked_fill(forbidden_BV, -torch.inf)


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    probabilities = logits_BV.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # The token that crosses top_p stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    return torch.multinomial(probabilities, 1)[:, 0]


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, penalty: float, ngram: int
) -> None:
    for name, given, kinds in (
        ("max_new_tokens", max_new_tokens, int),
        ("temperature", temperature, (int, float)),
        ("top_k", top_k, (int, type(None))),
        ("top_p", top_p, (int, float, type(None))),
        ("repetition_penalty", penalty, (int, float)),
        ("no_repeat_ngram_size", ngram, int),
    ):
        if isinstance(given, bool) or not isinstance(given, kinds):
            kind = "whole number" if kinds is int or name == "top_k" else "number"
            raise TypeError(
                f"generate: {name} is {given!r}; allowed: a {kind}{' or None' if name[:3] == 'top' else ''}."
            )
    for ok, name, given, allowed in (
        (max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "0 and above"),
        (temperature >= 0, "temperature", temperature, "0 (greedy) and above"),
        (top_k is None or top_k >= 1, "top_k", top_k, "1 and above, or None"),
        (top_p is None or 0 < top_p <= 1, "top_p", top_p, "above 0, up to 1, or None"),
        (penalty > 0, "repetition_penalty", penalty, "above 0"),
        (ngram >= 0, "no_repeat_ngram_size", ngram, "0 and above"),
    ):
        if not ok:
            raise ValueError(f"generate: {name} is {given}; allowed: {allowed}.")


def generate_tokens(
    model: "Decoder",
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    eos_token_id: int | None,
) -> Iterator[Tensor]:
    """Checks the arguments, then returns an iterator over the new tokens, (B,) each. See Decoder.generate."""
    _check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size)
    B, T = input_ids.shape
    limit = model.config.max_position_embeddings
    if T < 1:
        raise ValueError("generate: input_ids holds no token; at least one is needed in each row.")
    if T + max_new_tokens > limit:
        raise ValueError(
            f"generate: a prompt of {T} and max_new_tokens = {max_new_tokens} make {T + max_new_tokens} tokens; "
            f"allowed: max_position_embeddings = {limit}."
        )
    return _tokens(
        model, input_ids.long(), max_new_tokens, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size,
        eos_token_id,
    )  # fmt: skip


def _tokens(
    model: "Decoder",
    tokens_BT: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    eos_token_id: int | None,
) -> Iterator[Tensor]:
    B, T = tokens_BT.shape
    device = tokens_BT.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    cache = model.new_cache(B, T + max_new_tokens, autocast)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)
    new_BT = tokens_BT
    for _ in range(max_new_tokens):
        # The grad mode is left between tokens, where the caller's code runs.
        with torch.no_grad():
            logits = model(new_BT, cache=cache).logits
            assert logits is not None
            logits_BV = logits[:, -1].float()
            if repetition_penalty != 1:
                logits_BV = _penalise_repetition(logits_BV, tokens_BT, repetition_penalty)
            if no_repeat_ngram_size:
                logits_BV = _forbid_repeated_ngrams(logits_BV, tokens_BT, no_repeat_ngram_size)
            token_B = _sample(logits_BV, temperature, top_k, top_p)
            if eos_token_id is not None:
                token_B = token_B.masked_fill(finished_B, eos_token_id)
                finished_B = finished_B | (token_B == eos_token_id)
            new_BT = token_B[:, None]
            if repetition_penalty != 1 or no_repeat_ngram_size:
                tokens_BT = torch.cat((tokens_BT, new_BT), 1)
        yield token_B
        if eos_token_id is not None and bool(finished_B.all()):
            return
