"""Makes ``tokenizer.json`` beside it, byte for byte the same each time: ``python -m phivision_jax.text.small.make``.

512 tokens: 256 bytes, 247 merges learned from the sentences below, 9 control tokens under the names they have in Phi-4.
The words of questions about simple pictures become one token each, alone and after a space, so that a tiny model spends
its columns on the picture. The control tokens lie at the top, ordered so that begin, end and padding are 507, 508 and
509, the ids in the configurations of tiny test checkpoints with a vocabulary of 512.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phivision_jax.text.tokenizer import END_THINK, EOS, NOTHINK, PAD, THINK

VOCAB_SIZE = 512
CONTROL_TOKENS = (NOTHINK, "<|im_start|>", "<|im_sep|>", "<|endofprompt|>", "<|endoftext|>", EOS, PAD)
# Not marked special: an answer's thoughts stay readable when it is decoded.
THOUGHT_TOKENS = (THINK, END_THINK)

# How Phi-4 cuts text before merging (the pattern of OpenAI's cl100k vocabulary): words keep the space before them,
# numbers come in threes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ANSWERS = "yes no circle rectangle triangle red green blue black gray teal brown yellow"
QUESTION_WORDS = "what is the there color shape does image contain not in of present how many which are"
ROLES = "user assistant system"
SENTENCES = """
what color is the shape? what is the color of the shape? what shape is in the image? what shape is present?
what shape does the image contain? is there a circle in the image? is there not a triangle in the image?
does the image contain a red shape? does the image not contain a rectangle? is no green shape present?
What color is the shape? Is there a blue shape? How many shapes are there? Which one is larger? Where is it?
Answer with one word. Describe the picture. It shows a small yellow circle on a dark gray ground, to the left of it
a brown rectangle, and above both a teal triangle. There are two or three of them; the first is at the top, the
second below. Think about what you see, then say which of these words fits best and why. The answer is yes, not no.
The picture has no text in it, but a line, a square and some numbers: 0 1 2 3 4 5 6 7 8 9 10 12 20 100.
"""


def build() -> str:
    """The text of ``tokenizer.json``.

    The words come without a space far more often than with one. So each is first merged out of its letters, then with
    the space before it: one merge more, where the other order would need a second chain of merges for " word".
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
    (Path(__file__).parent / "tokenizer.json").write_text(build(), encoding="utf-8")
