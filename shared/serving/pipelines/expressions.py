"""What a pipeline's file may say about tensors: a name, a small function of it, a comparison with a number.

    image                            an input of the pipeline
    fast.logits                      an output of the step `fast`; fast."odd:0" if its name is odd
    max(softmax(fast.logits)) < 0.9  a condition: one number an item
    float32(argmax(fast.logits))     a function's result, for the next model

Functions work on the last dimension. There are no more than pipelines need: what is real work belongs into a graph.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from shared.artifacts import ArtifactError, TensorSpec
from shared.serving.session import Array

_TOKEN = re.compile(r'\s*(?:([A-Za-z_][A-Za-z0-9_-]*)|"([^"]+)"|(<=|>=|==|!=|<|>|[().\[\]])|(-?[0-9.]+(?:e-?[0-9]+)?))')
_COMPARE: dict[str, Callable[[Array, float], Array]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Reference:
    """An output of a step, or with an empty `step` an input of the pipeline."""

    step: str
    tensor: str

    def __str__(self) -> str:
        return f"{self.step}.{self.tensor}" if self.step else self.tensor


@dataclass(frozen=True)
class Expression:
    """A reference, then functions applied to it from the inside out; `index[3]` is written as the function `3`."""

    reference: Reference
    functions: tuple[str, ...] = ()

    def spec(self, source: TensorSpec) -> TensorSpec:
        """Type and shape of the result, given those of the reference.

        Raises:
            ArtifactError: a function does not take such a tensor.
        """
        for name in self.functions:
            source = _result(name, source)
        return source

    def evaluate(self, array: Array) -> Array:
        """The result; without functions the array itself."""
        for name in self.functions:
            array = _FUNCTIONS[name](array) if name in _FUNCTIONS else array[..., int(name)]
        return array


@dataclass(frozen=True)
class Condition:
    """A comparison that holds or not for each item; one with NaN does not hold, but for `!=`."""

    expression: Expression
    comparison: str
    number: float

    def evaluate(self, array: Array) -> Array:
        """`[B]` booleans from the reference's array."""
        value = self.expression.evaluate(array)
        return _COMPARE[self.comparison](value.reshape(value.shape[0]), self.number)


def parse_expression(text: str) -> Expression:
    """Reads an expression.

    Raises:
        ArtifactError: it is none.
    """
    parser = _Parser(text)
    expression = parser.expression()
    parser.end()
    return expression


def parse_condition(text: str) -> Condition:
    """Reads a comparison of an expression with a number.

    Raises:
        ArtifactError: it is none.
    """
    parser = _Parser(text)
    expression = parser.expression()
    comparison = parser.take()
    number = parser.number()
    if comparison not in _COMPARE or math.isnan(number):
        raise parser.error(f"a comparison ({', '.join(_COMPARE)}) with a number")
    parser.end()
    return Condition(expression, comparison, number)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split())
        self._next = 0

    def _split(self) -> Iterator[tuple[str, str]]:
        position, end = 0, len(self._text.rstrip())
        while position < end:
            match = _TOKEN.match(self._text, position)
            if match is None:
                raise self.error("names, functions and numbers only")
            position = match.end()
            kind = ("name", "quoted", "sign", "number")[(match.lastindex or 1) - 1]
            yield kind, match[match.lastindex or 1]

    def error(self, expected: str) -> ArtifactError:
        return ArtifactError(
            f"`{self._text}` is not understood, expected {expected}; functions: {', '.join(_FUNCTIONS)}"
        )

    def take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][1] if self._next <= len(self._tokens) else ""

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._next] if self._next < len(self._tokens) else ("", "")

    def end(self) -> None:
        if self._next != len(self._tokens):
            raise self.error("nothing more at its end")

    def number(self) -> float:
        try:
            return float(self.take())
        except ValueError:
            return math.nan

    def _name(self) -> str:
        kind, _ = self._peek()
        if kind not in ("name", "quoted"):
            raise self.error("the name of a tensor, such as `step.output`")
        return self.take()

    def expression(self) -> Expression:
        kind, _ = self._peek()
        name = self._name()
        following = self._peek()[1]
        if following == "(" and kind == "name":
            if name not in _FUNCTIONS:
                raise self.error(f"a function that there is, not `{name}`")
            self.take()
            inner = self.expression()
            if self.take() != ")":
                raise self.error("`)`")
            expression = Expression(inner.reference, (*inner.functions, name))
        elif following == ".":
            self.take()
            expression = Expression(Reference(name, self._name()))
        else:
            expression = Expression(Reference("", name))
        while self._peek()[1] == "[":
            self.take()
            index = self.take()
            if not index.isdigit() or self.take() != "]":
                raise self.error("an index of 0 or more, such as `a.scores[2]`")
            expression = Expression(expression.reference, (*expression.functions, index))
        return expression


def _softmax(array: Array) -> Array:
    wide = array.astype(np.float32, copy=False)
    exponents = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares


def _margin(array: Array) -> Array:
    best = np.partition(array, -2, axis=-1)
    margin: Array = best[..., -1] - best[..., -2]
    return margin


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": _softmax,
    "max": lambda array: array.max(axis=-1),
    "argmax": lambda array: array.argmax(axis=-1),
    "margin": _margin,
    "float32": lambda array: array.astype(np.float32, copy=False),
    "int32": lambda array: array.astype(np.int32, copy=False),
    "int64": lambda array: array.astype(np.int64, copy=False),
}
_REDUCING = {"max", "argmax", "margin"}
_DTYPES = {"softmax": "float32", "argmax": "int64", "float32": "float32", "int32": "int32", "int64": "int64"}


def _result(name: str, source: TensorSpec) -> TensorSpec:
    shown = f"{name}({source.name})" if name in _FUNCTIONS else f"{source.name}[{name}]"
    if source.dtype in ("object", "bfloat16"):
        raise ArtifactError(f"`{shown}`: there are no functions of {source.dtype}")
    if name == "softmax" and not source.dtype.startswith("float"):
        raise ArtifactError(f"`{shown}`: is of {source.dtype}, expected floating-point numbers")
    shape = source.shape
    index = int(name) if name not in _FUNCTIONS else -1
    if name in _REDUCING or name == "softmax" or index >= 0:
        if len(shape) < 2:
            raise ArtifactError(f"`{shown}`: has the shape {list(shape)}, expected a dimension after the batch")
        least = 2 if name == "margin" else index + 1
        if 0 <= shape[-1] < least:
            raise ArtifactError(f"`{shown}`: the last dimension has {shape[-1]}, expected {least} or more")
        shape = shape if name == "softmax" else shape[:-1]
    return TensorSpec(shown, _DTYPES.get(name, source.dtype), shape)
