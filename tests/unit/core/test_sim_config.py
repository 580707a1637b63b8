"""The `sim:` branch: in which forms a cost model may be named, and what is refused."""

import pytest
from pydantic import ValidationError

from core.sim_config import SimConfig

ROOFLINE = {"model": "config.json", "gpu": "H100"}


@pytest.mark.parametrize("given", [{"roofline": ROOFLINE}, {"profile": {"roofline": ROOFLINE}}], ids=["beside", "inside"])
def test_a_roofline_may_stand_beside_the_pools_or_inside_the_profile(given):
    config = SimConfig.model_validate(given)
    assert config.profile is not None
    assert config.profile.roofline is not None
    assert config.profile.roofline.gpu == "H100"
    assert given in ({"roofline": ROOFLINE}, {"profile": {"roofline": ROOFLINE}}), "what was given stays as it was"


def test_a_path_is_a_profile():
    config = SimConfig.model_validate({"profile": "model.json"})
    assert config.profile is not None
    assert (config.profile.file, config.profile.roofline) == ("model.json", None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"profile": "model.json", "roofline": ROOFLINE}, "one of the two"),
        ({"profile": {"file": "model.json", "roofline": ROOFLINE}}, "one of the two"),
        ({"profile": {}}, "one of the two"),
        ({"roofline": {"model": "config.json"}}, "gpu"),
        ({"pools": [{"role": "prefil"}]}, "prefill"),
        ({"slo": {"ttft_s": 0}}, "greater than 0"),
        ({"speed": 2}, "speed"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        SimConfig.model_validate(given)
