"""What the project promises of a run, each promise beside the number that came out.

Every value is a mean over seeds of quantities measured in this run; the note gives the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def claims(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of kind "claim" from rows teacher, student, summary and routing of all seeds.

    A claim whose arms did not run is left out.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in results))

    def found(seed: int, kind: str, **wanted: str) -> Row:
        return next(
            row
            for row in results
            if row["kind"] == kind
            and row["seed"] == seed
            and all(row[key] == value for key, value in wanted.items())
        )

    def main(seed: int) -> Row:
        return found(seed, "summary", arm="main")

    def control(seed: int, arm: str) -> Row:
        return found(seed, "summary", arm=arm)

    def mode(seed: int, name: str) -> Row:
        return found(seed, "routing", arm="main", mode=name)

    def student_accuracy(seed: int) -> float:
        return float(found(seed, "student")["top1"] / found(seed, "teacher")["top1"])

    def student_flops(seed: int) -> float:
        student, teacher = found(seed, "student"), found(seed, "teacher")
        return float(student["train_flops"] / teacher["train_flops"])

    def forgetting_cut(seed: int, arm: str) -> float:
        """1 - forgetting of the run / forgetting of the arm, by GEM's backward transfer."""
        return float(1 - main(seed)["bwt_gem"] / control(seed, arm)["bwt_gem"])

    rows = []

    def claim(
        name: str, wanted: float, value_of: Callable[[int], float], note: str, *, at_least: bool
    ) -> None:
        try:
            values = [value_of(seed) for seed in seeds]
        except (StopIteration, ZeroDivisionError, TypeError):
            return  # an arm did not run, or the stream has one task
        value = sum(values) / len(values)
        rows.append(
            {
                "kind": "claim",
                "name": name,
                "wanted": f"{'>=' if at_least else '<='} {wanted:g}",
                "value": value,
                "values": values,
                "holds": value >= wanted if at_least else value <= wanted,
                "note": note,
            }
        )

    claim(
        "student accuracy / teacher accuracy",
        0.9,
        student_accuracy,
        "top-1 on the test images of the first task",
        at_least=True,
    )
    claim(
        "student training FLOPs / teacher training FLOPs",
        0.6,
        student_flops,
        "sensitivity, meta model, distillation and fine-tuning; the teacher's own are not in it",
        at_least=False,
    )
    claim(
        "EGS accuracy - static accuracy",
        0.0,
        lambda seed: mode(seed, "posterior")["top1"] - mode(seed, "static")["top1"],
        "mean over tasks, final graph; static is the literal form",
        at_least=True,
    )
    claim(
        "EGS FLOPs / FLOPs of all modules",
        0.5,
        lambda seed: (
            mode(seed, "posterior")["flops_per_input"] / mode(seed, "all")["flops_per_input"]
        ),
        "per input executed, shared modules and router counted",
        at_least=False,
    )
    claim(
        "forgetting cut by KPP against no preservation",
        0.2,
        lambda seed: forgetting_cut(seed, "preserve=none"),
        "1 - BWT / BWT of the arm preserve=none (GEM)",
        at_least=True,
    )
    claim(
        "forgetting cut by KPP against a random mask",
        0.0,
        lambda seed: forgetting_cut(seed, "preserve=random"),
        "1 - BWT / BWT of the arm preserve=random: as many frozen, drawn blindly",
        at_least=True,
    )
    claim(
        "float32 bytes / bytes sent",
        3.5,
        lambda seed: main(seed)["bytes_float32"] / main(seed)["bytes_sent"],
        "all packets with headers and statistics; frozen elements are in neither",
        at_least=True,
    )
    claim(
        "accuracy lost by the codec",
        0.01,
        lambda seed: control(seed, "codec=none")["acc"] - main(seed)["acc"],
        "ACC of the arm codec=none - ACC",
        at_least=False,
    )
    claim(
        "merged accuracy - best isolated site",
        0.0,
        lambda seed: main(seed)["acc"] - max(control(seed, "merge=none")["site_acc"]),
        "ACC; the best site is picked by its test accuracy, in its favour",
        at_least=True,
    )
    return rows
