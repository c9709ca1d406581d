"""What chapter 08 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "08-mask-bytes",
        "Two documents of 128 tokens, causal, 9 heads. How many KiB of mask does the kernel load?",
        default=64,
        unit="KiB",
        within=1.1,
        reason="8 bytes a row, for 256 rows, in each of 9 heads. As booleans: 64 KiB a head.",
    ),
    Question(
        "08-partial-tiles",
        "Causal, blocks of 64 queries, tiles of 16 keys. A block in the middle has how many partial tiles?",
        default=1,
        within=1.0,
        reason="The diagonal crosses 64 keys on its way through 64 rows: 64 / 16 tiles.",
    ),
    Question(
        "08-hole",
        "One block of 32 queries, 8 tiles of 32 keys, the 6 in the middle seen by nobody. Tiles of K loaded?",
        default=2,
        within=1.0,
        reason="The smallest start is 0 and the largest stop 256. What lies between is one range.",
    ),
    Question(
        "08-nan-rows",
        "Causal, 256 tokens, blocks of 32. The value of key 100 is NaN, nothing else. How many rows are NaN?",
        default=156,
        within=1.0,
        reason="156 rows see key 100. Rows 96 to 99 do not, but share a block with rows that do.",
    ),
    Question(
        "08-shared-memory",
        "D = 128, bfloat16, 128 x 128 tiles, 3 stages. How many KiB of shared memory?",
        default=96,
        unit="KiB",
        within=1.05,
        reason="Q is 32 KiB, and each of the 3 stages holds 32 of K and 32 of V.",
    ),
    Question(
        "08-warps",
        "128 x 64 tiles, 3 stages, 8 warps. The same with 4 warps: what becomes of it?",
        default="nothing much: the same tile",
        choices=("nothing much: the same tile", "half the shared memory", "registers spill into memory"),
        reason="Half the threads hold the same accumulator: 128 numbers in each, and 64 scores.",
    ),
    Question(
        "08-candidates",
        "Forward, D = 128. BLOCK_M 64-256, BLOCK_N 32-256, 4 or 8 warps, 1-4 stages: 96 in all. How many fit?",
        default=90,
        within=1.1,
        reason="Stages multiply the tiles of K and V.",
    ),
    Question(
        "08-hgmma",
        "sm_80 has HMMA, a product by one warp. sm_90 has HGMMA. How many HMMA does one HGMMA replace here?",
        default=4,
        within=1.05,
        reason="{old} against {new}: rows, columns and depth of the product.",
    ),
)
