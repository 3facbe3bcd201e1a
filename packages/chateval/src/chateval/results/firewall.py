"""`chateval run --firewall FILE`: which scored items the training documents of a build hold (chatdata/firewall.py).

The answers do not depend on it. run.json records the file's hash and the flagged items; figures are then given for
clean and flagged items apart as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatdata.disk import naming
from chatdata.firewall.listing import FIREWALL_FORMAT, VERSION
from chateval.errors import ScoringError


def read_firewall(path: Path, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json keeps of a firewall file, for its own `tasks`: sha256, build_id and the flagged items by set.

    Sets the file did not check are left out of `flagged`. Raises ScoringError for a file that is not one, or is about
    none of these tasks, or about other files of one than are scored.
    """
    with naming(path):
        data = path.read_bytes()
    try:
        listed = json.loads(data)
        if listed["format"] != FIREWALL_FORMAT or listed["version"] != VERSION:
            raise ScoringError(f"{path}: {listed['format']} {listed['version']}, not {FIREWALL_FORMAT} {VERSION}")
        checked = {name: _files_of(contents["source"]) for name, contents in listed["checked"].items()}
        items = [(record["set"], record["item"]) for record in listed["items"]]
        build_id = listed["build_id"]
    except ScoringError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ScoringError(f"{path}: not a firewall file; `chatdata build` writes one beside its build") from None
    for name, task in tasks.items():
        if name in checked and checked[name] != _files_of(task["source"]):
            raise ScoringError(
                f"{path}: its {name} was read from other files than the {name} scored here; use one --data-dir"
            )
    if not set(tasks) & set(checked):
        raise ScoringError(f"{path}: checked {', '.join(checked) or 'nothing'}, but none of {', '.join(tasks)}")
    flagged = {name: sorted(item for set_, item in items if set_ == name) for name in tasks if name in checked}
    return {"sha256": hashlib.sha256(data).hexdigest(), "build_id": build_id, "flagged": flagged}


def _files_of(source: Mapping[str, Any]) -> list[str]:
    """A source is its files, wherever they came from; phrasings and word lists of a generated task are among them."""
    return sorted(file["sha256"] for file in source["files"])
