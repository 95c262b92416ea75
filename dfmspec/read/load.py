"""From files and overrides to a Spec: one value per key, the origin of each, and every structural finding.

Layers, lowest first: the target's defaults, the recipe, profiles, `extends` left to right, `config_file`, the spec's
own keys, a cell of its matrix, flags, `key=value`. Every layer is checked alike: unknown keys, types and ranges are
errors wherever they stand. Values that refer to keys are kept as they are written; `resolve` fills them in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NamedTuple

from dfmspec.diagnostics import COMMAND_LINE, Diagnostic, Edit, Path, Severity, Span, dotted
from dfmspec.errors import UsageError
from dfmspec.read.document import MAX_DEPTH, Budget, Document, parse_document, read_document
from dfmspec.read.interpolation import Typeless, Unset, refers, with_variables
from dfmspec.read.scalars import canonical, plain, typed, unquoted
from dfmspec.read.structure import layer_entries, structural_findings
from dfmspec.spec.catalogue import COMPOSITION, MATRIX, PROFILE, Catalogue, types
from dfmspec.spec.iterations import split_iteration
from dfmspec.spec.paths import PATH_KEYS, SPEC_DIR, in_run_dir, is_relative
from dfmspec.spec.recipes import recipe_text
from dfmspec.targets import DEFAULT_TARGET, TARGETS, catalogue, recipes_of, unpinned

if TYPE_CHECKING:
    from dfmspec.read.matrix import Cell
    from dfmspec.read.sites import Place

ALIASES = (("checkpoint_dir", "save"), ("load_checkpoint", "load"))
"""The how-to's names for keys of the checkpoint section."""


def unaliased(key: str) -> str:
    """`checkpoint.save` for the how-to's `checkpoint.checkpoint_dir`; any other key as it is."""
    for alias, meant in ALIASES:
        if key == f"checkpoint.{alias}":
            return f"checkpoint.{meant}"
    return key


_KEY = re.compile(rf"[A-Za-z_][\w-]*(\.[\w-]+){{0,{MAX_DEPTH - 1}}}")
_OVERRIDE_HINTS = {
    "~": "deleting a key (~) does nothing upstream; set it to the value that is meant",
    "+": "adding keys (+) makes upstream drop unknown ones in silence; leave the + out",
    "-": "flags go before the overrides; see dfmspec validate --help",
}


class Origin(NamedTuple):
    """Where a value comes from."""

    layer: str
    (
        '"default", "recipe dit_xl", "profile", "spec", "extends", "config file", "matrix", "flag", "override", '
        '"environment" or "derived".'
    )
    span: Span
    note: str = ""
    """For a derived value: from what. For another: what was written there, where that refers to something else."""

    @property
    def is_set_by_user(self) -> bool:
        """Whether a person set it, rather than a default, a recipe or a rule."""
        return self.layer in _USER_LAYERS


_FILE_LAYERS = ("profile", "extends", "config file", "spec", "matrix")
_USER_LAYERS = frozenset({*_FILE_LAYERS, "flag", "override", "environment"})
_NEEDED_FIRST = ("spec_version", "target", "recipe", *COMPOSITION)
"""Keys that cannot refer to others: what they say is needed before there are others."""


MAX_FILES = 100
"""How many files a spec builds on."""

Covered = tuple[tuple[Any, Origin], ...]
"""Values of one key that lie under another layer's, lowest first."""


class Spec(NamedTuple):
    """The layers laid on one another: every key of the target has a value or None."""

    file: str
    name: str
    target: str
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    problems: tuple[Diagnostic, ...]
    broken: frozenset[str]
    """Keys whose value was unusable; rules that ask for them are skipped."""
    overrides: tuple[str, ...] = ()
    documents: tuple[Document, ...] = ()
    set_by_user: tuple[str, ...] = ()
    """The keys that a person set."""
    folder: str = "."
    """The folder of the spec, absolute."""
    under: Mapping[str, Covered] = {}
    """For a key that several layers set, the values that lie under the last one's."""
    cells: tuple[Cell, ...] = ()
    """What its matrix makes of it, where no cell was chosen."""
    cell: Cell | None = None
    """The cell that was."""


