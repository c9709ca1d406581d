# Exercise 19: Ten claims
# difficulty 2/5 · importance 4/5 · about 45 minutes
# Chapter: notebooks/18_claims_checked.ipynb
#
# Check your work with `flashlib grade ex19`, or in a notebook with `check("ex19")`.

"""Ten claims of the kind "ours is faster", each with the table it rests on. Which of them does the table carry?

A claim is a dict:

* ``"ours"``, ``"theirs"``: names of two implementations;
* ``"times"``: how many times as fast ours is said to be, in hundredths: 150 says one and a half times;
* ``"lengths"``: the lengths for which that is said, a list;
* ``"rows"``: the table, a list of dicts in which the keys of the next paragraph are.

A row is one measurement: ``"peer"`` and ``"length"`` say of what; ``"mask"`` and ``"dtype"`` what was computed, and in which type; ``"us"`` the
median in microseconds, ``"low"`` and ``"high"`` the 20th and 80th percentile of its runs; ``"inputs"`` the bytes of all sets of inputs that took turns, and
``"cache"`` those that the last cache before memory holds; ``"error"`` the largest error of the result, ``"budget"`` the largest that is allowed for its
type, and ``"tolerance"`` the one that the test was run with. All numbers are whole. For each name and each length of the claim there is one row;
there may be rows of other names and lengths, which say nothing.
"""


def speedup(claim: dict) -> int:
    """How many times as fast ours is, in hundredths and rounded down, at that length of the claim at which it is least. Times are medians.

    Args:
        claim: as above. What is wrong with the table does not matter here.
    """
    raise NotImplementedError("write speedup here")


def judge(claim: dict) -> tuple[str, list[int]]:
    """The flaw of a claim, and the lengths at which it shows, ascending: ``("stands", [])`` if there is none.

    A claim has one flaw at most. A flaw shows at a length if, of the two rows of that length,

    * ``"other-work"``: one has another mask or another dtype than the other;
    * ``"over-budget"``: either has an error above its budget, whatever tolerance its test was run with;
    * ``"warm-cache"``: either has inputs of less than 3 times the cache, so that a set may still lie there when its turn comes again;
    * ``"no-difference"``: the ranges from low to high have a point in common, and so nothing was shown;
    * ``"picked-length"``: ours is less times as fast than is said. The claim was made of the lengths at which it holds.
    """
    raise NotImplementedError("write judge here")
