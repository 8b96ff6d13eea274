"""The ledger: every number that the paper prints, beside ours: measured, trained or counted here."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from drrn.disk import sha256, write_whole
from drrn.errors import counted, signed
from drrn.help import script
from drrn.home import CONF, DATA, HOME
from drrn.identity import WEIGHTS
from drrn.layers import conv_weights
from drrn.metrics import METRICS
from drrn.networks import NETWORKS, on_paper
from drrn.paper import network_of, paper_numbers
from drrn.patches import Recipe
from drrn.protocol import PAPER, describe
from drrn.report.measurements import MISSING, Measurement, from_record, from_scores, set_size
from drrn.report.page import Part, Section, write_page
from drrn.report.records import read_runs
from drrn.report.studies import preset
from drrn.report.tables import Table
from drrn.sets import registered_sets
from drrn.weights.shipped import shipped

QUOTED, REMEASURED, TRAINED, COUNTED = STATES = ("quoted", "re-measured", "trained here", "counted")
SCORES = DATA / "ledger"  # scores files of the package


class Published(NamedTuple):
    """Weights that others published: the paper's name of the method, the file, a note."""

    method: str
    file: str
    note: str = ""


PUBLISHED = {
    r"VDSR_d20_64f_noBN_noinputReLU": Published("VDSR", "VDSR_Official.mat", "VDSR's authors' weights"),
    r"SRCNN(_middle1_features64)?": Published(
        "SRCNN", "srcnn_Y_scale{}.pth", "9-1-5; the paper cites the 9-5-5 network"
    ),
    r"FSRCNN_(x\d|scale\d_features56_s12_m4)": Published("FSRCNN", "fsrcnn_Y_scale{}.pth"),
}


class Source(NamedTuple):
    """The origin of a number of ours; several measurements' commands are joined by &&, their digests by blanks."""

    state: str = QUOTED
    command: str = ""
    weights: str = ""  # SHA-256
    record: str = ""  # SHA-256 of the run record or the file of scores


class Ours(NamedTuple):
    """Our measurement of a method on a set at a scale."""

    values: dict[str, float]  # means by metric
    source: Source
    note: str


Found = dict[tuple[str, str, int], Ours]  # by (method, set, scale)


class Entry(NamedTuple):
    """A number of the paper."""

    place: str  # "Table 2"
    what: str
    paper: str
    ours: str = MISSING
    difference: str = MISSING
    source: Source = Source()
    note: str = ""


def write_ledger(scores: list[Path], records: list[dict[str, Any]], output: Path, command: str) -> None:
    """Write the ledger of `everything` to a folder: ledger.csv, .md and .html, the last two with `command`."""
    entries = list(ledger(everything(scores, records)))
    columns = [*Entry._fields[:-2], *Source._fields, "note"]
    flat = Table("The ledger", columns, [[*entry[:-2], *entry.source, entry.note] for entry in entries])
    tables = _tables(entries)
    text = "\n".join(["# The ledger", "", *(f"{line}\n" for line in ABOUT), f"Made by `{command}`.\n"])
    text += "\n" + "\n".join(table.markdown() for table in tables)
    write_whole(output / "ledger.csv", flat.csv())
    write_whole(output / "ledger.md", text)
    sections = [Section("ledger", ABOUT[0], [Part("", ABOUT[1:], tables)])]
    write_page(output / "ledger.html", "The ledger", sections, command)
    print(f"written: {output / 'ledger'}.csv, .md, .html")


def everything(scores: list[Path], records: list[dict[str, Any]]) -> Found:
    """`measured` from these, from data/ledger, and from the records and scores beside the shipped weights."""
    beside = [path.with_suffix(".json") for path in shipped().values()]
    contents = {path: json.loads(path.read_bytes()) for path in beside if path.is_file()}
    runs = [str(path) for path, content in contents.items() if "config" in content]
    files = [path for path, content in contents.items() if "methods" in content]
    return measured([*sorted(SCORES.glob("*.json")), *files, *scores], read_runs(runs) + records if runs else records)


