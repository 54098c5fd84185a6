"""Two records of `python -m bench ops`, old and new: what has become slower beyond the noise.

Compared are the ratios to eager PyTorch, which was timed in the same run as llmcore: two machines, or one machine on
two days, differ in speed, but not nearly as much in ratios.
"""

import json
from pathlib import Path
from typing import Any

# Two runs of the same code on a machine that others use differed by up to 0.22 of a ratio.
NOISE = 0.25


def read(path: Path) -> dict[str, Any]:
    """Raises SystemExit with one sentence where this is no record."""
    try:
        record = json.loads(path.read_text())
        record["machine"], record["records"]
        return record
    except OSError as error:
        raise SystemExit(f"bench: {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"bench: {path} is not a record of python -m bench.") from None


def rows(record: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["op"], r["case"], r.get("pass", "")): r for r in record["records"] if "op" in r}


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One sentence for each row that is slower, wrong or gone."""
    found = []
    before, after = rows(old), rows(new)
    wrong = {key[:2]: row["error"] for key, row in after.items() if "error" in row}
    for key, row in before.items():
        name = " ".join(key)
        if key[:2] in wrong:
            found.append(f"{name}: wrong ({wrong[key[:2]]})")
        elif "error" in row:
            continue
        elif key not in after:
            found.append(f"{name}: no longer measured")
        else:
            was, is_ = (r["times faster than"].get("eager") for r in (row, after[key]))
            if was is None or is_ is None:
                continue
            spread = max(r["spread"][n] for r in (row, after[key]) for n in ("llmcore", "eager"))
            if is_ < was * (1 - max(NOISE, spread)):
                found.append(f"{name}: {was:.2f} times faster than eager before, {is_:.2f} now")
    return found


def main(old: Path, new: Path) -> int:
    found = regressions(read(old), read(new))
    print("\n".join(found) or "nothing is slower beyond the noise")
    return 1 if found else 0
