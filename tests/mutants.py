"""Single changes of Python source: another operator, comparison, bound or constant, a condition negated, a statement
dropped. Text, signatures' annotations, decorators and what is raised stay as they are."""

import ast
import itertools
import random
import re
from dataclasses import dataclass

SWAPPED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|", ast.MatMult: "*",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "all": "any", "any": "all", "amax": "amin", "amin": "amax"}
DROPPED = (ast.Expr, ast.AugAssign, ast.Continue, ast.Break, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """One change: the text at [start, end) of a file becomes `text`."""

    path: str
    line: int
    start: int
    end: int
    text: str
    span: tuple[int, int]  # lines of the statement
    inside: bool  # a function: its lines run in tests, not at import

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def lines(self, source: str) -> tuple[str, str]:
        """The lines that it changes, before and after, as one line with single spaces."""
        first, stop = source.rfind("\n", 0, self.start) + 1, (source + "\n").find("\n", self.end)
        old, new = source[first:stop], source[first : self.start] + self.text + source[self.end : stop]
        return " ".join(old.split()), " ".join(new.split())


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: str):
        self.path, self.source, self.found = path, source, []
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.statement, self.depth = None, 0

    def at(self, line: int, column: int) -> int:
        """Offset of a place as ast gives it, whose columns count bytes."""
        text = self.source[self.starts[line - 1] :].split("\n", 1)[0]
        return self.starts[line - 1] + len(text.encode()[:column].decode())

    def begin(self, node) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node) -> int:
        return self.at(node.end_lineno, node.end_col_offset)

    def add(self, node, start: int, end: int, text: str) -> None:
        body = getattr(self.statement, "body", None)  # of a compound statement the header alone
        last = body[0].lineno - 1 if isinstance(body, list) else self.statement.end_lineno
        span = self.statement.lineno, max(self.statement.lineno, last)
        self.found.append(Mutant(self.path, node.lineno, start, end, text, span, self.depth > 0))

    def whole(self, node, text: str) -> None:
        self.add(node, self.begin(node), self.end(node), text)

    def text(self, node) -> str:
        return self.source[self.begin(node) : self.end(node)]

    def between(self, left, right, operator: ast.AST) -> None:
        """Changes the operator that stands between two expressions, past parentheses."""
        start, end = self.end(left), self.begin(right)
        gap = self.source[start:end]
        written = gap.strip(" ()\n\\")
        if type(operator) in SWAPPED and written and "#" not in gap:
            place = start + gap.index(written)
            self.add(left, place, place + len(written), SWAPPED[type(operator)])

    def generic_visit(self, node):
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        super().generic_visit(node)
        self.statement = outer

    def function(self, node):
        self.statement = node
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.depth += 1
        for child in node.body:
            self.visit(child)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = function

    def visit_ClassDef(self, node):
        for child in node.body:
            self.visit(child)

    def nothing(self, node):
        pass

    visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = visit_Assert = nothing

    def visit_AnnAssign(self, node):
        self.statement = node
        if node.value:
            self.visit(node.value)

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.dropped(node)
            self.generic_visit(node)

    def dropped(self, node):
        self.statement = node
        self.whole(node, "pass")

    visit_Continue = visit_Break = visit_Delete = dropped

    def visit_Assign(self, node):
        if all(isinstance(x, (ast.Attribute, ast.Subscript)) for x in node.targets):
            self.dropped(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.dropped(node)
        gap_start, gap_end = self.end(node.target), self.begin(node.value)
        place = self.source.index("=", gap_start, gap_end) - len(self.source[gap_start:gap_end].split("=")[0].strip())
        if type(node.op) in SWAPPED:
            self.add(node, place, self.source.index("=", place), SWAPPED[type(node.op)])
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if not (isinstance(node.op, ast.BitOr) and isinstance(node.right, ast.Constant) and node.right.value is None):
            self.between(node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.between(left, right, operator)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        left, right = node.values[:2]
        start, gap = self.end(left), self.source[self.end(left) : self.begin(right)]
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        if "#" not in gap and len(node.values) == 2:
            self.add(node, start + gap.index(word), start + gap.index(word) + len(word), other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.whole(node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def negate(self, node):
        if isinstance(node, ast.stmt):
            self.statement = node
        self.whole(node.test, f"(not ({self.text(node.test)}))")
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = negate

    def visit_Call(self, node):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        if name in CALLS:
            self.add(node, self.end(node.func) - len(name), self.end(node.func), CALLS[name])
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.whole(node, str(not node.value))
        elif isinstance(node.value, int):
            self.whole(node, str(node.value + 1))
            if node.value > 9:
                self.whole(node, str(node.value * 10))
        elif isinstance(node.value, float):
            self.whole(node, repr(node.value * 10 if node.value else 1.0))


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every single change of a file, in the order of its places."""
    finder = _Finder(path, source)
    for statement in ast.parse(source).body:
        finder.visit(statement)
    return sorted(set(finder.found), key=lambda m: (m.start, m.end, m.text))


def changes(mutant: Mutant, source: str) -> bool:
    """Whether what it makes is Python, and another program."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def draw(sources: dict[str, str], number: int, seed: int) -> list[Mutant]:
    """So many of all changes of the sources, by path; the first of a longer draw of the same seed."""
    every = [m for path in sorted(sources) for m in mutants_of(path, sources[path])]
    random.Random(seed).shuffle(every)
    return list(itertools.islice((m for m in every if changes(m, sources[m.path])), number))


def entry(mutant: Mutant, source: str) -> str:
    """The change as a list names it: its place, and the part of its line where it stands, before and after."""

    def alike(a: str, b: str) -> int:
        """Characters that both begin with."""
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    old, new = mutant.lines(source)
    before = alike(old, new)
    behind = alike(old[before:][::-1], new[before:][::-1])
    old, new = (x[max(0, before - 14) : len(x) - max(0, behind - 10)] for x in (old, new))
    return f"- `{mutant.path}:{mutant.line}` `{old}` -> `{new}`"


def listed(text: str, sources: dict[str, str]) -> dict[str, Mutant | None]:
    """The changes of a list, by entry; found by their text where lines have moved since. None: there is none now."""
    every = [(m, *m.lines(source)) for path, source in sources.items() for m in mutants_of(path, source)]

    def makes(old: str, new: str, before: str, after: str) -> bool:
        places = (i for i in range(len(before)) if before.startswith(old, i))
        return any(before[:i] + new + before[i + len(old) :] == after for i in places)

    found = {}
    for name, path, line, old, new in re.findall(r"^(- `(\S+):(\d+)` `(.+?)` -> `(.+?)`)", text, re.M):
        same = [m for m, before, after in every if old in before and makes(old, new, before, after)]
        found[name] = min(same, key=lambda m: (m.path != path, abs(m.line - int(line))), default=None)
    return found
