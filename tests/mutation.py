"""How many small faults the tests notice: a mutation run, not part of the tests.

    python tests/mutation.py [--modules processes prediction] [--sample 400] [--out report.md]

A mutant is the package with one operator, comparison, number, condition, call or statement changed.
It is written into a scratch copy of the tree, and the tests that run the changed lines are run
against it until one fails. A survivor is a fault that no test sees, or no fault at all.

A traced run of all tests comes first and says which test runs which line. From then on every run is
a fork of this process, in which torch, scipy and pytest are loaded and the package is not.

mutmut 3.8 leaves decorated functions and class bodies alone, here every property and default, and
changes messages. cosmic-ray 8.7 starts a process per mutant and deletes no statement; it makes
6,000 mutants, most of them by putting every operator in the place of every other. Hence this.
"""

import ast
import copy
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sde_diffusion"
# Tests that start programs, train, or are of parts that are not under mutation.
IGNORED = "experiments readme end_to_end training storage checkpoints data toy networks"
MARKS = "not slow and not gpu and not peers"
PYTEST = ["-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "--rootdir=.", "-m", MARKS]
LOADED = ("torch", "numpy", "scipy", "torchsde", "torchdiffeq", "mpmath", "hypothesis", "beartype")


def both(pairs: str) -> dict[str, str]:
    words = pairs.split()
    return {word: words[i ^ 1] for i, word in enumerate(words)}


OPERATORS = both("Add Sub BitAnd BitOr And Or Mult Div") | {"Pow": "Mult"}
NEGATED = both("Lt GtE LtE Gt Eq NotEq Is IsNot In NotIn")
BOUNDARY = both("Lt LtE Gt GtE")
CALLS = both(
    "min max minimum maximum any all sin cos log log1p exp expm1 ceil floor add_ sub_ "
    "zeros_like ones_like sqrt abs asinh sinh"
)
DROPPED = ("sqrt", "exp", "log", "abs", "detach", "clone", "clamp", "round", "cumsum", "contiguous")
# Swapped arguments of these change nothing or only a message; a Level is made of a whole row.
UNSWAPPED = ("isinstance", "hasattr", "getattr", "zip", "cast", "maximum", "max", "min", "Level")
SKIPPED = ("annotation", "returns", "decorator_list", "bases", "exc", "cause")

# Mutants, by name, that no test can tell from the package, and why. A line that is changed later
# has mutants of other names, and its reasons are to be thought of anew.
EQUIVALENT = {
    "the two sides agree where they meet, or to rounding": "01039e 139f11 dcf0e4 3e305b",
    "only equality of two rounded numbers tells": "da94e9 2aaa52 a3c663 0ad8df",
    "the branch is not taken, and where() masks its gradient": "574730 551eb3 ebded5 a95a86",
    "the other route gives the same numbers": "b2a0a8 87c9d0",
    "what comes in is contiguous: logsigmoid made it": "d2f61d",
    "a path of two times: its second entry is its last": "a42d25 fd058a",
    "a symmetric function of its arguments": "21c93c ce1c0b ada8ef cf7f84",
    "a prior's sources read no times": "8df66f e65a29 c02800",
    "`time` holds to [0, 1] what lies beyond": "77b21c",
    "nothing differentiable comes out either way": "edf2eb 5e39d8",
    "two formulas make two graphs, and no second pass is made": "0bcdcb",
    "what the clamp held is refused below": "b387fb",
    "a step beyond the end is cut there, a longer path has the same law within": "00e106 8429e3",
    "an argument that is not read": "634972",
    "an empty tensor has no values to share": "f1fa81",
    "only an Apple GPU tells": "312995 a7a3f3",
}


class Mutant(NamedTuple):
    file: str
    line: int
    span: tuple[int, int]  # of the replaced text, in bytes
    new: str
    lines: range  # of the statement, or of the class for one of its defaults
    scope: range  # of the outermost class or function around it
    change: str  # the line before and after
    name: str  # the same wherever the line moves in its file

    def __str__(self) -> str:
        return f"{self.name} {self.file}:{self.line}: {self.change}"


def variants(node: Any) -> Iterator[tuple[Any, Any]]:
    """(what is replaced, by what: a node or text) for the changes that start at this node."""

    def edited(edit: Callable[[Any], object]) -> tuple[Any, Any]:
        new = copy.deepcopy(node)
        edit(new)
        return node, new

    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            if other := OPERATORS.get(type(op).__name__):
                yield edited(lambda new: setattr(new, "op", getattr(ast, other)()))
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for table in (BOUNDARY, NEGATED):
                    if other := table.get(type(op).__name__):
                        symbol = getattr(ast, other)()
                        yield edited(lambda new, i=i, o=symbol: new.ops.__setitem__(i, o))
        case ast.UnaryOp(operand=operand):
            yield node, operand
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, repr(2 * value or 1.0)
        case ast.If(test=test) | ast.IfExp(test=test):
            yield from ((test, "True"), (test, "False"))
        case ast.Call(func=func, args=args, keywords=words):
            owner, _, name = ast.unparse(func).rpartition(".")
            field = "attr" if isinstance(func, ast.Attribute) else "id"
            if name in CALLS:
                yield edited(lambda new: setattr(new.func, field, CALLS[name]))
            if name in DROPPED and owner not in ("", "torch", "math"):
                yield node, func.value
            for i, word in enumerate(words):
                if other := CALLS.get(word.arg or ""):
                    yield edited(lambda new, i=i, o=other: setattr(new.keywords[i], "arg", o))
            pair = slice(1, 3) if name == "where" else slice(0, 2)
            if len(args[pair]) == 2 and owner != "errors" and name not in UNSWAPPED:
                yield edited(lambda new: new.args.__setitem__(pair, new.args[pair][::-1]))
        case ast.Return(value=ast.expr() as value):
            if ast.unparse(value) != "None" and not isinstance(value, ast.JoinedStr):
                yield node, "return None"
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
    if isinstance(node, ast.AugAssign):
        yield node, "pass"


def mutants(file: str) -> list[Mutant]:
    """All of a file's: not in annotations, aliases, decorators, messages, or zip's strict."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[tuple[int, int, str], Mutant] = {}

    def extent(node: Any) -> range:
        return range(node.lineno, node.end_lineno + 1)

    def visit(node: Any, lines: range, scope: range) -> None:
        for at, new in variants(node):
            begin = starts[at.lineno - 1] + at.col_offset
            end = starts[at.end_lineno - 1] + at.end_col_offset
            text = new if isinstance(new, str) else ast.unparse(new)
            text = f"({text})" if isinstance(new, ast.expr) else text
            first, last = starts[at.lineno - 1], starts[at.end_lineno]
            parts = source[first:last], source[first:begin] + text.encode() + source[end:last]
            change = "  =>  ".join(" ".join(part.decode().split()) for part in parts)
            name = hashlib.sha256(f"{file} {change}".encode()).hexdigest()[:6]
            mutant = Mutant(file, at.lineno, (begin, end), text, lines, scope, change, name)
            found.setdefault((begin, end, text), mutant)
        zipped = isinstance(node, ast.Call) and ast.unparse(node.func) == "zip"
        guard = isinstance(node, ast.If) and [type(child) for child in node.body] == [ast.Raise]
        for name, value in ast.iter_fields(node):
            if name in SKIPPED or (zipped and name == "keywords") or (guard and name == "body"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.stmt) and not isinstance(child, ast.AnnAssign):
                    visit(child, extent(getattr(child, "test", child)), scope)
                elif isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    visit(child, lines, scope)

    for node in ast.parse(source).body:
        names = [ast.unparse(target) for target in getattr(node, "targets", ())]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            visit(node, extent(node), extent(node))
        elif names and names[0].isupper() and len(names[0]) > 1:
            visit(node, range(10**5), range(10**5))
    return list(found.values())


class Tracer:
    """A pytest plugin: which lines of the files under mutation each passing test runs."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root, self.files = root, {str(root / file): file for file in files}
        self.tests: dict[str, tuple[float, list[tuple[str, int]]]] = {}
        self.current = self.at_import = set[tuple[str, int]]()
        self.failed: list[str] = []

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        if file := self.files.get(frame.f_code.co_filename):
            self.current.add((file, frame.f_lineno))
            return self.trace
        return None

    def pytest_collection(self) -> None:
        sys.settrace(self.trace)
        # A cached table is made by one test and read by many.
        plain, functools.cached_property = functools.cached_property, property
        importlib.import_module("sde_diffusion")
        functools.cached_property = plain

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.current, start = set(), time.perf_counter()
        result = yield
        if item.nodeid not in self.failed:
            self.tests[item.nodeid] = (time.perf_counter() - start, list(self.current))
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        sys.settrace(None)
        public = [name for name in sys.modules if "._" not in name]
        loaded = [name for name in public if name.split(".")[0] in LOADED]
        found = loaded, self.tests, list(self.at_import), self.failed
        (self.root / "trace.json").write_text(json.dumps(found))


class Chosen:
    """A pytest plugin: these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.tests = tests

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.tests if test in found]


class Ground:
    """A scratch copy of the tree, what the traced run found, and forks that run tests there."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root = root
        self.kills: Counter[tuple[str, str]] = Counter()
        for name in ("sde_diffusion", "tests"):
            shutil.copytree(ROOT / name, root / name)
        shutil.copy(ROOT / "pyproject.toml", root)
        every = {
            path.stem[5:]: str(path.relative_to(root)) for path in root.glob("tests/**/test_*.py")
        }
        paths = [path for name, path in sorted(every.items()) if name not in IGNORED.split()]
        self.pytest(Tracer(root, files), paths, 1800)
        loaded, tests, at_import, failed = json.loads((root / "trace.json").read_text())
        print(f"{len(tests)} tests; left out, for they fail without a mutant: {failed}", flush=True)
        self.seconds = {test: seconds for test, (seconds, _) in tests.items()}
        self.lines = {test: set(map(tuple, lines)) for test, (_, lines) in tests.items()}
        self.at_import = set(map(tuple, at_import))
        for name in loaded:
            with suppress(Exception):
                importlib.import_module(name)
        sys.dont_write_bytecode = True
        gc.freeze()

    def pytest(self, plugin: object, options: list[str], limit: float) -> int | None:
        """The exit code of pytest in a silent fork, or None if it took too long."""

        def run() -> None:
            os.chdir(self.root)
            sys.path.insert(0, str(self.root))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os._exit(int(pytest.main([*PYTEST, *options], plugins=[plugin])))

        fork = multiprocessing.get_context("fork").Process(target=run)
        fork.start()
        fork.join(limit)
        late = fork.is_alive()
        fork.kill()
        fork.join()
        return None if late else fork.exitcode

    def chosen(self, mutant: Mutant, budget: float) -> dict[str, list[str]]:
        """Tests that run the mutant's lines, by file: quick ones and unlike ones first."""
        lines = {(mutant.file, line) for line in mutant.lines}
        if not lines.isdisjoint(self.at_import):  # it may act while tests are collected
            lines |= {(mutant.file, line) for line in mutant.scope}
        alike: Counter[str] = Counter()  # cases of one test
        queue: list[tuple[float, str]] = []
        for test, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            if not lines.isdisjoint(self.lines[test]):
                alike[test.partition("[")[0]] += 1
                queue.append((alike[test.partition("[")[0]] * (seconds + 0.01), test))
        files: dict[str, list[str]] = defaultdict(list)
        for _, test in sorted(queue):
            budget -= self.seconds[test]
            if budget > 0 or not files:
                files[test.partition("::")[0]].append(test)
        return dict(sorted(files.items(), key=lambda item: -self.kills[mutant.file, item[0]]))

    def verdict(self, mutant: Mutant, budget: float) -> str:
        path = self.root / mutant.file
        source = path.read_bytes()
        begin, end = mutant.span
        path.write_bytes(source[:begin] + mutant.new.encode() + source[end:])
        try:
            for file, tests in self.chosen(mutant, budget).items():
                limit = 30 + 5 * sum(self.seconds[test] for test in tests)
                code = self.pytest(Chosen(tests), ["-x", file], limit)
                if code not in (0, 5):  # 5: nothing was collected
                    self.kills[mutant.file, file] += 1
                    return "timed out" if code is None else "killed"
            return "survived"
        finally:
            path.write_bytes(source)


def report(results: list[tuple[Mutant, str]], subjects: dict[str, list[str]]) -> str:
    """The table and the survivors, in Markdown."""
    reasons = {name: why for why, names in EQUIVALENT.items() for name in names.split()}
    head = ["module", "mutants", "killed", "timed out", "survived", "equivalent", "%", "% without"]
    rows = [head, ["---"] * len(head)]
    for subject in (*subjects, "all"):
        of = [r for r in results if subject == "all" or r[0].file in subjects[subject]]
        count = Counter(verdict for _, verdict in of)
        alike = sum(verdict == "survived" and mutant.name in reasons for mutant, verdict in of)
        dead = 100 * (len(of) - count["survived"])
        rates = [f"{dead / max(total, 1):.1f}" for total in (len(of), len(of) - alike)]
        counts = [len(of), *(count[key] for key in head[2:5]), alike]
        rows.append([subject, *map(str, counts), *rates])
    left = [mutant for mutant, verdict in sorted(results) if verdict == "survived"]
    lines = [f"- `{mutant}` {reasons.get(mutant.name, '')}".rstrip() for mutant in left]
    return "\n".join([*map(" | ".join, rows), "", *lines, ""])


def main(
    modules: tuple[str, ...] = ("processes", "models/prediction", "samplers", "losses"),
    sample: int | None = None,
    seed: int = 0,
    budget: float = 25.0,
    again: Path | None = None,
    out: Path | None = None,
) -> None:
    """Mutate, test, and print how many small faults the tests notice.

    Args:
        modules: files or folders of the package.
        sample: mutants drawn at random; all by default.
        seed: of that draw, and of their order.
        budget: seconds of tests spent on a mutant, as the traced run timed them.
        again: a report; only what survived in it is tried again.
        out: where the report is written, in Markdown.
    """
    subjects: dict[str, list[str]] = {}
    for name in modules:
        paths = sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"]
        subjects[name] = [str(path.relative_to(ROOT)) for path in paths]
    files = [file for group in subjects.values() for file in group]
    before = again.read_text() if again else None
    every = [
        mutant for file in files for mutant in mutants(file)
        if before is None or f"- `{mutant.name} " in before
    ]  # fmt: skip
    order = random.Random(seed).sample(every, min(sample or len(every), len(every)))
    results: list[tuple[Mutant, str]] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder).resolve(), files)
        for mutant in {mutant.file: mutant for mutant in order}.values():
            old = (ROOT / mutant.file).read_bytes()[slice(*mutant.span)].decode()
            if ground.verdict(mutant._replace(new=old), 3.0) != "survived":
                raise RuntimeError(f"tests of {mutant.file} fail without a change")
        with suppress(KeyboardInterrupt):  # what is done by then is a random sample
            for mutant in order:
                results.append((mutant, ground.verdict(mutant, budget)))
                seconds = f"{time.monotonic() - start:.0f} s"
                print(len(results), seconds, results[-1][1], mutant, flush=True)
    text = report(results, subjects)
    print(text, f"{time.monotonic() - start:.0f} s", sep="\n", flush=True)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
