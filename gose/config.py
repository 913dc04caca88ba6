"""Configuration of a run: frozen sections, TOML in and out, `key=value` overrides.

A section with variants has a field `method`, and a bare string given for the section means its
method: `preserve = "none"` in a file and `--set preserve=none` both reach `preserve.method`. Every
key and method is checked before anything runs; an unknown name is refused with the nearest one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from gose.data import TaskSpec
from gose.data.sources import SOURCES


def _as_items(value: object) -> object:
    """A sequence for what a user writes as one item ("0") or with commas ("0,1,2")."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return [value] if isinstance(value, bool | int | float) else value


Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], BeforeValidator(_as_items)]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A frozen group of settings; a bare string stands for the field `method`."""

    @model_validator(mode="before")
    @classmethod
    def _method_from_string(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if "method" not in cls.model_fields:
            raise ValueError(f"has no method; its keys: {', '.join(cls.model_fields)}")
        return {"method": value}


class DataConfig(Section, frozen=True):
    """Which images the teacher and the stream see; the teacher learns the first task."""

    tasks: Many[str] = Field(
        default=("mnist-5k", "mnist-5k.rotate90", "digits", "mnist-5k.invert"), min_length=1
    )
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)  # of what is not for test
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    train_per_class: PositiveInt | None = None  # None: all
    side: int = Field(default=28, ge=7)  # images are resized to side x side pixels
    root: str | None = None  # folder with the user's own copies; None: installed packages

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"must differ from each other, got {list(tasks)}")
        return tuple(TaskSpec.parse(task).name for task in tasks)

    @property
    def num_classes(self) -> int:
        """Outputs of the head: one for every class id that a source of the stream has."""
        return max(SOURCES[TaskSpec.parse(task).source].num_classes for task in self.tasks)


class TeacherConfig(Section, frozen=True):
    """The model that is trained once, cut into stages and retired."""

    width: PositiveInt = 256
    hidden: PositiveInt = 512  # units of a residual block
    num_blocks: PositiveInt = 2  # residual blocks per stage
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1.5e-3
    weight_decay: NonNegativeFloat = 0.05
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)


class DistillConfig(Section, frozen=True):
    """How the small modules come about; scratch: end to end from labels, without the teacher."""

    method: Literal["m2m", "scratch"] = "m2m"
    width: PositiveInt = 96
    hidden: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_as_items)] = (
        96,
        96,
        384,
    )  # units of the one block of stem, body and expert
    start: Literal["recycled", "random"] = "recycled"  # slices of the teacher's stages, or fresh
    frozen_fraction: float = Field(default=0.1, ge=0, le=1)  # of recycled weights, most sensitive
    sensitivity_images: PositiveInt = 1000
    meta_hidden: PositiveInt = 128
    meta_epochs: PositiveInt = 6
    epochs: PositiveInt = 5  # per module
    finetune_epochs: PositiveInt = 8  # of the assembled student
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 2e-3
    tau: PositiveFloat = 1.0
    task_weight: float = Field(default=0.5, ge=0, le=1)  # of the label term, mean over images
    uncertainty_span: float = Field(default=1.0, ge=0, le=1)  # see plasticity.task_weights


class PreserveConfig(Section, frozen=True):
    """Which parameters of the shared modules are frozen after a task."""

    method: Literal["fisher", "random", "none"] = "fisher"
    fraction: float = Field(default=0.5, ge=0, le=1)  # of the still free elements of each tensor
    images: PositiveInt = 500  # at most, per site and task


class RouteConfig(Section, frozen=True):
    """How an input chooses the experts that run."""

    method: Literal["posterior", "static", "sample", "uniform", "all"] = "posterior"
    top_k: PositiveInt = 1
    entropy_floor: PositiveFloat = 0.05  # normalised entropy; weights are 1 / (H + floor)
    tau: PositiveFloat = 0.1  # posterior: weights are softmax(-surprise / tau)
    win_temperature: PositiveFloat = 0.1  # of the soft wins; smaller is nearer to counting


class SitesConfig(Section, frozen=True):
    """Who learns where: label skew and local work."""

    num_sites: PositiveInt = 3
    dirichlet_alpha: PositiveFloat = 0.3  # smaller: more skewed classes per site
    rounds: PositiveInt = 6  # per task
    steps: PositiveInt = 22  # per round and site
    batch_size: PositiveInt = 48
    lr: PositiveFloat = 3e-3  # of the first round of a task; see learning.learn
    shared_lr_factor: float = Field(default=0.15, ge=0)  # stem and body learn slower than experts
    weight_decay: NonNegativeFloat = 0.01
    prior_weight: float = Field(default=1.0, ge=0)  # of the site's class frequencies in its logits


class CodecConfig(Section, frozen=True):
    """Compression of what a site sends."""

    method: Literal["int8_b256_f32", "int8_b64_f16", "int4_b64_f16", "none"] = "int8_b256_f32"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    error_feedback: bool = True


class MergeConfig(Section, frozen=True):
    """How the packets of a round become one graph; none: every site stays alone."""

    method: Literal["mean", "fisher", "none"] = "mean"


_ARM_SECTIONS = ("preserve", "route", "sites", "codec", "merge")  # what the stream alone reads


class SystemConfig(Section, frozen=True):
    """Everything a run depends on besides package versions, CPU level and thread count."""

    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    preserve: PreserveConfig = PreserveConfig()
    route: RouteConfig = RouteConfig()
    sites: SitesConfig = SitesConfig()
    codec: CodecConfig = CodecConfig()
    merge: MergeConfig = MergeConfig()
    seeds: Many[NonNegativeInt] = Field(default=(0, 1, 2), min_length=1)
    arms: Many[str] = ("preserve=none", "preserve=random", "codec=none", "merge=none")  # controls
    threads: PositiveInt | None = None  # of torch; None: every core this process may use

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for key, values in (("seeds", self.seeds), ("arms", self.arms)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must differ from each other, got {list(values)}")
        return self

    @model_validator(mode="after")
    def _student_fits_in_teacher(self) -> Self:
        if self.distill.method != "m2m" or self.distill.start != "recycled":
            return self
        for key, asked, has in (
            ("width", self.distill.width, self.teacher.width),
            ("hidden", max(self.distill.hidden), self.teacher.hidden),
        ):
            if asked > has:
                raise ValueError(
                    f"distill.{key} must be at most teacher.{key} ({has}), got {asked}: a recycled "
                    "student keeps units of the teacher; or set distill.start=random"
                )
        return self

    @model_validator(mode="after")
    def _arms_are_overrides(self) -> Self:
        plain = self.model_copy(update={"arms": ()}) if self.arms else self
        for arm in self.arms:
            try:
                override(plain, [arm])
            except ValueError as error:
                raise ValueError(f"arm {arm!r}: {error}") from None
            if arm.partition("=")[0].strip().partition(".")[0] not in _ARM_SECTIONS:
                raise ValueError(
                    f"arm {arm!r} must change one of {', '.join(_ARM_SECTIONS)}: all arms share "
                    "data, teacher and student; for another of these start another run"
                )
        return self


def parse(text: str, *, where: str = "config") -> SystemConfig:
    """The config that a TOML text describes; keys it does not name keep their defaults.

    Raises ValueError naming `where`, the key, what was wanted and the nearest name.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not valid TOML: {error}") from None
    return _build(values, where)