def load_spec(
    file: str | FilePath | None,
    overrides: Sequence[str] = (),
    *,
    dataset_path: str | None = None,
    environment: Mapping[str, Any] | None = None,
    base: str | None = None,
    spec_dir: str | None = None,
    text: str | None = None,
    cell: Cell | None = None,
    texts: Mapping[str, str] | None = None,
) -> Spec:
    """Read a spec and everything it builds on.

    Args:
        file: the spec; None: defaults and overrides alone.
        overrides: `key=value`, as on the command line.
        dataset_path: the how-to's --dataset-path.
        base: the folder to which relative paths in files are relative, instead of each file's own.
        spec_dir: what ${SPEC_DIR} stands for in a plan's configuration, instead of the file's own folder.
        text: instead of what the file holds.
        texts: instead of what files that it builds on hold, by their real paths.
        cell: of its matrix, one of the `cells` of the spec without one.
        environment: values that the launcher's environment fixes, such as the world size under torchrun.

    Raises:
        OSError: the spec itself cannot be read.
        UsageError: an override names a file to build on.
    """
    # Layers, lowest first.
    loader = _Loader(base, spec_dir, texts or {})
    own = _own_document(file, text, loader.budget)
    loader.lay_files(own)
    if cell is not None:
        loader.lay_cell(cell)
    if dataset_path is not None:
        flag = Document("--dataset-path", "")
        loader.lay("flag", {"dataset": {"path": dataset_path}}, flag)
    for line, override in enumerate(overrides, 1):
        loader.lay_override(override, line)
    loader.lay_profiles(own)
    loader.fixed.update(environment or {})

    # The command line as a document, from which reporters quote.
    if overrides:
        loader.documents.append(Document(COMMAND_LINE, "\n".join(overrides)))
    stem = "dit_butterfly"
    if file is not None:
        stem = FilePath(file).stem
    return loader.finish(own.file, stem, tuple(overrides), cell)


def _own_document(file: str | FilePath | None, text: str | None, budget: Budget) -> Document:
    """The spec itself, without what it builds on."""
    if file is None:
        return Document("<defaults>", "", data={})
    if text is None:
        return read_document(file, budget, may_be_a_pipe=True)
    return parse_document(text.encode(errors="surrogateescape"), str(file), budget)


# Why a file cannot be laid: code, name and hint.
_CIRCULAR = ("SPC105", "circular-extends", "remove one of the two references")
_UNREADABLE = ("SPC104", "unreadable-base", "paths in a spec are relative to that spec")
_TOO_MANY = ("SPC104", "unreadable-base", "put what they say together into fewer files")


_NO_PROFILE = ("SPC110", "unknown-profile", "dfmspec profiles lists them, and where they are looked for")
_NOT_IN_PROFILES = ("name", PROFILE, MATRIX)
_KIND_OF = {PROFILE: "profile", "extends": "extends", "config_file": "config file"}
"""The kind of the layer that a file is, by the key that names it."""


def _unknown_profile(name: str, among: Sequence[Place]) -> str:
    """That no folder has a profile, and what is meant perhaps."""
    from difflib import get_close_matches

    from dfmspec.read import sites

    known = list(dict.fromkeys(name for name, _ in sites.known_profiles(among)))
    near = get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"profile {name} is in no folder of the project's, the user's and the site's{meant}"


class _Layer(NamedTuple):
    """One layer, normalised, with the document that it came from."""

    kind: str
    data: dict[str, Any]
    document: Document


