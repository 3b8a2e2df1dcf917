"""Flags and settings: what the flags of the model's parts mean, and errors that name the flag.

`--disable-vq`, `--enable-memory` and their like set fields of `ModelConfig`.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from arbitor.config import IMAGE_SIZE, MEMORY_ROWS, ModelConfig, RunConfig, load_config
from arbitor.config import preset as preset_config
from arbitor.errors import UserError

# The graph links motifs, so it goes with them.
OFF: dict[str, dict[str, Any]] = {
    "moe": {"num_experts": 0},
    "vq": {"motif_trits": 0, "codebook_rows": 0, "graph_edges": 0},
    "graph": {"graph_edges": 0},
}


_OTHER_FLAGS = {
    "save": "--no-save",
    "augment": "--no-augment",
    "vision": "--enable-vision",
    "audio": "--enable-audio",
    "video": "--enable-video",
    "audio_task": "--task",
    "audio_equalise": "--no-equalise",
    "video_task": "--task",
    "encoder": "--image-encoder",
    "max_bytes": "--bytes",
}  # not spelt as the setting


def flag_of(name: str, value: Any = None, flags: Mapping[str, str] | None = None) -> str:
    """The flag that sets `name`, where there is one for true and one for false to `value`.

    Args:
        name: of the setting.
        value: what it is set to.
        flags: a command's own, by setting.
    """
    flag = {**_OTHER_FLAGS, **(flags or {})}.get(name, f"--{name.replace('_', '-')}")
    return flag.replace("--no-", "--") if value is True else flag


@contextlib.contextmanager
def naming_flags(names: Collection[str], flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors about one of these settings, which begin with its name, begin with its flag instead.

    Args:
        names: of the settings.
        flags: a command's own, by setting; see `flag_of`.
    """
    try:
        yield
    except UserError as error:
        name, _, rest = str(error).partition(" ")
        if name not in names:
            raise
        raise UserError(f"{flag_of(name, flags=flags)} {rest}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFlags:
    """The flags that were given.

    Attributes:
        without: parts that are left out, of `OFF`.
        verb: how their flags begin: `disable` for `--disable-vq`, `no` for `--no-vq`.
        memory: whether the n-gram memory is asked for.
        memory_rows: rows of each of its tables.
        max_moe_iters: most iterations of the core.
        vision: whether the image sidecar is asked for.
        image: `image_size`, `image_patch`, `image_channels` and `image_encoder` that were given by flags.
        image_default: those of them that suit the data where neither flags nor the base say anything.
    """

    without: Collection[str] = ()
    verb: str = "disable"
    memory: bool = False
    memory_rows: int | None = None
    max_moe_iters: int | None = None
    vision: bool = False
    image: Mapping[str, Any] = field(default_factory=dict)
    image_default: Mapping[str, Any] = field(default_factory=dict)

    def by_flag(self, base: ModelConfig) -> dict[str, dict[str, Any]]:
        """Fields of `ModelConfig` by the flag that sets them, as the user wrote it.

        Where two flags set the same field, the later one in this mapping counts.

        Args:
            base: what the flags are laid over; a memory that it has keeps its size.

        Raises:
            UserError: flags that contradict each other.
        """
        if self.memory and self.memory_rows == 0:
            raise UserError(
                "--enable-memory asks for a memory and --memory-rows 0 for none: give one of them"
            )
        given = {f"--{self.verb}-{part}": OFF[part] for part in OFF if part in self.without}
        if self.memory:
            given["--enable-memory"] = {"memory_rows": base.memory_rows or MEMORY_ROWS}
        for name, value in (("memory_rows", self.memory_rows), ("max_moe_iters", self.max_moe_iters)):
            if value is not None:
                given[f"{flag_of(name)} {value}"] = {name: value}
        if self.vision:
            if self.image.get("image_size") == 0:
                raise UserError(
                    "--enable-vision asks for images and --image-size 0 for none: give one of them"
                )
            usual = {"image_size": IMAGE_SIZE, **self.image_default}
            given["--enable-vision"] = {"image_size": base.image_size} if base.image_size else usual
        for name, value in self.image.items() if self.vision or base.image_size else ():
            given[f"{flag_of(name)} {value}"] = {name: value}
        return given

    def settings(self, base: ModelConfig) -> dict[str, Any]:
        """Fields of `ModelConfig` that replace those of `base`.

        Raises:
            UserError: flags that contradict each other.
        """
        return {name: value for fields in self.by_flag(base).values() for name, value in fields.items()}

    def notes(self, base: ModelConfig) -> list[str]:
        """What the flags do to `base` that a user might not expect, a line each."""
        lines = []
        with naming_flags(("memory_rows", "max_moe_iters", *self.image)):
            config = replace(base, **self.settings(base))
        if base.graph_edges and "vq" in self.without and "graph" not in self.without:
            lines.append(f"--{self.verb}-vq leaves the graph out as well: it links motifs")
        if self.max_moe_iters is not None and not config.has_core:
            lines.append(
                f"--max-moe-iters {self.max_moe_iters} has no effect: the model has neither experts nor a "
                "graph to iterate"
            )
        if self.image and not config.image_size:
            flags = " and ".join(map(flag_of, self.image))
            lines.append(f"{flags} without --enable-vision: no effect, the model takes no images")
        return lines

    def refuse_contradiction(self, config: ModelConfig, where: str) -> None:
        """Raise UserError, naming the flag, if one asks for another model than that of a run.

        A sidecar that the run does not have is no contradiction: the run can grow by it.

        Args:
            config: the run's.
            where: file that says so.
        """
        for flag, fields in self.by_flag(config).items():
            if self.vision and not config.image_size and any(name.startswith("image_") for name in fields):
                continue
            for name, value in fields.items():
                if (own := getattr(config, name)) != value:
                    raise UserError(
                        f"{flag} contradicts the run's {name} = {own} in {where}; leave it out to resume, or "
                        "start a new run"
                    )


def put_usual(
    settings: dict[str, Any], usual: Mapping[str, Any], written: Mapping[str, Any], size: str
) -> None:
    """Add what is usual of a part of the model, where neither flags nor the config file say anything.

    Args:
        settings: those given by flags; they are added to.
        usual: settings of the part.
        written: the settings of the config file.
        size: the setting that is 0 without the part; a file that writes so says nothing about the part.
    """
    says = () if written.get(size) == 0 else written
    for name, value in usual.items():
        if name not in says:
            settings.setdefault(name, value)


def base_model(preset: str | None, config_file: str | None) -> ModelConfig:
    """The architecture of a new run before any flag; see `base_config`."""
    return base_config(preset, config_file).model


def base_config(preset: str | None, config_file: str | None) -> RunConfig:
    """The settings of a new run before any flag.

    Raises:
        UserError: an unknown preset, or a file that cannot be used.
    """
    base = None if preset is None else preset_config(preset)
    if config_file is not None:
        base = load_config(config_file, base)
    return base or preset_config("tiny")
