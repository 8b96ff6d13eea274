"""The file of scores: every image's values, with the methods and sets; later calls add to it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drrn.disk import check_regular, write_json
from drrn.errors import UserError
from drrn.protocol import means
from drrn.sets import known_sets, part_of, set_label

FORMAT = 1
LARGEST = 1 << 30  # maximum bytes of a file of scores


class Scores:
    """The scores in a file, by (SHA-256 of the weights, set, scale, image).

    A score is valid only for the digests of its image and weights. A set's label (`row["set"]`) belongs to one
    folder: another folder of the same name gets a longer label. Scores of images that are no longer in their folder
    are removed. The file need not exist yet; another kind of file, or scores of another protocol, is a UserError.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path, self.protocol, self.dropped = path, protocol, 0
        self.rows: dict[tuple, dict[str, Any]] = {}
        self.methods: list[dict[str, Any]] = []
        self.sets: dict[str, dict[str, Any]] = {}  # label → folder, images, sha256; absent in earlier versions
        if path.exists():
            self._read()

    def _read(self) -> None:
        check_regular(self.path, LARGEST)
        try:
            content = json.loads(self.path.read_bytes())
            self.rows = {(r["weights"], r["set"], r["scale"], r["image"]): r for r in content["scores"]}
            self.methods = [dict(method) for method in content["methods"]]
            self.sets = {label: dict(about) for label, about in content.get("sets", {}).items()}
            stamped, version = content["protocol"], content["format"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"is not a file of scores ({type(error).__name__}: {error})"
            raise UserError(f"{self.path} exists and {why}: choose another output") from error
        if version != FORMAT:
            raise UserError(
                f"{self.path} holds scores of format {version}, this version writes {FORMAT}: choose another output"
            )
        if stamped != self.protocol:
            raise UserError(
                f"{self.path} has scores of the protocol {stamped}, which do not compare with {self.protocol}: "
                "choose another output"
            )

    def add_set(self, name: str, members: dict[Path, str]) -> str:
        """Add a set, a known one or a folder, and return its label.

        `members`, image file → SHA-256, are in the set's order.
        """
        images = {path.name: digest for path, digest in members.items()}
        contents = hashlib.sha256(json.dumps(sorted(images.items())).encode()).hexdigest()
        if part_of(name)[0] in known_sets():
            label, folder = name, None
        else:
            folder, base = str(Path(name).resolve()), set_label(name, list(members))
            parts = Path(folder).parts
            longer = ["/".join(parts[-k:]) for k in range(base.count("/") + 2, len(parts))]
            label = next((label for label in (base, *longer) if self._is(label, folder, contents, images)), folder)
            kept = {key: row for key, row in self.rows.items() if row["set"] != label or _of(row, images)}
            self.dropped, self.rows = self.dropped + len(self.rows) - len(kept), kept
        self.sets[label] = {"folder": folder, "images": len(images), "sha256": contents}
        return label

    def _is(self, label: str, folder: str, contents: str, images: dict[str, str]) -> bool:
        """Whether a label is free, or belongs to this folder or to these contents."""
        there = [row for row in self.rows.values() if row["set"] == label]
        if not there:
            return True
        if label in self.sets:
            return self.sets[label]["folder"] == folder or self.sets[label]["sha256"] == contents
        return any(_of(row, images) for row in there)

    def add_methods(self, methods: list[dict[str, Any]]) -> None:
        """Add methods, replacing those with the same weights."""
        now = [method["weights"] for method in methods]
        self.methods = [method for method in self.methods if method["weights"] not in now] + methods

    def find(self, key: tuple, digest: str) -> dict[str, Any]:
        """The row of a key if it was measured on an image with this digest; else {}."""
        row = self.rows.get(key, {})
        return row if row.get("image_sha256", digest) == digest else {}

    def write(self, facts: dict[str, Any], complete: bool = False) -> None:
        """Write the file atomically, with facts about this call, and with means if all requested scores exist."""
        rows = list(self.rows.values())
        content = {"format": FORMAT, "protocol": self.protocol, **facts, "methods": self.methods, "sets": self.sets}
        write_json(self.path, {**content, "scores": rows, **({"means": means(rows)} if complete else {})})


def _of(row: dict[str, Any], images: dict[str, str]) -> bool:
    """Whether a row was measured on one of these images (file name → SHA-256)."""
    digest = images.get(row["image"])
    return digest is not None and row.get("image_sha256", digest) == digest