class _Loader:
    """Collects layers; `finish` lays them on one another."""

    def __init__(self, base: str | None, spec_dir: str | None, texts: Mapping[str, str]) -> None:
        self.base = base
        self.texts = texts
        self.spec_dir = spec_dir
        self.layers: list[_Layer] = []
        self.problems: list[Diagnostic] = []
        self.documents: list[Document] = []
        self.budget = Budget()
        """What all layers have together."""
        self.laid: set[str] = set()
        """Where the files are that were named so far."""
        self.fixed: dict[str, Any] = {}
        """Values that lie over every layer: those of the launcher's environment."""
        self.broken: set[str] = set()
        """Keys whose value is unusable."""
        self.written: dict[tuple[str, Path], str] = {}
        """By file and path: what is written where a variable was filled in."""

    def lay_files(self, own: Document) -> None:
        """A spec with the files that lie under it: extends, then config_file, then its own keys."""
        self.documents += self._laid_document(own, "spec", ancestors=())
        self.layers.reverse()

    def _laid_document(self, document: Document, kind: str, ancestors: tuple[str, ...]) -> list[Document]:
        """Lay a document, then the files under it, the highest first; returns it and them, in the order of their names.

        The ancestors are the files that it lies under itself.
        """
        self.problems.extend(document.problems)
        data: dict[str, Any] = {}
        if isinstance(document.data, dict):
            data = dict(self._filled(document.data, document, ()))
        self.lay(kind, data, document)

        # Names of another type are reported with the rest of the layer.
        extends = data.get("extends")
        bases = [plain(base) for base in (extends if isinstance(extends, list) else [extends])]
        references = [("extends", name) for name in bases if isinstance(name, str)]
        config_file = plain(data.get("config_file"))
        if isinstance(config_file, str):
            references.append(("config_file", config_file))

        # A name that is there twice counts where it is highest.
        below: list[list[Document]] = []
        for key, name in dict.fromkeys(reversed(references)):
            below.append(self._laid_reference(document, key, name, ancestors))
        return [document, *chain.from_iterable(reversed(below))]

    def _laid_reference(
        self,
        document: Document,
        key: str,
        name: str,
        ancestors: tuple[str, ...],
    ) -> list[Document]:
        """Lay a file that a document names under a key; it and those under it.

        A file is read and laid once, at the highest of its places: whatever it sets lower down, it sets again there.
        """
        if len(self.laid) > MAX_FILES:
            return []
        # The file of a profile was found, and is named as seen from here.
        path = FilePath(name) if key == PROFILE else FilePath(document.file).parent / name
        ancestors = (*ancestors, os.path.realpath(document.file))
        # A file that is laid under itself would be read for ever.
        try:
            if os.path.realpath(path) in ancestors:
                self._refused_reference(document, key, *_CIRCULAR, f"{name} is laid under itself")
                return []
            place = os.path.join(os.path.realpath(path.parent), path.name)
            if place in self.laid:
                return []
            self.laid.add(place)
            if len(self.laid) > MAX_FILES:
                message = f"{key}: {name} is one more than the {MAX_FILES} files that a spec may build on"
                self._refused_reference(document, key, *_TOO_MANY, message)
                return []
            text = self.texts.get(os.path.realpath(path))
            if text is None:
                base = read_document(path, self.budget)
            else:
                base = parse_document(text.encode(errors="surrogateescape"), str(path), self.budget)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            code, rule, hint = _UNREADABLE
            if key == PROFILE:
                hint = "a profile is a file that you may read; dfmspec profiles lists them"
            self._refused_reference(document, key, code, rule, hint, f"{key}: {path} cannot be read: {reason}")
            return []
        return self._laid_document(base, _KIND_OF[key], ancestors)

    def lay_profiles(self, own: Document) -> None:
        """Under every layer of the spec, the files of the profiles that its highest layer with such a key names."""
        naming = [layer for layer in self.layers if PROFILE in layer.data]
        if not naming:
            return
        from dfmspec.read import sites

        # Each profile over those that are named before it, and of one the project's file over the user's.
        document = naming[-1].document
        among = sites.places(os.path.realpath(FilePath(own.file).parent))
        files: list[str] = []
        for name in sites.names_of(naming[-1].data[PROFILE]):
            found = sites.files_of(name, among)
            if not found:
                self._refused_reference(document, PROFILE, *_NO_PROFILE, _unknown_profile(name, among))
            files += map(str, found)

        # A file is laid at the highest of its places.
        over = self.layers
        self.layers = []
        for file in dict.fromkeys(reversed(files)):
            self.documents += self._laid_reference(document, PROFILE, file, ())
        for layer in self.layers:
            self._refuse_in_profile(layer)
        self.layers = [*reversed(self.layers), *over]

    def _refuse_in_profile(self, layer: _Layer) -> None:
        """Report the keys of a profile that are of one spec alone."""
        for key in _NOT_IN_PROFILES:
            if key not in layer.data:
                continue
            del layer.data[key]
            self._problem(
                layer.document.span((key,)),
                "SPC111",
                "key-not-for-profiles",
                f"{key} is of one spec, and a profile is laid under many",
                "put it in the spec" if key != PROFILE else "name both profiles in the spec, or use extends here",
                (key,),
            )

    def _refused_reference(self, document: Document, key: str, code: str, rule: str, hint: str, message: str) -> None:
        """Report a file that cannot be laid, at the key that names it."""
        span = document.values.get((key,), document.span((key,)))
        self._problem(span, code, rule, message, hint, (key,))

    def lay_override(self, text: str, line: int) -> None:
        """One `key=value` of the command line, which is shown as the given line of a file with one override a line."""
        key, equals, value = text.partition("=")
        whole = Span(COMMAND_LINE, line, 1, line, len(text) + 1)
        if not equals or not _KEY.fullmatch(key):
            self._malformed_override(text, whole)
            return
        if key in ("extends", "config_file"):
            raise UsageError(f"{key} belongs in a spec; on the command line give the spec that has it")

        # As data: a mapping in a mapping, and the value as text until the type of its field is known.
        path = tuple(key.split("."))
        quoted = unquoted(value)
        node: Any = Typeless(value) if quoted is None else quoted
        for part in reversed(path):
            node = {part: node}

        # As a document: the key and its parents stand where the override does.
        keys: dict[Path, Span] = {}
        for depth in range(len(path)):
            keys[path[: depth + 1]] = whole
        value_span = whole._replace(column=len(key) + 2)
        document = Document(COMMAND_LINE, text, keys=keys, values={path: value_span})
        self.lay("override", self._filled(node, document, ()), document)

    def _without_value(self, problem: Diagnostic, data: dict[str, Any], document: Document) -> Diagnostic:
        """A finding about a value of a variable's, which says what is written there: the variable may be secret."""
        written = self._written_at(problem.path, document)
        value: Any = data
        for part in problem.path if written else ():
            value = value.get(part) if isinstance(value, dict) else None
        if not written or not isinstance(value, str) or not value:
            return problem
        told = problem.message.replace(value[:60], written).replace(value[:57], written)
        return problem._replace(message=told, hint="see what the variable holds", fix=())

    def _written_at(self, path: Path, document: Document) -> str:
        """What is written at a path, or below it, where a variable was filled in."""
        if not self.written:
            return ""
        depth = len(path)
        found = [text for (file, at), text in self.written.items() if file == document.file and at[:depth] == path]
        return ", ".join(found)

    def lay_cell(self, cell: Cell) -> None:
        """What a cell of the matrix sets."""
        data, document = cell.layer()
        self.lay("matrix", data, document)

    def _filled(self, node: Any, document: Document, path: Path) -> Any:
        """The data of a layer with the variables of the environment, less the values whose variable is not set."""
        if not path and "${env:" not in document.text:
            return node
        if isinstance(node, dict):
            filled = {key: self._filled(value, document, (*path, key)) for key, value in node.items()}
            return {key: value for key, value in filled.items() if value is not _LOST}
        if isinstance(node, list):
            items = [self._filled(value, document, (*path, index)) for index, value in enumerate(node)]
            # A value of an axis has the type of its key; one of a list, its own.
            of_a_matrix = path[:1] == (MATRIX,)
            return [value if of_a_matrix else plain(value) for value in items if value is not _LOST]
        text = plain(node)
        if not isinstance(text, str) or "${env:" not in text:
            return node
        self.written[document.file, path] = text
        try:
            value = with_variables(text, os.environ)
        except Unset as unset:
            self.broken.add(dotted(path[:2]))
            place = document.values.get(path, document.span(path))
            self._problem(
                place,
                "SPC106",
                "unresolved-reference",
                f"{dotted(path)}: the variable {unset.name} is not set here",
                f"export it, or give a default: ${{env:{unset.name}:-default}}",
                path,
            )
            return _LOST
        # What has no type yet still has none.
        return Typeless(value) if isinstance(node, Typeless) and isinstance(value, str) else value

    def _malformed_override(self, text: str, place: Span) -> None:
        """Report a word that is no override, with what upstream makes of its first sign."""
        sign = text[:1]
        what = "is not key=value"
        hint = "write key=value, such as model.tensor_model_parallel_size=2"
        if sign in _OVERRIDE_HINTS:
            what = f"begins with {sign}"
            hint = _OVERRIDE_HINTS[sign]
        self._problem(
            place,
            "SPC107",
            "malformed-override",
            f"{text!r} {what}",
            hint,
            (),
        )

    def lay(self, kind: str, data: dict[str, Any], document: Document) -> None:
        """Add a layer."""
        self.layers.append(_Layer(kind, data, document))

    def _problem(
        self,
        span: Span,
        code: str,
        name: str,
        message: str,
        hint: str,
        path: Path,
        severity: Severity = Severity.ERROR,
        fix: tuple[Edit, ...] = (),
    ) -> None:
        """Report what is wrong with a layer."""
        problem = Diagnostic(span, code, name, severity, message, hint, path, fix=fix)
        self.problems.append(problem)

    def finish(self, file: str, stem: str, overrides: tuple[str, ...], cell: Cell | None) -> Spec:
        """The layers laid on one another, each checked."""
        # Under every layer of a person's: the target's defaults and the recipe.
        target = self._choice("target", tuple(TARGETS), DEFAULT_TARGET)
        default_recipe = TARGETS[target].default_recipe
        recipe = self._choice("recipe", recipes_of(target), default_recipe)
        default_values, default_origins = _defaults(target, recipe)
        values = dict(default_values)
        origins = dict(default_origins)

        # The layers, lowest first. A key that one of them breaks keeps the value under it, whatever lies above.
        legal = catalogue(target)
        under: dict[str, Covered] = {}
        matrices: list[tuple[Any, Document]] = []
        for layer in self.layers:
            for key, value, path in self._checked(layer, target):
                if key == MATRIX:
                    matrices.append((value, layer.document))
                if origins[key].layer != "default":
                    lower = under.get(key, ())
                    under[key] = (*lower, (values[key], origins[key]))
                if value is None and legal.null_of(key) == "default":
                    values[key] = default_values[key]
                    origins[key] = default_origins[key]
                    continue
                place = _place(path, layer.document)
                if layer.kind == "matrix":
                    place = layer.document.values.get(path, place)
                adds = layer.kind == "override" and _is_inside(key, layer.document)
                laid = _merged(values[key], value) if adds else value
                values[key] = self._located(key, laid, layer)
                origins[key] = Origin(layer.kind, place, self._written_at(path, layer.document))
        for key, value in self.fixed.items():
            values[key] = value
            origins[key] = Origin("environment", Span("<environment>"))

        # What the matrix makes of it.
        cells = [] if cell is not None or not matrices else self._cells(matrices, overrides, legal)
        name = values["name"] or _as_name(stem)
        if cell is not None:
            name = _lay_own(cell, name, values, origins)

        users = [key for key in origins if origins[key] is not default_origins.get(key)]
        return Spec(
            file=file,
            name=name,
            target=target,
            values=values,
            origins=origins,
            problems=_one_a_place(self.problems),
            broken=frozenset(self.broken),
            overrides=overrides,
            documents=tuple(self.documents),
            set_by_user=tuple(users),
            folder=os.path.realpath(FilePath(file).parent),
            under=under,
            cells=tuple(cells),
            cell=cell,
        )

    def _cells(self, matrices: list[tuple[Any, Document]], overrides: tuple[str, ...], legal: Catalogue) -> list[Cell]:
        """The cells of the matrices of all layers, under the command line; what is wrong with them is reported."""
        from dfmspec.read.matrix import cells_of

        cells, problems = cells_of(matrices, {override.partition("=")[0] for override in overrides}, legal)
        self.problems += problems
        return cells

    def _choice(self, key: str, legal: tuple[str, ...], default: str) -> str:
        """`target` or `recipe`: needed before anything can be checked; an illegal one is reported with the rest."""
        for layer in reversed(self.layers):
            chosen = plain(layer.data.get(key))
            if key == "target" and isinstance(chosen, str):
                chosen, _ = unpinned(chosen)
            if chosen is None:
                continue
            is_legal = isinstance(chosen, str) and chosen in legal
            return chosen if is_legal else default
        return default

    def _located(self, key: str, value: Any, layer: _Layer) -> Any:
        """A relative path in a file, as seen from the working directory."""
        if key not in PATH_KEYS or layer.kind not in _FILE_LAYERS:
            return value
        if not isinstance(value, str) or refers(value):  # which is located once it is filled in
            return value
        folder = os.path.realpath(FilePath(layer.document.file).parent)
        if value.startswith(SPEC_DIR):
            spec_dir = self.spec_dir or folder
            return os.path.relpath(spec_dir + value.removeprefix(SPEC_DIR))
        if is_relative(value):
            base = self.base or folder
            return os.path.relpath(os.path.join(base, value))
        return value

    def _checked(self, layer: _Layer, target: str) -> Iterator[tuple[str, Any, Path]]:
        """The layer's legal entries; what is not legal is reported, and its key is broken.

        An entry that refers to a key is legal where there is such an entry: its value is checked once it is known.
        """
        legal = catalogue(target)
        data = self._without_pin(self._aliased(layer), layer.document)
        data = _sections(data, legal)
        data = typed(data, legal)
        may_refer = "${spec." in layer.document.text or layer.kind == "matrix"
        certain = _without_references(data, legal) if may_refer else data
        for problem in structural_findings(certain, layer.document, legal, target, self.budget):
            self.problems.append(self._without_value(problem, data, layer.document))
            if problem.path:
                self.broken.add(dotted(problem.path[:2]))
            # A key that is misspelt is not one that nobody set.
            for edit in problem.fix:
                if edit.kind == "rename":
                    self.broken.add(dotted((*edit.path[:-1], edit.value)))
        for key, value, path in layer_entries(data, legal):
            field = legal.field(key)
            if field is None or key in self.broken or legal.is_section(key):
                continue
            yield key, canonical(value, field), path

    def _without_pin(self, data: dict[str, Any], document: Document) -> dict[str, Any]:
        """The layer's data with `target: dfm@7cb7634` as its target; a revision that is not known is reported."""
        text = plain(data.get("target"))
        if not isinstance(text, str) or "@" not in text:
            return data
        target, is_known = unpinned(text)
        if target not in TARGETS:
            return data
        if not is_known:
            known = f"{target}@{TARGETS[target].revision}"
            path = ("target",)
            self._problem(
                document.values.get(path, document.span(path)),
                "SPC203",
                "value-not-allowed",
                f"target {text}: the catalogue knows no such revision; it knows {known}",
                f"pin {known}, or take the dfmspec that knows yours",
                path,
            )
        return {**data, "target": target}

    def _aliased(self, layer: _Layer) -> dict[str, Any]:
        """The layer's data, with the how-to's own names for checkpoint keys turned into the real ones."""
        section = layer.data.get("checkpoint")
        if not isinstance(section, dict):
            return layer.data
        used = [(alias, key) for alias, key in ALIASES if alias in section]
        if not used:
            return layer.data
        section = dict(section)
        for alias, key in used:
            self._unalias(section, alias, key, layer.document)
        return {**layer.data, "checkpoint": section}

    def _unalias(
        self,
        section: dict[str, Any],
        alias: str,
        key: str,
        document: Document,
    ) -> None:
        """Move what a checkpoint section has under an alias to its key, and report it."""
        path = ("checkpoint", alias)
        has_both = key in section
        if has_both:
            real: Path = ("checkpoint", key)
            self._problem(
                _place(real, document),
                "SPC102",
                "duplicate-key",
                f"checkpoint.{alias} and checkpoint.{key} are two names of one key",
                "keep one of the two",
                real,
            )

        # The how-to names the folder of an iteration; the key takes the folder above it, and ckpt_step the iteration.
        value = plain(section.pop(alias))
        edits = [Edit("rename", path, key)]
        if isinstance(value, str) and alias == "load_checkpoint":
            value, step = split_iteration(value)
            if step is not None:
                edits.append(Edit("set", path, value))
                if "ckpt_step" not in section:
                    edits.append(Edit("insert", path, ("ckpt_step", step)))
                section["ckpt_step"] = step

        span = Span(document.file)
        if document.text:
            span = document.span(path)
        self._problem(
            span,
            "CKP101",
            "documented-alias",
            f"checkpoint.{alias} is the how-to's name for checkpoint.{key}",
            f"write checkpoint.{key}; it is taken as that",
            path,
            Severity.HINT,
            fix=() if has_both else tuple(edits),
        )
        section.setdefault(key, value)


