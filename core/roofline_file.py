"""A roofline from a Hugging Face config.json and the name of a GPU, as `sim.roofline` of a configuration gives them."""

from __future__ import annotations

import json
from pathlib import Path

from core.errors import ConfigError
from core.gpus import gpu_named
from core.model_shape import ModelShape, shape_of
from core.roofline import ENGINES, Roofline


def read_shape(path: str) -> ModelShape:
    """Raises ConfigError for a file that cannot be read or is no config.json of a decoder-only model."""
    place = Path(path)
    place = place / "config.json" if place.is_dir() else place
    try:
        tree = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model's shape from {place}: {error}; give a Hugging Face config.json") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{place} is no config.json: it is not a mapping")
    return shape_of({"_name_or_path": place.parent.name if place.name == "config.json" else place.stem} | tree, str(place))


def read_roofline(path: str, gpu: str, tp: int = 1, pp: int = 1, engine: str = "graphs") -> Roofline:
    """One replica of the model on `tp` × `pp` GPUs; `cost_model()` of the result is what simulator and planner take.

    Raises ConfigError for a file, GPU or engine that is unknown, a split that is impossible and a model that does not fit.
    """
    if engine not in ENGINES:
        raise ConfigError(f"no engine named {engine!r} is known; choose one of {', '.join(ENGINES)}")
    roofline = Roofline(read_shape(path), gpu_named(gpu), tp, pp, ENGINES[engine])
    roofline.check_fits(1)
    return roofline
