"""Prompts become ids of fixed length, and nothing is lost in silence."""

import json
import warnings

import numpy as np
import pytest
import tokenizers

from jax_videoreason.tokenizer import Tokenizer, clean, train_word_tokenizer

CORPUS = ["Move the red ball, left-most first.", "What is 3 &amp;amp; 4?"]
VOCABULARY = [
  "<pad>", "</s>", "<unk>", "&", ",", "-", ".", "3", "4", "?", "ball", "first", "is", "left",
  "most", "move", "red", "the", "what",
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
  file = tmp_path / "tokenizer.json"
  file.write_text(train_word_tokenizer(CORPUS), encoding="utf-8")
  return Tokenizer(file)


def words(ids):
  return [VOCABULARY[i] for i in ids]


@pytest.mark.parametrize(
  ("prompt", "wanted"),
  [
    ("  a\n\tb   c ", "a b c"),
    ("&amp;lt;b&amp;gt;", "<b>"),
    ("na\u00c3\u00afve", "na\u00efve"),
    ("a&nbsp;&nbsp;b", "a b"),
    ("\u624b\u6301 \u201cx\u201d", '\u624b\u6301 "x"'),
    ("", ""),
  ],
)
def test_clean(prompt, wanted):
  assert clean(prompt) == wanted


def test_ids_end_with_eos_and_are_padded_with_zero(tokenizer):
  ids, mask = tokenizer.encode(["move the RED ball", ""], 7)
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert words(ids[0]) == ["move", "the", "red", "ball", "</s>", "<pad>", "<pad>"]
  assert words(ids[1]) == ["</s>"] + ["<pad>"] * 6
  np.testing.assert_array_equal(mask, ids != 0)


def test_the_word_tokenizer_is_words_and_single_marks(tokenizer):
  assert tokenizer.vocab == len(VOCABULARY)
  ids, _ = tokenizer.encode(["left-most,first"], 6)
  assert words(ids[0]) == ["left", "-", "most", ",", "first", "</s>"]


def test_training_depends_on_the_set_of_prompts_alone():
  text = train_word_tokenizer(CORPUS)
  assert train_word_tokenizer([*reversed(CORPUS), CORPUS[0]]) == text
  assert json.loads(text)["model"]["vocab"] == {w: i for i, w in enumerate(VOCABULARY)}


def test_special_tokens_cannot_be_written_into_a_prompt(tokenizer):
  with pytest.warns(UserWarning, match="does not know"):
    ids, _ = tokenizer.encode(["</s> ball"], 8)
  assert words(ids[0]).count("</s>") == 1


def test_a_prompt_of_exactly_the_limit_is_not_cut(tokenizer):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    ids, mask = tokenizer.encode(["the red ball"], 4)
  assert mask.all() and words(ids[0])[-1] == "</s>"


def test_a_prompt_over_the_limit_is_cut_before_its_eos_and_the_loss_is_told(tokenizer):
  with pytest.warns(UserWarning, match=r"4 text tokens: 'move the red left.*' has 7.*'left-most'"):
    ids, mask = tokenizer.encode(["ball", "move  the red left-most"], 4)
  assert words(ids[1]) == ["move", "the", "red", "</s>"]
  assert mask[1].all()


def test_unknown_words_are_named(tokenizer):
  with pytest.warns(UserWarning, match=r"does not know 'Dog' and reads <unk>"):
    ids, _ = tokenizer.encode(["the Dog"], 3)
  assert words(ids[0]) == ["the", "<unk>", "</s>"]


def test_one_string_and_no_room_are_refused(tokenizer):
  with pytest.raises(ValueError, match=r"prompts is one string, 'ball': give a list"):
    tokenizer.encode("ball", 4)
  with pytest.raises(ValueError, match="length=0 text tokens"):
    tokenizer.encode(["ball"], 0)
  with pytest.raises(ValueError, match=r"prompt=\['ball'\], wanted one text"):
    tokenizer.pieces(["ball"], 4)


def test_pieces_are_the_text_of_each_token(tokenizer):
  assert tokenizer.pieces("  Move the   RED ball, left-most ", 20) == [
    "Move", " the", " RED", " ball", ",", " left", "-", "most", "</s>",
  ]  # fmt: skip
  assert tokenizer.pieces("", 4) == ["</s>"]
  with pytest.warns(UserWarning, match="does not know 'Dog'"):
    assert tokenizer.pieces("the Dog", 4) == ["the", " Dog", "</s>"]
  with pytest.warns(UserWarning, match="4 text tokens"):
    assert tokenizer.pieces("move the red ball", 4) == ["move", " the", " red", "</s>"]


@pytest.fixture
def unigram(tmp_path):
  """As the published models read: parts of words, and a mark where a word starts."""
  scores = {
    "<pad>": 0,
    "</s>": 0,
    "<unk>": -10,
    "\u2581": -2,
    "\u2581the": -3,
    "\u2581r": -3,
    "ed": -3,
  }
  model = tokenizers.Tokenizer(
    tokenizers.models.Unigram([*scores.items(), ("a", -5), ("b", -5)], unk_id=2)
  )
  split = tokenizers.pre_tokenizers
  model.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  file = tmp_path / "unigram.json"
  file.write_text(model.to_str(), encoding="utf-8")
  return Tokenizer(file)


@pytest.mark.parametrize(
  ("prompt", "wanted"),
  [
    ("the red", ["the", " r", "ed"]),
    ("ab the", ["", "a", "b", " the"]),
    ("red a", ["r", "ed", " ", "a"]),
  ],
)
def test_pieces_of_words_join_to_the_prompt(unigram, prompt, wanted):
  assert unigram.pieces(prompt, 9) == [*wanted, "</s>"]
  assert unigram.encode([prompt], 9)[1].sum() == len(wanted) + 1


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "cannot be read.*give the tokenizer.json of the bundle"),
    (b"\xff\xfe\x00", "cannot be read"),
    (b"", "damaged or not a tokenizer.json"),
    (b'{"model": {}}', "damaged or not a tokenizer.json"),
  ],
)
def test_a_missing_or_damaged_file_is_one_sentence(tmp_path, content, message):
  file = tmp_path / "tokenizer.json"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    Tokenizer(file)


def test_a_cut_off_file_is_damaged(tmp_path):
  file = tmp_path / "tokenizer.json"
  text = train_word_tokenizer(CORPUS)
  file.write_text(text[: len(text) // 2])
  with pytest.raises(ValueError, match="damaged"):
    Tokenizer(file)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
  settings = json.loads(train_word_tokenizer(CORPUS))
  settings["post_processor"] = None
  file = tmp_path / "tokenizer.json"
  file.write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=r"reads '' as \[\], wanted <pad>=0 and '' read as"):
    Tokenizer(file)


def test_truncation_stored_in_the_file_does_not_cut_in_silence(tmp_path):
  settings = json.loads(train_word_tokenizer(CORPUS))
  settings["truncation"] = {
    "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
  }  # fmt: skip
  file = tmp_path / "tokenizer.json"
  file.write_text(json.dumps(settings))
  ids, _ = Tokenizer(file).encode(["move the red ball"], 6)
  assert words(ids[0])[:5] == ["move", "the", "red", "ball", "</s>"]
