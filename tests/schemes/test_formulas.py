"""Updates in writing say what a step computes: they are read back, as a person would, and evaluated."""

import re

import pytest
import torch

import schemes
from schemes.coupling import Coupling
from schemes.formulas import formulas

EVERY = [text for text in schemes.examples() if schemes.get(text).tableau is None]
H = 0.3


def split(text, marks):
    """The parts of a text between some marks that stand in no brackets, each with the mark before it."""
    parts, depth, at = [["", ""]], 0, 0
    while at < len(text):
        depth += (text[at] in "([") - (text[at] in ")]")
        mark = next((m for m in marks if depth == 0 and text.startswith(m, at)), None)
        if mark:
            parts.append([mark, ""])
        else:
            parts[-1][1] += text[at]
        at += len(mark) if mark else 1
    return parts


class Reading:
    """Evaluates what stands on the right of an arrow."""

    def __init__(self, streams, fs, dim):
        self.values = {f"x{i}": x for i, x in enumerate(streams)}
        self.fs, self.dim = fs, dim

    def sum(self, text):
        first, *others = split(text, [" + ", " - "])
        total = self.product(first[1])
        for mark, part in others:
            total = total + self.product(part) * (1 if mark == " + " else -1)
        return total

    def product(self, text):
        sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
        total = sign
        for _, part in split(text, [" "]):
            total = total * self.factor(part)
        return total

    def factor(self, text):
        if text == "h":
            return H
        if re.fullmatch(r"[\d.]+", text):
            return float(text)
        if text in self.values:
            return self.values[text]
        if m := re.fullmatch(r"(.+)\[(\d)\]", text):
            return self.factor(m[1]).chunk(2, self.dim)[int(m[2])]
        if text.startswith("["):
            return torch.cat([self.sum(part) for _, part in split(text[1:-1], [", "])], self.dim)
        name, _, inside = text.partition("(")
        args = [self.sum(part) for _, part in split(inside.removesuffix(")"), [", "])]
        return self.fs[int(name[1:])](*args) if name.startswith("F") else getattr(torch, name)(*args)

    def do(self, line):
        left, _, right = line.partition(" <- ")
        names = left.split(", ")
        parts = [part for _, part in split(right, [", "])] if len(names) > 1 else [right]
        self.values.update(zip(names, [self.sum(part) for part in parts], strict=True))


def functions(step, streams):
    """Functions of any arguments, each of its own values, whose results have the shape that the scheme wants."""

    def function(i):
        out = step.shape_of(i, tuple(x.shape for x in streams)) or streams[0].shape

        def f(*args):
            total = sum((j + 1) * arg.sum(1, keepdim=True) for j, arg in enumerate(args))
            return torch.sin(total * torch.linspace(0.1, 1.0 + i, out[1], dtype=torch.float64))

        return f

    return [function(i) for i in range(step.stages)]


def written(text):
    """The steps of a scheme whose updates can be written, with their lines."""
    scheme = schemes.get(text)
    if len(scheme.plan) > 1:
        return []
    parts = scheme.at(0), scheme.at(1)
    return list(zip(parts, formulas(*parts), strict=True))


@pytest.mark.parametrize("text", EVERY)
def test_what_is_written_is_what_a_step_computes(text):
    lines = written(text)
    scheme = schemes.get(text)
    torch.manual_seed(0)
    state = tuple(torch.randn(2, 6, dtype=torch.float64) for _ in range(scheme.streams))
    for step, said in lines:
        if not said:
            break
        fs = functions(step, state)
        reading = Reading(state, fs, getattr(step, "dim", 1))
        for line in said:
            reading.do(line)
        state = step._step(fs, state, H)
        assert set(reading.values) == {f"x{i}" for i in range(len(state))}
        for i, x in enumerate(state):
            torch.testing.assert_close(reading.values[f"x{i}"], x, rtol=2e-4, atol=2e-4)  # written to four digits


def test_most_couplings_can_be_written():
    """Otherwise the law would hold of nothing: those of a base scheme alone are left to their documentation."""
    lacking = {type(schemes.get(text)).__name__ for text in EVERY for _, said in written(text) if not said}
    assert lacking <= {"Adaptive", "Reversible", "Repeat", "Nested", "Substeps"}
    assert sum(isinstance(schemes.get(text), Coupling) for text in EVERY) > 10
