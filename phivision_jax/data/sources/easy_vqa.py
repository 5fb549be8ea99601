"""easy-VQA: questions about one coloured shape in a 64x64 image, as records in memory; the demo's data.

The images are part of the package ``easy_vqa`` and are read from it; this project has none of its data.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from phivision_jax.data.records import Record
from phivision_jax.data.shuffle import permutation


def easy_vqa(
    split: Literal["train", "test"], *, questions_per_record: int = 1, seed: int = 0, max_images: int | None = None
) -> list[Record]:
    """The questions of one split, each exactly once: 38,575 on 4,000 images (train), 9,673 on 1,000 (test).

    Args:
      split: "train" or "test".
      questions_per_record: questions about one image in one conversation (the last record of an image may have
        fewer). An answer sees the questions and answers before it, so scoring needs 1.
      seed: shuffles the questions of each image before they are grouped; one question per record keeps their order.
      max_images: only the first images, for quick tests.

    Raises:
      ModuleNotFoundError: when the package is not installed.
    """
    try:
        import easy_vqa as package
    except ModuleNotFoundError:
        raise ModuleNotFoundError("easy-VQA needs its package: pip install easy-vqa") from None
    if questions_per_record < 1:
        raise ValueError(f"questions_per_record must be at least 1, not {questions_per_record}")
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits 'train' and 'test', not {split!r}")
    questions, paths = (getattr(package, f"get_{split}_{part}")() for part in ("questions", "image_paths"))
    by_image: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for question, answer, image in zip(*questions, strict=True):
        by_image[image].append((question, answer))
    records = []
    for image, pairs in sorted(by_image.items())[:max_images]:
        content = Path(paths[image]).read_bytes()
        if questions_per_record > 1:
            pairs = [pairs[i] for i in permutation(len(pairs), seed, image)]
        for first in range(0, len(pairs), questions_per_record):
            messages = []
            for question, answer in pairs[first : first + questions_per_record]:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            messages[0]["content"] = "<image>\n" + messages[0]["content"]
            id = f"{split}/{image:04d}/{first:02d}"
            records.append(Record(id, f"easy_vqa/{split}", (content,), tuple(messages), "nothink"))
    return records


def question_only_baseline(train: Sequence[Record], test: Sequence[Record]) -> float:
    """Accuracy on ``test`` of answering each question with its most frequent answer in ``train``, without the images.

    A question that is not in ``train`` gets the most frequent answer overall. Of equally frequent answers the first
    counts.
    """
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    overall = collections.Counter(answer for _, answer in _pairs(train))
    for question, answer in _pairs(train):
        seen[question][answer] += 1
    if not (pairs := _pairs(test)) or not overall:
        raise ValueError("the baseline needs at least one question in each of train and test")
    return sum(answer == seen.get(q, overall).most_common(1)[0][0] for q, answer in pairs) / len(pairs)


def _pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Question and answer of each turn, without the image marker."""
    texts = [message["content"].removeprefix("<image>\n") for record in records for message in record.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))
