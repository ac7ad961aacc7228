"""What log-likelihoods of choices amount to: accuracies, bits per byte, and which items changed between two evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarewarm.data.tasks.items import Item, Task

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TaskScores:
    """``right``, ``normalised`` (items,): whether the most likely choice is right, as it is (lm-eval's acc) and by
    log-likelihood per byte (acc_bytes; acc_norm counts characters). A continuation alone is right where each of its tokens is
    the most likely one (lm-eval's acc of lambada). ``nats``, ``sizes`` (items,): the negative log-likelihood of the right
    choice, and its bytes. ``likelihoods``: of all choices of each item, in nats."""

    right: Flags
    normalised: Flags
    nats: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    likelihoods: list[npt.NDArray[np.float64]]

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def accuracy_bytes(self) -> float:
        return float(self.normalised.mean())

    @property
    def bits_per_byte(self) -> float:
        """Of the right choices, all of their bits over all of their bytes, as lm-eval's bits_per_byte."""
        return float(self.nats.sum() / self.sizes.sum() / math.log(2))


def score(task: Task, likelihoods: npt.NDArray[np.float64], greedy: Flags) -> TaskScores:
    """Of ``task``, whose choices, one item after another, have these ``likelihoods`` (nats); ``greedy``: whether each token of
    a choice is the most likely one."""
    right, normalised, nats, each = [], [], [], []
    first = 0
    for item in task.items:
        last = first + len(item.pairs)
        own = likelihoods[first:last]
        if len(own) > 1:
            right.append(int(own.argmax()) == item.answer)
            normalised.append(int((own / np.array(item.sizes)).argmax()) == item.answer)
        else:
            right.append(bool(greedy[first]))
            normalised.append(bool(greedy[first]))
        nats.append(-own[item.answer])
        each.append(own)
        first = last
    sizes = np.array([item.sizes[item.answer] for item in task.items])
    return TaskScores(np.array(right), np.array(normalised), np.array(nats), sizes, each)


def chance(items: Sequence[Item]) -> float:
    """The accuracy of guessing."""
    return float(np.mean([1 / len(item.pairs) if len(item.pairs) > 1 else 0.0 for item in items]))


@dataclass(frozen=True)
class Transitions:
    """Shares of a task's items. ``lost``: right before and wrong now; ``won``: wrong before and right now (1 -> 0 and 0 -> 1 of
    arXiv 2510.17776). ``by_chance``: as much of each as guessing alone would give. ``lost_beyond``, ``won_beyond``: the rest,
    no less than 0."""

    lost: float
    won: float
    by_chance: float

    @property
    def lost_beyond(self) -> float:
        return max(0.0, self.lost - self.by_chance)

    @property
    def won_beyond(self) -> float:
        return max(0.0, self.won - self.by_chance)


def transitions(items: Sequence[Item], before: Flags, now: Flags) -> Transitions:
    """Of ``items``, right at two evaluations or not.

    ``by_chance`` as in arXiv 2510.17776 (``create_csv.py`` of github.com/post-forget/post-forget): of items with k choices,
    (1 - accuracy before) (1 - accuracy now) / (k - 1). A guess is wrong k - 1 times as often as right, and the two evaluations
    are taken as independent. Items of different k are counted apart. A continuation alone is not guessed.
    """
    lost, won = before & ~now, ~before & now
    choices = np.array([len(item.pairs) for item in items])
    alike = [choices == k for k in np.unique(choices) if k > 1]
    expected = sum(own.mean() * (~before[own]).mean() * (~now[own]).mean() / (choices[own][0] - 1) for own in alike)
    return Transitions(float(lost.mean()), float(won.mean()), float(expected))


def as_text(flags: Flags) -> str:
    """A 1 for each item that is right, 0 for the others."""
    return "".join("01"[bool(flag)] for flag in flags)


def from_text(text: str) -> Flags:
    return np.array([character == "1" for character in text])
