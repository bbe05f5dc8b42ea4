"""What does `python -m optimisers` print?"""

import re
import sys

import pytest

import optimisers as opt
from optimisers.__main__ import main, rules


def test_list_prints_every_public_rule_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0

    said = capsys.readouterr().out
    assert "AdamW(eta=0.001, beta=(0.9, 0.999), lam=0.0, epsilon=1e-08, couple=True)\n    Adam with" in said
    assert [n for n in rules() if f"{n}(" not in said] == []


@pytest.mark.parametrize("rule", sorted(rules()))
def test_show_explains_every_rule(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", rule]) == 0

    said = capsys.readouterr().out
    assert (getattr(opt, rule).__doc__ or "").splitlines()[0] in said
    assert ("def kernel(" in said and "bytes per parameter" in said) or "settings without a default" in said


def test_show_offers_the_rule_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "adamw"]) == 1

    assert capsys.readouterr().err == "there is no rule adamw; did you mean AdamW?\n"


def test_doctor_runs_a_fused_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    said = capsys.readouterr().out
    assert "fused engine  works: within" in said
    assert "mode 700" in said
    for library in ("numpy", "torch", "jax"):
        assert re.search(rf"{library} +numba.*: right, within", said)
        assert re.search(rf"{library} +interpret: right, within", said)


def test_doctor_finds_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimisers.__main__.WITHIN", 0.0)

    assert main(["doctor"]) == 1
    assert "numba: WRONG, within" in capsys.readouterr().out


def test_the_demo_says_how_to_install_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "optimisers.curves", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo"]) == 1

    assert 'write pip install "optimisers[demo]"' in capsys.readouterr().err


def test_a_command_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])

    assert "COMMAND" in capsys.readouterr().err
