"""A few readable files out of the parts of this package that some functions need.

Starting at a few lines of code, the definitions that they use are followed by name from module to module.
What is found is written in the order of the imports, a section for each module, with its text and comments as
they are. Names that two modules define are renamed after their module. What could change the meaning of a
name is refused, so a source that cannot be bundled is found by the tests, not by who loads a checkpoint.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT.name
RULE = "# " + "-" * 107
ENTRIES = f"{PACKAGE}._entries"
"""The lines that a file starts from stand in a module of this name, which is no file."""

Name = tuple[str, str]
"""Module and a name that it defines."""
Span = tuple[int, int, int, str, str]
"""Line (from 0), its first and last byte, the name that stands there and the name that is to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """A top-level statement of a module with the comments above it, and what belongs to it.

    Attributes:
        nodes: The statement, and the string that documents it.
        lines: From the first line of its comments to its last line, counted from 0.
        defines: Names that it binds; empty for one that is executed for what it does.
        gap: Empty lines above it.
    """

    nodes: tuple[ast.stmt, ...]
    lines: range
    defines: frozenset[str]
    gap: int

    @functools.cached_property
    def mentions(self) -> frozenset[str]:
        """Every name that stands in it, local ones too."""
        parts = [part for node in self.nodes for part in ast.walk(node)]
        rebound = (name for part in parts if isinstance(part, ast.Global) for name in part.names)
        return frozenset({part.id for part in parts if isinstance(part, ast.Name)}.union(rebound))

    @property
    def is_block(self) -> bool:
        """Whether it is a function or a class."""
        return isinstance(self.nodes[0], (ast.FunctionDef, ast.ClassDef))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A module of this package, taken apart.

    Attributes:
        name: Dotted name.
        text: Lines of its source.
        doc: Its docstring.
        statements: Its top-level statements, imports left out.
        own: Imports from this package: the name here -> the definition.
        foreign: Other imports: the name here -> the import statement of this name alone.
    """

    name: str
    text: list[str]
    doc: str
    statements: list[Statement]
    own: dict[str, Name]
    foreign: dict[str, str]

    @functools.cached_property
    def definitions(self) -> dict[str, Statement]:
        """Name -> the statement that binds it."""
        return {name: statement for statement in self.statements for name in statement.defines}

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Every name that the module has."""
        return frozenset([*self.definitions, *self.own, *self.foreign])

    @functools.cached_property
    def bound_inside(self) -> frozenset[str]:
        """Names that some function or class of the module binds for itself."""
        inside: set[str] = set()
        for statement in self.statements:
            for node in statement.nodes:
                times = Counter(_bindings(node))
                inside |= {name for name in times if name not in statement.defines or times[name] > 1}
        return frozenset(inside)

    def uses(self, statement: Statement) -> set[str]:
        """Return the names of the module that a statement may mean; a local one of that name counts too."""
        return set(statement.mentions & self.names)


class BundleError(Exception):
    """A source cannot be bundled without changing what a name means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file that is to be written.

    Attributes:
        name: Its module name; the others import from it by this name.
        head: Its docstring.
        entry: Source of the lines it starts from, with imports from this package and from the entries of
            earlier files (``ENTRIES.<name of the file>``).
        parts: Parts of the package whose definitions belong into this file, unless the first file's entry
            needs them.
    """

    name: str
    head: str
    entry: str
    parts: tuple[str, ...] = ()


def bundle(files: Sequence[File], replaced: Mapping[Name, str]) -> dict[str, str]:
    """Return the text of files that hold what some lines use of this package.

    Each imports from earlier ones only.

    Args:
        files: The files; what the entry of the first needs goes into it, the rest goes by ``parts``.
        replaced: Definitions whose statement is written differently.

    Raises:
        BundleError: A name would mean something else in a file than in its module.
    """
    # Which definitions are needed, in which order, under which names.
    modules = _Modules(files, replaced)
    kept: dict[str, set[str]] = {}
    first = _closure(modules, files[:1], kept)
    _closure(modules, files, kept)
    order = modules.in_order(kept)
    renamed = _new_names(modules, kept)

    def file_of(name: Name) -> int:
        if name in first:
            return 0
        part = name[0].split(".")[1]
        entry = f"{PACKAGE}.{part}" == ENTRIES
        return next(i for i, f in enumerate(files) if (name[0] == _entry(f) if entry else part in f.parts))

    # Write the files one after another: each imports from those before it.
    out = {}
    for number, file in enumerate(files):
        writer = _Writer(modules, renamed, file_of, [f.name for f in files], number)
        for module in order:
            writer.section(modules[module], kept[module])
        out[file.name] = writer.text(file.head)
    return out


