"""PTX text as kernels: parameters, shared and local arrays, registers, instructions, labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

# Bytes of an element of a PTX type; a predicate is a bool.
SIZES = {
    **{f"{kind}{8 * n}": n for kind in "bus" for n in (1, 2, 4, 8)},
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
}


@dataclass(frozen=True)
class Operand:
    """One operand. kind: register, number (`bits`), address (`name` + `offset`), vector (`parts`),
    pair (`parts`: value | predicate), symbol (`name`), sink."""

    kind: str
    name: str = ""
    bits: int | float = 0
    offset: int = 0
    parts: tuple[Operand, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # predicate register
    guard_negated: bool
    opcode: tuple[str, ...]  # split at the dots
    operands: tuple[Operand, ...]
    text: str


@dataclass
class Kernel:
    name: str
    params: dict[str, int] = field(default_factory=dict)  # offset of every parameter
    param_bytes: int = 0
    registers: dict[str, np.dtype] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # address of every shared array
    shared_bytes: int = 0  # of arrays of known size
    dynamic: list[str] = field(default_factory=list)  # shared arrays sized by the launch
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: int | None = None  # of .maxntid or .reqntid


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", text, flags=re.MULTILINE)


def _align(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to


_ARRAY = re.compile(
    r"\.(?P<space>shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr(?:\s+\.(?!align)\w+)*(?:\s+\.align\s+\d+)?)?\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?"
)


def _array(text: str) -> tuple[str, str, int, int]:
    """space, name, bytes (0 for [] of unknown size), alignment."""
    found = _ARRAY.search(text)
    assert found is not None, f"cannot read the declaration {text!r}"
    size = SIZES[found["type"]]
    count = 1 if found["count"] is None else int(found["count"] or 0)
    return found["space"], found["name"], size * count, int(found["align"] or size)


def _closing(text: str, start: int) -> int:
    """Index after the brace that closes the one at `start`."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise ValueError(f"no closing brace for the one at character {start}")


class Module(Mapping[str, Kernel]):
    """The kernels of a PTX module by name; each is read when it is asked for."""

    def __init__(self, texts: dict[str, Callable[[], Kernel]]) -> None:
        self._texts, self._read = texts, dict[str, Kernel]()

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._read:
            self._read[name] = self._texts[name]()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


@cache
def kernels(text: str) -> Module:
    """Every .entry of a PTX module by name."""
    text = _without_comments(text)
    outside = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text, flags=re.DOTALL)
    globals_: list[str] = []
    found: dict[str, Callable[[], Kernel]] = {}
    entry = re.compile(r"\.entry\s+([\w$]+)")
    at = 0
    while (match := entry.search(outside, at)) is not None:
        globals_ += re.findall(r"[^;{}]*\.shared\b[^;]*;", outside[at : match.start()])
        begin = outside.index("{", match.end())
        header, end = outside[match.end() : begin], _closing(outside, begin)
        body = outside[begin + 1 : end - 1]
        found[match[1]] = partial(_kernel, match[1], header, body, tuple(globals_))
        at = end
    return Module(found)


def _kernel(name: str, header: str, body: str, globals_: tuple[str, ...]) -> Kernel:
    kernel = Kernel(name)
    for declaration in globals_:
        _declare(kernel, declaration)
    for parameter in header[header.index("(") + 1 : header.index(")")].split(","):
        if parameter.strip():
            _, own, size, align = _array(parameter)
            kernel.params[own] = _align(kernel.param_bytes, align)
            kernel.param_bytes = kernel.params[own] + size
    if limit := re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", header):
        kernel.max_threads = int(np.prod([int(n) for n in limit[1].split(",")]))
    _body(kernel, body)
    if kernel.dynamic:  # after every array of known size
        kernel.shared_bytes = _align(kernel.shared_bytes, 16)
        kernel.shared.update(dict.fromkeys(kernel.dynamic, kernel.shared_bytes))
    return kernel


def _declare(kernel: Kernel, text: str) -> None:
    space, name, size, align = _array(text)
    table, total = (
        (kernel.shared, kernel.shared_bytes)
        if space == "shared"
        else (kernel.local, kernel.local_bytes)
    )
    if name in table:
        return
    table[name] = _align(total, align)
    if space == "shared" and size == 0:
        kernel.dynamic.append(name)
    elif space == "shared":
        kernel.shared_bytes = table[name] + size
    else:
        kernel.local_bytes = table[name] + size


_LABEL = re.compile(r"[\w$%]+:(?!:)")


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colon, scopes as "{" and "}"."""
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at]
            at += 1
        elif label := _LABEL.match(body, at):
            yield label[0]
            at = label.end()
        else:
            end = body.index(";", at)
            yield " ".join(body[at:end].split())
            at = end + 1


def _register_type(name: str) -> np.dtype:
    return np.dtype(bool) if name == "pred" else np.dtype(f"u{SIZES[name]}")


def _body(kernel: Kernel, body: str) -> None:
    scopes: list[dict[str, str]] = [{}]  # own names of registers, those of outer scopes included
    opened = 0
    for statement in _statements(body):
        if statement == "{":
            opened += 1
            scopes.append(dict(scopes[-1]))
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.instructions)
        elif statement.startswith(".reg"):
            _, kind, names = statement.split(maxsplit=2)
            for name in names.split(","):
                base, _, count = name.strip().partition("<")
                every = [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]
                for each in every:
                    own = each if len(scopes) == 1 else f"{each}${opened}"
                    scopes[-1][each] = own
                    kernel.registers[own] = _register_type(kind.removeprefix("."))
        elif statement.startswith((".shared", ".local")):
            _declare(kernel, statement)
        elif not statement.startswith("."):
            kernel.instructions.append(_instruction(statement, scopes[-1]))


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


def _number(text: str) -> int | float | None:
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(found[1], 16)
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return int(found[1], 16)
    if found := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(found[1] + found[2], 0) if found[2] != "0" * len(found[2]) else 0
    if re.fullmatch(r"-?\d+\.\d*", text):
        return float(text)
    return None


def _operand(text: str, names: dict[str, str]) -> Operand:
    if text.startswith("{"):
        return Operand("vector", parts=tuple(_operand(p, names) for p in _split(text[1:-1])))
    if text.startswith("["):
        inner = text[1:-1].strip()
        base, sign, offset = re.fullmatch(r"([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?", inner).groups()  # type: ignore[union-attr]
        value = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Operand("address", name=names.get(base, base), offset=value)
    if "|" in text:
        return Operand("pair", parts=tuple(_operand(p.strip(), names) for p in text.split("|")))
    if text.startswith("!"):
        return Operand("register", name=names[text[1:].strip()], negated=True)
    if text == "_":
        return Operand("sink")
    if (number := _number(text)) is not None:
        return Operand("number", bits=number)
    if text in names:
        return Operand("register", name=names[text])
    return Operand("symbol", name=text)


def _instruction(text: str, names: dict[str, str]) -> Instruction:
    guard, negated, rest = None, False, text
    if text.startswith("@"):
        word, rest = text[1:].split(maxsplit=1)
        negated, guard = word.startswith("!"), names[word.lstrip("!")]
    opcode, _, operands = rest.partition(" ")
    return Instruction(
        guard,
        negated,
        tuple(opcode.split(".")),
        tuple(_operand(o, names) for o in _split(operands)),
        text,
    )
