"""Conversations to token ids and labels, through the checkpoint's own chat template.

    messages   user "<image>\\nwhat shape?"                            assistant "circle"
    rendered   <|im_start|>user<|im_sep|><image>\\nwhat shape?<|im_end|><|im_start|>assistant<|im_sep|>circle<|im_end|>
    chunks     |-----------------------|       |-------------------------------------------------------------------|
    ids        im_start user im_sep      -200   \\n what shape ? im_end im_start assistant im_sep circle im_end
    labels                                                                                       circle im_end

The text is rendered first and split at ``<image>`` afterwards. Each chunk is tokenised separately, as in the released
code: ``>`` and a line break are one token, so the unsplit string would give other ids.

A message is a dict with ``role`` (system, user or assistant) and ``content``: a string with a literal ``<image>`` for
each image, or a list of parts, ``{"type": "text", "text": ...}`` and ``{"type": "image"}``, the latter with or without
the image under one of ``IMAGE_KEYS`` (as ``images.sources`` takes it). Other names of types are in ``_PART_TYPES``. An
assistant message with ``"weight": 0`` is context without loss. Its thoughts may have a field of their own
(``THOUGHT_KEYS``) or be a part of that type; they become ``<think>thoughts</think>`` before the answer. ``<\\image>``
is the text "<image>" and no image, in the same way for img, video, audio and box, also with a number or in capitals
(``ESCAPE``); further backslashes are text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from phivision_jax.images.sources import IMAGE_KEYS
from phivision_jax.text.constants import IGNORE, IMAGE_MARKER, IMAGE_TOKEN, ROLES, THOUGHT_KEYS, Mode, PromptMode
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK, Tokenizer

type Message = Mapping[str, Any]

ESCAPE = re.compile(r"<(\\)\\*(?:image|img|video|audio|box)s?(?![a-z])", re.IGNORECASE)
"""A marker that is meant as text; group 1 is the backslash that encoding removes."""
# Tags around thoughts in the data of other models, in lower case.
_OTHER_NAMES = ("thinking", "thought", "thoughts", "reasoning", "reason", "cot", "scratchpad", "seed:think")
_OTHER_TAGS = {THINK: END_THINK} | {f"<{name}>": f"</{name}>" for name in _OTHER_NAMES} | {
    "[think]": "[/think]", "◁think▷": "◁/think▷", "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|start_thinking|>": "<|end_thinking|>", "<|think|>": "<|/think|>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
}  # fmt: skip
# Tags of other models around the answer itself, which are removed.
_AROUND = re.compile(
    r"^\s*<\|(?:begin_of_solution|start_response|channel\|>final<\|message|start\|>assistant(?=<\|channel))\|?>?\s*"
    r"|\s*<\|(?:end_of_solution|end_response|return|end)\|>\s*$", re.IGNORECASE
)  # fmt: skip
# A tag that begins an answer and is named like thoughts, or the end of thoughts without a beginning.
_UNKNOWN = re.compile(
    r"^\s*(?:<think>)?(?:<\|?\s*(?!think>)(?:[\w-]*[_:-])?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|rationale|"
    r"monologue|analysis|ponder|unused94)(?:[_:-][\w:-]*)?(?:\s[^<>]*)?\|?>|\[reasoning\]|<details type=.reasoning.>)"
    r"|</(?:\w*thinking|thoughts?|reasoning|seed:think)>|\[/think\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE
)  # fmt: skip
_PART_TYPES = {"input_text": "text", "output_text": "text", "input_image": "image", "image_url": "image"}
_ANSWER_BEGINS: dict[PromptMode, str] = {"think": THINK, "nothink": NOTHINK, "auto": ""}


class MessageError(ValueError):
    """A message that cannot be encoded.

    Attributes:
      reason: "fields" for the wrong form; "role"; "control-token" for content with a control token in it, which the
        model would obey; "mode" for an answer that contradicts its mode.
    """

    def __init__(self, reason: Literal["fields", "role", "control-token", "mode"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnmarkedTemplateError(ValueError):
    """A template that does not mark the assistant's text, so that no label can be derived."""


