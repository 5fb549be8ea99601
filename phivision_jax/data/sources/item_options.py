"""The options of reading items, also flags of ``phivision data import``: this module imports nothing slow."""

import dataclasses
import ipaddress
import json
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.records import check_task

Format = Literal["json", "parquet", "tfds", "array-record"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Unit = Literal["pixels", "thousand", "unit"]
"""Pixels of the upright image; thousandths of its sides; shares of its sides."""


@dataclasses.dataclass(frozen=True)
class ItemOptions:
    """Rules by which items become records."""

    images: Path | None = None
    """Folder of the images: paths are relative to it and must not leave it; default: the folder of the data file."""
    also_allow: tuple[Path, ...] = ()
    """Further folders into which symbolic links in the image folder may point."""
    rename: tuple[str, ...] = ()
    """Names of fields, keys of messages and roles in the data, and the names that import expects: theirs=ours, as in
    prompt=question or Alice=user. KEY=dataset_KEY keeps a field as metadata that would be refused."""
    task: str = "general"
    """Task of records that do not state one; any name, known are general, math, science, gui, ocr, chart, document,
    caption, text, grounding and safety."""
    default_mode: Literal["nothink", "think", "refuse"] = "nothink"
    """Mode of records that do not state one and whose answers do not show it; refuse: quarantine them."""
    system: Literal["template", "user", "drop"] = "template"
    """System messages: let the chat template decide, put them before the first user message, or drop them."""
    boxes: Unit = "pixels"
    """Unit of the boxes and points in the field objects: pixels, thousandths of the sides, or shares of the sides."""
    inline_boxes: Unit | None = None
    """Rewrite coordinates in the texts of records with one image, [x, y] and [x1, y1, x2, y2], from this unit to shares
    of the image."""
    allow_urls: bool = False
    """Download images whose paths are http or https URLs, only from public addresses."""
    allow_networks: tuple[str, ...] = ()
    """Further addresses or networks of one's own servers from which URLs may be downloaded, as in 10.1.2.0/24."""

    @property
    def renames(self) -> dict[str, str]:
        """Their names → ours."""
        return {theirs: ours for theirs, _, ours in (pair.partition("=") for pair in self.rename)}

    @property
    def networks(self) -> list[Network]:
        """``allow_networks`` as networks.

        Raises:
          ValueError: for what is neither an address nor a network.
        """
        return [ipaddress.ip_network(network) for network in self.allow_networks]

    def check(self) -> None:
        """Check the values.

        Raises:
          ValueError: for a name that is not "theirs=ours", or a task that is not a name.
          NotADirectoryError: for a folder that does not exist.
        """
        check_task(self.task)
        try:
            _ = self.networks
        except ValueError as error:
            raise ValueError(f"--allow-networks: {error}") from None
        for pair in self.rename:
            if not all(pair.partition("=")):
                raise ValueError(f"--rename {pair}: write it as theirs=ours, the data's name first")
        for flag, folder in [("--images", self.images), *(("--also-allow", folder) for folder in self.also_allow)]:
            if folder is not None and not folder.is_dir():
                raise NotADirectoryError(f"{flag} {folder}: there is no such folder")

    def key(self) -> dict[str, Any]:
        """The options as JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=lambda folder: str(folder.resolve())))
