"""Build ``phivision_jax/text/small/tokenizer.json`` reproducibly: ``python -m tests.support.small_tokenizer``.

512 tokens: 256 bytes, 247 merges learned from ``small_tokenizer.txt`` and the words below, and 9 control tokens with
their names in Phi-4. The words of questions about simple images become one token each, alone and after a space, so that
a tiny model spends its positions on the image. The control tokens come last, ordered so that begin, end and padding are
507, 508 and 509, the ids in the configurations of tiny test checkpoints with a vocabulary of 512.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phivision_jax.text.tokenizer import END_THINK, EOS, NOTHINK, PAD, THINK
from tests.support.paths import ROOT

FILE = ROOT / "phivision_jax" / "text" / "small" / "tokenizer.json"
VOCAB_SIZE = 512
CONTROL_TOKENS = (NOTHINK, "<|im_start|>", "<|im_sep|>", "<|endofprompt|>", "<|endoftext|>", EOS, PAD)
# Not marked special: an answer's thoughts stay readable when it is decoded.
THOUGHT_TOKENS = (THINK, END_THINK)

# Phi-4's pre-tokenization (the pattern of OpenAI's cl100k vocabulary): words keep the space before them, numbers are
# split into threes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ANSWERS = "yes no circle rectangle triangle red green blue black gray teal brown yellow"
QUESTION_WORDS = "what is the there color shape does image contain not in of present how many which are"
ROLES = "user assistant system"
SENTENCES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")


def build() -> str:
    """The text of ``tokenizer.json``.

    In the corpus the words come without a space far more often than with one. So each is first merged from its letters,
    then with the space before it: one further merge, where the other order would need a second chain for " word".
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    words = f"{ANSWERS} {QUESTION_WORDS}".split()
    alone = [*words, *ROLES.split()]
    corpus = [word for word in alone for _ in range(1000)] + [f" {word}" for word in words for _ in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(THOUGHT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*corpus, *SENTENCES.splitlines() * 10], trainer)
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False) for token in THOUGHT_TOKENS])
    return backend.to_str(pretty=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