def encode(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    mode: PromptMode = "auto",
    generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """Encode a conversation as token ids and labels.

    Args:
      messages: see the module's docstring. Messages that the template drops (the released one drops system messages)
        are not encoded.
      mode: of a training example: in "nothink" no answer begins with ``<think>``; in "think" at least one does, and
        each that does contains ``</think>`` once. In both, every other answer contains neither tag and begins with the
        no-think token, which is added where it is missing. Of a prompt: "think" and "nothink" append the answer's first
        token. "auto" changes nothing.
      generation_prompt: end with the beginning of the assistant's next turn; such a prompt has no labels.

    Returns:
      The ids, with −200 (``IMAGE_TOKEN``) for each image, and the labels: the id itself where the token begins inside
      ``{% generation %}`` (the assistant's content and its end token) of an answer whose weight is not 0, otherwise
      −100 (``IGNORE``).

    Raises:
      MessageError: for a message that cannot be encoded. ``<think>`` and ``</think>`` are allowed in content, other
        control tokens are not: with them a user could end the turn.
      UnmarkedTemplateError: when labels are needed and the template marks no assistant text.
      ValueError: when the template fails, or there are weights and it does not mark one text per answer.
    """
    if mode not in get_args(PromptMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(PromptMode))}, not {mode!r}")
    plain, _ = flatten(messages)
    _refuse_control_tokens(plain, tokenizer.control_tokens)
    spans: list[tuple[int, int]] = []
    if generation_prompt:
        text, _ = template.render(plain, generation_prompt=True)
        text += _ANSWER_BEGINS[mode]
    else:
        _apply_mode(plain, mode)
        text, spans = template.render(plain)
        weights = [message.get("weight") for message in plain if message["role"] == "assistant"]
        if weights and not spans:
            raise UnmarkedTemplateError(
                "the chat template marks no assistant text, so there is nothing to learn from: in chat_template.jinja "
                "put {% generation %} and {% endgeneration %} around the assistant's content and its end token"
            )
        if 0 in weights and len(spans) != len(weights):
            problem = f"marks {len(spans)} texts for {len(weights)} answers: unclear which has weight 0"
            raise ValueError(f"the chat template {problem}")
        if 0 in weights:
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight != 0]
    has_loss = bytearray(len(text))
    for start, end in spans:
        has_loss[start:end] = b"\1" * (end - start)

    ids: list[int] = []
    labels: list[int] = []
    begin = 0
    for i, chunk in enumerate(text.split(IMAGE_MARKER)):
        if i:
            ids.append(IMAGE_TOKEN)
            labels.append(IGNORE)
            begin += len(IMAGE_MARKER)
        loss = has_loss[begin : begin + len(chunk)]
        begin += len(chunk)
        for escape in reversed([*ESCAPE.finditer(chunk)]) if "<\\" in chunk else ():
            backslash = escape.start(1)
            chunk = chunk[:backslash] + chunk[backslash + 1 :]
            del loss[backslash]
        chunk_ids, offsets = tokenizer.encode_with_offsets(chunk)
        ids += chunk_ids
        labels += [t if loss[start] else IGNORE for t, (start, _) in zip(chunk_ids, offsets, strict=True)]
    return ids, labels


