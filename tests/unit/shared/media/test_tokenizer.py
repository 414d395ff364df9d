"""The tokenizer: any text comes back, and special tokens keep their ids."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from shared.errors import ConfigError
from shared.media.tokenizer import (
    EVENT_TOKEN,
    group_events,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
)
from shared.recipe import PAD_TOKEN

CORPUS = ("the cat sat on the mat", "the dog sat on the log", "wörld ☃", "I reach for the cup")
TOKENIZER = train_tokenizer(CORPUS, vocab_size=300)
FROZEN_IDS = [1, 259, 287, 267, 266, 261, 222, 289, 292]
FROZEN_SHA256 = "45fb23a77be65e9dd155b927b4dc79fd1f6f7f57df247c6103174c5ced55e97b"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=UNICODE)
def test_any_text_comes_back_to_the_byte(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids).encode() == text.encode()
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@pytest.mark.parametrize("text", ["<pad>", "<event>", "a <pad><event> b", "<pad", "\x00\r\n\t"])
def test_text_that_spells_a_special_token_stays_text(text):
    ids = TOKENIZER.encode(text)
    assert ids[0] == EVENT_TOKEN
    assert not {PAD_TOKEN, EVENT_TOKEN} & set(ids[1:])
    assert TOKENIZER.decode(ids) == text


def test_the_first_tokens_are_pad_and_event():
    vocabulary = json.loads(TOKENIZER.json)["model"]["vocab"]
    assert (vocabulary["<pad>"], vocabulary["<event>"]) == (0, 1) == (PAD_TOKEN, EVENT_TOKEN)


def test_every_event_begins_with_the_event_token():
    assert TOKENIZER.encode("") == [EVENT_TOKEN]
    assert TOKENIZER.encode("cat")[0] == EVENT_TOKEN


def test_pad_event_and_unknown_ids_decode_to_nothing():
    ids = [0, *TOKENIZER.encode("cat"), 0, 1, 10**6, -1]
    assert TOKENIZER.decode(ids) == "cat"


def test_merges_are_learned():
    assert len(TOKENIZER.encode("the the the")) < len(b"the the the")


def test_a_long_event_is_tokenized_whole():
    text = "ab " * 50_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_texts_does_not_matter(seed):
    texts = list(CORPUS)
    random.Random(seed).shuffle(texts)
    assert train_tokenizer(texts, vocab_size=300).json == TOKENIZER.json


def test_without_any_text_every_byte_is_a_token():
    tokenizer = train_tokenizer([], vocab_size=1000)
    assert tokenizer.vocab_size == 2 + 256
    assert tokenizer.decode(tokenizer.encode("any text ☃")) == "any text ☃"


def test_the_vocabulary_stays_within_its_bound():
    assert train_tokenizer(CORPUS, vocab_size=270).vocab_size == 270


def test_the_tokenizer_of_a_fixed_corpus_is_frozen():
    # Changes when `tokenizers` learns other merges or writes other JSON, or when train_tokenizer
    # does. Sets keep the tokenizer they have; what breaks is that the same sessions, built anew
    # elsewhere, get other tokens, so that models trained on them don't fit.
    ids = TOKENIZER.encode("the cat sat on the wörld ☃")
    frozen = hashlib.sha256(TOKENIZER.json.encode()).hexdigest()
    assert (ids, frozen) == (FROZEN_IDS, FROZEN_SHA256)
    assert TOKENIZER.sha256 == frozen


def foreign(special: list[str]) -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special))
    return inner.to_str()


@pytest.mark.parametrize("special", [[], ["<event>", "<pad>"], ["<s>", "</s>"]])
def test_a_tokenizer_with_other_first_tokens_is_refused(special):
    with pytest.raises(ConfigError, match=r"mine\.json: token 0 must be <pad>"):
        parse_tokenizer(foreign(special), origin="mine.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", "no json", '{"model": 3}', "[" * 10_000])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.json"):
        load_tokenizer(path)


def test_binary_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "mine.json"
    for content in (None, b"\xff\xfe\x00"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"mine\.json"):
            load_tokenizer(path)


def test_truncation_padding_and_extra_marks_of_a_given_tokenizer_are_off(tmp_path):
    values = json.loads(TOKENIZER.json)
    values["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    values["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<event>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<event>": {"id": "<event>", "ids": [1], "tokens": ["<event>"]}},
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    text = "the cat sat on the mat"
    assert load_tokenizer(path).encode(text) == TOKENIZER.encode(text)


def test_events_start_at_the_event_mark_and_after_silence():
    cat, dog = TOKENIZER.encode("cat")[1:], TOKENIZER.encode("dog")[1:]
    tokens = [EVENT_TOKEN, *cat, EVENT_TOKEN, *dog, 0, 0, *cat, 0]
    times_s = [0.1 * (i + 1) for i in range(len(tokens))]
    starts = [0, 1 + len(cat), 4 + len(cat) + len(dog)]
    events = group_events(tokens, times_s, TOKENIZER)
    assert [e["text"] for e in events] == ["cat", "dog", "cat"]
    assert [e["timestamp"] for e in events] == [round(times_s[i], 6) for i in starts]
    assert [e["tokens"] for e in events] == [[EVENT_TOKEN, *cat], [EVENT_TOKEN, *dog], cat]


def test_silence_is_no_event():
    assert group_events([0, 0, 0], [0.1, 0.2, 0.3], TOKENIZER) == []
