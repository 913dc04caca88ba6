"""The generated blocks of README.md: `python -m tests.readme` writes them, test_readme compares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gose.compress
import gose_kernels as gk
from benchmarks import _cells, route
from benchmarks._peers import SHAPES
from gose_kernels.backends import BACKENDS

README = Path(__file__).parent.parent / "README.md"
_RESULTS = README.parent / "benchmarks" / "results"


def ops_table() -> str:
    """Ops by backends: a dot where a kernel is written, else the cell is empty."""
    lines = [
        "| op | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |",
        "|---|" + ":-:|" * len(BACKENDS),
    ]
    for name in sorted(n for n in gk.OPS if not n.startswith("test_")):
        written = {b.name for b in gk.OPS[name].backends}
        cells = " | ".join("●" if b in written else " " for b in BACKENDS)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _source(result: dict[str, Any]) -> str:
    """Where a table's numbers come from."""
    machine = result["machine"]
    cells = result.get("cells", {}).values()
    named = sorted({str(cell["commit"]) for cell in cells if "commit" in cell})
    commits = ", ".join(named or [result["commit"]])
    return (
        f"{machine['threads']} threads of {machine['cpu']} ({machine['cpu_level']}), torch "
        f"{machine['torch']}, commit {commits}: `{result['command']}`."
    )


def claims_table() -> str:
    """What the quickstart promises, beside what came out."""
    result = _result("quickstart")
    lines = ["| promise | wanted | mean | per seed |", "|---|---|---|---|"]
    for row in result["claims"]:
        values = ", ".join(f"{value:.3f}" for value in row["values"])
        mark = "" if row["holds"] else " (**missed**)"
        lines.append(f"| {row['name']} | {row['wanted']} | {row['value']:.3f}{mark} | {values} |")
    seconds = f"{result['wall_seconds']:.0f} s in all, 3 seeds and their control arms."
    return "\n".join([*lines, "", f"{seconds} {_source(result)}"])


