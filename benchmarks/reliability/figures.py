"""The form in which every module of this folder answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What was measured about one bar.

    Attributes:
        bar: the bar, such as "B3".
        question: what had to hold, such as "odd files as expected".
        answer: what was measured, such as "93 of 93".
        holds: whether that reaches the bar.
        note: why not, or what a reader has to know.
    """

    bar: str
    question: str
    answer: str
    holds: bool
    note: str = ""
