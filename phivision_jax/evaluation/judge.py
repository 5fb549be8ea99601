"""A judge: another model, behind an OpenAI endpoint, that decides about answers where a benchmark's rule asks it."""

import dataclasses

from phivision_jax.evaluation.reply_cache import ReplyCache, cache_key
from phivision_jax.evaluation.task import fingerprint
from phivision_jax.inference.requests import Generator, Request

MAX_NEW_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model that answers prompts; equal prompts are asked once. Safe to use from several threads."""

    generator: Generator
    name: str
    """As in results."""
    identity: str
    """The model in keys of the cache."""
    cache: ReplyCache | None = None

    def ask(self, prompt: str) -> str:
        """The judge's answer.

        Raises:
          OSError: when the endpoint does not answer.
          ValueError: when it refuses the prompt.
        """
        request = Request(prompt, max_new_tokens=MAX_NEW_TOKENS)
        key = cache_key(self.identity, request.mode, fingerprint(request))
        if self.cache and (known := self.cache.get(key)):
            return known.answer
        ((reply,),) = self.generator.generate([request])
        if self.cache:
            self.cache.put(key, reply)
        return reply.answer
