"""The laws on every mechanism and example; torch_ref as the judge from outside; a toy that only registers itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
import torch_ref
from jforge import cli, laws, report
from jforge.attention import REGISTRY
from jforge.core import compare
from jforge.harness.frameworks import against_torch

EXAMPLES = [(name, i) for name in REGISTRY for i in range(len(REGISTRY[name].examples))]
IDS = [f"{name}-{i}" for name, i in EXAMPLES]


@pytest.mark.parametrize("name,i", EXAMPLES, ids=IDS)
def test_laws(name, i):
    att = jforge.get(name)
    result = jforge.check(att, att.examples[i])
    assert result.ok, f"\n{result}"
    assert [row.law for row in result] == list(laws.TITLES)


@pytest.mark.parametrize("name,i", EXAMPLES, ids=IDS)
def test_torch_ref_agrees(name, i):
    att = jforge.get(name)
    errors = against_torch(att, torch_ref.get(name), att.examples[i])
    assert max(errors.values()) <= compare.OUT["float32"], errors


@pytest.mark.parametrize("name", REGISTRY)
def test_a_prefill_of_no_tokens_changes_nothing(name):
    att = jforge.get(name)
    cfg = att.examples[0]
    params, rng = att.init_params(jax.random.key(0), cfg), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, cfg.hidden_size)), jnp.float32)
    prefill = jax.jit(lambda x, cache: att.prefill(params, cfg, x, cache))
    _, before = prefill(x, att.init_cache(cfg, 2, 5, jnp.float32))
    y, after = prefill(x[:, :0], before)
    assert y.shape == (2, 0, cfg.hidden_size)
    for leaf, same in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, same)
    assert att.forward(params, cfg, x[:, :0]).shape == (2, 0, cfg.hidden_size)


def test_an_exception_fails_the_row_and_is_shown():
    def broken(*args, **kwargs):
        raise KeyError("no such weight")

    result = jforge.check(jforge.get("gqa")._replace(decode=broken), laws=("L1", "L2"))
    assert not result.ok
    assert [row.ok for row in result] == [True, False]
    assert "KeyError: 'no such weight'" in str(result)


def _breaks(*args, **kwargs):
    raise AttributeError("no such field")


@pytest.mark.parametrize(
    "changes, chosen, said",
    [
        ({"cache_spec": _breaks}, ("L1", "L8"), "AttributeError: no such field"),
        ({"cost": _breaks}, ("L8",), "AttributeError: no such field"),
        ({"examples": ()}, ("L1", "L8"), "ValueError: examples is empty"),
    ],
)
def test_what_all_laws_need_fails_them_all(capsys, monkeypatch, changes, chosen, said):
    """In the report and on the command line, where a check of nothing is no success."""
    broken = jforge.get("gqa")._replace(**changes)
    result = jforge.check(broken, laws=chosen)
    assert [row.ok for row in result] == [False] * len(chosen) and str(result).count(said) == len(chosen)
    monkeypatch.setitem(REGISTRY, "broken", broken._replace(examples=broken.examples[:1]))
    for arguments in (["check", "broken"], ["check", "broken", "--json"]):
        assert cli.main([*arguments, *(f"--law={law}" for law in chosen)]) == 1
        shown = capsys.readouterr()
        assert said in shown.out and "Traceback" not in shown.err


def test_check_takes_an_attention_and_known_laws(untyped):
    with pytest.raises(TypeError, match="att is a str"):
        jforge.check("gqa")
    with pytest.raises(ValueError, match="'L99'"):
        jforge.check(jforge.get("gqa"), laws=("L99",))


def test_a_registered_toy_appears_everywhere(monkeypatch, capsys):
    """A tuple made with _replace and one registry line: names, laws, table and cost need nothing else."""
    gqa = jforge.get("gqa")
    toy = gqa._replace(summary="a toy", examples=gqa.examples[:1], models={"toy-1": gqa.models["Llama-3.1-8B"]})
    monkeypatch.setitem(REGISTRY, "toy", toy)
    assert "toy" in jforge.names() and jforge.get("toy") is toy
    assert "toy" in [row["mechanism"] for row in report.table(1024, "bfloat16")["rows"]]
    assert cli.main(["cost", "toy", "--context", "1k"]) == 0
    assert "toy in toy-1" in capsys.readouterr().out
    assert cli.main(["check", "toy"]) == 0
    assert "toy" in capsys.readouterr().out


def test_unknown_mechanism():
    with pytest.raises(ValueError, match="'nope'.*single_head, mha, mqa, gqa"):
        jforge.get("nope")
