"""A few cases of each kind of random input; tests/fuzz.py runs as many as one likes."""

import fuzz
import pytest

CASES = {"ap": 8, "bits": 20, "config": 10, "tokenizer": 8, "weights": 8, "prompts": 8, "kept": 4, "options": 10}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_input(kind):
    for number in range(CASES[kind]):
        try:
            fuzz.check(kind, number)
        except (Exception, fuzz.TooLong) as error:
            error.add_note(f"{kind}, case {number}") if hasattr(error, "add_note") else None
            raise


def test_the_command_is_watched(monkeypatch, tmp_path):
    """The check itself can fail: an error of two lines, another exit code, an error that nobody expected."""
    monkeypatch.setattr(fuzz.evaluate, "EXPERIMENTS", {"ioi": lambda *_: 1 / 0})
    with pytest.raises(AssertionError, match="-> 1, .*this is a bug; the traceback is in"):
        fuzz.run(["--model", "toy-gpt2", "--out", str(tmp_path)])
    monkeypatch.setattr(fuzz.evaluate, "main", lambda _: 2)
    with pytest.raises(AssertionError, match="-> 2"):
        fuzz.run([])