def measured(files: list[Path], records: list[dict[str, Any]]) -> Found:
    """Means over whole sets, of the longest trainings; those of bicubic and published weights come before them."""
    trained: dict[tuple, list[Measurement]] = defaultdict(list)
    first: Found = {}
    of_runs = [m for record in records if record["status"] == "finished" for m in from_record(record)]
    of_files = [m for path in files for m in from_scores(path)]
    for m in of_runs + of_files:
        whole = m.images == set_size(m.set_name, m.images)
        if describe(m.protocol) != describe(asdict(PAPER)) or not whole:
            continue
        place = (m.set_name, m.scale)
        published = next((its for name, its in PUBLISHED.items() if re.fullmatch(name, m.method)), None)
        if m.steps is not None and (method := _of_paper(m.method)):
            trained[method, *place].append(m)
        elif Path(m.source) in files and (m.method == "Bicubic" or (published and m.steps is None)):
            key = (published.method if published else "Bicubic", *place)
            if key not in first or first[key].values.keys() <= m.values.keys():  # fewer metrics replace none
                first[key] = Ours(m.values, _source(m, published), published.note if published else "")
    return {place: _trained(those) for place, those in trained.items()} | first


def _trained(those: list[Measurement]) -> Ours:
    """The mean over the seeds of the longest training."""
    longest = max(those, key=lambda m: m.steps)
    alike = list({m.seed: m for m in those if m.experiment == longest.experiment}.values())
    metrics = [k for k in longest.values if all(k in m.values for m in alike)]
    means = {k: statistics.fmean(m.values[k] for m in alike) for k in metrics}
    note = f"{longest.method}, {counted(longest.steps, 'step')}, seeds: {len(alike)}"
    return Ours(means, _joined([_source(m) for m in alike]), note)


def _joined(sources: list[Source]) -> Source:
    """The source of a number computed from several measurements."""
    state = TRAINED if any(source.state == TRAINED for source in sources) else sources[0].state
    _, commands, weights, records = (dict.fromkeys(filter(None, column)) for column in zip(*sources, strict=True))
    return Source(state, " && ".join(commands), " ".join(weights), " ".join(records))


def _source(m: Measurement, published: Published | None = None) -> Source:
    """A measurement's source: the command trains the run again, or scores bicubic or the weights again."""
    path = Path(m.source)
    state, record = TRAINED if m.steps is not None else REMEASURED, sha256(path)
    if m.method == "Bicubic":
        return Source(state, _scoring(m, "method=bicubic", scales=False), "", record)
    if published:
        convert = f"{script('convert')} input={published.file.format(m.scale)} output=weights.safetensors"
        score = _scoring(m, "checkpoint=weights.safetensors", scales="{}" in published.file)
        return Source(state, f"{convert} && {score}", m.weights or "", record)
    beside = path.with_name(WEIGHTS), path.with_suffix(".safetensors")
    files = {sha256(file): file for file in beside if file.is_file()}
    if not m.weights:
        command = f"{script('train')} from_record={_short(path)} output=again"
        return Source(state, command, next(iter(files), ""), record)
    file = _short(files[m.weights]) if m.weights in files else "weights.safetensors"
    return Source(state, _scoring(m, f"checkpoint={file}", scales=True), m.weights, record)


def _short(path: Path) -> str:
    """A path relative to the clone; for a file elsewhere, its folder and name."""
    inside = path.resolve().is_relative_to(HOME)
    return str(path.resolve().relative_to(HOME) if inside else Path(*path.parts[-2:]))


def _scoring(m: Measurement, method: str, scales: bool) -> str:
    """The command that writes a scores file again."""
    content = json.loads(Path(m.source).read_bytes())
    command = f"{script('evaluate')} {method} 'sets=[{','.join(content['sets'])}]' 'metrics=[{','.join(m.values)}]'"
    measured = sorted({row["scale"] for row in content["scores"] if row["weights"] == m.weights})
    return command + f" 'scales=[{','.join(map(str, measured))}]'" * scales


