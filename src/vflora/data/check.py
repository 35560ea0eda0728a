"""`vflora data check`: read everything in a data set, and list what is wrong by shard and sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from vflora.data.head_needs import missing_for_the_head
from vflora.data.images import MAX_MEGAPIXELS, BadImageError, decode
from vflora.data.schema import (
    COUNT_KEY,
    IDENTITY_KEY,
    SPLITS,
    canonical,
    manifest_path,
    read_manifest,
    read_table,
    shard_folder,
)
from vflora.data.shards import BadSampleError, BadShardError, RawSample, Sample, scan_shard
from vflora.errors import UserError


@dataclass(frozen=True)
class CheckConfig:
    """Which data set to check."""

    wds_root: Path
    """Folder of the data set."""

    metadata_key: str | None = None
    """Field that names the character; without it, the manifest's column besides identity_id and count."""

    max_megapixels: float = MAX_MEGAPIXELS
    """Larger pictures are reported instead of decoded."""

    num_workers: int = 4
    """Pictures that are decoded at the same time."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: with the flag to change.
        """
        if self.num_workers < 1:
            raise UserError("--num_workers must be 1 or more.")


@dataclass(frozen=True)
class Problem:
    """Something wrong: in which file, with which sample (empty for the whole file), and what."""

    file: str
    sample: str
    what: str


@dataclass
class Findings:
    """What reading a data set has shown so far.

    Attributes:
        problems: everything wrong.
        size: height and width of the first readable picture.
        counts: split -> character -> samples.
        owners: identity number -> the character that had it first.
        numbers: character -> the identity number that it had first.
        places: sample key -> the shard that had it first.
        without_identity: samples without an identity number.
    """

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    without_identity: int = 0

    @property
    def samples(self) -> int:
        """Samples whose metadata could be read."""
        return sum(counts.total() for counts in self.counts.values())

    def report(self, file: Path | str, sample: str, what: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(Path(file).name, sample, what))

    def claim(self, file: Path, sample: str, character: str, number: int) -> None:
        """Notes that `character` has identity `number`, and a problem if either is taken."""
        known_number = self.numbers.setdefault(character, number)
        known_owner = self.owners.setdefault(number, character)
        if known_number != number:
            self.report(file, sample, f"{character!r} has {IDENTITY_KEY} {number}, elsewhere {known_number}")
        elif known_owner != character:
            self.report(file, sample, f"{IDENTITY_KEY} {number} of {character!r} belongs to {known_owner!r}")


def run(config: CheckConfig) -> int:
    """Checks a data set and writes what is wrong as a table.

    Returns:
        The exit code: 0 if nothing is wrong, else 1.

    Raises:
        UserError: there is no data set, or no way to tell which field names the character.
    """
    findings = check(config)
    for line in table(findings.problems):
        tqdm.write(line)
    tqdm.write(_summary(findings))
    if not findings.problems and findings.without_identity < findings.samples:
        for line in missing_for_the_head(findings.counts):
            tqdm.write(line)
    return 1 if findings.problems else 0


def check(config: CheckConfig) -> Findings:
    """Reads every shard, picture, JSON and manifest.

    Raises:
        UserError: there is no data set, or no way to tell which field names the character.
    """
    root = config.wds_root
    if not root.is_dir():
        raise UserError(f"There is no data set {root}: give the folder that `vflora data pack` wrote.")
    if not any(shard_folder(root, split).is_dir() or manifest_path(root, split).is_file() for split in SPLITS):
        raise UserError(
            f"{root} is no packed data set: run `vflora data pack` first, and give the folder that it wrote."
        )
    shards = {split: sorted(shard_folder(root, split).glob("*.tar")) for split in SPLITS}
    metadata_key = config.metadata_key or _guess_key(root)
    findings = Findings()
    if not shards["train"]:
        findings.report(shard_folder(root, "train"), "", "there are no shards in data/train")
    total = sum(path.stat().st_size for paths in shards.values() for path in paths)
    progress = tqdm(total=total, desc="checking", unit="B", unit_scale=True)
    with progress, ThreadPoolExecutor(config.num_workers) as pool:
        for split in SPLITS:
            findings.counts[split] = Counter()
            for shard in shards[split]:
                samples = list(_metadata(findings, shard, split, metadata_key))
                sizes = pool.map(lambda sample: _picture_size(sample, config.max_megapixels), samples)
                _compare_sizes(findings, shard, samples, sizes, progress)
                progress.update(shard.stat().st_size - sum(sample.size for sample in samples))
            if shards[split] or manifest_path(root, split).exists():
                _compare_manifest(findings, manifest_path(root, split), split, metadata_key)
    if 0 < findings.without_identity < findings.samples:
        where = shard_folder(root, "train")
        findings.report(where, "", f"{findings.without_identity} samples lack {IDENTITY_KEY}, the others have it")
    return findings


