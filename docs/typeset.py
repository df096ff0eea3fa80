r"""Typesets the formulas of docstrings, which are ASCII so that ``help()`` is readable: ``x_{n+1} = x_n + h F(x_n)``.

Only tokens with a subscript or an exponent in braces are changed, with the formula around them. Code is left alone:
text in backticks, examples, indented blocks.
"""

import re

GREEK = "alpha beta gamma delta epsilon lambda mu nu omega sigma tau theta Delta Phi Psi".split()
FUNCTIONS = "cos exp log max min sin sqrt sum tanh".split()
SEEDS = re.compile(r"[_^]\{")
# Text without formulas: code spans, fences and examples, in this order.
CODE = re.compile(r"(``.*?``|`[^`\n]+`|^ *>>> .*(?:\n(?!\s*$).*)*)", re.M | re.S)
OPERATORS = ("=", "+", "-", "*", "<-", "|", "(", ")", "o")


def latex(formula: str) -> str:
    r"""Converts a formula to LaTeX.

    Example:
        >>> print(latex("x_{n+1} = (1 - gamma) x_n + Psi_ij"))
        x_{n+1} = (1 - \gamma) x_n + \Psi_{ij}
    """
    text = formula.replace("<-", r"\leftarrow").replace("...", r"\dots")
    text = re.sub(r"(?<![A-Za-z\\])([A-Za-z]+)~", lambda m: rf"\tilde{{{_name(m[1])}}}", text)
    # Words are letters without a backslash before them; a subscript of several letters is one group.
    text = re.sub(r"_([A-Za-z0-9]{2,})", r"_{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])[A-Za-z]{2,}", lambda m: _word(m[0], text, m.start()), text)
    text = re.sub(r"\^\(((?:[^()]|\([^()]*\))*)\)", r"^{\1}", text)
    text = re.sub(r"(?<=\S) o (?=\S)", r" \\circ ", text)
    return text.replace("*", r"\cdot ").replace("  ", " ")


def _name(word: str) -> str:
    return f"\\{word}" if word in GREEK or word in FUNCTIONS else word


def _word(word: str, text: str, at: int) -> str:
    # Indices stand side by side, so `ij` in a subscript stays two letters.
    inside = text.rfind("_{", 0, at) > text.rfind("}", 0, at)
    known = word in GREEK or word in FUNCTIONS
    return f"\\{word}" if known else word if inside and len(word) < 4 else rf"\mathrm{{{word}}}"


def _mathematical(token: str) -> bool:
    bare = token.strip("()[],.;:'|")
    if not bare:
        return "..." in token or token in OPERATORS
    if not re.fullmatch(r"[\w\[\](){}^+\-*/=<>.,'~|]+", bare):
        return False
    words = re.findall(r"[A-Za-z]+", re.sub(r"_\{[^}]*\}|_\w+", "", bare))
    plain = all((len(w) == 1 and w not in "aI") or w in GREEK + FUNCTIONS for w in words)
    return plain and bare.lower() not in ("a", "i")


def _sentence(text: str) -> str:
    pieces = re.split(r"(\s+)", text)
    tokens = pieces[::2]
    done: list[tuple[int, int]] = []
    for i, token in enumerate(tokens):
        if not SEEDS.search(token) or not _mathematical(token) or (done and i < done[-1][1]):
            continue
        start, end = i, i + 1
        while start > (done[-1][1] if done else 0) and _joins(tokens[start - 1]):
            start -= 1
        while end < len(tokens) and not _ends(tokens[end - 1]) and _mathematical(tokens[end]):
            end += 1
        while tokens[start] in OPERATORS:
            start += 1
        while tokens[end - 1] in OPERATORS:
            end -= 1
        done.append((start, end))
    for start, end in reversed(done):
        formula = " ".join(tokens[start:end])
        inside = formula.rstrip(".,;:")
        if formula.endswith("..."):
            inside = formula
        pieces[2 * start : 2 * end - 1] = [f"${latex(inside)}${formula[len(inside) :]}"]
    return "".join(pieces)


def _joins(token: str) -> bool:
    return _mathematical(token) and not _ends(token)


def _ends(token: str) -> bool:
    """Whether a sentence or a clause ends here."""
    return token.endswith((".", ";", ":")) and not token.endswith("...")


def typeset(text: str) -> str:
    """Returns a docstring with its formulas in LaTeX, between dollar signs.

    Example:
        >>> print(typeset("Leapfrog: x_{n+1} = x_{n-1} + 2 h F_n(x_n), as `x_{n}`."))
        Leapfrog: $x_{n+1} = x_{n-1} + 2 h F_n(x_n)$, as `x_{n}`.
    """
    blocks = re.split(r"(\n[ \t]*\n)", text)
    for k in range(0, len(blocks), 2):
        # Markdown treats a block indented by four spaces as code, so text inside a section is left alone.
        if SEEDS.search(blocks[k]) and not blocks[k].startswith("    "):
            parts = CODE.split(blocks[k])
            parts[::2] = [_sentence(p) for p in parts[::2]]
            blocks[k] = "".join(parts)
    return "".join(blocks)
