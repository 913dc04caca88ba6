"""What the project promises of a run, each promise beside the number that came out.

Every value is a mean over seeds of quantities measured in this run; the values of the seeds stand
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]
MAIN = "main"  # the arm that is the config itself


class MissingError(LookupError):
    """An arm that a claim compares with did not run, or measured nothing."""


class Claim(NamedTuple):
    """A promise. value: from the rows of one seed; at_least: the value must not be below wanted."""

    name: str
    wanted: float
    at_least: bool
    value: Callable[[Sequence[Row]], float]
    note: str


def _find(rows: Sequence[Row], kind: str, **wanted: str) -> Row:
    for row in rows:
        if row["kind"] == kind and all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise MissingError(f"{kind} {wanted}")


def _summary(rows: Sequence[Row], key: str, arm: str = MAIN) -> Any:
    return _find(rows, "summary", arm=arm)[key]


def _mode(rows: Sequence[Row], mode: str, key: str) -> Any:
    return _find(rows, "routing", arm=MAIN, mode=mode)[key]


def _student_share(key: str) -> Callable[[Sequence[Row]], float]:
    return lambda rows: _find(rows, "student")[key] / _find(rows, "teacher")[key]


def _forgetting_cut(arm: str) -> Callable[[Sequence[Row]], float]:
    def value(rows: Sequence[Row]) -> float:
        ours, control = (_summary(rows, "bwt_gem", name) for name in (MAIN, arm))
        if control is None or control >= 0:  # a share of no forgetting says nothing
            raise MissingError("one task only, or a control that forgot nothing")
        return float(1 - ours / control)

    return value


CLAIMS = (
    Claim(
        "student accuracy / teacher accuracy",
        0.9,
        True,
        _student_share("top1"),
        "top-1 on the test images of the first task",
    ),
    Claim(
        "student training FLOPs / teacher training FLOPs",
        0.6,
        False,
        _student_share("train_flops"),
        "sensitivity, meta model, distillation and fine-tuning; the teacher's own are not in it",
    ),
    Claim(
        "EGS accuracy - static accuracy",
        0.0,
        True,
        lambda rows: _mode(rows, "posterior", "top1") - _mode(rows, "static", "top1"),
        "mean over tasks on the final graph; static is the literal form",
    ),
    Claim(
        "EGS FLOPs / FLOPs of all modules",
        0.5,
        False,
        lambda rows: (
            _mode(rows, "posterior", "flops_per_input") / _mode(rows, "all", "flops_per_input")
        ),
        "executed per input, shared modules and router counted",
    ),
    Claim(
        "forgetting cut against preserve=none",
        0.2,
        True,
        _forgetting_cut("preserve=none"),
        "1 - BWT / BWT of the arm preserve=none (GEM)",
    ),
    Claim(
        "forgetting cut against preserve=random",
        0.0,
        True,
        _forgetting_cut("preserve=random"),
        "1 - BWT / BWT of the arm preserve=random (GEM): as many frozen, drawn blindly",
    ),
    Claim(
        "float32 bytes / bytes sent",
        3.5,
        True,
        lambda rows: _summary(rows, "bytes_float32") / _summary(rows, "bytes_sent"),
        "all packets with headers and statistics; frozen elements are in neither",
    ),
    Claim(
        "accuracy lost by the codec",
        0.01,
        False,
        lambda rows: _summary(rows, "acc", "codec=none") - _summary(rows, "acc"),
        "ACC of the arm codec=none - ACC",
    ),
    Claim(
        "merged accuracy - best isolated site",
        0.0,
        True,
        lambda rows: _summary(rows, "acc") - max(_summary(rows, "site_acc", "merge=none")),
        "ACC; the best site is picked by its test accuracy, in its favour",
    ),
)


def claims(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of kind "claim" from the rows teacher, student, summary and routing of all seeds.

    A claim is left out where an arm that it compares with did not run.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in results))
    found = []
    for claim in CLAIMS if seeds else ():
        try:
            values = [
                claim.value([row for row in results if row["seed"] == seed]) for seed in seeds
            ]
        except (MissingError, ZeroDivisionError):
            continue
        value = sum(values) / len(values)
        found.append(
            {
                "kind": "claim",
                "name": claim.name,
                "wanted": f"{'>=' if claim.at_least else '<='} {claim.wanted:g}",
                "value": value,
                "values": values,
                "holds": value >= claim.wanted if claim.at_least else value <= claim.wanted,
                "note": claim.note,
            }
        )
    return found
