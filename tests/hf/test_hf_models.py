"""Every supported model against transformers' own attention module: outputs and cache, in one go and in steps."""

import pytest

from jforge import hf
from jforge.attention import REGISTRY
from jforge.core.compare import OUT
from jforge.harness.tiny_configs import MODELS
from jforge.harness.tiny_models import SPLITS, against_transformers


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_caches(name):
    _, errors = against_transformers(name)
    assert set(errors) == {"forward", "cache", *SPLITS}
    assert max(errors.values()) <= OUT["float32"], errors


@pytest.mark.parametrize("name", MODELS)
def test_mechanism(name):
    spec = MODELS[name]
    model = spec.build()
    for layer in spec.layers:
        att, cfg, _ = hf.convert(model.config, model.state_dict(), layer)
        assert att is REGISTRY[spec.mechanism]
        assert isinstance(cfg, att.Config)
