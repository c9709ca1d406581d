"""What chapter 05 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "05-same-job",
        "At the second 'White', head 5 looks mostly at the first 'Rabbit'. Of the 9 heads, how many do?",
        default=9,
        within=1.0,
        reason="Heads 3, 4 and 5.",
    ),
    Question(
        "05-kv-head",
        "9 query heads, 3 KV heads. Somebody's code gives query head h the KV head h % 3. Right?",
        default="yes, for all heads",
        choices=("yes, for all heads", "for 3 of the 9 heads", "for none"),
        reason="Neighbors share: head h uses KV head h // 3.",
    ),
    Question(
        "05-copied-bytes",
        "K and V are first copied to nine heads, and then attended. Compared with reading K and V once, how many times as many bytes move?",
        default=3,
        within=1.2,
        reason="Read once, written three times, read three times again. The rest is scores and output.",
    ),
    Question(
        "05-off-by-one",
        "All keys of layer 11 stand one position too far. How much does the layer's output change?",
        default=1,
        unit="%",
        within=2,
        reason="Some heads are made to look exactly one token back, and now they look two back.",
    ),
    Question(
        "05-tokens-processed",
        "A prompt of 100 tokens, and 1,000 tokens written. How many times as many tokens go through the model without a cache as with one?",
        default=10,
        within=1.5,
        reason="Step t reads 100 + t tokens: a quadratic sum.",
    ),
    Question(
        "05-cache-size",
        "Llama 3 8B: 32 layers, 8 KV heads of 128 channels, bf16. The KV cache of 131,072 tokens?",
        default=1,
        unit="GiB",
        within=1.5,
        reason="128 KiB per token. The model's own weights are no larger.",
    ),
    Question(
        "05-first-wrong",
        "The model writes with this function and a cache. Which of its tokens is the first wrong one?",
        default="none of 12",
        choices=("the first", "the second", "a later one", "none of 12"),
        reason="The first comes out of prefill. From then on, each query sees the first key alone.",
    ),
)