def _as_name(stem: str) -> str:
    """A file's name as the name of an experiment."""
    # A name is a word for folders: no blanks, no separators, and no point first.
    word = re.sub(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]", "-", stem)
    return word.lstrip("-.") or "experiment"


_Defaults = tuple[dict[str, Any], dict[str, Origin]]


@lru_cache
def _defaults(target: str, recipe: str) -> _Defaults:
    """The values and origins under every layer of a person's: the target's defaults, then the recipe's own."""
    legal = catalogue(target)
    values = dict(legal.defaults())
    origins = dict.fromkeys(values, Origin("default", Span("<defaults>")))
    document = parse_document(recipe_text(recipe), f"recipe {recipe}")
    for key, value, path in layer_entries(document.data, legal):
        # A recipe is of a family of targets, and may have keys that this one does not.
        if legal.field(key) is not None:
            place = document.span(path)
            values[key] = value
            origins[key] = Origin(f"recipe {recipe}", place)
    return values, origins


def recipe_value(target: str, recipe: str, key: str) -> Any:
    """What a key has when nobody sets it; None where it is derived."""
    values, _ = _defaults(target, recipe)
    return values[key]


def _place(path: Path, document: Document) -> Span:
    """Where a layer sets a key: under its own name, or under the how-to's."""
    if not document.text:
        return Span(document.file)
    if path not in document.keys:
        for alias, key in ALIASES:
            written: Path = ("checkpoint", alias)
            if path == ("checkpoint", key) and written in document.keys:
                return document.span(written)
    return document.span(path)


