"""What chapter 03 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "03-tile-bits",
        "Tiles of 64 x 64, of 128 x 32, of 37 x 101: what do they make of the same input?",
        default="the same bits",
        choices=("the same bits", "other bits, all within the error budget", "the smaller the tile, the worse"),
        reason="Rounding depends on the order of additions. No order is the right one.",
    ),
    Question(
        "03-key-reads",
        "Rows outside, 1,000 tokens, 64 rows to a tile. How often is each key read from slow memory?",
        default=1,
        within=1.01,
        reason="Once for each block of rows: 1,000 / 64 = 15.6. The ragged one needs all keys, too.",
    ),
    Question(
        "03-loop-order",
        "Keys outside, same tiles: how many bytes move in all, compared with rows outside?",
        default="fewer",
        choices=("fewer", "as many", "more"),
        reason="K and V are only read. The running output is read and written, and Q is read beside it.",
    ),
    Question(
        "03-largest-growth",
        "512 tokens, then 4,096: by which factor does the largest tensor of tiled attention grow?",
        default=64,
        within=1.2,
        reason="Its largest tensor is the output, N x d. The tiles stay as large as they are.",
    ),
    Question(
        "03-traffic-growth",
        "Same machine, same tile, text four times as long: by which factor does tiled traffic grow?",
        default=4,
        within=1.3,
        reason="Four times as many blocks of rows, and each reads four times as many keys.",
    ),
    Question(
        "03-more-memory",
        "M grows from 72 to 272 KiB, and the tile with it. What is left of the traffic?",
        default=100,
        unit="%",
        within=1.3,
        reason="72 / 272 is 26%: traffic goes as 1 / M.",
    ),
    Question(
        "03-cliff",
        "160 KiB hold tiles of 64 x 64. With tiles of 256 x 256, how does the traffic compare?",
        default="a quarter of it",
        choices=("a quarter of it", "about the same", "several times as much"),
        reason="What does not fit is thrown out before it is used again: Q, accumulator, scores.",
    ),
    Question(
        "03-device-reads",
        "16,384 tokens, 128 rows to a tile: how often is K read from the device's memory?",
        default=128,
        within=1.2,
        reason="The SMs do read it 128 times, but from the L2 cache, where it lies from then on.",
    ),
    Question(
        "03-flops",
        "Multiplications and additions in its matrix products, against standard attention?",
        default="far fewer",
        choices=("far fewer", "the same number", "more"),
        reason="Every query still meets every key: 4 N²d, however it is cut.",
    ),
    Question(
        "03-small-tiles",
        "On this CPU, 512 tokens, tiles of 16 x 16 instead of 256 x 256: how fast are the small ones?",
        default="faster: they stay in the cache",
        choices=("faster: they stay in the cache", "about as fast", "more than three times as slow"),
        reason="1,024 tiles instead of 4, and each costs its trips through Python, however small.",
    ),
    Question(
        "03-kept",
        "2,048 tokens: how many times as much does standard attention keep for the backward pass?",
        default=2,
        within=1.5,
        reason="N² weights against N x d outputs and N log-sum-exps: about N / d.",
    ),
)
