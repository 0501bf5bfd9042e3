"""Prompts -> token ids of fixed length; the only importer of tokenizers and ftfy."""

import html
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import tokenizers

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def clean(prompt: str) -> str:
  """The prompt as Wan reads it: mended encoding, HTML entities resolved twice, single spaces."""
  mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return re.sub(r"\s+", " ", mended).strip()


class Tokenizer:
  """A tokenizer.json file that pads with id 0 and ends each prompt with `</s>`.

  Raises ValueError when the file is missing, is not a tokenizer, or appends no `</s>`.
  """

  def __init__(self, path: str | Path) -> None:
    try:
      text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(
        f"tokenizer {str(path)!r} cannot be read ({error}): give the tokenizer.json of the "
        "bundle, or convert the checkpoint again."
      ) from error
    try:
      model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception
      raise ValueError(
        f"tokenizer {str(path)!r} is damaged or not a tokenizer.json ({error}): copy it "
        "again from its source, or convert the checkpoint again."
      ) from error
    model.no_truncation()
    model.no_padding()
    eos, pad = model.token_to_id(EOS), model.token_to_id(PAD)
    if pad != 0 or eos is None or model.encode("").ids != [eos]:
      raise ValueError(
        f"tokenizer {str(path)!r} has {PAD}={pad}, {EOS}={eos} and reads '' as "
        f"{model.encode('').ids}, wanted {PAD}=0 and '' read as [{EOS}]: use the "
        "tokenizer.json that belongs to the text encoder."
      )
    self._model = model
    self._eos: int = eos
    self._unknown: int | None = model.token_to_id(UNKNOWN)

  @property
  def vocab(self) -> int:
    """Number of ids; the embedding of the text encoder has at least so many rows."""
    return self._model.get_vocab_size()

  def encode(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """R prompts -> ids R X int32 and mask R X bool (True = token), X = length.

    Each prompt is cleaned first and ends with `</s>`, which is all there is of an empty prompt.
    A prompt over the limit is cut before its `</s>`; what was cut, and words the tokenizer does
    not know, are told by one UserWarning each. Raises ValueError for length < 1.
    """
    if isinstance(prompts, str):
      raise ValueError(f"prompts is one string, {prompts!r}: give a list, [{prompts!r}].")
    if length < 1:
      raise ValueError(f"length={length} text tokens, wanted at least 1 (the {EOS}).")
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    cut: list[str] = []
    unknown: set[str] = set()
    for row, prompt in enumerate(map(clean, prompts)):
      read = self._model.encode(prompt)
      tokens = list(read.ids)
      unknown.update(
        prompt[start:end]
        for token, (start, end) in zip(tokens, read.offsets, strict=True)
        if token == self._unknown
      )
      if len(tokens) > length:
        tail = prompt[read.offsets[length - 1][0] :].strip()
        start = textwrap.shorten(prompt, 40, placeholder=" ...")
        cut.append(f"{start!r} has {len(tokens)} tokens, lost {tail!r}")
        tokens = [*tokens[: length - 1], self._eos]
      ids[row, : len(tokens)] = tokens
      mask[row, : len(tokens)] = True
    if cut:
      warnings.warn(
        f"the model reads {length} text tokens: {'; '.join(cut)}. Shorten the prompt.",
        stacklevel=2,
      )
    if unknown:
      words = ", ".join(map(repr, sorted(unknown)))
      warnings.warn(
        f"the tokenizer does not know {words} and reads {UNKNOWN}. Use other words.",
        stacklevel=2,
      )
    return ids, mask

  def pieces(self, prompt: str, length: int) -> list[str]:
    """What each of the tokens that `encode` makes of a prompt stands for, the `</s>` last.

    Joined, all but the `</s>` are the cleaned prompt, or the start of it that has room: a piece
    holds the space before it, and is "" where the next token stands for the same character. In the
    states of the text, and in keys and maps made of them, place x is that of piece x; what lies
    behind the last is padding.
    """
    if not isinstance(prompt, str):
      raise ValueError(f"prompt={prompt!r}, wanted one text: ask for each prompt by itself.")
    count = int(self.encode([prompt], length)[1].sum()) - 1
    cleaned = clean(prompt)
    offsets = [*self._model.encode(cleaned).offsets[:-1], (len(cleaned), len(cleaned))]
    # the mark of a word's start has the place of its first character, which is the next token's
    stops = (min(end, start) for (_, end), (start, _) in itertools.pairwise(offsets))
    cuts = itertools.accumulate(stops, max, initial=0)
    return [*[cleaned[a:b] for a, b in itertools.pairwise(cuts)][:count], EOS]


def train_word_tokenizer(prompts: Iterable[str]) -> str:
  """The text of a tokenizer.json for small models: lower-case words and single punctuation marks.

  pad = 0, eos = 1 (appended), unknown = 2, then the words of `prompts` in alphabetical order: the
  same set of prompts gives the same text.
  """
  normalizer = tokenizers.normalizers.Lowercase()
  splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
  words = {
    word
    for prompt in prompts
    for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(prompt)))
  }
  vocab = {word: place for place, word in enumerate([PAD, EOS, UNKNOWN, *sorted(words)])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN))
  model.normalizer = normalizer
  model.pre_tokenizer = splitter
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"$A {EOS}", special_tokens=[(EOS, vocab[EOS])]
  )
  return model.to_str(pretty=True)