def _of_paper(name: str) -> str | None:
    """The paper's name of a network trained at the paper's size; None for another width."""
    name = re.sub(r"_(noBN|nobias|rectified|noinputReLU)", "", name)
    name = {"VDSR_d20_64f": "VDSR"}.get(name, re.sub(r"_x\d$", "", name))
    whole = r"VDSR(_d\d+)?|DRRN(_NS)?(_C)?_B\d+U\d+|SRCNN|FSRCNN|ESPCN|DRCN|RED30"
    return name if re.fullmatch(whole, name) else None


def ledger(found: Found) -> Iterator[Entry]:
    """Every number of the paper, in the order of its tables, figures and text."""
    for name, metrics in (("table2", ("psnr", "ssim")), ("table3", ("ifc",))):
        for row in paper_numbers(name):
            for metric in metrics:
                what = f"{row['dataset']} ×{row['scale']}, {row['method']}, {metric.upper()}"
                yield _scored(f"Table {name[-1]}", what, row[metric], row, metric, found)
    for name in ("table4", "fig1", "fig6", "fig8", "fig9"):
        place = f"{'Table' if name == 'table4' else 'Fig.'} {name[-1]}"
        for row in paper_numbers(name):
            network = network_of(row)
            what = f"{row['dataset']} ×{row['scale']}, {network}, PSNR"
            yield _scored(place, what, row["psnr"], row | {"method": network}, "psnr", found)
            yield from _counted_of(place, network, row)
    for row in paper_numbers("text"):
        yield _of_text(row, found)


def _scored(place: str, what: str, printed: str, row: dict[str, str], metric: str, found: Found) -> Entry:
    values, source, note = found.get((row["method"], row["dataset"], int(row["scale"])), Ours({}, Source(), ""))
    if metric not in values:
        return Entry(place, what, printed or MISSING, note="" if printed else row["note"])
    digits = METRICS[metric].digits
    if place == "Table 3" and row["method"] == "VDSR" and source.state == REMEASURED:
        note = "VDSR's authors' weights; the paper's own re-implementation has BatchNorm"
    difference = signed(round(values[metric], digits) - float(printed), digits) if printed else MISSING
    return Entry(place, what, printed or MISSING, f"{values[metric]:.{digits}f}", difference, source, note)


def _counted_of(place: str, network: str, row: dict[str, str]) -> Iterator[Entry]:
    """Entries of the weights and layers that a row prints, counted on the network built here."""
    built = built_here(network)
    if row["depth"] and row.get("group") != "shallow":
        yield _count(place, f"{network}, layers", row["depth"], built and built.depth)
    if row.get("weights_printed"):
        thousands = f"{conv_weights(built) / 1000:.0f}K" if built else None
        note = row["note"] if "erratum" in row["note"] else ""
        yield _count(place, f"{network}, weights", row["weights_printed"], thousands, note)
    if row.get("times_drrn_weights") and built:
        times = conv_weights(built) / conv_weights(built_here("DRRN_B1U9"))
        yield _count(place, f"{network}, weights in DRRN's", row["times_drrn_weights"], f"{times:.2f}")


def _count(place: str, what: str, printed: str, ours: Any, note: str = "") -> Entry:
    if ours is None:
        return Entry(place, what, printed)
    a, b = (float(str(value).removesuffix("K")) for value in (ours, printed))
    digits = len(str(ours).removesuffix("K").partition(".")[2])
    source = Source(COUNTED, f"{script('report')} ledger=true")
    return Entry(place, what, printed, str(ours), signed(a - b, digits), source, note)


@cache
def built_here(network: str) -> Any:
    """A network of the paper, with shapes but no values; None if this package does not have it."""
    drrn, vdsr = re.fullmatch(r"DRRN(_NS)?(_C)?_B(\d+)U(\d+)", network), re.fullmatch(r"VDSR_d(\d+)", network)
    name = "drrn" if drrn else "vdsr_wide" if vdsr else network.lower()
    if not (drrn or vdsr or name in NETWORKS or name == "vdsr"):
        return None
    model = preset(name)
    if drrn:
        model |= {"B": int(drrn[3]), "U": int(drrn[4]), "weight_sharing": not drrn[1], "multi_path": not drrn[2]}
    if vdsr:
        model["B"] = int(vdsr[1]) - 1
    return on_paper(model)


