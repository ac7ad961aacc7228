"""Split strings such as '969,30,1': which documents of a file are for training, validation and test."""

from __future__ import annotations

import itertools
import math
import re
from typing import Literal

from megarewarm.errors import UserError

Rule = Literal["neox", "megatron"]
Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, Part, Part] = ("train", "valid", "test")


def parse_split(text: str) -> tuple[float, ...]:
    """Shares of train, valid and test: "0.98,0.01,0.01". Raises ``UserError``."""
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        shares = ()
    if not 2 <= len(shares) <= 3 or not all(0 < share < math.inf for share in shares):
        raise UserError(f"--split {text}: expected two or three shares above 0, as 0.98,0.01,0.01 (train, valid, test)")
    return tuple(share / sum(shares) for share in shares)


def split_documents(split: str, num_documents: int, rule: Rule = "neox") -> dict[Part, tuple[int, int]]:
    """Document ranges [first, last) of the three parts of a file, by the rounding of GPT-NeoX or of Megatron-LM.

    ``split`` holds up to three shares, separated by ``,`` or ``/``; left-out shares are 0. The two rules differ by at
    most a few documents: GPT-NeoX rounds each part's length and shifts all boundaries by the error that this leaves,
    Megatron-LM rounds the boundaries themselves (both half to even). Raises ``UserError`` for shares that are not
    non-negative numbers, and where GPT-NeoX's shift would push a boundary below document 0.
    """
    shares = _shares(split)
    total = shares[0] + shares[1] + shares[2]
    fractions = [share / total for share in shares]
    if rule == "megatron":
        bounds = [round(edge * num_documents) for edge in itertools.accumulate(fractions, initial=0.0)]
    else:
        lengths = [round(fraction * num_documents) for fraction in fractions]
        bounds = list(itertools.accumulate(lengths, initial=0))
        error = bounds[-1] - num_documents
        bounds = [0] + [bound - error for bound in bounds[1:]]
    if any(first > last for first, last in itertools.pairwise(bounds)):
        raise UserError(
            f"split '{split}' of {num_documents} documents gives a part of negative length under GPT-NeoX's rounding: "
            f"choose shares that come to whole documents"
        )
    return dict(zip(PARTS, itertools.pairwise(bounds), strict=True))


def _shares(split: str) -> list[float]:
    words = [word.strip() for word in split.split("," if "," in split else "/")]
    if not all(re.fullmatch(r"\d+\.?\d*|\.\d+", word) for word in words):
        raise UserError(f"split '{split}' is not a list of shares: write 'train,valid,test', such as '969,30,1'")
    if len(words) > 3:
        raise UserError(f"split '{split}' has {len(words)} shares: write three, 'train,valid,test'")
    shares = [float(word) for word in words] + [0.0] * (3 - len(words))
    if sum(shares) <= 0:
        raise UserError(f"split '{split}' gives nothing to any part: at least one share must be above 0")
    return shares
