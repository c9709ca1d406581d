"""What chapter 07 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "07-one-tile",
        "64 queries, 16,384 keys, one tile. How many KiB must the program hold for b_s?",
        default=228,
        within=1.1,
        reason="4 bytes a pair. A multiprocessor has 256 KiB of registers, 228 of shared memory.",
    ),
    Question(
        "07-largest-block",
        "128 keys, then 512, in tiles of 32. How does the largest block that the program loads change?",
        default="it is four times as large",
        choices=("it stays the same", "it doubles", "it is four times as large"),
        reason="It is the block of queries, 64 x 64. A tile of keys is 32 x 64, however many pass by.",
    ),
    Question(
        "07-key-loads",
        "200 queries in blocks of 64, 200 keys in tiles of 64. How often is each key loaded?",
        default=1,
        within=1.0,
        reason="Once by each program, and there are 4: the ragged block needs all keys as well.",
    ),
    Question(
        "07-gqa-loads",
        "9 query heads, 3 KV heads, 200 tokens, blocks of 64. How often is each key loaded?",
        default=4,
        within=1.0,
        reason="4 blocks in each of 9 heads are 36 programs, and 12 of them share a KV head.",
    ),
    Question(
        "07-half-sums",
        "float16 sums instead of float32: by which factor do the errors of out and lse grow?",
        default="neither grows: the inputs are float16 anyway",
        choices=("neither grows: the inputs are float16 anyway", "both by 2 to 20", "out by 2 to 20, lse by over 100"),
        reason="32 roundings to 11 bits. out is rounded to them once in any case; lse is float32.",
    ),
    Question(
        "07-base-2",
        "Multiplications and additions in the machine code, fused ones counted once: how many percent are left?",
        default=95,
        within=1.15,
        reason="Without denormal results there is no fix-up around each exponential, of two multiplications and a comparison. And scale, subtraction and log2(e) are one fused instruction for a score.",
    ),
)
