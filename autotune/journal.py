"""What a tuning run has finished, one JSON object a line, so that an interrupted run goes on and never starts again."""

import json
from pathlib import Path


def key_of(name: dict) -> str:
    """One string for an identity."""
    return json.dumps(name, sort_keys=True)


class Journal:
    """Records by identity. With a path each record is appended to the file at once, by one write.

    Several processes may append to one file. A line that was torn when its writer was killed is passed over.
    """

    def __init__(self, path: Path | None):
        self.path, self.records = path, {}
        text = path.read_bytes() if path and path.exists() else b""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.records[key_of(entry["name"])] = entry
            except (ValueError, KeyError, TypeError):
                continue
        self.torn = bool(text) and not text.endswith(b"\n")

    def get(self, name: dict) -> dict | None:
        """The newest record of an identity."""
        entry = self.records.get(key_of(name))
        return entry and entry["record"]

    def all(self, **wanted) -> list[tuple[dict, dict]]:
        """(identity, record) of those whose identity has these values."""
        return [(e["name"], e["record"]) for e in self.records.values() if wanted.items() <= e["name"].items()]

    def add(self, name: dict, record: dict) -> None:
        entry = {"name": name, "record": record}
        self.records[key_of(name)] = entry
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (b"\n" if self.torn else b"") + json.dumps(entry).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # unbuffered: one write
            self.torn = file.write(line) < len(line)  # which a full disk cuts short
