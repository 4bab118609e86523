"""The fuzzer's requests: single calls of `generate`, drawn with all that plain `generate` takes, and a few things that ours refuses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_models import ENCODER_DECODERS, EXITS, LETTERS, PAIRS, SOME, VOCAB, model_of, tokenizer_of
from fuzz_objects import Fresh, Listener, Nudge, Stop
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, WatermarkingConfig

from hf_onlinespec._compat.caches import CACHE
from tests.encoder_decoders import FRAMES, START

MOST_ROWS = 8
SEVERAL = 0.4  # of all requests have several rows
NAMES = ("one", "two", "three")  # of adapters


@dataclass
class Request:
    """One call of `generate`."""

    prompt: Tensor  # (rows, n), of an encoder–decoder what its decoder begins with
    arguments: dict[str, Any] = field(default_factory=dict)
    turn: str = ""  # "whole" or "new": goes on from a turn before, with all tokens or with those that the cache lacks
    inference_mode: bool = False
    as_config: bool = False  # numbers travel in a GenerationConfig
    through: str = "assistant_model"  # the way in: or "custom_generate"
    adapter: str | list[str | None] | None = None  # by name, of ours alone
    reasons: set[str] = field(default_factory=set)  # to refuse it, by the names in REFUSALS

    @property
    def rows(self) -> int:
        return len(self.prompt)

    @property
    def pad(self) -> int:
        """What rows that have ended are padded with."""
        return int(self.arguments.get("pad_token_id", 0))

    def call(self) -> dict[str, Any]:
        return {k: v.make() if isinstance(v, Fresh) else v for k, v in self.arguments.items()}


def draw_request(rng: random.Random, pool: list[list[int]], target: str, draft: str, wrapped: str) -> Request:
    """One call; its rows are drawn from a pool of prompts."""
    rows = rng.randrange(2, MOST_ROWS + 1) if rng.random() < SEVERAL else 1
    texts = [rng.choice(pool[: 2 if rows == 1 else None]) for _ in range(rows)]
    encodes = target in ENCODER_DECODERS
    request = _of_decoder(rng, texts, target) if encodes else _of_texts(texts)
    arguments, length = request.arguments, request.prompt.shape[1]
    arguments["do_sample"] = (
        rng.random() < 0.2 and target != "whisper"
    )  # whose own generate may leave out what its decoder begins with
    new = rng.choice([1, 2, 4, 6, 8, 12, 16])
    arguments.update({"max_length": length + new} if rng.random() < 0.15 else {"max_new_tokens": new})
    if rng.random() < 0.15 and not encodes:
        request.turn = rng.choice(["whole", "new"])
        arguments.pop("max_length", None)
        arguments["max_new_tokens"] = new
    for name, value in _numbers(rng, arguments["do_sample"], encodes).items():
        arguments[name] = value
    if not encodes:
        _inputs(rng, request, target)
    _objects(rng, request, length + new)
    _refused(rng, request, target)
    request.inference_mode = rng.random() < 0.15
    request.as_config = rng.random() < 0.15
    if (
        draft
        and wrapped == "OnlineDraft"
        and draft not in (PAIRS, SOME)
        and target != "whisper"
        and rng.random() < 0.12
    ):
        request.through = "custom_generate"
    if (wrapped or draft == EXITS) and rng.random() < 0.2:
        some = [rng.choice([None, *NAMES]) for _ in range(rows)]
        request.adapter = rng.choice([NAMES[0], "auto", some])
    copies = (arguments.get("num_return_sequences") or 1) > 1
    if request.rows > 1 or copies:
        request.reasons.add("rows")
    if request.turn and copies:
        request.reasons.add("cache of fewer rows")
    return request


def _of_texts(texts: list[list[int]]) -> Request:
    """Rows padded on the left, with a mask where there are several."""
    longest = max(map(len, texts))
    request = Request(torch.tensor([[0] * (longest - len(text)) + text for text in texts]))
    if len(texts) > 1:
        request.arguments["attention_mask"] = torch.tensor(
            [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        )
    return request


def _of_decoder(rng: random.Random, texts: list[list[int]], target: str) -> Request:
    """Rows of an encoder–decoder: speech, or texts padded on the right; now and then with tokens that the decoder begins with."""
    rows, longest = len(texts), max(map(len, texts))
    begin = [START, *(rng.randrange(3, VOCAB) for _ in range(rng.choice([0, 0, 0, 2])))]
    request = Request(torch.tensor([begin] * rows))
    arguments = request.arguments
    if target == "whisper":
        request.prompt = request.prompt[:, :1]  # it takes no others beside an assistant
        numbers = torch.Generator().manual_seed(sum(map(sum, texts)))
        arguments["input_features"] = torch.randn(rows, 8, FRAMES, generator=numbers)
        return request
    if len(begin) > 1:
        arguments["decoder_input_ids"] = request.prompt
    arguments["input_ids"] = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    arguments["attention_mask"] = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    if rng.random() < 0.1:
        encoder, read = model_of(target, 1).get_encoder(), {k: arguments[k] for k in ("input_ids", "attention_mask")}
        del arguments["input_ids"]
        arguments["encoder_outputs"] = Fresh(lambda: encoder(**read))
    return request


def _numbers(rng: random.Random, sample: bool, encodes: bool) -> dict[str, Any]:
    """Arguments that a GenerationConfig may hold."""
    tokens = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]  # noqa: E731
    choices: list[tuple[float, dict[str, Any]]] = [
        (0.25, {"eos_token_id": rng.choice([tokens(1)[0], tokens(3), tokens(12)])}),
        (0.10, {"min_new_tokens": rng.choice([1, 4, 30])}),
        (0.05, {"min_length": rng.choice([3, 10, 20])}),
        (0.10, {"repetition_penalty": rng.choice([0.8, 1.3])}),
        (0.08, {"no_repeat_ngram_size": rng.choice([1, 2, 3])}),
        (0.05, {"bad_words_ids": [tokens(1), tokens(2)]}),
        (0.05, {"sequence_bias": [[tokens(1), 2.0], [tokens(2), 1.5]]}),
        (0.05, {"suppress_tokens": tokens(5)}),
        (0.05, {"begin_suppress_tokens": tokens(20)}),
        (0.04, {"forced_eos_token_id": tokens(1)[0]}),
        (0.04, {"exponential_decay_length_penalty": (2, 1.2), "eos_token_id": tokens(1)[0]}),
        (0.04, {"encoder_repetition_penalty": 1.3}),
        (0.15, {"pad_token_id": rng.randrange(VOCAB)}),
        (0.04, {"renormalize_logits": True}),
        (0.04, {"remove_invalid_values": True}),
        (0.03, {"watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="lefthash")}),
        (0.05, {"num_assistant_tokens": rng.choice([1, 3, 7])}),
        (0.03, {"num_assistant_tokens_schedule": rng.choice(["constant", "heuristic"])}),
        (0.04, {"cache_implementation": "dynamic"}),
        (0.15, {"return_dict_in_generate": True}),
        (0.20, {"return_dict_in_generate": True, "output_scores": True, "output_logits": rng.random() < 0.5}),
    ]
    if sample:
        choices += [
            (0.5, {"temperature": rng.choice([0.3, 0.9, 1.7])}),
            (0.3, {"top_k": rng.choice([1, 3, 20])}),
            (0.3, {"top_p": rng.choice([0.3, 0.9])}),
            (0.2, {"min_p": rng.choice([0.05, 0.3])}),
            (0.1, {"typical_p": 0.7}),
            (0.1, {"epsilon_cutoff": 0.01}),
            (0.1, {"eta_cutoff": 0.01}),
        ]
    if encodes:
        choices += [
            (0.1, {"forced_bos_token_id": tokens(1)[0]}),
            (0.1, {"encoder_no_repeat_ngram_size": 2}),
        ]
    found: dict[str, Any] = {}
    for chance, arguments in choices:
        if rng.random() < chance:
            found |= arguments
    return found


def _inputs(rng: random.Random, request: Request, target: str) -> None:
    """Padding, masks, positions, token types and caches."""
    prompt, arguments = request.prompt, request.arguments
    rows, n = prompt.shape
    if request.turn:
        arguments.pop("cache_implementation", None)  # transformers takes one of the two
        return
    drawn = rng.random()
    if drawn < 0.15 and n > 1 and rows == 1:
        pads = rng.randrange(1, n)
        mask = torch.ones_like(prompt)
        mask[:, :pads] = 0
        request.prompt = prompt.masked_fill(mask == 0, 0)
        arguments["attention_mask"] = mask
    elif drawn < 0.20 and n > 2:
        mask = arguments.get("attention_mask", torch.ones_like(prompt)).clone()
        mask[rng.randrange(rows), rng.randrange(1, n - 1)] = 0  # a gap between tokens
        arguments["attention_mask"] = mask
    elif drawn < 0.25 and rows == 1:
        arguments["attention_mask"] = torch.ones_like(prompt)
    if rng.random() < 0.05 and "cache_implementation" not in arguments:
        arguments[CACHE] = Fresh(DynamicCache)
    if target.startswith("gpt2") and rng.random() < 0.15:
        arguments["token_type_ids"] = torch.tensor([[rng.randrange(2) for _ in range(n)]] * rows)
    elif target.startswith("gpt2") and rng.random() < 0.05 and "attention_mask" not in arguments:
        arguments["position_ids"] = (torch.arange(n)[None] + rng.randrange(3)).repeat(rows, 1)


def _objects(rng: random.Random, request: Request, most: int) -> None:
    """Processors, criteria and streamers of the caller's own, and stop strings."""
    arguments = request.arguments
    if rng.random() < 0.15:
        fails_at = rng.choice([None, None, None, 2, 6])
        arguments["logits_processor"] = Fresh(lambda: [Nudge(fails_at)])
    if rng.random() < 0.15:
        length, token = rng.randrange(2, most + 2), rng.choice([None, rng.randrange(VOCAB)])
        by_row = rng.random() < 0.7
        arguments["stopping_criteria"] = Fresh(lambda: [Stop(length, token, by_row)])
    if rng.random() < 0.2 and request.rows == 1:
        hangs_up_at = rng.choice([None, None, None, request.prompt.shape[1] + rng.choice([1, 2, 6])])
        arguments["streamer"] = Fresh(lambda: Listener(hangs_up_at))
    if rng.random() < 0.05:
        arguments["stop_strings"] = ["".join(rng.choice(LETTERS) for _ in range(k)) for k in (1, 2)]
        arguments["tokenizer"] = tokenizer_of()


def _refused(rng: random.Random, request: Request, target: str) -> None:
    """What ours refuses and plain does not; several answers to each prompt."""
    arguments = request.arguments
    if rng.random() > 0.06:
        return
    name = rng.choice(sorted(REFUSED))
    if target in ENCODER_DECODERS and name == "quantized cache":
        return
    arguments.update(REFUSED[name])
    if name in ("beams", "sequences", "lookup"):
        arguments.pop("streamer", None)
    if name in ("static cache", "quantized cache", "no cache"):
        arguments.pop(CACHE, None)
        request.turn = ""
    if name == "quantized cache":
        arguments.pop("cache_implementation", None)
        arguments[CACHE] = Fresh(lambda: QuantizedCache("fp8", model_of(target, 1).config))
    request.reasons.add(name)


REFUSED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "guidance": {"guidance_scale": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "outputs": {"return_dict_in_generate": True, "output_hidden_states": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {},
    "sequences": {"num_return_sequences": 2},
}