def load(path: Path) -> SystemConfig:
    """The config in the TOML file at `path`; ValueError if it cannot be read or is not a config."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    return parse(text, where=str(path))


def dump(config: SystemConfig) -> str:
    """TOML text of every value; a value of None is written by its absence. parse(dump(c)) == c."""
    lines, sections = [], []
    for key, value in config:
        if isinstance(value, BaseModel):
            sections.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml(value)}")
    for name, section in sections:
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in section if value is not None]
    return "\n".join(lines) + "\n"


def override(config: SystemConfig, settings: Sequence[str]) -> SystemConfig:
    """`config` with `key=value` settings applied in order, validated again.

    key: `section.field`, a top-level field, or a section with a method.
    value: TOML (`0.5`, `[0, 1]`, `"text"`); anything else is taken as a string.
    """
    values = config.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set wants key=value, got {setting!r}; for example preserve=none")
        if key not in _dotted_keys(SystemConfig):
            raise ValueError(f"--set {setting}: {_unknown_key(key)}")
        section = _sections(SystemConfig).get(key)
        if section is not None:
            if "method" not in section.model_fields:
                keys = ", ".join(f"{key}.{name}" for name in section.model_fields)
                raise ValueError(f"--set {setting}: {key} has no method; its keys: {keys}")
            key = f"{key}.method"
        *parents, field = key.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[field] = _parse_value(text.strip())
    return _build(values, "--set " + " ".join(settings) if settings else "config")


def _build(values: Mapping[str, object], where: str) -> SystemConfig:
    try:
        return SystemConfig.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # a tuple whose items fail is also reported as too short, which would only hide the cause
    causes = [p for p in problems if not (p["type"] == "too_short" and p["input"])]
    raise ValueError(f"{where}: " + "\n  ".join(_explain(problem) for problem in causes))


def _explain(problem: Any) -> str:
    """One pydantic error as: key, what was wanted, what came, the nearest name."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    if problem["type"] == "literal_error":
        choices = re.findall("'([^']*)'", problem["ctx"]["expected"])
        came = problem["input"]
        nearest = _nearest(str(came), choices)
        return f"{key} must be one of {', '.join(choices)}, got {came!r}{nearest}"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key} {text}".strip()
    return f"{key}: {text[0].lower()}{text[1:]}, got {problem['input']!r}"


def _unknown_key(key: str) -> str:
    parent, _, field = key.rpartition(".")
    sections = _sections(SystemConfig)
    if parent in sections:
        keys = list(sections[parent].model_fields)
        nearest = _nearest(field, keys, prefix=f"{parent}.")
        return f"{key} is not a key{nearest} (keys of {parent}: {', '.join(keys)})"
    known = list(_dotted_keys(SystemConfig))
    same_field = [name for name in known if name.rpartition(".")[2] == field]
    nearest = _nearest(key, same_field, cutoff=0.0) or _nearest(key, known)
    return f"{key} is not a key{nearest} (keys: {', '.join(SystemConfig.model_fields)})"


def _nearest(name: str, known: Sequence[str], *, prefix: str = "", cutoff: float = 0.5) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    annotations = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: annotation
        for name, annotation in annotations.items()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
    }


def _dotted_keys(model: type[BaseModel]) -> Iterator[str]:
    sections = _sections(model)
    for name in model.model_fields:
        yield name
        if name in sections:
            yield from (f"{name}.{inner}" for inner in _dotted_keys(sections[name]))


def _parse_value(text: str) -> object:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # TOML's basic strings take JSON's escapes, but refuse a raw DEL and surrogate pairs
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
        case int() | float():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(_toml(item) for item in value)}]"
    raise TypeError(f"config.dump: TOML has no form for {type(value).__name__} {value!r}")
