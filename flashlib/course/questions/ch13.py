"""What chapter 13 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "13-in-use",
        "The server has memory for 4,096 tokens and gives each request a room for 512. How much of the reserved memory holds a token, on average over all steps?",
        default=70,
        unit="%",
        within=1.3,
        reason="Most are short, and all of them grow from their prompt.",
    ),
    Question(
        "13-at-once",
        "The same requests, the same memory for 4,096 tokens, in pages of 16. Rooms of 512 let 8 requests in at once. How many are there now, on average?",
        default=12,
        within=1.25,
        reason="The memory holds tokens now, and no room for tokens that never come.",
    ),
    Question(
        "13-elsewhere",
        "We move every page to another place in memory, and the block table with it. Does the output change?",
        default="in the last digits",
        choices=("no, not one bit", "in the last digits"),
        reason="Keys are visited in the order of the text, and splits are cut there too. Where a page lies enters no sum.",
    ),
    Question(
        "13-padding",
        "One request of 4,096 tokens and 31 of 100. How many times as many bytes of K and V does a padded batch read?",
        default=2,
        within=1.3,
        reason="32 caches of 4,096 keys are read, for 7,196 tokens.",
    ),
    Question(
        "13-page-size",
        "Pages of 64 instead of 16, for the same requests. How much of the reserved memory then holds tokens?",
        default=50,
        unit="%",
        within=1.15,
        reason="For each request half a page is lost: 32 slots now, where it was 8.",
    ),
    Question(
        "13-answers",
        "A prompt of 200 tokens, and 8 answers of 30 tokens to it, on pages of 16. How many pages in all?",
        default=120,
        within=1.1,
        reason="12 full pages are shared. Each answer has 3 of its own, for 8 tokens of the prompt and 30 more.",
    ),
)
