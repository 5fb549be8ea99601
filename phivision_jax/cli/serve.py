"""``phivision serve``: a server with OpenAI's chat API and a page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from phivision_jax.serving.protocol import Limits


def serve(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    hosts: Annotated[tuple[str, ...], arg(metavar="NAME...")] = (),
    limits: OmitArgPrefixes[Limits] = Limits(),  # noqa: B008
    shutdown_seconds: int = 30,
    slots: int = 8,
    length: int = 8192,
    weights: Literal["int8"] | None = None,
    cache: Literal["int8"] | None = None,
    warm_up: bool = True,
    mesh: Annotated[dict[str, int], arg(metavar="AXIS SIZE ...")] = {},  # noqa: B006
) -> None:
    """Answer requests of OpenAI's chat API (/v1/chat/completions), and show a page for people at /.

    Nothing is fetched and no file is read for a request: images are data: URIs. There is no authentication.

    Args:
        checkpoint: Hugging Face directory, checkpoint of this project or run (also gs://…); with [hub] also an id.
        host: Address to listen on; the default accepts connections from this machine only, 0.0.0.0 from any.
        port: Port to listen on; 0 takes a free one.
        name: Name of the model for clients; default: the last part of CHECKPOINT.
        hosts: Names under which clients reach the server, beside localhost and IP addresses; * for any.
        limits: Limits for clients.
        shutdown_seconds: Seconds that requests have to finish after SIGTERM or Ctrl-C; then they are cancelled.
        slots: Number of sequences that are generated at the same time.
        length: Tokens of a slot, prompt and answer together; at most the model's positions.
        weights: int8: the matrices in 8 bits, half the memory of bfloat16.
        cache: int8: keys and values in 8 bits.
        warm_up: Compile everything before the first request.
        mesh: Sizes of the mesh axes to shard over, as fsdp 4 tensor 2; default: all devices of this machine.
    """
    import contextlib
    import logging
    import socket

    import uvicorn

    import phivision_jax
    from phivision_jax.inference.local import LocalGenerator
    from phivision_jax.io import progress
    from phivision_jax.serving.app import create_app
    from phivision_jax.serving.chats import Chats

    def token_text(index: int) -> str:
        # A vocabulary padded beyond its tokenizer has ids without a text.
        known = index < processor.tokenizer.vocab_size
        return processor.tokenizer.decode([index], skip_special=False) if known else ""

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:  # before the weights are read
        model, processor = phivision_jax.load(checkpoint, mesh=mesh, weights=weights)
        generator = LocalGenerator(model, processor, slots=slots, length=length, cache_dtype=cache)
        if warm_up:
            with progress.bar("compile", len(generator.engine.shapes())) as advance:
                generator.warm_up(advance)
        generator.start()
        chats = Chats(generator, name or checkpoint.rstrip("/").rpartition("/")[2], token_text, limits)
        settings: dict[str, Any] = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off"}
        settings |= {"log_config": None, "log_level": "critical", "timeout_graceful_shutdown": shutdown_seconds}
        server = uvicorn.Server(uvicorn.Config(create_app(chats, hosts), **settings))
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, force=True)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(f"{chats.name}: a page at {address}, the API at {address}/v1; Ctrl-C ends the server", flush=True)
        with contextlib.closing(generator), contextlib.suppress(KeyboardInterrupt):
            server.run([listening])  # after its shutdown it raises the signal again