def _of_text(row: dict[str, str], found: Found) -> Entry:
    """The entry of a number in the paper's text: a margin between two methods, a count or a setting."""
    kind, *names = row["key"].split(" ")
    entry = Entry("Text", f"{row['where']}: {row['what']}", row["value"], note=row["note"])
    if kind == "margin":
        both = [found[key] for method in names[2:] if (key := (method, names[0], int(names[1]))) in found]
        if sum("psnr" in its.values for its in both) < 2:
            return entry
        gain = both[0].values["psnr"] - both[1].values["psnr"]
        difference = signed(round(gain, 2) - float(row["value"]), 2)
        return entry._replace(ours=f"{gain:.2f}", difference=difference, source=_joined([its.source for its in both]))
    if kind not in COUNTS:
        return entry._replace(paper=f"{row['value']} {row['unit']}")
    return _count("Text", entry.what, row["value"], f"{COUNTS[kind](*names):g}", row["note"])


def _setting(key: str) -> float:
    """The value of a key, "group.name", in the files of conf/ with the paper's settings."""
    group, _, name = key.partition(".")
    files = {"data": "train291", "model": "drrn", "optim": "paper"}
    return OmegaConf.load(Path(CONF) / group / f"{files[group]}.yaml")[name]


COUNTS: dict[str, Callable[..., float]] = {  # kinds of the text's numbers that are counted here
    "depth": lambda network: built_here(network).depth,
    "field": lambda network: 2 * built_here(network).receptive_radius + 1,
    "images": lambda *sets: sum(registered_sets()[name] for name in sets),
    "recursions": lambda network: preset(network.lower())["T"],
    "augmented": lambda: Recipe(()).orientations - 1,
    "setting": _setting,
}


ABOUT = [
    "Every number that the paper prints, and ours.",
    "quoted: the paper's number, without one of ours. re-measured: bicubic and published weights, with this "
    "package's protocol. trained here: by this package. counted: on its networks, sets and settings.",
    "Urban100: only four of its images were available, so it is quoted. Set14: our image files differ slightly from "
    "those of the paper, so differences there are uncertain by about ±0.03 dB.",
]


def _tables(entries: list[Entry]) -> list[Table]:
    """Tables of: the numbers counted by state; the entries of each place, with the sources' numbers; the sources."""
    sources = list(dict.fromkeys(entry.source for entry in entries if entry.source.command))
    number = {source: str(index) for index, source in enumerate(sources, 1)}
    places: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        places[entry.place].append(entry)
    counts = []
    for place, those in [*places.items(), ("all", entries)]:
        printed = [e for e in those if e.paper != MISSING]
        states = Counter(e.source.state for e in printed)
        same = sum(e.difference != MISSING and not float(e.difference.replace("−", "-")) for e in printed)
        counts.append([place, *map(str, [len(printed), *(states[state] for state in STATES), same])])
    tables = [Table("Numbers by their state", ["where", "numbers", *STATES, "same in all digits"], counts)]
    columns = ["number", "paper", "ours", "difference", "state", "source", "note"]
    for place, those in places.items():
        rows = [[*e[1:5], e.source.state, number.get(e.source, ""), e.note] for e in those]
        tables.append(Table(place, columns, rows))
    rows = []
    for source in sources:
        digests = (" ".join(its[:12] for its in several.split()) for several in (source.weights, source.record))
        rows.append([number[source], source.state, f"`{source.command}`", *digests])
    notes = ["The first 12 of the 64 digits of SHA-256: of the weights, and of the run record or the file of scores."]
    return [*tables, Table("Sources", ["source", "state", "command", "weights", "record"], rows, notes)]
