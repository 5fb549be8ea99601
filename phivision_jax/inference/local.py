"""The local generator: an engine on the devices of a model, driven by the caller or by a thread of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from phivision_jax.inference.requests import Event, Reply, Request


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Stop generating; each sample that is not finished ends with a reply "cancelled". Safe from any thread."""
        ...


class LocalGenerator:
    """A ``Generator`` on a model in this process."""

    def submit(self, request: Request, on_event: Callable[[Event | Exception], None]) -> Ticket:
        """Queue a request, from any thread.

        Args:
          on_event: called on the engine's thread with each ``Delta`` and ``Reply``, or with the exception that ended
            the engine; it must return quickly.

        Raises:
          ValueError: for a request that cannot be answered, such as a prompt that is too long.
        """
        raise NotImplementedError

    def generate(
        self, requests: Sequence[Request], advance: Callable[[int], None] = lambda _: None
    ) -> list[list[Reply]]:
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[Event]:
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Numbers for monitoring: slots, active, waiting, requests, cancelled, prompt_tokens, generated_tokens, …"""
        raise NotImplementedError

    def close(self) -> None:
        """End the thread; requests in flight end with "cancelled"."""
        raise NotImplementedError
