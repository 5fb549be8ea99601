"""Prompts to a judge: to extract an answer, or to compare it with the reference; and what its replies mean.

The prompts of VLMEvalKit have examples besides; a report names the judge, and these prompts are part of it.
"""

from phivision_jax.evaluation.scoring import Score

LONGEST = 20_000
"""Characters of an answer that a judge reads, the last ones: an answer ends with its result."""


def extraction(question: str, prediction: str) -> str:
    """The request to extract the answer."""
    return (
        "Below are a question and the response of a model. Reply with the final answer of the response and nothing "
        "else: the letter of an option where there are options, else the number, list or expression as it is written "
        "there. Reply with null if the response has no final answer.\n\n"
        f"Question:\n{question}\n\nResponse:\n{prediction[-LONGEST:]}\n\nFinal answer:"
    )


def extracted(reply: str) -> str:
    """The extracted answer; "" for none."""
    text = reply.strip().removeprefix("Final answer:").strip()
    return "" if text.lower() in ("null", "none") else text


def comparison(question: str, prediction: str, answer: str) -> str:
    """The request to compare an answer with the reference."""
    return (
        "Below are a question, its reference answer and the response of a model. Decide whether the final answer of "
        "the response is consistent with the reference. Equal values in other units or forms are consistent, such as "
        "0.5 m and 50 cm; of a multiple-choice question the letter or the text of the option counts. A response "
        "without a final answer is not consistent. Reply with 1 for consistent or 0 for not consistent, and nothing "
        f"else.\n\nQuestion:\n{question}\n\nReference answer:\n{answer}\n\nResponse:\n{prediction[-LONGEST:]}\n\n"
        "Judgement:"
    )


def verdict(reply: str) -> Score:
    """The score of a comparison; a reply that is neither 0 nor 1 scores 0."""
    text = reply.strip().removeprefix("Judgement:").strip().rstrip(".")
    if text not in ("0", "1"):
        return Score(0.0, None, "the judge replied with neither 0 nor 1")
    return Score(float(text), None, f"the judge found it {'' if text == '1' else 'not '}consistent")