def model_table() -> str:
    """Whole transformers models: milliseconds inside the experts, and how many times faster."""
    lines = [
        "| model | phase | eager | grouped_mm | gose | experts | whole model |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("olmoe", "qwen3moe"):
        result = _result(f"model_{name}")
        for phase, found in result["phases"].items():
            cells = " | ".join(
                f"{found['rows'][peer]['moe_ms']:.1f}" for peer in ("eager", "grouped_mm", "gose")
            )
            ratios = f"{found['ratios']['moe']:.2f}x | {found['ratios']['model']:.2f}x"
            lines.append(f"| {name}, 4 layers | {phase} | {cells} | {ratios} |")
    return "\n".join([*lines, "", f"Milliseconds in bfloat16. {_source(result)}"])


def system_table() -> str:
    """Seconds of the quickstart's phases, native and on the references."""
    result = _result("system")
    lines = ["| phase | s | in our kernels | s on torch | ratio |", "|---|---|---|---|---|"]
    for phase, row in result["phases"].items():
        share = row["kernel_seconds"] / row["seconds"]
        lines.append(
            f"| {phase} | {row['seconds']:.2f} | {share:.0%} | {row['torch_seconds']:.2f} "
            f"| {row['torch_seconds'] / row['seconds']:.2f} |"
        )
    return "\n".join([*lines, "", _source(result)])


def _measured(name: str, table: Callable[[dict[str, Any]], str], command: str | None = None) -> str:
    """A table of a result, or how to get it where none is committed: by the benchmark of its name
    or another command."""
    try:
        result = _result(name)
    except FileNotFoundError:
        return f"No measurement is committed: `python -m benchmarks {command or name}` makes one."
    if command is not None:  # a file of cells names the command of the last ones
        result["command"] = f"python -m benchmarks {command}"
    return f"{table(result)}\n\n{_source(result)}"


_LAYER = "layer --allocator kept --caches cold --peer-python PYTHON"


def layer_table() -> str:
    """expert_mlp against the peers: cold caches, heap kept, no cap."""

    def table(result: dict[str, Any]) -> str:
        wanted = {"kind": "steady", "allocator": "kept", "caches": "cold", "cap": ""}
        cells = [c for c in result["cells"].values() if wanted.items() <= c.items()]
        cells.sort(key=lambda c: (list(SHAPES).index(c["shape"]), c["dtype"], c["tokens"]))
        return _cells.table(cells)

    return _measured("layer", table, _LAYER)


def train_table() -> str:
    """Training steps of expert_mlp against transformers' ways."""

    def table(result: dict[str, Any]) -> str:
        cells = [c for c in result["cells"].values() if c["kind"] == "train"]
        cells.sort(key=lambda c: (list(SHAPES).index(c["shape"]), c["dtype"], c["tokens"]))
        return _cells.train_table(cells)

    return _measured("layer", table, f"{_LAYER} --train")


def weights_table() -> str:
    """expert_mlp on quantized weights."""

    def table(result: dict[str, Any]) -> str:
        cells = sorted(
            result["cells"].values(),
            key=lambda c: (list(SHAPES).index(c["shape"]), c["tokens"]),
        )
        return _cells.weights_table(cells, gk.quantized.WEIGHTS)

    return _measured("layer_weights", table, "layer --weights int8,int4")


def route_table() -> str:
    """route against the chain of torch ops."""
    return _measured("route", lambda result: route.table(result["rows"]))


def masked_table() -> str:
    """Steps of AdamW, masked and not, against torch's fused one."""
    result = _result("masked_update")
    lines = ["| step | frozen | ms | against torch fused |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['way']} | {row['mask']} | {row['median_ms']:.1f} "
            f"({row['min_ms']:.1f}-{row['max_ms']:.1f}) | {row['speedup']:.2f}x |"
        )
    share = result["state_share"]["rows 75 %"]
    text = (
        f"{result['parameters'] / 1e6:.0f} M float32 parameters, median (least-most) of "
        f"{result['rounds']} rounds, each between two steps of torch fused. Memory of the state "
        f"with 75 % of rows frozen: {share:.3f} of the whole."
    )
    return "\n".join([*lines, "", f"{text} {_source(result)}"])


_LANGUAGE = {
    "adaptive": ("way", "fewer_flops", "perplexity", "rise", "validation_rise"),
    "weights": ("weights", "smaller", "perplexity", "rise"),
    "second": ("arm", "python", "headers", "same_bits"),
}


def language_table(part: str) -> str:
    """One part of the small language model: its rows as they are, the chosen one in bold."""

    def cell(column: str, value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if column.endswith("rise") and value != "":
            return f"{value:+.2%}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def table(result: dict[str, Any]) -> str:
        columns = _LANGUAGE[part]
        lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        for row in result[part]:
            cells = [cell(c, row.get(c, "")) for c in columns]
            if row.get("chosen"):
                cells = [f"**{text}**" for text in cells]
            lines.append("| " + " | ".join(cells) + " |")
        notes = {
            "adaptive": f"{result['steps']} steps, {result['train_bytes'] / 1e6:.1f} MB of "
            f"{result['train_files']} files read in {result['train_cpu_seconds']:.0f} CPU seconds; "
            f"chosen on {result['validation_bytes'] / 1e3:.0f} kB of {result['validation_files']} "
            f"other files, measured on {result['test_bytes'] / 1e3:.0f} kB of "
            f"{result['test_files']} again others.",
            "weights": "Perplexity of the test text against that of the float32 weights.",
            "second": f"Nats per byte of test texts after {result['second_steps']} steps on the "
            "headers; same bits: of the first domain's loss, against the same layer before "
            "training.",
        }
        return "\n".join([*lines, "", notes[part]])

    return _measured("language", table)


def rows_table(name: str) -> str:
    """The rows of a benchmark as they are, three digits a figure."""

    def table(result: dict[str, Any]) -> str:
        columns = result["columns"]
        lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        for row in result["rows"]:
            cells = (f"{v:.3g}" if isinstance(v := row[c], float) else str(v) for c in columns)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    return _measured(name, table)


def gpu_table() -> str:
    """Expert layers on a GPU by closed forms, beside other published schemes."""
    from benchmarks import gpu_gemm  # imports triton

    schemes = {
        "gose": "gose",
        "sonicmoe": "SonicMoE",
        "scattermoe": "ScatterMoE",
        "grouped_mm": "grouped_mm",
    }
    head = ["layer, T = 16384", "phase", *schemes.values(), "MMA balanced", "MMA Zipf"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, layer in gpu_gemm.MODELS.items():
        for phase in ("forward", "backward"):
            cells = [
                f"{gpu_gemm.activation_bytes(scheme, phase, layer, 16384) / 1e9:.2f} "
                f"({len(gpu_gemm.LAUNCHES[scheme][phase])})"
                for scheme in schemes
            ]
            cells += [
                f"{gpu_gemm.issued_share(layer, 16384, kind, backward=phase == 'backward'):.2f}"
                for kind in ("balanced", "zipf")
            ]
            lines.append(f"| {name} | {phase} | " + " | ".join(cells) + " |")
    text = (
        "GB of bfloat16 activations read and written (and launches, a sort as one), of training: "
        "predicted from shapes, **not measured**. MMA: issued tensor-core FLOPs over useful ones. "
        "SonicMoE's and ScatterMoE's are their published schemes, grouped_mm is transformers' "
        "chain. `python -m benchmarks gpu-gemm`; tests want the PTX machine to count the first "
        "column's forms."
    )
    return "\n".join([*lines, "", text])


def packet_format() -> str:
    """The contract of a packet as gose.compress states it."""
    text = gose.compress.__doc__
    assert text is not None
    return "```\n" + text.partition("\n\n")[2].strip() + "\n```"


BLOCKS = {
    "ops": ops_table,
    "claims": claims_table,
    "system": system_table,
    "model": model_table,
    "layer": layer_table,
    "train": train_table,
    "weights": weights_table,
    "route": route_table,
    "masked": masked_table,
    "adaptive": partial(language_table, "adaptive"),
    "shrunk": partial(language_table, "weights"),
    "second": partial(language_table, "second"),
    "quantize": partial(rows_table, "quantize"),
    "distill_loss": partial(rows_table, "distill_loss"),
    "squared_grad": partial(rows_table, "squared_grad"),
    "low_rank": partial(rows_table, "low_rank"),
    "gpu": gpu_table,
    "packet": packet_format,
}


def filled(text: str) -> str:
    """README's text with every generated block made anew."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have one block <!-- {name}: --> ... <!-- /{name} -->")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