def _sections(data: dict[str, Any], legal: Catalogue) -> dict[str, Any]:
    """The data with `mixed_precision: NAME` as its recipe field, and without optional sections that are null."""
    kept: dict[str, Any] = {}
    for name, node in data.items():
        declared: tuple[str, ...] = ()
        if legal.is_section(name):
            declared = types(legal.field(name) or {})
        text = plain(node)
        is_null = text in (None, "null", "~", "")
        if "string" in declared and is_null:
            kept[name] = {"recipe": None}
        elif "string" in declared and isinstance(text, str):
            # Upstream takes bf16-mixed and bf16_mixed alike.
            kept[name] = {"recipe": text.replace("-", "_")}
        elif "null" not in declared or not is_null:
            kept[name] = node
    return kept


def _without_references(data: dict[str, Any], legal: Catalogue) -> dict[str, Any]:
    """The data of a layer but for the entries that refer to a key, of those that there are."""
    kept = dict(data)
    for key, value, path in layer_entries(data, legal):
        if key in _NEEDED_FIRST or legal.is_section(key) or legal.field(key) is None or not refers(value):
            continue
        if len(path) == 1:
            del kept[key]
            continue
        section = str(path[0])
        if kept[section] is data[section]:
            kept[section] = dict(data[section])
        del kept[section][path[1]]
    return kept