def flatten(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Join the parts of each message's content.

    An image part becomes ``<image>`` and a line break, the form that the released model was trained on.

    Returns:
      Messages with string contents, and one entry per ``<image>`` in them: the image that its part holds, or None.

    Raises:
      MessageError: "fields" or "role", naming the message.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise MessageError("fields", "a conversation is a non-empty list of messages, each with a role and a content")
    plain: list[dict[str, Any]] = []
    images: list[Any] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise MessageError("fields", f"message {i} is not a dict with role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise MessageError("role", f"message {i} has role {role!r:.100}: it must be one of {', '.join(ROLES)}")
        if (weight := message.get("weight")) not in (None, 0, 1):
            raise MessageError("fields", f"message {i}: its weight is {weight!r:.100}: it must be 0 (no loss) or 1")
        if not isinstance(content, str | Sequence):
            raise MessageError("fields", f"message {i}: its content is {type(content).__name__}, not text or parts")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts: list[str] = []
        thoughts = [message[key] for key in THOUGHT_KEYS if message.get(key) not in (None, "")]
        message = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        for part in parts:
            kind = kind_of(part)
            if kind in THOUGHT_KEYS:
                thoughts.append(next((part[key] for key in (*THOUGHT_KEYS, "text", "content") if part.get(key)), ""))
            elif kind == "image":
                texts.append(IMAGE_MARKER + "\n")
                images.append(next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None))
            elif kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                images += [None] * part["text"].count(IMAGE_MARKER)
            else:
                problem = f"a part of its content is neither an image nor a text, its type is {kind!r:.100}"
                raise MessageError("fields", f"message {i}: {problem}")
        content = "".join(texts)
        if thoughts:
            content = _with_thoughts(content, thoughts, role, f"message {i}")
        plain.append({**message, "content": content})
    return plain, images


def kind_of(part: Any) -> Any:
    """The type of a part of a content: "image", "text", or another."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return _PART_TYPES.get(kind, kind) if isinstance(kind, str) else kind


def _with_thoughts(content: str, thoughts: Sequence[Any], role: str, where: str) -> str:
    """A content with thoughts that came apart from it before it; blank ones are none.

    Raises:
      MessageError: "fields" for anything but text; "mode" for different thoughts, or thoughts of a user.
    """
    texts = []
    for given in thoughts:
        given = given if isinstance(given, list) else [given]
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in given]
        if not all(isinstance(part, str) for part in parts):
            raise MessageError("fields", f"{where}: its thoughts are {given!r:.100}: they must be text")
        texts.append("".join(map(str, parts)).strip().removeprefix(THINK).removesuffix(END_THINK))
    head = content.lstrip()
    if head.startswith(THINK) and END_THINK in head:
        own, _, content = head.removeprefix(THINK).partition(END_THINK)
        texts.append(own)
    found = list({text.strip(): text for text in texts if text.strip()}.values())
    if len(found) > 1:
        raise MessageError("mode", f"{where} has two different texts as its thoughts: keep one of them")
    if found and role != "assistant":
        raise MessageError("mode", f"{where} has thoughts, but its role is {role}: only answers have them")
    return f"{THINK}{found[0]}{END_THINK}{content}" if found else content


def settle_answer(content: str) -> tuple[str, Mode | None]:
    """An answer with at most the model's own tag before it, and the mode that it shows, if any.

    Blank thoughts and the no-think token are removed and show "nothink". Thoughts in the tags of other models get the
    model's own, and white space before a tag is removed.

    Raises:
      MessageError: "mode" for a tag of another model that is not closed.
    """
    content, mode = _settle(_AROUND.sub("", content) if "<|" in content else content)
    if unknown := _UNKNOWN.search(content):
        raise MessageError("mode", f"an answer has {unknown[0]!r:.80}: write {THINK}thoughts{END_THINK} or reword it")
    return content, mode


def _settle(content: str) -> tuple[str, Mode | None]:
    head = content.lstrip()
    if head.startswith(NOTHINK):
        return head.removeprefix(NOTHINK), "nothink"
    start = head[:32].lower() if head[:1] in ("<", "[", "◁") else ""
    tag = next((tag for tag in _OTHER_TAGS if start.startswith(tag)), None) if start else None
    if tag is None:
        return content, None
    closed = re.search(re.escape(_OTHER_TAGS[tag]), head, re.IGNORECASE)
    if closed is None and tag != THINK:
        raise MessageError("mode", f"an answer begins with {tag}, but has no {_OTHER_TAGS[tag]}: close it or reword it")
    thoughts, rest = (head[len(tag) : closed.start()], head[closed.end() :]) if closed else (head[len(tag) :], None)
    rest = rest and _AROUND.sub("", rest)
    if rest is None or thoughts.strip():
        return THINK + thoughts + ("" if rest is None else END_THINK + rest), "think"
    return rest.lstrip(), "nothink"


def with_modes(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], Mode]:
    """A conversation as ``flatten`` gives it, with answers as ``settle_answer`` does, and the mode that they show."""
    plain, _ = flatten(messages)
    shown = []
    for message in plain:
        if message["role"] == "assistant":
            message["content"], mode = settle_answer(message["content"])
            shown.append(mode)
    return plain, "think" if "think" in shown else "nothink"


def _refuse_control_tokens(messages: Sequence[Message], control_tokens: Sequence[str]) -> None:
    for i, message in enumerate(messages):
        content = message["content"].removeprefix(NOTHINK if message["role"] == "assistant" else "")
        if token := next((t for t in control_tokens if t in content and t not in (THINK, END_THINK)), None):
            problem = f"contains the control token {token}: the model would obey it; reword it"
            raise MessageError("control-token", f"message {i} ({message['role']}) {problem}")


def _apply_mode(messages: list[dict[str, Any]], mode: PromptMode) -> None:
    """Make each answer begin with one mode tag, in place."""
    if mode == "auto":
        return
    thinks = False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content, problem = message["content"], ""
        begins, ends = content.startswith(THINK), content.count(END_THINK)
        if begins and (mode == "nothink" or ends != 1):
            problem = f"begins with {THINK} and has {ends} {END_THINK}"
        elif not begins and (THINK in content or ends):
            # In the middle of an answer, the model would learn a tag as the control token, against the answer's mode.
            tag = THINK if THINK in content else END_THINK
            problem = f"contains {tag} without beginning with {THINK}: reword an answer that only mentions the tag"
        elif not begins:
            message["content"] = NOTHINK + content.removeprefix(NOTHINK)
        thinks |= begins
        if problem:
            raise MessageError("mode", f"message {i}: mode is {mode}, but the answer {problem}")
    if mode == "think" and not thinks:
        raise MessageError("mode", f"mode is think, but no answer is {THINK} thoughts {END_THINK} answer")
