"""What chapter 12 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "12-busy",
        "Llama 3 8B (8 KV heads) writes for one user on an H200 with 132 multiprocessors. One program for each pair: what share of the multiprocessors has any work?",
        default=100,
        unit="%",
        within=1.2,
        reason="8 of 132.",
    ),
    Question(
        "12-added",
        "8 splits. How far is this from attention, relative to its size?",
        default="1e-8 to 1e-6",
        choices=("1e-8 to 1e-6", "about 1%", "more than 100%"),
        reason="Each split's weights already sum to 1. Eight of them sum to 8.",
    ),
    Question(
        "12-work",
        "512 queries, 512 keys, in 8 splits instead of 1. How many times as many floating-point operations?",
        default="an eighth",
        choices=("an eighth", "the same", "eight times"),
        reason="Every query still meets every key. Each split has an eighth of the work, and there are eight.",
    ),
    Question(
        "12-best",
        "8 pairs (Llama 3 8B, one user), 8,192 keys, 132 multiprocessors. How many splits does the model choose?",
        default=128,
        within=1.2,
        reason="{programs} programs fit into one wave of 132. With many more, some would wait.",
    ),
    Question(
        "12-orders",
        "The same 16 pieces, merged in 200 random orders. How many different results, to the last bit?",
        default="1",
        choices=("1", "2 to 100", "more than 100"),
        reason="Addition rounds, and rounds differently in another order.",
    ),
    Question(
        "12-batch",
        "A request is decoded alone, and later in a batch of 8. Everything else is equal, and the number of splits is chosen as above. Same bits?",
        default="yes",
        choices=("yes", "no"),
        reason="16 splits or 2: other cuts, other roundings.",
    ),
)
