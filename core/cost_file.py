"""Files of cost models: what `tandem profile` writes and `router.cost_model` names."""

from __future__ import annotations

import json
from pathlib import Path

from core.cost_model import CostModel
from core.errors import ConfigError


def read_cost_model(path: str) -> CostModel:
    """Raises ConfigError for a file that is missing, unreadable or no cost model."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot read the cost model {path}: {reason}; write one with `tandem profile --json {path}`"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is no cost model (no JSON: {error}); write one with `tandem profile --json {path}`"
        ) from None
    return CostModel.from_json(tree, path)


def write_cost_model(model: CostModel, path: str) -> None:
    """Whole or not at all. Raises ConfigError when it cannot be written."""
    place = Path(path)
    fresh = place.with_name(f"{place.name}.new")
    try:
        fresh.write_text(json.dumps(model.to_json(), indent=1) + "\n", encoding="utf-8")
        fresh.replace(place)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the cost model {path}: {error.strerror or error}") from None


def check_fingerprint(model: CostModel, path: str, served: str, name: str) -> None:
    """Raises ConfigError when the file was measured on another model than the one that is served (both hexadecimal)."""
    if model.fingerprint and model.fingerprint != served:
        raise ConfigError(
            f"router.cost_model {path} was measured on the model {model.fingerprint[:16]}…, "
            f"but {name} ({served[:16]}…) is served; "
            f"measure this one with `tandem profile --json {path}` and the same --model and --dtype, or leave the key out"
        )
