"""The engine: a model, the state of its generation, and the programs that change it, compiled for few shapes.

It places what the host made on the devices and nothing more; ``scheduler.py`` decides what to run.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.batch import Batch, RowShape
from phivision_jax.inference import kv_cache, programs, weights
from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.programs import Answering, Answers, Program, Row, State, Weights
from phivision_jax.inference.sampling import Chosen, Sampling
from phivision_jax.models.attention.cached import KV
from phivision_jax.models.phivision import PhiVision
from phivision_jax.rows import row_shape

ENDS = 32
"""Most pieces of prompts in a row."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A program and its sizes: (patches,) to encode; (tokens, context) to admit; (rows, entries read) to decode."""

    program: Literal["encode", "admit", "decode"]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.program} {' + '.join(f'{size:,}' for size in self.sizes)}"


def keep_compiled_programs() -> None:
    """Keep compiled programs, small ones too, in the user's cache directory, unless JAX has one or keeps none."""
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "phivision_jax" / "compiled"))
        least = "jax_persistent_cache_min_compile_time_secs"
        if getattr(jax.config, least) == 1.0:  # JAX's default
            jax.config.update(least, 0.2)


class Engine:
    """A model with slots for sequences.

    Args:
      model: its parameters may be on a mesh; of abstract ones on absent devices, the programs can be compiled only.
      slots: B, sequences that are generated at the same time; more if the mesh's "batch" does not divide them.
      length: tokens of a slot, prompt and answer together.
      chunk: T, most tokens of prompts per row.
      pool: vision tokens that are kept.
      cache_dtype: of keys and values; int8 halves the memory of bf16.
      stop_ids, think_id, end_think_id: as in ``programs.Program``.
      steps: tokens per slot and call of ``decode``.

    Attributes:
      shards: R, the number of rows that ``admit`` takes; slots r · B / R to (r + 1) · B / R - 1 are those of row r.
      compiled: how many programs have been compiled.
      trees: True if pieces of a row that begin alike may share positions (``programs.Row.last_query``); kernels for
        accelerators have no such mask.
    """

    def __init__(
        self,
        model: PhiVision,
        *,
        slots: int,
        length: int,
        chunk: int,
        pool: int,
        cache_dtype: Any,
        stop_ids: tuple[int, ...] = (),
        think_id: int = -1,
        end_think_id: int = -1,
        steps: int = 4,
    ) -> None:
        self.config, self.length, self.steps = model.config, length, steps
        graphdef, params = model.split()
        self.mesh = sharding.mesh_of(params)
        leaf = jax.tree.leaves(params)[0]
        self.absent = isinstance(leaf, jax.ShapeDtypeStruct)
        if not self.absent:
            keep_compiled_programs()
        self.platform = platform_of(leaf)
        separate = self.trees = self.platform == "cpu"
        self.dtype = model.decoder.dtype
        with self.in_force():
            self.shards = sharding.axis_size("batch")
            self.slots = slots = -(-slots // self.shards) * self.shards
            self.weights, layer, decode_dtype = weights.place(model, self.platform, slots)
        # The pieces of a tree are short.
        copied = BLOCK // 4 if self.trees else BLOCK
        ids = stop_ids, think_id, end_think_id
        self.program = Program(graphdef, layer, decode_dtype, jnp.dtype(cache_dtype), copied, *ids)
        # Blocks may end behind the last token in use, and tokens of slots that are not active go to the last entries.
        self.entries = -(-(length + max(BLOCK, steps) + steps) // BLOCK) * BLOCK
        # CPUs take as long for padding as for tokens.
        self.chunks = _sizes(BLOCK // 2, chunk, growth=2) if separate else _sizes(BLOCK, chunk)
        lengths = _sizes(4 * BLOCK, -(-length // BLOCK) * BLOCK)
        self.contexts = [0, *lengths]
        # As many small images as a row of prompts asks about are encoded together.
        self.patches = _sizes(2 * BLOCK, -(-max(model.config.max_patches, chunk) // BLOCK) * BLOCK)
        # On accelerators time follows the entries that are read, on CPUs the sequences that are computed.
        self.reads = lengths[-1:] if separate else lengths
        self.rows = _sizes(max(1, slots // 4), slots, growth=2) if separate and self.mesh is None else [slots]
        self.ends = min(ENDS, slots // self.shards)
        self.pool = pool
        self._compiled: dict[Shape, Any] = {}
        self.state: State = self._empty()

    # -- placing ------------------------------------------------------------------------------------------------------

    def in_force(self) -> contextlib.ExitStack:
        """The mesh and the rules under which programs are traced."""
        stack = contextlib.ExitStack()
        if self.mesh is not None:
            stack.enter_context(jax.set_mesh(self.mesh))
            stack.enter_context(sharding.generation_rules(self.config, self.mesh))
        return stack

    def update(self, model: PhiVision) -> None:
        """Generate with other weights of the same model; slots must be idle, and what they hold is forgotten."""
        with self.in_force():
            self.weights = weights.place(model, self.platform, self.slots)[0]

    def reset(self) -> None:
        """Begin with an empty state, for example after an error while one state was being replaced by the next."""
        del self.state  # there may be no room for two
        self.state = self._empty()

    def _abstract_state(self) -> State:
        cfg, B, D = self.config.decoder, self.slots, self.config.decoder.hidden_size
        dtype, H = self.program.cache_dtype, cfg.head_dim
        shape = (B, cfg.num_kv_heads, self.entries)
        scale = (*shape, 1) if dtype == jnp.int8 else None

        def kv(*lead: int) -> KV:
            def array(shape: tuple | None, dtype: Any) -> Any:
                return None if shape is None else jax.ShapeDtypeStruct((*lead, *shape), dtype)

            keys, scales = array((*shape, H), dtype), array(scale, jnp.float32)
            return KV(keys, keys, scales, scales)

        separate = self.program.layer is not None
        cache = [kv() for _ in range(cfg.num_layers)] if separate else kv(cfg.num_layers)
        i32, flag = (jax.ShapeDtypeStruct((B,), dtype) for dtype in (jnp.int32, jnp.bool))
        pool = jax.ShapeDtypeStruct((self.pool, D), self.dtype)
        return State(cache, pool, i32, i32, flag, jax.eval_shape(lambda: idle((B,))))

    def state_shardings(self, state: State, mesh: Mesh) -> State:
        """The sharding of every array of the state."""
        with self.in_force():
            cache = kv_cache.partition_specs(state.cache)
        specs = State(cache, *jax.tree.map(lambda x: PartitionSpec(), state[1:]))
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )

    def _empty(self) -> State:
        abstract = self._abstract_state()
        shardings = None if self.mesh is None else self.state_shardings(abstract, self.mesh)
        if self.absent:
            return sharding.abstract(abstract, shardings)
        zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)
        return zeros()

    def _place(self, tree: Any, *, split: bool) -> Any:
        """NumPy arrays as device arrays, split over rows or replicated."""
        if self.mesh is None:
            return tree
        with self.in_force():
            spec = sharding.row_sharding(self.mesh) if split else sharding.replicated(self.mesh)
        if self.absent:
            return sharding.abstract(tree, spec)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, spec, x.__getitem__), tree)

    # -- running ------------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch, places: np.ndarray) -> None:
        """Encode images; ``programs.encode``."""
        shape = Shape("encode", (batch.patches.shape[1] * batch.patches.shape[2],))
        self.state = self._run(shape, self._place((batch, places), split=True))

    def admit(self, row: Row) -> Chosen:
        """Prefill and insert a row; ``programs.admit``."""
        shape = Shape("admit", (row.tokens.shape[1], row.context_segments.shape[1]))
        self.state, chosen = self._run(shape, (self._place(row, split=True),))
        return chosen

    def decode(self, keep: np.ndarray, read: int) -> Answers:
        """Choose tokens; ``programs.decode`` with the smallest shape for the slots to keep and ``read`` entries."""
        rows, entries = smallest(self.rows, int(keep.sum())), smallest(self.reads, min(read, self.reads[-1]))
        shape = Shape("decode", (rows, entries))
        self.state, answers = self._run(shape, (self._place(keep, split=False),))
        return answers

    def _run(self, shape: Shape, arguments: tuple) -> Any:
        if shape not in self._compiled:
            self._compile(shape, arguments)
        return self._compiled[shape](self.weights, self.state, *arguments)

    def lower(self, shape: Shape, arguments: tuple) -> Any:
        """The program of a shape, lowered for these arguments."""
        function = getattr(programs, shape.program)
        static: dict[str, int] = {}
        if shape.program == "decode":
            static = {"steps": self.steps} | dict(zip(("rows", "read"), shape.sizes, strict=True))

        def run(parameters: Weights, state: State, *arguments: Any) -> Any:
            return function(self.program, parameters, state, *arguments, **static)

        run.__name__ = shape.program
        with self.in_force():
            return jax.jit(run, donate_argnums=1, keep_unused=True).lower(self.weights, self.state, *arguments)

    def _compile(self, shape: Shape, arguments: tuple) -> None:
        self._compiled[shape] = self.lower(shape, arguments).compile()

    @property
    def compiled(self) -> int:
        return len(self._compiled)

    def shapes(self) -> list[Shape]:
        """Every shape that can occur."""
        admit = [Shape("admit", sizes) for sizes in itertools.product(self.chunks, self.contexts)]
        encode = [Shape("encode", (size,)) for size in self.patches]
        decode = [Shape("decode", sizes) for sizes in itertools.product(self.rows, self.reads)]
        return [*admit, *decode, *encode]

    def warm_up(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Compile every shape; ``advance`` receives 1 for each."""
        for shape in self.shapes():
            if shape not in self._compiled:
                self._compile(shape, self.example_arguments(shape))
            advance(1)

    def example_arguments(self, shape: Shape) -> tuple:
        """Arguments of a shape's program that change nothing."""
        if shape.program == "decode":
            return (self._place(np.zeros(self.slots, bool), split=False),)
        if shape.program == "admit":
            return (self._place(self.empty_row(*shape.sizes), split=True),)
        sizes = self.encode_shape(shape.sizes[0])
        arrays = sizes.arrays(self.shards, self.config.vision.patch_dim)
        batch = Batch(**{name: np.zeros(*leaf) for name, leaf in arrays.items()})
        return self._place((batch, np.full((self.shards, sizes.length), self.pool, np.int32)), split=True)

    def encode_shape(self, patches: int) -> RowShape:
        """The row that images of this many patches in total are encoded in."""
        length = (
            patches if self.config.projector.merge_size == 1 else row_shape(self.config, patches, 1, patches).length
        )
        return row_shape(self.config, length, 1, patches)

    def empty_row(self, tokens: int, context: int) -> Row:
        """A row without pieces."""
        R, E = self.shards, self.ends

        def full(*shape: int, value: int = 0) -> np.ndarray:
            return np.full((R, *shape), value, np.int32)

        return Row(
            tokens=full(tokens),
            positions=full(tokens),
            segment_ids=full(tokens),
            span_end=np.tile(np.arange(tokens, dtype=np.int32), (R, 1)),
            last_query=full(tokens, value=tokens) if self.trees else None,
            vision_index=full(tokens, value=-1),
            context_segments=full(context),
            context=full(context // BLOCK, 3),
            num_context=full(),
            # A piece of a tree is at one more place for each ancestor.
            copies=full((E if self.trees else 1) * (tokens // self.program.copied + E), 3),
            num_copies=full(),
            ends=full(E),
            end_slots=full(E, value=self.slots),
            lengths=full(E),
            answering=jax.tree.map(np.array, idle((R, E))),  # arrays of their own
        )


def platform_of(x: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The platform of the devices that an array is on, or will be."""
    return next(iter(x.sharding.device_set)).platform  # type: ignore[union-attr]


def idle(shape: tuple[int, ...]) -> Answering:
    """The ``Answering`` of sequences that are not."""
    zeros, no = np.zeros(shape, np.int32), np.zeros(shape, bool)
    ones, key = np.ones(shape, np.float32), np.zeros((*shape, 2), np.uint32)
    return Answering(Sampling(0 * ones, ones, zeros, key, no), zeros, zeros, no, zeros - 1)


def smallest(sizes: list[int], needed: int) -> int:
    """The smallest of these sizes that is large enough."""
    return next(size for size in sizes if size >= needed)


def _sizes(least: int, most: int, growth: int = 4) -> list[int]:
    """Sizes from ``least`` up to ``most``, each ``growth`` times the one before."""
    found: Iterator[int] = itertools.takewhile(lambda n: n < most, (least * growth**i for i in itertools.count()))
    return [*found, most]
