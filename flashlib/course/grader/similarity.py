"""Which submissions are alike, beyond what the exercise gave: fingerprints of code in which names do not count.

A verdict it is not: the same few lines solve an exercise for many. Source: Schleimer, Wilkerson, Aiken, "Winnowing: Local
Algorithms for Document Fingerprinting", SIGMOD 2003 (here all k-grams are kept: submissions are small).
"""

from __future__ import annotations

import hashlib
import io
import keyword
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass

K = 16  # tokens in a row that make one fingerprint
LEAST = 40  # fingerprints of its own that a submission needs to be compared
_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER, tokenize.STRING}


@dataclass(frozen=True)
class Pair:
    """Two students, and the share of the smaller one's fingerprints that the other has, too."""

    first: str
    second: str
    alike: float


def alike(sources: Mapping[str, bytes], given: bytes, least: float = 0.8) -> list[Pair]:
    """The pairs that have at least that much in common, the most alike first.

    Args:
        sources: by student. What is no Python is left out.
        given: the exercise as it was handed out: what is in it is nobody's own.
    """
    common = fingerprints(given)
    own = {name: prints - common for name, source in sources.items() if (prints := fingerprints(source))}
    own = {name: prints for name, prints in own.items() if len(prints) >= LEAST}
    names = sorted(own)
    pairs = []
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            small, large = sorted((own[first], own[second]), key=len)
            share = len(small & large) / len(small)
            if share >= least:
                pairs.append(Pair(first, second, share))
    return sorted(pairs, key=lambda pair: (-pair.alike, pair.first, pair.second))


def fingerprints(source: bytes) -> set[int]:
    """Hashes of all runs of `K` tokens, with one name for all names and one number for all numbers. Empty for no Python."""
    words = []
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type in _SKIPPED:
                continue
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                words.append("n")
            elif token.type == tokenize.NUMBER:
                words.append("0")
            elif token.type in (tokenize.INDENT, tokenize.DEDENT):
                words.append(str(token.type))
            else:
                words.append(token.string)
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError):
        return set()
    runs = (" ".join(words[at : at + K]) for at in range(len(words) - K + 1))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}
