"""Checks of ex11: pages handed out, shared and given back, and attention that reads them where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashlib import reference
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import HEADS_MODULO
from flashlib.course.exercises.pieces import merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.findings import Failure
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial, contrast, show

exercise = Exercise(
    name="ex11",
    file="ex11_paged_cache.py",
    title="A paged KV cache",
    chapter="13_paged_caches",
    difficulty=4,
    importance=4,
    minutes=75,
    forbidden=SDPA,
)

# ----------------------------------------------------------------------------------------------------------- bookkeeping

KEYS_AND_VALUES_SWAPPED = Misconception(
    "keys-values-swapped", "key_pages holds the values, or value_pages the keys.", "Follow one number into its page."
)
APPEND_OVERWRITES = Misconception(
    "append-overwrites",
    "An append wrote over tokens that the page held already: it began at slot 0.",
    "The request holds 6 tokens, a page 4. At which slot of which page does the next one go?",
)
PAGE_FOR_EACH_APPEND = Misconception(
    "page-for-each-append",
    "Every append began on a new page. The slots left in the last one are lost for ever.",
    "A model that writes appends one token at a time. How many pages have you taken after 100 of them?",
)
PAGE_TOO_MANY = Misconception(
    "page-too-many",
    "A request holds more pages than its tokens need.",
    "A page holds 4 tokens, and so does the request. How many pages does it have, in your code?",
)
TABLE_OF_ALL = Misconception(
    "table-of-all-requests",
    "The block table of one request is as wide as the longest of all requests in the cache needs it.",
    "Among which requests is M the largest number of pages: all, or those that were asked for?",
)
TABLE_NOT_PADDED = Misconception(
    "table-not-padded",
    "Behind the last page of a request, the block table does not hold -1. Every number from 0 on is the number of a page.",
    "What would a reader take the numbers behind the last page for?",
)
PAGE_GIVEN_TWICE = Misconception(
    "page-given-twice",
    "A page was given away twice, to two requests or to one: its new tokens are written over the old ones.",
    "When does a page stop being free, and when does it become free again?",
)
APPEND_COPIES = Misconception(
    "append-copies-cache",
    "To append one token, the memory of all pages was copied.",
    "key_pages is reserved once. Which assignment writes into it, and which makes a new tensor?",
)
PAGES_NOT_FREED = Misconception(
    "pages-not-freed",
    "Pages of a request that was freed did not become free. A server that runs for a day ends up with none.",
    "Add a request, append, free it: how many pages are free before, and after?",
)
FREE_PAGES_MISCOUNTED = Misconception(
    "free-pages-miscounted",
    "free_pages is not the number of pages that no request holds.",
    "Every page is held by at least one request or is free. Do your numbers add up?",
)
SILENT_WHEN_OUT = Misconception(
    "silent-when-out",
    "There were not enough free pages, and no OutOfPages came. What was lost is lost silently.",
    "Count the pages that you need, and compare, before you write.",
)
OTHER_ERROR_WHEN_OUT = Misconception(
    "other-error-when-out",
    "Without enough free pages, something else than OutOfPages was raised. The caller cannot tell it from a bug.",
    "Do not wait until taking a page fails: count what is needed, compare, and raise.",
)
CHANGED_WHEN_OUT = Misconception(
    "changed-when-out",
    "OutOfPages came, but the cache is not as it was before: pages were taken, or tokens written or counted.",
    "In which order do you count pages, take them, write and count tokens?",
)
OUT_TOO_EARLY = Misconception(
    "out-too-early",
    "OutOfPages came although there were as many free pages as the append needs.",
    "The request holds 6 tokens, a page 4. How many new pages do 2 more tokens need?",
)


@dataclass
class Held:
    """What one request should hold.

    Attributes:
        keys, values: ``[Hkv, length, D]``.
        counts: how many tokens each append brought.
        family: the request from which it was forked, over however many others, or itself. Only a family may share pages.
    """

    keys: Tensor
    values: Tensor
    counts: list[int]
    family: int

    @property
    def length(self) -> int:
        return sum(self.counts)


class Watched:
    """A student's cache and, beside it, what every request in it should hold."""

    def __init__(self, t: Trial, num_pages: int, page_size: int, heads: int = 2, dim: int = 4) -> None:
        self.t, self.num_pages, self.page_size, self.heads, self.dim = t, num_pages, page_size, heads, dim
        self.cache = t.make("PagedKVCache", num_pages, page_size, heads, dim)
        self.held: dict[int, Held] = {}

    def add(self) -> int:
        request = self._new(self.cache.call("add"), "add")
        empty = torch.empty(self.heads, 0, self.dim)
        self.held[request] = Held(empty, empty, [], request)
        return request

    def fork(self, request: int) -> int:
        try:
            answer = self.cache.call("fork", request)
        except Failure as failure:
            if "It raised OutOfPages" not in failure.finding.says:
                raise
            self.t.fail_as(FORK_COPIES, got=failure.finding.says, expected="no new page")
        child = self._new(answer, "fork")
        self.held[child] = replace(self.held[request], counts=list(self.held[request].counts))
        return child

    def _new(self, request: object, method: str) -> int:
        if type(request) is not int or request in self.held:
            self.t.fail(
                "request-not-new",
                f"{method} should return a number that no other request has.",
                got=show(request),
                expected=f"an int, none of {sorted(self.held)}",
            )
        return request

    def append(self, request: int, count: int) -> None:
        k, v = self.draw(count)
        self.cache.call("append", request, k, v)
        held = self.held[request]
        held.keys, held.values = torch.cat([held.keys, k], 1), torch.cat([held.values, v], 1)
        held.counts.append(count)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        return self.t.randn(self.heads, count, self.dim), self.t.randn(self.heads, count, self.dim)

    def free(self, request: int) -> None:
        self.cache.call("free", request)
        del self.held[request]

    def pages_needed(self, request: int) -> int:
        return -(-self.held[request].length // self.page_size)

    # What the cache says

    def free_pages(self) -> int:
        got = self.cache.get("free_pages")
        if type(got) is not int:
            self.t.fail("wrong-type", "free_pages should be an int.", got=show(got), expected="an int")
        return got

    def tables(self) -> dict[int, list[int]]:
        """The pages of every request, if the block table is what it should be."""
        requests = list(self.held)
        needed = [self.pages_needed(request) for request in requests]
        table = self.cache.call("block_table", requests)
        if isinstance(table, Tensor) and table.ndim == 2 and len(table) == len(requests):
            self._expect_width(table, requests, max(needed))
        table = self.t.expect_tensor(table, "block_table", (len(requests), max(needed)), torch.int32)
        rows = table.tolist()
        pages = {request: row[:count] for request, row, count in zip(requests, rows, needed, strict=True)}
        for request, row in zip(requests, rows, strict=True):
            self._expect_row(request, row, pages)
        self._expect_apart(pages)
        self._expect_width_of_these_alone(requests[needed.index(min(needed))], min(needed))
        return pages

    def _expect_row(self, request: int, row: list[int], pages: dict[int, list[int]]) -> None:
        """The block table's row of a request must have its pages, and then -1."""
        count = len(pages[request])
        if any(page != -1 for page in row[count:]):
            family = [r for r in pages if r != request and self.held[r].family == self.held[request].family]
            mistake = TABLE_NOT_PADDED
            if self.free_pages() < self.num_pages - sum(map(self.pages_needed, pages)):
                mistake = PAGE_TOO_MANY
            elif row[count] != 0 and any(row[count] in pages[relative] for relative in family):
                mistake = FORK_SHARES_THE_LIST
            self.t.fail_as(mistake, got=show(row), expected=f"{count} pages, then -1")
        if not all(0 <= page < self.num_pages for page in row[:count]):
            expected = f"{count} numbers from 0 to {self.num_pages - 1}"
            says = f"The pages of request {request} are not right."
            self.t.fail("wrong-values", says, got=show(row), expected=expected)
        if len(set(row[:count])) < count:
            self.t.fail_as(PAGE_GIVEN_TWICE, got=f"pages {show(row[:count])}", expected=f"{count} different pages")

    def _expect_apart(self, tables: dict[int, list[int]]) -> None:
        """Requests that were not forked from one another have no page in common."""
        holder: dict[int, int] = {}
        for request, pages in tables.items():
            family = self.held[request].family
            for page in pages:
                if holder.setdefault(page, family) != family:
                    self.t.fail_as(PAGE_GIVEN_TWICE, got=f"page {page} of two requests", expected="different pages")

    def _expect_width(self, table: Tensor, requests: list[int], needed: int) -> None:
        if table.shape[1] <= needed:
            return
        got = f"a block table for {table.shape[1]} pages"
        each = max(sum(-(-n // self.page_size) for n in self.held[request].counts) for request in requests)
        mistake = PAGE_FOR_EACH_APPEND if table.shape[1] == each > needed else PAGE_TOO_MANY
        self.t.fail_as(mistake, got=got, expected=f"{needed}")

    def _expect_width_of_these_alone(self, request: int, needed: int) -> None:
        """The table of the shortest request is as wide as its own pages take, not as those of all requests."""
        table = self.cache.call("block_table", [request])
        if (
            isinstance(table, Tensor)
            and table.ndim == 2
            and table.shape[1] > needed
            and (table[:, needed:] == -1).all()
        ):
            self.t.fail_as(TABLE_OF_ALL, got=f"a block table for {table.shape[1]} pages", expected=f"{needed}")

    def expect(self) -> dict[int, list[int]]:
        """Every request must hold what was appended to it. Answers their pages."""
        tables = self.tables() if self.held else {}
        for request, held in self.held.items():
            self.t.expect_equal(
                self.cache.call("length", request),
                held.length,
                f"length of request {request}, of all that was appended,",
            )
        for name in ("key_pages", "value_pages"):
            memory = self.cache.get(name)
            shape = (self.num_pages, self.heads, self.page_size, self.dim)
            memory = self.t.expect_tensor(memory, name, shape, torch.float32)
            for request, pages in tables.items():
                self._expect_tokens(name, memory, request, pages)
        return tables

    def _expect_tokens(self, name: str, memory: Tensor, request: int, pages: list[int]) -> None:
        held = self.held[request]
        own, other = (held.keys, held.values) if name == "key_pages" else (held.values, held.keys)
        got = memory[pages].transpose(0, 1).flatten(1, 2)[:, : held.length]
        if torch.equal(got, own):
            return
        if torch.equal(got, other):
            self.t.fail_as(KEYS_AND_VALUES_SWAPPED, got=name)
        begin = held.length - held.counts[-1]
        newest = own[:, begin]
        start_of_page = begin // self.page_size * self.page_size
        if begin != start_of_page and torch.equal(got[:, start_of_page], newest):
            self.t.fail_as(APPEND_OVERWRITES, got=f"token {begin} of request {request} at slot 0 of its page")
        came, wanted = contrast(f"{name} of request {request}", got, own.double(), 0.0)
        self.t.fail("wrong-values", "The pages do not hold what was appended.", got=came, expected=wanted)

    def expect_free(
        self,
        count: int,
        *,
        too_few: Misconception = FREE_PAGES_MISCOUNTED,
        too_many: Misconception = FREE_PAGES_MISCOUNTED,
    ) -> None:
        got = self.free_pages()
        if got != count:
            mistake = too_few if got < count else too_many
            self.t.fail_as(mistake, got=f"{got} free pages", expected=f"{count} of {self.num_pages}")

    def expect_out(self, request: int, count: int) -> None:
        """Appending so much must raise OutOfPages and change nothing."""
        self.expect()
        before = self.free_pages()
        try:
            self.cache.call("append", request, *self.draw(count))
        except Failure as failure:
            if failure.finding.diagnosis != "exception":
                raise
            if "It raised OutOfPages" not in failure.finding.says:
                self.t.fail_as(OTHER_ERROR_WHEN_OUT, got=failure.finding.says, expected="OutOfPages")
        else:
            self.t.fail_as(SILENT_WHEN_OUT, got="no error", expected="OutOfPages")
        self.expect_free(before, too_few=CHANGED_WHEN_OUT, too_many=CHANGED_WHEN_OUT)
        try:
            self.expect()
        except Failure as failure:
            self.t.fail_as(CHANGED_WHEN_OUT, got=failure.finding.got, expected="what the cache held before")

    def append_what_fits(self, request: int, count: int) -> None:
        try:
            self.append(request, count)
        except Failure as failure:
            if "It raised OutOfPages" not in failure.finding.says:
                raise
            self.t.fail_as(OUT_TOO_EARLY, got=failure.finding.says, expected=f"room for {count} more tokens")


@exercise.property(
    points=3,
    hints=[
        "A request is a list of page numbers and a length. What does an append of n tokens do to each?",
        "It needs ceil((length + n) / page_size) pages and has ceil(length / page_size).",
        "Token t: pages[t // page_size], slot t % page_size. Memory indexed as [page, :, slot] is [n, Hkv, D].",
    ],
)
def pages_hold_what_is_appended(t: Trial) -> None:
    """PagedKVCache: what is appended to a request lies in its pages, in order, and in no more of them than it needs"""
    for page_size in (4, 3, 1):
        cache = Watched(t, 12, page_size)
        request = cache.add()
        for count in (4, 1, 1, t.integer(3, 4)):
            cache.append(request, count)
            cache.expect()
        cache.expect_free(12 - cache.pages_needed(request))


@exercise.property(
    points=2,
    hints=[
        "Where do new pages come from? No request may know which ones the others will want.",
        "Keep a list of the free pages, and take one from it at a time.",
    ],
)
def requests_grow_side_by_side(t: Trial) -> None:
    """PagedKVCache: requests that grow in turn do not touch each other's tokens"""
    cache = Watched(t, 16, 4)
    requests = [cache.add() for _ in range(3)]
    for counts in ((5, 0, 2), (1, 7, 1), (3, 1, 4), (0, 2, 1)):
        for request, count in zip(requests, counts, strict=True):
            if count:
                cache.append(request, count)
    cache.expect()
    cache.expect_free(16 - sum(map(cache.pages_needed, requests)))


@exercise.property(
    points=2,
    hints=["free must give back every page of the request, and append must be able to take it again."],
)
def freed_pages_serve_others(t: Trial) -> None:
    """PagedKVCache: pages of a request that was freed can be used again, and the others keep theirs"""
    cache = Watched(t, 6, 4)
    stays = cache.add()
    cache.append(stays, 6)
    for round_ in range(3):
        comes = cache.add()
        cache.append_what_fits(comes, 16 - 5 * round_)
        cache.expect()
        cache.free(comes)
        cache.expect_free(4, too_few=PAGES_NOT_FREED)
    cache.expect()


@exercise.property(
    points=2,
    hints=[
        "Count before you take: how many new pages does this append need, and how many are free?",
        "Two requests may both have room in their last pages when no page is free.",
    ],
)
def running_out_loses_nothing(t: Trial) -> None:
    """PagedKVCache: without enough free pages OutOfPages is raised, and nothing has changed"""
    cache = Watched(t, 5, 4)
    first, second = cache.add(), cache.add()
    cache.append(first, 6)
    cache.append(second, 5)
    cache.expect()
    cache.expect_out(first, 7)  # two pages more, and there is one
    cache.expect_out(second, 8)  # the first of these tokens would still have room
    cache.append_what_fits(first, 2)
    cache.append_what_fits(second, t.integer(4, 7))
    cache.expect()
    cache.expect_out(first, 1)


@exercise.property(
    points=1,
    hints=["Which of your operations touches pages that the new token does not go to?"],
)
def appending_writes_in_place(t: Trial) -> None:
    """PagedKVCache: appending a token does not copy the other pages"""
    cache = Watched(t, 256, 8, dim=16)
    request = cache.add()
    cache.append(request, 9)
    k, v = cache.draw(1)
    meter = t.ask("append", (request, k, v), on=cache.cache.handle, meter={}).meter
    made = meter.get("largest_elements") if isinstance(meter, dict) else None
    allowed = 8 * cache.heads * cache.page_size * cache.dim
    if not isinstance(made, int) or made > allowed:
        t.fail_as(APPEND_COPIES, got=f"a tensor of {made} elements", expected=f"at most {allowed}, some pages' worth")


# -------------------------------------------------------------------------------------------------------------- sharing

FORK_COPIES = Misconception(
    "fork-copies",
    "fork took new pages. A thousand answers to one prompt would hold the prompt a thousand times.",
    "What does a child need to know to read its parent's tokens? It need not own them.",
)
FORK_SHARES_THE_LIST = Misconception(
    "fork-shares-the-list",
    "What one request appended changed the other's pages: both use one list object.",
    "After b = a, what does b.append(1) do to a?",
)
WRITES_INTO_SHARED_PAGE = Misconception(
    "writes-into-shared-page",
    "A token was written into a page that another request holds too. The slot behind its own tokens is free for both of them.",
    "Parent and child hold 6 tokens, a page 4. Where does the child's 7th go, and where the parent's?",
)
COPIES_TOO_MUCH = Misconception(
    "copies-too-much",
    "Full pages were copied on the first append. Nobody writes to a full page again, so that it can be shared for ever.",
    "Which of a request's pages does an append write to?",
)
COPIES_ITS_OWN_PAGE = Misconception(
    "copies-its-own-page",
    "A page was copied although no other request held it any more.",
    "The child has got its copy. How many requests hold the original now?",
)
SHARED_PAGES_FREED = Misconception(
    "shared-pages-freed",
    "When one request was freed, pages that another one still holds became free, or were given to a third.",
    "Who else holds this page? Count its holders.",
)
COPY_INCOMPLETE = Misconception(
    "copy-incomplete",
    "The page that a request got as its own copy does not hold what the shared page held.",
    "Which tensors hold a token?",
)


@exercise.property(
    points=3,
    hints=[
        "fork copies the list of pages, not the pages.",
        "Keep, for each page, how many requests hold it. When is it safe to write to a page?",
        "Before writing into the last page: if somebody else holds it, take a new one, copy, and leave the old one to him.",
    ],
)
def forks_share_until_they_write(t: Trial) -> None:
    """fork: pages are shared, one is copied when it is written to, and both requests keep their own tokens"""
    cache = Watched(t, 12, 4)
    parent = cache.add()
    cache.append(parent, 10)  # two full pages and one half full
    child = cache.fork(parent)
    cache.expect_free(9, too_few=FORK_COPIES)
    before = cache.expect()[parent]
    cache.append(child, 1)
    expect_gone_apart(cache, parent, child, before)
    cache.expect_free(8, too_few=COPIES_TOO_MUCH)
    cache.append(parent, 1)  # nobody else has its last page now
    cache.expect()
    cache.expect_free(8, too_few=COPIES_ITS_OWN_PAGE)
    cache.append(child, 6)
    tables = cache.expect()
    if tables[parent][:2] != tables[child][:2]:
        t.fail_as(
            COPIES_TOO_MUCH, got=f"pages {tables[parent]} and {tables[child]}", expected="the first two in common"
        )


def expect_gone_apart(cache: Watched, parent: int, child: int, before: list[int]) -> None:
    """The child has written; the parent's pages and tokens must be what they were."""
    table = cache.cache.call("block_table", [parent])
    row = table[0].tolist() if isinstance(table, Tensor) and table.ndim == 2 and len(table) == 1 else None
    if row != before:
        cache.t.fail_as(FORK_SHARES_THE_LIST, got=f"pages {show(row)} of the parent", expected=f"{before}, as before")
    tables = cache.tables()
    if tables[parent][-1] == tables[child][-1]:
        cache.t.fail_as(
            WRITES_INTO_SHARED_PAGE,
            got=f"page {tables[child][-1]}, written to, in both",
            expected="a copy for the child",
        )
    try:
        cache.expect()
    except Failure as failure:
        if failure.finding.diagnosis != "wrong-values":
            raise
        cache.t.fail_as(COPY_INCOMPLETE, got=failure.finding.got, expected=failure.finding.expected)


@exercise.property(
    points=2,
    hints=["A full last page needs no copy: the next token goes to a new page.", "Try fork with no tokens at all."],
)
def forks_at_the_edge_of_a_page(t: Trial) -> None:
    """fork: of requests whose pages are full, of empty ones, and of forks"""
    cache = Watched(t, 12, 4)
    parent = cache.add()
    early = cache.fork(parent)
    cache.append(parent, 8)
    child = cache.fork(parent)
    grandchild = cache.fork(child)
    cache.expect_free(10, too_few=FORK_COPIES)
    for request, count in ((child, 1), (grandchild, 2), (early, 3), (parent, 1)):
        cache.append(request, count)
        cache.expect()
    cache.expect_free(6, too_few=COPIES_TOO_MUCH)


@exercise.property(
    points=2,
    hints=[
        "free takes one holder away from each page. It is free when none is left.",
        "Whoever gets a copy of a page leaves the original: it has one holder less.",
    ],
)
def forks_outlive_each_other(t: Trial) -> None:
    """fork: freeing one of them leaves the other whole, and at the end every page is free"""
    cache = Watched(t, 6, 4)
    parent = cache.add()
    cache.append(parent, 6)
    child = cache.fork(parent)
    before = cache.expect()[parent]
    cache.append(child, 1)
    expect_gone_apart(cache, parent, child, before)
    cache.free(parent)  # of its two pages, the first is still the child's
    cache.expect_free(4, too_few=PAGES_NOT_FREED, too_many=SHARED_PAGES_FREED)
    third = cache.add()
    cache.append_what_fits(third, 16)
    try:
        cache.expect()
    except Failure as failure:
        if failure.finding.diagnosis not in ("wrong-values", PAGE_GIVEN_TWICE.slug):
            raise
        t.fail_as(SHARED_PAGES_FREED, got=failure.finding.got, expected="the child's tokens as they were")
    cache.expect_out(child, 2)
    cache.append_what_fits(child, 1)  # alone with its last page, and that has a slot left
    cache.expect()
    cache.free(child)
    cache.free(third)
    cache.expect_free(6, too_few=PAGES_NOT_FREED)


@exercise.property(
    points=1, hints=["The copy of the shared page needs a free page, too. Count it before you take any."]
)
def running_out_while_sharing(t: Trial) -> None:
    """fork: without a free page for the copy OutOfPages is raised, and nothing has changed"""
    cache = Watched(t, 3, 4)
    parent = cache.add()
    cache.append(parent, 6)
    child = cache.fork(parent)
    cache.expect_free(1, too_few=FORK_COPIES)
    before = cache.expect()[parent]
    try:
        cache.expect_out(child, 3)  # a copy and a page more, and there is one
    except Failure as failure:
        if failure.finding.diagnosis != SILENT_WHEN_OUT.slug or cache.cache.call("length", child) != 9:
            raise
        t.fail_as(WRITES_INTO_SHARED_PAGE, got="room for 3 tokens, 2 of them in the shared page", expected="OutOfPages")
    cache.append_what_fits(child, 1)
    expect_gone_apart(cache, parent, child, before)
    cache.expect_free(0, too_few=COPIES_TOO_MUCH)


# ------------------------------------------------------------------------------------------------------------- attention


def tokens_of(pages: Tensor, row: Tensor, length: int) -> Tensor:
    """A request's tokens ``[Hkv, length, D]`` out of memory ``[P, Hkv, T, D]``."""
    held = row[: -(-length // pages.shape[2])].long()
    return pages[held].transpose(0, 1).flatten(1, 2)[:, :length]


@dataclass(frozen=True)
class PagedMistake:
    """Attention over pages in float64 with one mistake, or with none.

    Attributes:
        seen: how many tokens of request i are looked at, from all lengths, i, the page size and the table's width.
        tokens: a request's tokens, from memory, its row of the table and how many.
        kv_head: which KV head query head h looks at, of Hq and Hkv heads.
        by_page: every page by itself, and the mean of their outputs, weighted by `weigh` of their numbers of tokens.
    """

    seen: Callable[[list[int], int, int, int], int] = lambda lengths, i, page_size, width: lengths[i]
    tokens: Callable[[Tensor, Tensor, int], Tensor] = tokens_of
    kv_head: Callable[[int, int, int], int] = lambda h, q_heads, kv_heads: h // (q_heads // kv_heads)
    by_page: bool = False
    weigh: Callable[[list[int]], list[float]] = lambda counts: [1.0] * len(counts)

    def __call__(self, q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        _, kv_heads, page_size, dim = key_pages.shape
        lengths = lengths.tolist()
        out = torch.zeros(q.shape, dtype=torch.float64)
        for i, row in enumerate(table):
            seen = self.seen(lengths, i, page_size, table.shape[1])
            keys, values = (self.tokens(x, row, seen).double() for x in (key_pages, value_pages))
            pieces = range(0, seen, page_size) if self.by_page else [0]
            size = page_size if self.by_page else max(seen, 1)
            for h in range(q.shape[1]):
                kv_head = self.kv_head(h, q.shape[1], kv_heads)
                scores = keys[kv_head] @ q[i, h].double() * dim**-0.5
                outs = [torch.softmax(scores[p : p + size], 0) @ values[kv_head, p : p + size] for p in pieces]
                weights = torch.tensor(self.weigh([min(size, seen - p) for p in pieces]), dtype=torch.float64)
                out[i, h] = weights / weights.sum() @ torch.stack(outs) if outs else 0.0
        return out


def _in_order(pages: Tensor, row: Tensor, length: int) -> Tensor:
    """As if the pages of a request were 0, 1, 2, ..."""
    return tokens_of(pages, torch.arange(len(row)), length)


def _reshaped(pages: Tensor, row: Tensor, length: int) -> Tensor:
    held = pages[row[: -(-length // pages.shape[2])].long()]
    return held.reshape(pages.shape[1], -1, pages.shape[3])[:, :length]


LAST_PAGE_COUNTED_WHOLE = Misconception(
    "last-page-counted-whole",
    "All slots of the last page were counted, also those that hold no token. There lies what an earlier request left.",
    "A request of 6 tokens holds two pages of 4. How many keys may its query see?",
    PagedMistake(seen=lambda lengths, i, page_size, width: -(-lengths[i] // page_size) * page_size),
)
FREE_SLOTS_REACH_THE_OUTPUT = Misconception(
    "free-slots-reach-the-output",
    "A slot that holds no token of the request has an influence on its output. NaN there, times a weight of 0, is NaN.",
    "Do not compute with such slots at all: how many of a page's slots are the request's?",
)
PAGED_MISTAKES = (
    replace(HEADS_MODULO, model=PagedMistake(kv_head=lambda h, q_heads, kv_heads: h % kv_heads)),
    Misconception(
        "table-ignored",
        "The block table was not used: the pages of a request need not be 0, 1, 2, ...",
        "Where do you use the numbers in block_table?",
        PagedMistake(tokens=_in_order),
    ),
    Misconception(
        "pages-reshaped",
        "The pages [m, Hkv, T, D] were reshaped to [Hkv, m * T, D]. That mixes heads and tokens; the axes must be exchanged first.",
        "Which two axes have to lie next to each other before they can become one?",
        PagedMistake(tokens=_reshaped),
    ),
    Misconception(
        "newest-token-missed",
        "The last token was left out. lengths counts the new token: it sees itself.",
        "A request with lengths[i] = 1: how many keys does its query see?",
        PagedMistake(seen=lambda lengths, i, page_size, width: lengths[i] - 1),
    ),
    LAST_PAGE_COUNTED_WHOLE,
    Misconception(
        "last-page-dropped",
        "The last page was left out, though it holds tokens.",
        "How many pages does a request of 6 tokens hold, with 4 to a page? How many do you visit?",
        PagedMistake(seen=lambda lengths, i, page_size, width: (lengths[i] - 1) // page_size * page_size),
    ),
    Misconception(
        "one-length-for-all",
        "All requests were read to the length of the longest, or of the first.",
        "Where does the length of request i enter into its own output?",
        PagedMistake(seen=lambda lengths, i, page_size, width: max(lengths)),
    ),
    Misconception(
        "one-length-for-all",
        "All requests were read to the length of the longest, or of the first.",
        "Where does the length of request i enter into its own output?",
        PagedMistake(seen=lambda lengths, i, page_size, width: lengths[0]),
    ),
    Misconception(
        "weighted-by-length",
        "The pages were weighted by their number of tokens. A key counts by exp(score), and not all scores are equal.",
        "One page holds one key with a score of 20, another four keys with a score of 0. Where should the weight be?",
        PagedMistake(by_page=True, weigh=lambda counts: [float(count) for count in counts]),
    ),
    Misconception(
        "pages-averaged",
        "Attention was computed for each page by itself, and the mean was taken. A page with larger scores must count more.",
        "By what are the outputs of two sets of keys weighted? Chapter 12 has the answer.",
        PagedMistake(by_page=True),
    ),
)


def as_dense(q, key_pages, value_pages, table, lengths) -> Dense:
    """All requests, filled up to the longest with keys that are absent."""
    longest = int(lengths.max())
    keys, values = (
        torch.stack(
            [pad(tokens_of(x, row, n), (0, 0, 0, longest - n)) for row, n in zip(table, lengths.tolist(), strict=True)]
        ).repeat_interleave(q.shape[1] // key_pages.shape[1], 1)
        for x in (key_pages, value_pages)
    )
    absent = (torch.arange(longest) >= lengths[:, None])[:, None, None]
    sizes = (key_pages.shape[2], longest, q.shape[1], key_pages.shape[1], q.shape[1] // key_pages.shape[1])
    return Dense(q[:, :, None], keys, values, q.shape[-1] ** -0.5, True, sizes, absent, block=key_pages.shape[2])


FORMULA_MISTAKES = formula_mistakes(
    as_dense,
    lambda out, lse: out[:, :, 0],
    leave=(
        *("scale-ignored", "wrong-axis", "masked-after-softmax", "newest-key-missed"),
        *("causal-sees-the-next", "accumulated-in-half"),
    ),
)
PADDED_COPY = Misconception(
    "padded-copy",
    "All requests were copied into one tensor as long as the longest. One long request among short ones makes it mostly padding.",
    "Which loop, or which list of pages, has as many entries as there are tokens, and no more?",
)


def exact_attention(q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    outs = [reference.oracle(*one)[0][0, :, 0] for one in _requests(q, key_pages, value_pages, table, lengths)]
    return torch.stack(outs)


def attention_budget(q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor) -> float:
    problems = _requests(q, key_pages, value_pages, table, lengths)
    return max(merged_budget(q, k, v, math.ceil(k.shape[2] / key_pages.shape[2])).out for q, k, v in problems)


def _requests(q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor):
    """Every request as a problem of its own: q ``[1, Hq, 1, D]``, k and v ``[1, Hkv, length, D]``."""
    for i, length in enumerate(lengths.tolist()):
        yield q[i, None, :, None], *(tokens_of(x, table[i], length)[None] for x in (key_pages, value_pages))


paged_attention = Target(
    "paged_attention",
    oracle=exact_attention,
    budget=attention_budget,
    misconceptions=(*PAGED_MISTAKES, *FORMULA_MISTAKES),
)


def draw(t: Trial, lengths: list[int], *, page_size: int = 4, q_heads: int = 4, kv_heads: int = 2, dim: int = 8):
    """Requests of these lengths on pages in random order, all others of which hold something, too."""
    needed = [-(-length // page_size) for length in lengths]
    num_pages = sum(needed) + 3
    order = 1 + t.permutation(num_pages - 1)  # page 0 is nobody's, so that whoever ignores the table reads it
    table = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    for i, pages in enumerate(order[: sum(needed)].split(needed)):
        table[i, : needed[i]] = pages
    keys, values = t.randn(2, num_pages, kv_heads, page_size, dim)
    q = 2 * t.randn(len(lengths), q_heads, dim)
    return q, keys, values, table, torch.tensor(lengths, dtype=torch.int32)


def poisoned(key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same memory with NaN in every slot that holds no token of these requests."""
    page_size = key_pages.shape[2]
    held = torch.zeros(len(key_pages), page_size, dtype=torch.bool)
    for row, length in zip(table.long(), lengths.tolist(), strict=True):
        token = torch.arange(length)
        held[row[token // page_size], token % page_size] = True
    return tuple(x.masked_fill(~held[:, None, :, None], math.nan) for x in (key_pages, value_pages))


@exercise.property(
    points=3,
    hints=[
        "Take one request first: its pages, in the order of its row, hold its tokens in order.",
        "key_pages[row] is [m, Hkv, T, D]. Exchange the first two axes, then m and T become one axis of tokens.",
        "Cut that off at the request's length, and attend as in chapter 5, G query heads to each KV head.",
    ],
)
def attention_reads_pages(t: Trial) -> None:
    """paged_attention agrees with float64, for requests of different lengths on pages in any order"""
    t.check(paged_attention, *draw(t, [9, 3, 14, 8]))
    t.check(paged_attention, *draw(t, [5, 1, 12], page_size=1, q_heads=6, dim=16))
    t.check(paged_attention, *draw(t, [2, 7], page_size=16, q_heads=3, kv_heads=3))
    t.check(paged_attention, *draw(t, [t.integer(17, 30)], page_size=5, kv_heads=1))


@exercise.property(
    points=2,
    hints=["Slice the keys and the values to the request's tokens, before anything is computed with them."],
)
def attention_ignores_free_slots(t: Trial) -> None:
    """paged_attention: what lies in slots without a token of the request does not matter, be it NaN"""
    q, *memory, table, lengths = draw(t, [6, 1, 11])
    try:
        t.check(paged_attention, q, *poisoned(*memory, table, lengths), table, lengths)
    except Failure as failure:
        if "nan" not in failure.finding.got.lower():
            raise
        t.fail_as(FREE_SLOTS_REACH_THE_OUTPUT, got=failure.finding.got, expected=failure.finding.expected)


@exercise.property(
    points=2,
    hints=[
        "A batch of one request of 4,096 tokens and 31 of 24 holds 4,840 tokens. Padded it would hold 131,072.",
        "A loop over the requests is fine here; a kernel would have one program for each.",
    ],
)
def attention_does_not_pad(t: Trial) -> None:
    """paged_attention makes no tensor that pads all requests to the longest"""
    lengths = [24] * 31
    lengths.insert(t.integer(0, 31), 4096)
    q, keys, values, table, counts = draw(t, lengths, page_size=16, dim=32)
    try:
        few = draw(t, [3, 17, 40], page_size=16, dim=32)
        t.check(paged_attention, *few)  # who fails anyway is told so at less expense
        arguments = q, keys, values, table, counts
        t.check_tiled(
            paged_attention, *arguments, largest=2 * keys.numel(), memory=16 * MIB, first=few
        )  # padded: 32 MiB
    except Failure as failure:
        if failure.finding.diagnosis != "untiled":
            raise
        t.fail_as(PADDED_COPY, got=failure.finding.got, expected=failure.finding.expected)


@exercise.property(points=1, hints=["Names that end in _, and x[...] =, write into the caller's memory."])
def attention_leaves_its_inputs_alone(t: Trial) -> None:
    """paged_attention does not change q, the pages, the table or the lengths"""
    t.check_inputs_untouched(paged_attention, *draw(t, [6, 3]))
