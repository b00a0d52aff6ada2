"""What can be asked: a base model, and adapters that come and go while it is served."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxsteer.adapters import Adapters, common_plan, stack_adapters
from jaxsteer.io import LoadedModel, SteeringFile
from jaxsteer.io.provenance import BaseOptions
from jaxsteer.io.steering_file import check_steering
from jaxsteer.plans import did_you_mean
from train.base_models import STEERING, check_base, find_base, load_steered, read_steered, trained_date
from train.serving.lineup import Candidate, Lineup, Refused, Served, UnknownModel

_log = logging.getLogger("jaxsteer.serving")

MAX_NAME = 100
"""Characters in an adapter's name, at most."""


class Roster:
    """A base model, and the adapters that steer it, stacked in one tree.

    Made by `open_roster`. Reading is safe on any thread; changes are made by `Engine.load` and `Engine.unload`.

    Args:
        loaded: the base model.
        name: under which the base model is served.
        places: number of adapters that there is room for.
        folders: from which steering files may be read later; none for no reading.
        other_base: steer a model of the same config whose weights are others.
        options: how the base model was loaded, which must be how it was loaded when an adapter was trained.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        *,
        places: int = 8,
        folders: Sequence[str | Path] = (),
        other_base: bool = False,
        options: BaseOptions | None = None,
    ) -> None:
        if places < 1:
            raise ValueError(f"places for adapters must be at least 1, got {places}")
        self.loaded, self.places = loaded, places
        self._folders = [Path(folder).resolve() for folder in folders]
        self._other_base, self._options = other_base, options or BaseOptions()
        self._given = set[str]()  # names in the tree, of unloaded adapters too
        chat = bool(loaded.tokenizer and loaded.tokenizer.chat_template)
        notes = {"chat": chat, "date": trained_date(Path(name)) if Path(name).is_dir() else None}
        self._base = Served(_base_name(name, loaded), None, (), {}, notes, None, int(time.time()))
        self.lineup = Lineup(None, {}, {self._base.name: self._base})

    @property
    def adapters(self) -> Adapters | None:
        """The stacked adapters; None before there are any."""
        return self.lineup.adapters

    @property
    def base(self) -> Served:
        """The base model."""
        return self._base

    @property
    def may_read(self) -> bool:
        """Whether there are folders from which adapters may be loaded."""
        return bool(self._folders)

    def names(self) -> list[str]:
        """Names of the models: the base first, then the adapters in the order in which they were loaded."""
        return list(self.lineup.served)

    def get(self, name: str) -> Served:
        """A model by its name.

        Raises:
            UnknownModel: there is none.
        """
        served = self.lineup.served
        if name not in served:
            raise UnknownModel(f"no model {name!r:.120}{did_you_mean(name, served)}; there are {', '.join(served)}")
        return served[name]

    def read(self, name: str, path: str) -> Candidate:
        """Read a steering file from one of the allowed folders and check that the base model can be steered by it.

        Slow, and safe on any thread. Symbolic links are followed first. What is outside the allowed folders is refused
        in the same words whether it exists or not.

        Args:
            name: for the adapter.
            path: of the file, or of the folder of a run.

        Raises:
            Refused: the name is taken or not a name; no folder is allowed, or the path is in none of them; there is no
                steering file, it is damaged, or it was made for another model.
        """
        self.check_name(name)
        place = self._allowed(path)
        try:
            file = read_steered(str(place))
            assert file is not None  # a resolved path is not the word none
            self._check(file)
        except ValueError as error:
            raise Refused(str(error)) from None
        return Candidate(name, file)

    def check_name(self, name: str) -> None:
        """Refuse a name that is taken, or that no client could type.

        Raises:
            Refused: with the reason.
        """
        if name in self.lineup.served:
            what = "the base model's" if name == self._base.name else "taken; unload that adapter first"
            raise Refused(f"adapter {name!r}: the name is {what}, or choose another")
        check_spelling(name)

    def _allowed(self, path: str) -> Path:
        """The file or folder that a path stands for, inside an allowed folder."""
        if not self._folders:
            raise Refused("loading adapters is switched off: no folder was allowed when the server was started")
        refused = Refused(f"{path!r:.300}: not in a folder that adapters may be loaded from; ask who runs the server")
        try:
            place = Path(path).resolve()
            inside = self._is_inside(place)
            if inside and (place / STEERING).is_file():
                place = (place / STEERING).resolve()
                inside = self._is_inside(place)
        except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte, ...
            raise refused from None
        if not inside:
            raise refused
        return place

    def _is_inside(self, place: Path) -> bool:
        return any(place.is_relative_to(folder) for folder in self._folders)

    def _check(self, file: SteeringFile) -> None:
        """Refuse a file that does not belong to the base model, as it is loaded."""
        file.check(self.loaded.config)
        _check_options(file, self._options)
        if said := file.check_weights(self.loaded.sample, other_base=self._other_base):
            _log.warning("%s", said)
        check_steering(file.steering, file.plan, self.loaded.config, str(file.path))
        check_notes(file)

    def with_candidate(self, candidate: Candidate, in_use: Callable[[str], bool]) -> Lineup:
        """The next lineup, with an adapter more. Nothing changes until it is assigned to `lineup`.

        It has the same common plan, if that can hold the adapter's; otherwise all are stacked anew.

        Args:
            candidate: the adapter.
            in_use: whether an unloaded adapter, by its name in the tree, still has jobs.

        Raises:
            Refused: all places are taken, or the adapters cannot be stacked.
        """
        self.check_name(candidate.name)
        now, file = self.lineup, candidate.file
        loaded = {served.adapter for served in now.served.values()}
        kept = {key: each for key, each in now.files.items() if key in loaded or in_use(key)}
        if len(kept) >= self.places:
            finishing = len(set(kept) - loaded)
            more = f" ({finishing} of them by unloaded adapters that finish their requests)" if finishing else ""
            raise Refused(
                f"adapter {candidate.name!r}: all {self.places} places are taken{more}; unload one, or start with more"
            )
        key = self._new_key(candidate.name)
        try:
            adapters = _with_file(now.adapters, set(now.files) - set(kept), key, file)
            if adapters is None:
                adapters = _stacked({**kept, key: file}, self.loaded, self.places)
        except ValueError as error:
            raise Refused(str(error)) from None
        return self._lineup(adapters, {**kept, key: file}, {**self._names_by_key(), key: candidate.name})

    def without(self, name: str) -> Lineup:
        """The next lineup, without a model. Its place is reused by a later adapter.

        Raises:
            UnknownModel: there is none of this name.
            Refused: it is the base model.
        """
        if self.get(name).adapter is None:
            raise Refused(f"{name!r} is the base model, which stays as long as the server runs")
        now = self.lineup
        return replace(now, served={key: served for key, served in now.served.items() if key != name})

    def start_with(self, candidates: Iterable[Candidate]) -> None:
        """Stack the first adapters.

        Raises:
            ValueError: more than there are places, or adapters that cannot be stacked.
        """
        files = {each.name: each.file for each in candidates}
        if len(files) > self.places:
            raise ValueError(f"{len(files)} adapters for {self.places} places; ask for more places")
        self._given |= set(files)
        if files:
            adapters = _stacked(files, self.loaded, self.places)
            self.lineup = self._lineup(adapters, files, {name: name for name in files})

    def _new_key(self, name: str) -> str:
        """A name in the tree that no adapter has had: jobs of an unloaded adapter of this name may still run."""
        numbers = range(2, len(self._given) + 3)
        key = next(key for key in (name, *(f"{name}#{number}" for number in numbers)) if key not in self._given)
        self._given.add(key)
        return key

    def _names_by_key(self) -> dict[str, str]:
        return {served.adapter: served.name for served in self.lineup.served.values() if served.adapter}

    def _lineup(self, adapters: Adapters, files: Mapping[str, SteeringFile], names: Mapping[str, str]) -> Lineup:
        """A lineup of files by their names in the tree, those served with the names that clients use."""
        before = self.lineup.served
        served = {self._base.name: self._base}
        for key, name in names.items():
            file, old = files[key], before.get(name)
            slots = adapters.slot_names(file.plan)
            created = old.created if old else int(time.time())
            served[name] = Served(name, key, file.plan, slots, file.notes, file.path, created)
        return Lineup(adapters, files, served)


def _with_file(adapters: Adapters | None, dropped: set[str], key: str, file: SteeringFile) -> Adapters | None:
    """The stacked tree with one file more, in the place of one that is dropped; None if its plan has no place in it."""
    if adapters is None:
        return None
    try:
        adapters.slot_names(file.plan)
    except ValueError:
        return None
    for name in dropped:
        adapters = adapters.without(name)
    return adapters.put(key, file.plan, file.steering)


def _stacked(files: Mapping[str, SteeringFile], loaded: LoadedModel, places: int) -> Adapters:
    trees = {key: (file.plan, file.steering) for key, file in files.items()}
    return stack_adapters(trees, loaded.config, places=places)


def _base_name(name: str, loaded: LoadedModel) -> str:
    """The name of a base model for clients: as it was given, but for a path only its last part."""
    return loaded.name if Path(name).exists() else name


def check_notes(file: SteeringFile) -> None:
    """Refuse notes that cannot be followed when prompts are made.

    Raises:
        ValueError: names the file and the note.
    """
    kinds: dict[str, Any] = {"template": str, "chat": bool, "date": str | None, "max_new_tokens": int | None}
    for note, kind in kinds.items():
        if note in file.notes and not isinstance(file.notes[note], kind):
            raise ValueError(f"{file.path}: its notes have {note}={file.notes[note]!r:.80}, which cannot be followed")


def _check_options(file: SteeringFile, base: BaseOptions) -> None:
    """Refuse steering that was trained on the base model in another form.

    Raises:
        ValueError: names the file and the difference.
    """
    if (own := file.base_options) != base:
        form = lambda options: (
            f"{'int8' if options.quantised else 'unquantised'}, tokenizer {options.tokenizer or 'own'}"
        )
        raise ValueError(
            f"{file.path}: trained on the base model with other settings ({form(own)}) than it is loaded with here "
            f"({form(base)}); serve it by another process"
        )


def check_spelling(name: str) -> None:
    """Refuse a name that no client could type.

    Raises:
        Refused: with what a name is.
    """
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise Refused(f"adapter {name!r:.120}: not a name; use 1 to {MAX_NAME} printable characters")


def parse_sources(texts: Sequence[str]) -> dict[str, str]:
    """Steering as typed on a command line: PATH or NAME=PATH each, or only the word "none".

    Returns:
        Paths by the names under which they are served; a path without a name has that of its run's folder, or the
        file's name without its ending.

    Raises:
        ValueError: a name that is given twice or that no client could type, or "none" beside others.
    """
    if list(texts) == ["none"]:
        return {}
    sources: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = _name_of(Path(text)), text
        if path == "none":
            raise ValueError(f"{text}: the base model is served anyway; leave out the word none")
        if name in sources:
            raise ValueError(f"{text}: two adapters would be named {name!r}; give each a name of its own: NAME={path}")
        check_spelling(name)
        sources[name] = path
    return sources


def _name_of(path: Path) -> str:
    if path.name == STEERING or path.is_dir():
        return (path.parent if path.name == STEERING else path).resolve().name
    return path.stem


def open_roster(
    sources: Mapping[str, str],
    model: str | None = None,
    *,
    dtype: str = "auto",
    places: int = 8,
    folders: Sequence[str | Path] = (),
    other_base: bool = False,
) -> Roster:
    """Load a base model and the adapters to start with, with a progress bar.

    Args:
        sources: paths of steering files or runs by name, see `parse_sources`; none for the base model alone.
        model: the base model; by default the one that the first steering file names.
        dtype: data type of the weights, see `train.base_models.load`.
        places: number of adapters that there is room for at a time.
        folders: from which `Roster.read` may load; none for no loading.
        other_base: steer a model of the same config whose weights are others.

    Raises:
        ValueError: no such file, more of them than places, or one of another base model than the first.
    """
    candidates = [Candidate(name, _read(path)) for name, path in sources.items()]
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder to load adapters from")
    files = [candidate.file for candidate in candidates]
    name = find_base(files[0] if files else None, model)
    _check_together(files, name, places, other_base=other_base)
    loaded, _ = load_steered(files[0] if files else "none", name, dtype, other_base=other_base)
    loaded.require_tokenizer()
    options = files[0].base_options if files else None
    roster = Roster(loaded, name, places=places, folders=folders, other_base=other_base, options=options)
    for candidate in candidates:
        roster.check_name(candidate.name)
    roster.start_with(candidates)
    return roster


def _read(path: str) -> SteeringFile:
    file = read_steered(path)
    if file is None:
        raise ValueError("none is the base model alone, not an adapter")
    check_notes(file)
    return file


def _check_together(files: Sequence[SteeringFile], base: str, places: int, *, other_base: bool) -> None:
    """Check what several adapters of one base model must share, before the model is loaded."""
    if len(files) > places:
        raise ValueError(f"{len(files)} adapters for {places} places; ask for more places")
    for file in files[1:]:  # the first is checked when the base is loaded as that file says
        check_base(file, base, other_base=other_base)
        _check_options(file, files[0].base_options)
    if files:
        common_plan([file.plan for file in files], files[0].config)