_WRITTEN_TO = (
    "checkpoint.save",
    "checkpoint.non_persistent_global_ckpt_dir",
    "checkpoint.non_persistent_local_ckpt_dir",
    "logger.tensorboard_dir",
    "logger.wandb_save_dir",
)
"""Keys of folders that a run writes into."""


def _lay_own(cell: Cell, name: str, values: dict[str, Any], origins: dict[str, Origin]) -> str:
    """Lay what a cell has of its own beside what it sets: its group's name, a folder for its checkpoints, a name.

    Returns that name.
    """
    own = {"name": f"{name}-{cell.name}"}
    if not origins["run.group"].is_set_by_user:
        own["run.group"] = name
    # A folder that all cells name would be written by all of them.
    save = values.get("checkpoint.save")
    for key in _WRITTEN_TO:
        place = values.get(key)
        if isinstance(place, str) and origins[key].is_set_by_user and not in_run_dir(place):
            own[key] = f"{place}/{cell.name}"
    if "checkpoint.save" in own and values.get("checkpoint.load") == save:
        own["checkpoint.load"] = own["checkpoint.save"]
    values.update(own)
    origins.update(dict.fromkeys(own, Origin("matrix", cell.settings[0].place)))
    return own["name"]


def _one_a_place(problems: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The findings, less a remark on how a value is read where another says that it is the wrong value."""
    wrong = {problem.span for problem in problems if problem.severity is Severity.ERROR}
    kept = [problem for problem in problems if problem.code != "SPC103" or problem.span not in wrong]
    return tuple(kept)


_LOST = object()
"""In place of a value whose variable is not set."""


def _is_inside(key: str, override: Document) -> bool:
    """Whether an override is of an entry of a key's mapping, as of launcher.env.NAME, and not of all of it."""
    depth = key.count(".") + 1
    return any(len(path) > depth for path in override.values)


def _merged(under: Any, value: Any) -> Any:
    """A mapping over another: its own entries, and those that only the other has."""
    if not isinstance(under, dict) or not isinstance(value, dict):
        return value
    merged = dict(under)
    for key, entry in value.items():
        merged[key] = _merged(under.get(key), entry)
    return merged
