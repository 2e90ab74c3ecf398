"""Which act of the demo asks what, and how questions and answers are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvferry.cli.demo import QUESTIONS, three_questions
from kvferry.cli.demo_answer import conversation
from kvferry.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ([], QUESTIONS),
        (["a?"], ("a?", "a?", "a?")),
        (["a?", "b?"], ("a?", "b?", "b?")),
        (["a?", "b?", "c?"], ("a?", "b?", "c?")),
    ],
)
def test_every_act_has_a_question(given: list[str], asked: tuple[str, ...]) -> None:
    assert three_questions(given) == asked


@pytest.mark.parametrize("given", [["a?", "b?", "c?", "d?"], [""], ["a?", "  "]])
def test_too_many_and_empty_questions_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="one to 3 questions, none of them empty"):
        three_questions(given)


def test_question_and_answer_are_shown_whole_and_as_they_are() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60)
    for line in conversation("What is [bold]this[/bold]?", "One\n\n  " + "long " * 20 + "answer."):
        console.print(line)
    shown = file.getvalue()
    assert " ".join(shown.split()) == f"question: What is [bold]this[/bold]? answer: One {'long ' * 20}answer."
    assert all(line.startswith(" " * 15) for line in shown.splitlines())
