"""What chapter 17 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "17-last",
        "A causal mask, 4 ranks, each with one run of the sequence. How much work has the last rank, over the mean?",
        default=4,
        unit="times",
        within=1.1,
        reason="The last quarter of the rows has 7 of the 16 half-squares: a run of W ranks ends at (2 W - 1) / W of the mean.",
    ),
    Question(
        "17-crossing",
        "Llama 3 8B: 32 query heads, 8 KV heads, causal. From how many ranks on does all-to-all send less than a ring in zigzag order, forward?",
        default="16",
        choices=("2", "4", "8", "16"),
        reason="A ring brings each rank nearly all keys, 8 heads of them. A team sends a share of 32 query heads, 8 KV heads, and 32 heads of output.",
    ),
    Question(
        "17-decode",
        "A cache of 384 tokens on 4 ranks, one query of 9 heads of 64, fp32. How many bytes does a rank send for a step of decoding?",
        default=100000,
        unit="bytes",
        within=1.2,
        reason="Two steps of a tree, each with an output and an LSE for each head: 9 x (64 + 1) numbers. The length of the cache is not in it.",
    ),
)
