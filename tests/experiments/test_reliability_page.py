"""The harness says what came of its trials, and a broken promise is never a quiet one."""

from typing import NamedTuple

import pytest

from experiments.reliability import __main__ as harness
from experiments.reliability.config import ALL, ReliabilityConfig


class Made(NamedTuple):
    """What a made-up trial found."""

    failures: list[str]
    found: str


def all_of(failures: dict[str, list[str]], raised: str = "") -> dict[str, harness.Trial]:
    """Trials that come to their end at once."""

    def run(name):
        if name == raised:
            raise RuntimeError("it fell over")
        return Made(failures.get(name, []), f"{name} was tried.")

    return {
        name: harness.Trial(lambda *folders, name=name: run(name), f"Promise of {name}.", f"How {name} is tried.")
        for name in ALL
    }


def test_the_page_has_a_row_for_each_promise_with_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "TRIALS", all_of({}))
    harness.main(ReliabilityConfig(page=tmp_path / "page.md", output=str(tmp_path / "scratch")))
    text = (tmp_path / "page.md").read_text()
    for name in ALL:
        assert f"| Promise of {name}. | How {name} is tried. |" in text and f"{name} was tried." in text
    assert "## What is not tried" in text


@pytest.mark.parametrize("raised", ["", "kills"])
def test_a_broken_promise_is_named_on_the_page_and_by_the_exit_status(tmp_path, monkeypatch, capsys, raised):
    monkeypatch.setattr(harness, "TRIALS", all_of({} if raised else {"kills": ["the curve differs"]}, raised))
    with pytest.raises(SystemExit) as ended:
        harness.main(ReliabilityConfig(page=tmp_path / "page.md", output=str(tmp_path / "scratch")))
    assert ended.value.code == 1
    assert "error: broken: kills" in capsys.readouterr().err
    broken = "RuntimeError: it fell over" if raised else "the curve differs"
    assert f"**Broken, 1 times:** {broken}." in (tmp_path / "page.md").read_text()


def test_one_trial_alone_writes_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "TRIALS", all_of({}))
    harness.main(ReliabilityConfig(trials=("nans",), page=tmp_path / "page.md", output=str(tmp_path / "scratch")))
    assert not (tmp_path / "page.md").exists()
