"""Two tokenizers: which tokens are common, and how the draft reads what was written in the target's."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerBase

from hf_onlinespec import DraftError
from hf_onlinespec.models.common_strings import CommonStrings
from hf_onlinespec.models.retokenizing import Open, Retokenizer
from hf_onlinespec.models.spelling import Spelling
from tests.tokenizers import Slow, byte_level, lowercasing, random_text, sentencepiece, strings, word_pieces

KINDS = {
    "byte-level": byte_level(500),
    "smaller": byte_level(330),
    "chat": byte_level(400, chat=True),
    "sentencepiece": sentencepiece(400),
}
ANY = 10**6  # no limit by the size of a model
SIGN = "▁"  # SentencePiece's own sign for a space: in a text it is read as one


def retokenizer(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> Retokenizer:
    return Retokenizer(CommonStrings(Spelling(target, "target"), Spelling(draft, "draft"), (ANY, ANY)))


def read(retokenizer: Retokenizer, tokens: list[int]) -> list[int]:
    """All that the draft reads, behind what it puts in front of every text."""
    groups, left = retokenizer.read(tokens, Open())
    return [token for group in groups for token in group.tokens] + list(retokenizer.unfinished(left))


# The tokens


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_what_the_tokenizer_decodes(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(0)
    spelling = Spelling(tokenizer, "draft")
    for _ in range(50):
        text = random_text(rng).replace(SIGN, " ")
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if not any(token in spelling.marks for token in tokens):
            assert spelling.write(tokens).decode().removeprefix(" " if spelling.spaced else "") == text
        assert spelling.write(spelling.read(text)).decode() == text


def test_common_tokens_spell_the_same_whatever_stands_for_a_space() -> None:
    common = retokenizer(KINDS["byte-level"], KINDS["sentencepiece"]).common
    names = [
        (KINDS["byte-level"].convert_ids_to_tokens(i), KINDS["sentencepiece"].convert_ids_to_tokens(j))
        for i, j in zip(common.target_ids.tolist(), common.draft_ids.tolist(), strict=True)
    ]
    assert ("Ġthe", "▁the") in names and ("Ċ", "<0x0A>") in names and ("a", "a") in names
    assert ("<|endoftext|>", "</s>") in names  # the end of a text
    assert not any("unk" in draft or draft == "<s>" for _, draft in names)
    for i, j in zip(common.target_ids.tolist(), common.draft_ids.tolist(), strict=True):
        if i in common.target.spelled:
            common.target.spelled[i].decode()  # whole characters
            assert common.target.spelled[i] == common.draft.spelled[j]
    assert len(set(common.draft_ids.tolist())) == len(common)


def test_of_two_tokens_for_one_text_the_one_that_is_written_is_common() -> None:
    """SentencePiece has a byte <0x41> and the letter A."""
    for target, draft in (("byte-level", "sentencepiece"), ("sentencepiece", "byte-level")):
        common = retokenizer(KINDS[target], KINDS[draft]).common
        own = KINDS["sentencepiece"].convert_tokens_to_ids("S")
        ids = common.draft_ids if draft == "sentencepiece" else common.target_ids
        byte = KINDS["sentencepiece"].convert_tokens_to_ids("<0x53>")
        assert own in ids.tolist() and byte not in ids.tolist()


def test_ids_that_a_model_does_not_have_are_not_common() -> None:
    spellings = Spelling(KINDS["byte-level"], "target"), Spelling(KINDS["smaller"], "draft")
    common = CommonStrings(*spellings, (300, 310))
    assert int(common.target_ids.max()) < 300 and int(common.draft_ids.max()) < 310 and len(common) > 100
    assert all(i < 300 and j < 310 for i, j in common.draft_of.items())
    found = read(Retokenizer(common), KINDS["byte-level"]("the little house, 日本語").input_ids)
    assert found and max(found) < 310


def test_tokenizers_without_a_common_token_are_refused() -> None:
    with pytest.raises(DraftError, match=r"2 and 3 tokens\) have no token in common"):
        retokenizer(strings("a", "b"), strings("c", "d", "ab"))


@pytest.mark.parametrize("name", ["target", "draft"])
def test_tokenizers_whose_strings_cannot_be_read_are_refused(name: str) -> None:
    with pytest.raises(DraftError, match=f"The {name}'s tokenizer Slow is a slow one"):
        Spelling(Slow(), name)
    with pytest.raises(DraftError, match=f"The {name}'s tokenizer .* decodes with WordPiece"):
        Spelling(word_pieces(), name)


# What the draft reads


@pytest.mark.parametrize("draft", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_what_is_read_spells_the_text_and_ends_where_the_target_s_tokens_end(target: str, draft: str) -> None:
    own, rng = KINDS[target], random.Random(f"{target} {draft}")
    reader = retokenizer(own, KINDS[draft])
    spelled, written = reader.common.target, reader.common.draft
    for _ in range(40):
        tokens = [t for t in own(random_text(rng), add_special_tokens=False).input_ids if t not in spelled.marks]
        for n in (1, len(tokens) // 2, len(tokens)):
            groups, left = reader.read(tokens[:n], Open())
            assert written.write(reader.unfinished(left)) == left.rest
            text = spelled.write(tokens[: n - left.length]).removeprefix(b" " if spelled.spaced else b"")
            text = text.replace(SIGN.encode(), b" ") if written.spaced else text
            found = written.write([token for group in groups for token in group.tokens])
            assert found == (b" " if written.spaced and found else b"") + text


@pytest.mark.parametrize("draft", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_a_text_may_be_read_in_any_pieces(target: str, draft: str) -> None:
    own, rng = KINDS[target], random.Random(f"{target} {draft}")
    reader = retokenizer(own, KINDS[draft])
    for _ in range(40):
        tokens = own(random_text(rng)).input_ids
        whole, end = reader.read(tokens, Open())
        parts, left, at = [], Open(), 0
        while at < len(tokens):
            step = rng.randint(1, 4)
            groups, left = reader.read(tokens[at : at + step], left)
            parts, at = parts + groups, at + step
        assert parts == whole and left == end
        assert sum(group.length for group in whole) + end.length == len(tokens)


def test_words_are_read_as_the_draft_s_own_tokenizer_reads_them() -> None:
    """Where both split a text into the same words, nothing tells what is read from the whole text anew."""
    reader = retokenizer(KINDS["byte-level"], KINDS["smaller"])
    text = "The little dogs ran to the other house"
    assert read(reader, KINDS["byte-level"](text).input_ids) == KINDS["smaller"](text).input_ids
    reader = retokenizer(KINDS["byte-level"], KINDS["sentencepiece"])
    tokens = KINDS["byte-level"](text).input_ids
    assert [*reader.opening, *read(reader, tokens)] == KINDS["sentencepiece"](text).input_ids


def test_a_character_of_several_tokens_is_read_once_it_is_whole() -> None:
    own, draft = KINDS["smaller"], KINDS["sentencepiece"]
    reader, tokens = retokenizer(own, draft), own("a😀b").input_ids
    assert len(tokens) == 6
    groups, left = reader.read(tokens[:3], Open())
    assert [group.length for group in groups] == [1] and left.length == 2
    assert [draft.convert_ids_to_tokens(i) for i in reader.unfinished(left)] == ["<0xF0>", "<0x9F>"]
    groups, left = reader.read(tokens[3:], left)
    assert [group.length for group in groups] == [4, 1] and left == Open(begun=True)
    assert draft.decode([token for group in groups for token in group.tokens]) == "😀b"


def test_bytes_that_are_no_character_hold_nothing_up() -> None:
    own = KINDS["smaller"]
    reader = retokenizer(own, KINDS["sentencepiece"])
    byte = {text: i for i, text in reader.common.target.spelled.items()}
    tokens = [byte[b"a"], byte[b"\xff"], byte[b"\x9f"], byte[b"\xe4"], byte[b"b"]]
    groups, left = reader.read(tokens, Open())
    assert left == Open(begun=True) and all(group.is_spelled for group in groups)
    assert reader.common.draft.write([t for group in groups for t in group.tokens]) == b" a\xff\x9f\xe4b"


def test_special_tokens_are_read_by_their_part_in_the_text() -> None:
    chat, plain = KINDS["chat"], KINDS["sentencepiece"]
    text = "<|im_start|>user\nthe dog<|im_end|>\n"
    reader = retokenizer(chat, plain)
    found = plain.convert_ids_to_tokens(read(reader, chat(text).input_ids))
    assert "</s>" in found and found[-1] == "<0x0A>"  # the end of a message is the end of a text
    same = retokenizer(chat, byte_level(450, chat=True))
    assert byte_level(450, chat=True).decode(read(same, chat(text).input_ids)) == text
    # A text that only looks like one is text.
    groups, _ = reader.read(chat("</s>", add_special_tokens=False).input_ids, Open(begun=True))
    assert plain.eos_token_id not in [token for group in groups for token in group.tokens]


def test_the_token_that_opens_a_text_is_read_once() -> None:
    llama = KINDS["sentencepiece"]
    reader = retokenizer(llama, sentencepiece(350))
    tokens = llama("the dog").input_ids
    assert tokens[0] == llama.bos_token_id
    assert [*reader.opening, *read(reader, tokens)] == sentencepiece(350)("the dog").input_ids


def test_a_text_that_the_draft_cannot_spell_is_told() -> None:
    reader = retokenizer(byte_level(400), strings("a", "b", " ", "ab", merges=(("a", "b"),)))
    own = byte_level(400)
    groups, _ = reader.read(own("ab a").input_ids, Open())
    assert all(group.is_spelled for group in groups)
    groups, _ = reader.read(own("ab dog").input_ids, Open())
    assert not all(group.is_spelled for group in groups)


def test_a_text_that_the_draft_s_tokenizer_changes_is_told() -> None:
    reader, own = retokenizer(byte_level(500), lowercasing(330)), byte_level(500)
    for text, spells in (("  DOGS", True), ("SELECT COUNT", False), ("dogs ran too", True)):
        groups, _ = reader.read(own(text).input_ids, Open(begun=True))
        assert all(group.is_spelled for group in groups) == spells, text