def _guess_key(root: Path) -> str:
    manifest = manifest_path(root, "train")
    if not manifest.is_file():
        raise UserError(f"There is no manifest {manifest}: name the field of the character with --metadata_key.")
    columns, _ = read_table(manifest)
    others = [column for column in columns if column not in (IDENTITY_KEY, COUNT_KEY)]
    if len(others) != 1:
        raise UserError(f"{manifest} has the columns {', '.join(columns)}: name the character's with --metadata_key.")
    return others[0]


def _metadata(findings: Findings, shard: Path, split: str, metadata_key: str) -> Iterator[Sample]:
    """Checks the archive and the JSON of a shard, and yields the samples that have a picture to look at."""
    key = ""
    try:
        for raw in scan_shard(shard):
            key = raw.key
            if findings.places.setdefault(key, shard.name) != shard.name:
                findings.report(shard, key, f"a sample of this name is in {findings.places[key]} as well")
            try:
                _check_fields(findings, shard, split, raw, metadata_key)
            except BadSampleError as error:
                findings.report(shard, key, str(error))
            try:
                yield Sample(key, None, str(shard), *raw.image())
            except BadSampleError as error:
                findings.report(shard, key, str(error))
    except BadShardError as error:
        findings.report(shard, "", f"{error}, after sample {key!r}" if key else str(error))


def _check_fields(findings: Findings, shard: Path, split: str, raw: RawSample, metadata_key: str) -> None:
    fields = raw.fields()
    value = fields.get(metadata_key)
    if not isinstance(value, str) or not canonical(value):
        found = repr(value) if metadata_key in fields else "nothing"
        raise BadSampleError(f"its JSON has {found} for {metadata_key!r}, which names no character")
    character = canonical(value)
    findings.counts[split][character] += 1
    number = fields.get(IDENTITY_KEY)
    if number is None:
        findings.without_identity += 1
    elif not isinstance(number, int) or isinstance(number, bool):
        raise BadSampleError(f"its JSON has {number!r} for {IDENTITY_KEY!r}, which is no whole number")
    else:
        findings.claim(shard, raw.key, character, number)


def _picture_size(sample: Sample, max_megapixels: float) -> tuple[int, int] | str:
    try:
        image = decode(sample.read(), max_megapixels)
    except BadImageError as error:
        return str(error)
    return image.height, image.width


def _compare_sizes(
    findings: Findings, shard: Path, samples: Sequence[Sample], sizes: Iterator[tuple[int, int] | str], progress: tqdm
) -> None:
    for sample, size in zip(samples, sizes, strict=True):
        progress.update(sample.size)
        if isinstance(size, str):
            findings.report(shard, sample.key, size)
            continue
        findings.size = findings.size or size
        if size != findings.size:
            first = f"{findings.size[0]}x{findings.size[1]}"
            findings.report(shard, sample.key, f"its picture is {size[0]}x{size[1]}, the first one {first}")


def _compare_manifest(findings: Findings, path: Path, split: str, metadata_key: str) -> None:
    try:
        rows = read_manifest(path, metadata_key)
    except UserError as error:
        findings.report(path, "", str(error))
        return
    found, listed = findings.counts[split], set()
    for line, row in enumerate(rows, start=2):
        character, text = canonical(row[metadata_key] or ""), (row.get(COUNT_KEY) or "").strip()
        if character in listed:
            findings.report(path, "", f"line {line}: {character!r} is listed twice")
        listed.add(character)
        if text != str(found[character]):
            shown = f"line {line}: {character!r} has {COUNT_KEY} {text or 'nothing'}"
            findings.report(path, "", f"{shown}, the shards hold {found[character]}")
        if (number := (row.get(IDENTITY_KEY) or "").strip()) and not number.isdigit():
            findings.report(path, "", f"line {line}: {IDENTITY_KEY} {number!r} is no whole number")
        elif number:
            findings.claim(path, "", character, int(number))
    for character in sorted(set(found) - listed):
        findings.report(path, "", f"{character!r} is not listed, the shards hold {found[character]}")


def table(problems: Sequence[Problem]) -> list[str]:
    """Lays problems out in columns, in the order in which they were found."""
    if not problems:
        return []
    rows = [("file", "sample", "what is wrong"), *((p.file, p.sample or "-", p.what) for p in problems)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _summary(findings: Findings) -> str:
    size = "unknown size" if findings.size is None else f"{findings.size[0]}x{findings.size[1]}"
    parts = ", ".join(f"{split} {counts.total()}" for split, counts in findings.counts.items())
    characters = len({name for counts in findings.counts.values() for name in counts})
    text = f"{findings.samples} samples of {characters} characters, {size} ({parts}): "
    text += f"{len(findings.problems)} problems." if findings.problems else "nothing is wrong."
    if findings.samples and findings.without_identity == findings.samples:
        text += f" There is no {IDENTITY_KEY}: good for `vflora train`, not for `vflora train-head`."
    return text