def _entry(file: File) -> str:
    return f"{ENTRIES}.{file.name}"


class _Modules(dict):
    """Modules by name, read when they are first asked for."""

    def __init__(self, files: Sequence[File], replaced: Mapping[Name, str]) -> None:
        super().__init__({_entry(file): _split(_entry(file), file.entry) for file in files})
        self.replaced = replaced

    def __missing__(self, name: str) -> Module:
        own = {key[1]: text for key, text in self.replaced.items() if key[0] == name}
        self[name] = _read(name, _path(name).read_text(encoding="utf-8"), own)
        return self[name]

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return modules so that each stands behind those it imports from."""
        done: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in done:
                return
            for other, _ in self[name].own.values():
                visit(other)
            done[name] = None

        for name in sorted(names):
            visit(name)
        return [name for name in done if name in set(names)]


def _path(module: str) -> Path:
    base = ROOT.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _read(name: str, source: str, replaced: Mapping[str, str]) -> Module:
    """Take a module apart, some of its definitions written differently."""
    module = _split(name, source)
    if not replaced:
        return module

    # Put the new text in the place of each definition, then take the result apart again.
    lines: list[str | None] = list(module.text)
    for own, text in replaced.items():
        node = module.definitions[own].nodes[0]
        end = _end(node)
        lines[node.lineno - 1 : end] = [text] + [None] * (end - node.lineno)
    return _split(name, "\n".join(line for line in lines if line is not None))


def _end(node: ast.stmt | ast.expr) -> int:
    """Return the last line of a node that comes from a source."""
    assert node.end_lineno is not None
    return node.end_lineno


def _split(name: str, source: str) -> Module:
    tree = ast.parse(source)
    lines = source.splitlines()
    own: dict[str, Name] = {}
    foreign: dict[str, str] = {}
    statements: list[Statement] = []
    end = 0

    # Sort the top-level statements: imports, strings that document what stands above them, the rest.
    for place, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            source_module = node.module or ""
            own |= {alias.asname or alias.name: (source_module, alias.name) for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            foreign |= dict(_single_imports(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if place and statements:  # a string that documents the statement above it
                before = statements.pop()
                span = range(before.lines.start, _end(node))
                statements.append(dataclasses.replace(before, nodes=(*before.nodes, node), lines=span))
        else:
            # Comments above a statement belong to it, the empty lines above them do not.
            begin = end
            while not lines[begin].strip():
                begin += 1
            defines = frozenset(_defined(node))
            statements.append(
                Statement(nodes=(node,), lines=range(begin, _end(node)), defines=defines, gap=begin - end)
            )
        end = _end(node)

    doc = ast.get_docstring(tree) or ""
    return Module(name=name, text=lines, doc=doc, statements=statements, own=own, foreign=foreign)


def _single_imports(node: ast.Import | ast.ImportFrom) -> Iterator[Name]:
    """Yield the name that an import binds and the import of it alone."""
    for alias in node.names:
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            yield alias.asname or alias.name.split(".")[0], f"import {alias.name}{renamed}"
        elif node.module != "__future__":
            yield alias.asname or alias.name, f"from {node.module} import {alias.name}{renamed}"


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds in its module."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def _bindings(node: ast.AST) -> Iterator[str]:
    """Yield every name that is bound in a statement, at whatever depth."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            yield part.id
        elif isinstance(part, ast.arg):
            yield part.arg
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield part.name
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            yield from (name for name, _ in _single_imports(part))
        elif isinstance(part, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and part.name:
            yield part.name


def _closure(modules: _Modules, files: Sequence[File], kept: dict[str, set[str]]) -> set[Name]:
    """Add to ``kept`` (module -> names) all that the entries of files use; return these definitions.

    A statement that defines nothing is executed for what it does to its module: it stays where a module does.
    """
    found: set[Name] = set()
    pending = [(_entry(file), name) for file in files for name in modules[_entry(file)].definitions]

    # Follow each name to the module that defines it, and from there to the names its statement uses.
    while pending:
        module, name = pending.pop()
        if (module, name) in found:
            continue

        source = modules[module]

        # An import: go on where it leads.
        if name in source.own:
            pending.append(source.own[name])
            continue

        if name not in source.definitions:
            raise BundleError(f"{module} has no top-level definition '{name}' that could be bundled")

        # A definition: keep it, and all that it and the module's bare statements use.
        found.add((module, name))
        kept.setdefault(module, set()).add(name)
        effects = [statement for statement in source.statements if not statement.defines]
        for statement in (source.definitions[name], *effects):
            used = source.uses(statement) | statement.defines
            pending += [source.own.get(use, (module, use)) for use in used if use not in source.foreign]
    return found


def _new_names(modules: _Modules, kept: Mapping[str, set[str]]) -> dict[Name, str]:
    """Return the names in the files of all kept definitions: their own, or one after their module."""
    # Who defines each name, and which imports bind it.
    owners: dict[str, list[str]] = {}
    imported: dict[str, set[str]] = {}
    for module, names in kept.items():
        for name in names:
            owners.setdefault(name, []).append(module)
        for name, line in modules[module].foreign.items():
            imported.setdefault(name, set()).add(line)

    doubtful = {name: lines for name, lines in imported.items() if len({*map(_what, lines)}) > 1}
    if doubtful:
        raise BundleError(f"one name for two imports: {doubtful}")

    # Rename what two modules define, or what an import binds too.
    renamed = {}
    for name, places in owners.items():
        for module in places:
            alone = len(places) == 1 and name not in imported
            renamed[module, name] = name if alone else _after_module(module, name)

    # A new name must not collide with another one, an import or a builtin.
    times = Counter(renamed.values())
    taken = {name for name in times if times[name] > 1 or name in imported or hasattr(builtins, name)}
    if taken:
        raise BundleError(f"names that would mean something else in a file: {', '.join(sorted(taken))}")
    return renamed


def _what(line: str) -> str:
    """Return what an import binds: ``import a`` and ``import a.b`` both bind a."""
    return line if line.startswith("from ") or " as " in line else line.split(".")[0]


def _after_module(module: str, name: str) -> str:
    """Return a name with the folder and file of its module in front."""
    words = [word for word in module.split(".")[2:] if word not in ("common", "parts")]
    prefix = "_".join(words or module.split(".")[1:])
    if name.isupper():
        prefix = prefix.upper()
    private = "_" if name.startswith("_") else ""
    return f"{private}{prefix}_{name.lstrip('_')}"


class _Writer:
    """Collects the sections and the imports of one file."""

    def __init__(
        self,
        modules: _Modules,
        renamed: Mapping[Name, str],
        file_of: Callable[[Name], int],
        files: Sequence[str],
        number: int,
    ) -> None:
        self.modules = modules
        self.renamed = renamed
        self.file_of = file_of
        self.files = files
        self.number = number
        self.sections: list[str] = []
        self.foreign: set[str] = set()
        self.earlier: dict[int, set[str]] = {}

    def section(self, module: Module, names: set[str]) -> None:
        """Write what a module has for this file."""
        parts: list[tuple[Statement, str]] = []
        for statement in module.statements:
            wanted = statement.defines & names
            used = [
                module.own.get(use, (module.name, use))
                for use in sorted(module.uses(statement))
                if use not in module.foreign
            ]

            if statement.defines and not wanted:
                continue

            # A statement that defines nothing goes into the last file that something it uses is in.
            own = {self.file_of((module.name, name)) for name in wanted}
            place = max(own or {self.file_of(self._defined_as(use)) for use in used})
            if place != self.number:
                continue

            # Note what it needs from earlier files and from other packages.
            for use in used:
                self._reach(use)
            self.foreign |= {
                module.foreign[name] for name in module.uses(statement) if name in module.foreign
            }

            parts.append((statement, self._renamed(module, statement)))

        if parts:
            self.sections.append(_section(module, parts))

    def _defined_as(self, name: Name) -> Name:
        """Return the definition behind a name that a module may itself have imported."""
        module = self.modules[name[0]]
        return self._defined_as(module.own[name[1]]) if name[1] in module.own else name

    def _reach(self, name: Name) -> None:
        name = self._defined_as(name)
        place = self.file_of(name)

        if place > self.number:
            raise BundleError(f"{self.files[self.number]} would need {name} of {self.files[place]}")
        if place < self.number:
            self.earlier.setdefault(place, set()).add(self.renamed[name])

    def _renamed(self, module: Module, statement: Statement) -> str:
        """Return the text of a statement under the names its file has."""
        # Which names of the statement are written differently.
        new = {}
        for name in module.uses(statement) | statement.defines:
            if name in module.foreign:
                continue
            final = self.renamed.get(self._defined_as(module.own.get(name, (module.name, name))), name)
            if final != name:
                new[name] = final

        text = module.text[statement.lines.start : statement.lines.stop]
        if not new:
            return "\n".join(text)

        # A local variable of an old or a new name would be renamed or would hide it.
        clash = (new.keys() | set(new.values())) & module.bound_inside
        if clash:
            raise BundleError(
                f"{module.name} gives these names to locals too, but in a bundle they change or are taken: "
                f"{', '.join(sorted(clash))} (of {new})"
            )

        # Positions of the syntax tree count bytes; from the end, so that earlier ones stay right.
        lines = [line.encode() for line in module.text]
        for line, begin, end, old, name in sorted(_spans(statement, new, lines), reverse=True):
            if lines[line][begin:end] != old.encode():
                raise BundleError(f"{module.name}:{line + 1}: {old} cannot be renamed inside of an f-string")
            lines[line] = lines[line][:begin] + name.encode() + lines[line][end:]

        return b"\n".join(lines[statement.lines.start : statement.lines.stop]).decode()

    def text(self, head: str) -> str:
        """Return the whole file."""
        own = []
        for place, names in sorted(self.earlier.items()):
            listed = "".join(f"    {name},\n" for name in sorted(names))
            own.append(f"from .{self.files[place]} import (\n{listed})")

        blocks = [f'"""{head}"""', "from __future__ import annotations", *_sorted_imports(self.foreign), *own]
        return "\n\n\n".join(["\n\n".join(blocks), *self.sections]) + "\n"


def _spans(statement: Statement, new: Mapping[str, str], lines: Sequence[bytes]) -> Iterator[Span]:
    """Yield where in the source a name stands that is written differently."""
    # Wherever the name is read or written.
    for part in (part for node in statement.nodes for part in ast.walk(node)):
        if isinstance(part, ast.Name) and part.id in new:
            assert part.end_col_offset is not None
            yield part.lineno - 1, part.col_offset, part.end_col_offset, part.id, new[part.id]
        elif isinstance(part, ast.Global) and new.keys() & set(part.names):
            raise BundleError(f"a global that is rebound cannot be renamed: {part.names}")

    # And where a function or class is named after its keyword.
    top = statement.nodes[0]
    if isinstance(top, (ast.FunctionDef, ast.ClassDef)) and top.name in new:
        line = top.lineno - 1
        keyword = re.match(rb"\w+\s+", lines[line][top.col_offset :])
        assert keyword is not None
        begin = top.col_offset + len(keyword[0])
        yield line, begin, begin + len(top.name.encode()), top.name, new[top.name]


def _section(module: Module, parts: Sequence[tuple[Statement, str]]) -> str:
    """Return the statements of a module under a line that names it."""
    notes = [f"# {line}".rstrip() for line in module.doc.splitlines()]
    if not module.name.startswith(ENTRIES):
        notes = [f"# {_path(module.name).relative_to(ROOT.parent).as_posix()}", "#", *notes]

    # Two empty lines around functions and classes, as many as in the source (one at most) elsewhere.
    text = "\n".join([RULE, *notes, RULE])
    before: Statement | None = None
    for statement, body in parts:
        apart = statement.is_block or before is None or before.is_block
        text += "\n" * (3 if apart else max(1, min(statement.gap, 1) + 1)) + body
        before = statement

    return text


def _sorted_imports(lines: Iterable[str]) -> list[str]:
    """Return imports in two blocks, of the standard library and of others, names of one module together."""
    blocks: dict[bool, set[str]] = {True: set(), False: set()}
    names: dict[str, set[str]] = {}

    # Names that are imported from one module are joined in one line.
    for line in lines:
        _, module, *rest = line.split(" ", 3)
        if line.startswith("from "):
            names.setdefault(module, set()).add(rest[1])
        else:
            blocks[module.split(".")[0] in sys.stdlib_module_names].add(line)

    for module, found in names.items():
        standard = module.split(".")[0] in sys.stdlib_module_names
        blocks[standard].add(f"from {module} import {', '.join(sorted(found))}")

    ordered = [sorted(block, key=lambda line: (line.startswith("from"), line)) for block in blocks.values()]
    return ["\n".join(block) for block in ordered if block]
